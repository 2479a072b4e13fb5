"""SAM's state: checkpoints, copies, hooks, groups."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM

from .small import X, all_bits, closure_of, loss_of, network, same_state, unchanged


def test_resuming_from_a_state_dict_continues_bit_by_bit() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    for _ in range(3):
        opt.step(closure_of(model))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    for _ in range(3):
        opt.step(closure_of(model))
    resumed = network()
    resumed.load_state_dict(weights)
    again = SAM(resumed.parameters(), torch.optim.AdamW, rho=0.9, adaptive=True, lr=5.0)
    again.load_state_dict(state)
    assert again.param_groups[0]["rho"] == 0.1
    for _ in range(3):
        again.step(closure_of(resumed))
    assert unchanged(resumed, all_bits(model))


def test_a_plain_checkpoint_loads_and_missing_keys_keep_their_values() -> None:
    model = network()
    plain = torch.optim.AdamW(model.parameters(), lr=3e-3)
    closure_of(model)()
    plain.step()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.2, adaptive=True, eta=0.01, lr=1.0)
    opt.load_state_dict(plain.state_dict())
    group = opt.param_groups[0]
    assert (group["rho"], group["adaptive"], group["eta"], group["lr"]) == (0.2, True, 0.01, 3e-3)
    assert same_state(plain.state_dict(), opt.state_dict())
    plain.load_state_dict(opt.state_dict())  # and the way back
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state


def test_torch_distributed_checkpoints_can_warm_the_optimizer_up() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    opt.step(closure_of(model))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    fresh = SAM(resumed.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    set_optimizer_state_dict(resumed, fresh, saved)
    opt.step(closure_of(model))
    fresh.step(closure_of(resumed))
    assert unchanged(resumed, all_bits(model))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_of_steps_at_a_learning_rate_of_0_those_that_ascend_count(cls: type[torch.optim.Optimizer]) -> None:
    """Plain ones may be a checkpoint's, which makes one at each for SGD, as that keeps no state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    opt = SAM(model.parameters(), cls, rho=0.1, lr=0.0, interval=2)
    ascended = []
    for lr in (0.0, 0.0, 1e-2, 1e-2, 0.0, 1e-2):
        opt.param_groups[0]["lr"] = lr
        ascended.append(opt.ascends)
        opt.step(closure_of(model))
        opt.zero_grad()
        get_optimizer_state_dict(model, opt)
    assert ascended == [True, False, False, True, False, False]


def test_copies_and_pickles_keep_working() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    opt.step(closure_of(model))
    for twin_model, twin in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        reference = all_bits(model)
        assert unchanged(twin_model, reference)
        twin.step(closure_of(twin_model))
        assert not unchanged(twin_model, reference)
        assert unchanged(model, reference)


def test_hooks_and_profiling_of_the_optimizer_base_class_run_once_per_step() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("state"))
    opt.step(closure_of(model))
    loss_of(model).backward()
    opt.first_step(zero_grad=True)
    loss_of(model).backward()
    opt.second_step()
    opt.state_dict()
    assert seen == ["pre", "post", "pre", "post", "state"]


def test_add_param_group() -> None:
    model = network()
    params = list(model.parameters())
    opt = SAM(params[:2], torch.optim.SGD, rho=0.1, lr=0.1)
    opt.step(closure_of(model))
    opt.add_param_group({"params": params[2:], "rho": 0.2})
    assert [g["rho"] for g in opt.param_groups] == [0.1, 0.2]
    loss_of(model).backward()
    before = [p.detach().clone() for p in params]
    opt.first_step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_the_lm_preset() -> None:
    opt = SAM.lm(network().parameters(), torch.optim.AdamW, lr=1e-3)
    assert (opt.param_groups[0]["rho"], opt.ascent_fraction) == (0.15, 0.25)
    assert SAM.lm(network().parameters(), torch.optim.AdamW, rho=0.05).param_groups[0]["rho"] == 0.05


class EightBit(torch.optim.SGD):
    """A base optimizer with uint8 state, which torch's own loading would cast to the parameters' dtype."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                code = self.state[p].setdefault("code", torch.zeros_like(p, dtype=torch.uint8))
                assert code.dtype == torch.uint8
                code.add_((p.grad * 100).abs().to(torch.uint8))
                p.data.add_(code.to(p.dtype), alpha=-1e-3)

    def load_state_dict(self, state_dict) -> None:
        codes = {k: v["code"] for k, v in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            self.state[p]["code"] = codes[i].clone()


@pytest.mark.parametrize("bases", [1, 2])
def test_a_base_optimizer_loads_its_own_state(bases: int) -> None:
    def build(model: nn.Module) -> SAM:
        params = list(model.parameters())
        parts = [params] if bases == 1 else [params[:2]]
        made: list[torch.optim.Optimizer] = [EightBit(part, lr=0.1) for part in parts]
        return SAM(None, made if bases == 1 else [*made, torch.optim.AdamW(params[2:], lr=1e-2)], rho=0.1)

    model = network()
    opt = build(model)
    for _ in range(2):
        opt.step(closure_of(model))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    opt.step(closure_of(model))
    resumed = network()
    resumed.load_state_dict(weights)
    again = build(resumed)
    again.load_state_dict(state)
    again.step(closure_of(resumed))
    assert unchanged(resumed, all_bits(model))


def test_loading_runs_hooks_once_and_says_what_does_not_fit() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    seen: list[str] = []
    opt.register_load_state_dict_pre_hook(lambda *_: seen.append("before"))
    opt.register_load_state_dict_post_hook(lambda *_: seen.append("after"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before", "after"]
    other = SAM([{"params": [p]} for p in network().parameters()], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="4 parameter groups, this optimizer 1"):
        opt.load_state_dict(other.state_dict())


def gradients_of(model: nn.Module) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"fused_restore": True}),
        (torch.float32, {"adaptive": True, "scope": "*.weight"}),
        (torch.bfloat16, {"rounding": "stochastic"}),
    ],
    ids=str,
)
def test_gradients_live_no_longer_than_their_owner_keeps_them(dtype: torch.dtype, options: dict[str, object]) -> None:
    """What is dropped between the passes is free for the second: SAM keeps one copy of the weights, and no gradients."""
    model = network().to(dtype)
    opt = SAM(model.named_parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, **options)
    for _ in range(2):  # buckets are built in the first, and pointed anew in the second
        loss_of(model, X.to(dtype)).backward()
        first = gradients_of(model)
        opt.first_step(zero_grad=True)
        assert [g() for g in first] == [None] * len(first)
        loss_of(model, X.to(dtype)).backward()
        second = gradients_of(model)
        opt.second_step()
        assert first
        assert None not in [g() for g in second]
        opt.zero_grad()
        assert [g() for g in second] == [None] * len(second)


@pytest.mark.parametrize("how", ["as made", "copied", "pickled"])
def test_an_optimizer_that_nobody_holds_is_gone_at_once(how: str) -> None:
    """As torch's own optimizers are: its moments and its stash do not wait for a garbage collection."""
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    if how == "copied":
        model, opt = copy.deepcopy((model, opt))
    elif how == "pickled":
        model, opt = pickle.loads(pickle.dumps((model, opt)))
    for _ in range(2):
        opt.step(closure_of(model))
    gc.collect()
    gc.disable()
    try:
        left = [weakref.ref(opt), *(weakref.ref(state["exp_avg"]) for state in opt.state.values())]
        del opt
        assert [each() for each in left] == [None] * len(left)
    finally:
        gc.enable()
