"""SAM with fused_restore=True: AdamW's step made from the stash is restore and step, within rounding."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpost

from .conftest import same_bits

X, Y = torch.randn(32, 10, generator=torch.Generator().manual_seed(3)), torch.arange(32) % 3


def model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(10, 300), nn.Tanh(), nn.Linear(300, 3))


def loss(net: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(net(X), Y)


def pair(**options: Any) -> tuple[tuple[nn.Sequential, fastpost.SAM], tuple[nn.Sequential, fastpost.SAM]]:
    """The same model under SAM with restore and step, and with both in one."""
    made = []
    for fused_restore in (False, True):
        net = model()
        opt = fastpost.SAM(net.named_parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=fused_restore, **options)
        made.append((net, opt))
    return made[0], made[1]


def one_step(net: nn.Module, opt: fastpost.SAM) -> None:
    def closure() -> Tensor:
        value = loss(net)
        value.backward()
        return value

    opt.step(closure)


def assert_same(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95)}, {"maximize": True}, {"fused": True}, {"capturable": False}]
)
def test_equals_restore_and_step(options: dict[str, Any]) -> None:
    plain, fused = pair(**options)
    for _ in range(12):
        one_step(*plain)
        one_step(*fused)
        assert not fused[1].is_perturbed
    assert_same(plain[0], fused[0])
    for p, q in zip(plain[0].parameters(), fused[0].parameters(), strict=True):
        mine, theirs = fused[1].state[q], plain[1].state[p]
        assert mine.keys() == theirs.keys()
        assert float(mine["step"]) == float(theirs["step"]) == 12
        torch.testing.assert_close(mine["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-4, atol=1e-12)


def test_groups_scope_and_tensors_outside_it() -> None:
    """Tensors that are not perturbed step too, and groups keep their own learning rates."""
    nets = []
    for fused_restore in (False, True):
        net = model()
        named = list(net.named_parameters())
        groups = [{"params": named[:1], "lr": 1e-3}, {"params": named[1:], "weight_decay": 0.0}]
        opt = fastpost.SAM(groups, torch.optim.AdamW, 0.1, lr=1e-2, scope=["0.weight", "2.*"], fused_restore=fused_restore)
        for _ in range(5):
            one_step(net, opt)
        nets.append(net)
    assert_same(*nets)


def test_a_tensor_without_a_second_gradient_is_restored_bit_for_bit() -> None:
    net = model()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.5, lr=1e-2, fused_restore=True)
    before = [p.detach().clone() for p in net.parameters()]
    loss(net).backward()
    opt.first_step(zero_grad=True)
    assert not same_bits(net[0].weight, before[0])
    nn.functional.cross_entropy(net[2](torch.randn(32, 300)), Y).backward()  # only the last layer
    opt.second_step()
    after = [p.detach() for p in net.parameters()]
    assert [same_bits(a, b) for a, b in zip(after, before, strict=True)] == [True, True, False, False]
    assert net[0].weight not in opt.state


@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_an_overflow_restores_bit_for_bit_and_counts(where: str) -> None:
    net = model()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.5, lr=1e-2, fused_restore=True)
    one_step(net, opt)
    before = [p.detach().clone() for p in net.parameters()]
    moments = copy.deepcopy(opt.state_dict()["state"])
    loss(net).backward()
    if where == "ascent":
        net[0].weight.grad[3, 3] = math.inf
    opt.first_step(zero_grad=True)
    loss(net).backward()
    if where == "descent":
        net[0].weight.grad[3, 3] = math.nan
    opt.second_step(zero_grad=True)
    assert opt.skipped_steps == 1
    assert all(same_bits(p, b) for p, b in zip(net.parameters(), before, strict=True))
    for i, kept in opt.state_dict()["state"].items():
        assert all(same_bits(kept[name], moments[i][name]) for name in kept)


def test_grad_scaler_scales_and_shrinks() -> None:
    results = []
    for fused_restore in (False, True):
        net = model()
        opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=fused_restore)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        for i in range(6):
            scaler.scale(loss(net)).backward()
            if i == 3:
                net[2].bias.grad[0] = math.inf
            opt.first_step(zero_grad=True)
            scaler.scale(loss(net)).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert opt.skipped_steps == 1
        assert scaler.get_scale() == 2.0**13
        results.append(net)
    assert_same(*results)


def test_an_interrupted_step_leaves_the_unperturbed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.5, lr=1e-2, fused_restore=True)
    before = [p.detach().clone() for p in net.parameters()]

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(torch, "_foreach_add_", fails)
    with pytest.raises(RuntimeError, match="planted"):
        one_step(net, opt)
    opt.restore_()
    assert all(same_bits(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_schedulers_hooks_and_checkpoints_see_an_ordinary_adamw() -> None:
    net = model()
    base = torch.optim.AdamW(net.parameters(), lr=1e-2)
    opt = fastpost.SAM(None, base, 0.1, fused_restore=True)
    called = []
    base.register_step_pre_hook(lambda *_: called.append("pre"))
    base.register_step_post_hook(lambda *_: called.append("post"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 0.5**step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(net, opt)
        scheduler.step()
    assert called == ["pre", "post"]
    assert base.param_groups[0]["lr"] == 5e-3
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    one_step(net, opt)
    other = model()
    again = fastpost.SAM(other.parameters(), torch.optim.AdamW, 0.1, lr=1.0, fused_restore=True)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    one_step(other, again)
    assert all(same_bits(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_step_without_ascent_is_the_base_optimizers_own() -> None:
    net, plain = model(), model()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=True)
    base = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for which, stepper in ((net, opt), (plain, base)):
        loss(which).backward()
        stepper.step()
    assert all(same_bits(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("base", "options", "words"),
    [
        (torch.optim.SGD, {"lr": 0.1}, "base optimizer is SGD"),
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad"),
        (torch.optim.AdamW, {"differentiable": True, "foreach": False}, "differentiable"),
    ],
)
def test_what_it_cannot_serve_is_refused(base: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        fastpost.SAM(model().parameters(), base, 0.1, fused_restore=True, **options)


def test_functional_perturbation_has_no_stash() -> None:
    net = model()
    with pytest.raises(ValueError, match="keeps none"):
        fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, perturb="functional", model=net, fused_restore=True)


# -- what changes after the construction ----------------------------------------------------------------------------------


@contextlib.contextmanager
def saying(words: str | None) -> Iterator[None]:
    """One warning of these words; None: none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught if "fused_restore" in str(w.message)]
    assert len(said) == (words is not None), said
    assert words is None or words in said[0]


