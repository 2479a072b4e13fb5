"""16-bit weights: stochastic rounding and float32 masters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.backends.reference import random_halves, round_randomly
from fastpost.ops.perturbed import hashed_bits
from fastpost.sam import GSAM, SAMWindow

from .conftest import bits, same_bits
from .small import X, Y, all_bits, closure_of, loss_of, network, unchanged

NARROW = [torch.bfloat16, torch.float16]
ALL = torch.arange(65536)

# -- rounding --------------------------------------------------------------------------------------------------------------


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of `dtype` around x, by walking through its bit patterns."""
    nearest = torch.tensor(x, dtype=torch.float64).to(dtype)
    value = nearest.double().item()
    if value == x:
        return x, x
    pattern = nearest.view(torch.int16)
    step = 1 if (abs(value) < abs(x)) else -1
    other = (pattern + step).view(dtype).double().item()
    return (value, other) if step == 1 else (other, value)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_draw_lands_on_a_neighbour_and_the_mean_is_the_number(dtype: torch.dtype) -> None:
    numbers = [1.0, 1.001, -1.001, 0.1, -3e-5, 6e-8, 1e-5, 2.0**-14 * 0.99999, 1.9999999, 255.7, -6e4, 1 / 3]
    for x in torch.tensor(numbers, dtype=torch.float32).tolist():
        low, high = neighbours(x, dtype)
        got = round_randomly(torch.full((65536,), x), ALL, dtype).double()
        assert set(got.tolist()) <= {low, high}, x
        mean = got.mean().item()
        assert abs(mean - x) <= abs(high - low) * 2.0**-16, x  # one of 65,536 draws


@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_representable_stays_bit_for_bit(dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for draw in (0, 1, 65535):
        assert same_bits(round_randomly(every.float(), torch.full((len(every),), draw), dtype), every)
    assert round_randomly(torch.tensor([math.nan]), torch.tensor([7]), dtype).isnan().all()


def test_overflow_goes_to_infinity_only_from_beyond_the_largest_number() -> None:
    x = torch.tensor([65504.0, 65519.0, 65536.0, -1e9])
    top = round_randomly(x, torch.full((4,), 65535), torch.float16)
    bottom = round_randomly(x, torch.zeros(4, dtype=torch.int64), torch.float16)
    assert top.tolist() == [65504.0, math.inf, math.inf, -math.inf]
    assert bottom.tolist() == [65504.0, 65504.0, math.inf, -math.inf]


@pytest.mark.parametrize(
    "source", [lambda n: random_halves(torch.empty(n), torch.tensor(5), 3), lambda n: hashed_bits(torch.arange(n))]
)
def test_bits_are_uniform_and_the_same_every_time(source) -> None:
    n = 1 << 18
    drawn = source(n)
    assert torch.equal(drawn, source(n))
    assert torch.equal(source(1000), drawn[:1000])
    assert drawn.min() >= 0
    assert drawn.max() < 65536
    counts = torch.bincount(drawn >> 8, minlength=256).double()
    chi = ((counts - n / 256).square() / (n / 256)).sum().item()
    assert abs(chi - 255) < 6 * math.sqrt(2 * 255)
    x = drawn.double() / 65536 - 0.5
    for lag in (1, 2, 8, 768):
        assert abs((x[lag:] * x[:-lag]).mean().item() * 12) < 5 / math.sqrt(n)


# -- stochastic perturbation -----------------------------------------------------------------------------------------------


def stochastic(model: nn.Module, **options) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rounding="stochastic", **{"rho": 0.01, "lr": 0.0, **options})


