"""Training with SAM in several processes: DDP, windows, overflows, scaling, checkpoints; and what is refused."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastpost import SAM
from fastpost.distributed import no_sync, waiting_gradients
from fastpost.sam import GSAM, DecoupledWSAM, LookSAM, SAMWindow, StableSAM, ZerothOrderSAM

from . import distributed as d
from .test_sam_sharded import LR, RHO, backward_on, names_of, sam, sharded


def everywhere(value: torch.Tensor) -> list[torch.Tensor]:
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value.contiguous())
    return gathered


def same_everywhere(model: nn.Module) -> bool:
    values = torch.cat([d.whole(p).flatten() for p in model.parameters()])
    return all(torch.equal(other, values) for other in everywhere(values))


def ddp_averaged() -> None:
    mesh = d.mesh_of(dist.get_world_size())
    for sync_ascent in (None, True):
        model = DistributedDataParallel(d.Net())
        opt = sam(model, sync_ascent=sync_ascent)
        d.check_steps(model, opt, backward_on(model, mesh), names_of(model), LR, RHO)


def _m_sharpness(number: int, weights: dict) -> dict:
    """The mean over ranks of each one's second gradient at its own w + e: 2010.01412, section 3, with m = batch / ranks."""

    def gradient(at: dict, x, y) -> dict:
        leaves = {name: w.clone().requires_grad_() for name, w in at.items()}
        logits = torch.func.functional_call(d.Net(), leaves, (x,)).flatten(0, 1)
        grads = torch.autograd.grad(nn.functional.cross_entropy(logits, y.flatten()), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    ranks, (x, y) = dist.get_world_size(), d.batch(number)
    mean = {name: torch.zeros_like(w) for name, w in weights.items()}
    for xs, ys in zip(x.chunk(ranks), y.chunk(ranks), strict=True):
        g = gradient(weights, xs, ys)
        norm = sum(v.square().sum() for v in g.values()).sqrt()
        second = gradient({name: weights[name] + RHO * g[name] / norm for name in g}, xs, ys)
        mean = {name: mean[name] + second[name] / ranks for name in mean}
    return mean


def ddp_each_its_own() -> None:
    """sync_ascent=False by hand and through a window: m-sharpness, and the ranks stay together."""
    mesh = d.mesh_of(dist.get_world_size())
    for windowed in (False, True):
        model = DistributedDataParallel(d.Net())
        opt, names = sam(model, sync_ascent=False), names_of(model)
        backward = backward_on(model, mesh)
        window = SAMWindow(opt, backward, no_sync=model.no_sync)
        for number in range(2):
            weights = {name: d.whole(p) for p, name in names.items()}
            second = _m_sharpness(number, weights)
            if windowed:
                window.run([number])
                opt.step()
            else:
                with model.no_sync():
                    backward(number)
                opt.first_step(zero_grad=True)
                perturbed = torch.cat([p.detach().flatten() for p in names])
                assert not torch.equal(*everywhere(perturbed))
                backward(number)
                opt.second_step(zero_grad=True)
            assert all((d.whole(p) - weights[n] + LR * second[n]).abs().max() <= 1e-12 for p, n in names.items())
            assert same_everywhere(model)


def windows() -> None:
    """Four micro-batches, the ascent on the first: equal to the equations, with and without synchronising each."""
    mesh = d.mesh_of(dist.get_world_size())
    for strategy in ("ddp", "fsdp2"):
        for unsynchronised in (True, False):
            model = DistributedDataParallel(d.Net()) if strategy == "ddp" else sharded(mesh)
            opt, names = sam(model, ascent_fraction=0.25), names_of(model)
            wait = (lambda model=model: no_sync(model)) if unsynchronised else None

            def forward_backward(number: int, model: nn.Module = model):
                loss = d.loss_of(model, *d.mine(mesh, number)) / 4
                loss.backward()
                return loss.detach()

            window = SAMWindow(opt, forward_backward, no_sync=wait)
            weights = {name: d.whole(p) for p, name in names.items()}
            e, _, _ = d.equations(0, weights, RHO)  # the factor 1/4 falls out of g / |g|
            mean = {name: torch.zeros_like(w) for name, w in weights.items()}
            for number in range(4):
                x, y = d.batch(number)
                leaves = {name: (weights[name] + e[name]).requires_grad_() for name in weights}
                logits = torch.func.functional_call(d.Net(), leaves, (x,)).flatten(0, 1)
                grads = torch.autograd.grad(nn.functional.cross_entropy(logits, y.flatten()), list(leaves.values()))
                mean = {name: mean[name] + g / 4 for (name, g) in zip(leaves, grads, strict=True)}
            window.run([0, 1, 2, 3])
            opt.step()
            for p, name in names.items():
                assert (d.whole(p) - weights[name] + LR * mean[name]).abs().max() <= 1e-12, (strategy, unsynchronised, name)


def per_micro_batch() -> None:
    """m-SAM over micro-batches of all ranks: each ascends on its own, the second gradients add up."""
    mesh = d.mesh_of(dist.get_world_size())
    for strategy in ("ddp", "fsdp2"):
        for waits in (False, True):
            for sync_ascent in (None, True, False) if strategy == "ddp" and waits else (None, True):
                model = DistributedDataParallel(d.Net()) if strategy == "ddp" else sharded(mesh)
                if strategy == "fsdp2":  # as loaders do: FSDP2 knows these parameters from its first forward pass on
                    for module in model.modules():
                        for name, p in module.named_parameters(recurse=False):
                            setattr(module, name, nn.Parameter(p.detach().clone()))
                opt, names = sam(model, sync_ascent=sync_ascent), names_of(model)
                weights = {name: d.whole(p) for p, name in names.items()}
                mean = {name: torch.zeros_like(w) for name, w in weights.items()}
                for number in range(3):
                    alone = sync_ascent is False
                    second = _m_sharpness(number, weights) if alone else d.equations(number, weights, RHO)[1]
                    mean = {name: mean[name] + second[name] / 3 for name in mean}

                def backward(number: int, model: nn.Module = model) -> None:
                    (d.loss_of(model, *d.mine(mesh, number)) / 3).backward()

                wait = (lambda model=model: no_sync(model)) if waits else None
                SAMWindow(opt, backward, per_micro_batch=True, no_sync=wait).run([0, 1, 2])
                opt.step()
                for p, name in names.items():
                    apart = (d.whole(p) - weights[name] + LR * mean[name]).abs().max()
                    assert apart <= 1e-12, (strategy, waits, sync_ascent, name)
    found = []
    for views in (False, True):  # one gradient that fills its bucket
        torch.manual_seed(3)
        head = DistributedDataParallel(nn.Linear(12, 3, bias=False, dtype=torch.float64), gradient_as_bucket_view=views)
        opt = sam(head)
        step = SAMWindow(opt, lambda n, m=head: (d.loss_of(m, *d.mine(mesh, n)) / 2).backward(), per_micro_batch=True)
        for _ in range(2):
            step.run([0, 1])
            opt.step()
            opt.zero_grad()
        found.append(head.module.weight.detach().clone())
    assert (found[0] - found[1]).abs().max() <= 1e-12


class Branches(nn.Module):
    """A branch that some batches do not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.often = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))

    def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return self.always(x) + (self.often(x) if number % 2 == 0 else 0)


def per_micro_batch_with_unused_parameters() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = torch.randn(4, ranks, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    exact = Branches()
    expected = [torch.zeros_like(p) for p in exact.parameters()]

    def gradients(number: int) -> list[torch.Tensor]:
        loss = sum(exact(x, number).square().mean() for x in inputs[number]) / ranks
        found = torch.autograd.grad(loss, list(exact.parameters()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(exact.parameters(), found, strict=True)]

    for number in range(4):
        g = gradients(number)
        norm = torch.stack([t.norm() for t in g]).norm()
        e = [RHO * t / norm for t in g]
        with torch.no_grad():
            torch._foreach_add_(list(exact.parameters()), e)
        expected = [a + b for a, b in zip(expected, gradients(number), strict=True)]
        with torch.no_grad():
            torch._foreach_sub_(list(exact.parameters()), e)
    for waits in (False, True):
        model = DistributedDataParallel(Branches(), find_unused_parameters=True)
        opt = sam(model)

        def backward(number: int, model: nn.Module = model) -> None:
            model(inputs[number][rank], number).square().mean().backward()

        SAMWindow(opt, backward, per_micro_batch=True, no_sync=model.no_sync if waits else None).run(range(4))
        for p, g in zip(model.parameters(), expected, strict=True):
            assert (p.grad - g).abs().max() <= 1e-12, waits


def given_up_before_reducing() -> None:
    """What FSDP2 has not reduced of a step that was given up is gone too, and the next step does not know of it."""
    mesh = d.mesh_of(dist.get_world_size())
    found = []
    for how in ("", "abort", "close", "abandon", "zero_grad", "open"):
        model = sharded(mesh)
        opt = sam(model)

        def backward(number: int, model: nn.Module = model) -> None:
            (d.loss_of(model, *d.mine(mesh, number)) / 2).backward()

        window = SAMWindow(opt, backward, no_sync=lambda model=model: no_sync(model))
        if how in ("abort", "close"):
            window.open(3)
            window.feed(2)
            with pytest.raises(RuntimeError, match="closed after 1 of 3") if how == "close" else contextlib.nullcontext():
                getattr(window, how)()
        elif how:
            with no_sync(model):
                backward(2)
            with pytest.raises(RuntimeError, match=r"FSDP2 has not reduced.*outside no_sync"):
                opt.first_step()
        if how in ("abandon", "zero_grad"):
            getattr(opt, how)()
        assert how == "open" or not waiting_gradients(model.parameters())
        window.run([0, 1])
        found.append([d.whole(p.grad) for p in model.parameters()])
    for others in found[1:]:
        assert all(torch.equal(g, h) for g, h in zip(found[0], others, strict=True))


def swapped_after_construction() -> None:
    """As Accelerate does with FSDP2: the optimizer is built first, then its groups get the sharded parameters."""
    mesh = d.mesh_of(dist.get_world_size())
    model = d.Net()
    opt = sam(model)
    backward_on(model, None)(0)
    opt.first_step(zero_grad=True)
    opt.restore_()  # buckets of the whole parameters are known by now
    opt.zero_grad()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    opt.param_groups[0]["params"] = list(model.parameters())
    d.check_steps(model, opt, backward_on(model, mesh), names_of(model), LR, RHO)


def overflow_on_one_rank() -> None:
    mesh = d.mesh_of(dist.get_world_size())
    for strategy in ("ddp", "fsdp2", "mixed"):
        for which in ("first", "second"):
            if strategy == "ddp":
                model: nn.Module = DistributedDataParallel(d.Net())
            elif strategy == "fsdp2":
                model = sharded(mesh)
            else:
                model = d.Net()
                for block in model.blocks:
                    fully_shard(block, mesh=mesh)
            opt = SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2)
            before = [d.part(p) for p in model.parameters()]
            # "mixed": in a plain parameter, whose norm is not reduced, so that only the verdict is shared.
            target = list(model.parameters())[-1 if strategy == "mixed" else 0]
            for turn in ("first", "second"):
                if strategy == "ddp" and turn == "first":
                    with no_sync(model):  # each rank's own: only one of them overflows
                        backward_on(model, mesh)(0)
                else:
                    backward_on(model, mesh)(0)
                if strategy == "mixed":
                    for p in model.head.parameters():
                        dist.all_reduce(p.grad)
                grad = target.grad.to_local() if isinstance(target.grad, DTensor) else target.grad
                if turn == which and (dist.get_rank() == 1 or (strategy == "ddp" and which == "second")):
                    grad.view(-1)[0] = math.inf
                if turn == "first":
                    opt.first_step(zero_grad=True)
            opt.second_step(zero_grad=True)
            assert opt.skipped_steps == 1, (strategy, which)
            assert all(torch.equal(d.part(p), b) for p, b in zip(model.parameters(), before, strict=True))
            d.reshard(model)


def scaled() -> None:
    """GradScaler over FSDP2: the step is the unscaled one; an overflow of one rank's ascent shrinks every scale."""
    mesh = d.mesh_of(dist.get_world_size())
    model = sharded(mesh)
    opt, names = sam(model), names_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = {name: d.whole(p) for p, name in names.items()}
    _, second, _ = d.equations(0, weights, RHO)
    for unscales in (False, True):
        weights = {name: d.whole(p) for p, name in names.items()}
        _, second, _ = d.equations(0, weights, RHO)
        scaler.scale(d.loss_of(model, *d.mine(mesh, 0))).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(d.loss_of(model, *d.mine(mesh, 0))).backward()
        if unscales:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert all((d.whole(p) - weights[n] + LR * second[n]).abs().max() <= 1e-12 for p, n in names.items())
    before = [d.part(p) for p in names]
    scaler.scale(d.loss_of(model, *d.mine(mesh, 0))).backward()
    if dist.get_rank() == 1:
        next(iter(names)).grad.to_local().view(-1)[0] = math.inf
    opt.first_step(zero_grad=True)
    scaler.scale(d.loss_of(model, *d.mine(mesh, 0))).backward()
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(d.part(p), b) for p, b in zip(names, before, strict=True))
    assert scaler.get_scale() == 512.0
    assert opt.skipped_steps == 1


