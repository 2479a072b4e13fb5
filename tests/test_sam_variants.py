"""Every variant of SAM against its equations, in float64, over several steps, and its hooks; long, as each has its own."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastpost import SAM
from fastpost.sam import (
    GSAM,
    TRAM,
    WSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    SampledLayers,
    SAMWindow,
    StableSAM,
    Variant,
    norm_layers,
)
from fastpost.sam.scopes import scope_in

from . import tiny
from .by_hand import gsam as gsam_gradient
from .by_hand import look_sam_between, look_sam_kept, stable_sam
from .small import Y, all_bits, closure_of, network, same_state, unchanged

LR, RHO, STEPS = 0.2, 0.3, 5
BATCHES = [torch.randn(32, 20, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(STEPS)]


def loss_on(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), Y)


class Problem:
    """The network's loss and gradient as functions of one vector w."""

    def __init__(self) -> None:
        self.model = network().double()
        self.shapes = {n: p.shape for n, p in self.model.named_parameters()}
        self.w = torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def gradient(self, w: Tensor, x: Tensor) -> Tensor:
        live = w.detach().requires_grad_()
        parts = live.split([s.numel() for s in self.shapes.values()])
        named = {n: part.view(s) for (n, s), part in zip(self.shapes.items(), parts, strict=True)}
        return torch.autograd.grad(nn.functional.cross_entropy(functional_call(self.model, named, (x,)), Y), live)[0]


def sam_gradient(problem: Problem, w: Tensor, x: Tensor, rho: float = RHO) -> Tensor:
    g = problem.gradient(w, x)
    return problem.gradient(w + rho * g / g.norm(), x)


def stable(problem: Problem, w: Tensor):
    for x in BATCHES:
        g, h = problem.gradient(w, x), sam_gradient(problem, w, x)
        w = w - LR * stable_sam(g, h)
        yield w


def gsam(problem: Problem, w: Tensor):
    for x in BATCHES:
        g, h = problem.gradient(w, x), sam_gradient(problem, w, x)
        w = w - LR * gsam_gradient(g, h, 0.4)
        yield w


def weighted(problem: Problem, w: Tensor):
    for x in BATCHES:
        g, h = problem.gradient(w, x), sam_gradient(problem, w, x)
        w = w - LR * (g + 0.8 / (1 - 0.8) * (h - g))  # of L + gamma / (1 - gamma) (L_SAM - L)
        yield w


def look(problem: Problem, w: Tensor):
    for t, x in enumerate(BATCHES):
        g = problem.gradient(w, x)
        if t % 2 == 0:
            h = sam_gradient(problem, w, x)
            v = look_sam_kept(g, h)
        else:
            h = look_sam_between(g, v)
        w = w - LR * h
        yield w


def friendly(problem: Problem, w: Tensor):
    m = torch.zeros_like(w)
    for x in BATCHES:
        g = problem.gradient(w, x)
        m = 0.6 * m + 0.4 * g
        d = g - 0.8 * m
        w = w - LR * problem.gradient(w + RHO * d / d.norm(), x)
        yield w


def momentum(problem: Problem, w: Tensor):
    v = torch.zeros_like(w)
    for x in BATCHES:
        at = w - RHO * v / v.norm() if v.any() else w
        v = 0.9 * v + problem.gradient(at, x)
        w = w - LR * v
        yield w


CASES = {
    "stable": (stable, StableSAM, {}),
    "gsam": (gsam, lambda: GSAM(alpha=0.4), {}),
    "weighted": (weighted, lambda: WSAM(gamma=0.8), {}),
    "look": (look, LookSAM, {"interval": 2}),
    "friendly": (friendly, lambda: FriendlySAM(sigma=0.8, decay=0.6), {}),
    "momentum": (momentum, MomentumSAM, {"momentum": 0.9}),
}