@pytest.mark.parametrize("dtype", NARROW)
def test_the_mean_over_steps_is_e_where_nearest_loses_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(64, 500).mul_(0.02 if dtype == torch.bfloat16 else 0.2).to(dtype))
    g = torch.randn(64, 500).to(dtype)
    e = 0.002 * g.double() / g.double().norm()
    before = w.detach().clone()
    totals = {}
    for rounding in ("nearest", "stochastic"):
        opt = SAM([w], torch.optim.SGD, rho=0.002, lr=0.0, rounding=rounding)
        total = torch.zeros_like(e)
        for _ in range(200):
            w.grad = g.clone()
            opt.first_step(zero_grad=True)
            total += w.detach().double() - before.double()
            w.grad = torch.zeros_like(w)
            opt.second_step()
        totals[rounding] = total / 200
        assert same_bits(w, before)
    along = {k: ((v * e).sum() / (e * e).sum()).item() for k, v in totals.items()}
    assert along["stochastic"] == pytest.approx(1.0, abs=0.1)
    assert along["nearest"] < 0.5


def test_the_report_tells_what_was_stored() -> None:
    model = network().bfloat16()
    before = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    opt = stochastic(model)
    loss_of(model, X.bfloat16()).backward()
    opt.first_step()
    stored = torch.cat([p.detach().double().flatten() for p in model.parameters()]) - before
    report = opt.report
    assert report.stored_norm.item() == pytest.approx(stored.norm().item(), rel=1e-6)
    assert report.intended_norm.item() == pytest.approx(0.01, rel=1e-3)
    opt.restore_()


def test_other_layouts_are_counted_as_they_lie_in_memory() -> None:
    torch.manual_seed(1)
    plain = torch.randn(32, 48).bfloat16()
    g = torch.randn(32, 48).bfloat16()
    one, two = nn.Parameter(plain.clone()), nn.Parameter(plain.t().contiguous().t())
    for p in (one, two):
        p.grad = g.clone() if p is one else g.t().contiguous().t()
        SAM([p], torch.optim.SGD, rho=0.01, lr=0.0, rounding="stochastic").first_step()
    as_it_lies = nn.Parameter(plain.t().contiguous())
    as_it_lies.grad = g.t().contiguous()
    SAM([as_it_lies], torch.optim.SGD, rho=0.01, lr=0.0, rounding="stochastic").first_step()
    assert same_bits(two.t(), as_it_lies)
    assert not same_bits(one, two)


def test_random_numbers_go_on_after_a_resume_and_differ_from_step_to_step() -> None:
    def build(model: nn.Module) -> SAM:
        return stochastic(model, rho=0.05, lr=0.5, rounding_seed=11)

    model = network().bfloat16()
    opt = build(model)
    for _ in range(3):
        opt.step(closure_of(model, X.bfloat16()))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    for _ in range(3):
        opt.step(closure_of(model, X.bfloat16()))
    resumed = network().bfloat16()
    resumed.load_state_dict(weights)
    again = build(resumed)
    again.load_state_dict(state)
    for _ in range(3):
        again.step(closure_of(resumed, X.bfloat16()))
    assert unchanged(resumed, all_bits(model))
    drawn = []
    for seed in (1, 1, 2):
        twin = network().bfloat16()
        opt = stochastic(twin, rounding_seed=seed)
        for _ in range(2):
            loss_of(twin, X.bfloat16()).backward()
            opt.first_step(zero_grad=True)
            drawn.append(torch.cat([bits(p).flatten() for p in twin.parameters()]))
            opt.second_step()
    assert torch.equal(drawn[0], drawn[2])
    assert len({tuple(d.tolist()) for d in (drawn[0], drawn[1], drawn[4])}) == 3


def test_zero_radius_and_overflow_write_nothing() -> None:
    for factor, rho in ((1.0, 0.0), (math.inf, 0.1)):
        model = network().bfloat16()
        before = all_bits(model)
        (loss_of(model, X.bfloat16()) * factor).backward()
        stochastic(model, rho=rho).first_step()
        assert unchanged(model, before)


def test_float32_parameters_beside_16_bit_ones_are_rounded_to_nearest() -> None:
    model = nn.Sequential(nn.Linear(20, 50), nn.Linear(50, 3).bfloat16())
    exact = copy.deepcopy(model)
    for m, options in ((model, {"rounding": "stochastic"}), (exact, {})):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        SAM(m.parameters(), torch.optim.SGD, rho=0.01, lr=0.0, **options).first_step()
    assert same_bits(model[0].weight, exact[0].weight)


