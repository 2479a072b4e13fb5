"""SAM(norm="backward"): the norm that hooks sum up is that of the gradients which are there, whatever became of them."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from fastpost import SAM, SAMWindow
from fastpost.ops import params as ops
from fastpost.sam import GSAM, TRAM, FriendlySAM, MomentumSAM, SampledLayers
from fastpost.sam.backward_norm import BackwardNorm, Norms
from fastpost.sam.buckets import ShardReducer

from . import distributed as d
from .conftest import CPU_BACKENDS, same_bits
from .small import X, all_bits, closure_of, loss_of, network, unchanged

BITS = "cpu" in CPU_BACKENDS  # elsewhere both norms add up in orders of their own
SIZES = (600_000, 70_000, 5, 65_536, 1, 131_073, 600, 0)
RHO = 0.3


def tensors(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(n).to(dtype)) for n in SIZES]


def sam(params: Any, norm: str = "backward", **options: Any) -> SAM:
    return SAM(params, torch.optim.SGD, lr=0.1, **{"rho": RHO, "norm": norm, **options})


def backward(params: list[nn.Parameter], order: tuple[int, ...] | None = None) -> None:
    """Gradients of a fixed function, which arrive in an order that depends on how the graph was made."""
    total = torch.zeros(())
    for i in order or range(len(params)):
        total = total + (params[i].float() * (i + 1) * 0.01).sin().sum()
    total.backward()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements were summed up, call by call."""
    calls: list[int] = []
    plain = ops.chunk_squares

    def spy(grads: Any) -> Any:
        calls.append(sum(g.numel() for g in grads))
        return plain(grads)

    monkeypatch.setattr(ops, "chunk_squares", spy)
    return calls


