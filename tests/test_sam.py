"""SAM's step against the equations and bit by bit against its base optimizer, in all its forms."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.published import PublishedSAM

from .conftest import CPU_BACKENDS, DTYPES
from .small import BASES, X, all_bits, closure_of, loss_of, network, same_state, unchanged

# -- the equations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_optimizer_bit_by_bit(backend: str, base: str) -> None:
    cls, options = BASES[base]
    plain, sharp = network(0.1), network(0.1)
    reference = cls(plain.parameters(), **options)
    opt = SAM(sharp.parameters(), cls, rho=0.0, **options)
    schedule = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 10) for o in (reference, opt)]
    for step in range(12):
        torch.manual_seed(step)
        reference.zero_grad()
        closure_of(plain)()
        reference.step()
        torch.manual_seed(step)
        opt.step(closure_of(sharp))
        for s in schedule:
            s.step()
    assert unchanged(sharp, all_bits(plain))
    assert same_state(reference.state_dict(), opt.state_dict())


@pytest.mark.parametrize(("adaptive", "eta"), [(False, 0.0), (True, 0.0), (True, 0.01)])
def test_quadratic_step_has_its_closed_form_to_1e_12(adaptive: bool, eta: float) -> None:
    """L = w'Hw/2: the step is w - lr H(w + e), with e from Hw. float64, served by the reference."""
    n, lr, rho = 17, 0.05, 0.3
    a = torch.randn(n, n, dtype=torch.float64)
    h = a @ a.T / n + torch.eye(n)
    w0 = torch.randn(n, dtype=torch.float64)
    w = nn.Parameter(w0.clone())
    opt = SAM([w], torch.optim.SGD, rho=rho, adaptive=adaptive, eta=eta, lr=lr)

    def closure() -> Tensor:
        loss = 0.5 * w @ h @ w
        loss.backward()
        return loss

    assert opt.step(closure).item() == pytest.approx(0.5 * (w0 @ h @ w0).item(), rel=1e-15)
    t = w0.abs() + eta if adaptive else torch.ones(n, dtype=torch.float64)
    g = h @ w0
    e = rho * t * t * g / (t * g).square().sum().sqrt()
    expected = w0 - lr * (h @ (w0 + e))
    assert ((w.detach() - expected).abs() <= 1e-12 * expected.abs().max()).all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_popular_wrapper_is_an_independent_oracle(backend: str, adaptive: bool) -> None:
    mine, theirs = network(), network()
    opt = SAM(mine.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1)
    popular = PublishedSAM(theirs.parameters(), torch.optim.SGD(theirs.parameters(), lr=0.1), rho=0.1, adaptive=adaptive)
    for _ in range(5):
        loss_of(mine).backward()
        opt.first_step(zero_grad=True)
        loss_of(theirs).backward()
        popular.first_step()
        theirs.zero_grad()
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert (p - q).abs().max() <= 2e-7
        loss_of(mine).backward()
        opt.second_step(zero_grad=True)
        loss_of(theirs).backward()
        popular.second_step()
        theirs.zero_grad()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbation_has_length_rho_and_the_gradients_direction(backend: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    before = [p.detach().double() for p in model.parameters()]
    loss_of(model, X.to(dtype)).backward()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    opt = SAM(model.parameters(), torch.optim.SGD, rho=2.0, lr=0.1)
    opt.first_step()
    e = torch.cat([(p.detach().double() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    loose = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert e.norm().item() == pytest.approx(2.0, rel=loose)
    assert 1 - (e @ gradient / e.norm() / gradient.norm()).item() <= loose
    report = opt.report
    assert report.intended_norm.item() == pytest.approx(2.0, rel=1e-5)
    assert report.stored_norm.item() == pytest.approx(e.norm().item(), rel=1e-5)
    cosine = (e @ gradient / e.norm() / gradient.norm()).item()
    assert report.stored_cosine.item() == pytest.approx(cosine, rel=1e-5)
    assert 0.5 < report.changed_fraction.item() <= 1


def test_a_positive_scale_on_the_loss_changes_nothing(backend: str) -> None:
    results = []
    for scale in (1.0, 2.0**16):
        model = network()
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        (loss_of(model) * scale).backward()
        opt.first_step()
        results.append(all_bits(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # a power of two is exact


def test_one_norm_over_groups_with_their_own_radius(backend: str) -> None:
    model = network()
    weights, biases = [[p for p in model.parameters() if p.ndim == d] for d in (2, 1)]
    groups = [{"params": weights, "rho": 0.3}, {"params": biases, "rho": 0.1, "adaptive": True, "eta": 0.5}]
    opt = SAM(groups, torch.optim.SGD, lr=0.1)
    loss_of(model).backward()
    before = {p: p.detach().double() for p in model.parameters()}
    t = {p: p.detach().double().abs() + 0.5 if p.ndim == 1 else torch.ones_like(p).double() for p in before}
    norm = sum((t[p] * p.grad.double()).square().sum() for p in before).sqrt()
    opt.first_step()
    for p, b in before.items():
        e = (0.3 if p.ndim == 2 else 0.1) * t[p] ** 2 * p.grad.double() / norm
        assert (p.detach().double() - b - e).abs().max() <= 1e-7


def test_several_bases_share_one_norm_and_one_state(backend: str) -> None:
    one, two = network(), network()
    params = list(two.parameters())
    bases = [torch.optim.AdamW(params[:2], lr=1e-2), torch.optim.AdamW(params[2:], lr=1e-2)]
    split = SAM(None, bases, rho=0.1)
    whole = SAM(one.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    for _ in range(3):
        whole.step(closure_of(one))
        split.step(closure_of(two))
    assert unchanged(two, all_bits(one))
    saved = copy.deepcopy(split.state_dict())
    assert len(saved["state"]) == 4
    split.step(closure_of(two))
    after = all_bits(two)
    resumed = network()
    with torch.no_grad():
        for p, q in zip(resumed.parameters(), one.parameters(), strict=True):
            p.copy_(q)
    params = list(resumed.parameters())
    again = SAM(None, [torch.optim.AdamW(params[:2], lr=9.0), torch.optim.AdamW(params[2:], lr=9.0)], rho=0.1)
    again.load_state_dict(saved)
    again.step(closure_of(resumed))
    assert unchanged(resumed, after)


# -- forms of a step ------------------------------------------------------------------------------------------------------


def test_all_forms_of_a_step_agree(backend: str) -> None:
    def closure_form(model: nn.Module, opt: SAM) -> None:
        opt.step(closure_of(model))

    def two_calls(model: nn.Module, opt: SAM) -> None:
        loss_of(model).backward()
        opt.first_step(zero_grad=True)
        loss_of(model).backward()
        opt.second_step(zero_grad=True)

    def context(model: nn.Module, opt: SAM) -> None:
        opt.zero_grad()
        loss_of(model).backward()
        with opt.perturbed():
            loss_of(model).backward()
        assert not opt.is_perturbed
        opt.step()

    def context_with_a_step_inside(model: nn.Module, opt: SAM) -> None:
        opt.zero_grad()
        loss_of(model).backward()
        with opt.perturbed():
            loss_of(model).backward()
            opt.step()

    def reused(model: nn.Module, opt: SAM) -> None:
        opt.zero_grad()
        loss_of(model).backward()
        opt.step(closure_of(model), reuse_grads=True)

    def step_alone(model: nn.Module, opt: SAM) -> None:
        opt.zero_grad()
        loss_of(model).backward()
        opt.first_step(zero_grad=True)
        loss_of(model).backward()
        opt.step()

    results = []
    for form in (closure_form, two_calls, context, context_with_a_step_inside, reused, step_alone):
        model = network()
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
        for _ in range(3):
            form(model, opt)
        results.append(all_bits(model))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_step_without_closure_or_perturbation_is_the_base_step() -> None:
    plain, sharp = network(), network()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    opt = SAM(sharp.parameters(), torch.optim.AdamW, lr=1e-2)
    loss_of(plain).backward()
    loss_of(sharp).backward()
    reference.step()
    opt.step()
    assert unchanged(sharp, all_bits(plain))


@pytest.mark.parametrize("mode", ["same", "independent"])
def test_dropout_masks_of_the_two_passes(mode: str) -> None:
    model = network(dropout=0.5)
    masks: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1e-6, lr=0.0, dropout_rng=mode)
    opt.step(closure_of(model))
    opt.step(closure_of(model))
    assert torch.equal(masks[0], masks[1]) == (mode == "same")
    assert not torch.equal(masks[0], masks[2])  # the next step draws anew


def test_interval() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, interval=3)
    calls = []
    for _ in range(6):
        count = 0

        def closure() -> Tensor:
            nonlocal count
            count += 1
            return closure_of(model)()

        opt.step(closure)
        calls.append(count)
    assert calls == [2, 1, 1, 2, 1, 1]


def test_scope_by_name_and_by_predicate() -> None:
    for scope in (["0.*"], lambda name, p: name.startswith("0."), "0.*"):
        model = network()
        opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.1, lr=0.1, scope=scope)
        loss_of(model).backward()
        before = [p.detach().clone() for p in model.parameters()]
        opt.first_step()
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert moved == [True, True, False, False]
        e = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
        assert e.norm().item() == pytest.approx(0.1, rel=1e-5)


def test_every_backend_is_exercised() -> None:
    assert all(fastpost.backends()[name].available for name in CPU_BACKENDS)


class Counted(torch.optim.SGD):
    """A step of its own around SGD's, which functools.wraps makes look like one that torch has wrapped."""

    steps = 0

    @functools.wraps(torch.optim.SGD.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        type(self).steps += 1
        return super().step(*args, **kwargs)


def test_the_base_optimizer_steps_as_a_whole_whoever_has_wrapped_it() -> None:
    """Hooks, a method of a derived class and one that is put on the object (schedulers do that) are called; a profiler sees
    the step. What nobody listens to is left out."""
    w = torch.ones(3, requires_grad=True)
    opt = SAM([w], Counted, rho=0.1, lr=0.1)
    base, seen = opt.base_optimizer, []

    def step() -> None:
        for turn in (opt.first_step, opt.second_step):
            w.grad = torch.ones(3)
            turn()

    step()
    assert Counted.steps == 1
    opt = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1)
    base = opt.base_optimizer
    hook = base.register_step_post_hook(lambda *_: seen.append("hook"))
    step()
    hook.remove()
    assert seen == ["hook"]
    plain = base.step
    base.step = lambda *args: (seen.append("object"), plain(*args))  # type: ignore[method-assign]
    step()
    del base.step
    assert seen == ["hook", "object"]
    with torch.profiler.profile() as profile:
        step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}
    before = w.detach().clone()
    step()
    assert not torch.equal(w, before)


def test_autograd_records_again_after_a_first_step_whatever_happens_in_it() -> None:
    w = torch.ones(3, requires_grad=True)
    opt = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1)
    with pytest.raises(RuntimeError, match="no parameter"):
        opt.first_step()
    assert torch.is_grad_enabled()
    w.grad = torch.ones(3)
    with torch.no_grad():
        opt.first_step()
        assert not torch.is_grad_enabled()
