"""SAM against the equations, against its base optimizer bit by bit, and against everything that may go wrong in a step."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.published import PublishedSAM

from .conftest import CPU_BACKENDS, DTYPES, bits, same_bits

X = torch.randn(32, 20, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 50), nn.Dropout(dropout), nn.GELU(), nn.Linear(50, 3))


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), Y)


def closure_of(model: nn.Module, x: Tensor = X):
    def closure() -> Tensor:
        loss = loss_of(model, x)
        loss.backward()
        return loss

    return closure


def all_bits(model: nn.Module) -> list[Tensor]:
    return [bits(p) for p in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))


def same_state(a: dict, b: dict) -> bool:
    for key, moments in a["state"].items():
        for name, value in moments.items():
            other = b["state"][key][name]
            if isinstance(value, Tensor) and not same_bits(value, other):
                return False
    return len(a["state"]) == len(b["state"])


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
}


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


# -- restore --------------------------------------------------------------------------------------------------------------


def test_addresses_stay_and_restore_is_bitwise_over_many_rounds(backend: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    before, addresses = all_bits(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(200):
        opt.zero_grad()
        loss_of(model).backward()
        with opt.perturbed():
            assert not unchanged(model, before)
    assert unchanged(model, before)
    assert addresses == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_either_pass_leaves_the_weights_restored(
    backend: str, failing: int, error: type[BaseException]
) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=0.1)
    before = all_bits(model)
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        loss = closure_of(model)()
        if count == failing:
            raise error("stop")
        return loss

    with pytest.raises(error, match="stop"):
        opt.step(closure)
    assert unchanged(model, before)
    assert not opt.is_perturbed
    loss_of(model).backward()
    with pytest.raises(error, match="out"), opt.perturbed():
        raise error("out")
    assert unchanged(model, before)
    opt.step(closure_of(model))  # and training goes on
    assert not unchanged(model, before)


def test_a_parameter_whose_second_gradient_vanishes_is_restored(backend: str) -> None:
    used, unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))
    opt = SAM([used, unused], torch.optim.SGD, rho=0.5, lr=0.0)
    for _ in range(3):
        opt.zero_grad()
        (used.sum() + unused.sum()).backward()
        opt.first_step(zero_grad=True)
        used.sum().backward()  # as when another expert is routed to
        opt.second_step()
        assert same_bits(unused, torch.ones(7))
        assert same_bits(used, torch.ones(5))
        opt.zero_grad()
        unused.sum().backward()  # and a step in which only the other one takes part
        opt.first_step(zero_grad=True)
        (used.sum() + unused.sum()).backward()
        opt.second_step()
        assert same_bits(unused, torch.ones(7))


def test_tied_weights_are_perturbed_once(backend: str) -> None:
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.0)
    before = embedding.weight.detach().clone()
    nn.functional.cross_entropy(model(torch.arange(11)), torch.arange(11)).backward()
    opt.first_step()
    assert (embedding.weight - before).norm().item() == pytest.approx(0.3, rel=1e-5)
    opt.restore_()
    assert same_bits(embedding.weight, before)


def test_weights_that_move_between_the_passes_are_restored_where_they_are_now() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    before = all_bits(model)
    loss_of(model).backward()
    opt.first_step()
    for p in model.parameters():
        p.data = p.data.clone()
    opt.restore_()
    assert unchanged(model, before)


def test_weights_of_another_shape_or_dtype_get_a_new_plan() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    opt.step(closure_of(model))
    model.bfloat16()
    opt.zero_grad()
    before = all_bits(model)
    opt.step(closure_of(model, X.bfloat16()))
    assert unchanged(model, before)


# -- overflow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adamw", "adamw fused"])
@pytest.mark.parametrize("overflowing", ["ascent", "descent"])
def test_a_non_finite_gradient_skips_the_step_without_a_trace(backend: str, overflowing: str, base: str) -> None:
    cls, options = BASES[base]
    model = network()
    opt = SAM(model.parameters(), cls, rho=0.1, **options)
    opt.step(closure_of(model))
    before, state = all_bits(model), copy.deepcopy(opt.state_dict())
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = loss_of(model) * (math.inf if passes == (1 if overflowing == "ascent" else 2) else 1.0)
        loss.backward()
        return loss

    opt.step(closure)
    assert unchanged(model, before)
    assert same_state(state, opt.state_dict())
    assert opt.skipped_steps == 1
    opt.step(closure_of(model))
    assert opt.skipped_steps == 1
    assert not unchanged(model, before)


@pytest.mark.parametrize("overflowing", ["ascent", "descent"])
def test_a_step_after_the_block_is_guarded_too(overflowing: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    before = all_bits(model)
    (loss_of(model) * (math.inf if overflowing == "ascent" else 1.0)).backward()
    with opt.perturbed():
        (loss_of(model) * (math.inf if overflowing == "descent" else 1.0)).backward()
    opt.step()
    assert unchanged(model, before)
    assert opt.skipped_steps == 1
    # An overflow in a step that was given up does not haunt the next one.
    opt.zero_grad()
    (loss_of(model) * math.inf).backward()
    with pytest.raises(RuntimeError, match="out"), opt.perturbed():
        raise RuntimeError("out")
    opt.zero_grad()
    loss_of(model).backward()
    opt.step()
    assert opt.skipped_steps == 1
    assert not unchanged(model, before)


def test_an_all_zero_gradient_perturbs_nothing_and_is_no_overflow(backend: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    before = all_bits(model)

    def closure() -> Tensor:
        loss = sum((p * 0).sum() for p in model.parameters())
        loss.backward()
        return loss

    opt.step(closure)
    assert unchanged(model, before)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("overflowing", [None, "ascent", "descent"])
def test_the_gradscaler_recipe(overflowing: str | None) -> None:
    model, plain = network(), network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    bad = torch.full_like(X, math.inf)
    scaler.scale(loss_of(model, bad if overflowing == "ascent" else X)).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(loss_of(model, bad if overflowing == "descent" else X)).backward()
    scaler.step(opt)
    scaler.update()
    assert not opt.is_perturbed
    if overflowing:
        assert unchanged(model, all_bits(plain))
        assert scaler.get_scale() == 2.0**9
        assert opt.skipped_steps == 1
    else:
        reference = SAM(plain.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
        reference.step(closure_of(plain))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-6
        assert scaler.get_scale() == 2.0**10


# -- state ----------------------------------------------------------------------------------------------------------------


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


# -- the report -----------------------------------------------------------------------------------------------------------


def test_a_lost_perturbation_is_told_once_with_remedies() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(100000).mul_(0.02).bfloat16())
    opt = SAM([w], torch.optim.SGD, rho=1e-4, lr=0.0)
    w.grad = torch.randn(100000).bfloat16()
    opt.first_step()
    with pytest.warns(UserWarning, match="Remedies") as caught:
        report = opt.report
    assert len(caught) == 1
    assert report.seen_cosine < 0.5
    assert report.changed_fraction < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opt.report is not None
    assert "intended_norm=0.0001" in repr(report)


def test_the_report_distinguishes_what_is_stored_from_what_is_seen() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1e-3, lr=0.0, compute_dtype=torch.bfloat16)
    loss_of(model).backward()
    before = torch.cat([p.detach().bfloat16().double().flatten() for p in model.parameters()])
    opt.first_step()
    seen = torch.cat([p.detach().bfloat16().double().flatten() for p in model.parameters()]) - before
    with pytest.warns(UserWarning, match="Remedies"):
        report = opt.report
    assert report.stored_cosine > 0.9999
    assert report.seen_norm.item() == pytest.approx(seen.norm().item(), rel=1e-5)
    assert report.seen_norm > 2 * report.intended_norm
    autocast = SAM(model.parameters(), torch.optim.SGD, rho=1e-3, lr=0.0)
    opt.restore_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast.first_step()
    with pytest.warns(UserWarning, match="Remedies"):
        assert autocast.report.seen_norm.item() == pytest.approx(report.seen_norm.item(), rel=1e-6)
    assert SAM(model.parameters(), torch.optim.SGD).report is None


# -- bad input ------------------------------------------------------------------------------------------------------------


def with_gradients() -> tuple[nn.Module, SAM]:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    loss_of(model).backward()
    return model, opt


def perturbed_then(call):
    def run() -> None:
        _, opt = with_gradients()
        opt.first_step()
        call(opt)

    return run


P = [nn.Parameter(torch.zeros(2))]
INSTANCE = torch.optim.SGD(P, lr=0.1)
BAD = {
    "rho": (lambda: SAM(P, torch.optim.SGD, rho=-1.0), ValueError, "rho"),
    "rho nan": (lambda: SAM(P, torch.optim.SGD, rho=math.nan), ValueError, "rho"),
    "rho inf": (lambda: SAM(P, torch.optim.SGD, rho=math.inf), ValueError, "rho"),
    "rho of a group": (lambda: SAM([{"params": P, "rho": -1.0}], torch.optim.SGD), ValueError, "rho"),
    "eta": (lambda: SAM(P, torch.optim.SGD, eta=-1.0), ValueError, "eta"),
    "fraction": (lambda: SAM(P, torch.optim.SGD, ascent_fraction=0.0), ValueError, "ascent_fraction"),
    "interval": (lambda: SAM(P, torch.optim.SGD, interval=0), ValueError, "interval"),
    "dropout": (lambda: SAM(P, torch.optim.SGD, dropout_rng="sam"), ValueError, "Did you mean 'same'"),
    "compute dtype": (lambda: SAM(P, torch.optim.SGD, compute_dtype=torch.int32), TypeError, "compute_dtype"),
    "scope without names": (lambda: SAM(P, torch.optim.SGD, scope=["a"]), ValueError, "named_parameters"),
    "empty scope": (lambda: SAM([("a", P[0])], torch.optim.SGD, scope=["b"]), ValueError, "no parameter is in scope"),
    "no parameters": (lambda: SAM([], torch.optim.SGD), ValueError, "empty parameter list"),
    "params missing": (lambda: SAM(None, torch.optim.SGD), TypeError, "params"),
    "params twice": (lambda: SAM(P, INSTANCE), TypeError, "None for params"),
    "keywords for an instance": (lambda: SAM(None, INSTANCE, lr=1.0), TypeError, "lr"),
    "no optimizer": (lambda: SAM(P, "adamw"), TypeError, "base_optimizer"),
    "SAM in SAM": (lambda: SAM(None, SAM(P, torch.optim.SGD)), TypeError, "SAM itself"),
    "no gradient": (lambda: SAM(P, torch.optim.SGD).first_step(), RuntimeError, "backward"),
    "second without first": (lambda: with_gradients()[1].second_step(), RuntimeError, "without first_step"),
    "first twice": (perturbed_then(lambda o: o.first_step()), RuntimeError, "twice"),
    "closure while perturbed": (perturbed_then(lambda o: o.step(lambda: None)), RuntimeError, "while perturbed"),
    "state_dict while perturbed": (perturbed_then(lambda o: o.state_dict()), RuntimeError, "while the weights"),
    "load while perturbed": (perturbed_then(lambda o: o.load_state_dict({})), RuntimeError, "while the weights"),
    "copy while perturbed": (perturbed_then(copy.deepcopy), RuntimeError, "while the weights"),
    "group while perturbed": (perturbed_then(lambda o: o.add_param_group({"params": P})), RuntimeError, "while"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()


def test_a_sparse_gradient_is_refused_before_anything_is_written() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = SAM(embedding.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = bits(embedding.weight)
    with pytest.raises(ValueError, match="sparse"):
        opt.first_step()
    assert torch.equal(bits(embedding.weight), before)
    assert not opt.is_perturbed


def test_a_backend_failing_midway_leaves_the_weights_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpost.ops import params as ops

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).double())
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before, plain = all_bits(model), ops.run

    def run(op: str, bucket, *args):
        if op == "sam_perturb_" and bucket.dtype == torch.float64:
            raise RuntimeError("device lost")
        return plain(op, bucket, *args)

    monkeypatch.setattr(ops, "run", run)
    with pytest.raises(RuntimeError, match="device lost"):
        opt.first_step()
    assert unchanged(model, before)
    assert not opt.is_perturbed


def test_every_backend_is_exercised() -> None:
    assert all(fastpost.backends()[name].available for name in CPU_BACKENDS)