class Stack(nn.Module):
    """Three blocks between an input and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.up, self.head = nn.Linear(20, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def closure_on(model: nn.Module, x: Tensor) -> Tensor:
    loss = loss_on(model, x)
    loss.backward()
    return loss


def by_closure(model: nn.Module, opt: SAM, x: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
    def closure() -> Tensor:
        loss = loss_on(model, x)
        loss.backward()
        return loss

    opt.step(closure)


def by_window(model: nn.Module, opt: SAM, x: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
    def forward_backward(rows: slice) -> Tensor:
        loss = nn.functional.cross_entropy(model(x[rows]), Y[rows]) / 2
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    SAMWindow(opt, forward_backward).run([slice(0, 16), slice(16, 32)])
    if scaler is None:
        opt.step()
        return
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("form", [by_closure, by_window])
@pytest.mark.parametrize("name", CASES)
def test_a_variant_follows_its_equations_to_1e_12(name: str, form) -> None:
    equations, variant, options = CASES[name]
    problem = Problem()
    model = copy.deepcopy(problem.model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=variant(), **options)
    for x, expected in zip(BATCHES, equations(problem, problem.w), strict=True):
        form(model, opt, x)
        assert (weights(model) - expected).abs().max() <= 1e-12
        assert not opt.is_perturbed
    plain = SAM(problem.model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    for x in BATCHES:
        form(problem.model, plain, x)
    assert (weights(model) - weights(problem.model)).abs().max() > 1e-3  # and is not SAM


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", ["stable", "gsam", "weighted", "friendly"])
def test_a_part_of_a_window_counts_by_its_share(name: str, as_tensor: bool) -> None:
    """Sums over rows, divided by all of the window's, of which the ascent has few in one step and many in the next."""

    class Half(Problem):
        def gradient(self, w: Tensor, x: Tensor) -> Tensor:
            if w is not at[0]:  # g at w is over the ascent's rows
                return super().gradient(w, x)
            live, rows = w.detach().requires_grad_(), slice(0, first[0])
            named = {n: part.view(s) for (n, s), part in zip(self.shapes.items(), live.split(sizes), strict=True)}
            return torch.autograd.grad(
                nn.functional.cross_entropy(functional_call(self.model, named, (x[rows],)), Y[rows]), live
            )[0]

    equations, variant, options = CASES[name]
    problem = Half()
    sizes = [s.numel() for s in problem.shapes.values()]
    model = copy.deepcopy(problem.model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=variant(), ascent_fraction=0.5, **options)

    def forward_backward(batch: tuple[Tensor, slice]) -> None:
        x, rows = batch
        (nn.functional.cross_entropy(model(x[rows]), Y[rows], reduction="sum") / 32).backward()

    window = SAMWindow(opt, forward_backward)
    at, first = [problem.w], [4]
    steps = equations(problem, problem.w)
    for number, x in enumerate(BATCHES):
        first[0] = (4, 28, 16)[number % 3]
        expected = next(steps)
        window.open(2)
        assert window.needs_shares
        for rows in (slice(0, first[0]), slice(first[0], 32)):
            share = (rows.stop - rows.start) / 32
            window.feed((x, rows), share=torch.tensor(share, dtype=torch.float64) if as_tensor else share)
        opt.step()
        assert (weights(model) - expected).abs().max() <= 1e-12
        at[0] = expected


