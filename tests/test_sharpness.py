"""fastpost.sharpness against float64 losses, gradients and Hessians of a small network, and what it leaves behind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

import fastpost
from fastpost import SAM, sharpness
from fastpost.distributed import drop_waiting_gradients, no_sync
from fastpost.sam.measurement.study import NotFinite
from fastpost.sam.measurement.weights import Weights
from fastpost.sam.perturbation import Perturbation

from . import distributed as d
from .conftest import bits
from .small import all_bits, unchanged

Batch = tuple[Tensor, Tensor]


def data(number: int, rows: int = 12, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(rows, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (rows,), generator=generator)


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


class Exact:
    """L, g and H of a batch as functions of one float64 vector w."""

    def __init__(self, model: nn.Module) -> None:
        self.model = small()
        self.w = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        self.shapes = {n: p.shape for n, p in model.named_parameters()}

    def loss(self, w: Tensor, batch: Batch) -> Tensor:
        parts = w.split([s.numel() for s in self.shapes.values()])
        named = {n: part.view(s) for (n, s), part in zip(self.shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(self.model, named, (batch[0].double(),)), batch[1])

    def gradient(self, batch: Batch) -> Tensor:
        w = self.w.clone().requires_grad_()
        return torch.autograd.grad(self.loss(w, batch), w)[0]

    def hessian(self, batch: Batch) -> Tensor:
        return torch.autograd.functional.hessian(lambda w: self.loss(w, batch), self.w)

    def e(self, g: Tensor, rho: float, eta: float | None) -> Tensor:
        t = torch.ones_like(g) if eta is None else self.w.abs() + eta
        return rho * t**2 * g / (t * g).norm()

    def rise(self, batch: Batch, e: Tensor) -> float:
        return float(self.loss(self.w + e, batch) - self.loss(self.w, batch))

    def curvature(self, batch: Batch, e: Tensor, rho: float) -> float:
        return float(e @ self.hessian(batch) @ e / rho**2)


def check(estimate: Any, values: list[float], tolerance: float = 1e-10) -> None:
    assert estimate.mean == pytest.approx(np.mean(values), rel=tolerance, abs=1e-12)
    assert estimate.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=tolerance, abs=1e-11)


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
def test_rises_and_curvatures_are_the_equations(eta: float | None) -> None:
    model = small()
    exact, batches = Exact(model), [data(i) for i in range(4)]
    options = {} if eta is None else {"adaptive": True, "eta": eta}
    found = sharpness(model, loss, iter(batches), rho=0.3, **options)
    gradients = [exact.gradient(b) for b in batches]
    mean = sum(gradients) / 4
    own, whole = [exact.e(g, 0.3, eta) for g in gradients], exact.e(mean, 0.3, eta)
    t = torch.ones_like(mean) if eta is None else exact.w.abs() + eta
    check(found.loss, [float(exact.loss(exact.w, b)) for b in batches])
    check(found.own.rise, [exact.rise(b, e) for b, e in zip(batches, own, strict=True)])
    check(found.own.gradient_norm, [float((t * g).norm()) for g in gradients])
    check(found.full.rise, [exact.rise(b, whole) for b in batches])
    assert found.full.gradient_norm.mean == pytest.approx(float((t * mean).norm()), rel=1e-10)
    assert math.isnan(found.full.gradient_norm.error)  # one gradient of all batches scatters over none
    assert math.isnan(found.full.seen.error)
    assert "±" not in str(found.full.gradient_norm)
    assert found.own.seen.mean == pytest.approx(1, abs=1e-12)
    close = sharpness(model, loss, batches, rho=1e-3, **options)
    check(close.own.curvature, [exact.curvature(b, e, 0.3) for b, e in zip(batches, own, strict=True)], 1e-4)
    check(close.full.curvature, [exact.curvature(b, whole, 0.3) for b in batches], 1e-4)


def test_micro_batches_ascend_on_their_own_and_errors_are_over_batches() -> None:
    model = small()
    exact, batches = Exact(model), [data(i) for i in range(3)]
    nested = [{"x": x, "rest": [y, "a word", torch.tensor(1.0)]} for x, y in batches]
    found = sharpness(model, lambda m, b: loss(m, (b["x"], b["rest"][0])), nested, 0.3, micro_batch_size=5)
    rises = []
    for x, y in batches:
        parts = [(x[i : i + 5], y[i : i + 5]) for i in (0, 5, 10)]
        rises.append(sum(len(p[0]) / 12 * exact.rise(p, exact.e(exact.gradient(p), 0.3, None)) for p in parts))
    e = exact.e(sum(map(exact.gradient, batches)), 0.3, None)
    check(found.own.rise, rises)
    check(found.full.rise, [exact.rise(b, e) for b in batches])  # however a batch is cut
    assert (found.batches, found.micro_batches) == (3, 9)


@pytest.mark.parametrize("eta", [None, 0.01])
def test_random_directions_rise_by_the_trace_of_the_hessian(eta: float | None) -> None:
    """To second order by rho^2 tr(T H T) / (2 n), T the diagonal of ASAM's t, or 1; over the sphere, so without a slope."""
    torch.manual_seed(3)
    model, rho = small(), 0.01
    exact, batches = Exact(model), [data(i, 60) for i in range(6)]
    options = {} if eta is None else {"adaptive": True, "eta": eta}
    found = sharpness(model, loss, batches, rho, directions=20, curvature=False, full_batch=False, **options)
    t = torch.ones_like(exact.w) if eta is None else exact.w.abs() + eta
    traces = [float((t.square() * exact.hessian(b).diagonal()).sum()) for b in batches]
    expected = rho**2 * np.mean(traces) / (2 * len(exact.w))
    assert found.own.curvature is found.full is None
    assert found.random.rise.error < 0.25 * expected
    assert abs(found.random.rise.mean - expected) < 4 * found.random.rise.error
    again = sharpness(model, loss, batches, rho, directions=20, curvature=False, full_batch=False, **options)
    other = sharpness(model, loss, batches, rho, directions=20, curvature=False, full_batch=False, seed=1, **options)
    assert again == found
    assert other.random.rise != found.random.rise


