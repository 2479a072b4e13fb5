"""Optimizers for the tests of the conformance suite: one that is right, in plain torch, and copies with one defect each."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Right(torch.optim.Optimizer):
    """SAM without speed: one operation per tensor, the weights kept aside."""

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho})
        self.rho = rho
        self.kept: dict[Tensor, Tensor] = {}
        self.waits = False
        self.base = base(self.param_groups, **kwargs)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def tensors(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def norm(self) -> Tensor:
        parts = [whole(p.grad.float().norm()) for p in self.tensors() if p.grad is not None]
        return torch.stack(parts).norm() if parts else torch.zeros(())

    def factor(self) -> Tensor:
        norm = self.norm()
        return 1 / norm if norm != 0 else norm

    def radius(self, p: Tensor) -> float:
        return next(group["rho"] for group in self.param_groups if any(p is q for q in group["params"]))

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        factor = self.factor()
        self.overflowed = not torch.isfinite(self.norm())
        for p in self.tensors():
            if p.grad is not None:
                self.move(p, p.grad * (self.radius(p) * factor).to(p.grad.dtype))
        self.waits = True
        if zero_grad:
            self.zero_grad()

    def move(self, p: Tensor, e: Tensor) -> None:
        self.kept[p] = p.detach().clone()
        p.add_(e)

    @torch.no_grad()
    def restore(self) -> None:
        for p, w in self.kept.items():
            p.copy_(w)
        self.kept.clear()
        self.waits = False

    def second_step(self, zero_grad: bool = False) -> None:
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            loss = self.ascend_and_descend(closure)
        ascended, self.overflowed = getattr(self, "overflowed", False), False
        self.restore()
        if self.may_step(ascended):
            self.unscale()
            self.base.step()
        return loss

    def ascend_and_descend(self, closure: Any) -> Any:
        self.zero_grad()
        loss = closure()
        self.first_step(zero_grad=True)
        try:
            closure()
        finally:
            self.restore()
        return loss

    def may_step(self, ascended_by_nan: bool) -> bool:
        return not ascended_by_nan and bool(torch.isfinite(self.norm()))

    def unscale(self) -> None:
        scale = getattr(self, "grad_scale", None)
        for p in self.tensors() if scale is not None else []:
            if p.grad is not None:
                p.grad.div_(scale)

    def add_param_group(self, group: dict[str, Any]) -> None:
        if hasattr(self, "base"):
            self.base.add_param_group({"rho": self.rho, **group})  # one list for both
        else:
            super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        if self.waits:
            raise RuntimeError("the weights are perturbed")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base.param_groups, self.base.state = self.param_groups, self.state


class Subtracts(Right):
    """Adds e and subtracts it again."""

    def move(self, p: Tensor, e: Tensor) -> None:
        self.kept[p] = e
        p.add_(e)

    @torch.no_grad()
    def restore(self) -> None:
        for p, e in self.kept.items():
            p.sub_(e)
        self.kept.clear()
        self.waits = False


class AssignsData(Right):
    def move(self, p: Tensor, e: Tensor) -> None:
        self.kept[p] = p.data.clone()
        p.add_(e)

    @torch.no_grad()
    def restore(self) -> None:
        for p, w in self.kept.items():
            p.data = w
        self.kept.clear()
        self.waits = False


class LosesNone(Right):
    """Restores what has a gradient."""

    @torch.no_grad()
    def restore(self) -> None:
        for p, w in self.kept.items():
            if p.grad is not None or not self.second:
                p.copy_(w)
        self.kept.clear()
        self.waits = False

    second = False

    def second_step(self, zero_grad: bool = False) -> None:
        self.second = True
        super().second_step(zero_grad)
        self.second = False


class MovesByAnOldGradient(Right):
    """Perturbs by the last e that a parameter had."""

    def first_step(self, zero_grad: bool = False) -> None:
        without = [p for p in self.tensors() if p.grad is None]
        super().first_step(zero_grad)
        self.old: dict[Tensor, Tensor]
        old = self.__dict__.setdefault("old", {})
        with torch.no_grad():
            for p in without:
                if p in old:
                    self.kept[p] = p.detach().clone()
                    p.add_(old[p])

    def move(self, p: Tensor, e: Tensor) -> None:
        self.__dict__.setdefault("old", {})[p] = e.clone()
        super().move(p, e)


class StepsOnNaN(Right):
    def may_step(self, ascended_by_nan: bool) -> bool:
        found_inf = getattr(self, "found_inf", None)
        return found_inf is None or not bool(found_inf)


class HidesOverflowFromTheScaler(Right):
    """Skips the step after an ascent that overflowed, but perturbs nothing, so that the second gradient is finite."""

    def factor(self) -> Tensor:
        return super().factor() if torch.isfinite(self.norm()) else torch.zeros(())

    def move(self, p: Tensor, e: Tensor) -> None:
        super().move(p, e if torch.isfinite(e).all() else torch.zeros_like(e))


class LeavesTheScaleOn(Right):
    def unscale(self) -> None:
        pass


class NotCalledOnOverflow(Right):
    """GradScaler does not call it when a gradient overflowed, and nothing restores."""

    _step_supports_amp_scaling = False


class OneNormPerTensor(Right):
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for p in self.tensors():
            if p.grad is not None:
                norm = p.grad.float().norm()
                self.move(p, p.grad * (self.radius(p) / norm if norm != 0 else norm).to(p.grad.dtype))
        self.waits = True
        if zero_grad:
            self.zero_grad()


class NormOfOneShard(Right):
    def norm(self) -> Tensor:
        parts = [getattr(p.grad, "_local_tensor", p.grad).norm() for p in self.tensors() if p.grad is not None]
        return torch.stack(parts).norm()


class DividesByZero(Right):
    def factor(self) -> Tensor:
        return 1 / self.norm()


class HasNoZero(Right):
    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, base, rho or 0.05, **kwargs)


class KeepsTheFirstGradient(Right):
    """zero_grad=True of the first step clears nothing, so that steps are made with g(w) + g(w + e)."""

    def first_step(self, zero_grad: bool = False) -> None:
        super().first_step()


class StepsWithOneLearningRate(Right):
    def may_step(self, ascended_by_nan: bool) -> bool:
        for group in self.param_groups[1:]:
            group["lr"] = self.param_groups[0]["lr"]
        return super().may_step(ascended_by_nan)


class PerturbsWithOneRho(Right):
    def radius(self, p: Tensor) -> float:
        return float(self.param_groups[0]["rho"])


class NeverPerturbs(Right):
    def move(self, p: Tensor, e: Tensor) -> None:
        pass


class SavesWhilePerturbed(Right):
    def state_dict(self) -> dict[str, Any]:
        return torch.optim.Optimizer.state_dict(self)


class InsistsOnAClosure(Right):
    def step(self, closure: Any = None) -> Any:
        if closure is None and not self.waits:
            raise RuntimeError("a closure is needed")
        return super().step(closure)


class LosesMoments(Right):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**copy.deepcopy(state_dict), "state": {}})


class ComesApartOnLoading(Right):
    """After loading, the base optimizer steps by groups that no scheduler reaches."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base.param_groups = [dict(group) for group in self.param_groups]


