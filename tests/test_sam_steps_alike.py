"""Steps that find everything as the step before left it take their gradients in one call; all others build buckets anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.sam import buckets, hooks

from .conftest import CPU_BACKENDS, same_bits

pytestmark = pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="about the CPU core")

SHAPES = ((5,), (3, 4), (0,), (), (300,), (2, 3, 4))
Model = list[nn.Parameter]


def model() -> Model:
    """Parameters with gradients, but for the last, which has none, and the one before, which is frozen too."""
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(shape)) for shape in (*SHAPES, (4,), (3,))]
    for p in params[:-2]:
        p.grad = torch.randn(p.shape)
    params[-2].requires_grad_(False)
    return params


def copy(t: Tensor) -> Tensor:
    """The same values, laid out the same."""
    return torch._neg_view(copy(torch._neg_view(t))) if t.is_neg() else t.clone(memory_format=torch.preserve_format)


def copies(params: Model) -> Model:
    made = []
    for p in params:
        made.append(nn.Parameter(copy(p.detach()), requires_grad=p.requires_grad))
        made[-1].grad = None if p.grad is None else copy(p.grad)
    return made


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each ascent that does not go the short way."""
    calls: list[int] = []
    plain = buckets.BucketCache._take

    def spied(self: buckets.BucketCache, *args: object) -> None:
        calls.append(1)
        plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(buckets.BucketCache, "_take", spied)
    return calls


def new_gradients(params: Model) -> None:
    for p in params:
        if p.grad is not None:
            p.grad = torch.randn(p.shape)


def gradient(params: Model, value: Tensor | None, at: int = 1) -> None:
    params[at].grad = value


def moved(p: nn.Parameter, change: Callable[[Tensor], Tensor] = torch.clone) -> None:
    p.data = change(p.data)


SHORT: dict[str, Callable[[Model], None]] = {
    "nothing": lambda params: None,
    "gradients written": lambda params: [p.grad.mul_(-2) for p in params if p.grad is not None],  # type: ignore[func-returns-value]
    "new gradients": new_gradients,
    "weights written": lambda params: [p.data.mul_(-2) for p in params],  # type: ignore[func-returns-value]
    "a weight moved": lambda params: moved(params[1]),
    "all weights moved": lambda params: [moved(p) for p in params],  # type: ignore[func-returns-value]
}
LONG: dict[str, Callable[[Model], None]] = {
    "a gradient dropped": lambda params: gradient(params, None),
    "the first gradient dropped": lambda params: gradient(params, None, 0),
    "a gradient where none was": lambda params: gradient(params, torch.ones(3), -1),
    "another, and one dropped": lambda params: [gradient(params, torch.ones(3), -1), gradient(params, None, 0)],  # type: ignore[func-returns-value]
    "a gradient of other strides": lambda params: gradient(params, torch.randn(4, 3).t()),
    "a gradient with its sign turned": lambda params: gradient(params, torch._neg_view(torch.randn(3, 4))),
    "a weight of other strides": lambda params: moved(params[1], lambda w: w.t().contiguous().t()),
    "a weight with its sign turned": lambda params: moved(params[1], lambda w: torch._neg_view(-w)),
    "a weight of another dtype": lambda params: [  # type: ignore[func-returns-value]
        setattr(params[1], "grad", None), moved(params[1], Tensor.bfloat16), gradient(params, torch.randn(3, 4).bfloat16())
    ],
}  # fmt: skip


def ascent(params: Model, opt: SAM) -> list[Tensor]:
    """w + e of all parameters, and w again."""
    opt.first_step()
    there = [p.detach().clone() for p in params]
    opt.restore_()
    return there + [p.detach().clone() for p in params]


def groups(params: Model) -> list[dict[str, object]]:
    return [{"params": params[:3]}, {"params": params[3:], "adaptive": True, "rho": 0.3}]


@pytest.mark.parametrize("name", [*SHORT, *LONG])
@pytest.mark.parametrize("options", [{}, {"scope": lambda name, p: p.ndim > 0}], ids=["all", "scope"])
def test_a_step_after_a_change_is_that_of_a_new_optimizer(name: str, options: dict[str, object], built: list[int]) -> None:
    params = model()
    opt = SAM(groups(params), torch.optim.SGD, rho=0.5, lr=0.1, **options)
    ascent(params, opt)
    assert len(built) == 1
    torch.manual_seed(4)
    {**SHORT, **LONG}[name](params)
    theirs = copies(params)
    ours = ascent(params, opt)
    assert len(built) == (1 if name in SHORT else 2)
    expected = ascent(theirs, SAM(groups(theirs), torch.optim.SGD, rho=0.5, lr=0.1, **options))
    assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))
    assert not same_bits(ours[4], ours[4 + len(params)])
    before = len(built)
    ascent(params, opt)
    assert len(built) - before == (1 if "sign" in name or "strides" in name else 0)  # which the core does not walk


