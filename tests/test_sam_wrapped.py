"""SAM's face inside other libraries' wrappers: what reaches the base optimizer, what reaches SAM, and what is refused."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM, SAMWindow
from fastpost.sam import GSAM, LookSAM, MomentumSAM
from fastpost.sam.frameworks import find_sam

from .by_hand import ascended
from .by_hand import distance as gap
from .small import X, Y, all_bits, closure_of, loss_of, network, unchanged

RHO, LR = 0.3, 0.1


class ScheduleFreeSGD(torch.optim.SGD):
    """Schedule-free SGD (2405.15682): trains at y = (1 - beta) z + beta x, judged at the mean x. `train` and `eval` write
    the weights, and a step in the wrong mode is an error, as in the released code."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, lr=lr)
        self.beta, self.mode, self.steps = beta, "eval", 0

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _move(self, mode: str, weight: float) -> None:
        if self.mode != mode:
            for p in self._params():
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)
            self.mode = mode

    def eval(self) -> None:
        self._move("eval", 1 - 1 / self.beta)

    def train(self) -> None:
        self._move("train", 1 - self.beta)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.mode != "train":
            raise RuntimeError("not in train mode")
        self.steps += 1
        for p in self._params():
            z = self.state[p].setdefault("z", p.detach().clone())
            x = (p - (1 - self.beta) * z) / self.beta
            z.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            x.lerp_(z, 1 / self.steps)
            p.copy_((1 - self.beta) * z + self.beta * x)


def sam_step_by_hand(model: nn.Module, base: torch.optim.Optimizer, rho: float = RHO) -> None:
    params = list(model.parameters())
    with ascended(params, torch.autograd.grad(loss64(model), params), rho):
        h = torch.autograd.grad(loss64(model), params)
    for p, part in zip(params, h, strict=True):
        p.grad = part
    base.step()


def loss64(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X.double()), Y)


def closure64(model: nn.Module) -> Any:
    def closure() -> Tensor:
        loss = loss64(model)
        loss.backward()
        return loss

    return closure


# -- methods of the base optimizer ----------------------------------------------------------------------------------------


def test_a_schedule_free_optimizer_trains_and_evaluates_through_sam() -> None:
    model, reference = network().double(), network().double()
    opt, base = SAM(model.parameters(), ScheduleFreeSGD, rho=RHO, lr=LR), ScheduleFreeSGD(reference.parameters(), lr=LR)
    losses = []
    for step in range(6):
        opt.train()
        base.train()
        loss64(model).backward()
        opt.first_step(zero_grad=True)
        with pytest.raises(RuntimeError, match=r"SAM: eval\(\) while the weights are perturbed"):
            opt.eval()  # would write w + e over, and restoring would write w over that
        loss64(model).backward()
        opt.second_step(zero_grad=True)
        sam_step_by_hand(reference, base)
        base.zero_grad()
        assert gap(model, reference) <= 1e-12, step
        opt.eval()
        base.eval()
        assert gap(model, reference) <= 1e-12, step
        losses.append(loss64(model).item())
    assert losses[-1] < losses[0]


def test_what_the_base_optimizer_has_and_sam_has_not() -> None:
    class Rich(torch.optim.SGD):
        scale = 3.0

        def rate(self, factor: float) -> float:
            """The rate."""
            return factor * float(self.param_groups[0]["lr"])

        def _hidden(self) -> None: ...

    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = SAM([p], Rich, lr=0.5)
    assert opt.rate(2.0) == 1.0
    assert opt.rate.__doc__ == "The rate."
    assert hasattr(opt, "rate")
    assert not hasattr(opt, "train")
    with pytest.raises(AttributeError, match=r"no attribute 'scale'; the base optimizer's is at \.base_optimizer\.scale"):
        _ = opt.scale
    with pytest.raises(AttributeError, match=r"no attribute '_hidden'$"):
        opt._hidden()
    with pytest.raises(AttributeError, match=r"no attribute 'rat'$"):
        opt.rat(1.0)
    assert copy.deepcopy(opt).rate(2.0) == 1.0
    mixed = SAM(None, [Rich([p], lr=0.5), torch.optim.SGD([q], lr=0.1)])
    assert mixed.rate(2.0) == 1.0  # the one that has it
    both = SAM(None, [Rich([p], lr=0.5), Rich([q], lr=0.1)])
    assert both.rate(2.0) == [1.0, 0.2]


