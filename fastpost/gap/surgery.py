"""Two gradients into one without one undoing the other: to forget some texts and retain others (PCGrad, GRU, SAGO)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn

from fastpost import distributed
from fastpost.gap.checks import trained_parameters
from fastpost.ops import params as ops
from fastpost.ranks import Ranks, Sharing

FORGET, RETAIN = "forget", "retain"
Coefficients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _pcgrad(forget: Tensor, retain: Tensor, dot: Tensor) -> tuple[Tensor, Tensor]:
    """f - <f, r> / |r|^2 r + r - <f, r> / |f|^2 f where <f, r> < 0."""
    conflict = dot.clamp(max=0)
    return 1 - conflict / forget, 1 - conflict / retain


def _gru(forget: Tensor, retain: Tensor, dot: Tensor) -> tuple[Tensor, Tensor]:
    """f - <f, r> / |r|^2 r where <f, r> < 0."""
    return torch.ones_like(dot), -dot.clamp(max=0) / retain


_PROJECTIONS: dict[str, Coefficients] = {"pcgrad": _pcgrad, "gru": _gru}
METHODS = (*_PROJECTIONS, "sago")


class SurgeryWindow:
    """Accumulates the gradients of two sides apart, and leaves in `.grad` what a method makes of both.

        with fastpost.gap.SurgeryWindow(model, "gru") as window:
            for side, batch in micro_batches:          # "forget" or "retain"
                window.next(side)
                loss_of(model, batch).backward()       # losses to descend on, for both sides
        optimizer.step()

    With f the gradient of what is to be forgotten (such as `ascent_loss`, `npo_loss`) and r that of what is retained:

    - "pcgrad" (2001.06782): where <f, r> < 0, each loses its part along the other, and the two are added. The paper's random
      order of tasks makes no difference to two of them.
    - "gru" (2503.09117): the gradient nearest to f that does not raise the retained loss: f - <f, r> / |r|^2 r where
      <f, r> < 0, else f. r itself is not followed. Without the moving average of r that the released code has.
    - "sago" (2604.14808): element by element, r where the signs of f and r are opposed, else f. Where f is 0 nothing moves.

    Positive weights of the losses are those of the gradients. Dot products are over all parameters and all shards, in
    float64; they take one reduction of three numbers, and the host waits for nothing. All ranks give the same sides in the
    same order. Beside the gradients one copy of them is held. Where either side has a gradient that is not finite, so has
    the result, and a loss scaler skips the step.

    Args:
        model: a module, or parameters. Give the DDP module itself, so that gradients not yet averaged are noticed.
        method: "pcgrad", "gru" or "sago".

    Raises:
        TypeError: neither a module nor parameters.
        ValueError: another method, or no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module | Iterable[Tensor], method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"SurgeryWindow: method must be one of {', '.join(METHODS)}, not {method!r}")
        self._params = trained_parameters("SurgeryWindow", model)
        inner = distributed.unwrap(model, compiled=True)
        self._ddp = inner if isinstance(inner, nn.parallel.DistributedDataParallel) else None
        self.method = method
        self._open = False
        self._side: str | None = None
        self._held: dict[Tensor, Tensor] = {}

    def __enter__(self) -> SurgeryWindow:
        if self._open:
            raise RuntimeError("SurgeryWindow: already open")
        if distributed.waiting_gradients(self._params):
            raise RuntimeError(
                "SurgeryWindow: FSDP2 holds gradients that it has not reduced, which belong to neither side; call "
                "fastpost.distributed.drop_waiting_gradients(model.parameters()) before the window. optimizer.zero_grad() "
                "does not see them"
            )
        if any(p.grad is not None for p in self._params):
            raise RuntimeError(
                "SurgeryWindow: there are gradients already, which belong to neither side; call optimizer.zero_grad() (with "
                "set_to_none=True, its default) before the window"
            )
        self._open, self._side, self._held = True, None, {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open, done = False, False
        try:
            if kind is None:
                self._finish()
                done = True
        finally:
            self._held = {}
            if not done:  # half of a step is no step
                for p in self._params:
                    p.grad = None
                distributed.drop_waiting_gradients(self._params)

    def next(self, side: str) -> None:
        """What is differentiated from here on is of this side.

        Args:
            side: "forget" or "retain", as often and in such order as micro-batches come.

        Raises:
            ValueError: another side.
            RuntimeError: the window is not open, or the gradients of the side before are still to be reduced over the ranks.
                Nothing is written then.
        """
        if not self._open:
            raise RuntimeError("SurgeryWindow: next() is for inside `with`")
        if side not in (FORGET, RETAIN):
            raise ValueError(f"SurgeryWindow: side must be {FORGET!r} or {RETAIN!r}, not {side!r}")
        if self._side not in (None, side):
            self._check_reduced()
            self._swap()
        self._side = side

    def _check_reduced(self) -> None:
        unsynchronised = self._ddp is not None and not self._ddp.require_forward_param_sync
        if unsynchronised or distributed.waiting_gradients(self._params):
            raise RuntimeError(
                f"SurgeryWindow: the ranks have not reduced the gradients of side {self._side!r} yet; let the last "
                "micro-batch before each change of sides, and before the end, synchronise (outside no_sync), and evaluate "
                "outside of the window"
            )

    def _swap(self) -> None:
        for p in self._params:
            distributed.local_gradient(p)  # sums still to be made over ranks are made now
            gradient, p.grad = p.grad, self._held.pop(p, None)
            if gradient is not None:
                self._held[p] = gradient.clone() if distributed.has_other_writers(gradient) else gradient

    @torch.no_grad()
    def _finish(self) -> None:
        self._check_reduced()
        present = {self._side: any(p.grad is not None for p in self._params)}
        missing = [side for side in (FORGET, RETAIN) if not present.get(side, bool(self._held))]
        if missing:
            raise RuntimeError(
                f"SurgeryWindow: no gradient of side {missing[0]!r} has come; the method needs those of both, each after "
                "its next()"
            )
        found: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        for p in self._params:
            there = self._held.get(p)
            found.append((p, distributed.local_gradient(p), None if there is None else distributed.local(there)))
            _check_sides(*found[-1][1:])
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        for p, here, other in found:
            if here is None and other is None:
                continue
            if here is None:
                assert other is not None
                p.grad = torch.zeros_like(p, dtype=other.dtype)
                here = distributed.local_gradient(p)
                assert here is not None
            pairs.append((p, here, torch.zeros_like(here) if other is None else other))
        if self.method == "sago":
            for _, here, there in pairs:
                _sign_aligned_(here, there, self._side == FORGET)
            return
        forget, retain, dot = self._products(pairs)
        of_forget, of_retain = _PROJECTIONS[self.method](forget, retain, dot)
        # No side without a gradient has a direction to be projected on; what overflowed must show.
        finite = torch.isfinite(forget + retain)
        of_forget = torch.where(finite, torch.where(forget > 0, of_forget, 1.0), torch.nan)
        of_retain = torch.where(finite, torch.where(retain > 0, of_retain, 1.0), torch.nan)
        sides = (of_forget, of_retain) if self._side == FORGET else (of_retain, of_forget)
        factors = tuple(map(_in_two, sides))
        for _, here, there in pairs:
            _combine_(here, there, *factors)

    def _products(self, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """|f|^2, |r|^2 and <f, r> over all parameters and ranks, float64."""
        ranks = Ranks()
        lists: dict[Sharing, tuple[list[Tensor], list[Tensor]]] = {}
        for p, here, there in pairs:
            near, far = lists.setdefault(ranks.sharing(p), ([], []))
            near.append(here)
            far.append(there)
        sums = {}
        for key, (near, far) in lists.items():
            forget, retain = (near, far) if self._side == FORGET else (far, near)
            sums[key] = torch.stack((ops.squared_norm(forget), ops.squared_norm(retain), ops.dot(forget, retain)))
        return ranks.sum(sums)


def _check_sides(here: Tensor | None, there: Tensor | None) -> None:
    """Raises TypeError for gradients of which no signs and dot products are taken."""
    sides = [g for g in (here, there) if g is not None]
    for g in sides:
        if g.layout != torch.strided or not g.is_floating_point():
            kind = g.layout if g.layout != torch.strided else g.dtype
            raise TypeError(
                f"SurgeryWindow: a gradient of shape {tuple(g.shape)} is {kind}; signs and dot products need dense "
                "(sparse=False in embeddings) and real ones"
            )
    if len({g.dtype for g in sides}) > 1:
        first, second = (g.dtype for g in sides)
        raise TypeError(
            f"SurgeryWindow: a gradient of shape {tuple(sides[0].shape)} is {first} on one side and {second} on the other; "
            "give the weight one grad_dtype for both"
        )


Parts = tuple[Tensor, Tensor]


def _in_two(factor: Tensor) -> Parts:
    """Two factors of half the exponent, for one in float64. Beside a gradient of 1e-39 factors leave float32's range while
    products do not. The first part is a power of two, which costs no digits."""
    first = torch.exp2((torch.frexp(factor).exponent // 2).double())
    return first, factor / first


def _combine_(here: Tensor, there: Tensor, of_here: Parts, of_there: Parts) -> None:
    """here = of_here * here + of_there * there, at least in float32; `there` is used up."""
    wide = torch.promote_types(here.dtype, torch.float32)
    other = _times_(there.to(wide), of_there)
    if wide == here.dtype:
        _times_(here, of_here).add_(other)
    else:
        here.copy_(other.add_(_times_(here.to(wide), of_here)))


def _times_(g: Tensor, parts: Parts) -> Tensor:
    for part in parts:
        g.mul_(part.to(g.device, g.dtype))
    return g


def _sign_aligned_(here: Tensor, there: Tensor, here_forgets: bool) -> None:
    """here = r where the signs of f and r are opposed, else f; what is not finite on either side stays visible."""
    forget, retain = (here, there) if here_forgets else (there, here)
    result = torch.where(forget.sign().mul_(retain.sign()) < 0, retain, forget)
    for g in (forget, retain):
        result = torch.where(torch.isfinite(g), result, g)
    here.copy_(result)