# -- masters ---------------------------------------------------------------------------------------------------------------


def pair(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, list[Tensor]]:
    model = network()
    masters = [p.detach().clone() for p in model.parameters()]
    return model.to(dtype), masters


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_training_with_masters_follows_the_equations(dtype: torch.dtype, adaptive: bool) -> None:
    model, masters = pair(dtype)
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, adaptive=adaptive, master_params=masters, lr=1e-2)
    oracle, own = pair(dtype)
    reference = torch.optim.AdamW(own, lr=1e-2)
    x = X.to(dtype)
    for _ in range(4):
        opt.step(closure_of(model, x))
        g = torch.autograd.grad(loss_of(oracle, x), list(oracle.parameters()))
        t = [m.double().abs() if adaptive else torch.ones_like(m).double() for m in own]
        norm = torch.stack([(s * v.double()).square().sum() for s, v in zip(t, g, strict=True)]).sum().sqrt()
        with torch.no_grad():
            for p, m, s, v in zip(oracle.parameters(), own, t, g, strict=True):
                p.copy_((m.double() + 0.05 * s * s * v.double() / norm).float())
        for m, v in zip(own, torch.autograd.grad(loss_of(oracle, x), list(oracle.parameters())), strict=True):
            m.grad = v.float()
        reference.step()
        with torch.no_grad():
            for p, m in zip(oracle.parameters(), own, strict=True):
                p.copy_(m)
        for m, other in zip(masters, own, strict=True):
            assert (m - other).abs().max() <= 2e-3  # a weight midway between neighbours may round the other way
    assert all((m - other).abs().mean().item() <= 1e-5 for m, other in zip(masters, own, strict=True))


def test_nothing_is_stashed_and_restoring_is_a_cast() -> None:
    model, masters = pair()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, master_params=masters, lr=0.0)
    before, kept = all_bits(model), [bits(m) for m in masters]
    loss_of(model, X.bfloat16()).backward()
    opt.first_step()
    assert not unchanged(model, before)
    origins = {t.data_ptr() for b in opt._ascent_buckets._buckets for t in b.bucket.stash}
    assert origins <= {m.data_ptr() for m in masters}  # read from there, and no other buffer exists
    assert opt.stash_bytes == 0
    opt.restore_()
    assert unchanged(model, before)
    assert all(torch.equal(bits(m), k) for m, k in zip(masters, kept, strict=True))


def test_the_optimizers_face_is_that_of_the_masters() -> None:
    model, masters = pair()
    groups = [{"params": [p]} for p in model.parameters()]
    opt = SAM(groups, torch.optim.AdamW, rho=0.05, master_params=masters, lr=1e-2)
    assert [g["params"][0] for g in opt.param_groups] == masters
    opt.step(closure_of(model, X.bfloat16()))
    assert set(opt.state) == set(masters)
    assert all(m.grad is None for m in masters)  # no second set of gradients between steps
    instance = SAM(model.parameters(), torch.optim.AdamW(masters, lr=1e-2), master_params=masters)
    window = SAMWindow(
        instance, lambda rows: nn.functional.cross_entropy(model(X[rows].bfloat16()).float(), Y[rows]).backward()
    )
    before = all_bits(model)
    window.run([slice(0, 16), slice(16, 32)])
    instance.step()
    assert not unchanged(model, before)
    assert all(same_bits(p, m.bfloat16()) for p, m in zip(model.parameters(), masters, strict=True))


@pytest.mark.parametrize("overflowing", [1, 2])
def test_an_overflow_with_masters_skips_the_step(overflowing: int) -> None:
    model, masters = pair()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, master_params=masters, lr=1e-2)
    before, passes = all_bits(model), []

    def closure() -> Tensor:
        passes.append(1)
        loss = loss_of(model, X.bfloat16()) * (math.inf if len(passes) == overflowing else 1)
        loss.backward()
        return loss

    opt.step(closure)
    assert unchanged(model, before)
    assert opt.skipped_steps == 1
    assert not opt.state


