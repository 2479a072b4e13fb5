"""One step of SAM: where it stands, and what became of its perturbation."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Gradients = dict[Tensor, Tensor]


class Phase(enum.Enum):
    """Where a step stands. These are all transitions, with the calls of SAM that make them:

    | from | call | to |
    | --- | --- | --- |
    | CLEAN | `first_step` | PERTURBED |
    | PERTURBED | `end_ascent`, `restore_` | RESTORED |
    | RESTORED | `first_step` (m-SAM: a further ascent in the same step) | PERTURBED |
    | CLEAN, RESTORED | `step`, `zero_grad` | CLEAN, in a new SAMStep |
    | any | `abandon`, an error in `step` or `perturbed` | CLEAN, in a new SAMStep |

    `step`, `passes` and `perturbed` are made of these calls. On steps without an ascent (`interval`) the phases are the same
    and no weight is written. Whether weights are written is known to the perturbation, also after an interrupt.
    """

    CLEAN = "clean"  # the weights are w, the gradients those of a first pass
    PERTURBED = "perturbed"  # the weights are w + e, and a second pass is to come
    RESTORED = "restored"  # the weights are w again, the gradients those of the second pass


class PerturbationSums(NamedTuple):
    """What the pass that writes w + e has added up: the six sums of `ops.sam_perturb_`, and over how many elements."""

    sums: Tensor
    elements: int | Tensor


@dataclass
class SAMStep:
    """All that SAM knows of the present step; a new one takes its place when the step is over.

    Attributes:
        phase: where it stands.
        ascents: how many there were; m-SAM has several.
        squared_norm: of the ascent gradients, added up; None without an ascent.
        sums: of the last perturbation; None without one.
        tensors: how many the optimizer's groups held at the ascent.
        clean: the gradients at w, where the variant keeps them until the second pass is over.
        ascent_factor: what the gradients at w are multiplied by to be on the scale of the whole window's.
        combined: whether the variant has rewritten the gradients for good.
        notes: what others keep of its first passes, each by a key of its own.
    """

    phase: Phase = Phase.CLEAN
    ascents: int = 0
    squared_norm: Tensor | None = None
    sums: PerturbationSums | None = None
    tensors: int = 0
    clean: Gradients = field(default_factory=dict)
    ascent_factor: float | Tensor = 1.0
    combined: bool = False
    notes: dict[object, Any] = field(default_factory=dict)

    @property
    def ascended(self) -> bool:
        """Whether there was an ascent."""
        return self.squared_norm is not None

    def add_norm(self, squared: Tensor) -> None:
        """Notes the squared norm of an ascent. Sums of squares stay NaN or inf once they are."""
        self.squared_norm = (
            squared if self.squared_norm is None else self.squared_norm + squared.to(self.squared_norm.device)
        )


REMEDIES = (
    "rounding='stochastic' or master_params=, which keep e on average; perturb='functional', which keeps it exactly; "
    "float32 weights under autocast; a small float32 part of the model (scope=, for example adapters or norms); a larger rho"
)


class PerturbationReport:
    """Sums gathered by the pass that wrote w + e, and what follows from them.

    Every attribute is a float64 scalar on the parameters' device; nothing waits for the device until one is read with
    `float()`. "Stored" is the difference that w + e left in the weights after rounding to their dtype; "seen" is the
    difference after both are cast to the dtype that the forward pass computes in.

    What is stored is partly e and partly rounding noise. The gain is the part along e: 1 where rounding is fair, even when
    noise many times larger lies on top of it; near 0 where e is lost. The loss rises, to first order, by gain * rho * |g|,
    and the second gradient feels e as much as that: see docs/sam.md for measurements.

    Attributes:
        intended_norm: norm of e as the equations ask for it.
        stored_norm, stored_cosine, stored_gain: norm of what was stored, its cosine with e, and <stored, e> / <e, e>.
        seen_norm, seen_cosine, seen_gain: the same for what the forward pass sees.
        changed_fraction: share of the perturbed elements whose stored weight differs.
    """

    def __init__(self, sums: Tensor, elements: int | Tensor) -> None:
        intended, stored, stored_dot, seen, seen_dot, changed = sums.unbind()
        self.intended_norm = intended.sqrt()
        self.stored_norm = stored.sqrt()
        self.stored_cosine = ratio(stored_dot, (intended * stored).sqrt())
        self.stored_gain = ratio(stored_dot, intended)
        self.seen_norm = seen.sqrt()
        self.seen_cosine = ratio(seen_dot, (intended * seen).sqrt())
        self.seen_gain = ratio(seen_dot, intended)
        self.changed_fraction = changed / torch.as_tensor(elements).clamp(min=1)

    def as_dict(self) -> dict[str, float]:
        """All attributes as Python floats; waits for the device once."""
        values: list[float] = torch.stack(list(vars(self).values())).tolist()
        return dict(zip(vars(self), values, strict=True))

    def line(self) -> str:
        """One line for a log; waits for the device."""
        v = self.as_dict()
        return (
            f"perturbation: intended {v['intended_norm']:.3g}, "
            f"stored {v['stored_norm']:.3g} (cosine {v['stored_cosine']:.2f}), "
            f"seen {v['seen_norm']:.3g} (cosine {v['seen_cosine']:.2f}), gain {v['seen_gain']:.2f}, "
            f"{v['changed_fraction']:.1%} of the weights changed"
        )

    def concern(self) -> str | None:
        """Why this perturbation is not what SAM asks for, with remedies that work, or None; waits for the device.

        It is not where less than half of e, or more than one and a half times e, reaches the forward pass.
        """
        v = self.as_dict()
        if v["intended_norm"] == 0 or 0.5 <= v["seen_gain"] <= 1.5:
            return None
        becomes = "hardly survives" if v["seen_gain"] < 0.5 else "is enlarged by"
        return (
            f"SAM's perturbation {becomes} rounding: {v['seen_gain']:.2g} of it reaches the forward pass (norm "
            f"{v['seen_norm'] / v['intended_norm']:.2g} times the intended one at cosine {v['seen_cosine']:.2g}, "
            f"{v['changed_fraction']:.1%} of the weights change). Remedies: {REMEDIES}."
        )

    def __repr__(self) -> str:
        return f"PerturbationReport({', '.join(f'{k}={v:.4g}' for k, v in self.as_dict().items())})"


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / b)
