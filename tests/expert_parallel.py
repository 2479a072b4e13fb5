"""Cases of SAM with experts on a mesh of their own, for four processes: `test_sam_stages.py` runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastpost import SAM
from fastpost.sam import GSAM

from . import distributed as d

LR, RHO, EXPERTS = 0.1, 0.3, 4


class Gather(torch.autograd.Function):
    """The rows of all ranks; their gradients come back summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


class _Scatter(torch.autograd.Function):
    """The sum of what all ranks have for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = [torch.empty_like(grad) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        return torch.cat(parts), None


class Experts(nn.Module):
    """All of them, or those of this rank's place in a mesh: stacked in one weight (a DTensor there), or each its own."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.stacked, self.mesh, self.first = stacked, None, 0
        weights = torch.randn(EXPERTS, 12, 12, dtype=torch.float64) / 4
        if stacked:
            self.weight = nn.Parameter(weights)
        else:
            self.each = nn.ParameterDict({str(i): nn.Parameter(w) for i, w in enumerate(weights)})

    def spread(self, mesh: DeviceMesh) -> None:
        count = EXPERTS // mesh.size()
        self.mesh, self.first = mesh, mesh.get_local_rank() * count
        if self.stacked:
            self.weight = nn.Parameter(distribute_tensor(self.weight.detach(), mesh, [Shard(0)]))
        else:
            self.each = nn.ParameterDict({str(i): self.each[str(i)] for i in range(self.first, self.first + count)})

    def weights(self) -> dict[int, Tensor]:
        if not self.stacked:
            return {int(name): w for name, w in self.each.items()}
        mine = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return {self.first + i: w for i, w in enumerate(mine)}

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = x * 0
        for number, w in self.weights().items():
            (rows,) = torch.where(chosen == number)
            if len(rows):  # an expert that no token reaches has no gradient, if it is a tensor of its own
                out = out.index_add(0, rows, torch.tanh(x[rows] @ w))
        return out


