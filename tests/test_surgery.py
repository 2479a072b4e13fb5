"""Gradient surgery: against float64 written from the equations, in one process and over shards."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastpost
from fastpost.distributed import drop_waiting_gradients, no_sync
from fastpost.gap import SignedWindow, SurgeryWindow

from . import distributed as processes

METHODS = ("pcgrad", "gru", "sago")
Grads = list[Tensor]


def dot(a: Grads, b: Grads) -> Tensor:
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))


def off(a: Grads, b: Grads) -> Grads:
    """a without its part along b, where they conflict (2001.06782, algorithm 1)."""
    if dot(a, b) >= 0:
        return [x.double() for x in a]
    return [x.double() - dot(a, b) / dot(b, b) * y.double() for x, y in zip(a, b, strict=True)]


def expected(method: str, f: Grads, r: Grads) -> Grads:
    if method == "pcgrad":
        return [x + y for x, y in zip(off(f, r), off(r, f), strict=True)]
    if method == "gru":  # 2503.09117: the nearest to f of those with <., r> >= 0
        return off(f, r)
    same = [x.sign() * y.sign() >= 0 for x, y in zip(f, r, strict=True)]  # 2604.14808: f I(same) + r I(not same)
    return [torch.where(s, x, y).double() for s, x, y in zip(same, f, r, strict=True)]


class Sides(nn.Module):
    """Parameters whose gradients are told: loss(side) = <g_side, w>."""

    def __init__(self, f: Grads, r: Grads) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros_like(g) for g in f)
        self.told = {"forget": f, "retain": r}

    def forward(self, side: str, share: float = 1.0) -> Tensor:
        return sum((w * g).sum() * share for w, g in zip(self.weights, self.told[side], strict=True))


def drawn(seed: int, towards: float, dtype: torch.dtype = torch.float64) -> tuple[Grads, Grads]:
    """Two gradients, the second leaning to the first by `towards`."""
    g = torch.Generator().manual_seed(seed)
    f = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((5, 3), (7,), (2, 2, 2))]
    r = [0.7 * torch.randn(x.shape, generator=g, dtype=torch.float64) + towards * x for x in f]
    return [x.to(dtype) for x in f], [x.to(dtype) for x in r]


def operated(method: str, model: Sides, *sides: tuple[str, float]) -> Grads:
    with SurgeryWindow(model, method) as window:
        for side, share in sides:
            window.next(side)
            model(side, share).backward()
    return [w.grad for w in model.weights]


PLANS = (
    (("forget", 1.0), ("retain", 1.0)),
    (("retain", 1.0), ("forget", 1.0)),
    (("forget", 0.25), ("retain", 0.5), ("forget", 0.75), ("retain", 0.5)),
)


@pytest.mark.parametrize("plan", range(len(PLANS)))
@pytest.mark.parametrize("towards", [-0.4, 0.4])
@pytest.mark.parametrize("method", METHODS)
def test_equations(method: str, towards: float, plan: int) -> None:
    f, r = drawn(1, towards)
    assert (dot(f, r) < 0) == (towards < 0)
    made = operated(method, Sides(f, r), *PLANS[plan])
    for g, exact in zip(made, expected(method, f, r), strict=True):
        torch.testing.assert_close(g, exact, rtol=1e-13, atol=1e-14)
    if method == "gru" and towards < 0:
        assert abs(dot(made, r)) <= 1e-13 * dot(r, r)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"sago"}))  # which looks at signs
def test_a_conflict_between_nearly_orthogonal_sides(method: str) -> None:
    """<f, r> is 1e-21 of |f|^2: squares of f, r and f - r would not tell it."""
    f, r = ([torch.tensor(x, dtype=torch.float64)] for x in ([1e9, 1.0], [0.0, -1e-3]))
    (made,), (exact,) = operated(method, Sides(f, r), *PLANS[0]), expected(method, f, r)
    torch.testing.assert_close(made, exact, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1e-39, 1.0), (1.0, 1e-39), (1e-20, 1e20), (1e20, 1e-20)])
@pytest.mark.parametrize("method", sorted({*METHODS} - {"sago"}))
def test_sides_whose_sizes_no_float32_divides(method: str, sizes: tuple[float, float]) -> None:
    """A text that is forgotten has gradients of 1e-39: factors of the projections leave float32, the result does not."""
    f, r = ([size * torch.tensor(x)] for size, x in zip(sizes, ([-1.0, 0.5, 0.25], [1.0, 1.5, -0.5]), strict=True))
    (made,), (exact,) = operated(method, Sides(f, r), *PLANS[0]), expected(method, f, r)
    largest = max(float(g.double().norm()) for g in (exact, *(x for x in (*f, *r) if method != "gru")))
    assert float((made.double() - exact).norm()) <= 2e-6 * largest + 3e-45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_narrow_gradients_are_rounded_once(method: str, dtype: torch.dtype) -> None:
    f, r = drawn(2, -0.4, dtype)
    for g, exact in zip(operated(method, Sides(f, r), *PLANS[0]), expected(method, f, r), strict=True):
        assert g.dtype == dtype
        # One rounding of the result; in float32 one of each term as well.
        scale = max(float(x.double().abs().max()) for x in (*f, *r))
        bound = torch.finfo(dtype).eps * (exact.abs() if dtype != torch.float32 else exact.abs() + 2 * scale)
        assert bool(((g.double() - exact).abs() <= bound / 2 + 2**-22 * scale).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_one_side_leaves_alone(method: str) -> None:
    f, r = drawn(3, -0.4)
    for side, other in (("forget", r), ("retain", f)):
        model = Sides(f, r)
        with SurgeryWindow([*model.weights, *model.weights], method) as window:
            for at in ("forget", "retain"):
                window.next(at)
                terms = zip(model.weights, model.told[at], strict=True)
                sum((w * g).sum() for i, (w, g) in enumerate(terms) if i or at == side).backward()
        absent = [torch.zeros_like(other[0]), *other[1:]]
        exact = expected(method, *((f, absent) if side == "forget" else (absent, r)))
        for w, x in zip(model.weights, exact, strict=True):
            torch.testing.assert_close(w.grad, x, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_what_overflowed_shows_and_a_zero_side_has_no_direction(method: str) -> None:
    f, r = drawn(4, -0.4)
    for bad in (torch.inf, -torch.inf, torch.nan):
        for side in (f, r):
            kept = side[1][2].clone()
            side[1][2] = bad
            made = operated(method, Sides(f, r), *PLANS[0])
            assert not all(bool(torch.isfinite(g).all()) for g in made)
            side[1][2] = kept
    nothing = [torch.zeros_like(x) for x in f]
    for pair in ((f, nothing), (nothing, r)):
        made = operated(method, Sides(*pair), *PLANS[0])
        for g, one, two in zip(made, *pair, strict=True):
            exact = one if method != "pcgrad" else one + two
            assert torch.equal(g, exact)


def test_signs_of_tiny_gradients_count() -> None:
    tiny = torch.tensor([1e-30, -1e-30, 0.0])
    (made,) = operated("sago", Sides([tiny], [-2 * tiny]), *PLANS[0])
    assert torch.equal(made, -2 * tiny)


def test_flattened_models_share_memory() -> None:
    f, r = drawn(5, -0.4)
    model = Sides(f, r)
    flat = fastpost.flatten_parameters(model)
    made = operated("pcgrad", model, *PLANS[2])
    assert flat.intact
    for g, exact in zip(made, expected("pcgrad", f, r), strict=True):
        torch.testing.assert_close(g, exact, rtol=1e-13, atol=1e-14)


def test_bad_input() -> None:
    model = Sides(*drawn(6, -0.4))
    with pytest.raises(ValueError, match="one of pcgrad, gru, sago"):
        SurgeryWindow(model, "mean")
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        SurgeryWindow([], "gru")
    for wrong in ("m", 3, torch.ones(2), model.named_parameters()):
        for window_of in (lambda m: SurgeryWindow(m, "gru"), SignedWindow):
            with pytest.raises(TypeError, match=f"must be a torch.nn.Module or its parameters, not {type(wrong).__name__}"):
                window_of(wrong)
    window = SurgeryWindow(model, "gru")
    with pytest.raises(RuntimeError, match="inside `with`"):
        window.next("forget")
    with window:
        with pytest.raises(ValueError, match="side must be 'forget' or 'retain'"):
            window.next("keep")
        with pytest.raises(RuntimeError, match="already open"):
            window.__enter__()
        for side in ("forget", "retain"):
            window.next(side)
            model(side).backward()
    with pytest.raises(RuntimeError, match="gradients already"):
        window.__enter__()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient of side 'retain'"):
        operated("gru", model, ("forget", 1.0))
    assert all(w.grad is None for w in model.weights)
    with pytest.raises(RuntimeError, match="no gradient of side 'forget'"), window:
        window.next("retain")  # and no backward pass

    def interrupted() -> None:
        with window:
            window.next("forget")
            model("forget").backward()
            raise KeyError

    with pytest.raises(KeyError):  # a loop that raises leaves no half of a step
        interrupted()
    assert all(w.grad is None for w in model.weights)
    table = nn.Embedding(4, 2, sparse=True)

    def sparse() -> None:
        with SurgeryWindow(table, "sago") as window:
            for side in ("forget", "retain"):
                window.next(side)
                table(torch.tensor([1])).sum().backward()

    with pytest.raises(TypeError, match="sparse=False"):
        sparse()


# -- two processes, those of test_signed_window.py: every rank its own rows, the truth one float64 model with all of them

STEPS = (("forget", 0), ("retain", 1), ("forget", 2), ("retain", 3))


def signed_loss(model: nn.Module, side: str, x: Tensor, y: Tensor) -> Tensor:
    return processes.loss_of(model, x, y) * (-1 if side == "forget" else 1)


def whole_gradient(side: str, model: nn.Module | None = None) -> Grads:
    model = processes.Net() if model is None else model
    for at, number in STEPS:
        if at == side:
            signed_loss(model, side, *processes.batch(number)).backward()
    return [p.grad for p in model.parameters()]


def check(model: nn.Module, window: SurgeryWindow, whole: type = processes.Net) -> None:
    mesh = processes.mesh_of(2)
    with window:
        for side, number in STEPS:
            window.next(side)
            signed_loss(model, side, *processes.mine(mesh, number)).backward()
    processes.reshard(model)
    f, r = whole_gradient("forget", whole()), whole_gradient("retain", whole())
    assert dot(f, r) < 0
    for p, exact in zip(model.parameters(), expected(window.method, f, r), strict=True):
        torch.testing.assert_close(processes.whole(p.grad), exact, rtol=1e-9, atol=1e-12)


def fsdp2() -> None:
    for method in METHODS:
        model = processes.Net()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        check(model, SurgeryWindow(model, method))


def partly_sharded() -> None:
    for method in METHODS:  # the head's parameters are plain and summed by hand, so that a sum meets parts of both kinds
        model = processes.Net()
        for block in model.blocks:
            fully_shard(block)
        for p in model.head.parameters():
            p.register_hook(_mean)
        check(model, SurgeryWindow(model, method))


def _mean(g: Tensor) -> Tensor:
    torch.distributed.all_reduce(g)
    return g / 2


class Single(nn.Linear):
    """One parameter, whose gradient fills a bucket of DDP's."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(12, 3, bias=False, dtype=torch.float64)