@pytest.mark.parametrize("name", CASES)
def test_a_variant_does_not_feel_the_loss_scale(name: str) -> None:
    equations, variant, options = CASES[name]
    problem = Problem()
    model = copy.deepcopy(problem.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_factor=2.0, growth_interval=1)  # another one each step
    made = variant()
    if isinstance(made, FriendlySAM):
        made.loss_scale = scaler.get_scale
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=made, **options)
    for x, expected in zip(BATCHES, equations(problem, problem.w), strict=True):
        by_window(model, opt, x, scaler)
        assert (weights(model) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("overflowing", ["ascent", "descent"])
@pytest.mark.parametrize("name", ["stable", "gsam", "weighted", "look", "friendly"])
def test_an_overflow_poisons_nothing_that_a_variant_keeps(name: str, overflowing: str) -> None:
    _, variant, options = CASES[name]
    options = {**options, "interval": 1}
    calm, hit = network(), network()
    opts = [SAM(m.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2, variant=variant(), **options) for m in (calm, hit)]
    for model, opt in zip((calm, hit), opts, strict=True):
        opt.step(closure_of(model))
    before, state = all_bits(hit), copy.deepcopy(opts[1].state_dict())
    passes = []

    def closure() -> Tensor:
        passes.append(1)
        loss = closure_of(hit)() * 1
        if len(passes) == (1 if overflowing == "ascent" else 2):
            for p in hit.parameters():
                p.grad.fill_(math.inf)
        return loss

    opts[1].step(closure)
    assert opts[1].skipped_steps == 1
    assert unchanged(hit, before)
    assert same_state(state, opts[1].state_dict())
    for _ in range(2):
        opts[1].step(closure_of(hit))
    assert all(p.isfinite().all() for p in hit.parameters())
    assert all(v.isfinite().all() for s in opts[1].state.values() for v in s.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("name", ["look", "friendly", "momentum"])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_what_a_variant_keeps_is_resumed_bit_by_bit(name: str, base) -> None:
    """In the middle of an interval, through state_dict and through torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    _, variant, options = CASES[name]
    options = (
        {**options, "momentum": 0.9} if base is torch.optim.SGD else {k: v for k, v in options.items() if k != "momentum"}
    )

    def build(model: nn.Module) -> SAM:
        return SAM(model.parameters(), base, rho=RHO, lr=1e-2, variant=variant(), **options)

    model = network()
    opt = build(model)
    for _ in range(3):
        opt.step(closure_of(model))
    middle, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    sharded = copy.deepcopy(get_optimizer_state_dict(model, opt))
    for _ in range(3):
        opt.step(closure_of(model))
    for load in (lambda m, o: o.load_state_dict(state), lambda m, o: set_optimizer_state_dict(m, o, sharded)):
        resumed = network()
        resumed.load_state_dict(middle)
        again = build(resumed)
        load(resumed, again)
        for _ in range(3):
            again.step(closure_of(resumed))
        assert unchanged(resumed, all_bits(model))


@pytest.mark.parametrize("where", ["ascent", "second pass", "by hand"])
@pytest.mark.parametrize("variant", [FriendlySAM, LookSAM])
def test_a_step_that_fails_leaves_nothing_in_a_variants_memory(variant: type[Variant], where: str) -> None:
    model, twin = network(), network()
    opt, other = (
        SAM(m.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, variant=variant(), interval=1) for m in (model, twin)
    )
    opt.step(closure_of(model))
    other.step(closure_of(twin))
    passes = 0

    def failing() -> Tensor:
        nonlocal passes
        passes += 1
        if where == "second pass" and passes == 2:
            raise KeyError("the user's own")
        loss = closure_of(model)()
        if where == "ascent":
            p = model[0].weight
            p.grad = torch.zeros_like(p, layout=torch.sparse_coo)
        return loss

    if where == "by hand":
        closure_of(model)()
        opt.first_step(zero_grad=True)
        opt.restore_()
    else:
        with pytest.raises((KeyError, ValueError)):
            opt.step(failing)
    for _ in range(2):
        opt.step(closure_of(model))
        other.step(closure_of(twin))
    assert unchanged(model, all_bits(twin))
    assert same_state(opt.state_dict(), other.state_dict())


def test_a_checkpoint_of_a_fresh_optimizer_does_not_shift_the_interval() -> None:
    """torch warms it up with a step at a learning rate of 0, which creates the state and must not count."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2, interval=2, variant=LookSAM())
    before = all_bits(model)
    saved = get_optimizer_state_dict(model, opt)
    assert unchanged(model, before)
    assert opt.param_groups[0]["sam_steps"] == 0
    assert all("sam_look" in entry for entry in saved["state"].values())
    assert opt.ascends


def test_gsam_refuses_gradients_of_two_scales() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = all_bits(model)
    for _ in range(2):  # assigned by hand: a backward pass would have rewritten them at its end
        grads = torch.autograd.grad(scaler.scale(loss_on(model, BATCHES[0].float())), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        if not opt.is_perturbed:
            opt.first_step(zero_grad=True)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"GSAM combines the gradients of both passes.*opt\.end_ascent\(\)"):
        scaler.step(opt)
    assert unchanged(model, before)
    assert not opt.is_perturbed


def test_wsam_of_one_half_is_sam_and_of_0_the_base_optimizer() -> None:
    half, plain, nothing, base = (network() for _ in range(4))
    opts = [
        SAM(half.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=WSAM(0.5)),
        SAM(plain.parameters(), torch.optim.SGD, rho=RHO, lr=LR),
        SAM(nothing.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=WSAM(0.0)),
        SAM(base.parameters(), torch.optim.SGD, rho=0.0, lr=LR),
    ]
    for model, opt in zip((half, plain, nothing, base), opts, strict=True):
        opt.step(closure_of(model))
    assert unchanged(half, all_bits(plain))
    assert unchanged(nothing, all_bits(base))
    for gamma in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\)"):
            WSAM(gamma)


def test_parameters_that_take_part_in_one_pass_only(backend: str) -> None:
    for name in ("gsam", "weighted", "look", "friendly", "stable"):
        _, variant, _ = CASES[name]
        used, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.full((7,), 2.0))
        opt = SAM([used, other], torch.optim.AdamW, rho=0.5, lr=0.1, variant=variant())
        (used.square().sum() + other.square().sum()).backward()
        opt.first_step(zero_grad=True)
        used.square().sum().backward()
        opt.second_step(zero_grad=True)
        assert torch.equal(other, torch.full((7,), 2.0))
        (other.square().sum()).backward()
        opt.first_step(zero_grad=True)
        (used.square().sum() + other.square().sum()).backward()
        opt.second_step(zero_grad=True)
        assert not torch.equal(other, torch.full((7,), 2.0))
        assert opt.skipped_steps == 0


