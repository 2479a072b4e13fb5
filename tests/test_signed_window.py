"""Mixed-sign windows: against loss times factor on raw bits, float64 sums, DDP and FSDP2 with and without reductions."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastpost.gap import SignedWindow

from . import distributed as processes
from .test_gap import VOCABULARY, bits, same, tiny_model
from .test_surgery import CASES as SURGERY

PLAN = [(1, 1.0), (1, 1.0), (-1, 1.0), (1, 1.0), (-1, 1.0)]
WEIGHTED = [(1, 0.7), (-1, 0.3), (-1, 0.3), (1, 2.5), (-1, 1.0)]


def texts(dtype_seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(dtype_seed)
    return [torch.randint(1, VOCABULARY, (2, 10), generator=g) for _ in PLAN]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def by_losses(model: nn.Module, plan: list[tuple[int, float]]) -> None:
    for (sign, weight), ids in zip(plan, texts(), strict=True):
        (loss_of(model, ids) * (sign * weight)).backward()


def by_window(model: nn.Module, plan: list[tuple[int, float]]) -> None:
    with SignedWindow(model) as window:
        for (sign, weight), ids in zip(plan, texts(), strict=True):
            window.next(sign, weight)
            loss_of(model, ids).backward()


def as_bits(tensors: list[Tensor]) -> list[Tensor]:
    """Raw bits, but for the sign of zeros: unused rows of an embedding are +0 downhill and uphill, -0 once negated."""
    return [(t.detach() + 0.0).view(torch.int32) for t in tensors]


def test_a_parameter_given_twice_counts_once() -> None:
    p = nn.Parameter(torch.ones(4))
    with SignedWindow([p, p]) as window:
        window.next(1)
        (p * 2).sum().backward()
        window.next(-1, 0.5)
        (p * 3).sum().backward()
    assert p.grad.tolist() == [0.5] * 4


def test_signs_are_those_of_the_losses_bit_for_bit() -> None:
    model = tiny_model().eval()
    other = copy.deepcopy(model)
    by_losses(other, PLAN)
    by_window(model, PLAN)
    assert same(as_bits(gradients(model)), as_bits(gradients(other)))


def test_weights_against_float64() -> None:
    model = tiny_model().eval()
    truth = copy.deepcopy(model).double()
    by_losses(truth, WEIGHTED)
    by_window(model, WEIGHTED)
    for g, exact in zip(gradients(model), gradients(truth), strict=True):
        assert float((g - exact).abs().max()) <= 3e-6 * float(exact.abs().max()) + 1e-8  # tied embeddings sum many rows


def test_gradients_from_before_the_window_count_as_they_are() -> None:
    model = tiny_model().eval()
    other = copy.deepcopy(model)
    first = torch.full((1, 8), 5)
    for m in (model, other):
        loss_of(m, first).backward()
    by_losses(other, PLAN)
    by_window(model, PLAN)
    assert same(as_bits(gradients(model)), as_bits(gradients(other)))


def test_a_loop_that_raises_leaves_the_sum_so_far() -> None:
    model = tiny_model().eval()
    other = copy.deepcopy(model)
    (loss_of(other, texts()[0]) * -1).backward()

    def loop() -> None:
        with SignedWindow(model) as window:
            window.next(-1)
            loss_of(model, texts()[0]).backward()
            window.next(1)
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert same(as_bits(gradients(model)), as_bits(gradients(other)))


def test_parameters_without_gradient_and_frozen_ones() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model["b"].weight.requires_grad_(False)
    with SignedWindow(model.parameters()) as window:
        window.next(-1, 0.5)
        model["a"](torch.ones(1, 3)).sum().backward()
    assert torch.equal(model["a"].weight.grad, torch.full((2, 3), -0.5))
    assert model["b"].bias.grad is None


def test_sixteen_bits_and_a_loss_scaler() -> None:
    model = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    with SignedWindow(model) as window:
        for sign, value in ((1, 2.0), (-1, 3.0)):
            window.next(sign)
            scaler.scale(model(torch.full((1, 4), value)).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(model.weight, before + 1.0)
    half = nn.Linear(4, 2).to(torch.bfloat16)
    with SignedWindow(half) as window:
        window.next(-1, 0.25)
        half(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(half.weight.grad, torch.full((2, 4), -0.25, dtype=torch.bfloat16))


def test_bad_input_writes_nothing() -> None:
    model = tiny_model()
    loss_of(model, texts()[0]).backward()
    before, weights = as_bits([g.clone() for g in gradients(model)]), bits(model)
    window = SignedWindow(model)
    with pytest.raises(RuntimeError, match="inside `with`"):
        window.next(1)
    with window:
        for sign in (0, 2, True, 0.5):
            with pytest.raises(ValueError, match="sign must be 1 or -1"):
                window.next(sign)
        for weight in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="weight must be finite and > 0"):
                window.next(1, weight)
        with pytest.raises(RuntimeError, match="already open"):
            window.__enter__()
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        SignedWindow(model.requires_grad_(False))
    assert same(as_bits(gradients(model)), before)
    assert same(bits(model), weights)


# -- several processes: every rank its own micro-batches, the truth one float64 model with all of them ----------------------


def expected(plan: list[tuple[int, float]]) -> list[Tensor]:
    model = processes.Net()
    for number, (sign, weight) in enumerate(plan):
        (processes.loss_of(model, *processes.batch(number)) * (sign * weight)).backward()
    return [p.grad for p in model.parameters()]


def signed(model: nn.Module, plan: list[tuple[int, float]], quiet) -> None:
    """quiet(last): the context in which a micro-batch runs."""
    mesh = processes.mesh_of(2)
    with SignedWindow(model) as window:
        for number, (sign, weight) in enumerate(plan):
            with quiet(number == len(plan) - 1):
                window.next(sign, weight)
                processes.loss_of(model, *processes.mine(mesh, number)).backward()


def check(model: nn.Module, plan: list[tuple[int, float]]) -> None:
    for p, exact in zip(model.parameters(), expected(plan), strict=True):
        torch.testing.assert_close(processes.whole(p.grad), exact, rtol=1e-11, atol=1e-13)


def ddp(no_sync: bool, views: bool) -> None:
    for plan in (PLAN, WEIGHTED):
        model = DistributedDataParallel(processes.Net(), gradient_as_bucket_view=views)

        def quiet(last: bool, model: DistributedDataParallel = model):
            return contextlib.nullcontext() if last or not no_sync else model.no_sync()

        signed(model, plan, quiet)
        check(model, plan)


def ddp_synced() -> None:
    ddp(False, False)


def ddp_no_sync() -> None:
    ddp(True, False)


def ddp_views() -> None:
    ddp(True, True)


def fsdp2(no_sync: bool, reshard: bool = True, **options) -> None:
    for plan in (PLAN, WEIGHTED):
        model = processes.Net()
        for block in model.children():
            if isinstance(block, processes.Block):
                fully_shard(block, **options)
        fully_shard(model, **options)
        model.set_reshard_after_backward(reshard)

        @contextlib.contextmanager
        def quiet(last: bool, model: nn.Module = model):
            model.set_requires_gradient_sync(last or not no_sync)
            yield

        signed(model, plan, quiet)
        processes.reshard(model)
        check(model, plan)


def fsdp2_synced() -> None:
    fsdp2(False)


def fsdp2_waiting() -> None:
    fsdp2(True)


def fsdp2_waiting_unsharded() -> None:
    fsdp2(True, reshard=False)


def fsdp2_waiting_widened() -> None:
    """Gradients that wait in another dtype than they are computed in."""
    fsdp2(True, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64))


OF_DDP = (ddp_synced, ddp_no_sync, ddp_views)
OF_FSDP2 = (fsdp2_synced, fsdp2_waiting, fsdp2_waiting_unsharded, fsdp2_waiting_widened)
CASES = {f.__name__: f for f in (*OF_DDP, *OF_FSDP2)} | SURGERY


@pytest.fixture(scope="module")
def outcome() -> processes.Outcome:
    return processes.run(2, CASES)


@pytest.mark.parametrize("name", CASES)
def test_across_processes(outcome: processes.Outcome, name: str) -> None:
    outcome.of(name)
