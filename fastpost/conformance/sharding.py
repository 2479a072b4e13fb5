"""Two processes: DistributedDataParallel and FSDP2. Every rank calls these checks; a failure on any rank counts."""

from __future__ import annotations

import contextlib
import gc
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure, conformance
from fastpost.conformance.subject import Subject, Weights, batch, differentiate, expect_bits, expect_close, loss_of, network

PROCESSES = 2
STEPS = 3


@dataclass(frozen=True)
class World:
    """This process among those of one property.

    Attributes:
        rank: from 0.
        size: number of processes.
        folder: empty when the property begins, shared by all ranks.
        seconds: how long a collective may wait.
    """

    rank: int
    size: int
    folder: Path
    seconds: float

    def together(self, work: Callable[..., None], *args: Any) -> None:
        """Calls `work(*args)` in a gloo group of all processes."""
        store = dist.FileStore(  # type: ignore[attr-defined]
            str(self.folder / "store"), self.size
        )
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=self.seconds)
        )
        try:
            work(*args)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            # DDP's reducer must not be the last to hold the group: it would wait, with the interpreter locked, for threads
            # that wait for the interpreter. So models are gone before the group is.
            gc.collect()
            dist.destroy_process_group()

    def part(self, number: int) -> tuple[Tensor, Tensor]:
        """This rank's equal part of a batch."""
        x, y = batch(number)
        rows = len(x) // self.size
        mine = slice(self.rank * rows, (self.rank + 1) * rows)
        return x[mine], y[mine]