# -- TRAM -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["closure", "window"])
def test_tram_follows_its_equations(form: str) -> None:
    """e = d t^2 g / |t g|, t = abs(w) + eta; d from the first pass, averaged over micro-batches."""
    problem, eta = Problem(), 0.05
    model, w, tram = copy.deepcopy(problem.model), problem.w, TRAM()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1.0, adaptive=True, eta=eta, lr=LR, variant=tram)
    for x in BATCHES:
        d = x[:16].square().mean() / 2 + x[16:].square().mean() / 2 if form == "window" else x.square().mean()
        g, t = problem.gradient(w, x), w.abs() + eta
        w = w - LR * problem.gradient(w + d * t**2 * g / (t * g).norm(), x)

        def forward_backward(rows: slice, x: Tensor = x) -> Tensor:
            tram.observe(x[rows].square().mean())
            loss = nn.functional.cross_entropy(model(x[rows]), Y[rows]) * len(Y[rows]) / len(Y)
            loss.backward()
            return loss

        if form == "window":
            SAMWindow(opt, forward_backward).run([slice(0, 16), slice(16, 32)])
            opt.step()
        else:
            opt.step(lambda: forward_backward(slice(0, 32)))
        assert (weights(model) - w).abs().max() <= 1e-12


@pytest.mark.parametrize(("divergence", "skipped"), [(0.0, 0), (math.nan, 1), (math.inf, 1)])
def test_tram_with_a_divergence_that_is_zero_or_not_finite(divergence: float, skipped: int) -> None:
    model, tram = network(), TRAM()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1.0, adaptive=True, lr=0.0, variant=tram)
    before = all_bits(model)
    tram.observe(torch.tensor(divergence))
    closure_of(model)()
    opt.first_step(zero_grad=True)
    assert unchanged(model, before)
    closure_of(model)()
    opt.second_step()
    assert opt.skipped_steps == skipped


@pytest.mark.parametrize("before", ["a step without an ascent", "a step given up", "an exception", "a window given up"])
def test_tram_forgets_what_was_observed_for_other_steps(before: str) -> None:
    model, tram = network(), TRAM()
    interval = 2 if before == "a step without an ascent" else 1
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=1e-3, variant=tram, interval=interval)

    def observed(value: float) -> None:
        opt.zero_grad()
        tram.observe(torch.tensor(value))
        closure_of(model)()

    if interval == 2:
        opt.step(lambda: observed(1.0))
    observed(100.0)
    if before == "a step without an ascent":
        opt.step()
    elif before == "a step given up":
        opt.first_step()
        opt.abandon()
    elif before == "an exception":
        with pytest.raises(KeyError), opt.perturbed():
            raise KeyError
    else:
        window = SAMWindow(opt, lambda _: observed(100.0))
        window.open(2)
        window.feed(0)
        window.abort()
    observed(3.0)
    opt.first_step()
    assert opt.report.intended_norm.item() == pytest.approx(3.0)
    opt.second_step()