# -- state and groups ------------------------------------------------------------------------------------------------------


def two_bases() -> tuple[nn.Module, SAM]:
    model = network()
    params = list(model.parameters())
    bases = [torch.optim.SGD(params[:2], lr=0.1, momentum=0.9), torch.optim.AdamW(params[2:], lr=1e-2)]
    return model, SAM(None, bases, rho=RHO)


@pytest.mark.parametrize("how", ["assigned", "setstate"])
def test_state_and_groups_that_are_set_are_the_base_optimizers(how: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)
    opt.step(closure_of(model))
    state = defaultdict(dict, {p: {"momentum_buffer": torch.full_like(p, 2.0)} for p in model.parameters()})
    groups = [{**opt.param_groups[0], "lr": 0.5}]
    del groups[0]["rho"], groups[0]["sam_steps"]
    if how == "assigned":
        opt.state = state
        opt.param_groups = groups
    else:
        opt.__setstate__({"state": state, "param_groups": groups})
    assert opt.base_optimizer.state is state
    assert opt.base_optimizer.param_groups is groups
    assert opt.state is state
    assert (groups[0]["rho"], groups[0]["sam_steps"]) == (RHO, 1)  # what SAM needs of a group
    assert "state" not in vars(opt)
    before = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    loss_of(model).backward()
    opt.step()
    for p, w in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, w - 0.5 * (0.9 * 2.0 + p.grad))


@pytest.mark.parametrize("how", ["assigned", "setstate"])
def test_state_and_groups_of_several_base_optimizers(how: str) -> None:
    model, opt = two_bases()
    opt.step(closure_of(model))
    params = list(model.parameters())
    state = {p: {"mark": i, "step": torch.tensor(1.0)} for i, p in enumerate(params)}
    groups = [{**group, "lr": 0.25} for group in opt.param_groups]
    if how == "assigned":
        opt.state = state
        opt.param_groups = groups
    else:
        opt.__setstate__({"state": state, "param_groups": groups})
    first, second = opt._bases
    assert {p: v["mark"] for p, v in first.state.items()} == {params[0]: 0, params[1]: 1}
    assert {p: v["mark"] for p, v in second.state.items()} == {params[2]: 2, params[3]: 3}
    assert [base.param_groups[0]["lr"] for base in opt._bases] == [0.25, 0.25]
    assert first.param_groups[0] is groups[0]
    stranger = nn.Parameter(torch.ones(1))
    for call, message in (
        (lambda: setattr(opt, "param_groups", groups[:1]), "1 parameter groups for 2 base optimizers with 2"),
        (lambda: opt.__setstate__({"param_groups": groups[:1]}), "1 parameter groups for 2 base optimizers with 2"),
        (lambda: setattr(opt, "state", {stranger: {}}), "1 entries of tensors that no base optimizer holds"),
        (lambda: setattr(opt, "param_groups", [groups[0], {**groups[1], "rho": -1.0}]), "rho must be"),
        (lambda: opt.__setstate__({"param_groups": [groups[0], {**groups[1], "eta": math.nan}]}), "eta must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert second.param_groups[0] is groups[1]


def test_the_joined_list_of_groups_cannot_be_changed_but_the_groups_can() -> None:
    _, opt = two_bases()
    new = {**opt.param_groups[0], "params": [nn.Parameter(torch.ones(2))]}
    groups = opt.param_groups
    for change in (
        lambda: groups.append(new),
        lambda: groups.extend([new]),
        lambda: groups.insert(0, new),
        lambda: groups.pop(),
        lambda: groups.remove(groups[0]),
        lambda: groups.clear(),
        lambda: groups.sort(key=id),
        lambda: groups.reverse(),
        lambda: groups.__setitem__(0, new),
        lambda: groups.__delitem__(0),
        lambda: groups.__iadd__([new]),
        lambda: groups.__imul__(2),
    ):
        with pytest.raises(TypeError, match=r"joins the groups of several base optimizers.*add_param_group"):
            change()
    assert [group["params"] for group in groups] == [base.param_groups[0]["params"] for base in opt._bases]
    groups[1]["lr"] = 0.75
    assert opt._bases[1].param_groups[0]["lr"] == 0.75
    assert opt.state_dict()["param_groups"][1]["lr"] == 0.75
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    assert opt._bases[1].param_groups[0]["lr"] == 0.375
    for twin in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups)), [*groups], groups[:]):
        assert type(twin) is list
        twin.append(new)
    opt.param_groups = groups
    opt.add_param_group({"params": new["params"]})
    assert len(opt.param_groups) == 3
    assert opt._bases[1].param_groups[1] is opt.param_groups[2]