EXCHANGES: dict[str, Callable[[list[Tensor]], None]] = {
    "another parameter": lambda part: part.__setitem__(0, copies(part[:1])[0]),  # type: ignore[arg-type]
    "another frozen one": lambda part: part.__setitem__(-1, nn.Parameter(torch.ones(3), requires_grad=False)),
    "another order": lambda part: part.reverse(),
    "one more": lambda part: part.append(copies(part[:1])[0]),  # type: ignore[arg-type]
    "one less": lambda part: part.pop(0).zero_(),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("name", EXCHANGES)
@torch.no_grad()
def test_parameters_exchanged_between_steps_are_seen(name: str, built: list[int]) -> None:
    params = model()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
    ascent(params, opt)
    EXCHANGES[name](opt.param_groups[0]["params"])
    now = list(opt.param_groups[0]["params"])
    theirs = copies(now)
    ours = ascent(now, opt)
    assert len(built) == 2
    assert all(
        same_bits(a, b) for a, b in zip(ours, ascent(theirs, SAM(theirs, torch.optim.SGD, rho=0.5, lr=0.1)), strict=True)
    )


@pytest.mark.parametrize("spoil", ["shared", "sparse"])
def test_what_is_refused_is_refused_after_many_steps_as_well(spoil: str) -> None:
    params = model()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
    for _ in range(2):
        ascent(params, opt)
    if spoil == "shared":
        params[0].data = params[4].data[:5]
    else:
        gradient(params, torch.ones(3, 4).to_sparse())
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="same memory" if spoil == "shared" else "layout"):
        opt.first_step()
    assert not opt.is_perturbed
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("refused", [False, True])
def test_an_ascent_without_any_gradient_is_refused_after_others(refused: bool) -> None:
    params = model()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
    ascent(params, opt)
    if refused:
        gradient(params, torch.ones(3, 4).to_sparse())
        with pytest.raises(ValueError, match="layout"):
            opt.first_step()
    for p in params:
        p.grad = None
    for _ in range(2):
        with pytest.raises(RuntimeError, match="has a gradient"):
            opt.first_step()
    params[1].grad = torch.ones(3, 4)
    theirs = copies(params)
    expected = ascent(theirs, SAM(theirs, torch.optim.SGD, rho=0.5, lr=0.1))
    assert all(same_bits(a, b) for a, b in zip(ascent(params, opt), expected, strict=True))


def test_weights_with_their_sign_turned_between_the_passes_get_w_back() -> None:
    params = model()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
    ascent(params, opt)
    before = [p.detach().clone() for p in params]
    opt.first_step()
    params[1].data = torch._neg_view(-params[1].data)
    assert params[1].is_neg()
    opt.restore_()
    assert all(same_bits(p.detach().resolve_neg(), b) for p, b in zip(params, before, strict=True))


def test_gradients_are_free_between_the_passes(built: list[int]) -> None:
    params = model()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
    for _ in range(2):
        new_gradients(params)
        opt.first_step()
        held = [b.bucket.grads for b in opt._ascent_buckets._buckets]
        assert held == [[]] * len(held)
        opt.restore_()
    assert len(built) == 1


@pytest.mark.parametrize("at", [-2, -1, 0])
def test_a_parameter_that_comes_to_require_a_gradient_carries_an_overflow(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody can ask whether the norm is finite, as on a GPU."""
    monkeypatch.setattr(hooks, "is_on_cpu", lambda norm: False)
    params = model()
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
    for _ in range(2):
        opt.first_step()
        opt.restore_()
        opt._close_step()
    params[at].requires_grad_()
    assert params[0].grad is not None
    params[0].grad[1] = math.inf
    opt.first_step(zero_grad=True)
    (params[at] * 2).sum().backward()
    assert params[at].grad is not None
    assert params[at].grad.isnan().sum() == 1
    before = [p.detach().clone() for p in params]
    opt.restore_()
    opt.second_step() if opt.is_perturbed else opt.step()
    assert opt.skipped_steps == 1
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))


def test_without_a_core_every_step_goes_the_long_way(monkeypatch: pytest.MonkeyPatch, built: list[int]) -> None:
    monkeypatch.setattr("fastpost.backends.native.failure", lambda: "there is none")
    with fastpost.use_backend("reference"):
        params = model()
        opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
        first, second = ascent(params, opt), ascent(params, opt)
    assert len(built) == 2
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