def seen_through_mixed_precision() -> None:
    """The forward computes with bfloat16 casts of float32 shards, and the report says what it sees of e."""
    mesh = d.mesh_of(dist.get_world_size())
    model = sharded(mesh, torch.float32, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    opt = sam(model, rho=1e-3)
    weights = [d.whole(p) for p in model.parameters()]
    d.loss_of(model, *d.mine(mesh, 0, torch.float32)).backward()
    opt.first_step()
    now = [d.whole(p) for p in model.parameters()]
    seen = sum(
        (b.bfloat16().double() - a.bfloat16().double()).square().sum() for a, b in zip(weights, now, strict=True)
    ).sqrt()
    report = opt.report
    assert abs(report.seen_norm / seen - 1) <= 1e-6
    assert report.seen_norm > 1.5 * report.stored_norm
    opt.restore_()
    assert all(torch.equal(d.whole(p), w) for p, w in zip(model.parameters(), weights, strict=True))
    # Casts to a wider dtype lose nothing: what is stored is seen.
    model = sharded(mesh, torch.float32, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float64))
    opt = sam(model)
    for _ in range(2):
        d.loss_of(model, *d.mine(mesh, 0, torch.float32)).backward()
        opt.first_step(zero_grad=True)
        d.loss_of(model, *d.mine(mesh, 0, torch.float32)).backward()
        opt.second_step(zero_grad=True)
        assert opt.report.seen_norm == opt.report.stored_norm