def ddp() -> None:
    for method in METHODS:
        for views in (False, True):
            model = DistributedDataParallel(processes.Net(), gradient_as_bucket_view=views)
            check(model, SurgeryWindow(model, method))
        model = DistributedDataParallel(Single(), gradient_as_bucket_view=True)
        check(model, SurgeryWindow(model, method), Single)


def leave_unreduced(model: nn.Module) -> None:
    with SurgeryWindow(model, "gru") as window:
        window.next("forget")
        with no_sync(model):
            signed_loss(model, "forget", *processes.mine(processes.mesh_of(2), 0)).backward()
        window.next("retain")


def unreduced() -> None:
    """A side whose last micro-batch was left unreduced is refused, at the change and at the end; no_sync before is not."""
    mesh = processes.mesh_of(2)
    for model in (DistributedDataParallel(processes.Net()), fully_shard(processes.Net())):
        with pytest.raises(RuntimeError, match="have not reduced"):
            leave_unreduced(model)
    model = DistributedDataParallel(processes.Net())
    with SurgeryWindow(model, "gru") as window:
        for side in ("forget", "retain"):
            window.next(side)
            for number in (0, 2) if side == "forget" else (1, 3):
                with no_sync(model) if number < 2 else contextlib.nullcontext():
                    signed_loss(model, side, *processes.mine(mesh, number)).backward()
    exact = expected("gru", whole_gradient("forget"), whole_gradient("retain"))
    for p, g in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def after_an_error() -> None:
    """FSDP2 keeps nothing of a window that failed; the remedy for what others left waiting does what it says."""
    model = processes.Net()
    for module in (*model.blocks, model):
        fully_shard(module)
    mesh, window = processes.mesh_of(2), SurgeryWindow(model, "gru")

    def wait(window: Any) -> None:
        with window, no_sync(model):
            signed_loss(model, "forget", *processes.mine(mesh, 3)).backward()
            raise OSError("no more data")

    with pytest.raises(OSError, match="no more data"):
        wait(window)
    check(model, window)
    model.zero_grad()
    with pytest.raises(OSError, match="no more data"):
        wait(contextlib.nullcontext())
    with (
        pytest.raises(RuntimeError, match=r"FSDP2 holds.*fastpost\.distributed\.drop_waiting_gradients\(model\.param"),
        window,
    ):
        pass
    drop_waiting_gradients(model.parameters())
    check(model, window)