def test_no_random_direction_is_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, ...]] = []
    random = Weights.random

    def noted(self: Weights, like: Any, seed: int) -> Any:
        found = random(self, like, seed)
        drawn.append(tuple(next(iter(found[0].values())).flatten().tolist()))
        return found

    monkeypatch.setattr(Weights, "random", noted)
    model = nn.Linear(4, 1, bias=False)
    few = {"curvature": False, "full_batch": False, "micro_batch_size": 1}
    sharpness(model, lambda m, b: m(b).square().mean(), [torch.randn(2, 4) for _ in range(2)], directions=130, **few)
    assert len(drawn) == len(set(drawn)) == 4 * 130
    drawn.clear()
    sharpness(model, lambda m, b: m(b).square().mean(), [torch.randn(1020, 4), torch.randn(12, 4)], **few)
    assert len(drawn) == len(set(drawn)) == 1032


@pytest.mark.parametrize("rho", [1e-150, 1e150])
def test_the_ends_of_rho_give_numbers_or_nan(rho: float) -> None:
    found = sharpness(small(), loss, [data(0)], rho)
    assert found.rho == rho


def test_in_float32_gradients_keep_the_curvature_where_losses_lose_it() -> None:
    model, rho = small(torch.float32), 1e-3
    exact, batch = Exact(model), data(0, dtype=torch.float32)
    truth = exact.curvature(batch, exact.e(exact.gradient(batch), rho, None), rho)
    found = sharpness(model, loss, [batch], rho, directions=0).own.curvature
    assert found.mean == pytest.approx(truth, rel=2e-3)
    assert math.isnan(found.error)
    e = exact.e(exact.gradient(batch), rho, None).float()

    def at(w: Tensor) -> float:
        with torch.no_grad():
            nn.utils.vector_to_parameters(w, model.parameters())
            return float(loss(model, batch))

    w = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    of_losses = (at(w + e) - 2 * at(w) + at(w - e)) / rho**2
    assert abs(of_losses - truth) > 10 * abs(found.mean - truth)


@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.01}])
def test_to_second_order_a_rise_is_slope_and_curvature(options: dict[str, Any]) -> None:
    own = sharpness(small(), loss, [data(i) for i in range(2)], 1e-3, directions=0, full_batch=False, **options).own
    assert own.rise.mean - 1e-3 * own.gradient_norm.mean == pytest.approx(1e-6 * own.curvature.mean / 2, rel=1e-2)


