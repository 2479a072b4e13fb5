"""Several gloo processes on this machine, and what every test with them needs: one model, its batches, a lone process."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastpost import SAM

ROWS = 16
Case = Callable[[], Any]
# Imports are most of what a group of processes costs: one server makes them, and forks every process of every group. It
# passes over a module that it cannot import; `_worker` asks for all of them.
PRELOAD = [
    *(
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    ),
    *("accelerate", "peft", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
]


def _worker(rank: int, size: int, folder: str, environment: dict[str, str], cases: dict[str, Case]) -> None:
    absent = [name for name in PRELOAD if name not in sys.modules]
    assert not absent, f"the server of the tests' processes has not imported {', '.join(absent)}"
    # In place of those that the server was first started with. What modules have read there while the server imported them
    # (OMP_NUM_THREADS, HF_HUB_OFFLINE) stays as it was then.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name, case in cases.items():
        torch.manual_seed(1234)
        try:
            results[name] = ("passed", case())
            dist.barrier()
        except BaseException:  # a CheckpointException is no Exception
            # The others may be anywhere in this case; leaving closes the connections that they wait on.
            results[name] = ("failed", traceback.format_exc())
            break
    torch.save(results, f"{folder}/{rank}.pt")
    # All has been said. Where models and process groups die in the interpreter's own order, gloo's threads may outlive them
    # and end the process with an abort.
    os._exit(0)


class Outcome:
    """What every case returned or raised, on every rank; the processes are gone."""

    def __init__(self, ranks: list[dict[str, Any]]) -> None:
        self._ranks = ranks

    def of(self, name: str) -> list[Any]:
        """What the ranks returned; raises where one failed."""
        missing = ("failed", "not reached: an earlier case failed")
        outcomes = [ranks.get(name, missing) for ranks in self._ranks]
        failed = [f"rank {i}:\n{what}" for i, (verdict, what) in enumerate(outcomes) if verdict == "failed"]
        assert not failed, "\n".join(failed)
        return [what for _, what in outcomes]

    def worst(self, name: str) -> float:
        """The largest of the numbers that the ranks returned; NaN where one is."""
        return float(torch.tensor(self.of(name), dtype=torch.float64).max())


def server() -> Any:
    """The multiprocessing context of the server that has imported PRELOAD."""
    mp.set_forkserver_preload(PRELOAD)
    return mp.get_context("forkserver")


def run(size: int, cases: dict[str, Case]) -> Outcome:
    """Runs functions of a module, one after another, in `size` processes that share a gloo group."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        server()
        with tempfile.TemporaryDirectory() as folder:
            given = (size, folder, dict(os.environ), cases)
            mp.start_processes(_worker, args=given, nprocs=size, start_method="forkserver")
            return Outcome([torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)])
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


# -- a model that every strategy can cut ---------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with a norm before and a two-layer network behind."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks and a head of 3 rows, so that with 2 or 4 ranks some shards are shorter than others or empty."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList(Block(12, 20) for _ in range(2))
        self.head = nn.Linear(12, 3)
        self.parallel: DeviceMesh | None = None  # tensor-parallel ranks, each with its part of the sequence in the blocks
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel is not None:
            x = x.chunk(self.parallel.size(), dim=1)[self.parallel.get_local_rank()]
        for block in self.blocks:
            x = block(x)
        if self.parallel is not None:
            parts = DTensor.from_local(x, self.parallel, [Shard(1)], run_check=False)
            x = parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
        return self.head(x).clone()  # FSDP2 warns of outputs that are views