def perturbed(params: list[nn.Parameter], norm: str, make: Callable[[list[nn.Parameter]], None]) -> list[Tensor]:
    """w + e after what `make` does to a copy of the parameters."""
    mine = copy.deepcopy(params)
    opt = sam(mine, norm)
    make(mine)
    opt.first_step()
    return [p.detach().clone() for p in mine]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for one, other in zip(a, b, strict=True):
        assert same_bits(one, other) if BITS else torch.allclose(one.float(), other.float(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_in_which_hooks_fire_changes_no_bit_and_the_norm_is_the_step_s(
    dtype: torch.dtype, read: list[int]
) -> None:
    params = tensors(dtype)
    inside = perturbed(params, "backward", backward)
    assert len(read) > 1 or dtype == torch.bfloat16  # whose gradients all fit, until the largest comes last
    assert sum(read) == sum(SIZES)
    for order in itertools.islice(itertools.permutations(range(len(SIZES))), 0, 40_320, 5041):
        other = perturbed(params, "backward", lambda mine, order=order: backward(mine, order))
        assert all(same_bits(a, b) for a, b in zip(inside, other, strict=True))
    assert_equal(inside, perturbed(params, "step", backward))


def test_e_is_that_of_the_equation_in_float64() -> None:
    params = tensors(torch.float64)
    opt = sam(params)
    before = [p.detach().clone() for p in params]
    backward(params)
    gradients = [p.grad.clone() for p in params]
    norm = math.sqrt(math.fsum(float(g.double().square().sum()) for g in gradients))
    opt.first_step()
    for p, w, g in zip(params, before, gradients, strict=True):
        assert torch.allclose(p, w + RHO * g / norm, rtol=0, atol=1e-6 * RHO / norm)


def zeroed(params: list[nn.Parameter]) -> None:
    params[0].grad.zero_()


def clipped(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 0.01)


def replaced(params: list[nn.Parameter]) -> None:
    params[1].grad = params[1].grad * 3


def taken_away(params: list[nn.Parameter]) -> None:
    params[0].grad = None


def edited(params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        params[3].grad[7] += 100


def elsewhere(params: list[nn.Parameter]) -> None:
    params[0].grad.data = params[0].grad.data * 5


def assigned(params: list[nn.Parameter]) -> None:
    gradients = [torch.ones_like(p) for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g


@pytest.mark.parametrize("change", [zeroed, clipped, replaced, taken_away, edited, elsewhere, assigned])
def test_a_gradient_that_changed_is_summed_up_anew(change: Callable[[list[nn.Parameter]], None]) -> None:
    def make(params: list[nn.Parameter]) -> None:
        backward(params)
        change(params)

    params = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(perturbed(params, "backward", make), perturbed(params, "step", make))


@pytest.mark.parametrize("factor", [3.0, 0.0])
def test_writing_that_autograd_does_not_see_is_found_in_what_perturbing_reads(factor: float) -> None:
    def make(params: list[nn.Parameter]) -> None:
        backward(params)
        params[0].grad.data.mul_(factor)

    params = tensors()
    with pytest.warns(UserWarning, match=r"\.grad\.data"):
        inside = perturbed(params, "backward", make)
    assert_equal(inside, perturbed(params, "step", make))


def test_gradients_that_a_scaler_unscales_are_summed_up_anew() -> None:
    found = []
    for norm in ("backward", "step"):
        params = tensors()
        opt = sam(params, norm)
        backward(params)
        for p in params[:3]:
            p.grad.mul_(2.0**10)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaler.unscale_(opt)
            opt.first_step()
        found.append([p.detach().clone() for p in params])
    assert_equal(*found)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_whose_gradient_is_not_finite_is_skipped(bad: float) -> None:
    model = network()
    opt = sam(model.parameters())
    before = all_bits(model)
    closure_of(model)()
    model[0].weight.register_hook(lambda g: g * bad)
    opt.zero_grad()
    closure_of(model)()
    opt.first_step(zero_grad=True)
    closure_of(model)()
    opt.second_step()
    assert opt.skipped_steps == 1
    assert unchanged(model, before)


def trained(norm: str, step: Callable[[SAM, nn.Module], None], **options: Any) -> nn.Module:
    model = network()
    opt = sam(model.named_parameters(), norm, **options)
    for _ in range(3):
        step(opt, model)
    return model


def by_closure(opt: SAM, model: nn.Module) -> None:
    opt.step(closure_of(model))


def accumulated(opt: SAM, model: nn.Module) -> None:
    for x in X.split(8):
        (model(x).square().mean() / 4).backward()
    opt.first_step(zero_grad=True)
    loss_of(model).backward()
    opt.second_step(zero_grad=True)


def windowed(opt: SAM, model: nn.Module, **options: Any) -> None:
    window = SAMWindow(opt, lambda x: (model(x).square().mean() / 4).backward(), **options)
    window.run(X.split(8))
    opt.step()


def checkpointed(opt: SAM, model: nn.Module) -> None:
    """Reentrant: passes within the pass, of which each brings gradients."""

    def closure() -> Tensor:
        hidden = checkpoint(model[0], X.clone().requires_grad_(), use_reentrant=True)
        loss = model[3](checkpoint(model[2], hidden, use_reentrant=True)).square().mean()
        loss.backward()
        return loss

    opt.step(closure)


WAYS: dict[str, Callable[[SAM, nn.Module], None]] = {
    "closure": by_closure,
    "accumulated": accumulated,
    "window": lambda opt, model: windowed(opt, model),
    "part of a window": lambda opt, model: windowed(opt, model, ascent_fraction=0.5),
    "m-SAM": lambda opt, model: windowed(opt, model, per_micro_batch=True),
    "checkpointing": checkpointed,
}


@pytest.mark.parametrize(
    "options",
    [{}, {"scope": ["3.*"]}, {"interval": 2}, {"variant": GSAM()}, {"perturb": "functional"}, {"stash": "ulp"}],
    ids=lambda options: ",".join(options),
)
def test_training_is_that_of_the_other_norm(options: dict[str, Any]) -> None:
    models = []
    for norm in ("backward", "step"):
        given = {"model": network()} if "perturb" in options else {}
        model = given.get("model", network())
        opt = sam(model.named_parameters(), norm, **options, **given)
        for _ in range(3):
            by_closure(opt, model)
        models.append(model)
    assert_equal(*(list(model.parameters()) for model in models))


@pytest.mark.parametrize("way", WAYS)
def test_however_the_passes_are_made(way: str) -> None:
    assert_equal(*(list(trained(norm, WAYS[way]).parameters()) for norm in ("backward", "step")))


def test_a_radius_of_a_variant_s_own() -> None:
    found = []
    for norm in ("backward", "step"):
        model, variant = network(), TRAM()
        opt = sam(model.parameters(), norm, variant=variant, rho=1.0)
        closure_of(model)()
        variant.observe(torch.tensor(0.25))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.first_step()
        found.append(list(model.parameters()))
    assert_equal(*found)


def test_only_what_an_ascent_needs_is_read(read: list[int]) -> None:
    size = sum(p.numel() for p in network().parameters())
    trained("backward", by_closure)
    assert sum(read) == 3 * size
    read.clear()
    trained("backward", by_closure, interval=2)
    assert sum(read) == 2 * size
    read.clear()
    trained("backward", WAYS["part of a window"])
    assert sum(read) == 3 * size
    read.clear()
    trained("backward", by_closure, scope=["3.bias"])
    assert sum(read) == 3 * 3


def test_large_gradients_are_read_when_they_arrive_and_not_again(read: list[int]) -> None:
    params = tensors()
    opt = sam(params)
    for _ in range(2):
        backward(params)
        assert sum(read) >= 600_000
        opt.first_step(zero_grad=True)
        assert sum(read) == sum(SIZES)
        opt.restore_()
        opt.step()
        read.clear()


def test_a_group_that_is_added_and_a_state_that_is_loaded() -> None:
    found = []
    for norm in ("backward", "step"):
        model, added = network(), tensors()
        opt = sam(model.parameters(), norm)
        by_closure(opt, model)
        opt.add_param_group({"params": added, "rho": 0.7})
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.zero_grad()
        backward(added)
        closure_of(model)()
        opt.first_step()
        found.append([*model.parameters(), *added])
    assert_equal(*found)


def hooks_of(params: Iterator[nn.Parameter]) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in params)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_have_hooks_of_their_own_and_none_are_left_behind(duplicate: Callable[[Any], Any]) -> None:
    model = network()
    opt = sam(model.parameters())
    closure_of(model)()
    assert hooks_of(model.parameters()) == 4
    other, its = duplicate((model, opt))
    assert hooks_of(other.parameters()) == 4
    for one, optimizer in ((model, opt), (other, its)):
        optimizer.zero_grad()
        by_closure(optimizer, one)
    assert_equal(list(model.parameters()), list(other.parameters()))
    opt.abandon()
    del opt, optimizer
    gc.collect()
    assert hooks_of(model.parameters()) == 0


def test_what_contradicts_it_is_refused() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    for options, words in (
        ({"norm": "backwards"}, "Did you mean 'backward'"),
        ({"adaptive": True}, "ASAM"),
        ({"variant": FriendlySAM()}, "FriendlySAM makes a direction of its own"),
        ({"variant": MomentumSAM()}, "MomentumSAM makes a direction of its own"),
        ({"scope": SampledLayers(nn.ModuleDict({"layers": layers}))}, "SampledLayers says it at the ascent"),
    ):
        with pytest.raises(ValueError, match=words):
            sam(layers.parameters(), **options)
    opt = sam(layers[0].parameters())
    with pytest.raises(ValueError, match="ASAM"):
        opt.add_param_group({"params": list(layers[1].parameters()), "adaptive": True})
    assert len(opt.param_groups) == 1
    layers[0](torch.ones(1, 2)).sum().backward()
    opt.param_groups[0]["adaptive"] = True
    before = [p.detach().clone() for p in layers[0].parameters()]
    with pytest.raises(ValueError, match="ASAM"):
        opt.first_step()
    assert_equal(before, list(layers[0].parameters()))


# -- in two processes --------------------------------------------------------------------------------------------------


def replicas_are_refused() -> None:
    model = nn.parallel.DistributedDataParallel(d.Net(torch.float32))
    with pytest.raises(ValueError, match="exchange their gradients after they have been accumulated"):
        sam(model.parameters())


def shards_are_summed_up_as_they_are_reduced() -> None:
    found, size = [], d.dist.get_world_size()
    mesh = d.mesh_of(size)
    for norm in ("backward", "step"):
        torch.manual_seed(5)
        model = d.Net(torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = sam(model.parameters(), norm)
        calls: list[int] = []
        plain = ops.chunk_squares
        ops.chunk_squares = lambda grads, calls=calls, plain=plain: calls.append(len(grads)) or plain(grads)
        try:
            for step in range(3):
                opt.zero_grad()
                d.loss_of(model, *d.mine(mesh, step, torch.float32)).backward()
                noted = opt._backward_norm and sum(map(len, opt._backward_norm._noted.values()))
                opt.first_step(zero_grad=True)
                d.loss_of(model, *d.mine(mesh, step, torch.float32)).backward()
                opt.second_step()
        finally:
            ops.chunk_squares = plain
        if norm == "backward":
            held = len(list(model.parameters()))
            assert noted == held, (noted, held)  # FSDP2 calls the hooks with the reduced shards
            assert sum(calls) == 3 * held
        found.append([p.to_local().detach().clone() for p in model.parameters()])
    assert_equal(*found)


def test_in_two_processes() -> None:
    cases = {"ddp": replicas_are_refused, "fsdp2": shards_are_summed_up_as_they_are_reduced}
    outcome = d.run(2, cases)
    for name in cases:
        outcome.of(name)


def test_with_masters_the_norm_is_that_of_the_weights_gradients() -> None:
    """Two steps, bit for bit those of norm="step": hooks are on the 16-bit weights, which get the gradients."""
    done = []
    for norm in ("step", "backward"):
        params = tensors(torch.bfloat16)
        masters = [p.detach().float() for p in params]
        opt = SAM(params, torch.optim.SGD, lr=0.1, rho=RHO, norm=norm, master_params=masters)
        for _ in range(2):
            backward(params)
            opt.first_step(zero_grad=True)
            backward(params)
            opt.second_step(zero_grad=True)
        done.append([*(p.detach() for p in params), *masters])
    assert_equal(*done)


class LastOfTwo(ShardReducer):
    """What a reducer of two ranks knows on one of them: this is what the other has to say.

    Args:
        stale: whether the other's norms are stale.
        sums: of the other.
    """

    others = True

    def __init__(self, stale: bool = False, sums: Tensor | None = None) -> None:
        super().__init__()
        self.made: list[str] = []
        self.sums = sums
        self._stale = stale

    def total(self, parts: Any, shape: tuple[int, ...] = ()) -> Tensor:
        self.made.append(f"sum of {shape}")
        found = [part for _, part in parts] + ([] if self.sums is None else [self.sums])
        self.sums = torch.stack(found).sum(0)
        return self.sums

    def agree(self, flag: Tensor) -> Tensor:
        self.made.append("agree")
        return torch.maximum(flag, flag.new_tensor(self._stale))


def test_norms_that_are_stale_on_another_rank_are_stale_here() -> None:
    one = torch.ones((), dtype=torch.float64)
    norms = Norms(one, one, one, True)
    sums = torch.ones(6, dtype=torch.float64)
    assert not norms.are_stale(sums, ShardReducer())
    with pytest.warns(UserWarning, match="gradients were written after backward"):
        assert norms.are_stale(sums, LastOfTwo(stale=True))


class OnADevice(Tensor):
    """A tensor that says it is not on the CPU."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]


class Summed(BackwardNorm):
    """Of a rank whose only bucket has this sum of squares; of one without buckets where there is none."""

    def __init__(self, reducer: ShardReducer, squares: Tensor | None) -> None:
        super().__init__(reducer)
        self.squares = squares

    def _squares(self, b: Any) -> Tensor:
        assert self.squares is not None
        return self.squares

    def ascend(self, factor: float) -> tuple[Norms | None, Tensor | None]:
        """The norms, and what they are judged to be where perturbing reads `factor` times these squares."""
        bucket, setting = SimpleNamespace(key=(), device_type="xpu"), SimpleNamespace(rho=1.0)
        there = self.squares is not None
        norms = self.norms([bucket] if there else [], [setting] if there else [])  # type: ignore[list-item]
        if norms is None:
            return None, None
        ee = factor * norms.squared / norms.squared
        assert not norms.are_stale(ee.reshape(1), self._reducer)
        return norms, norms.judged(ee.reshape(1))


@pytest.mark.parametrize(("squares", "factor"), [(4.0, 1.0), (4.0, 2.0), (0.0, 1.0), (math.inf, 1.0)])
def test_a_rank_without_gradients_makes_no_reduction_alone(squares: float, factor: float) -> None:
    """Its sums are on the CPU, where they could be read, and the others' are on a device."""
    first = LastOfTwo()
    one, judged = Summed(first, torch.tensor(squares, dtype=torch.float64).as_subclass(OnADevice)).ascend(factor)
    assert first.sums is not None
    second = LastOfTwo(sums=first.sums.as_subclass(Tensor))
    other, its = Summed(second, None).ascend(factor)
    assert first.made == second.made == ["sum of (3,)"]
    assert one is not None
    assert other is not None
    assert other.squared.is_cpu
    assert not one.squared.is_cpu
    assert judged is not None
    assert its is not None
    assert torch.equal(judged.isnan(), its.isnan())
    assert bool(its.isfinite()) == (factor == 1 and math.isfinite(squares))
