"""How the suite builds and drives an optimizer it knows nothing about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpost.conformance.registry import Failure

# Computes a loss and calls backward; clears nothing. The first runs at w, the second at w + e.
Pass = Callable[[], Tensor]

STYLES = ("two_step", "closure", "closure_after_gradient")


class Adapter:
    """Builds and drives one SAM-like optimizer; override the methods in which yours differs.

    It travels to other processes by pickle, so `make_optimizer` has to be importable there (a class, or a function of a
    module) for the properties of several processes.

    Args:
        make_optimizer: called as (params, base_optimizer_class, rho=..., **base_kwargs), where params are tensors or groups.
        name: heads the table; by default the name of `make_optimizer`.
        style: "two_step": `first_step(zero_grad=True)`, second backward, `second_step(zero_grad=True)`. "closure":
            `step(closure)` runs the closure twice. "closure_after_gradient": the first backward comes before
            `step(closure)`, which runs the closure once. None: two_step where the optimizer has those methods, else closure.
        not_applicable: name of a property to the reason why it means nothing for this optimizer.

    Raises:
        ValueError: an unknown style. TypeError: make_optimizer cannot be called.
    """

    def __init__(
        self,
        make_optimizer: Callable[..., Any],
        *,
        name: str | None = None,
        style: str | None = None,
        not_applicable: Mapping[str, str] | None = None,
    ) -> None:
        if not callable(make_optimizer):
            raise TypeError(
                f"make_optimizer must be a class or a function of (params, base_optimizer_class, rho=...), not a "
                f"{type(make_optimizer).__name__}"
            )
        if style is not None and style not in STYLES:
            raise ValueError(f"style {style!r}: use one of {', '.join(STYLES)}")
        self.make_optimizer = make_optimizer
        self.name = name or str(getattr(make_optimizer, "__name__", type(make_optimizer).__name__))
        self.style = style
        self.not_applicable = dict(not_applicable or {})

    def make(self, params: Any, base: type[torch.optim.Optimizer], *, rho: float, **kwargs: Any) -> Any:
        """The optimizer under test."""
        return self.make_optimizer(params, base, rho=rho, **kwargs)

    def make_base(self, params: Any, base: type[torch.optim.Optimizer], **kwargs: Any) -> Any:
        """The base optimizer alone, with which its steps are compared bit by bit."""
        return base(params, **kwargs)

    def perturbation(self, weights: list[Tensor], grads: list[Tensor | None], rho: float) -> list[Tensor] | None:
        """e as the optimizer documents it, in float64 from float64 inputs; None where it documents no formula.

        By default rho * g / |g| with one norm over all tensors (2010.01412, equation 2).
        """
        norm = torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()
        factor = rho / norm if norm else norm
        return [torch.zeros_like(w) if g is None else g * factor for w, g in zip(weights, grads, strict=True)]

    def style_of(self, opt: Any) -> str:
        """The style in which `opt` is driven."""
        if self.style is not None:
            return self.style
        return "two_step" if hasattr(opt, "first_step") and hasattr(opt, "second_step") else "closure"

    def step(self, opt: Any, first: Pass, second: Pass) -> None:
        """One update from two passes.

        Raises:
            Failure: a closure was called more or less often than its style says.
        """
        style = self.style_of(opt)
        opt.zero_grad()
        if style == "two_step":
            first()
            opt.first_step(zero_grad=True)
            second()
            opt.second_step(zero_grad=True)
            return
        passes = [first, second]
        if style == "closure_after_gradient":
            passes.pop(0)()
        self.run_closure(opt, passes)
        opt.zero_grad()

    def run_closure(self, opt: Any, passes: list[Pass]) -> None:
        """`opt.step(closure)`, where each call of the closure takes the next of `passes`."""
        expected, calls = len(passes), 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if calls > expected:
                raise Failure(f"step(closure) called the closure {calls} times where {expected} were expected")
            opt.zero_grad()
            return passes[calls - 1]()

        opt.step(closure)
        if calls != expected:
            raise Failure(f"step(closure) called the closure {calls} times where {expected} were expected")

    def scaled_step(self, opt: Any, scaler: Any, first: Pass, second: Pass) -> None:
        """One update with a GradScaler; the passes scale their losses.

        Raises:
            Failure: only a closure makes a step, and GradScaler.step takes none.
        """
        if self.style_of(opt) != "two_step":
            raise Failure("a step takes a closure, and GradScaler.step supports none")
        opt.zero_grad()
        first()
        opt.first_step(zero_grad=True)
        second()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    def guarded_step(self, opt: Any, first: Pass, second: Pass) -> None:
        """One update in the form that restores when `second` raises: `step(closure)` where there is one."""
        if not hasattr(opt, "step"):
            self.step(opt, first, second)
            return
        opt.zero_grad()
        # Wrappers differ in whether step(closure) wants the first gradient to be there. So it is, and whether a call of the
        # closure is the first pass or the second shows in the weights.
        tensors = [p for group in opt.param_groups for p in group["params"]]
        start = [p.detach().clone() for p in tensors]
        first()
        called = False

        def closure() -> Tensor:
            nonlocal called
            perturbed = called or any(not torch.equal(p, w) for p, w in zip(tensors, start, strict=True))
            called = True
            opt.zero_grad()
            return second() if perturbed else first()

        opt.step(closure)

    def state_dict(self, opt: Any) -> Any:
        """What a checkpoint holds of the optimizer."""
        return opt.state_dict()

    def load_state_dict(self, opt: Any, state: Any) -> None:
        """Loads what `state_dict` gave into a fresh optimizer."""
        opt.load_state_dict(state)