CASES = {
    f"surgery_{f.__name__}": f for f in (fsdp2, partly_sharded, ddp, unreduced, after_an_error)
}  # run by test_signed_window.py


def test_the_same_as_a_plain_sum_without_conflict() -> None:
    f, r = drawn(7, 0.6)
    model = Sides(f, r)
    other = copy.deepcopy(model)
    (other("forget") + other("retain")).backward()
    made = operated("pcgrad", model, *PLANS[0])
    assert all(torch.equal(g, w.grad) for g, w in zip(made, other.weights, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ((torch.ones(2), torch.ones(2, dtype=torch.bfloat16)), "bfloat16 on one side and torch.float32 on the other"),
        ((torch.ones(2, dtype=torch.complex64),) * 2, "complex64; signs and dot products need dense .* and real ones"),
    ],
    ids=["two dtypes", "complex"],
)
def test_gradients_without_a_product_are_refused(method: str, grads: tuple[Tensor, Tensor], message: str) -> None:
    """By name, and half of a step is no step."""
    alone, weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones_like(grads[0]))
    weight.grad_dtype = None

    def run() -> None:
        with SurgeryWindow([alone, weight], method) as window:
            for side, g in zip(("forget", "retain"), grads, strict=True):
                window.next(side)
                weight.grad = g.clone()
                if side == "forget":
                    alone.grad = torch.ones(3)

    with pytest.raises(TypeError, match=f"^SurgeryWindow: .*{message}"):
        run()
    assert alone.grad is weight.grad is None


def test_a_weight_with_wider_gradients_that_one_side_leaves_alone() -> None:
    alone, weight = (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    alone.grad_dtype = torch.float32
    with SurgeryWindow([alone, weight], "pcgrad") as window:
        for side in ("forget", "retain"):
            window.next(side)
            weight.grad = torch.ones(2, dtype=torch.bfloat16)
            if side == "forget":
                alone.grad = torch.full((2,), 3.0)
    assert torch.equal(alone.grad, torch.full((2,), 3.0))
