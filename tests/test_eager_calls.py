"""Calls that nothing records go past torch's dispatcher and autograd, and come to the same bits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import fastpost
from fastpost.ops import params as ops
from fastpost.ops import registry, row_losses
from fastpost.ops.autograd import Function

from .conftest import CPU_BACKENDS, DTYPES, Seen, same_bits

pytestmark = pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the core says which calls these are")

LABELS = torch.tensor([0, 5, -100, 7, 2, 31])
MASK = LABELS != -100


def streams(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(6, 32, generator=generator)
    return clean.to(dtype), (clean + 0.1 * torch.randn(6, 32, generator=generator)).to(dtype)


Call = Callable[[Tensor, Tensor], Any]
OF_LOGITS: dict[str, Call] = {
    **{
        f"symmetric_kl, {reduction}, {'masked' if mask is not None else 'all'}": functools.partial(
            fastpost.symmetric_kl, reduction=reduction, mask=mask
        )
        for reduction in ("none", "sum", "mean", "batchmean")
        for mask in (None, MASK)
    },
    **{
        f"r3f_loss, {reduction}, {smoothing}": functools.partial(
            fastpost.r3f_loss, labels=LABELS, reduction=reduction, label_smoothing=smoothing, r3f_lambda=0.7
        )
        for reduction in ("token", "sentence", "fairseq", "sum")
        for smoothing in (0.0, 0.1)
    },
    "js_divergence": fastpost.js_divergence,
    "add_noise": lambda clean, _: fastpost.add_noise(clean, 1e-2, "normal", seed=4, keep=MASK),
    "embedding_noise": lambda clean, _: fastpost.embedding_noise(clean, torch.tensor([[1, 0], [5, 5]]), 1e-2, seed=4),
}


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert same_bits(a, b)
        assert (a.requires_grad, a.is_inference(), a.device) == (b.requires_grad, b.is_inference(), b.device)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch is asked for from here on: its dispatcher, and its autograd by the function's name."""
    names: list[str] = []
    plain = registry.eager

    def eager(args: tuple[Any, ...]) -> bool:
        if not plain(args):
            names.append("dispatcher")
        return plain(args)

    def spy(function: type[torch.autograd.Function], method: str) -> None:
        plain = getattr(function, method)

        def recorded(*args: Any) -> Any:
            names.append(function.__name__)
            return plain(*args)

        monkeypatch.setattr(function, method, staticmethod(recorded))

    monkeypatch.setattr(registry, "eager", eager)
    for function in Function.__subclasses__():
        spy(function, "setup_context")
    spy(row_losses.Loss, "forward")
    return names


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", OF_LOGITS)
def test_results_without_a_gradient_are_those_by_way_of_torch(name: str, dtype: torch.dtype) -> None:
    call, (clean, noised) = OF_LOGITS[name], streams(dtype)
    with Seen() as mode:
        expected = call(clean, noised)
    assert any(name.startswith("fastpost.") for name in mode.names)
    assert_same(call(clean, noised), expected)
    for leaf in (clean, noised):
        leaf.requires_grad_()
    with torch.no_grad():
        assert_same(call(clean, noised), expected)
    with torch.inference_mode():
        ours = call(clean, noised)
        with Seen():
            assert_same(ours, call(clean, noised))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_gradients_are_those_by_way_of_torch(name: str) -> None:
    call, (clean, noised) = OF_LOGITS[name], streams(torch.float32)
    leaves = [clean.requires_grad_(), noised.requires_grad_()]
    results = [call(*leaves)]
    with Seen() as mode:
        results.append(call(*leaves))
    assert any(name.startswith("fastpost.") for name in mode.names)
    assert_same(*results)
    ours, theirs = (torch.autograd.grad(tensors(r)[0].double().square().sum(), leaves, allow_unused=True) for r in results)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (b is not None and same_bits(a, b))
    assert ours[0] is not None
    assert ours[0].count_nonzero() > 0