class StaysPerturbedOnErrors(Right):
    def ascend_and_descend(self, closure: Any) -> Any:
        self.zero_grad()
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        return loss


class KeepsTheLastMicroBatch(Right):
    """Every backward overwrites the gradients of the one before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        last: dict[Tensor, Tensor] = {}

        def put(p: Tensor) -> None:
            p.grad.copy_(last[p])

        for p in self.tensors():
            p.register_hook(lambda grad, p=p: last.__setitem__(p, grad.clone()))
            p.register_post_accumulate_grad_hook(put)


class ForgetsAddedGroups(Right):
    def tensors(self) -> list[Tensor]:
        return self.__dict__.setdefault("first", super().tensors())


class Unskippable(Right):
    """Skips, but its moments have taken the bad gradient in."""

    def may_step(self, ascended_by_nan: bool) -> bool:
        if super().may_step(ascended_by_nan):
            return True
        for p in self.tensors():
            for value in self.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.ndim:
                    value.mul_(0.5)
        return False


class Hangs(Right):
    def first_step(self, zero_grad: bool = False) -> None:
        time.sleep(1e6)


class Dies(Right):
    def first_step(self, zero_grad: bool = False) -> None:
        os._exit(3)


# Compare e with its formula.
GRADIENTS = {"perturbation", "group options", "tied parameters", "added parameters", "frozen parameters"}
# Compare the step with the base optimizer's.
STEPS = {
    *("group options", "second gradient", "rho zero", "added parameters", "frozen parameters"),
    *("None in first pass", "None in second pass"),
}

# What each defect breaks, and nothing else.
DEFECTS: dict[type[Right], set[str]] = {
    Subtracts: {
        *("restore", "restore bfloat16", "inf: weights return", "inf in first pass", "inf in second pass"),
        *("GradScaler, first pass", "GradScaler, second pass"),
    },
    AssignsData: {"storage"},
    LosesNone: {"None in second pass"},
    MovesByAnOldGradient: {"None in first pass", "frozen parameters"},
    StepsOnNaN: {"inf in first pass", "inf in second pass"},
    Unskippable: {"inf in first pass", "inf in second pass"},
    HidesOverflowFromTheScaler: {"GradScaler, first pass"},
    LeavesTheScaleOn: {"GradScaler"},
    NotCalledOnOverflow: {"GradScaler, first pass", "GradScaler, second pass"},
    OneNormPerTensor: GRADIENTS,
    DividesByZero: {"zero gradient"},
    HasNoZero: {"rho zero"},
    KeepsTheFirstGradient: STEPS,
    StepsWithOneLearningRate: {"group options"},
    PerturbsWithOneRho: {"group options"},
    NeverPerturbs: GRADIENTS | {"second gradient", "restore", "restore bfloat16", "GradScaler, first pass"},
    SavesWhilePerturbed: {"saving while perturbed"},
    InsistsOnAClosure: {"distributed checkpoint"},
    LosesMoments: {"resume", "distributed checkpoint"},
    ComesApartOnLoading: {"schedule"},
    StaysPerturbedOnErrors: {"exception"},
    KeepsTheLastMicroBatch: {"accumulation"},
    ForgetsAddedGroups: {"added parameters"},
}
