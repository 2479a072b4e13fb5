"""A stash of distances in ulp: w + e as with a copy, w back bit for bit, in half the room."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM, plan, use_backend
from fastpost.sam import GSAM, LookSAM, SAMWindow
from fastpost.sam.perturbation.stash import HostStash, UlpStash

from .conftest import CPU_BACKENDS, DTYPES, same_bits
from .small import X, all_bits, closure_of, loss_of, network, unchanged

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Zeros, the least and largest numbers of each kind, infinities, and NaNs of either sign, signalling, with payloads.
SPECIAL = (0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC12345, 0x7FFFFFFF, 0x3F800000)


def every_kind(dtype: torch.dtype) -> Tensor:
    """All patterns of 16 bits, or the special ones of 32 beside 80,000 at random; more than one chunk."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).repeat(2).to(torch.int16).view(dtype)
    special = torch.tensor([*SPECIAL, *(pattern - 2**31 for pattern in SPECIAL)])
    return torch.cat([special, torch.randint(-(2**31), 2**31, (80_000,))]).to(torch.int32).view(dtype)


def heavy(shape: torch.Size, dtype: torch.dtype, spread: float) -> Tensor:
    """Gradients over many orders of magnitude."""
    return (torch.randn(shape) * torch.exp(spread * torch.randn(shape))).to(dtype)


@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.01}, {"rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_w_comes_back_bit_by_bit_whatever_it_is(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if dtype == torch.float32 and "rounding" in options:
        options = {"rho": 3.0}
    slow = backend == "triton"  # interpreted
    kinds = every_kind(dtype)[: 2**16 + 100 if slow else None]
    kinds = torch.where(kinds.abs() < 1e15, kinds, 0) if options.get("adaptive") else kinds  # or t |g| is not finite
    start = [kinds, kinds[:131].reshape(131, 1), torch.zeros(70, 3, dtype=dtype), kinds[5], kinds[:0]]
    for rho in (options.pop("rho"),) if "rho" in options else (0.05,) if slow else (1e-6, 1e-3, 0.05, 10.0):
        moved: dict[str, list[Tensor]] = {}
        sums: dict[str, dict[str, float]] = {}
        for stash in ("copy", "ulp"):
            params = [nn.Parameter(w.clone()) for w in start]
            opt = SAM(params, torch.optim.SGD, **{"rho": rho, "lr": 0.0, "stash": stash, "compute_dtype": dtype, **options})
            for spread in (0.0, 3.0):  # of these the second finds the list as long as the first has left it
                torch.manual_seed(8)
                for p in params:
                    p.grad = heavy(p.shape, dtype, spread)
                opt.first_step()
                if stash == "copy" and spread == 0:
                    moved[stash] = [p.detach().clone() for p in params]
                elif spread == 0:
                    assert all(same_bits(p, w) for p, w in zip(params, moved["copy"], strict=True))
                opt.restore_()
                opt.restore_()  # a second time it has nothing to do
                assert all(same_bits(p, w) for p, w in zip(params, start, strict=True))
            if opt._last_sums is not None:
                sums[stash] = dict(enumerate(opt._last_sums.sums.nan_to_num().tolist()))  # type: ignore[arg-type]
        # Triton's blocks are smaller where codes are kept, and have their float32 sums in another order.
        assert sums["ulp"] == (pytest.approx(sums["copy"], rel=1e-5) if slow else sums["copy"])
        assert not all(same_bits(p, w) for p, w in zip(moved["copy"], start, strict=True)) or dtype == torch.float16


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(9, 7).t(),
    "with gaps": lambda: torch.randn(9, 14)[:, ::2],
    "empty": lambda: torch.empty(0, 3),
    "scalar": lambda: torch.randn(()),
    "long": lambda: torch.randn(3, 70_000),
}


