"""SAM over pipeline stages (torch.distributed.pipelining), alone and with DDP or FSDP2 inside of a stage.

In 2 and 4 processes. The truth is one process: the equations in float64 on the whole model and batch, and for variants a SAM
that has all of it.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastpost import SAM, sharpness
from fastpost.sam import (
    GSAM,
    TRAM,
    WSAM,
    DecoupledWSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    SAMWindow,
    StableSAM,
    ZerothOrderSAM,
)

from . import distributed as d
from . import expert_parallel

LR, RHO, MICRO = 0.1, 0.3, 4


class Stage(nn.Module):
    """Half of a Net, by the Net's names."""

    def __init__(self, number: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        net = d.Net(dtype)
        self.blocks = nn.ModuleDict({str(number): net.blocks[number]})
        self.head = net.head if number == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x.clone() if self.head is None else self.head(x).clone()


class Pipe:
    """A Net in two stages, and the passes that a schedule makes with it.

    Attributes:
        stages: the mesh of the two ranks that hold the stages of one replica.
        replicas: the mesh of those that hold the same stage; None without others.
        scale: of the loss.
    """

    def __init__(
        self,
        schedule: Any = ScheduleGPipe,
        inside: str | None = None,
        dtype: torch.dtype = torch.float64,
        micro: int = MICRO,
    ) -> None:
        self.dtype, self.replicas, self.scale = dtype, None, 1.0
        if inside is None:
            self.stages: DeviceMesh = d.mesh_of(2, names=("pp",))
        else:
            mesh = d.mesh_of(2, 2, names=("pp", "dp"))
            self.stages, self.replicas = mesh["pp"], mesh["dp"]
        self.number = self.stages.get_local_rank()
        self.model: nn.Module = Stage(self.number, dtype)
        if inside == "ddp":
            # Without finding unused parameters, a schedule's second pass fails an assertion of DDP (torch 2.13).
            group = self.replicas.get_group()
            self.model = DistributedDataParallel(self.model, process_group=group, find_unused_parameters=True)
        elif inside == "fsdp2":
            for module in (*self.model.blocks.values(), self.model):
                fully_shard(module, mesh=self.replicas)
        stage = PipelineStage(self.model, self.number, 2, torch.device("cpu"), group=self.stages.get_group())
        self.schedule = schedule(stage, n_microbatches=micro, loss_fn=lambda out, y: self.scale * _loss(out, y))

    def backward(self, number: int) -> None:
        x, y = d.mine(self.replicas, number, self.dtype)
        if self.number == 0:
            self.schedule.step(x)
        else:
            self.schedule.step(target=y, losses=[])

    def sam(self, base: Any = torch.optim.SGD, **options: Any) -> SAM:
        return SAM(self.model.named_parameters(), base, norm_group=self.stages, **{"rho": RHO, "lr": LR, **options})

    def names(self) -> dict[str, nn.Parameter]:
        return {name.removeprefix("module."): p for name, p in self.model.named_parameters()}


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())


def start() -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in d.Net().named_parameters()}


def check(pipe: Pipe, opt: SAM, eta: float | None = None, steps: int = 3) -> None:
    """Steps of SAM against the equations of the whole model: w + e, the report, restored bits, weights."""
    weights, mine = start(), pipe.names()
    for number in range(steps):
        e, second, _ = d.equations(number, weights, RHO, eta)
        bits = {name: d.part(p) for name, p in mine.items()}
        pipe.backward(number)
        opt.first_step(zero_grad=True)
        for name, p in mine.items():
            assert (d.whole(p) - weights[name] - e[name]).abs().max() <= 1e-12, f"w + e of {name}"
        report = opt.report.as_dict()
        intended = math.sqrt(sum(float(v.square().sum()) for v in e.values()))
        for name in ("intended_norm", "stored_norm", "seen_norm"):
            assert abs(report[name] / intended - 1) <= 1e-8, (name, report)
        changed = sum(int((v != 0).sum()) for v in e.values()) / sum(v.numel() for v in e.values())
        assert report["changed_fraction"] == changed
        pipe.backward(number)
        opt.restore_()
        assert all(torch.equal(d.part(p), bits[name]) for name, p in mine.items()), "restored bits"
        opt.step()
        opt.zero_grad()
        weights = {name: weights[name] - LR * second[name] for name in weights}
        for name, p in mine.items():
            assert (d.whole(p) - weights[name]).abs().max() <= 1e-12, f"step of {name}"