def test_asams_numbers_are_those_of_the_function() -> None:
    """1703.04933: layers around a ReLU may be scaled against each other; ASAM's e with eta = 0 scales along."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    batches = [data(i) for i in range(3)]

    def measured(**options: Any) -> dict[str, float]:
        return sharpness(model, loss, batches, 0.01, **options).as_dict()

    before, plain = measured(adaptive=True), measured()
    with torch.no_grad():
        for p in model[0].parameters():
            p.mul_(8)
        model[2].weight.div_(8)
    after, other = measured(adaptive=True), measured()
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    assert other["own_curvature"] > 4 * plain["own_curvature"]


class Everything(nn.Module):
    """Dropout, running statistics, a frozen weight, an unused weight, modes of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.norm, self.drop, self.down = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.up.bias.requires_grad_(False)
        self.train()
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.norm(self.up(x))))


def everything(model: nn.Module) -> list[Any]:
    state = [bits(v).clone() for v in model.state_dict().values() if v.is_floating_point()]
    grads = [None if p.grad is None else (id(p.grad), bits(p.grad).clone()) for p in model.parameters()]
    random = torch.get_rng_state(), np.random.get_state()[1].tolist()
    return [state, grads, [m.training for m in model.modules()], model.norm.num_batches_tracked.item(), *random]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize("fails_at", [None, 0, 1, 2, 3, 4, 5, 6])
def test_everything_stays_as_it_was(eval_mode: bool, fails_at: int | None) -> None:
    model, calls, grad_modes = Everything(), [], []
    if not eval_mode:
        model.norm.train()
    batches = [data(i, dtype=torch.float32) for i in range(2)]
    loss(model, batches[0]).backward()
    before = everything(model)

    def failing(m: nn.Module, batch: Batch) -> Tensor:
        torch.rand(3)
        np.random.rand()
        calls.append(m.training)
        if len(calls) - 1 == fails_at:
            raise KeyboardInterrupt
        return loss(m, batch)

    for p in filter(lambda p: p.requires_grad, model.parameters()):
        p.register_post_accumulate_grad_hook(grad_modes.append)
    if fails_at is None:
        with torch.no_grad():  # which the measurement does not mind
            sharpness(model, failing, batches, eval_mode=eval_mode)
    else:
        with pytest.raises(KeyboardInterrupt):
            sharpness(model, failing, batches, eval_mode=eval_mode)
    assert same(everything(model), before)
    assert set(calls) == {not eval_mode}
    assert not grad_modes  # optimizers that step in the backward pass are not set off