class Replica(Subject):
    """A subject whose forward pass goes through DDP or FSDP2, on this rank's part of the batch.

    Attributes:
        runs: what the forward pass calls; `model` is what the parameters and their names come from.
    """

    def __init__(self, adapter: Adapter, world: World, kind: str, **kwargs: Any) -> None:
        model = network()
        self.world = world
        self.runs: nn.Module = model
        if kind == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (world.size,))
            fully_shard(model.inner, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            self.runs = nn.parallel.DistributedDataParallel(model)
        super().__init__(adapter, model=model, **kwargs)

    def backward(self, **branches: bool) -> Tensor:
        loss = loss_of(self.runs, self.world.part(self.number), **branches)
        return differentiate(loss)

    def outputs(self) -> Tensor:
        """What the model computes now, which need not be what its parameters say."""
        with torch.no_grad():
            y: Tensor = self.runs(batch()[0])
        return y.clone()

    def everywhere(self, what: str) -> None:
        """Fails unless all ranks hold the same bits."""
        for name, w in self.weights().items():
            others = [torch.empty_like(w) for _ in range(self.world.size)]
            dist.all_gather(others, w.contiguous())
            for other in others:
                expect_bits({name: other}, {name: others[0]}, what)


def _alone(adapter: Adapter) -> tuple[list[tuple[Weights, Weights]], Tensor]:
    """Perturbed weights and weights after every step of one process on the whole batch, and its last outputs."""
    subject = Subject(adapter)
    steps = [(seen.perturbed, seen.after) for seen in (subject.step() for _ in range(STEPS))]
    with torch.no_grad():
        return steps, subject.model(batch()[0])


def _matches(adapter: Adapter, world: World, kind: str) -> None:
    steps, outputs = _alone(adapter)

    def run() -> None:
        replica = Replica(adapter, world, kind)
        for perturbed, after in steps:
            seen = replica.step()
            expect_close(seen.perturbed, perturbed, "perturbed weights differ from one process on the whole batch")
            expect_close(seen.after, after, "weights differ from one process on the whole batch")
        now = replica.outputs()
        expect_close({"": now}, {"": outputs}, "the model's outputs differ from one process on the whole batch", 1e-5)

    world.together(run)


def _restores(adapter: Adapter, world: World, kind: str) -> None:
    replica = Replica(adapter, world, kind, lr=0.0, rho=1.0)
    start, outputs = replica.weights(), replica.outputs()
    for _ in range(STEPS):
        replica.step()
    expect_bits({"outputs": replica.outputs()}, {"outputs": outputs}, "the model still computes with other weights")
    expect_bits(replica.weights(), start, "steps at a learning rate of 0 change the weights")


def _overflow(adapter: Adapter, world: World, kind: str, which: str) -> None:
    """One rank's gradient overflows in one of the passes; under DDP that pass is not averaged."""
    replica = Replica(adapter, world, kind, base=torch.optim.AdamW)
    replica.step()

    def bad(replica: Replica = replica) -> Tensor:
        runs = replica.runs
        alone = runs.no_sync() if isinstance(runs, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()
        with alone:
            loss = replica.backward()
        if world.rank == 0:
            grad = replica.params()[0].grad
            assert grad is not None
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            local.view(-1)[0] = math.inf
        return loss

    seen = replica.step(bad if which == "first" else None, bad if which == "second" else None)
    expect_bits(seen.after, seen.before, f"an inf on one rank in the {which} pass changes the weights")
    after = replica.step().after
    if any(not torch.isfinite(w).all() for w in after.values()):
        raise Failure("the step after an overflow gives NaN")
    replica.everywhere("ranks hold different weights after an overflow")


def _fresh(world: World, name: str) -> World:
    folder = world.folder / name
    folder.mkdir(exist_ok=True)
    return World(world.rank, world.size, folder, world.seconds)


@conformance("DDP", PROCESSES)
def ddp(adapter: Adapter, world: World) -> None:
    """DDP with both passes averaged makes the step of one process on the whole batch."""
    _matches(adapter, world, "ddp")


@conformance("DDP, no_sync ascent", PROCESSES)
def ddp_no_sync(adapter: Adapter, world: World) -> None:
    """With the first pass in no_sync, ranks perturb on their own, come back, and hold the same bits afterwards."""

    def run() -> None:
        replica = Replica(adapter, world, "ddp")
        runs = replica.runs
        assert isinstance(runs, nn.parallel.DistributedDataParallel)

        def first() -> Tensor:
            with runs.no_sync():
                return replica.backward()

        for _ in range(STEPS):
            seen = replica.step(first=first)
            mine = torch.cat([w.flatten() for w in seen.perturbed.values()])
            others = [torch.empty_like(mine) for _ in range(world.size)]
            dist.all_gather(others, mine)
            if all(torch.equal(other, mine) for other in others):
                raise Failure("all ranks are perturbed alike, though their gradients differ")
            replica.everywhere("ranks hold different weights after the step")

    world.together(run)


@conformance("DDP overflow", PROCESSES)
def ddp_overflow(adapter: Adapter, world: World) -> None:
    """An inf in one rank's own first pass (no_sync) skips the step on all ranks."""
    world.together(_overflow, adapter, world, "ddp", "first")


@conformance("FSDP2", PROCESSES)
def fsdp2(adapter: Adapter, world: World) -> None:
    """Under fully_shard, weights and outputs are those of one process on the whole batch."""
    _matches(adapter, world, "fsdp2")


@conformance("FSDP2 restore", PROCESSES)
def fsdp2_restore(adapter: Adapter, world: World) -> None:
    """Under fully_shard, shards and what the model computes come back bit for bit."""
    world.together(_restores, adapter, world, "fsdp2")


@conformance("FSDP2 overflow", PROCESSES)
def fsdp2_overflow(adapter: Adapter, world: World) -> None:
    """An inf in one rank's shard, in either pass, skips the step on all ranks."""
    for which in ("first", "second"):
        _fresh(world, which).together(_overflow, adapter, world, "fsdp2", which)


@conformance("FSDP2 checkpoint", PROCESSES)
def fsdp2_checkpoint(adapter: Adapter, world: World) -> None:
    """Under fully_shard, training resumed from torch.distributed.checkpoint is the uninterrupted one, bit for bit."""
    import torch.distributed.checkpoint as dcp  # its names are documented, and not in an __all__
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def run() -> None:
        subject = Replica(adapter, world, "fsdp2", base=torch.optim.AdamW)
        for _ in range(STEPS):
            subject.step()
        model, opt = get_state_dict(subject.model, subject.opt)
        dcp.save(  # type: ignore[attr-defined]
            {"model": model, "optimizer": opt}, checkpoint_id=str(world.folder / "checkpoint")
        )
        resumed = Replica(adapter, world, "fsdp2", base=torch.optim.AdamW)
        model, opt = get_state_dict(resumed.model, resumed.opt)
        dcp.load(  # type: ignore[attr-defined]
            {"model": model, "optimizer": opt}, checkpoint_id=str(world.folder / "checkpoint")
        )
        set_state_dict(resumed.model, resumed.opt, model_state_dict=model, optim_state_dict=opt)
        resumed.number = subject.number
        for _ in range(STEPS):
            expect_bits(resumed.step().after, subject.step().after, "resumed training goes elsewhere")

    world.together(run)