def checkpoints() -> None:
    """Saved, loaded into a fresh optimizer and continued: bit for bit the uninterrupted run, with a variant's memory."""
    mesh = d.mesh_of(dist.get_world_size())

    def make():
        model = sharded(mesh, torch.float32)
        variant = LookSAM()
        return model, SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-2, interval=2, variant=variant)

    def step(model: nn.Module, opt: SAM, number: int) -> None:
        def closure() -> torch.Tensor:
            loss = d.loss_of(model, *d.mine(mesh, number, torch.float32))
            loss.backward()
            return loss

        opt.step(closure)

    model, opt = make()
    for number in range(3):
        step(model, opt, number)
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    state = get_optimizer_state_dict(model, opt)
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=shared[0])
    again, resumed = make()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    loaded = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, resumed)}
    dcp.load(loaded, checkpoint_id=shared[0])
    again.load_state_dict(loaded["model"])
    set_optimizer_state_dict(again, resumed, loaded["optimizer"])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(shared[0])
    for number in range(3, 7):
        step(model, opt, number)
        step(again, resumed, number)
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(d.part(p).view(torch.int32), d.part(q).view(torch.int32)), number


def stochastic_rounding() -> None:
    """Shards of one tensor round by random numbers of their own, replicas by the same ones."""
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    replica = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(replica.weight)
    fully_shard(layer, mesh=d.mesh_of(dist.get_world_size()))
    for net, differ in ((layer, True), (replica, False)):
        opt = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=LR, rounding="stochastic")
        net.weight.grad = torch.ones_like(net.weight)
        opt.first_step()
        mine = d.part(net.weight).clone()
        assert bool((mine != 1).any())
        assert bool((mine == 1).any())
        others = [other for i, other in enumerate(everywhere(mine)) if i != dist.get_rank()]
        assert all(torch.equal(mine, other) != differ for other in others)
        opt.restore_()
        assert bool((d.part(net.weight) == 1).all())


