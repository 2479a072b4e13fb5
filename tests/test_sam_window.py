"""Windows of micro-batches against a loop written from the equations, in float64."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastpost
from fastpost import SAM
from fastpost.distributed import no_sync
from fastpost.sam import GSAM, WSAM, MomentumSAM, SAMWindow, StableSAM, ZerothOrderSAM

from .by_hand import gsam, stable_sam
from .small import X, Y, all_bits, network, same_state, unchanged

N = 5
GENERATOR = torch.Generator().manual_seed(5)
MICRO = [
    (torch.randn(6, 20, generator=GENERATOR, dtype=torch.float64), torch.randint(0, 3, (6,), generator=GENERATOR))
    for _ in range(N)
]
LR, RHO = 0.3, 0.2


def double_network(dropout: float = 0.0) -> nn.Sequential:
    return network(dropout).double()


def runner(model: nn.Module, n: int = N):
    def forward_backward(batch) -> Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1]) / n
        loss.backward()
        return loss.detach()

    return forward_backward


# -- the equations ----------------------------------------------------------------------------------------------------------

Weights = dict[str, Tensor]


def gradient(model: nn.Module, w: Weights, batches, n: int) -> Weights:
    live = {k: v.detach().requires_grad_() for k, v in w.items()}
    total = sum(nn.functional.cross_entropy(functional_call(model, live, (x,)), y) / n for x, y in batches)
    return dict(zip(live, torch.autograd.grad(total, list(live.values())), strict=True))


def ascended(w: Weights, g: Weights) -> Weights:
    norm = torch.stack([v.square().sum() for v in g.values()]).sum().sqrt()
    return {k: w[k] + RHO * g[k] / norm for k in w}


def by_hand(model: nn.Module, batches, fraction: float, per_micro_batch: bool) -> Weights:
    w = {k: v.detach().clone() for k, v in model.named_parameters()}
    n = len(batches)
    if per_micro_batch:
        parts = [gradient(model, ascended(w, gradient(model, w, [b], n)), [b], n) for b in batches]
        g = {k: torch.stack([part[k] for part in parts]).sum(0) for k in w}
    else:
        g = gradient(model, ascended(w, gradient(model, w, batches[: math.ceil(fraction * n)], n)), batches, n)
    return {k: w[k] - LR * g[k] for k in w}


@pytest.mark.parametrize("form", ["run", "feed"])
@pytest.mark.parametrize(
    ("fraction", "per_micro_batch"), [(1.0, False), (0.25, False), (0.4, False), (0.41, False), (1.0, True)]
)
def test_a_window_is_the_loop_from_the_equations(form: str, fraction: float, per_micro_batch: bool) -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, ascent_fraction=fraction)
    window = SAMWindow(opt, runner(model), per_micro_batch=per_micro_batch)
    for _ in range(3):
        expected = by_hand(model, MICRO, fraction, per_micro_batch)
        if form == "run":
            window.run(MICRO)
        else:
            window.open(N)
            for batch in MICRO:
                window.feed(batch)
        assert not opt.is_perturbed
        assert not window.is_open
        opt.step()
        for name, p in model.named_parameters():
            assert (p.detach() - expected[name]).abs().max() <= 1e-14


@pytest.mark.parametrize("name", ["gsam", "wsam", "stable"])
@pytest.mark.parametrize(("fed", "ends"), [(N, "full"), (3, "closed"), (3, "shortened"), (1, "closed")])
def test_a_variant_that_mixes_both_gradients_has_them_on_one_scale(name: str, fed: int, ends: str) -> None:
    """Two of five micro-batches make the ascent. A window that ends early has fewer in all, each still over five."""
    variants = {
        "gsam": (GSAM(0.4), lambda g, h: gsam(g, h, 0.4)),
        "wsam": (WSAM(0.9), lambda g, h: g + 9 * (h - g)),
        "stable": (StableSAM(), stable_sam),
    }
    variant, rule = variants[name]
    model = double_network()
    w = {k: v.detach().clone() for k, v in model.named_parameters()}
    first, ascending = MICRO[:fed], MICRO[: min(fed, 2)]
    g = {k: v * fed / len(ascending) for k, v in gradient(model, w, ascending, N).items()}
    h = gradient(model, ascended(w, g), first, N)
    expected = rule(flat(g), flat(h))

    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, ascent_fraction=0.4, variant=variant)
    window = SAMWindow(opt, runner(model))
    window.open(N)
    for i, batch in enumerate(first):
        if ends == "shortened" and i + 1 == fed:
            window.shorten()
        window.feed(batch)
    window.close()
    assert window.fed == fed
    assert (flat({k: p.grad for k, p in model.named_parameters()}) - expected).norm() <= 1e-12 * expected.norm()


def flat(tensors: Weights) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


@pytest.mark.parametrize(("fraction", "passes"), [(1.0, 10), (0.2, 6), (0.25, 7), (0.5, 8)])
def test_cost_in_passes_and_what_is_kept(fraction: float, passes: int) -> None:
    """n + ceil(f n) passes; f n = 1.25 is rounded up; micro-batches after the ascent are not kept."""
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, ascent_fraction=fraction)
    seen: list[int] = []
    run = runner(model)

    def counting(batch) -> Tensor:
        seen.append(next(i for i, b in enumerate(MICRO) if b[0] is batch[0]))
        return run(batch)

    window = SAMWindow(opt, counting)
    window.run(MICRO)
    k = passes - N
    assert seen == [*range(k), *range(k), *range(k, N)]
    assert len(window.perturbed_losses) == N


def test_rounding_up_is_not_fooled_by_rounding_errors() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, ascent_fraction=0.07)
    calls = []
    SAMWindow(opt, lambda batch: calls.append(1) or runner(model)(batch)).run(MICRO * 20)
    assert len(calls) == 107  # 0.07 * 100 is a little above 7 in floating point


def test_losses_are_the_first_pass_and_the_perturbed_ones_are_apart() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    clean = [nn.functional.cross_entropy(model(x), y).item() / N for x, y in MICRO]
    window = SAMWindow(opt, runner(model))
    assert [loss.item() for loss in window.run(MICRO)] == clean
    assert sum(loss.item() for loss in window.perturbed_losses) > sum(clean)


def test_a_window_of_one_is_step_with_a_closure() -> None:
    one, two = double_network(0.2), double_network(0.2)
    a = SAM(one.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2)
    b = SAM(two.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2)
    window = SAMWindow(b, runner(two, 1))
    for step in range(3):
        torch.manual_seed(step)
        a.step(lambda step=step: runner(one, 1)(MICRO[step]))
        torch.manual_seed(step)
        window.run([MICRO[step]])
        b.step()
    assert unchanged(two, all_bits(one))
    assert same_state(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_rho_zero_is_plain_accumulation_bit_by_bit_dropout_included(per_micro_batch: bool) -> None:
    plain, sharp = network(0.3), network(0.3)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    opt = SAM(sharp.parameters(), torch.optim.AdamW, rho=0.0, lr=1e-2)
    window = SAMWindow(opt, runner(sharp), per_micro_batch=per_micro_batch)
    micro = [(x.float(), y) for x, y in MICRO]
    for step in range(3):
        torch.manual_seed(step)
        reference.zero_grad()
        for batch in micro:
            runner(plain)(batch)
        reference.step()
        state = torch.get_rng_state()
        torch.manual_seed(step)
        window.run(micro)
        opt.step()
        assert torch.equal(state, torch.get_rng_state())  # and whoever draws next draws the same
    assert unchanged(sharp, all_bits(plain))


@pytest.mark.parametrize("mode", ["same", "independent"])
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_dropout_masks_with_a_loader_that_draws_in_between(mode: str, per_micro_batch: bool) -> None:
    model = network(0.5)
    masks: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1e-6, lr=0.0, dropout_rng=mode)
    fraction = 1.0 if per_micro_batch else 0.6
    window = SAMWindow(opt, runner(model), per_micro_batch=per_micro_batch, ascent_fraction=fraction)
    drawn = []
    window.open(N)
    for x, y in MICRO:
        drawn.append(torch.rand(3))
        window.feed((x.float(), y))
    k = N if per_micro_batch else 3
    order = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] if per_micro_batch else [0, 1, 2, 0, 1, 2, 3, 4]
    by_batch: dict[int, list[Tensor]] = {}
    for i, mask in zip(order, masks, strict=True):
        by_batch.setdefault(i, []).append(mask)
    for i in range(k):
        assert torch.equal(*by_batch[i]) == (mode == "same")
    assert not torch.equal(by_batch[0][0], by_batch[1][0])
    assert len({tuple(d.tolist()) for d in drawn}) == N  # a rewound generator would repeat itself


def test_interval_and_variants_without_ascent_run_every_micro_batch_once() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, interval=2)
    calls = []
    run = runner(model)
    window = SAMWindow(opt, lambda batch: calls.append(1) or run(batch))
    window.run(MICRO)
    opt.step()
    assert len(calls) == 2 * N
    w = {k: v.detach().clone() for k, v in model.named_parameters()}
    g = gradient(model, w, MICRO, N)
    window.run(MICRO)
    opt.step()
    assert len(calls) == 3 * N
    assert not window.perturbed_losses
    for name, p in model.named_parameters():
        assert (p.detach() - (w[name] - LR * g[name])).abs().max() <= 1e-14


@pytest.mark.parametrize("fed", [1, 3])
def test_a_window_may_end_early(fed: int) -> None:
    """Fewer micro-batches than announced: before and after the turn (the announced ascent is 2 of 5)."""
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    w = {k: v.detach().clone() for k, v in model.named_parameters()}
    ascent = gradient(model, w, MICRO[: min(fed, 2)], N)
    g = gradient(model, ascended(w, ascent), MICRO[:fed], N)
    window = SAMWindow(opt, runner(model), ascent_fraction=0.4)
    window.open(N)
    for batch in MICRO[:fed]:
        window.feed(batch)
    window.close()
    window.close()  # nothing is open: nothing happens
    opt.step()
    for name, p in model.named_parameters():
        assert (p.detach() - (w[name] - LR * g[name])).abs().max() <= 1e-14


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", range(1, 8))
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_an_exception_in_any_pass_leaves_nothing_behind(
    failing: int, per_micro_batch: bool, error: type[BaseException]
) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    before, calls, run = all_bits(model), [], runner(model)

    def sometimes(batch) -> Tensor:
        calls.append(1)
        loss = run(batch)
        if len(calls) == failing:
            raise error("stop")
        return loss

    window = SAMWindow(opt, sometimes, per_micro_batch=per_micro_batch, ascent_fraction=1.0 if per_micro_batch else 0.4)
    micro = [(x.float(), y) for x, y in MICRO]
    with pytest.raises(error, match="stop"):
        window.run(micro)
    assert unchanged(model, before)
    assert not window.is_open
    assert not opt.is_perturbed
    assert all(p.grad is None for p in model.parameters())
    window.run(micro)  # and training goes on
    opt.step()
    assert not unchanged(model, before)


@pytest.mark.parametrize("failing", range(1, 8))
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_an_overflow_in_any_pass_skips_the_whole_step_and_shrinks_the_scale(failing: int, per_micro_batch: bool) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before, calls = all_bits(model), []

    def forward_backward(batch) -> Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1]) / N
        scaler.scale(loss * (math.inf if len(calls) == failing else 1)).backward()
        return loss

    window = SAMWindow(
        opt, forward_backward, per_micro_batch=per_micro_batch, ascent_fraction=1.0 if per_micro_batch else 0.4
    )
    window.run([(x.float(), y) for x, y in MICRO])
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    assert unchanged(model, before)
    assert scaler.get_scale() == 2.0**7
    assert opt.skipped_steps == 1
    assert not opt.state


def test_batches_may_be_taken_apart_by_a_pass() -> None:
    """Trainers pop the labels out of their inputs; the second pass must still find them."""
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)

    def forward_backward(batch: dict) -> Tensor:
        loss = nn.functional.cross_entropy(model(batch.pop("x")), batch.pop("y"))
        loss.backward()
        return loss

    for per_micro_batch in (False, True):
        window = SAMWindow(opt, forward_backward, per_micro_batch=per_micro_batch)
        window.run([{"x": x, "y": y} for x, y in MICRO])
        assert len(window.perturbed_losses) == N


@pytest.mark.parametrize("per_micro_batch", [False, True])
@pytest.mark.parametrize("pack", [lambda x: x, lambda x: {"a": [x]}, lambda x: (1, x)])
def test_a_batch_that_its_first_pass_changes_in_place_is_refused(per_micro_batch: bool, pack) -> None:
    model = double_network()
    before = all_bits(model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    inputs = [x.clone() for x, _ in MICRO]
    waiting = iter(inputs)

    def forward_backward(batch: object) -> None:
        model(next(waiting).mul_(0.5)).sum().backward()

    window = SAMWindow(opt, forward_backward, per_micro_batch=per_micro_batch)
    with pytest.raises(RuntimeError, match=r"micro-batch 0 was changed in place in its first pass.*change a copy"):
        window.run([pack(x) for x in inputs])
    assert not opt.is_perturbed
    assert unchanged(model, before)


def test_batches_of_inference_mode_are_served() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    with torch.inference_mode():
        batches = [x.clone() for x, _ in MICRO]
    window = SAMWindow(opt, lambda x: model(x.clone()).sum().backward())
    window.run(batches)
    assert len(window.perturbed_losses) == N


@pytest.mark.parametrize(
    ("sync_ascent", "per_micro_batch", "expected"),
    [
        (None, False, "..s..s..s"),
        (True, False, "..s..s..s"),
        (False, False, ".....s..s"),
        (None, True, "ssssss"),
        (True, True, "ssssss"),
        (False, True, ".....s"),
    ],
)  # fmt: skip
def test_where_gradients_are_synchronised(
    monkeypatch: pytest.MonkeyPatch, sync_ascent: bool | None, per_micro_batch: bool, expected: str
) -> None:
    """'s' marks a pass outside no_sync: the last of each half; with a fraction the replay is not the last. Of m-SAM, whose
    first passes are halves of their own, all do."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, sync_ascent=sync_ascent)
    quiet, trace, run = [], [], runner(model)

    class NoSync:
        def __enter__(self) -> None:
            quiet.append(1)

        def __exit__(self, *exc) -> None:
            quiet.pop()

    def forward_backward(batch) -> Tensor:
        trace.append("." if quiet else "s")
        return run(batch)

    if per_micro_batch:
        SAMWindow(opt, forward_backward, per_micro_batch=True, no_sync=NoSync).run(MICRO[:3])
        assert "".join(trace) == expected
        return
    SAMWindow(opt, forward_backward, no_sync=NoSync).run(MICRO[:3])
    assert "".join(trace) == expected[:6]
    trace.clear()
    SAMWindow(opt, forward_backward, no_sync=NoSync, ascent_fraction=0.5).run(MICRO)  # 3 up, 3 down, 2 down
    assert "".join(trace) == expected[:3] + "..." + ".s"


