"""SAM over an optimizer that maximises is SAM on the negated loss, bit for bit: the worst neighbour lies downhill."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import GSAM, TRAM, FriendlySAM, FunctionalSAM, LookSAM, MomentumSAM, SAMWindow, StableSAM

from .conftest import DTYPES, same_bits
from .small import X, Y, all_bits, network, unchanged


def loss_of(model: nn.Module, sign: float) -> Tensor:
    loss = nn.functional.cross_entropy(model(X.to(next(model.parameters()).dtype)).float(), Y) * sign
    loss.backward()
    return loss


OPTIONS: dict[str, dict[str, Any]] = {
    "SAM": {},
    "ASAM": {"adaptive": True, "eta": 0.01},
    "stable": {"variant": StableSAM},
    "gsam": {"variant": lambda: GSAM(0.4)},
    "look": {"variant": LookSAM, "interval": 2},
    "friendly": {"variant": lambda: FriendlySAM(0.8, 0.6)},
    "momentum": {"variant": MomentumSAM, "momentum": 0.9},
    "interval": {"interval": 3},
    "functional": {"perturb": "functional"},
    "adaptive functional": {"perturb": "functional", "adaptive": True},
    "AdamW": {"base": torch.optim.AdamW, "weight_decay": 0.1},
    "momentum of AdamW": {"base": torch.optim.AdamW, "variant": MomentumSAM},
    "fused_restore": {"base": torch.optim.AdamW, "fused_restore": True},
}


def build(model: nn.Module, maximize: bool, options: dict[str, Any]) -> SAM:
    options = dict(options)
    base = options.pop("base", torch.optim.SGD)
    if "variant" in options:
        options["variant"] = options["variant"]()
    if "perturb" in options:
        options["model"] = model
    return SAM(model.named_parameters(), base, rho=0.3, lr=0.05, maximize=maximize, **options)


def pair(model: nn.Module, options: dict[str, Any]) -> list[tuple[nn.Module, SAM, float]]:
    """The model under SAM that maximises L, and under SAM that minimises -L."""
    models = model, copy.deepcopy(model)
    return [(m, build(m, maximize, options), -1.0 + 2 * maximize) for m, maximize in zip(models, (True, False), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_maximising_is_minimising_the_negated_loss(backend: str, name: str, dtype: torch.dtype) -> None:
    agree(name, dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_in_float64(name: str) -> None:
    agree(name, torch.float64)


def agree(name: str, dtype: torch.dtype) -> None:
    (up, one, plus), (down, two, minus) = pair(network().to(dtype), OPTIONS[name])
    start = all_bits(up)
    for _ in range(4):
        one.step(lambda: loss_of(up, plus))
        two.step(lambda: loss_of(down, minus))
        assert unchanged(up, all_bits(down))
    for p, q in zip(up.parameters(), down.parameters(), strict=True):
        for key, value in one.state[p].items():
            if isinstance(value, Tensor):  # what a variant keeps of gradients is of L here and of -L there
                other = two.state[q][key]
                assert torch.equal(value, -other) if key.startswith("sam_") else same_bits(value, other)
    assert not unchanged(up, start)


@pytest.mark.parametrize("form", ["stochastic", "masters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(backend: str, form: str, dtype: torch.dtype) -> None:
    results = []
    for maximize in (True, False):
        model = network().to(dtype)
        masters = [p.detach().float() for p in model.parameters()]
        options = {"rounding": "stochastic"} if form == "stochastic" else {"master_params": masters}
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, maximize=maximize, **options)
        for _ in range(3):
            opt.step(lambda model=model, maximize=maximize: loss_of(model, -1.0 + 2 * maximize))  # type: ignore[misc]
        results.append((model, masters))
    (up, mine), (down, theirs) = results
    assert unchanged(up, all_bits(down))
    assert form != "masters" or all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_worst_neighbour_lies_downhill_to_1e_12() -> None:
    """From the equations: e = -rho g / |g|, and the step goes up from w along the gradient at w + e."""
    model = network().double()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.05, maximize=True)
    w = [p.detach().clone() for p in model.parameters()]

    def gradient(weights: list[Tensor]) -> tuple[Tensor, ...]:
        live = [p.detach().requires_grad_() for p in weights]
        named = dict(zip(dict(model.named_parameters()), live, strict=True))
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, named, (X.double(),)), Y)
        return torch.autograd.grad(loss, live)

    g = gradient(w)
    norm = torch.sqrt(sum((x * x).sum() for x in g))
    h = gradient([p - 0.3 * x / norm for p, x in zip(w, g, strict=True)])
    before = nn.functional.cross_entropy(model(X.double()), Y).item()
    nn.functional.cross_entropy(model(X.double()), Y).backward()
    opt.first_step(zero_grad=True)
    assert nn.functional.cross_entropy(model(X.double()), Y).item() < before
    nn.functional.cross_entropy(model(X.double()), Y).backward()
    opt.second_step()
    for p, start, x in zip(model.parameters(), w, h, strict=True):
        assert (p.detach() - (start + 0.05 * x)).abs().max() <= 1e-12


def test_groups_go_their_own_ways_under_one_norm(backend: str) -> None:
    model = network()
    first, second = list(model[0].parameters()), list(model[3].parameters())
    opt = SAM([{"params": first, "maximize": True}, {"params": second, "rho": 0.1}], torch.optim.SGD, rho=0.3, lr=0.1)
    loss_of(model, 1.0)
    g = [p.grad.double().clone() for p in (*first, *second)]
    w = [p.detach().double() for p in (*first, *second)]
    norm = torch.sqrt(sum((x * x).sum() for x in g))
    opt.first_step()
    for p, start, x, rho in zip((*first, *second), w, g, (-0.3, -0.3, 0.1, 0.1), strict=True):
        assert (p.detach().double() - (start + rho * x / norm)).abs().max() <= 1e-7


def test_it_is_read_in_every_step(backend: str) -> None:
    """As where it is set in a group, or comes with a state."""
    up, down = network(), network()
    one = SAM(up.parameters(), torch.optim.SGD, rho=0.3, lr=0.05)
    two = SAM(down.parameters(), torch.optim.SGD, rho=0.3, lr=0.05)
    one.step(lambda: loss_of(up, 1.0))
    two.step(lambda: loss_of(down, 1.0))
    one.param_groups[0]["maximize"] = True
    one.step(lambda: loss_of(up, 1.0))
    two.step(lambda: loss_of(down, -1.0))
    assert unchanged(up, all_bits(down))
    three = SAM(down.parameters(), torch.optim.SGD, rho=0.3, lr=0.05)
    three.load_state_dict(one.state_dict())
    one.step(lambda: loss_of(up, 1.0))
    three.step(lambda: loss_of(down, 1.0))
    assert unchanged(up, all_bits(down))


def test_windows_and_m_sam() -> None:
    for options in ({}, {"per_micro_batch": True}, {"ascent_fraction": 0.5}):
        (up, one, plus), (down, two, minus) = pair(network(), {})
        for model, opt, sign in ((up, one, plus), (down, two, minus)):

            def forward_backward(rows: slice, model: nn.Module = model, sign: float = sign) -> None:
                (nn.functional.cross_entropy(model(X[rows]), Y[rows]) * sign / 2).backward()

            for _ in range(2):
                SAMWindow(opt, forward_backward, **options).run([slice(0, 16), slice(16, 32)])  # type: ignore[arg-type]
                opt.step()
        assert unchanged(up, all_bits(down))


def test_tram_and_functional_sam() -> None:
    (up, one, plus), (down, two, minus) = pair(network(), {"variant": TRAM})
    (left, three, _), (right, four, _) = pair(network(), {})
    for model, opt, sign in ((up, one, plus), (down, two, minus)):
        for _ in range(2):
            opt.zero_grad()
            opt.variant.observe(torch.tensor(0.7))
            loss_of(model, sign)
            opt.first_step(zero_grad=True)
            loss_of(model, sign)
            opt.second_step()
    for model, opt, sign in ((left, three, plus), (right, four, minus)):
        functional = FunctionalSAM(opt)

        def closure(model: nn.Module = model, functional: FunctionalSAM = functional, sign: float = sign) -> Tensor:
            loss = functional(model(X), lambda z: nn.functional.cross_entropy(z, Y) * sign)
            loss.backward()
            return loss

        opt.step(closure)
    assert unchanged(up, all_bits(down))
    assert unchanged(left, all_bits(right))