@pytest.mark.parametrize("fails_at", [0, 3, 7])
def test_an_interrupt_on_the_way_back_to_w(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, undo = Everything(), [], Perturbation.undo
    before = everything(model)

    def interrupted(perturbation: Perturbation) -> None:
        calls.append(perturbation.active)
        if len(calls) - 1 == fails_at:
            raise KeyboardInterrupt
        undo(perturbation)

    monkeypatch.setattr(Perturbation, "undo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sharpness(model, loss, [data(i, dtype=torch.float32) for i in range(2)])
    assert calls[fails_at]
    assert same(everything(model), before)


def test_passes_of_a_batch_share_their_dropout_masks() -> None:
    model, batch = Everything(), data(0, dtype=torch.float32)
    found = sharpness(model, loss, [batch] * 4, rho=1e-3, eval_mode=False, directions=0)
    for around in (found.own, found.full):
        assert around.rise.mean < 1e-2
    assert found.own.rise.mean == pytest.approx(1e-3 * found.own.gradient_norm.mean, rel=0.05)
    assert found.loss.error > 0.01  # while batches draw masks of their own


def test_16_bit_weights_say_what_rounding_left_of_e() -> None:
    model = small(torch.bfloat16)
    batch = data(0, dtype=torch.bfloat16)
    found = sharpness(model, loss, [batch], rho=3e-4, directions=0, full_batch=False)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=3e-4, lr=0.1)
    before = all_bits(model)
    loss(model, batch).backward()
    opt.first_step()
    with pytest.warns(UserWarning, match="hardly survives rounding"):
        gain = opt.report.as_dict()["seen_gain"]
    opt.restore_()
    assert gain < 0.7
    assert found.own.seen.mean == pytest.approx(gain, abs=0.1)  # the mean of w + e and w - e
    assert unchanged(model, before)
    with torch.autocast("cpu", torch.bfloat16):
        seen = sharpness(small(torch.float32), loss, [data(0, dtype=torch.float32)], rho=3e-4).own.seen.mean
    assert abs(seen - 1) > 1e-3  # the forward pass sees weights in bfloat16


def test_a_scope_is_all_that_moves() -> None:
    model = small()
    exact, batch = Exact(model), data(0)
    found = sharpness(model, loss, [batch], 0.3, scope="2.*")
    g = exact.gradient(batch)
    g[: 5 * 6 + 6] = 0
    assert found.own.rise.mean == pytest.approx(exact.rise(batch, exact.e(g, 0.3, None)), rel=1e-10)


def test_results_in_words_and_numbers() -> None:
    found = sharpness(small(), loss, [data(i) for i in range(3)])
    numbers = found.as_dict()
    assert numbers["own_rise"] == found.own.rise.mean
    assert numbers["full_curvature_se"] == found.full.curvature.error
    assert all(isinstance(v, float) for v in numbers.values())
    assert "random_curvature" not in numbers
    assert "full_gradient_norm" in numbers
    assert "full_gradient_norm_se" not in numbers  # NaN, which is no JSON
    lines = str(found).splitlines()
    assert lines[0] == "sharpness: rho 0.05, 3 batches, ± standard error over batches"
    assert [line.split("  ")[0] for line in lines[2:]] == ["along", "its own gradient", "gradient of all", "random"]
    assert str(found.own.rise) in lines[3]
    less = sharpness(small(), loss, [data(0)], full_batch=False, directions=0, curvature=False, adaptive=True)
    assert len(str(less).splitlines()) == 4
    assert not {name for name in less.as_dict() if name.startswith(("full", "random")) or "curvature" in name}
    with pytest.raises(AttributeError):
        found.rho = 1.0


def test_a_flat_loss_has_no_rise_and_no_curvature() -> None:
    w = nn.Linear(2, 2)
    found = sharpness(w, lambda m, b: 0 * m(b).sum(), [torch.ones(3, 2)])
    assert found.own.rise.mean == found.random.rise.mean == found.own.gradient_norm.mean == 0
    assert math.isnan(found.own.curvature.mean)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rho": 0.0}, ValueError, "must be > 0"),
        ({"rho": -1.0}, ValueError, "rho must be"),
        ({"rho": 1e-200}, ValueError, "rho must be from 1e-150 to 1e[+]150, whose squares are numbers, not 1e-200"),
        ({"rho": 1e200}, ValueError, "rho must be from 1e-150"),
        ({"eta": math.nan}, ValueError, "eta must be"),
        ({"micro_batch_size": 0}, ValueError, "micro_batch_size"),
        ({"directions": -1}, ValueError, "directions"),
        ({"batches": []}, ValueError, "no batch"),
        ({"batches": [data(0)[0]], "micro_batch_size": 2, "loss": lambda m, b: m(b[0])}, TypeError, "scalar"),
        ({"batches": [(torch.ones(3), torch.ones(2))], "micro_batch_size": 2}, ValueError, r"\[2, 3\] rows"),
        ({"batches": ["text"], "micro_batch_size": 2}, ValueError, "no rows"),
        ({"loss": lambda m, b: float(loss(m, b).detach())}, TypeError, "scalar tensor, not float"),
        ({"loss": lambda m, b: loss(m, b).detach()}, TypeError, "does not depend"),
        (
            {"loss": lambda m, b: torch.ones((), requires_grad=True) * 2},
            TypeError,
            "does not depend on the weights in scope",
        ),
        ({"loss": lambda m, b: loss(m, b) * math.inf}, ValueError, "batch 0 has loss inf"),
        ({"scope": ["*weight", "nothing.*"]}, ValueError, "no parameter is in scope 'nothing"),
        ({"eta": 0.1}, ValueError, "say adaptive=True"),
        ({"directions": 1.5}, TypeError, "directions must be a whole number"),
        ({"directions": "2"}, TypeError, "directions must be a whole number"),
        ({"micro_batch_size": 2.0}, TypeError, "micro_batch_size must be a whole number"),
        ({"compute_dtype": torch.float8_e5m2}, TypeError, "sharpness: compute_dtype must be .*, not torch.float8_e5m2"),
        ({"seed": "x"}, TypeError, "seed must be a whole number, not 'x'"),
        ({"model": loss, "loss": small()}, TypeError, "in this order, not function and Sequential"),
        ({"scope": "nothing.*"}, ValueError, "no parameter is in scope"),
        ({"model": small().requires_grad_(False)}, ValueError, "no weights that require"),
        ({"loss": lambda m, b: None}, TypeError, "not NoneType; where this is a stage without a loss, .* load a checkpoint"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type, words: str) -> None:
    given = {"model": small(), "loss": loss, "batches": [data(0)], **change}
    model = given["model"] if isinstance(given["model"], nn.Module) else given["loss"]
    before = all_bits(model)
    with pytest.raises(error, match=words):
        sharpness(**given)
    assert unchanged(model, before)


# -- in several processes ---------------------------------------------------------------------------------------------------


def of_net(model: nn.Module, batch: Batch) -> Tensor:
    return d.loss_of(model, *batch)


def lone(batches: list[Batch]) -> fastpost.Sharpness:
    return sharpness(d.Net(), of_net, batches, 0.2, directions=0)


def replicas() -> None:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(d.Net())
    found = sharpness(model, of_net, [d.batch(2 * rank), d.batch(2 * rank + 1)], 0.2, directions=0)
    close_to(found, lone([d.batch(i) for i in range(4)]))
    d.loss_of(model, *d.batch(0)).backward()  # which DDP goes on with as before
    grads = [p.grad.clone() for p in model.parameters()]
    dist.all_reduce(grads[0])
    assert torch.allclose(grads[0] / 2, model.module.blocks[0].norm.weight.grad)


def one_cannot() -> None:
    model = nn.parallel.DistributedDataParallel(d.Net())
    batches = [d.batch(0)] if dist.get_rank() == 0 else []
    with pytest.raises((ValueError, RuntimeError), match="no batch") as raised:
        sharpness(model, of_net, batches, 0.2)
    assert ("rank 1 cannot measure" in str(raised.value)) == (dist.get_rank() == 0)

    def infinite(model: nn.Module, batch: Batch) -> Tensor:
        return of_net(model, batch) * (math.inf if dist.get_rank() == 0 else 1)

    with pytest.raises(NotFinite, match="batch 0 has loss inf"):
        sharpness(model, infinite, [d.batch(0)], 0.2)
    with pytest.raises((ValueError, RuntimeError), match="no batch") as raised:  # of which no callback makes a warning
        sharpness(model, infinite, batches, 0.2)
    assert not isinstance(raised.value, NotFinite)


def shards() -> None:
    mesh = d.mesh_of(2)
    model = d.Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    d.loss_of(model, *d.mine(mesh, 7)).backward()
    before = [(p.grad, d.part(p), d.part(p.grad)) for p in model.parameters()]
    found = sharpness(model, of_net, [d.mine(mesh, i) for i in range(3)], 0.2, directions=1)
    close_to(found, lone([d.batch(i) for i in range(3)]))
    assert 0 < found.random.rise.mean < found.own.rise.mean
    with no_sync(model):
        d.loss_of(model, *d.mine(mesh, 7)).backward()
    with pytest.raises(ValueError, match=r"drop_waiting_gradients\(model\.parameters\(\)\) drops them"):
        sharpness(model, of_net, [d.mine(mesh, 0)], 0.2)
    drop_waiting_gradients(model.parameters())
    sharpness(model, of_net, [d.mine(mesh, 0)], 0.2, directions=0, curvature=False)
    for p, (grad, weight, values) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert torch.equal(d.part(p), weight)
        assert torch.equal(d.part(p.grad), values)


def close_to(found: fastpost.Sharpness, expected: fastpost.Sharpness) -> None:
    numbers = found.as_dict()
    for name, value in expected.as_dict().items():
        assert numbers[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_ranks_agree_with_one_process() -> None:
    outcome = d.run(2, {"replicas": replicas, "one_cannot": one_cannot, "shards": shards})
    for case in ("replicas", "one_cannot", "shards"):
        outcome.of(case)