@pytest.mark.parametrize("name", OF_LOGITS)
def test_torch_is_asked_where_something_is_recorded_and_not_elsewhere(name: str, asked: list[str]) -> None:
    call, (clean, noised) = OF_LOGITS[name], streams(torch.float32)
    assert not any(t.requires_grad for t in tensors(call(clean, noised)))
    with torch.no_grad():
        call(clean.requires_grad_(), noised)
    with torch.inference_mode():
        call(clean, noised)
    assert asked == []
    assert tensors(call(clean, noised))[0].requires_grad
    assert len(asked) == 1  # autograd; what it calls needs no dispatcher
    assert asked != ["dispatcher"]
    asked.clear()
    with torch.autograd.profiler.profile() as profile:
        call(clean.detach(), noised)
    assert any(event.name.startswith("fastpost::") for event in profile.function_events)
    assert "dispatcher" in asked


def test_forward_mode_needs_no_tensor_that_requires_a_gradient() -> None:
    clean, noised = streams(torch.float32)  # which the core serves; the reference is torch, tangents and all
    move = torch.randn_like(clean)
    expected = torch.func.jvp(fastpost.symmetric_kl, (clean, noised), (move, torch.zeros_like(move)))[1]
    assert expected != 0
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, forward_ad.dual_level():
            value = fastpost.symmetric_kl(forward_ad.make_dual(clean, move), noised)
            tangent = forward_ad.unpack_dual(value).tangent
            assert tangent is not None
            assert tangent.item() == pytest.approx(expected.item(), rel=1e-6)
            noise = fastpost.add_noise(forward_ad.make_dual(clean, move), 1e-2, seed=1)
            assert torch.equal(forward_ad.unpack_dual(noise).tangent, move)


def inside(work: Callable[[], object]) -> list[str]:
    """The functions of fastpost that a call passes, in order."""
    package, found = str(Path(fastpost.__file__).parent), []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            found.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def test_a_call_that_is_known_passes_few_functions() -> None:
    """All that the core can do by itself it does in one call."""
    w, g, stash = ([torch.ones(5)] for _ in range(3))
    norm = ops.squared_norm(g)
    clean, noised = streams(torch.float32)
    calls = {
        "squared_norm": lambda: ops.squared_norm(g),
        "sam_perturb_": lambda: ops.sam_perturb_(w, g, stash, norm, rho=0.1),
        "sam_restore_": lambda: ops.sam_restore_(w, stash),
        "symmetric_kl": lambda: fastpost.symmetric_kl(clean, noised, mask=MASK),
    }
    for name, call in calls.items():
        call()
        checks = ["check_radius"] if name in ("squared_norm", "sam_perturb_") else []
        way = ["kl_losses", "forced"] if name == "symmetric_kl" else [*checks, "call", "forced"]
        assert inside(call) == [name, *way]


class Raises(TorchFunctionMode):
    """A mode that raises where autograd is turned off or on, before or after it is done."""

    def __init__(self, on: bool, done: bool, error: BaseException) -> None:
        super().__init__()
        self._on, self._done, self._error = on, done, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raises = func is torch._C._set_grad_enabled and args[0] is self._on
        result = func(*args, **(kwargs or {})) if self._done or not raises else None
        if raises:
            raise self._error
        return result


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a mode")], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_no_mode_can_leave_autograd_off(on: bool, done: bool, error: BaseException) -> None:
    @registry.without_grad
    def work(fails: bool) -> bool:
        if fails:
            raise ValueError("ours")
        return torch.is_grad_enabled()

    with Raises(on, done, error):
        assert work(False) is False
        assert torch.is_grad_enabled()
        with pytest.raises(ValueError, match="ours") as found:
            work(True)
    assert found.value.__context__ is None
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert work(False) is False
        assert not torch.is_grad_enabled()


def test_a_mode_that_the_function_leaves_behind_does_not_see_autograd_turned_on() -> None:
    mode = Raises(True, False, KeyboardInterrupt())
    try:
        registry.without_grad(mode.__enter__)()
        assert torch.is_grad_enabled()
    finally:
        mode.__exit__(None, None, None)


def test_modes_see_what_is_called_without_autograd() -> None:
    seen = []

    class Notes(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Notes():
        registry.without_grad(lambda: torch.zeros(1).neg_())()
    assert seen == [torch.zeros, Tensor.neg_]