def test_neither_is_set_while_perturbed() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=LR)
    loss_of(model).backward()
    with opt.perturbed():
        for call in (
            lambda: setattr(opt, "state", {}),
            lambda: setattr(opt, "param_groups", []),
            lambda: opt.__setstate__({"state": {}}),
        ):
            with pytest.raises(RuntimeError, match="while the weights are perturbed"):
                call()


def test_a_copy_of_an_optimizer_with_a_schedule_steps_its_own_weights() -> None:
    """A scheduler puts a function into the instance that steps the optimizer it was made for."""
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    twin_model, twin = copy.deepcopy((model, opt))
    before, other = all_bits(model), all_bits(twin_model)
    twin.step(closure_of(twin_model))
    assert unchanged(model, before)
    assert not unchanged(twin_model, other)


@pytest.mark.parametrize("form", ["closure", "two calls", "window", "block"])
def test_a_schedule_knows_that_its_optimizer_has_stepped(form: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (opt, opt.base_optimizer)]
    closure = closure_of(model)
    if form == "closure":
        opt.step(closure)
    elif form == "window":
        SAMWindow(opt, lambda _: closure()).run([0])
        opt.step()
    else:
        closure()
        if form == "two calls":
            opt.first_step(zero_grad=True)
            closure()
            opt.second_step()
        else:
            with opt.perturbed():
                closure()
                opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Detected call of `lr_scheduler.step()` before `optimizer.step()`"
        for schedule in schedules:
            schedule.step()
    assert opt.param_groups[0]["lr"] == LR / 4


# -- a wrapper that takes the class of what it wraps ------------------------------------------------------------------------