def running_statistics() -> None:
    """DDP hands the first rank's buffers to all before each forward pass. Second passes leave no trace in them: at a
    learning rate of 0 they are those of a run without SAM."""
    found = []
    for with_sam in (False, True):
        torch.manual_seed(4)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)))
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        opt = SAM(None, base, rho=RHO, model=model) if with_sam else base
        for x in torch.randn(3, 2, 6, 4)[:, dist.get_rank()]:
            model(x).square().mean().backward()
            if with_sam:
                opt.first_step(zero_grad=True)
                model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        norm = model.module[1]
        assert int(norm.num_batches_tracked) == 3
        found.append(torch.cat([norm.running_mean, norm.running_var]))
    assert torch.equal(*found)
    assert not torch.equal(found[0][:3], torch.zeros(3))


def refused() -> None:
    mesh = d.mesh_of(dist.get_world_size())
    for whole in (False, True):
        old = FullyShardedDataParallel(d.Net(torch.float32), use_orig_params=whole, device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
            sam(old)
    plain = d.Net()
    zero = ZeroRedundancyOptimizer(plain.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"ZeRO.*fully_shard"):
        SAM(None, zero)
    plain.head.weight.ds_id = 0
    with pytest.raises(TypeError, match=r"DeepSpeed.*fully_shard"):
        sam(plain)
    with pytest.raises(ValueError, match=r"sync_ascent=False.*DDP"):
        sam(sharded(mesh), sync_ascent=False)
    for variant in (GSAM(), StableSAM(), LookSAM()):
        with pytest.raises(ValueError, match=rf"sync_ascent=False .* {type(variant).__name__} would mix it"):
            sam(DistributedDataParallel(d.Net()), sync_ascent=False, variant=variant)
    half = sharded(mesh, torch.bfloat16)
    masters = [p.detach().float() for p in half.parameters()]
    with pytest.raises(TypeError, match=r"master_params.*MixedPrecisionPolicy"):
        sam(half, master_params=masters)
    with pytest.raises(ValueError, match="DTensor"):
        SAM(half.parameters(), torch.optim.SGD, lr=LR, perturb="functional", model=half)
    with pytest.raises(TypeError, match="neither"), no_sync(d.Net()):
        pass


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([d.whole(p).flatten() for p in model.parameters()])


def zeroth_order() -> None:
    """DDP and FSDP2: one z on all ranks, each shard its part, and losses averaged over ranks."""
    mesh, mu = d.mesh_of(dist.get_world_size()), 1e-3
    for model in (DistributedDataParallel(d.Net()), sharded()):
        zeroth = ZerothOrderSAM(2, mu)
        opt = sam(model, variant=zeroth)
        for number in range(2):
            w, at, values = _flat(model), [], []

            def loss(number: int = number, model: nn.Module = model, at: list = at, values: list = values) -> torch.Tensor:
                at.append(_flat(model))
                value = d.loss_of(model, *d.mine(mesh, number))
                values.append(torch.stack(everywhere(value.detach())).mean())
                return value

            zeroth.estimate(opt, loss)
            assert torch.equal(_flat(model), w)
            assert all(torch.equal(at[0], other) for other in everywhere(at[0]))
            slopes = [(plus - minus) / (2 * mu) for plus, minus in zip(values[::2], values[1::2], strict=True)]
            direction = sum(slope * (there - w) / mu for slope, there in zip(slopes, at[::2], strict=True)) / 2
            opt.first_step()
            torch.testing.assert_close(_flat(model) - w, RHO * direction / direction.norm(), rtol=1e-9, atol=1e-12)
            d.loss_of(model, *d.mine(mesh, number)).backward()
            opt.second_step(zero_grad=True)
            d.reshard(model)


def decoupled() -> None:
    """Decoupled WSAM on shards, against one process with the whole batch."""
    mesh, model, whole = d.mesh_of(dist.get_world_size()), sharded(), d.Net()
    opts = []
    for m in (model, whole):
        variant = DecoupledWSAM(0.8)
        opts.append(SAM(m.parameters(), torch.optim.AdamW, rho=RHO, lr=LR, variant=variant))
        variant.attach(opts[-1])
    for number in range(2):
        for m, opt, data in ((model, opts[0], d.mine(mesh, number)), (whole, opts[1], d.batch(number))):
            d.loss_of(m, *data).backward()
            opt.first_step(zero_grad=True)
            d.loss_of(m, *data).backward()
            opt.second_step(zero_grad=True)
        d.reshard(model)
        torch.testing.assert_close(_flat(model), _flat(whole), rtol=1e-9, atol=1e-10)
    before = _flat(model)
    for factor in (1.0, float("inf") if dist.get_rank() == 1 else 1.0):  # on one rank, in the second pass
        (d.loss_of(model, *d.mine(mesh, 2)) * factor).backward()
        if not opts[0].is_perturbed:
            opts[0].first_step(zero_grad=True)
    opts[0].second_step()
    assert opts[0].skipped_steps == 1
    d.reshard(model)
    torch.testing.assert_close(_flat(model), before, rtol=0, atol=0)


CASES = {
    case.__name__: case
    for case in (
        ddp_averaged, ddp_each_its_own, windows, per_micro_batch, per_micro_batch_with_unused_parameters,
        given_up_before_reducing,
        swapped_after_construction, overflow_on_one_rank, scaled, seen_through_mixed_precision, checkpoints,
        stochastic_rounding, running_statistics,
        zeroth_order, decoupled, refused,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome() -> d.Outcome:
    return d.run(2, CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(outcome: d.Outcome, name: str) -> None:
    outcome.of(name)