def batch(number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(ROWS, 6, 12, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (ROWS, 6), generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def mine(mesh: DeviceMesh | None, number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The rows of a batch for this rank's place in a mesh of data-parallel ranks; all of them without a mesh."""
    x, y = batch(number, dtype)
    if mesh is None:
        return x, y
    place = 0
    for dimension in range(mesh.ndim):
        place = place * mesh.size(dimension) + mesh.get_local_rank(dimension)
    rows = ROWS // mesh.size()
    return x[place * rows : (place + 1) * rows], y[place * rows : (place + 1) * rows]


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def part(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


@torch.no_grad()
def set_weights(names: dict[Tensor, str], weights: dict[str, Tensor]) -> None:
    """Gives parameters, sharded or not, these whole values."""
    for p, name in names.items():
        there = p.detach()
        if isinstance(there, DTensor):
            there.copy_(distribute_tensor(weights[name], there.device_mesh, there.placements))
        else:
            there.copy_(weights[name])


def equations(number: int, weights: dict[str, Tensor], rho: float, eta: float | None = None) -> tuple[dict, dict, float]:
    """e, the gradient at w + e, and the norm that normalises e, of a Net on a whole batch: in float64."""
    x, y = batch(number)

    def loss(at: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(Net(), at, (x,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    return ascent(loss, weights, rho, eta)


def ascent(
    loss: Callable[[dict[str, Tensor]], Tensor], weights: dict[str, Tensor], rho: float, eta: float | None = None
) -> tuple[dict, dict, float]:
    """The same of any loss of named weights: from 2010.01412 eq. 2 and 2102.11600 eq. 7."""

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: w.detach().double().clone().requires_grad_() for name, w in at.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
        return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(leaves.items(), found, strict=True)}

    g = gradient(weights)
    t = {name: torch.ones_like(w) if eta is None else w.abs() + eta for name, w in weights.items()}
    norm = float(sum((t[name] * g[name]).square().sum() for name in g).sqrt())
    e = {name: rho * t[name].square() * g[name] / norm for name in g}
    return e, gradient({name: w + e[name] for name, w in weights.items()}), norm


def reshard(model: nn.Module) -> None:
    """What FSDP2 asks for after a forward without backward, before weights change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_steps(
    model: nn.Module,
    opt: SAM,
    backward: Callable[[int], Any],
    names: dict[Tensor, str],
    lr: float,
    rho: float,
    *,
    eta: float | None = None,
    tolerance: float = 1e-12,
    steps: int = 2,
) -> None:
    """Steps of SAM over SGD against the equations on the whole batch: w + e, report, restored bits, weights, outputs."""
    for number in range(steps):
        weights = {name: whole(p).double() for p, name in names.items()}
        bits = [part(p) for p in names]
        e, second, _ = equations(number, weights, rho, eta)
        backward(number)
        opt.first_step(zero_grad=True)
        for p, name in names.items():
            assert (whole(p).double() - weights[name] - e[name]).abs().max() <= tolerance, f"w + e of {name}"
        report = opt.report.as_dict()
        intended = float(sum(v.square().sum() for v in e.values()).sqrt())
        assert abs(report["intended_norm"] / intended - 1) <= max(tolerance, 1e-11), report
        for name in ("stored_norm", "seen_norm"):
            assert abs(report[name] / intended - 1) <= 1e4 * tolerance, (name, report)
        for name in ("stored_cosine", "stored_gain", "seen_cosine", "seen_gain"):
            assert abs(report[name] - 1) <= 1e4 * tolerance, (name, report)
        changed = sum(int((v != 0).sum()) for v in e.values()) / sum(v.numel() for v in e.values())
        assert abs(report["changed_fraction"] - changed) <= (0 if tolerance < 1e-9 else 0.02), report
        backward(number)
        opt.restore_()
        assert all(torch.equal(part(p), b) for p, b in zip(names, bits, strict=True)), "restored bits"
        opt.step()
        for p, name in names.items():
            assert (whole(p).double() - weights[name] + lr * second[name]).abs().max() <= tolerance, f"step of {name}"
        opt.zero_grad()
        after = {name: weights[name] - lr * second[name] for name in weights}
        x, _ = batch(number)
        with torch.no_grad():
            expected = torch.func.functional_call(Net(), after, (x,))
            out = whole(model(x.to(next(iter(names)).dtype)))
        assert (out.double() - expected).abs().max() <= 10 * tolerance, "outputs after the step"
        reshard(model)