def gpipe() -> None:
    pipe = Pipe()
    check(pipe, pipe.sam())


def one_forward_one_backward() -> None:
    pipe = Pipe(Schedule1F1B)
    check(pipe, pipe.sam(adaptive=True, eta=0.01), eta=0.01)


def two_stages_on_a_rank() -> None:
    """Interleaved 1F1B and a zero-bubble schedule, whose gradients of weights pass no hook: an optimizer over both parts."""
    torch.manual_seed(5)
    layers = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()).double() for _ in range(4)]
    start = {f"{i}.0.{name}": w.detach().clone() for i, part in enumerate(layers) for name, w in part[0].named_parameters()}
    mesh = d.mesh_of(2, names=("pp",))
    rank, (x, _) = mesh.get_local_rank(), d.batch(0)
    for schedule in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble):
        parts = {i: copy.deepcopy(layers[i]) for i in (rank, rank + 2)}
        stages = [PipelineStage(part, i, 4, torch.device("cpu"), group=mesh.get_group()) for i, part in parts.items()]
        steps = schedule(stages, n_microbatches=4, loss_fn=lambda out, y: (out - y).square().mean())

        def backward(steps: Any = steps) -> None:
            if rank == 0:
                steps.step(x)
            else:
                steps.step(target=x, losses=[])

        params = [p for part in parts.values() for p in part.parameters()]
        opt = SAM(params, torch.optim.SGD, rho=RHO, lr=LR, norm_group=mesh, variant=StableSAM())
        weights = start
        for _ in range(2):

            def loss(at: dict[str, Tensor]) -> Tensor:
                out = x
                for i in range(4):
                    out = torch.tanh(out @ at[f"{i}.0.weight"].T + at[f"{i}.0.bias"])
                return (out - x).square().mean()

            _, second, norm = d.ascent(loss, weights, RHO)
            factor = norm / math.sqrt(sum(float(g.square().sum()) for g in second.values()))
            backward()
            opt.first_step(zero_grad=True)
            backward()
            opt.second_step(zero_grad=True)
            weights = {name: weights[name] - LR * factor * second[name] for name in weights}
            for i, part in parts.items():
                for name, p in part.named_parameters():
                    assert (p - weights[f"{i}.{name}"]).abs().max() <= 1e-12, (schedule.__name__, i, name)


def group_by_function() -> None:
    """A process group for each parameter is the same as one for all."""
    pipe = Pipe()
    group = pipe.stages.get_group()
    opt = SAM(pipe.model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, norm_group=lambda name, p: group)
    check(pipe, opt)


def _closures(backward: Callable[[int], Any], opt: SAM, number: int) -> None:
    opt.step(lambda: backward(number))


def _windows(backward: Callable[[int], Any], opt: SAM, number: int) -> None:
    SAMWindow(opt, backward).run([number])
    opt.step()
    opt.zero_grad()


def _two_calls(backward: Callable[[int], Any], opt: SAM, number: int) -> None:
    backward(number)
    if opt.ascends:
        opt.first_step(zero_grad=True)
        backward(number)
        opt.second_step(zero_grad=True)
    else:
        opt.step()
        opt.zero_grad()


FORMS = (_closures, _windows, _two_calls)


