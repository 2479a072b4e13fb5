"""SAM over shards against its equations in float64: FSDP2, HSDP, tensor parallelism, DDP, in 2 and 4 processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastpost import SAM
from fastpost.sam import GSAM, TRAM, WSAM, FriendlySAM, LookSAM, MomentumSAM, PreconditionedSAM, StableSAM

from . import distributed as d
from .expert_parallel import Gather

LR, RHO = 0.1, 0.3


def sharded(mesh=None, dtype=torch.float64, **kwargs) -> d.Net:
    model = d.Net(dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def names_of(model: nn.Module) -> dict[Tensor, str]:
    return {p: name.removeprefix("module.") for name, p in model.named_parameters()}


def sam(model: nn.Module, **kwargs) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, lr=LR, **{"rho": RHO, **kwargs})


def backward_on(model: nn.Module, mesh, dtype=torch.float64):
    return lambda number: d.loss_of(model, *d.mine(mesh, number, dtype)).backward()


def check(model: nn.Module, mesh, dtype=torch.float64, tolerance=1e-12, **kwargs) -> SAM:
    opt = sam(model, **{k: v for k, v in kwargs.items() if k in ("adaptive", "eta")})
    eta = kwargs.get("eta")
    d.check_steps(model, opt, backward_on(model, mesh, dtype), names_of(model), LR, RHO, eta=eta, tolerance=tolerance)
    return opt


def fsdp2() -> None:
    mesh = d.mesh_of(dist.get_world_size())
    model = sharded(mesh)
    assert model.head.weight.to_local().shape[0] == {2: (2, 1), 4: (1, 1, 1, 0)}[mesh.size()][mesh.get_local_rank()]
    check(model, mesh)


def fsdp2_adaptive() -> None:
    mesh = d.mesh_of(dist.get_world_size())
    check(sharded(mesh), mesh, adaptive=True, eta=0.01)


def fsdp2_float32() -> None:
    mesh = d.mesh_of(dist.get_world_size())
    check(sharded(mesh, torch.float32), mesh, torch.float32, 1e-6)


def fsdp2_ulp() -> None:
    """A stash of codes: the shards' bits come back, and the steps are those with a copy."""
    mesh, shards = d.mesh_of(dist.get_world_size()), {}
    for stash in ("copy", "ulp"):
        model = sharded(mesh, torch.float32)
        opt = sam(model, stash=stash)
        for number in range(2):
            before = [p.to_local().detach().clone() for p in model.parameters()]
            backward_on(model, mesh, torch.float32)(number)
            opt.first_step(zero_grad=True)
            backward_on(model, mesh, torch.float32)(number)
            opt.restore_()
            assert all(torch.equal(p.to_local(), w) for p, w in zip(model.parameters(), before, strict=True))
            opt.step()
        shards[stash] = [p.to_local().detach().clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(shards["copy"], shards["ulp"], strict=True))


def kept_unsharded() -> None:
    """set_reshard_after_backward(False): without resharding the next forward would not see what was written."""
    mesh = d.mesh_of(dist.get_world_size())
    model = sharded(mesh)
    opt, names = sam(model), names_of(model)
    model.set_reshard_after_backward(False)
    weights = {name: d.whole(p) for p, name in names.items()}
    for number in range(2):
        e, second, _ = d.equations(number, weights, RHO)
        backward_on(model, mesh)(number)
        opt.first_step(zero_grad=True)
        seen = d.loss_of(model, *d.batch(number))
        with torch.no_grad():
            at = {name: weights[name] + e[name] for name in weights}
            x, y = d.batch(number)
            expected = nn.functional.cross_entropy(torch.func.functional_call(d.Net(), at, (x,)).flatten(0, 1), y.flatten())
        assert abs(seen.item() - expected.item()) <= 1e-12
        seen.backward()
        opt.second_step(zero_grad=True)
        weights = {name: weights[name] - LR * second[name] for name in weights}
        assert all((d.whole(p) - weights[name]).abs().max() <= 1e-12 for p, name in names.items())