def test_tram_without_a_divergence_says_so() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.0, variant=TRAM())
    with pytest.raises(RuntimeError, match="call observe"):
        opt.step(closure_of(model))
    assert not opt.is_perturbed


# -- scopes, passes, bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequence", "llama"])
def test_sam_on_norm_layers_only(kind: str) -> None:
    model = tiny.build(kind)
    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.5, lr=0.0, scope=norm_layers(model))
    model(**tiny.batch_for(kind)).loss.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt.first_step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("norm" in n.lower() for n in moved)
    e = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
    assert e.norm().item() == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="no norm layer"):
        norm_layers(network())


def test_sampled_layers_are_perturbed_alone_and_others_at_each_step() -> None:
    """Each step is SAM's on the drawn layers, in float64: the norm, e and the gradient at w + e."""
    model = Stack()
    shape = {n: p.shape for n, p in model.named_parameters()}

    def gradient(at: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        live = {n: p.detach().clone().requires_grad_() for n, p in at.items()}
        found = torch.autograd.grad(nn.functional.cross_entropy(functional_call(model, live, (x,)), Y), list(live.values()))
        return dict(zip(live, found, strict=True))

    scope = SampledLayers(model, share=0.5, seed=3)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, scope=scope)
    names = [[n for n in shape if n.startswith(f"blocks.{k}.")] for k in range(3)]
    names.append([n for n in shape if not n.startswith("blocks.")])
    drawn = []
    for x in BATCHES:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        opt.step(lambda x=x: closure_on(model, x))
        drawn.append(tuple(scope.drawn))
        g = gradient(before, x)
        chosen = [n for layer in scope.drawn for n in names[layer]]
        norm = sum(g[n].square().sum() for n in chosen).sqrt()
        h = gradient({n: w + RHO * g[n] / norm if n in chosen else w for n, w in before.items()}, x)
        for n, p in model.named_parameters():
            assert (p - (before[n] - LR * h[n])).abs().max() <= 1e-12, n
    assert all(len(layers) == 2 for layers in drawn)
    assert len(set(drawn)) > 2
    assert set(itertools.chain(*drawn)) == {0, 1, 2, 3}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("scoped", ["norms", "named", "both", "sampled"])
def test_a_scope_goes_along_with_copies_of_model_and_optimizer(scoped: str, duplicate: Any) -> None:
    """A copy goes on as the original would, in its own weights, before and after a first step; so does one of a copy."""
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), "norm": nn.LayerNorm(6)}).double()
    make: dict[str, Callable[[], Any]] = {
        "norms": lambda: norm_layers(model),
        "named": lambda: scope_in(model, ["layers.1.*"]),
        "both": lambda: scope_in(model, ["layers.1.*"]) | norm_layers(model),
        "sampled": lambda: SampledLayers(model, share=0.5),
    }

    def step(m: Any, opt: SAM) -> None:
        def closure() -> Tensor:
            x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
            for layer in m["layers"]:
                x = x + torch.tanh(layer(x))
            loss = (m["norm"](x) - 1).square().sum()
            loss.backward()
            return loss

        opt.step(closure)

    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, scope=make[scoped]())
    for _ in range(2):
        twin, other = duplicate(duplicate((model, opt)))
        kept = all_bits(model)
        step(twin, other)
        assert unchanged(model, kept)
        step(model, opt)
        assert unchanged(twin, all_bits(model))
        assert not unchanged(model, kept)