class Around:
    """Steps the optimizer as Lightning's and Fabric's wrappers do: with its own closure, and under the class of both."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.steps, self.saw = 0, []
        self.__class__ = type("Around" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def toggle_model(self) -> None: ...

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        self.steps += 1
        given = (lambda: None) if closure is None else closure
        return self._optimizer.step(closure=functools.partial(self._hooked, given), **kwargs)

    def _hooked(self, closure: Any) -> Any:
        result = closure()
        self.saw.append((find_sam(self)._perturbation.active, [p.grad.clone() for p in find_sam(self).tensors()]))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def wrapped(**options: Any) -> tuple[nn.Module, nn.Module, Any, Any]:
    model, reference = network().double(), network().double()
    opt: Any = Around(SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, **options))
    return model, reference, opt, torch.optim.SGD(reference.parameters(), lr=LR, momentum=0.9)


@pytest.mark.parametrize("form", ["two calls", "block", "step in the block", "closure", "closure that clears", "window"])
def test_each_form_of_a_step_through_a_wrapper(form: str) -> None:
    model, reference, opt, base = wrapped()
    assert isinstance(opt, SAM)

    def backward() -> Tensor:
        loss = loss64(model)
        if form == "closure that clears":
            opt.zero_grad()
        loss.backward()
        return loss

    for step in range(4):
        expected = loss64(reference).item()
        if form.startswith("closure"):
            assert opt.step(backward).item() == pytest.approx(expected, abs=1e-12)
        elif form == "window":
            SAMWindow(opt, lambda rows: backward()).run([0])
            opt.step()
        else:
            backward()
            if form == "two calls":
                opt.first_step(zero_grad=True)
                assert opt.is_perturbed
                assert opt.optimizer.is_perturbed
                backward()
                opt.second_step(zero_grad=True)
            else:
                with opt.perturbed():
                    backward()
                    if form == "step in the block":
                        opt.step()
                if form == "block":
                    opt.step()
                opt.zero_grad()
        sam_step_by_hand(reference, base)
        assert gap(model, reference) <= 1e-12, step
        assert opt.steps == step + 1
        perturbed, seen = opt.saw[-1]
        assert not perturbed  # what a wrapper clips is at w
        assert all(torch.allclose(g, p.grad, rtol=0, atol=1e-12) for g, p in zip(seen, reference.parameters(), strict=True))
        assert len(opt.saw) == step + 1
    assert opt.report is not None
    assert opt.skipped_steps == 0
    assert not opt.is_perturbed


def test_plain_steps_between_through_a_wrapper() -> None:
    model, reference, opt, base = wrapped(interval=2)
    for step in range(4):
        loss64(model).backward()
        assert opt.ascends == (step % 2 == 0)
        if opt.ascends:
            opt.first_step(zero_grad=True)
            loss64(model).backward()
            opt.second_step(zero_grad=True)
            sam_step_by_hand(reference, base)
        else:
            opt.step()
            opt.zero_grad()
            base.zero_grad()
            loss64(reference).backward()
            base.step()
        assert gap(model, reference) <= 1e-12
    assert opt.param_groups[0]["sam_steps"] == 4


def test_values_set_at_a_wrapper_reach_sam() -> None:
    model, _, opt, _ = wrapped()
    state = defaultdict(dict)
    opt.state = state
    assert opt.optimizer.base_optimizer.state is state
    opt.param_groups = [{**opt.param_groups[0], "lr": 0.7}]
    assert opt.optimizer.base_optimizer.param_groups[0]["lr"] == 0.7
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert opt.optimizer.param_groups[1]["rho"] == RHO
    assert opt.state_dict()["param_groups"][0]["lr"] == 0.7
    loss64(model).backward()
    opt.first_step()
    opt.abandon()
    assert not opt.is_perturbed
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("variant", [None, MomentumSAM()])
def test_a_closure_that_adds_to_earlier_micro_batches_is_refused(variant: Any) -> None:
    model, _, opt, _ = wrapped(variant=variant)
    if variant is not None:
        opt.step(closure64(model))  # makes momentum
        opt.zero_grad()
    before = all_bits(model)
    loss64(model).backward()
    with pytest.raises(RuntimeError, match=r"earlier micro-batches.*SAMCallback in Lightning, with fastpost\.SAMWindow"):
        opt.step(closure64(model))
    assert unchanged(model, before)
    assert not opt.is_perturbed
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cleared_by", ["optimizer", "model", "nobody, after a step", "nobody, but zeros"])
def test_gradients_that_the_closure_clears_or_a_step_has_used_are_no_micro_batches(cleared_by: str) -> None:
    """As where another optimizer's loss has reached these weights."""
    model, reference, opt, base = wrapped()

    def closure() -> Tensor:
        loss = loss64(model)
        if cleared_by == "optimizer":
            opt.zero_grad()
        elif cleared_by == "model":
            model.zero_grad()
        loss.backward()
        return loss

    for _ in range(2):
        if cleared_by != "nobody, after a step":
            (7 * loss64(model)).backward()
        if cleared_by == "nobody, but zeros":
            model.zero_grad(set_to_none=False)
        opt.step(closure)
        sam_step_by_hand(reference, base)
        assert gap(model, reference) <= 1e-12


