"""logits-SAM and Functional-SAM against their equations, in float64."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from fastpost import SAM
from fastpost.sam import ExternalSAM, FunctionalSAM, MomentumSAM, PreconditionedSAM, SAMWindow, logits_sam

from .small import X, Y, network

RHO = 0.4


def head_problem(tokens: int, width: int, vocabulary: int):
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, tokens // 2, width), (vocabulary, width), (vocabulary,))
    )
    labels = torch.randint(0, vocabulary, (2, tokens // 2), generator=generator)
    return hidden, weight, bias, lambda z: nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(6, 16, 50), (60, 8, 10)])  # both orders of products
@pytest.mark.parametrize("biased", [False, True])
def test_logits_sam_is_a_perturbed_head(tokens: int, width: int, vocabulary: int, biased: bool) -> None:
    hidden, weight, bias, loss = head_problem(tokens, width, vocabulary)
    inputs = [hidden, weight, *([bias] if biased else [])]

    def at(w: Tensor) -> Tensor:
        return loss(hidden @ w.T + (bias if biased else 0))

    (g,) = torch.autograd.grad(at(weight), weight)
    e = RHO * g / g.norm()
    expected = at(weight + e)
    gradients = torch.autograd.grad(expected, inputs)
    got = logits_sam(hidden, weight, loss, RHO, bias=bias if biased else None)
    assert got.item() == pytest.approx(expected.item(), rel=1e-13)
    for a, b in zip(torch.autograd.grad(got, inputs), gradients, strict=True):
        assert (a - b).abs().max() <= 1e-13


@pytest.mark.parametrize("tokens", [6, 60])
def test_logits_sam_where_nothing_moves(tokens: int) -> None:
    hidden, weight, _, loss = head_problem(tokens, 8, 10)
    assert logits_sam(hidden, weight, loss, 0.0).item() == loss(hidden @ weight.T).item()
    assert logits_sam(hidden, weight, lambda z: (z * 0).sum()).item() == 0
    assert logits_sam(hidden.detach() / 0, weight, loss).isnan()
    for rho in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="logits_sam: rho must be finite and >= 0"):
            logits_sam(hidden, weight, loss, rho)
    with pytest.raises(TypeError, match="logits_sam: rho must be a number"):
        logits_sam(hidden, weight, loss, "0.1")


def equations(
    model: nn.Module, x: Tensor, y: Tensor, weight: float, scales: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """J(w + e)^T dL/dz(w), e along the gradient at w of the whole loss, divided by scales where they are given."""
    w = {n: p.detach() for n, p in model.named_parameters()}

    def logits(w: dict[str, Tensor]) -> Tensor:
        return functional_call(model, w, (x,))

    z, pull = vjp(logits, w)
    z = z.detach().requires_grad_()
    (dz,) = torch.autograd.grad(nn.functional.cross_entropy(z, y) * weight, z)
    (g,) = pull(dz)
    if scales is not None:
        g = {n: v / scales[n] for n, v in g.items()}
    norm = torch.stack([v.square().sum() for v in g.values()]).sum().sqrt()
    _, pull = vjp(logits, {n: w[n] + RHO * g[n] / norm for n in w})
    return pull(dz)[0]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("form", ["closure", "window"])
def test_functional_sam(form: str, scale: float) -> None:
    model, lr = network().double(), 0.3
    x, y = X.double(), Y
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=lr)
    functional = FunctionalSAM(opt)
    for _ in range(3):
        g = equations(model, x, y, 1.0)
        expected = {n: p.detach() - lr * g[n] for n, p in model.named_parameters()}
        plain = copy.deepcopy(model)
        nn.functional.cross_entropy(plain(x), y).backward()

        def forward_backward(rows: slice) -> Tensor:
            def loss_of(z: Tensor) -> Tensor:
                return nn.functional.cross_entropy(z, y[rows]) * len(y[rows]) / len(y)

            loss = functional(model(x[rows]), loss_of)
            (loss * scale).backward()
            return loss

        if form == "closure":
            opt.zero_grad()
            forward_backward(slice(0, 32))
            with opt.perturbed():
                forward_backward(slice(0, 32))
        else:
            SAMWindow(opt, forward_backward).run([slice(0, 8), slice(8, 32)])
        for p in model.parameters():
            p.grad /= scale
        assert any((p.grad - q.grad).abs().max() > 1e-3 for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        opt.step()
        for n, p in model.named_parameters():
            assert (p.detach() - expected[n]).abs().max() <= 1e-13


def test_functional_sam_after_a_step_that_was_given_up() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    functional = FunctionalSAM(opt)

    def loss(rows: slice) -> Tensor:
        return functional(model(X[rows]), lambda z: nn.functional.cross_entropy(z, Y[rows]))

    loss(slice(0, 5)).backward()
    opt.zero_grad()  # never perturbed: what was kept is stale
    loss(slice(0, 7)).backward()
    with pytest.raises(RuntimeError, match=r"shape \(9, 3\) meet those of \(7, 3\)"), opt.perturbed():
        loss(slice(0, 9))
    opt.zero_grad()
    loss(slice(0, 9)).backward()
    with opt.perturbed():
        loss(slice(0, 9)).backward()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("form", ["window", "two calls"])
def test_functional_sam_keeps_nothing_without_an_ascent(form: str, watched: bool) -> None:
    """Every second step is plain, and what a step has left ends with it."""
    model = network().double()
    x = X.double()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, interval=2)
    functional, seen = FunctionalSAM(opt), []
    hand = copy.deepcopy(model)
    if watched:
        functional.watch(model[-1])

    def forward_backward(rows: slice) -> None:
        def loss_of(z: Tensor) -> Tensor:
            return nn.functional.cross_entropy(z, Y[rows], reduction="sum") / len(Y)

        loss_backward(loss_of(model(x[rows])) if watched else functional(model(x[rows]), loss_of))
        seen.append(functional.waiting)

    for ascends in (True, False, True):
        hand.load_state_dict(model.state_dict())
        g = equations(hand, x, Y, 1.0)
        if not ascends:
            loss = nn.functional.cross_entropy(hand(x), Y)
            g = dict(zip(g, torch.autograd.grad(loss, list(hand.parameters())), strict=True))
        expected = {n: p.detach() - 0.1 * g[n] for n, p in model.named_parameters()}
        assert opt.ascends == ascends
        seen.clear()
        if form == "window":
            SAMWindow(opt, forward_backward).run([slice(0, 8), slice(8, 32)])
        else:
            forward_backward(slice(0, 32))
            opt.first_step(zero_grad=True)
            forward_backward(slice(0, 32))
        assert max(seen) == (0 if not ascends else 2 if form == "window" else 1)
        opt.step()
        opt.zero_grad()
        for n, p in model.named_parameters():
            assert (p.detach() - expected[n]).abs().max() <= 1e-13
    opt.step(lambda: loss_backward(hand(x).sum()))  # plain, so that the next one ascends
    forward_backward(slice(0, 32))
    assert functional.waiting == 1
    opt.step()  # without having ascended
    assert not functional.waiting


def test_functional_sam_needs_a_first_pass() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, momentum=0.9, variant=MomentumSAM())
    functional = FunctionalSAM(opt)

    def closure() -> Tensor:
        loss = functional(model(X), lambda z: nn.functional.cross_entropy(z, Y))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="no first pass"):
        opt.step(closure)


LEARN, B1, B2, EPS = 0.05, 0.9, 0.99, 1e-3


@pytest.mark.parametrize("watched", [False, True])
def test_preconditioned_functional_sam_over_adam(watched: bool) -> None:
    """e = RHO d / |d| along d = g / (sqrt(v / (1 - B2^t)) + EPS), v from the steps before; then J(w + e)^T dL/dz(w)."""
    model = network().double()
    names = [n for n, _ in model.named_parameters()]
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    m, v = ({n: torch.zeros_like(w[n]) for n in names} for _ in range(2))
    opt = SAM(model.parameters(), torch.optim.Adam, rho=RHO, lr=LEARN, betas=(B1, B2), eps=EPS, variant=PreconditionedSAM())
    functional = FunctionalSAM(opt)
    if watched:
        functional.watch(model[-1])
    hand = copy.deepcopy(model)
    for t in range(4):
        x, y = X.double().roll(t, 0) * (1 + t), Y
        hand.load_state_dict(w)
        if t:
            scales = {n: (v[n] / (1 - B2**t)).sqrt() + EPS for n in names}
            g = equations(hand, x, y, 1.0, scales)
        else:  # there is no second moment yet, and nothing moves
            loss = nn.functional.cross_entropy(hand(x), y)
            g = dict(zip(names, torch.autograd.grad(loss, list(hand.parameters())), strict=True))
        for n in names:
            m[n], v[n] = B1 * m[n] + (1 - B1) * g[n], B2 * v[n] + (1 - B2) * g[n].square()
            step = m[n] / (1 - B1 ** (t + 1)) / ((v[n] / (1 - B2 ** (t + 1))).sqrt() + EPS)
            w[n] = w[n] - LEARN * step

        def forward_backward(rows: slice, x: Tensor = x, y: Tensor = y) -> Tensor:
            def loss_of(z: Tensor) -> Tensor:
                return nn.functional.cross_entropy(z, y[rows]) * len(y[rows]) / len(y)

            loss = loss_of(model(x[rows])) if watched else functional(model(x[rows]), loss_of)
            loss.backward()
            return loss

        SAMWindow(opt, forward_backward).run([slice(0, 8), slice(8, 32)])
        assert not functional.waiting
        opt.step()
        for n, p in model.named_parameters():
            assert (p.detach() - w[n]).abs().max() <= 1e-12, (t, n)


def test_a_watched_head_leaves_other_terms_at_the_neighbour() -> None:
    """L = l(z) + a(w): the gradient is J(w + e)^T dl/dz(w) + da/dw(w + e)."""
    model, x = network().double(), X.double()
    w = [p.detach().clone() for p in model.parameters()]

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(x) * 0.5, Y) + 0.3 * model[0].weight.pow(4).sum()

    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    handle = FunctionalSAM(opt).watch(model[-1])
    loss(model).backward()
    g = [p.grad.clone() for p in model.parameters()]
    with opt.perturbed():
        loss(model).backward()
    norm = torch.stack([part.square().sum() for part in g]).sum().sqrt()
    hand = copy.deepcopy(model)
    z = hand(x).detach().requires_grad_()
    (dz,) = torch.autograd.grad(nn.functional.cross_entropy(z * 0.5, Y), z)
    with torch.no_grad():
        for p, start, part in zip(hand.parameters(), w, g, strict=True):
            p.copy_(start + RHO * part / norm)
            p.grad = None
    ((hand(x) * dz).sum() + 0.3 * hand[0].weight.pow(4).sum()).backward()
    for p, q in zip(model.parameters(), hand.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-13
    handle.remove()
    opt.step(lambda: loss_backward(loss(model)))  # SAM again


def loss_backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def test_a_watched_head_finds_passes_that_differ() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    FunctionalSAM(opt).watch(model[-1])
    nn.functional.cross_entropy(model(X), Y).backward()
    model(X)  # with a graph, and in no loss
    with torch.no_grad():
        model(X)  # not seen
    opt.first_step(zero_grad=True)
    nn.functional.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="did not use these logits"):
        nn.functional.cross_entropy(model(X), Y).backward()
    opt.abandon()
    assert not opt.is_perturbed


@pytest.mark.parametrize("base", [torch.optim.Adagrad, torch.optim.Adafactor])
def test_preconditioned_sam_asks_for_second_moments(base: type) -> None:
    model = network()
    opt = SAM(model.parameters(), base, rho=RHO, lr=1e-2, variant=PreconditionedSAM())

    def step() -> None:
        opt.step(lambda: loss_backward(nn.functional.cross_entropy(model(X), Y)))

    if base is torch.optim.Adafactor:  # Adagrad has a state from its beginning
        step()
    with pytest.raises(RuntimeError, match="found none of max_exp_avg_sq, exp_avg_sq, square_avg"):
        step()
    assert not opt.is_perturbed


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("variant", [PreconditionedSAM, MomentumSAM])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_without_a_state_is_refused(base: type, variant: type, external: bool) -> None:
    """SGD without momentum never makes one. A parameter or a group that had no gradient so far has none either, and may."""
    model = network()
    unused, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    inner = base([{"params": [*model.parameters(), unused]}, {"params": [late]}], lr=1e-2)
    opt = (ExternalSAM if external else partial(SAM, None))(inner, rho=RHO, variant=variant())

    def step(factor: float = 1.0, *further: Tensor) -> None:
        def one_pass() -> Tensor:
            return loss_backward(sum(further, nn.functional.cross_entropy(model(X), Y) * factor))

        if external:
            opt.passes(one_pass)
            opt.finish_step(scaled=False)
            inner.step()
        else:
            opt.step(one_pass)

    if variant is PreconditionedSAM:
        step(torch.inf)  # skipped, so that nobody has made a state
        assert opt.skipped_steps == 1
    step()
    if base is torch.optim.Adam:
        step()
        step(1.0, late.sum())
        assert opt.report.as_dict()["stored_norm"] == pytest.approx(RHO, rel=1e-3)
        return
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"found none of .*state \(empty\)"):
        step()
    assert not opt.is_perturbed
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_preconditioned_sam_sees_an_overflow_where_nothing_is_perturbed() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.RMSprop, rho=RHO, lr=1e-2, variant=PreconditionedSAM())
    for number, bad in enumerate((True, False, True)):
        nn.functional.cross_entropy(model(X), Y).backward()
        if bad:
            model[0].weight.grad[0, 0] = torch.inf
        before = [p.detach().clone() for p in model.parameters()]
        opt.first_step(zero_grad=True)
        nn.functional.cross_entropy(model(X), Y).backward()
        opt.second_step(zero_grad=True)
        assert opt.skipped_steps == (1, 1, 2)[number]
        assert bad == all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