def variants() -> None:
    """Each variant, in each form of a step, is what it is in one process: all its dot products are over both stages."""
    kinds: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: GSAM(alpha=0.3), {}),
        (lambda: WSAM(gamma=0.7), {}),
        (StableSAM, {}),
        (LookSAM, {"interval": 2}),
        (FriendlySAM, {"adaptive": True, "eta": 0.1}),
        (MomentumSAM, {"momentum": 0.9}),
        (lambda: DecoupledWSAM(gamma=0.7), {}),
    ]
    for i, (variant, options) in enumerate(kinds):
        form = FORMS[i % len(FORMS)] if variant is not MomentumSAM else _windows
        pipe, net = Pipe(), d.Net()
        opt = pipe.sam(variant=variant(), **options)
        lone = SAM(net.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=variant(), **options)
        for sam in (opt, lone):
            if isinstance(sam.variant, DecoupledWSAM):
                sam.variant.attach(sam)
        whole = dict(net.named_parameters())
        for number in range(4):
            form(pipe.backward, opt, number)
            form(lambda number, net=net: d.loss_of(net, *d.batch(number)).backward(), lone, number)
            for name, p in pipe.names().items():
                assert (p - whole[name]).abs().max() <= 1e-12, (type(opt.variant).__name__, number, name)


def tram() -> None:
    """Only the last stage observes a divergence, and the radius is every stage's."""
    pipe, weights = Pipe(), start()
    opt, radius = pipe.sam(variant=TRAM(), rho=1.0), 0.37
    for number in range(2):
        _, second, _ = d.equations(number, weights, radius)
        pipe.backward(number)
        if pipe.number == 1:
            for value in (radius - 0.1, radius + 0.1):
                opt.variant.observe(torch.tensor(value, dtype=torch.float64))
        opt.first_step(zero_grad=True)
        pipe.backward(number)
        opt.second_step(zero_grad=True)
        weights = {name: weights[name] - LR * second[name] for name in weights}
        assert all((p - weights[name]).abs().max() <= 1e-12 for name, p in pipe.names().items())
    pipe.backward(0)
    with pytest.raises(RuntimeError, match="TRAM has no radius"):
        opt.first_step()
    opt.abandon()


def nothing_in_scope_here() -> None:
    """A stage without a gradient takes part in every sum and moves nothing; where no stage has any, all say so."""
    pipe, weights = Pipe(), start()
    opt = pipe.sam()
    x, y = d.batch(0)
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = _loss(torch.func.functional_call(d.Net(), leaves, (x,)), y)
    g = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    norm = math.sqrt(sum(float(g[name].square().sum()) for name in g if "head" in name))
    pipe.backward(0)
    for name, p in pipe.names().items():
        if "head" not in name:
            p.grad = None
    opt.first_step(zero_grad=True)
    for name, p in pipe.names().items():
        e = RHO * g[name] / norm if "head" in name else torch.zeros_like(p)
        assert (p - weights[name] - e).abs().max() <= 1e-12, name
    assert abs(float(opt.report.intended_norm) - RHO) <= 1e-12
    assert opt.report.changed_fraction == 1
    pipe.backward(0)
    opt.second_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="no parameter"):
        opt.first_step()


def frozen_here() -> None:
    """A stage that is frozen as a whole takes part in every sum, and the others' step is theirs."""
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=dist.get_rank() == 1)
    g = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)
    for given in (dist.group.WORLD, lambda name, p: dist.group.WORLD):
        opt = SAM([w], torch.optim.SGD, rho=RHO, lr=0.0, norm_group=given)
        if w.requires_grad:
            w.grad = g.clone()
        opt.first_step()
        assert abs(float(opt.report.intended_norm) - RHO) <= 1e-14
        assert (w - RHO * g / 5 * dist.get_rank()).abs().max() <= 1e-15
        opt.second_step()
        assert not w.any()


def overflow_on_one_stage() -> None:
    for which in ("first", "second"):
        pipe = Pipe()
        opt = pipe.sam(torch.optim.AdamW)
        before = {name: d.part(p) for name, p in pipe.names().items()}
        for turn in ("first", "second"):
            pipe.backward(0)
            if turn == which and pipe.number == 1:
                next(pipe.model.parameters()).grad.view(-1)[0] = math.inf
            if turn == "first":
                opt.first_step(zero_grad=True)
        opt.second_step(zero_grad=True)
        assert opt.skipped_steps == 1, which
        assert all(torch.equal(p, before[name]) for name, p in pipe.names().items())


