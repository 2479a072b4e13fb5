"""What the caller clips between backward and step is what is stepped with, also where a variant rewrites gradients."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpost import SAM, SAMWindow, flatten_parameters
from fastpost.sam import GSAM, TRAM, FriendlySAM, LookSAM, MomentumSAM, StableSAM, Variant

from .by_hand import gsam, largest_difference, look_sam_between, look_sam_kept, stable_sam
from .distributed import run
from .small import all_bits, closure_of, loss_of, network, unchanged
from .test_sam_variants import BATCHES, LR, RHO, Problem, loss_on, weights

CLIP = 0.02


def rewritten(problem: Problem, name: str, clip: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights, and gradients before the clip, step by step: the papers' equations with the clip at their end."""
    w, look = problem.w, None
    for t, x in enumerate(BATCHES):
        g = problem.gradient(w, x)
        h = problem.gradient(w + RHO * g / g.norm(), x)
        if name == "stable":
            h = stable_sam(g, h)
        elif name == "gsam":
            h = gsam(g, h, 0.4)
        elif t % 2 == 0:
            look = look_sam_kept(g, h)
        else:
            h = look_sam_between(g, look)
        w = w - LR * clip(h)
        yield w, h


CASES: dict[str, tuple[Callable[[], Variant], dict[str, Any]]] = {
    "stable": (StableSAM, {}),
    "gsam": (lambda: GSAM(alpha=0.4), {}),
    "look": (LookSAM, {"interval": 2}),
}
# By the norm, and by value, which turns the gradient.
CLIPS = {
    "norm": (
        lambda params: nn.utils.clip_grad_norm_(params, CLIP),
        lambda h: h * min(1.0, float(CLIP / (h.norm() + 1e-6))),
    ),
    "value": (lambda params: nn.utils.clip_grad_value_(params, CLIP / 20), lambda h: h.clamp(-CLIP / 20, CLIP / 20)),
}
Backward = Callable[[float], None]


