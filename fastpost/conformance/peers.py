"""Adapters for other libraries' SAMs, each driven as its documentation says.

    python -m fastpost.conformance fastpost.conformance.peers:pytorch_optimizer

The libraries are imported when an optimizer is built. docs/sam-conformance.md has the tables.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastpost.conformance.adapter import Adapter, Pass
from fastpost.published import PublishedSAM

_BASES = {torch.optim.SGD: "SGD", torch.optim.AdamW: "AdamW"}


class _PytorchOptimizer(Adapter):
    """`pytorch_optimizer.SAM`: first_step and second_step; step(closure) wants the first gradient to be there."""

    def make(self, params: Any, base: type[torch.optim.Optimizer], *, rho: float, **kwargs: Any) -> Any:
        return importlib.import_module("pytorch_optimizer").SAM(params, base, rho=rho, **kwargs)

    def scaled_step(self, opt: Any, scaler: Any, first: Pass, second: Pass) -> None:
        """Its step() insists on a closure, so GradScaler.step cannot be used; unscaling by hand is what remains."""
        opt.zero_grad()
        first()
        opt.first_step(zero_grad=True)
        second()
        scaler.unscale_(opt)
        opt.second_step(zero_grad=True)
        scaler.update()


class _HeavyBall(Adapter):
    """`heavyball.SAMWrapper` around HeavyBall's own SGD and AdamW; its closure runs twice.

    The documented step is ball * p^2 * g, without a norm, so `ball` is no radius. Compilation is switched off, which its
    documentation offers and which changes no result that is looked at here.
    """

    def _base(self, params: Any, base: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> Any:
        heavyball = importlib.import_module("heavyball")
        heavyball.utils.compile_mode = None
        if base is torch.optim.SGD:
            kwargs = {**kwargs, "beta": 0.0}
        return getattr(heavyball, _BASES[base])(params, **kwargs)

    def make(self, params: Any, base: type[torch.optim.Optimizer], *, rho: float, **kwargs: Any) -> Any:
        params = list(params)
        wrapped = self._base(params, base, kwargs)
        return importlib.import_module("heavyball").SAMWrapper(params, wrapped, ball=rho)

    def make_base(self, params: Any, base: type[torch.optim.Optimizer], **kwargs: Any) -> Any:
        return self._base(list(params), base, kwargs)

    def perturbation(self, weights: list[Tensor], grads: list[Tensor | None], rho: float) -> list[Tensor] | None:
        return None


class _TorchZero(Adapter):
    """`torchzero.m.SAM` in a chain of modules; the closure takes `backward` and runs twice."""

    def _build(self, params: Any, base: type[torch.optim.Optimizer], lr: float, sam: list[Any]) -> Any:
        tz = importlib.import_module("torchzero")
        adam = [tz.m.Adam()] if base is torch.optim.AdamW else []
        return tz.Optimizer(params, *sam, *adam, tz.m.LR(lr))

    def make(self, params: Any, base: type[torch.optim.Optimizer], *, rho: float, **kwargs: Any) -> Any:
        return self._build(params, base, kwargs["lr"], [importlib.import_module("torchzero").m.SAM(rho=rho)])

    def make_base(self, params: Any, base: type[torch.optim.Optimizer], **kwargs: Any) -> Any:
        return self._build(params, base, kwargs["lr"], [])

    def run_closure(self, opt: Any, passes: list[Pass]) -> None:
        remaining = list(passes)

        def closure(backward: bool = True) -> Tensor:
            opt.zero_grad()
            return remaining.pop(0)()

        opt.step(closure)


class _Published(Adapter):
    """The popular two-pass loop as `fastpost.published` keeps it: perturb, restore by `p.data =`, step the base."""

    def make(self, params: Any, base: type[torch.optim.Optimizer], *, rho: float, **kwargs: Any) -> Any:
        base_optimizer = base(params, **kwargs)
        tensors = [p for group in base_optimizer.param_groups for p in group["params"]]
        return PublishedSAM(tensors, base_optimizer, rho=rho)

    def step(self, opt: Any, first: Pass, second: Pass) -> None:
        base = opt.base_optimizer
        base.zero_grad()
        first()
        opt.first_step()
        base.zero_grad()
        second()
        opt.second_step()
        base.zero_grad()

    def guarded_step(self, opt: Any, first: Pass, second: Pass) -> None:
        self.step(opt, first, second)

    def scaled_step(self, opt: Any, scaler: Any, first: Pass, second: Pass) -> None:
        base = opt.base_optimizer
        base.zero_grad()
        first()
        opt.first_step()
        base.zero_grad()
        second()
        opt.restore()
        scaler.step(base)
        scaler.update()
        base.zero_grad()


_LOOP = "a loop, not an optimizer: its base optimizer is saved, scheduled and extended apart from it"
_RESUMED = ("resume", "schedule", "distributed checkpoint", "saving while perturbed", "FSDP2 checkpoint", "added parameters")

pytorch_optimizer = _PytorchOptimizer(_PytorchOptimizer, name="pytorch_optimizer.SAM")
heavyball = _HeavyBall(_HeavyBall, name="heavyball.SAMWrapper")
torchzero = _TorchZero(_TorchZero, name="torchzero.m.SAM")
published = _Published(PublishedSAM, name="the published loop", not_applicable=dict.fromkeys(_RESUMED, _LOOP))