def other_stashes_and_kinds() -> None:
    """w as codes, rounding at random, masters, functional perturbation: one norm over both stages, and w comes back."""
    for kind in ("ulp", "stochastic", "masters", "functional"):
        dtype = torch.float32 if kind in ("ulp", "functional") else torch.bfloat16
        pipe = Pipe(dtype=dtype)
        params, options = pipe.model.named_parameters(), {}
        if kind == "ulp":
            options = {"stash": "ulp"}
        elif kind == "stochastic":
            options = {"rounding": "stochastic"}
        elif kind == "masters":
            options = {"master_params": [p.detach().float() for p in pipe.model.parameters()]}
        else:
            options = {"perturb": "functional", "model": pipe.model}
        opt = SAM(params, torch.optim.SGD, rho=RHO, lr=LR, norm_group=pipe.stages.get_group(), **options)
        before = [d.part(p) for p in pipe.model.parameters()]
        pipe.backward(0)
        opt.first_step(zero_grad=True)
        assert abs(float(opt.report.intended_norm) / RHO - 1) <= 1e-6, kind
        assert 0.5 < float(opt.report.stored_gain) < 1.5 or kind == "functional"
        pipe.backward(0)
        opt.restore_()
        assert all(torch.equal(p, w) for p, w in zip(pipe.model.parameters(), before, strict=True)), kind
        opt.step()


def stages_round_apart() -> None:
    """Stages round by random numbers of their own, though their tensors are numbered alike."""
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    group = dist.group.WORLD
    opt = SAM(layer.parameters(), torch.optim.SGD, rho=0.1, lr=LR, rounding="stochastic", norm_group=group)
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.weight.grad[0, 0] = 1 + dist.get_rank()
    opt.first_step()
    both = [torch.empty_like(layer.weight) for _ in range(2)]
    dist.all_gather(both, layer.weight.detach())
    assert not torch.equal(*both)
    opt.restore_()


def copies() -> None:
    """Within a process the copy knows the same ranks; a pickle would not, and says so."""
    pipe = Pipe()
    opt = pipe.sam()
    pipe.backward(0)
    again = copy.deepcopy(opt)
    for p, q in zip(opt.tensors(), again.tensors(), strict=True):
        q.grad = p.grad.clone()
    again.first_step()
    opt.first_step()
    for a, b in zip(again.tensors(), opt.tensors(), strict=True):
        assert torch.equal(a, b)
    opt.restore_()
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(opt)
    assert "norm_group" not in opt.state_dict()["param_groups"][0]


def alike_by_chance() -> None:
    """Biases begin at zero, and around a branch that adds nothing yet two of them have the same gradient: no copies."""
    mesh, rank = d.mesh_of(2), dist.get_rank()
    weight, bias = torch.full((3, 2), rank + 1.0).requires_grad_(), torch.zeros(3).requires_grad_()
    opt = SAM([weight, bias], torch.optim.SGD, rho=RHO, lr=LR, norm_group=mesh)
    weight.grad, bias.grad = torch.full((3, 2), rank + 1.0), torch.arange(1.0, 4.0)
    opt.first_step()
    norm = math.sqrt(6 * 1 + 6 * 4 + 2 * 14)
    assert (bias - RHO * bias.grad / norm).abs().max() <= 1e-7
    opt.abandon()
    whole = torch.zeros(3).requires_grad_()  # all that there is: replicas, as of LoRA whose B is zero
    opt = SAM([whole], torch.optim.SGD, rho=RHO, lr=LR, norm_group=mesh)
    whole.grad = torch.arange(1.0, 4.0)
    with pytest.raises(ValueError, match="not replicas"):
        opt.first_step()


def refused_by_sharpness() -> None:
    pipe = Pipe()
    with pytest.raises(TypeError, match="a ScheduleGPipe is no module; sharpness is not measured across pipeline stages"):
        sharpness(pipe.schedule, _loss, [d.batch(0)])