def test_flattened_parameters_keep_the_sum_of_m_sam() -> None:
    """There a new gradient comes back into the buffer that the sum lies in."""
    model = network()
    expected = by_hand(network().double(), MICRO, 1.0, True)
    fastpost.flatten_parameters(model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    SAMWindow(opt, runner(model), per_micro_batch=True).run([(x.float(), y) for x, y in MICRO])
    opt.step()
    for name, p in model.named_parameters():
        assert (p.detach().double() - expected[name]).abs().max() <= 1e-6


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    assert SAMWindow(types.SimpleNamespace(optimizer=opt), runner(model)).optimizer is opt


def test_bad_input() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    run = runner(model)
    with pytest.raises(TypeError, match=r"must be a fastpost\.SAM, not SGD"):
        SAMWindow(torch.optim.SGD(model.parameters(), lr=1.0), run)
    with pytest.raises(ValueError, match="ascent_fraction"):
        SAMWindow(opt, run, ascent_fraction=1.5)
    with pytest.raises(ValueError, match="per_micro_batch"):
        SAMWindow(opt, run, ascent_fraction=0.5, per_micro_batch=True)
    with pytest.raises(ValueError, match="dropout_rng"):
        SAMWindow(opt, run, dropout_rng="none")
    window = SAMWindow(opt, run)
    with pytest.raises(RuntimeError, match="no window is open"):
        window.feed(MICRO[0])
    with pytest.raises(ValueError, match="at least one"):
        window.run([])
    window.open(2)
    with pytest.raises(RuntimeError, match="is open with 0 of 2"):
        window.open(2)
    window.close()
    run(MICRO[0])
    with opt.perturbed(), pytest.raises(RuntimeError, match="is perturbed"):
        window.open(1)


def test_a_window_with_no_sync_cannot_be_closed_before_the_pass_that_synchronises() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    before = all_bits(model)
    for fraction in (1.0, 0.25):
        window = SAMWindow(opt, runner(model), ascent_fraction=fraction, no_sync=contextlib.nullcontext)
        window.open(4)
        window.feed(MICRO[0])
        window.feed(MICRO[1])
        with pytest.raises(RuntimeError, match=r"closed after 2 of 4 micro-batches"):
            window.close()
        assert not window.is_open
        assert not opt.is_perturbed
        assert all(p.grad is None for p in model.parameters())
        assert unchanged(model, before)
    window.close()  # nothing is open
    window.run(MICRO)  # and the next one is as any other


def test_replicas_that_ascend_alone_need_no_sync() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    opt.sync_ascent = False
    with pytest.raises(ValueError, match=r"sync_ascent=False.*pass no_sync"):
        SAMWindow(opt, runner(model))


@pytest.mark.parametrize("dropout_rng", ["same", "independent"])
def test_numpy_s_and_python_s_numbers_are_drawn_again_too(dropout_rng: str) -> None:
    """Speech models draw the masks of SpecAugment from NumPy's generator."""
    p, drawn = nn.Parameter(torch.ones(3)), []

    def forward_backward(_: int) -> None:
        drawn.append((np.random.rand(), random.random()))
        p.sum().backward()

    np.random.seed(5)
    random.seed(5)
    window = SAMWindow(SAM([p], torch.optim.SGD, lr=0.1), forward_backward, dropout_rng=dropout_rng)
    window.run([0, 1])
    assert (drawn[:2] == drawn[2:]) == (dropout_rng == "same")
    np.random.seed(5)
    random.seed(5)
    plain = [(np.random.rand(), random.random()) for _ in range(3)]
    assert drawn[:2] == plain[:2]


def test_no_sync_looks_into_a_compiled_module() -> None:
    class Replica(nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:  # no process group is needed for what is looked at
            nn.Module.__init__(self)
            self.require_backward_grad_sync = True

    replica, compiled = Replica(), nn.Module()
    compiled._orig_mod = replica
    for model in (replica, compiled):
        with no_sync(model):
            assert not replica.require_backward_grad_sync
        assert replica.require_backward_grad_sync
    with pytest.raises(TypeError, match="neither DistributedDataParallel nor"), no_sync(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_in_an_open_window_is_refused_and_changes_nothing(at: int, scaled: bool) -> None:
    """At w or, behind an ascent on two of four, at w + e; the window then goes on as if nobody had asked."""
    batches = [(X[i : i + 8].double(), Y[i : i + 8]) for i in range(0, 32, 8)]
    found = []
    for interrupted in (False, True):
        model = double_network()
        opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, ascent_fraction=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)

        def forward_backward(batch, model=model, scaler=scaler) -> None:
            scaler.scale(nn.functional.cross_entropy(model(batch[0]), batch[1]) / 4).backward()

        window = SAMWindow(opt, forward_backward)
        window.open(4)
        for k, batch in enumerate(batches):
            if interrupted and k == at:
                for step in (
                    (lambda opt=opt, scaler=scaler: scaler.step(opt)),
                    opt.step,
                    (lambda opt=opt: opt.step(lambda: None)),
                    *([opt.second_step] if opt.is_perturbed else []),
                ):
                    with pytest.raises(RuntimeError, match=r"in an open window.*nothing was changed.*close\(\)"):
                        step()
                assert opt.is_perturbed == (at == 3)
            window.feed(batch)
        scaler.step(opt)
        scaler.update()
        found.append(all_bits(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_window_that_is_gone_does_not_hold_the_optimizer() -> None:
    model = double_network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    SAMWindow(opt, runner(model)).open(2)
    with pytest.raises(RuntimeError, match=r"where the window is gone, opt\.abandon\(\)"):
        opt.step()
    opt.abandon()
    nn.functional.cross_entropy(model(X.double()), Y).backward()
    opt.step()


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch gives gradients the dtype of their weights")
@pytest.mark.parametrize("norm", ["step", "backward"])
def test_a_gradient_of_another_dtype_than_its_weight_is_refused_with_a_remedy(norm: str) -> None:
    model = network().bfloat16()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, norm=norm)

    def backward() -> None:
        nn.functional.cross_entropy(model(X.bfloat16()).float(), Y).backward()

    for p in model.parameters():
        p.grad_dtype = torch.float32
    backward()
    before = all_bits(model)
    with pytest.raises(
        ValueError, match=r"is torch\.bfloat16 and its gradient torch\.float32.*Say p\.grad_dtype = p\.dtype"
    ):
        opt.first_step()
    assert unchanged(model, before)
    opt.zero_grad()
    for p in model.parameters():
        p.grad_dtype = p.dtype
    backward()
    with opt.perturbed():
        backward()
    opt.step()


def test_a_second_window_of_an_optimizer_is_refused_and_copies_are_in_none() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    window, other = (SAMWindow(opt, lambda x: model(x).square().mean().backward()) for _ in range(2))
    window.open(2)
    window.feed(X[:4])
    gradients = [p.grad for p in opt.tensors()]
    with pytest.raises(RuntimeError, match=r"another window of this optimizer is open; close\(\) or abort\(\)"):
        other.open(1)
    assert opt.in_window
    assert not other.is_open
    assert all(p.grad is g for p, g in zip(opt.tensors(), gradients, strict=True))
    window.abort()
    window.open(2)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert not copied.in_window
        copied.step()
    assert opt.in_window
    del window
    opt.abandon()  # as the error says
    other.run([X[:4], X[4:8]])
    opt.step()


@pytest.mark.parametrize("variant", [MomentumSAM(), ZerothOrderSAM(1)])
def test_per_micro_batch_is_refused_where_no_pass_ascends(variant: Any) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, variant=variant)
    with pytest.raises(ValueError, match=f"{type(variant).__name__} makes no ascent pass.*use it without per_micro_batch"):
        SAMWindow(opt, runner(model), per_micro_batch=True)
    SAMWindow(opt, runner(model))