def trained(steps: int = 3, **options: Any) -> tuple[nn.Sequential, torch.optim.AdamW]:
    net = model()
    plain = torch.optim.AdamW(net.parameters(), lr=1e-2, **options)
    for k in range(steps):
        plain.zero_grad()
        ((5.0 - k) * loss(net)).backward()
        plain.step()
    return net, plain


@pytest.mark.parametrize("way", ["load", "group", "set"])
def test_amsgrad_that_comes_later_is_amsgrad(way: str) -> None:
    source, plain = trained(amsgrad=way == "load")
    nets = []
    for fused_restore in (False, True):
        net = copy.deepcopy(source)
        params = list(net.parameters())
        opt = fastpost.SAM(
            params[:2] if way == "group" else params, torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=fused_restore
        )
        with saying("amsgrad" if fused_restore else None):
            if way == "load":
                opt.load_state_dict(copy.deepcopy(plain.state_dict()))
            elif way == "group":
                opt.add_param_group({"params": params[2:], "amsgrad": True})
            else:
                opt.param_groups[0]["amsgrad"] = True
            for _ in range(6):
                one_step(net, opt)
        assert all("max_exp_avg_sq" in opt.state[p] for p in params[2:])
        nets.append(net)
    assert all(same_bits(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def convolution() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 3))


PICTURES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_weights_that_become_channels_last_keep_their_moments_apart() -> None:
    nets = []
    for fused_restore in (False, True):
        net = convolution()
        opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=fused_restore)

        def closure(net: nn.Module = net) -> Tensor:
            value = nn.functional.cross_entropy(net(PICTURES), torch.arange(4) % 3)
            value.backward()
            return value

        opt.step(closure)
        opt.step(closure)
        net.to(memory_format=torch.channels_last)
        with saying("another memory format" if fused_restore else None):
            opt.step(closure)
            opt.step(closure)
        opt.load_state_dict(opt.state_dict())  # keeps the moments' order
        net.to(memory_format=torch.contiguous_format)
        with saying(None):  # all in one order again, and one pass again
            opt.step(closure)
        nets.append(net)
    assert_same(*nets)


def test_channels_last_from_the_start_is_one_pass() -> None:
    nets = []
    for fused_restore in (False, True):
        net = convolution().to(memory_format=torch.channels_last)
        opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=fused_restore)

        def closure(net: nn.Module = net) -> Tensor:
            value = nn.functional.cross_entropy(net(PICTURES), torch.arange(4) % 3)
            value.backward()
            return value

        with saying(None):
            for _ in range(3):
                opt.step(closure)
        nets.append(net)
    assert_same(*nets)