def refused_groups() -> None:
    """One clear error on every rank, before anything is written."""
    net = d.Net()
    mesh, rank = d.mesh_of(2), dist.get_rank()
    mine = [dist.new_group([i]) for i in range(2)]  # every rank is in one of them

    def sam(norm_group: Any, params: Any = None) -> SAM:
        return SAM(net.named_parameters() if params is None else params, torch.optim.SGD, lr=LR, norm_group=norm_group)

    with pytest.raises(ValueError, match="not in the group"):
        sam(mine[1 - rank])
    with pytest.raises(ValueError, match="not in the group"):
        sam(lambda name, p: mine[1 - rank] if name == "head.weight" else None)
    gone = dist.new_group([0, 1])
    dist.destroy_process_group(gone)
    with pytest.raises(ValueError, match="not registered"):
        sam(gone)
    with pytest.raises(TypeError, match="process group, a DeviceMesh"):
        sam("pp")
    with pytest.raises(TypeError, match="process group, a DeviceMesh"):
        sam(lambda name, p: 3)
    with pytest.raises(ValueError, match=r"no option of a parameter group.*SAM\(norm_group="):
        sam(None, [{"params": list(net.parameters()), "norm_group": mesh}])
    with pytest.raises(ValueError, match=r"ranks \[0, 1\].*twice for head.weight.*"):
        sam(lambda name, p: [mesh, dist.group.WORLD] if name == "head.weight" else None)
    sharded = d.Net()
    for placements in (None, [Replicate()]):
        if placements is None:
            fully_shard(sharded, mesh=mesh)
            params: Any = sharded.named_parameters()
        else:
            params = [nn.Parameter(distribute_tensor(torch.ones(3), mesh, placements))]
        with pytest.raises(ValueError, match=r"twice.*DTensor.*leave meshes of DTensors out"):
            sam(mesh, params)
    with pytest.raises(ValueError, match="ZerothOrderSAM does not serve norm_group"):
        SAM(net.parameters(), torch.optim.SGD, lr=LR, norm_group=mesh, variant=ZerothOrderSAM())
    # Replicas, and a tied weight whose copies have added up their gradients.
    opt = sam(mesh)
    d.loss_of(net, *d.batch(0)).backward()
    before = [d.part(p) for p in net.parameters()]
    with pytest.raises(ValueError, match=r"same values and gradient.*not replicas.*tied"):
        opt.first_step()
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
    pipe = Pipe()
    pipe.model.tied = nn.Parameter(torch.ones(5, 4, dtype=torch.float64))
    opt = pipe.sam()
    pipe.backward(0)
    pipe.model.tied.grad = torch.arange(20.0, dtype=torch.float64).view(5, 4)
    with pytest.raises(ValueError, match=r"shape \(5, 4\)"):
        opt.first_step()