def two_calls(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    backward(1.0)
    if opt.ascends:
        opt.first_step(zero_grad=True)
        backward(1.0)
    clip()
    opt.step()
    opt.zero_grad()


def added_up(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    """Accumulation by hand: nobody says which backward pass is the last one."""
    parts = (0.25, 0.5, 0.25)
    for part in parts:
        backward(part)
    if opt.ascends:
        opt.first_step(zero_grad=True)
        for part in parts:
            backward(part)
    clip()
    opt.step()
    opt.zero_grad(set_to_none=False)


def both_calls_always(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    """Also on steps without an ascent, which make their one pass twice here."""
    backward(1.0)
    opt.first_step(zero_grad=True)
    backward(1.0)
    clip()
    opt.second_step(zero_grad=True)


def both_calls_around_one_pass(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    backward(1.0)
    opt.first_step(zero_grad=opt.ascends)
    if opt.ascends:
        backward(1.0)
    clip()
    opt.second_step(zero_grad=True)


def inside_the_block(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    backward(1.0)
    with opt.perturbed():
        backward(1.0)
        clip()
        opt.step()
    opt.zero_grad()


def after_the_block(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    backward(1.0)
    with opt.perturbed():
        backward(0.5)
        backward(0.5)
    clip()
    opt.step()
    opt.zero_grad()


def in_the_closure(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    def closure() -> None:
        backward(1.0)
        if opt.is_perturbed or not opt.ascends:
            clip()

    opt.step(closure)


def window(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    SAMWindow(opt, backward).run([0.5, 0.5])
    clip()
    opt.step()


def thrown_away_in_between(opt: SAM, backward: Backward, clip: Callable[[], None]) -> None:
    """A second pass that is made again after its gradients were dropped, in each of the ways there are."""
    backward(1.0)
    if opt.ascends:
        opt.first_step(zero_grad=True)
    params = opt.tensors()
    for drop in (
        lambda: opt.zero_grad(),
        lambda: [p.grad.zero_() for p in params],
        lambda: [setattr(p, "grad", None) for p in params],
        lambda: opt.zero_grad(set_to_none=False),
    ):
        drop()
        backward(3.0)
    for p in params:
        p.grad = None
    two_passes = (0.5, 0.5)
    for part in two_passes:
        backward(part)
    clip()
    opt.step()
    opt.zero_grad()


FORMS = [
    two_calls,
    both_calls_always,
    both_calls_around_one_pass,
    added_up,
    inside_the_block,
    after_the_block,
    in_the_closure,
    window,
    thrown_away_in_between,
]
# A block makes a second pass, which LookSAM's steps between have not.
COMBINATIONS = [(n, f) for n in CASES for f in FORMS if n != "look" or f not in (inside_the_block, after_the_block)]


@pytest.mark.parametrize("how", CLIPS)
@pytest.mark.parametrize(("name", "form"), COMBINATIONS)
def test_the_clip_bounds_the_step(name: str, form: Any, how: str) -> None:
    variant, options = CASES[name]
    clip, clipped = CLIPS[how]
    problem = Problem()
    model = copy.deepcopy(problem.model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=variant(), **options)
    bites = 0
    for x, (expected, before) in zip(BATCHES, rewritten(problem, name, clipped), strict=True):

        def backward(part: float, x: Tensor = x) -> None:
            (part * loss_on(model, x)).backward()

        form(opt, backward, lambda: clip(model.parameters()))
        assert (weights(model) - expected).abs().max() <= 1e-11
        bites += not torch.equal(clipped(before), before)
    assert bites == len(BATCHES)


def test_gradients_are_those_of_the_step_after_each_backward_pass() -> None:
    problem = Problem()
    opt = SAM(problem.model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.4))
    x = BATCHES[0]
    g = problem.gradient(problem.w, x)
    h = problem.gradient(problem.w + RHO * g / g.norm(), x)
    loss_on(problem.model, x).backward()
    assert (gradients(problem.model) - g).abs().max() <= 1e-12
    opt.first_step(zero_grad=True)
    for passes in (1, 2, 3):
        loss_on(problem.model, x).backward()
        second = passes * h
        unit = second / second.norm()
        assert (gradients(problem.model) - (second - 0.4 * (g - (g @ unit) * unit))).abs().max() <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_a_look_at_gradients_before_the_step_changes_nothing(name: str) -> None:
    """`torch.autograd.grad` runs hooks on parameters and adds to no gradient."""
    make, options = CASES[name]
    clip, clipped = CLIPS["norm"]
    problem = Problem()
    model = problem.model
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=make(), **options)
    for x, (expected, _) in zip(BATCHES, rewritten(problem, name, clipped), strict=True):
        if opt.ascends:
            loss_on(model, x).backward()
            opt.first_step(zero_grad=True)
        loss_on(model, x).backward()
        clip(model.parameters())
        before = gradients(model).clone()
        torch.autograd.grad(loss_on(model, x), list(model.parameters()))
        assert torch.equal(gradients(model), before)
        opt.step()
        opt.zero_grad()
        assert (weights(model) - expected).abs().max() <= 1e-11


def test_gradients_that_are_views_of_one_buffer() -> None:
    """Flattened parameters: what is written to one gradient counts as written to all, in the eyes of autograd."""
    clip, clipped = CLIPS["norm"]
    problem = Problem()
    model = copy.deepcopy(problem.model)
    flatten_parameters(model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.4))
    for x, (expected, _) in zip(BATCHES, rewritten(problem, "gsam", clipped), strict=True):

        def backward(part: float, x: Tensor = x) -> None:
            (part * loss_on(model, x)).backward()

        added_up(opt, backward, lambda: clip(model.parameters()))
        assert (weights(model) - expected).abs().max() <= 1e-11


def test_backward_passes_that_reach_different_parameters() -> None:
    """Experts that take turns: a pass without them leaves their gradients as they are."""
    torch.manual_seed(5)
    experts = nn.ModuleList(nn.Linear(20, 3) for _ in range(2)).double()
    other = copy.deepcopy(experts)
    found = []
    for model, turns in ((experts, ([0], [1], [0])), (other, ([0, 1, 0],))):
        opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.4))
        for last in (False, True):
            for turn in turns:
                sum(loss_on(model[i], BATCHES[0]) for i in turn).backward()
            if not last:
                opt.first_step(zero_grad=True)
        found.append(gradients(model))
    assert (found[0] - found[1]).abs().max() <= 1e-12


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_assigned_by_hand_are_rewritten_by_end_ascent() -> None:
    """`torch.autograd.grad` runs no hook: whoever clips those says when the second pass is over."""
    clip, clipped = CLIPS["norm"]
    problem = Problem()
    model = copy.deepcopy(problem.model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.4))
    for x, (expected, _) in zip(BATCHES, rewritten(problem, "gsam", clipped), strict=True):
        for last in (False, True):
            grads = torch.autograd.grad(loss_on(model, x), list(model.parameters()))
            for p, part in zip(model.parameters(), grads, strict=True):
                p.grad = part
            if not last:
                opt.first_step(zero_grad=True)
        opt.end_ascent()
        assert not opt.is_perturbed
        clip(model.parameters())
        opt.step()
        opt.zero_grad()
        assert (weights(model) - expected).abs().max() <= 1e-11


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_backward_passes_inside_of_one(reentrant: bool) -> None:
    def deep() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))).double()

    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for saved in (False, True):
        model = deep()
        opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.7))
        for _ in range(2):
            for last in (False, True):
                for _ in range(2):
                    h = x.clone().requires_grad_()
                    for layer in model:
                        h = checkpoint(layer, h, use_reentrant=reentrant) if saved else layer(h)
                    h.square().sum().backward()
                if not last:
                    opt.first_step(zero_grad=True)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            opt.step()
            opt.zero_grad()
        found.append(weights(model))
    assert (found[0] - found[1]).abs().max() <= 1e-12