class MoE(nn.Module):
    """A residual layer of experts, of which each token goes to one. No token reaches the last two: both are on one rank."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12, dtype=torch.float64)
        self.router = nn.Linear(12, EXPERTS, dtype=torch.float64)
        nn.init.constant_(self.router.bias[EXPERTS // 2 :], -1e3)
        self.experts = Experts(stacked)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, 1)
        weight, chosen = self.router(rows).softmax(-1).max(-1)
        mesh = self.experts.mesh
        if mesh is None:
            out = self.experts(rows, chosen)
        else:
            group = mesh.get_group()
            everywhere = [torch.empty_like(chosen) for _ in range(mesh.size())]
            dist.all_gather(everywhere, chosen, group=group)
            out = _Scatter.apply(self.experts(Gather.apply(rows, group), torch.cat(everywhere)), group)
        return x + (weight[:, None] * out).view_as(x)


class Model(nn.Module):
    """Two layers of experts and a head."""

    def __init__(self, stacked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleDict({str(i): MoE(stacked) for i in range(2)})
        self.head: nn.Module | None = nn.Linear(12, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x.clone() if self.head is None else self.head(x).clone()


def _truth(weights: dict[str, Tensor], number: int, stacked: bool, eta: float | None = None) -> tuple[dict, dict, float]:
    x, y = d.batch(number)

    def loss(at: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(Model(stacked), at, (x,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    return d.ascent(loss, weights, RHO, eta)


def _check(
    mine: dict[str, nn.Parameter],
    opt: SAM,
    backward: Callable[[int], Any],
    stacked: bool,
    eta: float | None = None,
    silent: bool = True,
) -> None:
    """Steps of SAM against the equations of all experts in one process.

    Args:
        silent: whether experts that no token reaches have no gradient, rather than zeros.
    """
    weights = {name: w.detach().clone() for name, w in Model(stacked).named_parameters()}
    for number in range(3):
        e, second, _ = _truth(weights, number, stacked, eta)
        bits = {name: d.part(p) for name, p in mine.items()}
        backward(number)
        opt.first_step(zero_grad=True)
        for name, p in mine.items():
            assert (d.whole(p) - weights[name] - e[name]).abs().max() <= 1e-12, f"w + e of {name}"
        intended = math.sqrt(sum(float(v.square().sum()) for v in e.values()))
        assert abs(float(opt.report.intended_norm) / intended - 1) <= 1e-11
        assert abs(float(opt.report.stored_norm) / intended - 1) <= 1e-8
        elements = sum(v.numel() for v in e.values()) - (2 * (EXPERTS // 2) * 12 * 12 if silent else 0)
        assert float(opt.report.changed_fraction) == sum(int((v != 0).sum()) for v in e.values()) / elements
        backward(number)
        opt.restore_()
        assert all(torch.equal(d.part(p), bits[name]) for name, p in mine.items()), "restored bits"
        opt.step()
        opt.zero_grad()
        weights = {name: weights[name] - LR * second[name] for name in weights}
        for name, p in mine.items():
            assert (d.whole(p) - weights[name]).abs().max() <= 1e-12, f"step of {name}"


def _average(model: nn.Module, dense: DeviceMesh, copies: DeviceMesh | None) -> None:
    """The mean over data-parallel ranks, as a trainer makes it: of dense weights over all, of experts over their copies."""
    for name, p in model.named_parameters():
        if "experts" not in name:
            dist.all_reduce(p.grad, group=dense.get_group())
        elif copies is not None:
            p.grad = torch.zeros_like(p) if p.grad is None and p.requires_grad and isinstance(p, DTensor) else p.grad
            if p.grad is not None:
                grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                dist.all_reduce(grad, group=copies.get_group())
        if p.grad is not None:
            p.grad.div_(dense.size())


def _meshes() -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """All ranks, and the same as copies of experts x experts."""
    mesh = d.mesh_of(2, 2, names=("copies", "ep"))
    return d.mesh_of(4, names=("dp",)), mesh["copies"], mesh["ep"]


def _backward(model: nn.Module, dense: DeviceMesh, copies: DeviceMesh | None) -> Callable[[int], None]:
    def backward(number: int) -> None:
        d.loss_of(model, *d.mine(dense, number)).backward()
        _average(model, dense, copies)

    return backward


def experts_as_dtensors() -> None:
    """Sharded over a mesh of experts, with copies; dense weights plain on all ranks."""
    dense, copies, ep = _meshes()
    model = Model()
    for block in model.blocks.values():
        block.experts.spread(ep)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    assert {len(opt._reducer.key(p)) for p in opt.tensors()} == {0, 1}
    _check(dict(model.named_parameters()), opt, _backward(model, dense, copies), stacked=True, silent=False)


def experts_under_fsdp2() -> None:
    """Dense weights sharded over all four ranks, experts over their mesh and over their copies (as torchtitan does)."""
    mesh = d.mesh_of(2, 2, names=("copies", "ep"))
    dense = mesh._flatten("dp")
    model = Model()
    for block in model.blocks.values():
        block.experts.spread(mesh["ep"])
        fully_shard(block.experts, mesh=mesh["copies"])
        block.experts.set_gradient_divide_factor(dense.size())
        fully_shard(block, mesh=dense)
    fully_shard(model, mesh=dense)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, adaptive=True, eta=0.01)
    assert {len(opt._reducer.key(p)) for p in opt.tensors()} == {1, 2}

    def backward(number: int) -> None:
        d.loss_of(model, *d.mine(dense, number)).backward()

    _check(dict(model.named_parameters()), opt, backward, stacked=True, eta=0.01)


def experts_as_plain_tensors() -> None:
    """A tensor for each expert, of which some ranks have no gradient at all: every rank takes part in every sum."""
    dense, copies, ep = _meshes()
    model = Model(stacked=False)
    for block in model.blocks.values():
        block.experts.spread(ep)
    opt = SAM(
        model.named_parameters(),
        torch.optim.SGD,
        rho=RHO,
        lr=LR,
        norm_group=lambda name, p: ep if "experts" in name else None,
    )
    backward = _backward(model, dense, copies)
    backward(0)
    reached = all(p.grad is not None for name, p in model.named_parameters() if "experts" in name)
    assert reached == (ep.get_local_rank() == 0)
    opt.zero_grad()
    _check(dict(model.named_parameters()), opt, backward, stacked=False)


def experts_with_a_variant() -> None:
    """GSAM's dot products count every expert once."""
    dense, copies, ep = _meshes()
    model, whole = Model(stacked=False), Model(stacked=False)
    for block in model.blocks.values():
        block.experts.spread(ep)
    group = ep.get_group()
    opt = SAM(
        model.named_parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.3),
        norm_group=lambda name, p: group if "experts" in name else None,
    )  # fmt: skip
    lone = SAM(whole.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=GSAM(0.3))
    backward = _backward(model, dense, copies)
    for number in range(2):
        for sam, passes in ((opt, backward), (lone, lambda n: d.loss_of(whole, *d.batch(n)).backward())):
            passes(number)
            sam.first_step(zero_grad=True)
            passes(number)
            sam.second_step(zero_grad=True)
        known = dict(whole.named_parameters())
        assert all((p - known[name]).abs().max() <= 1e-12 for name, p in model.named_parameters())