def evaluated_while_perturbed() -> None:
    """A forward without backward leaves the root gathered; the next one sees w again all the same."""
    mesh = d.mesh_of(dist.get_world_size())
    model = sharded(mesh)
    opt = sam(model)
    x = d.batch(0)[0]
    with torch.no_grad():
        before = model(x).clone()
        d.reshard(model)
    backward_on(model, mesh)(0)
    with opt.perturbed(), torch.no_grad():
        assert (model(x) - before).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(model(x), before)


def plain_beside_shards() -> None:
    """The head stays a plain parameter; its gradient is averaged by hand, as FSDP2 leaves to the user."""
    mesh = d.mesh_of(dist.get_world_size())
    model = d.Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)

    def backward(number: int) -> None:
        backward_on(model, mesh)(number)
        for p in model.head.parameters():
            dist.all_reduce(p.grad)
            p.grad /= mesh.size()

    d.check_steps(model, sam(model), backward, names_of(model), LR, RHO)


def offloaded() -> None:
    mesh = d.mesh_of(dist.get_world_size())
    check(sharded(mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), mesh)


def hsdp() -> None:
    mesh = d.mesh_of(2, 2, names=("replicate", "shard"))
    opt = check(sharded(mesh), mesh)
    assert len({len(key) for key in map(opt._reducer.key, opt.tensors())}) == 1
    assert all(len(opt._reducer.key(p)[0]) == 2 for p in opt.tensors())


def hsdp_float32() -> None:
    """w kept as codes and as a copy: the shards' bits come back, copies of a shard stay equal, and steps are the same."""
    mesh, shards = d.mesh_of(2, 2, names=("replicate", "shard")), {}
    for stash in ("copy", "ulp"):
        model = sharded(mesh, torch.float32)
        opt = sam(model, stash=stash, adaptive=True, eta=0.01)
        for number in range(2):
            before = [d.part(p) for p in model.parameters()]
            backward_on(model, mesh, torch.float32)(number)
            opt.first_step(zero_grad=True)
            assert not all(torch.equal(d.part(p), w) for p, w in zip(model.parameters(), before, strict=True))
            backward_on(model, mesh, torch.float32)(number)
            opt.restore_()
            assert all(torch.equal(d.part(p), w) for p, w in zip(model.parameters(), before, strict=True))
            opt.step()
        shards[stash] = torch.cat([d.part(p).flatten() for p in model.parameters()])
    assert torch.equal(shards["copy"], shards["ulp"])
    copies = [torch.empty_like(shards["copy"]) for _ in range(2)]
    dist.all_gather(copies, shards["copy"], group=mesh.get_group("replicate"))
    assert torch.equal(*copies)


def hsdp_overflow() -> None:
    """On one of four ranks, whose copy of the shard is finite: all skip the step."""
    mesh = d.mesh_of(2, 2, names=("replicate", "shard"))
    for which in ("first", "second"):
        model = sharded(mesh)
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=LR)
        before = [d.part(p) for p in model.parameters()]
        for turn in ("first", "second"):
            backward_on(model, mesh)(0)
            if turn == which and dist.get_rank() == 3:
                next(model.parameters()).grad.to_local().view(-1)[0] = torch.inf
            if turn == "first":
                opt.first_step(zero_grad=True)
        opt.second_step(zero_grad=True)
        assert opt.skipped_steps == 1, which
        assert all(torch.equal(d.part(p), w) for p, w in zip(model.parameters(), before, strict=True))


KINDS = [
    (lambda: GSAM(alpha=0.3), {}), (lambda: WSAM(gamma=0.7), {"adaptive": True, "eta": 0.1}), (StableSAM, {}),
    (LookSAM, {"interval": 2}), (FriendlySAM, {}), (MomentumSAM, {}), (PreconditionedSAM, {}),
]  # fmt: skip


def as_in_one_process(model: nn.Module, mesh) -> None:
    """Each variant over AdamW, as it is in one process that has the whole model and batch."""
    start = {name: d.whole(p) for p, name in names_of(model).items()}
    for variant, options in KINDS:
        lone = d.Net()
        d.set_weights(names_of(model), start)
        pair = []
        for net in (model, lone):
            opt = SAM(net.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2, eps=1e-3, variant=variant(), **options)
            pair.append((net, opt))
        for number in range(3):
            for net, opt in pair:
                opt.step(lambda net=net: backward_on(net, mesh if net is model else None)(number))  # noqa: B023
            known = dict(lone.named_parameters())
            for p, name in names_of(model).items():
                assert (d.whole(p) - known[name]).abs().max() <= 1e-10, (variant, number, name)
        d.reshard(model)