def test_a_backward_pass_that_fails_leaves_the_next_one_right() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise KeyError("on purpose")

    clip, clipped = CLIPS["norm"]
    problem = Problem()
    model = copy.deepcopy(problem.model)
    expected, _ = next(rewritten(problem, "gsam", clipped))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.4))
    x = BATCHES[0]
    loss_on(model, x).backward()
    opt.first_step(zero_grad=True)
    with pytest.raises(KeyError):  # the output layer's gradients have arrived by then
        nn.functional.cross_entropy(model[3](Failing.apply(model[:3](x))), torch.zeros(32, dtype=torch.long)).backward()
    opt.zero_grad()
    loss_on(model, x).backward()
    clip(model.parameters())
    opt.step()
    assert (weights(model) - expected).abs().max() <= 1e-11


@pytest.mark.parametrize("unscaled", ["before the clip", "never"])
@pytest.mark.parametrize("name", CASES)
def test_under_a_loss_scale(name: str, unscaled: str) -> None:
    """Gradients are rewritten while both are scaled, and unscaled after that."""
    variant, options = CASES[name]
    clip, clipped = CLIPS["norm"] if unscaled != "never" else (lambda params: None, lambda h: h)
    problem = Problem()
    model = copy.deepcopy(problem.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=variant(), **options)
    for x, (expected, _) in zip(BATCHES, rewritten(problem, name, clipped), strict=True):
        scaler.scale(loss_on(model, x)).backward()
        if opt.ascends:
            opt.first_step(zero_grad=True)
            scaler.scale(loss_on(model, x)).backward()
        if unscaled != "never":
            scaler.unscale_(opt)
            clip(model.parameters())
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert (weights(model) - expected).abs().max() <= 1e-11


# -- what it costs, and whom it leaves alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, FriendlySAM(), TRAM(), MomentumSAM()])
def test_variants_that_rewrite_nothing_put_no_hooks_on_parameters(variant: Variant | None) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, variant=variant)
    if isinstance(variant, TRAM):
        variant.observe(torch.tensor(1.0))
    opt.step(closure_of(model))
    assert not any(p._backward_hooks for p in model.parameters())


def test_the_hooks_leave_with_the_optimizer_and_parameters_are_freed() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM())
    opt.step(closure_of(model))
    assert all(p._backward_hooks and p._post_accumulate_grad_hooks for p in model.parameters())
    del opt
    gc.collect()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_between_steps_nothing_is_kept() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM())
    opt.step(closure_of(model))
    assert not opt._early._changes
    assert not opt._step.clean
    closure_of(model)()
    opt.first_step()
    opt.abandon()
    assert not opt._step.clean


