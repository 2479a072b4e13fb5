"""What a measurement of sharpness has found: means over batches with standard errors, as numbers and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Estimate:
    """A mean over batches.

    Attributes:
        mean: of the batches' values.
        error: its standard error, from the scatter between batches; NaN for a single batch, and for what belongs to one
            direction that all batches share (the norm of `full`'s gradient, and its `seen`).
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value per batch."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, math.nan)
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if math.isnan(self.error) else f"{self.mean:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Around:
    """The loss around w along one kind of direction.

    Attributes:
        rise: L(w + e) - L(w), in the units of the loss. For random directions (L(w + e) + L(w - e)) / 2 - L(w): the slope,
            whose mean over directions is 0, cancels.
        curvature: e^T H e / rho^2, H the Hessian; None for random directions, or where it was not asked for. Without ASAM it
            is the second derivative along g. To second order the rise is rho gradient_norm + rho^2 curvature / 2.
        gradient_norm: |g| of the gradient that was followed, for ASAM |t g|; None for random directions.
        seen: the part of e that reaches the forward pass after rounding, as `PerturbationReport.seen_gain`: 1 is all of it.
    """

    rise: Estimate
    curvature: Estimate | None
    gradient_norm: Estimate | None
    seen: Estimate


_KINDS = {"own": "its own gradient", "full": "gradient of all", "random": "random"}


@dataclass(frozen=True)
class Sharpness:
    """What `fastpost.sharpness` has measured.

    Attributes:
        rho, adaptive, eta: as given.
        batches, micro_batches: how many were measured; errors are over batches.
        loss: at w.
        own: every micro-batch along its own gradient (m-sharpness).
        full: every batch along the gradient of all batches together; None where it was not asked for.
        random: along random directions of the same length; None where it was not asked for.
        resolution: half a unit in the last place of the loss: differences of this size are rounding.
    """

    rho: float
    adaptive: bool
    eta: float
    batches: int
    micro_batches: int
    loss: Estimate
    own: Around
    full: Around | None
    random: Around | None
    resolution: float

    def as_dict(self) -> dict[str, float]:
        """Every number under one name, such as `own_rise` and `own_rise_se`; what was not measured, or has no error, is left
        out."""
        found = {name: float(getattr(self, name)) for name in ("rho", "batches", "micro_batches", "resolution")}
        estimates = {"loss": self.loss}
        for kind in _KINDS:
            around = getattr(self, kind)
            for field in fields(Around) if around is not None else ():
                estimates[f"{kind}_{field.name}"] = getattr(around, field.name)
        for name, estimate in estimates.items():
            if estimate is not None:
                found[name] = estimate.mean
                if not math.isnan(estimate.error):
                    found[f"{name}_se"] = estimate.error
        return found

    def __str__(self) -> str:
        kind = f"ASAM, eta {self.eta:g}, " if self.adaptive else ""
        parts = "" if self.micro_batches == self.batches else f", {self.micro_batches} micro-batches"
        lines = [
            f"sharpness: {kind}rho {self.rho:g}, {self.batches} batches{parts}, ± standard error over batches",
            f"loss {self.loss}; rises of {self.resolution:.1g} are rounding",
        ]
        table: list[tuple[str, ...]] = [("along", "rise", "curvature", "|t g|" if self.adaptive else "|g|", "seen")]
        for name, title in _KINDS.items():
            around: Around | None = getattr(self, name)
            if around is not None:
                cells = (around.rise, around.curvature, around.gradient_norm)
                row = ("-" if cell is None else str(cell) for cell in cells)
                table.append((title, *row, f"{around.seen.mean:.3g}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join(lines)