def hsdp_variants() -> None:
    mesh = d.mesh_of(2, 2, names=("replicate", "shard"))
    as_in_one_process(sharded(mesh), mesh)


def tensor_parallel_variants() -> None:
    """Dot products over Partial gradients, which are redistributed before."""
    as_in_one_process(parallel(d.mesh_of(dist.get_world_size())), None)


def tensor_parallel_adaptive() -> None:
    check(parallel(d.mesh_of(dist.get_world_size())), None, adaptive=True, eta=0.01)


def radius_over_ranks() -> None:
    """TRAM's ranks observe divergences of their own rows; the radius is the mean over all of them."""
    mesh = d.mesh_of(dist.get_world_size())
    model = sharded(mesh)
    opt, names = sam(model, rho=1.0, variant=TRAM()), names_of(model)
    weights = {name: d.whole(p) for p, name in names.items()}
    e, _, _ = d.equations(0, weights, 0.3)
    backward_on(model, mesh)(0)
    opt.variant.observe(torch.tensor(0.2 if mesh.get_local_rank() else 0.4))
    opt.first_step(zero_grad=True)
    assert all((d.whole(p) - weights[name] - e[name]).abs().max() <= 1e-8 for p, name in names.items())
    opt.restore_()


class Attends(nn.Module):
    """Causal attention in front of a Net, over a sequence that is cut over ranks: keys and values are gathered."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.rest = d.Net()
        self.parts = nn.Linear(12, 36, dtype=torch.float64)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x).chunk(3, -1)
        first = dist.get_rank() * q.shape[1] if self.cut else 0
        if self.cut:
            k, v = (Gather.apply(t.transpose(0, 1), dist.group.WORLD).transpose(0, 1) for t in (k, v))
        places = torch.arange(k.shape[1])
        later = places > first + torch.arange(q.shape[1])[:, None]
        scores = (q @ k.mT / 12**0.5).masked_fill(later, -torch.inf)
        return self.rest(x + scores.softmax(-1) @ v)


def context_parallel() -> None:
    """Each rank has its part of every sequence, and gradients are the mean over ranks: replicas by DDP, shards by FSDP2."""
    mesh = d.mesh_of(dist.get_world_size())
    torch.manual_seed(9)
    start = Attends().state_dict()

    def loss_at(weights: dict[str, Tensor], number: int) -> Tensor:
        x, y = d.batch(number)
        return nn.functional.cross_entropy(torch.func.functional_call(Attends(), weights, (x,)).flatten(0, 1), y.flatten())

    for strategy in ("ddp", "fsdp2"):
        model: nn.Module = Attends(cut=True)
        model.load_state_dict(start)
        model = DistributedDataParallel(model) if strategy == "ddp" else fully_shard(model, mesh=mesh)
        opt, names = sam(model), names_of(model)
        for number in range(2):
            weights = {name: d.whole(p) for p, name in names.items()}
            e, second, norm = d.ascent(lambda at, number=number: loss_at(at, number), weights, RHO)
            x, y = (t.chunk(mesh.size(), 1)[mesh.get_local_rank()] for t in d.batch(number))
            d.loss_of(model, x, y).backward()
            opt.first_step(zero_grad=True)
            assert all((d.whole(p) - weights[name] - e[name]).abs().max() <= 1e-12 for p, name in names.items())
            assert norm > 0
            d.loss_of(model, x, y).backward()
            opt.second_step(zero_grad=True)
            assert all((d.whole(p) - weights[n] + LR * second[n]).abs().max() <= 1e-12 for p, n in names.items()), strategy


def several_meshes() -> None:
    """Blocks over all four ranks, the root over pairs and their copies: gradients of both kinds under one norm."""
    flat, pairs = d.mesh_of(4), d.mesh_of(2, 2, names=("replicate", "shard"))
    model = d.Net()
    for block in model.blocks:
        fully_shard(block, mesh=flat)
    fully_shard(model, mesh=pairs)
    opt = check(model, flat)
    assert len(set(map(opt._reducer.key, opt.tensors()))) == 2


def parallel(mesh) -> d.Net:
    """Blocks cut over tensor-parallel ranks; their norms see a part of the sequence each, so their gradients are Partial."""
    model = d.Net()
    model.parallel = mesh
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def tensor_parallel() -> None:
    model = parallel(d.mesh_of(dist.get_world_size()))
    naive = []

    def backward(number: int) -> None:
        backward_on(model, None)(number)
        norm = model.blocks[0].norm.weight.grad
        naive.append(any(placement.is_partial() for placement in norm.placements))

    d.check_steps(model, sam(model), backward, names_of(model), LR, RHO)
    assert all(naive), "the case that makes naive norms wrong did not arise"


def fsdp2_with_tensor_parallel() -> None:
    mesh = d.mesh_of(2, 2, names=("dp", "tp"))
    model = parallel(mesh["tp"])
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["dp"])
    opt = check(model, mesh["dp"])
    assert {len(opt._reducer.key(p)) for p in opt.tensors()} == {1, 2}


def fsdp2_with_tensor_parallel_variants() -> None:
    mesh = d.mesh_of(2, 2, names=("dp", "tp"))
    model = parallel(mesh["tp"])
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["dp"])
    as_in_one_process(model, mesh["dp"])


def recipes() -> None:
    """docs/distributed.md: every recipe runs, and makes the step of the equations."""
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    blocks = dict(re.findall(r"^### (.+?)\n(?:.*?)^```python\n(.*?)^```", text, re.M | re.S))
    assert list(blocks) == ["DDP", "FSDP2", "HSDP", "Tensor parallel", "Pipeline", "Experts"]
    for title, code in list(blocks.items())[:4]:  # the others: test_sam_stages.py
        mesh = None if title == "Tensor parallel" else d.mesh_of(dist.get_world_size())
        scope = {"Net": d.Net, "loss_of": d.loss_of, "batches": [d.mine(mesh, 0)], "device": "cpu"}
        exec(compile(code, f"docs/distributed.md, {title}", "exec"), scope)
        start = dict(d.Net().named_parameters())
        _, second, _ = d.equations(0, {name: w.detach() for name, w in start.items()}, RHO)
        for p, name in names_of(scope["model"]).items():
            assert (d.whole(p) - start[name] + LR * second[name]).abs().max() <= 1e-12, (title, name)


def test_every_case_is_in_the_docs() -> None:
    from . import test_sam_stages as stages
    from .test_sam_sharded_training import CASES

    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    table = text[text.index("## Which test proves it") :]
    assert set(re.findall(r"`(\w+)`", re.sub(r"^\| [^|]*\|", "", table, flags=re.M))) == {
        *TWO,
        *FOUR,
        *CASES,
        *stages.TWO,
        *stages.FOUR,
    }


TWO = {
    case.__name__: case
    for case in (
        fsdp2, fsdp2_adaptive, fsdp2_float32, fsdp2_ulp, kept_unsharded, evaluated_while_perturbed, plain_beside_shards,
        offloaded, tensor_parallel, tensor_parallel_adaptive, tensor_parallel_variants, radius_over_ranks,
        context_parallel,
    )
}  # fmt: skip
FOUR = {
    case.__name__: case
    for case in (
        fsdp2, hsdp, hsdp_float32, hsdp_overflow, hsdp_variants, several_meshes, fsdp2_with_tensor_parallel,
        fsdp2_with_tensor_parallel_variants, recipes,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[int, d.Outcome]:
    return {2: d.run(2, TWO), 4: d.run(4, FOUR)}


@pytest.mark.parametrize("name", TWO)
def test_two_processes(outcomes: dict[int, d.Outcome], name: str) -> None:
    outcomes[2].of(name)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(outcomes: dict[int, d.Outcome], name: str) -> None:
    outcomes[4].of(name)