@pytest.mark.parametrize("how", ["copied", "added", "swapped", "thawed"])
def test_parameters_that_come_later_are_watched(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().double()
    params = list(model.parameters())
    if how == "copied":
        opt = SAM(params, torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.7))
        model, opt = copy.deepcopy((model, opt))
    elif how == "added":
        opt = SAM(params[:2], torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.7))
        opt.add_param_group({"params": params[2:]})
    elif how == "swapped":  # as conversions of sharded models do it
        opt = SAM(params, torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.7))
        opt.step(closure_of(model, BATCHES[0]))
        opt.zero_grad()
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        model.float().double()
    else:
        for p in params[:3]:
            p.requires_grad_(False)
        opt = SAM(params, torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.7))
        for p in params:
            p.requires_grad_(True)
    before = weights(model)
    reference = copy.deepcopy(model)
    plain = SAM(reference.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.7))
    backward = closure_of(model, BATCHES[0])
    backward()
    opt.first_step(zero_grad=True)
    backward()
    backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    opt.step()
    assert (weights(model) - before).norm() == pytest.approx(LR * CLIP, rel=1e-4)
    closure_of(reference, BATCHES[0])()
    SAMWindow(plain, lambda _: closure_of(reference, BATCHES[0])()).run([0])
    plain.step()
    assert (weights(reference) - before).norm() > LR * CLIP


def test_m_sam_refuses_a_variant_that_rewrites() -> None:
    """The second gradient of one micro-batch cannot be told from those before it."""
    opt = SAM(network().parameters(), torch.optim.SGD, variant=StableSAM())
    with pytest.raises(ValueError, match="StableSAM combines the gradients of two whole passes"):
        SAMWindow(opt, lambda _: None, per_micro_batch=True)


def test_an_overflow_is_skipped_whatever_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant, _ in CASES.values():
        for overflowing in (0, 1):
            model = network()
            opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=variant())
            before = all_bits(model)
            for number in range(2):
                (loss_of(model) * (math.inf if number == overflowing else 1.0)).backward()
                if number == 0:
                    opt.first_step(zero_grad=True)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            opt.step()
            assert unchanged(model, before)
            assert opt.skipped_steps == 1


# -- several ranks ----------------------------------------------------------------------------------------------------------


def _in_two(wrap: Callable[[nn.Module], Any], name: str) -> float:
    """The largest difference from one process that sees both halves."""
    import torch.distributed as dist

    from .distributed import whole

    variant, options = CASES[name]
    clip, clipped = CLIPS["norm"]
    problem = Problem()
    named = dict(problem.model.named_parameters())
    model = wrap(copy.deepcopy(problem.model))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=variant(), **options)
    rows = slice(16 * dist.get_rank(), 16 * (dist.get_rank() + 1))
    apart = []
    for x, (expected, _) in zip(BATCHES, rewritten(problem, name, clipped), strict=True):

        def backward(part: float, x: Tensor = x) -> None:
            from .small import Y

            (part * nn.functional.cross_entropy(model(x[rows]), Y[rows])).backward()

        added_up(opt, backward, lambda: clip(model.parameters()))
        found = {n.removeprefix("module."): whole(p) for n, p in model.named_parameters()}
        mine = torch.cat([found[n].detach().flatten() for n in named])
        apart.append((mine, expected))
    return largest_difference(apart)


def _ddp(model: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def _ddp_views(model: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


def _fsdp2(model: nn.Module) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp() -> list[float]:
    return [_in_two(_ddp, name) for name in CASES]


def ddp_views() -> list[float]:
    return [_in_two(_ddp_views, name) for name in CASES]


def fsdp2() -> list[float]:
    return [_in_two(_fsdp2, name) for name in CASES]


RANKS = {"ddp": ddp, "ddp_views": ddp_views, "fsdp2": fsdp2}


@pytest.fixture(scope="module")
def two() -> Any:
    return run(2, RANKS)


@pytest.mark.parametrize("case", RANKS)
def test_two_ranks_clip_what_one_would(two: Any, case: str) -> None:
    """DDP and FSDP2 put the last gradients in place at the end of the backward pass."""
    for worst in two.of(case):
        assert torch.tensor(worst).max() <= 1e-11, dict(zip(CASES, worst, strict=True))