def experts_in_stages() -> None:
    """Two stages of a pipeline, two ranks for the experts of each: these differ over both, dense weights over stages."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    mesh = d.mesh_of(2, 2, names=("pp", "ep"))
    pp, ep = mesh["pp"], mesh["ep"]
    number = pp.get_local_rank()
    model = Model(stacked=False)
    model.blocks = nn.ModuleDict({str(number): model.blocks[str(number)]})
    model.head = model.head if number == 1 else None
    model.blocks[str(number)].experts.spread(ep)
    opt = SAM(
        model.named_parameters(), torch.optim.SGD, rho=RHO, lr=LR,
        norm_group=lambda name, p: (pp, ep) if "experts" in name else pp,
    )  # fmt: skip
    assert {len(opt._reducer.key(p)) for p in opt.tensors()} == {1, 2}
    stage = PipelineStage(model, number, 2, torch.device("cpu"), group=pp.get_group())
    schedule = ScheduleGPipe(
        stage, n_microbatches=2, loss_fn=lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())
    )

    def backward(batch: int) -> None:
        x, y = d.mine(ep, batch)
        if number == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])
        _average(model, ep, None)

    _check(dict(model.named_parameters()), opt, backward, stacked=False)


def check_recipe(code: str) -> None:
    """Runs it with a model of which each rank has one expert per layer."""
    mesh, model = d.mesh_of(4), Model(stacked=False)

    def with_own_experts(ep: DeviceMesh) -> Model:
        for block in model.blocks.values():
            block.experts.spread(ep)
        return model

    def average(model: nn.Module) -> None:
        _average(model, mesh, None)

    scope = {
        "with_own_experts": with_own_experts, "loss_of": d.loss_of, "average_gradients": average,
        "batches": [d.mine(mesh, 0)], "device": "cpu",
    }  # fmt: skip
    exec(compile(code, "docs/distributed.md, Experts", "exec"), scope)
    weights = {name: w.detach().clone() for name, w in Model(stacked=False).named_parameters()}
    _, second, _ = _truth(weights, 0, stacked=False)
    for name, p in model.named_parameters():
        assert (p - weights[name] + LR * second[name]).abs().max() <= 1e-12, name


def overflow_in_one_expert() -> None:
    """All ranks skip the step, those without the expert too."""
    dense, copies, ep = _meshes()
    for which in ("first", "second"):
        model = Model(stacked=False)
        for block in model.blocks.values():
            block.experts.spread(ep)
        opt = SAM(
            model.named_parameters(), torch.optim.AdamW, rho=RHO, lr=LR,
            norm_group=lambda name, p: ep if "experts" in name else None,
        )  # fmt: skip
        before = [d.part(p) for p in model.parameters()]
        for turn in ("first", "second"):
            _backward(model, dense, copies)(0)
            if turn == which and ep.get_local_rank() == 0:
                model.blocks["0"].experts.each["0"].grad.view(-1)[0] = math.inf
            if turn == "first":
                opt.first_step(zero_grad=True)
        opt.second_step(zero_grad=True)
        assert opt.skipped_steps == 1, which
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


CASES = {
    case.__name__: case
    for case in (
        experts_as_dtensors, experts_under_fsdp2, experts_as_plain_tensors, experts_with_a_variant, experts_in_stages,
        overflow_in_one_expert,
    )
}  # fmt: skip