def scaled_stages() -> None:
    """GradScaler: the step is the unscaled one, and an overflow of one stage's ascent shrinks every stage's scale."""
    pipe, weights = Pipe(), start()
    opt, scaler = pipe.sam(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    pipe.scale = 1024.0
    _, second, _ = d.equations(0, weights, RHO)
    scaler.scale(torch.ones(1))  # makes the scale; the schedule multiplies the loss itself
    for overflows in (False, True):
        pipe.backward(0)
        if overflows and pipe.number == 0:
            next(pipe.model.parameters()).grad.view(-1)[0] = math.inf
        opt.first_step(zero_grad=True)
        pipe.backward(0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        for name, p in pipe.names().items():
            assert (p - weights[name] + LR * second[name]).abs().max() <= 1e-12, (overflows, name)
    assert scaler.get_scale() == 512.0
    assert opt.skipped_steps == 1


def mesh_of_two_dimensions() -> None:
    """Each of four ranks holds a tensor of its own; the norm is over both dimensions of the mesh."""
    mesh, place = d.mesh_of(2, 2, names=("pp", "ep")), 1 + dist.get_rank()
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, rho=RHO, lr=LR, norm_group=mesh)
    w.grad = torch.full_like(w, place)
    opt.first_step()
    assert (w - RHO * place / math.sqrt(3 * (1 + 4 + 9 + 16))).abs().max() <= 1e-15
    assert abs(float(opt.report.intended_norm) - RHO) <= 1e-14


def recipes_of_stages_and_experts() -> None:
    """docs/distributed.md: both recipes run, and make the step of the equations."""
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    blocks = dict(re.findall(r"^### (.+?)\n(?:.*?)^```python\n(.*?)^```", text, re.M | re.S))
    mesh = d.mesh_of(2, 2, names=("pp", "dp"))
    scope: dict[str, Any] = {"Stage": Stage, "loss_fn": _loss, "batches": [d.mine(mesh["dp"], 0)], "device": "cpu"}
    exec(compile(blocks["Pipeline"], "docs/distributed.md, Pipeline", "exec"), scope)
    _, second, _ = d.equations(0, start(), RHO)
    for name, p in scope["model"].named_parameters():
        assert (d.whole(p) - start()[name] + LR * second[name]).abs().max() <= 1e-12, name
    expert_parallel.check_recipe(blocks["Experts"])


def ddp_inside() -> None:
    pipe = Pipe(Schedule1F1B, "ddp", micro=2)
    check(pipe, pipe.sam())


def fsdp2_inside() -> None:
    """A norm is summed over the shards of a stage first, then over the stages."""
    pipe = Pipe(ScheduleGPipe, "fsdp2", micro=2)
    opt = pipe.sam(adaptive=True, eta=0.01)
    assert {len(opt._reducer.key(p)) for p in opt.tensors()} == {2}
    check(pipe, opt, eta=0.01)
    pipe = Pipe(Schedule1F1B, "fsdp2", micro=2)  # gradients that backward has summed up are scaled by the schedule
    check(pipe, pipe.sam(norm="backward"))


def overflow_on_one_shard() -> None:
    """Of one stage, in the first pass alone or in the second: all four ranks skip the step."""
    for which in ("first", "second"):
        pipe = Pipe(ScheduleGPipe, "fsdp2", micro=2)
        opt = pipe.sam(variant=GSAM(alpha=0.3))
        before = {name: d.part(p) for name, p in pipe.names().items()}
        for turn in ("first", "second"):
            pipe.backward(0)
            if turn == which and dist.get_rank() == 3:
                next(pipe.model.parameters()).grad.to_local().view(-1)[0] = math.inf
            if turn == "first":
                opt.first_step(zero_grad=True)
        opt.second_step(zero_grad=True)
        assert opt.skipped_steps == 1, which
        assert all(torch.equal(d.part(p), before[name]) for name, p in pipe.names().items())


TWO = {
    case.__name__: case
    for case in (
        gpipe, one_forward_one_backward, two_stages_on_a_rank, group_by_function, variants, tram, nothing_in_scope_here,
        frozen_here, overflow_on_one_stage, other_stashes_and_kinds, stages_round_apart, scaled_stages, copies,
        refused_groups, refused_by_sharpness, alike_by_chance,
    )
}  # fmt: skip
FOUR = {
    **{
        case.__name__: case
        for case in (
            mesh_of_two_dimensions,
            ddp_inside,
            fsdp2_inside,
            overflow_on_one_shard,
            recipes_of_stages_and_experts,
        )
    },
    **expert_parallel.CASES,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, d.Outcome]:
    return {2: d.run(2, TWO), 4: d.run(4, FOUR)}


@pytest.mark.parametrize("name", TWO)
def test_two_processes(outcomes: dict[int, d.Outcome], name: str) -> None:
    outcomes[2].of(name)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(outcomes: dict[int, d.Outcome], name: str) -> None:
    outcomes[4].of(name)


def test_without_a_process_group_there_is_an_error() -> None:
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="init_process_group"):
        SAM([w], torch.optim.SGD, lr=LR, norm_group=lambda name, p: None)