@pytest.mark.parametrize("calls", ["closure", "two calls"])
def test_float64_is_the_equations_to_1e_12(calls: str) -> None:
    """AdamW (1711.05101, algorithm 2) at w + rho g / |g|, written out."""
    net = model().double()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, weight_decay=0.3, fused_restore=True)
    data = X.double()

    def gradient(weights: list[Tensor]) -> tuple[Tensor, ...]:
        named = dict(zip(dict(net.named_parameters()), weights, strict=True))
        value = nn.functional.cross_entropy(torch.func.functional_call(net, named, data), Y)
        return torch.autograd.grad(value, weights)

    def closure() -> Tensor:
        value = nn.functional.cross_entropy(net(data), Y)
        value.backward()
        return value

    w = [p.detach().clone() for p in net.parameters()]
    m, v = ([torch.zeros_like(p) for p in w] for _ in range(2))
    for t in range(1, 4):
        if calls == "closure":
            opt.step(closure)
        else:
            opt.zero_grad()
            closure()
            opt.first_step(zero_grad=True)
            closure()
            opt.second_step()
        g = gradient([p.clone().requires_grad_() for p in w])
        norm = torch.sqrt(sum((x**2).sum() for x in g))
        g = gradient([(p + 0.1 * x / norm).requires_grad_() for p, x in zip(w, g, strict=True)])
        for i, x in enumerate(g):
            m[i] = 0.9 * m[i] + 0.1 * x
            v[i] = 0.999 * v[i] + 0.001 * x**2
            step = m[i] / (1 - 0.9**t) / (torch.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            w[i] = w[i] - 1e-2 * 0.3 * w[i] - 1e-2 * step
    for p, expected in zip(net.parameters(), w, strict=True):
        assert (p.detach() - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_a_dtype_that_parts_weights_and_moments_is_refused(what: str) -> None:
    net = model()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=True)
    one_step(net, opt)
    data = X
    if what == "weights":
        net.double()
        data = X.double()
    else:
        for state in opt.state.values():
            state["exp_avg"] = state["exp_avg"].double()
    w = [p.detach().clone() for p in net.parameters()]
    moments = copy.deepcopy(opt.state_dict()["state"])

    def closure() -> Tensor:
        value = nn.functional.cross_entropy(net(data), Y)
        value.backward()
        return value

    with pytest.raises(ValueError, match=r"exp_avg hold.*dtype.*load_state_dict\(opt.state_dict\(\)\)"):
        opt.step(closure)
    assert all(same_bits(p, b) for p, b in zip(net.parameters(), w, strict=True))
    for i, kept in opt.state_dict()["state"].items():
        assert all(same_bits(kept[name], moments[i][name]) for name in kept)
    opt.load_state_dict(opt.state_dict())  # the remedy
    with saying(None):
        opt.step(closure)
    assert not any(same_bits(p, b) for p, b in zip(net.parameters(), w, strict=True))


def test_moments_given_other_memory_are_found_there() -> None:
    """As where an optimizer's state is offloaded and comes back."""
    (plain, one), (fused, two) = pair()
    for step in range(4):
        for net, opt in ((plain, one), (fused, two)):
            one_step(net, opt)
            for state in opt.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    old = state[name].data
                    state[name].data = old.clone()
                    old.fill_(math.nan)  # whoever still reads there, shows
        assert_same(plain, fused)
        assert all(bool(torch.isfinite(s["exp_avg"]).all()) for s in two.state.values()), step


def test_a_moment_of_another_shape_is_refused() -> None:
    net = model()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=True)
    one_step(net, opt)
    opt.state[net[0].weight]["exp_avg_sq"] = torch.zeros(3, 3)
    w = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"exp_avg_sq hold.*shape"):
        one_step(net, opt)
    assert all(same_bits(p, b) for p, b in zip(net.parameters(), w, strict=True))
    opt.abandon()


def test_a_hook_before_the_step_that_changes_what_the_kernel_walks_is_refused() -> None:
    net = model()
    opt = fastpost.SAM(net.parameters(), torch.optim.AdamW, 0.1, lr=1e-2, fused_restore=True)
    one_step(net, opt)
    w = [p.detach().clone() for p in net.parameters()]
    handle = opt.base_optimizer.register_step_pre_hook(lambda *_: opt.param_groups[0].update(amsgrad=True))
    with pytest.raises(RuntimeError, match=r"a hook before the step.*amsgrad"):
        one_step(net, opt)
    opt.abandon()
    assert all(same_bits(p, b) for p, b in zip(net.parameters(), w, strict=True))
    handle.remove()


def test_a_complex_parameter_out_of_scope_is_stepped_by_adamw() -> None:
    results = []
    for fused_restore in (False, True):
        torch.manual_seed(0)
        net, other = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        named = [*net.named_parameters(), ("other", other)]
        opt = fastpost.SAM(named, torch.optim.AdamW, 0.1, lr=1e-2, scope=["weight", "bias"], fused_restore=fused_restore)

        def closure(net: nn.Module = net, other: Tensor = other) -> Tensor:
            value = (net(torch.ones(2, 4)).to(torch.complex64) @ other).abs().sum()
            value.backward()
            return value

        with saying("complex" if fused_restore else None):
            for _ in range(3):
                opt.step(closure)
        results.append([net.weight, net.bias, torch.view_as_real(other)])
    for p, q in zip(*results, strict=True):
        assert same_bits(p, q)
