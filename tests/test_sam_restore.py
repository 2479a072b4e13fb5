"""Restore: bitwise, into the same storage, whatever happens between the two passes."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.ops import params as ops

from .conftest import same_bits
from .small import X, all_bits, closure_of, loss_of, network, unchanged


def test_addresses_stay_and_restore_is_bitwise_over_many_rounds(backend: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    before, addresses = all_bits(model), [p.data_ptr() for p in model.parameters()]
    for _ in range(200):
        opt.zero_grad()
        loss_of(model).backward()
        with opt.perturbed():
            assert not unchanged(model, before)
    assert unchanged(model, before)
    assert addresses == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_either_pass_leaves_the_weights_restored(
    backend: str, failing: int, error: type[BaseException]
) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=0.1)
    before = all_bits(model)
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        loss = closure_of(model)()
        if count == failing:
            raise error("stop")
        return loss

    with pytest.raises(error, match="stop"):
        opt.step(closure)
    assert unchanged(model, before)
    assert not opt.is_perturbed
    loss_of(model).backward()
    with pytest.raises(error, match="out"), opt.perturbed():
        raise error("out")
    assert unchanged(model, before)
    opt.step(closure_of(model))  # and training goes on
    assert not unchanged(model, before)


def test_a_parameter_whose_second_gradient_vanishes_is_restored(backend: str) -> None:
    used, unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))
    opt = SAM([used, unused], torch.optim.SGD, rho=0.5, lr=0.0)
    for _ in range(3):
        opt.zero_grad()
        (used.sum() + unused.sum()).backward()
        opt.first_step(zero_grad=True)
        used.sum().backward()  # as when another expert is routed to
        opt.second_step()
        assert same_bits(unused, torch.ones(7))
        assert same_bits(used, torch.ones(5))
        opt.zero_grad()
        unused.sum().backward()  # and a step in which only the other one takes part
        opt.first_step(zero_grad=True)
        (used.sum() + unused.sum()).backward()
        opt.second_step()
        assert same_bits(unused, torch.ones(7))


def test_tied_weights_are_perturbed_once(backend: str) -> None:
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.0)
    before = embedding.weight.detach().clone()
    nn.functional.cross_entropy(model(torch.arange(11)), torch.arange(11)).backward()
    opt.first_step()
    assert (embedding.weight - before).norm().item() == pytest.approx(0.3, rel=1e-5)
    opt.restore_()
    assert same_bits(embedding.weight, before)


def test_weights_that_move_between_the_passes_are_restored_where_they_are_now() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    before = all_bits(model)
    loss_of(model).backward()
    opt.first_step()
    for p in model.parameters():
        p.data = p.data.clone()
    opt.restore_()
    assert unchanged(model, before)


def test_weights_of_another_shape_or_dtype_get_a_new_plan() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    opt.step(closure_of(model))
    model.bfloat16()
    opt.zero_grad()
    before = all_bits(model)
    opt.step(closure_of(model, X.bfloat16()))
    assert unchanged(model, before)


def test_a_backend_failing_midway_leaves_the_weights_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).double())
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before, plain = all_bits(model), ops.run

    def run(op: str, bucket, *args):
        if op == "sam_perturb_" and bucket.dtype == torch.float64:
            raise RuntimeError("device lost")
        return plain(op, bucket, *args)

    monkeypatch.setattr(ops, "run", run)
    with pytest.raises(RuntimeError, match="device lost"):
        opt.first_step()
    assert unchanged(model, before)
    assert not opt.is_perturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("op", ["sam_perturb_", "sam_restore_"])
def test_ctrl_c_during_a_kernel_leaves_the_weights_restored(
    monkeypatch: pytest.MonkeyPatch, op: str, number: signal.Signals
) -> None:
    """Python delivers it when the kernel returns, before the next line can note that the weights were written."""
    previous = signal.signal(number, signal.default_int_handler)  # schedulers' SIGTERM handlers raise, too
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).double())
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before, plain, calls = all_bits(model), ops.run, []

    def run(name: str, bucket, *args):
        result = plain(name, bucket, *args)
        if name == op and not calls:
            calls.append(name)
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(ops, "run", run)
    with pytest.raises(KeyboardInterrupt), opt.perturbed():
        assert op == "sam_restore_"
    assert signal.getsignal(number) is signal.default_int_handler
    signal.signal(number, previous)
    assert calls
    assert unchanged(model, before)
    assert not opt.is_perturbed