def test_whatever_lies_in_another_order() -> None:
    params = [nn.Parameter(make()) for make in LAYOUTS.values()]
    opt = SAM(params, torch.optim.SGD, rho=5.0, lr=0.0, stash="ulp")
    for grad_like in (lambda p: torch.randn_like(p), lambda p: torch.randn(p.shape)):
        for p in params:
            p.grad = grad_like(p)
        before = [p.detach().clone() for p in params]
        opt.first_step()
        assert not same_bits(params[0], before[0])
        opt.restore_()
        assert all(same_bits(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("served", [("cpu", "reference"), ("reference", "cpu")], ids=str)
@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the CPU core serves no call in this run")
def test_one_backend_reads_what_another_has_written(dtype: torch.dtype, served: tuple[str, str]) -> None:
    w = every_kind(dtype)
    p = nn.Parameter(w.clone())
    p.grad = heavy(p.shape, dtype, 3.0)
    opt = SAM([p], torch.optim.SGD, rho=0.5, lr=0.0, stash="ulp")
    with use_backend(served[0]):
        opt.first_step()
    with use_backend(served[1]):
        opt.restore_()
    assert same_bits(p, w)


# -- the list -------------------------------------------------------------------------------------------------------------


def small_weights(share: float, count: int = 100_000, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, SAM]:
    """A share of the weights is so small that e does not fit into a code."""
    w = torch.randn(count)
    w[: int(count * share)] *= 1e-6
    p = nn.Parameter(w.to(dtype))
    p.grad = torch.randn(count).to(dtype)
    return p, SAM([p], torch.optim.SGD, rho=1e-3, lr=0.0, stash="ulp")


def test_bytes_per_weight() -> None:
    p, opt = small_weights(0.01)
    assert opt.stash_bytes == 0
    opt.first_step()
    assert 2 < opt.stash_bytes / p.numel() < 2.15  # 8 for one in a hundred, and an eighth of them to spare
    opt.restore_()
    p, opt = small_weights(1e-5, dtype=torch.bfloat16)
    opt.first_step()
    assert 1 < opt.stash_bytes / p.numel() < 1.02
    other = SAM([p], torch.optim.SGD, rho=1e-3, lr=0.0)
    opt.restore_()
    other.first_step()
    assert 2 <= other.stash_bytes / p.numel() < 2.01


def test_weights_that_are_zero_are_not_listed() -> None:
    p = nn.Parameter(torch.zeros(100_000))
    p.grad = torch.randn(p.shape)
    opt = SAM([p], torch.optim.SGD, rho=0.5, lr=0.0, stash="ulp")
    opt.first_step()
    assert opt.stash_bytes / p.numel() < 2.05
    opt.restore_()
    assert same_bits(p, torch.zeros(100_000))


def test_where_the_list_would_take_more_than_a_copy_there_is_a_copy() -> None:
    p, opt = small_weights(0.9)
    w = p.detach().clone()
    for _ in range(2):
        opt.first_step()
        assert not same_bits(p, w)
        opt.restore_()
        assert same_bits(p, w)
    assert opt.stash_bytes / p.numel() < 4.01


def test_without_memory_for_the_list_w_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(codes: plan.CodeList) -> bool:
        raise MemoryError

    p, opt = small_weights(0.2)
    w = p.detach().clone()
    monkeypatch.setattr(plan.CodeList, "grown", no_memory)
    with pytest.raises(MemoryError):
        opt.first_step()
    assert not opt.is_perturbed
    assert same_bits(p, w)


def test_more_chunks_than_an_entry_can_name_are_refused() -> None:
    bucket = plan.Bucket([0], weights=[torch.empty(2**33, device="meta")])
    with pytest.raises(ValueError, match="put the parameters into several groups"):
        UlpStash().room(bucket)


# -- steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"adaptive": True}, {"variant": "gsam"}, {"variant": "look"}, {"rounding": "stochastic"}, {"interval": 2}],
    ids=str,
)
def test_steps_are_those_with_a_copy(options: dict[str, Any]) -> None:
    variants = {"gsam": lambda: GSAM(0.5), "look": lambda: LookSAM(2)}
    models = {}
    for stash in ("copy", "ulp"):
        model = network().to(torch.bfloat16 if "rounding" in options else torch.float32)
        how = {**options, "variant": variants[options["variant"]]()} if "variant" in options else options
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.3, lr=1e-2, stash=stash, **how)
        x = X.to(next(model.parameters()).dtype)
        for _ in range(4):
            opt.step(closure_of(model, x))
            SAMWindow(opt, lambda part, model=model: loss_of(model, part).backward()).run([x, x])
            opt.step()
        models[stash] = model
    assert unchanged(models["ulp"], all_bits(models["copy"]))


def test_copies_and_states_know_nothing_of_the_stash() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9, stash="ulp")
    opt.step(closure_of(model))
    model, opt = copy.deepcopy((model, opt))
    opt = pickle.loads(pickle.dumps(opt))
    plain = SAM(network().parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9)
    plain.load_state_dict(opt.state_dict())
    assert opt._perturbation.stash is not None
    assert type(opt._perturbation.stash) is UlpStash


# -- between the passes ---------------------------------------------------------------------------------------------------


