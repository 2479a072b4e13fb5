"""A step of SAM beside the libraries that a user may have in its place: what it costs beyond two passes and the optimizer.

The libraries are driven as their documentation says, by the adapters of `fastpost.conformance.peers`. A library that is not
installed, or does not import, is a row that says so: `pip install pytorch_optimizer heavyball torchzero`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpost import SAM
from fastpost.bench.params import Parameters, gpt2_shapes
from fastpost.bench.registry import Case, Contender, Goal, Work, case, imported, peer
from fastpost.conformance import peers
from fastpost.conformance.adapter import Adapter

Passes = Callable[[nn.Module], Callable[[], Tensor]]
OURS, PLAIN, PUBLISHED = "fastpost.SAM", "AdamW, two passes", "published loop"
LIBRARIES = {"pytorch_optimizer": peers.pytorch_optimizer, "heavyball": peers.heavyball, "torchzero": peers.torchzero}
RHO, LR = 0.05, 1e-6


def step(adapter: Adapter, model: nn.Module, passes: Passes) -> Work:
    """A whole step of an adapter's optimizer, both passes included."""
    opt = adapter.make(list(model.parameters()), torch.optim.AdamW, rho=RHO, lr=LR)
    once = passes(model)
    return lambda: adapter.step(opt, once, once)


def two_passes(model: nn.Module, passes: Passes) -> Work:
    base, once = torch.optim.AdamW(model.parameters(), lr=LR), passes(model)

    def run() -> None:
        base.zero_grad()
        once()
        base.zero_grad()
        once()
        base.step()
        base.zero_grad()

    return run


def contenders(model: Callable[[], nn.Module], passes: Passes, calls: int = 1) -> list[Contender]:
    """The same step by everybody, each on a model of its own."""
    found = [
        peer(PLAIN, two_passes(model(), passes), calls=calls),
        Contender(OURS, step(Adapter(SAM), model(), passes), calls=calls),
        peer(PUBLISHED, step(peers.published, model(), passes), calls=calls),
    ]
    for library, adapter in LIBRARIES.items():
        if why := imported(library):
            found.append(Contender.absent(adapter.name, library, why))
        else:
            found.append(peer(adapter.name, step(adapter, model(), passes), by=library, calls=calls))
    return found


def goals() -> list[Goal]:
    """Each beside the plain step, then fastpost beside each."""
    others = [PUBLISHED, *(adapter.name for adapter in LIBRARIES.values())]
    return [Goal(name, PLAIN, {}) for name in (OURS, *others)] + [Goal(OURS, name, {}) for name in others]


@case
def peers_gpt2() -> Case:
    """GPT-2's tensors. A pass is the writing of gradients alone, so that no model hides what the step costs."""
    shapes = gpt2_shapes()

    def passes(model: nn.Module) -> Callable[[], Tensor]:
        kept = [torch.full(shape, 1e-3) for shape in shapes]

        def once() -> Tensor:
            for p, g in zip(model.parameters(), kept, strict=True):
                p.grad = g.clone()
            return torch.zeros(())

        return once

    return Case(
        "a step of SAM less the model, beside libraries", "GPT-2, 148 tensors, 124M", "float32",
        lambda: contenders(lambda: Parameters(shapes), passes), goals(),
    )  # fmt: skip


@case
def peers_small() -> Case:
    """Three layers of 64 and a batch of 32 on one thread: what a step costs the host."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 64), torch.randint(0, 64, (32,))

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def passes(model: nn.Module) -> Callable[[], Tensor]:
        def once() -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return once

    return Case(
        "a whole step of SAM, beside libraries", "three layers of 64, batch 32", "float32",
        lambda: contenders(network, passes, calls=20), goals(), threads=1,
    )  # fmt: skip
