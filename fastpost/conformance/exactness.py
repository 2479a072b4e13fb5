"""What a step leaves behind: the same bits in the same memory."""

from __future__ import annotations

import torch

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure, conformance
from fastpost.conformance.subject import Subject, differing, expect_bits, network


def _restores(adapter: Adapter, dtype: torch.dtype) -> None:
    subject = Subject(adapter, rho=1.0, lr=0.0, model=network(dtype))
    start = subject.weights()
    for _ in range(20):
        seen = subject.step()
        if not differing(seen.perturbed, seen.before):
            raise Failure("the second pass ran at unperturbed weights")
    expect_bits(subject.weights(), start, "20 steps at a learning rate of 0 change the weights")


@conformance("restore")
def restore(adapter: Adapter) -> None:
    """Float32 weights come back bit for bit, 20 times over."""
    _restores(adapter, torch.float32)


@conformance("restore bfloat16")
def restore_bfloat16(adapter: Adapter) -> None:
    """Bfloat16 weights come back bit for bit, 20 times over."""
    _restores(adapter, torch.bfloat16)


@conformance("storage")
def storage(adapter: Adapter) -> None:
    """Parameters keep their address and their object, in the second pass and after the step."""
    subject = Subject(adapter)
    objects = [id(p) for p in subject.params()]
    start = [p.data_ptr() for p in subject.params()]
    moved: list[str] = []

    def look(when: str) -> None:
        if [p.data_ptr() for p in subject.params()] != start:
            moved.append(when)

    def second() -> torch.Tensor:
        look("in the second pass")
        return subject.backward()

    for _ in range(3):
        subject.step(second=second)
        look("after the step")
    if moved:
        raise Failure(f"parameters lie at other addresses {moved[0]}")
    if [id(p) for p in subject.params()] != objects:
        raise Failure("the model's parameters are other objects")