def test_earlier_micro_batches_count_in_a_step_without_an_ascent() -> None:
    model, reference, opt, base = wrapped(interval=2)
    opt.step(closure64(model))
    sam_step_by_hand(reference, base)
    opt.zero_grad()
    base.zero_grad()
    loss64(model).backward()
    opt.step(closure64(model))
    (2 * loss64(reference)).backward()
    base.step()
    assert gap(model, reference) <= 1e-12


def test_reuse_grads_through_a_wrapper() -> None:
    model, reference, opt, base = wrapped()
    loss64(model).backward()
    opt.step(closure64(model), reuse_grads=True)
    sam_step_by_hand(reference, base)
    assert gap(model, reference) <= 1e-12


class Scaling(Around):
    """Unscales, clips and steps as Lightning's and Fabric's plugins for float16 do."""

    clip = 0.05
    scaler: Any = None

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        self.steps += 1
        if closure is not None:
            closure()
        inner = self._optimizer
        assert not inner._step_supports_amp_scaling  # by which both decide whether they may clip
        self.scaler.unscale_(inner)
        nn.utils.clip_grad_norm_([p for group in inner.param_groups for p in group["params"]], self.clip)
        self.scaler.step(inner)
        self.scaler.update()


@pytest.mark.parametrize("form", ["two calls", "closure"])
@pytest.mark.parametrize("overflowing", [None, "ascent", "descent"])
@pytest.mark.parametrize("variant", [None, GSAM(0.7)])
def test_loss_scaling_and_clipping_by_a_wrapper(form: str, overflowing: str | None, variant: Any) -> None:
    model = network().double()
    inner = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, variant=variant)
    opt: Any = Scaling(inner)
    opt.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    passes = 0

    def backward() -> None:
        nonlocal passes
        passes += 1
        hit = overflowing == ("ascent" if passes == 1 else "descent")
        opt.scaler.scale(loss64(model) * (math.inf if hit else 1.0)).backward()

    if form == "closure":
        opt.step(backward)
    else:
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step()
    assert passes == 2
    assert not opt.is_perturbed
    length = math.sqrt(sum((p - w).square().sum().item() for p, w in zip(model.parameters(), before, strict=True)))
    if overflowing:
        assert length == 0
        assert not inner.state
        assert opt.scaler.get_scale() == 2.0**9
    else:
        assert length == pytest.approx(LR * 0.05, rel=1e-5)  # torch clips to c / (1 + 1e-6 / norm)
        assert opt.scaler.get_scale() == 2.0**10
    assert opt.skipped_steps == (overflowing is not None)
    assert opt.param_groups[0]["sam_steps"] == 1


# -- plain steps that nobody meant -----------------------------------------------------------------------------------------


def plain_steps(opt: SAM, model: nn.Module, number: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(number):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
    return [str(w.message) for w in caught if "steps in a row" in str(w.message)]


def test_a_trainer_that_only_ever_calls_step_is_noticed() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    told = plain_steps(opt, model, 25)
    assert len(told) == 1
    assert all(name in told[0] for name in ("SAMTrainer", "SAMCallback", "AcceleratedWindow", "first_step()"))


def test_plain_steps_that_are_meant_are_not() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    for _ in range(3):
        assert plain_steps(opt, model, 8) == []
        opt.step(closure_of(model))
    between = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=LookSAM(), interval=30)
    between.step(closure_of(model))
    assert plain_steps(between, model, 25) == []
    assert plain_steps(SAM(model.parameters(), torch.optim.SGD, lr=LR, variant=MomentumSAM()), model, 25) == []