def perturbed_network() -> tuple[nn.Sequential, SAM, list[Tensor]]:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.0, stash="ulp")
    before = all_bits(model)
    loss_of(model).backward()
    opt.first_step()
    return model, opt, before


@pytest.mark.parametrize("ends", ["second_step", "restore_", "abandon"])
@pytest.mark.parametrize("change", ["cloned", "transposed", "one cloned"])
def test_weights_that_move_are_followed(change: str, ends: str) -> None:
    model, opt, before = perturbed_network()
    for p in list(model.parameters())[: 1 if change == "one cloned" else None]:
        p.data = p.data.t().contiguous().t() if change == "transposed" else p.data.clone()
    getattr(opt, ends)()
    assert unchanged(model, before)


def test_another_dtype_is_refused_and_abandon_converts() -> None:
    model, opt, before = perturbed_network()
    model.double()
    with pytest.raises(RuntimeError, match="is float64 now"):
        opt.second_step()
    opt.abandon()
    assert all(same_bits(p.float(), b.view(torch.float32)) for p, b in zip(model.parameters(), before, strict=True))
    model, opt, before = perturbed_network()
    model.bfloat16()
    opt.abandon()
    for p, b in zip(model.parameters(), before, strict=True):  # w + e was rounded, and what is left of w as well
        w = b.view(torch.float32)
        assert (p.float() - w).abs().max() <= 2**-7 * w.abs().max()


def test_weights_that_were_written_are_refused_and_named() -> None:
    model, opt, before = perturbed_network()
    with torch.no_grad():
        model[0].bias.mul_(2)
    now = all_bits(model)
    for ends in (opt.second_step, opt.restore_, opt.end_ascent):
        with pytest.raises(RuntimeError, match=r"shape \(50,\) was written between the passes.*abandon"):
            ends()
    assert unchanged(model, now)
    with pytest.raises(RuntimeError, match="1 weights were written"):
        opt.abandon()
    assert not opt.is_perturbed
    assert [torch.equal(a, b) for a, b in zip(all_bits(model), before, strict=True)] == [True, False, True, True]
    assert torch.equal(all_bits(model)[1], now[1])
    opt.step(closure_of(model))  # and training goes on


def test_weights_that_lost_their_memory_are_named_and_the_others_are_back() -> None:
    model, opt, before = perturbed_network()
    model[3].weight.data = model[3].weight.data[:, :20].clone()
    with pytest.raises(RuntimeError, match="1 weights were written or lost"):
        opt.abandon()
    assert not opt.is_perturbed
    now = all_bits(model)
    assert all(torch.equal(now[i], before[i]) for i in (0, 1, 3))


# -- a copy on the host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"rounding": "stochastic"}], ids=str)
def test_a_copy_on_the_host_gives_the_same_steps(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here both memories are the host's."""
    monkeypatch.setattr(HostStash, "check", lambda *_: None)
    models = {}
    for stash in ("copy", "cpu"):
        model = network().to(torch.bfloat16 if "rounding" in options else torch.float32)
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.3, lr=1e-2, stash=stash, **options)
        for _ in range(3):
            before = all_bits(model)
            loss_of(model, X.to(model[0].weight.dtype)).backward()
            with opt.perturbed():
                assert not unchanged(model, before)
                for p in model.parameters():
                    p.data = p.data.clone()
                with torch.no_grad():
                    model[0].bias.mul_(2)
            assert unchanged(model, before)
            opt.step(closure_of(model, X.to(model[0].weight.dtype)))
        models[stash] = model
    assert opt.stash_bytes == sum(p.nbytes for p in model.parameters())
    assert unchanged(models["cpu"], all_bits(models["copy"]))


# -- what it does not go with ---------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    model = network()
    for options, words in (
        ({"stash": "zip"}, "stash"),
        ({"stash": "cpu"}, "host's memory, where these weights lie already"),
        ({"stash": "ulp", "perturb": "functional", "model": model}, "functional"),
    ):
        with pytest.raises(ValueError, match=words):
            SAM(model.parameters(), torch.optim.AdamW, **options)  # type: ignore[arg-type]
    narrow = network().bfloat16()
    masters = [p.detach().float() for p in narrow.parameters()]
    with pytest.raises(ValueError, match="master_params hold w"):
        SAM(narrow.parameters(), torch.optim.AdamW, master_params=masters, stash="ulp")
    with pytest.raises(ValueError, match="not float64"):
        SAM(network().double().parameters(), torch.optim.AdamW, stash="ulp")
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, stash="ulp")
    model.double()
    loss_of(model, X.double()).backward()
    with pytest.raises(ValueError, match="not float64"):
        opt.first_step()
