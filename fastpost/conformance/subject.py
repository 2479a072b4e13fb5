"""The small model that every property trains, and what is seen of one step on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure

Weights = dict[str, Tensor]
Backward = Callable[[], Tensor]


class Network(nn.Module):
    """Two layers, and two branches that a pass may leave out (an expert that no token reached)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.outer = nn.Linear(16, 3)
        self.left = nn.Linear(6, 3)
        self.right = nn.Linear(6, 3)

    def forward(self, x: Tensor, left: bool = True, right: bool = True) -> Tensor:
        y: Tensor = self.outer(torch.tanh(self.inner(x)))
        if left:
            y = y + self.left(x)
        if right:
            y = y + self.right(x)
        return y


def network(dtype: torch.dtype = torch.float32, seed: int = 7) -> Network:
    """The same weights every time, none of them zero; global random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        model = Network()
    randomise(model, seed)
    return model.to(dtype)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


def batch(number: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs (8, 6) and targets (8, 3)."""
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)


def loss_of(model: Callable[..., Tensor], data: tuple[Tensor, Tensor], **branches: bool) -> Tensor:
    x, y = data
    loss: Tensor = (model(x, **branches) - y).square().mean()
    return loss


def differentiate(loss: Tensor) -> Tensor:
    """Calls backward; returns the loss without its graph."""
    torch.autograd.backward(loss)
    return loss.detach()


def whole(tensor: Tensor) -> Tensor:
    """A copy; of a DTensor all of it, which every rank has to ask for."""
    tensor = tensor.detach()
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bool(torch.equal(_bits(a), _bits(b)))


def _bits(tensor: Tensor) -> Tensor:
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(width)


def differing(a: Weights, b: Weights) -> str:
    """How many tensors differ in bits, and by how much; empty where none does."""
    found = [float((a[k].double() - b[k].double()).abs().max()) for k in a if not same_bits(a[k], b[k])]
    worst = max(found, key=lambda d: (math.isnan(d), d), default=0.0)
    return f"{len(found)} of {len(a)} tensors, by up to {worst:.2g}" if found else ""


def expect_bits(a: Weights, b: Weights, what: str) -> None:
    if found := differing(a, b):
        raise Failure(f"{what}: {found}")


def expect_close(a: Weights, b: Weights, what: str, tolerance: float = 1e-6) -> None:
    off = [float((a[k].double() - b[k].double()).abs().max()) for k in a]
    worst = max(off, key=lambda d: (math.isnan(d), d))
    if not worst <= tolerance:
        raise Failure(f"{what}: off by {worst:.2g} (allowed {tolerance:.0e})")


@dataclass
class Seen:
    """One step: weights before it, in its second pass and after it, and the gradients of both passes (None where absent).

    A pass that calls `Subject.backward` has the gradients of its weights and its batch, whatever lies in `.grad`.
    """

    before: Weights
    perturbed: Weights = field(default_factory=dict)
    after: Weights = field(default_factory=dict)
    first_grads: dict[str, Tensor | None] = field(default_factory=dict)
    second_grads: dict[str, Tensor | None] = field(default_factory=dict)


class Subject:
    """A model with the optimizer under test on it.

    Args:
        adapter: builds and drives the optimizer.
        base: SGD, or AdamW where moments have to show.
        rho, lr: of the optimizer.
        model: another model than `network()`.
        params: what the optimizer gets, if not all parameters.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: type[torch.optim.Optimizer] = torch.optim.SGD,
        *,
        rho: float = 0.3,
        lr: float = 0.1,
        model: nn.Module | None = None,
        params: Any = None,
    ) -> None:
        self.adapter, self.base, self.rho = adapter, base, rho
        self.kwargs = options(base, lr)
        self.model = network() if model is None else model
        self.opt = adapter.make(self.params() if params is None else params, base, rho=rho, **self.kwargs)
        self.number = 0  # of the batch
        self._computed: dict[str, Tensor | None] | None = None  # what the last `backward` had to make

    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def weights(self) -> Weights:
        return {name: whole(p) for name, p in self.model.named_parameters()}

    def grads(self) -> dict[str, Tensor | None]:
        return {name: None if p.grad is None else whole(p.grad) for name, p in self.model.named_parameters()}

    def backward(self, **branches: bool) -> Tensor:
        self._computed = self.gradients_at(self.weights(), **branches)
        loss = loss_of(self.model, batch(self.number, self.params()[0].dtype), **branches)
        return differentiate(loss)

    def gradients_at(self, weights: Weights, **branches: bool) -> dict[str, Tensor | None]:
        """Of this step's batch, by copies of the weights: no `.grad` is read, and nothing accumulates."""
        copies = {n: weights[n].clone().requires_grad_(p.requires_grad) for n, p in self.model.named_parameters()}
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}

        def model(x: Tensor, **branches: bool) -> Tensor:
            y: Tensor = functional_call(self.model, {**copies, **buffers}, (x,), branches)
            return y

        with torch.random.fork_rng(devices=[]):  # the pass itself draws the same numbers
            loss = loss_of(model, batch(self.number, self.params()[0].dtype), **branches)
        thawed = {name: w for name, w in copies.items() if w.requires_grad}
        found = torch.autograd.grad(loss, list(thawed.values()), allow_unused=True)
        return dict.fromkeys(copies) | dict(zip(thawed, found, strict=True))

    def step(
        self, first: Backward | None = None, second: Backward | None = None, drive: Callable[..., None] | None = None
    ) -> Seen:
        """Makes one step on the next batch and notes what the passes saw."""
        seen = Seen(self.weights())

        def noted(backward: Backward) -> tuple[Tensor, dict[str, Tensor | None]]:
            self._computed = None
            loss = backward()
            return loss, self.grads() if self._computed is None else self._computed

        def one() -> Tensor:
            loss, seen.first_grads = noted(first or self.backward)
            return loss

        def two() -> Tensor:
            seen.perturbed = self.weights()
            loss, seen.second_grads = noted(second or self.backward)
            return loss

        (drive or self.adapter.step)(self.opt, one, two)
        seen.after = self.weights()
        self.number += 1
        return seen


def options(base: type[torch.optim.Optimizer], lr: float) -> dict[str, Any]:
    """Keywords of the base optimizers used; nothing is left to defaults that libraries set differently."""
    return {"lr": lr, "weight_decay": 0.0} if base is torch.optim.AdamW else {"lr": lr}


class Twin:
    """The same model with the base optimizer alone, stepping with gradients it is given."""

    def __init__(self, subject: Subject, params: Any = None) -> None:
        self.model = network()
        self.model.load_state_dict(subject.model.state_dict())
        self.named = dict(self.model.named_parameters())
        given = list(self.named.values()) if params is None else params(self.model)
        self.opt = subject.adapter.make_base(given, subject.base, **subject.kwargs)

    def step(self, grads: dict[str, Tensor | None]) -> Weights:
        for name, p in self.named.items():
            g = grads[name]
            p.grad = None if g is None else g.clone()
        self.opt.step()
        return {name: p.detach().clone() for name, p in self.named.items()}