def test_scope_by_name_with_masters() -> None:
    model, masters = pair()
    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.5, master_params=masters, lr=0.0, scope=["3.*"])
    assert opt.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, X.bfloat16()).backward()
    opt.first_step()
    assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == [True, True, False, False]
    opt.restore_()


def test_masters_are_checked_once_and_again_after_loading() -> None:
    model, masters = pair()
    with torch.no_grad():
        masters[2].add_(1.0)
    with pytest.raises(ValueError, match=r"parameter 2 is not the cast of master_params\[2\]"):
        SAM(model.parameters(), torch.optim.SGD, master_params=masters)
    model, masters = pair()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, master_params=masters, lr=0.1)
    saved = copy.deepcopy(opt.state_dict())
    opt.step(closure_of(model, X.bfloat16()))
    model.load_state_dict(pair()[0].state_dict())  # the weights of the beginning, the masters of one step later
    opt.load_state_dict(saved)
    before = all_bits(model)
    with pytest.raises(ValueError, match="is not the cast"):
        opt.step(closure_of(model, X.bfloat16()))
    assert unchanged(model, before)


def test_weights_that_others_have_written_are_seen() -> None:
    """What is loaded into the model and not into its masters would be lost at the next step."""
    model, masters = pair()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, master_params=masters, lr=0.1, interval=2)
    closure = closure_of(model, X.bfloat16())
    for _ in range(2):
        opt.step(closure)
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # the same bits
    opt.step(closure)
    for plain in (True, False):
        model.load_state_dict({name: torch.full_like(t, 3.0) for name, t in model.state_dict().items()})
        before = all_bits(model)
        with pytest.raises(ValueError, match=r"not the cast of master_params.*changing the model's weights"):
            opt.step(closure)
        assert unchanged(model, before)
        with torch.no_grad():
            for m, w in zip(masters, model.parameters(), strict=True):
                m.copy_(w)
        opt.step(closure)
        if plain:
            opt.step(closure)  # so that the next one ascends
    assert all(same_bits(w, m.to(w.dtype)) for m, w in zip(masters, model.parameters(), strict=True))


def test_options_that_contradict_each_other() -> None:
    model, masters = pair()
    params = list(model.parameters())
    for call, error, message in (
        (lambda: SAM(params, torch.optim.SGD, rounding="up"), ValueError, "rounding"),
        (lambda: SAM(network().parameters(), torch.optim.SGD, rounding="stochastic"), ValueError, "16-bit"),
        (lambda: SAM(params, torch.optim.SGD, rounding="stochastic", master_params=masters), ValueError, "leave one"),
        (
            lambda: SAM(params, torch.optim.SGD, rounding="stochastic", perturb="functional", model=model),
            ValueError,
            "rounds no weight",
        ),
        (
            lambda: SAM(params, torch.optim.SGD, perturb="functional", model=model, master_params=masters),
            ValueError,
            "leave master_params out",
        ),
        (lambda: SAM(params, torch.optim.SGD, master_params=masters[:2]), ValueError, "4 parameters but 2"),
        (lambda: SAM(params, torch.optim.SGD, master_params=masters[::-1]), ValueError, "differ in shape"),
        (lambda: SAM(masters, torch.optim.SGD, master_params=masters), TypeError, "masters are float32"),
        (lambda: SAM(params, torch.optim.SGD(params), master_params=masters), ValueError, "built from the masters"),
        (lambda: SAM(params, torch.optim.SGD, master_params=masters, variant=GSAM()), ValueError, "do not serve GSAM"),
        (lambda: SAM(params, torch.optim.AdamW, master_params=masters, fused_restore=True), ValueError, "master_params"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_copy_has_its_own_masters() -> None:
    model = network().bfloat16()
    masters = [p.detach().float() for p in model.parameters()]
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, master_params=masters)
    opt.step(closure_of(model, X.bfloat16()))
    two, copied = copy.deepcopy((model, opt))
    before = all_bits(model)
    copied.step(closure_of(two, X.bfloat16()))
    assert unchanged(model, before)
    opt.step(closure_of(model, X.bfloat16()))
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), two.parameters(), strict=True))
    assert not unchanged(model, before)