def test_a_scope_does_not_fall_for_tensors_where_others_have_been() -> None:
    """A copy's tensors are its own, whatever their addresses were before."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    for scope in (norm_layers(model), SampledLayers(nn.ModuleDict({"layers": nn.ModuleList([model])}))):
        twin, inside = copy.deepcopy((model, scope))
        assert [inside(None, p) for p in twin.parameters()] == [scope(None, p) for p in model.parameters()]
        assert not any(inside(None, p) for p in model.parameters())


def test_sampled_layers_go_on_where_a_run_is_resumed() -> None:
    model, drawn = Stack(), []

    def build(m: nn.Module) -> tuple[SAM, SampledLayers]:
        scope = SampledLayers(m, share=0.5)
        return SAM(m.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2, scope=scope), scope

    opt, scope = build(model)
    for step, x in enumerate(BATCHES):
        if step == 2:
            middle, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
        opt.step(lambda x=x: closure_on(model, x))
        drawn.append(scope.drawn)
    resumed = Stack()
    resumed.load_state_dict(middle)
    again, other = build(resumed)
    again.load_state_dict(state)
    for step, x in enumerate(BATCHES[2:], start=2):
        again.step(lambda x=x: closure_on(resumed, x))
        assert other.drawn == drawn[step]
    assert unchanged(resumed, all_bits(model))
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="share must lie in"):
            SampledLayers(model, share)
    with pytest.raises(ValueError, match="has no ModuleList"):
        SampledLayers(network())
    model.requires_grad_(False).blocks[1].requires_grad_(True)
    assert len(SampledLayers(model).layers) == 1


def test_momentum_sam_makes_one_pass_and_leaves_no_perturbation_between_steps() -> None:
    model, calls = network(), []
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2, variant=MomentumSAM())
    for _ in range(3):
        opt.step(lambda: calls.append(1) or closure_of(model)())
        opt.state_dict()  # refused while perturbed
    assert len(calls) == 3


def test_momentum_sam_asks_for_momentum() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.Adagrad, rho=RHO, lr=1e-2, variant=MomentumSAM())
    with pytest.raises(RuntimeError, match="found none of momentum_buffer, exp_avg"):
        opt.step(closure_of(model))
    assert not opt.is_perturbed


def test_several_bases_and_a_variant() -> None:
    model = network()
    params = list(model.parameters())
    bases = [torch.optim.SGD(params[:2], lr=0.1, momentum=0.9), torch.optim.AdamW(params[2:], lr=1e-2)]
    opt = SAM(None, bases, rho=RHO, variant=FriendlySAM())
    for _ in range(3):
        opt.step(closure_of(model))
    assert all("sam_mean" in opt.state[p] for p in params)
    assert all("exp_avg" in opt.state[p] for p in params[2:])


@pytest.mark.parametrize("variant", [LookSAM, FriendlySAM, GSAM, StableSAM], ids=lambda v: v.__name__)
def test_a_model_that_is_narrowed_keeps_what_its_variant_has(variant: type[Variant]) -> None:
    """In its own dtype, and steps go on with narrower gradients."""
    model = network()
    opt = SAM(
        model.parameters(), torch.optim.SGD, lr=LR, rho=RHO, variant=variant(), interval=2 if variant is LookSAM else 1
    )
    for _ in range(2):
        opt.step(closure_of(model))
    (wide,) = {p.dtype for p in model.parameters()}
    model.bfloat16()
    before = all_bits(model)
    x = torch.randn(32, 20, dtype=torch.bfloat16)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x).float(), Y)
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
    assert opt.skipped_steps == 0
    assert not unchanged(model, before)
    kept = [opt.state[p][name].dtype for p in model.parameters() for name in opt.variant.state_names]
    assert set(kept) <= {wide}


def test_dot_products_of_two_dtypes_take_the_wider_one() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=LR)
    a = {p: torch.randn_like(p, dtype=torch.float32) for p in model.parameters()}
    b = {p: torch.randn_like(p, dtype=torch.float32).bfloat16() for p in model.parameters()}
    expected = sum(float((a[p].double() * b[p].double()).sum()) for p in a)
    for x, y in ((a, b), (b, a)):
        assert opt._context.dot(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_bad_input() -> None:
    model = network()
    for call, message in (
        (lambda: GSAM(alpha=-1.0), "alpha"),
        (lambda: LookSAM(alpha=math.nan), "alpha"),
        (lambda: FriendlySAM(decay=1.0), "decay"),
        (lambda: FriendlySAM(sigma=-0.1), "sigma"),
        (
            lambda: SAMWindow(SAM(model.parameters(), torch.optim.SGD, variant=GSAM()), lambda b: b, per_micro_batch=True),
            "GSAM combines",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="variant must be"):
        SAM(model.parameters(), torch.optim.SGD, variant=GSAM)
    assert isinstance(SAM(model.parameters(), torch.optim.SGD).variant, Variant)
