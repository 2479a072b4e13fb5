"""The losses of plain tensors, which the core makes in one call, against the way by torch's operations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpost
from fastpost.ops import row_losses
from fastpost.row_tasks import LossTask

from .conftest import CPU_BACKENDS, same_bits

pytestmark = pytest.mark.skipif("triton" in CPU_BACKENDS, reason="the core makes them")
ON_CPU = "cpu" in CPU_BACKENDS  # else the CUDA core, emulated: its sums have another order than torch's

Call = Callable[[Tensor, Tensor], Any]


@contextmanager
def other_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_losses, "shortcut", lambda *_: None)
        yield


@contextmanager
def served() -> Iterator[list[bool]]:
    """Whether the core has served each call that asked it."""
    answers: list[bool] = []
    plain = row_losses.shortcut

    def spied(op: str, device: torch.device, dtype: torch.dtype) -> Any:
        function = plain(op, device, dtype)
        if op != "row_losses":
            return function

        def call(*args: Any) -> Any:
            found = function(*args)  # type: ignore[misc]
            answers.append(found is not None)
            return found

        return None if function is None else call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_losses, "shortcut", spied)
        yield answers


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def outcome(call: Call, clean: Tensor, noised: Tensor) -> Any:
    """Results and gradients, or the error."""
    leaves = [t.detach().requires_grad_() for t in (clean, noised)]
    try:
        found = tensors(call(*leaves))
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    if not found[0].requires_grad:
        return found
    return *found, *torch.autograd.grad(found[0] * 3, leaves, allow_unused=True)


def assert_same(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            assert a == b
        elif ON_CPU or a.ndim:
            assert same_bits(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12, equal_nan=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "two dimensions": lambda t: t[0],
    "one dimension": lambda t: t[0, 0],
    "rows apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "shifted, as in language models": lambda t: t[:, :-1],
    "one class": lambda t: t[..., :1],
    "classes apart": lambda t: torch.cat([t, t], -1)[..., ::2],
    "transposed": lambda t: t.transpose(0, 1),
    "one row for all": lambda t: t[:1, :1].expand(t.shape),
    "no rows": lambda t: t[:0],
}
WALKABLE = ("contiguous", "two dimensions", "one dimension", "rows apart", "one class")


def calls(shape: torch.Size, seed: int) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < 0.3] = -100
    mask = torch.rand(shape[:-1], generator=generator) < 0.6
    made: dict[str, Call] = {}
    for reduction in ("sum", "mean", "batchmean"):
        made[f"kl {reduction}"] = functools.partial(fastpost.symmetric_kl, reduction=reduction)
        made[f"kl {reduction}, mask"] = functools.partial(fastpost.symmetric_kl, reduction=reduction, mask=mask)
        made[f"js {reduction}, mask"] = functools.partial(fastpost.js_divergence, reduction=reduction, mask=mask)
    for reduction in ("token", "sentence", "fairseq", "sum"):
        for weight in (1.0, 0.3, 0.0):
            made[f"r3f {reduction} {weight}"] = functools.partial(
                fastpost.r3f_loss, labels=labels, reduction=reduction, r3f_lambda=weight
            )
    for items in (7, 0, torch.tensor(7), torch.tensor([7.5]), torch.tensor(0.0), torch.tensor(3.3, dtype=torch.float64)):
        made[f"r3f of {items}"] = functools.partial(fastpost.r3f_loss, labels=labels, num_items=items)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways_give_the_same_bits_and_the_same_errors(layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(3, 5, 24, generator=generator)
    moved = whole + 0.2 * torch.randn(whole.shape, generator=generator)
    clean, noised = (LAYOUTS[layout](t.to(dtype)) for t in (whole, moved))
    for name, call in calls(clean.shape, 2).items():
        with served() as answers:
            ours = [outcome(call, clean, noised)]
            if isinstance(ours[0][0], Tensor):
                ours.append(tensors(call(clean, noised)))
        with other_way():
            assert_same(ours[0], outcome(call, clean, noised))
            if len(ours) > 1:
                assert_same(ours[1], tensors(call(clean, noised)))
        assert len(answers) <= 2
        if len(ours) > 1 and answers and (ON_CPU or "js" not in name):
            assert all(answers) == (layout in WALKABLE), name


# -- gradients in the logits' place ---------------------------------------------------------------------------------------


def outcome_in_place(call: Call, layout: str, *sources: Tensor, wanted: tuple[bool, bool] = (True, True)) -> Any:
    """Results, the leaves' gradients and what lies in the memory of both streams, or the error; and what was served."""
    leaves = [t.detach().clone().requires_grad_(want) for t, want in zip(sources, wanted, strict=True)]
    owned = [leaf * 1 for leaf in leaves]
    with served() as answers:
        try:
            found = tensors(call(*(LAYOUTS[layout](t) for t in owned), inplace=True))
        except (ValueError, TypeError) as error:
            assert all(same_bits(t, s) for t, s in zip(owned, sources, strict=True)), "written before it was refused"
            return (type(error), str(error)), answers
    grads = torch.autograd.grad(found[0] * 3, [leaf for leaf in leaves if leaf.requires_grad])
    return (*found, *grads, *(t.detach() for t in owned)), answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # float16 has one way
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways_leave_the_same_bits_in_the_logits_place(layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(3, 5, 24, generator=generator)
    sources = [t.to(dtype) for t in (clean, clean + 0.2 * torch.randn(clean.shape, generator=generator))]
    for name, call in calls(LAYOUTS[layout](sources[0]).shape, 2).items():
        if name.startswith("js"):
            continue
        for wanted in ((True, True), (True, False), (False, True)):
            ours, answers = outcome_in_place(call, layout, *sources, wanted=wanted)
            refused = "sentence" in name and LAYOUTS[layout](sources[0]).ndim != 2  # before the core is asked
            assert answers == [layout in WALKABLE] or (refused and not answers)
            with other_way():
                theirs, _ = outcome_in_place(call, layout, *sources, wanted=wanted)
            assert_same(ours, theirs)


@pytest.mark.skipif(ON_CPU, reason="the CPU reads its value")
@pytest.mark.parametrize("items", [torch.tensor(7), torch.tensor([2.5]), torch.tensor(0.0), torch.tensor(0.3).double()])
def test_a_number_of_items_that_only_the_device_knows(items: Tensor) -> None:
    """Where a tensor lies on a GPU; here the task is made by hand, since the emulation's tensors lie on the CPU."""
    made = row_losses.shortcut("row_losses", torch.device("cpu"), torch.float32)
    assert made is not None
    clean, noised, labels = torch.randn(5, 9), torch.randn(5, 9), torch.tensor([1, 8, -100, 3, 0])
    task = LossTask(False, clean, noised, labels, kl_weight=0.4)
    share = 1 / items.double().item() if items.item() else 0.0
    found = []
    for how in (task._replace(items=items), task._replace(kl_scale=share, ce_scale=share)):
        grads = [torch.full((5, 9), torch.nan) for _ in range(2)]
        found.append((*made(how, *grads), *grads))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_gradients_take_the_logits_place_without_a_copy() -> None:
    leaves = [torch.randn(4, 9, requires_grad=True) for _ in range(2)]
    x, y = (t * 1 for t in leaves)
    with served() as answers:
        loss = fastpost.r3f_loss(x, y, torch.tensor([1, 8, -100, 3]), inplace=True).loss
    assert answers == [True]
    found = torch.autograd.grad(loss, (x, y), retain_graph=True)
    assert [g.data_ptr() for g in found] == [x.data_ptr(), y.data_ptr()]
    with pytest.raises(RuntimeError, match="inplace=False"):
        torch.autograd.grad(loss, (x, y))
    with pytest.raises(RuntimeError, match="inplace=False"):
        torch.autograd.grad(fastpost.symmetric_kl(leaves[0] * 1, y.detach(), inplace=True), leaves[0], create_graph=True)
    loss = fastpost.symmetric_kl(leaves[0] * 1, y.detach(), inplace=True)
    with pytest.raises(RuntimeError, match="inplace=False"):
        torch.autograd.grad(loss, leaves[0], torch.ones(3), is_grads_batched=True)


def test_who_kept_overwritten_logits_is_told() -> None:
    leaf = torch.randn(4, 9, requires_grad=True)
    saved = torch.tanh(leaf)  # which differentiates through its own output
    with served() as answers:
        loss = fastpost.symmetric_kl(saved, torch.randn(4, 9), inplace=True)
    assert answers == [True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "the same": lambda t: (t, t),
    "rows shifted": lambda t: (t[:3], t[1:]),
    "classes shifted": lambda t: (t[:, :20], t[:, 10:]),
    "one row within": lambda t: (t[:1], t[:1].view(-1)[None]),
    "other distances": lambda t: (t[:2, :15], t[::2, 15:]),
    "rows between rows": lambda t: (t[:, :15], t[:, 15:]),
    "every other row": lambda t: (t[::2], t[1::2]),
    "halves": lambda t: (t[:2], t[2:]),
}
APART = ("rows between rows", "every other row", "halves")


@pytest.mark.parametrize("name", OVERLAPS)
def test_streams_that_share_memory_are_refused_by_both_ways(name: str) -> None:
    found = []
    for way in (nullcontext, other_way):
        torch.manual_seed(3)
        leaf = torch.randn(4, 30, requires_grad=True)
        whole = leaf * 1
        with way(), served() as answers:
            try:
                loss = fastpost.symmetric_kl(*OVERLAPS[name](whole), inplace=True)
                assert answers == ([True] if way is nullcontext else [])
                found.append((loss, *torch.autograd.grad(loss, leaf), whole.detach()))
                assert name in APART
            except ValueError as error:
                assert same_bits(whole, leaf)
                assert name not in APART
                found.append((str(error),))
    assert_same(*found)


@pytest.mark.skipif(not ON_CPU, reason="elsewhere they show in the values")
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
def test_a_divergence_without_a_value_in_place(spoilt: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.randn(4, 9)
    clean[2, 3] = spoilt
    labels = torch.tensor([1, 8, 0, 3])

    def run(call: Call, strict: bool) -> Any:
        monkeypatch.setenv("FASTPOST_CHECKS", "1" if strict else "0")
        streams = (clean.clone().requires_grad_() * 1, torch.zeros(4, 9))
        with served() as answers:
            try:
                return (*tensors(call(*streams, inplace=True)), streams[0].detach()), answers
            except ValueError as error:
                return (str(error), streams[0].detach()), answers

    for call in (fastpost.symmetric_kl, functools.partial(fastpost.r3f_loss, labels=labels)):
        for strict in (False, True):
            ours, answers = run(call, strict)
            assert answers == [True]
            with other_way():
                theirs, _ = run(call, strict)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                if isinstance(a, str):
                    assert a == b
                else:
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def bad(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(-1, torch.tensor([1]), value)


@pytest.mark.parametrize("spoil", [bad(torch.nan), bad(torch.inf), bad(-torch.inf)], ids=["nan", "inf", "-inf"])
def test_values_that_have_no_divergence(spoil: Callable[[Tensor], Tensor]) -> None:
    clean = torch.randn(4, 9)
    for streams in ((spoil(clean), clean), (clean, spoil(clean)), (spoil(clean), spoil(clean + 0.1))):
        for call in calls(clean.shape, 3).values():
            ours = outcome(call, *streams)
            with other_way():
                assert_same(ours, outcome(call, *streams))


WRONG: dict[str, Call] = {
    "label too large": lambda a, b: fastpost.r3f_loss(a, b, torch.tensor([0, 9, 1, 1])),
    "label negative": lambda a, b: fastpost.r3f_loss(a, b, torch.tensor([0, -1, 1, 1])),
    "labels of another shape": lambda a, b: fastpost.r3f_loss(a.view(2, 2, 9), b.view(2, 2, 9), torch.zeros(4).long()),
    "transposed labels": lambda a, b: fastpost.r3f_loss(a[None], b[None], torch.zeros(4, 1).long()),
    "labels float": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4)),
    "labels bool": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).bool()),
    "labels a list": lambda a, b: fastpost.r3f_loss(a, b, [0, 1, 2, 3]),  # type: ignore[arg-type]
    "mask of another shape": lambda a, b: fastpost.symmetric_kl(a, b, mask=torch.ones(3).bool()),
    "mask of numbers": lambda a, b: fastpost.symmetric_kl(a, b, mask=torch.ones(4).long()),
    "shapes differ": lambda a, b: fastpost.symmetric_kl(a, b[:, :8]),
    "dtypes differ": lambda a, b: fastpost.symmetric_kl(a, b.bfloat16()),
    "integers": lambda a, b: fastpost.symmetric_kl(a.long(), b.long()),
    "a list": lambda a, b: fastpost.symmetric_kl(a, [1.0]),  # type: ignore[arg-type]
    "no classes": lambda a, b: fastpost.symmetric_kl(a[:, :0], b[:, :0]),
    "a scalar": lambda a, b: fastpost.symmetric_kl(a[0, 0], b[0, 0]),
    "unknown reduction": lambda a, b: fastpost.symmetric_kl(a, b, reduction="token"),
    "lambda negative": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).long(), r3f_lambda=-1.0),
    "lambda nan": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).long(), r3f_lambda=float("nan")),
    "num_items negative": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).long(), num_items=-1),
    "num_items a negative tensor": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).long(), num_items=torch.tensor(-1.0)),
    "num_items a tensor of two": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).long(), num_items=torch.ones(2)),
    "num_items not finite": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).long(), num_items=torch.tensor(torch.inf)),
    "num_items a tensor, and sum": lambda a, b: fastpost.r3f_loss(
        a, b, torch.zeros(4).long(), num_items=torch.tensor(1), reduction="sum"
    ),
    "num_items and sum": lambda a, b: fastpost.r3f_loss(a, b, torch.zeros(4).long(), num_items=1, reduction="sum"),
    "sentences of tokens": lambda a, b: fastpost.r3f_loss(a[None], b[None], torch.zeros(1, 4).long(), reduction="sentence"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_in_the_same_words(name: str) -> None:
    clean = torch.randn(4, 9)
    errors = []
    for way in (served, other_way):
        with way(), pytest.raises((ValueError, TypeError)) as caught:
            WRONG[name](clean, clean + 1)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_a_divergence_that_has_no_value_is_refused_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.randn(4, 9)
    noised = clean.clone()
    noised[2, 3] = torch.nan
    assert fastpost.symmetric_kl(clean, noised).isnan()
    monkeypatch.setenv("FASTPOST_CHECKS", "1")
    with pytest.raises(ValueError, match="row 2 holds NaN"):
        fastpost.symmetric_kl(clean, noised)


def test_further_backward_passes() -> None:
    leaves = [torch.randn(4, 9, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([1, 8, -100, 3])

    def loss() -> Tensor:
        return fastpost.r3f_loss(*leaves, labels, r3f_lambda=0.4).loss

    with served() as answers:
        first = torch.autograd.grad(kept := loss(), leaves, retain_graph=True)
        assert answers == [True]
    for scale in (1.0, -2.5):
        again = torch.autograd.grad(kept, leaves, torch.tensor(scale), retain_graph=True)
        for a, b in zip(again, first, strict=True):
            torch.testing.assert_close(a, scale * b, rtol=1e-6, atol=1e-9)
    kept.backward()
    assert leaves[0].grad is not None
    torch.testing.assert_close(leaves[0].grad, first[0], rtol=1e-6, atol=1e-9)

    batch = torch.tensor([1.0, 3.0, 0.0])
    (mapped,) = torch.autograd.grad(loss(), leaves[:1], batch, is_grads_batched=True)
    torch.testing.assert_close(mapped, batch[:, None, None] * first[0], rtol=1e-6, atol=1e-9)

    def penalty() -> Tensor:
        return sum(g.square().sum() for g in torch.autograd.grad(loss(), leaves, create_graph=True))  # type: ignore[return-value]

    ours = torch.autograd.grad(penalty(), leaves)
    with other_way():
        theirs = torch.autograd.grad(penalty(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


READS = ("item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


@contextmanager
def nothing_is_read() -> Iterator[None]:
    """Python reads the value of no tensor, which would wait for a GPU and cannot be captured into a graph."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor's value was read")

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_a_step_reads_no_tensor(factor: float) -> None:
    leaves = [torch.randn(4, 9, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([1, 8, -100, 3])
    whole = torch.autograd.grad(fastpost.r3f_loss(*leaves, labels).loss, leaves)
    one = torch.autograd.grad(fastpost.symmetric_kl(*leaves, reduction="sum"), leaves[:1])
    by = torch.tensor(factor)
    with nothing_is_read() if ON_CPU else nullcontext():  # the emulation itself looks at what the forward pass gives
        loss = fastpost.r3f_loss(*leaves, labels).loss
        kl = fastpost.symmetric_kl(leaves[0], leaves[1].detach(), reduction="sum")
    with nothing_is_read():
        found = torch.autograd.grad(loss, leaves, by) + torch.autograd.grad(kl, leaves[:1], by)
    for a, b in zip(found, whole + one, strict=True):
        assert same_bits(a, (b.double() * factor).float())


def apart(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 1), (5, 3), (2, 7, 33), (300, 70), (2, 20_001)], ids=str)
def test_gradients_are_scaled_in_one_call(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = row_losses.shortcut("scale_gradients_", torch.device("cpu"), dtype)
    assert scale is not None
    for layouts in itertools.product((torch.clone, apart), (torch.clone, apart, None)):
        for factor in (1.0, 0.3, 0.0, -1e-3):
            grads = [layout(torch.randn(shape).to(dtype)) for layout in layouts if layout is not None]
            expected = [(g.double() * torch.tensor(factor).double()).to(dtype) for g in grads]
            assert scale(grads[0], grads[1] if len(grads) == 2 else None, torch.tensor(factor))
            assert all(same_bits(g, e) for g, e in zip(grads, expected, strict=True))
    plain = torch.randn(shape).to(dtype)
    assert not scale(plain, None, torch.tensor(0.3, dtype=torch.float64))
    assert not scale(plain, None, torch.full((1,), 0.3))
    assert not scale(plain.double(), None, torch.tensor(0.3))


def test_one_stream_may_be_without_a_gradient_and_one_tensor_may_be_both() -> None:
    a, b = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    for one, other in ((a, b), (b, a)):
        ours = outcome_of_leaf(one, other, a)
        with other_way():
            assert same_bits(ours, outcome_of_leaf(one, other, a))
    assert outcome_of_leaf(a, a, a).count_nonzero() == 0


def outcome_of_leaf(one: Tensor, other: Tensor, leaf: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(fastpost.symmetric_kl(one, other), [leaf])
    return gradient


def test_losses_may_be_changed_in_place() -> None:
    clean, noised = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    with served() as answers:
        found = fastpost.r3f_loss(clean, noised, torch.tensor([1, 8, -100, 3]))
    assert answers == [True]
    whole = torch.autograd.grad(found.loss, clean, retain_graph=True)[0]
    loss = found.loss
    loss /= 4
    found.symm_kl.add_(1)
    loss.backward()
    assert clean.grad is not None
    assert torch.equal(clean.grad * 4, whole)


def test_logits_that_were_written_after_their_loss() -> None:
    clean, noised = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    a, b = clean * 1, noised * 1
    loss = fastpost.symmetric_kl(a, b)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    classes=st.integers(1, 70),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.0, 1e-4, 0.1, 3.0]),
)
def test_both_ways_give_the_same_bits_whatever_the_shape(rows: list[int], classes: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(*rows, classes, generator=generator)
    noised = clean + scale * torch.randn(clean.shape, generator=generator)
    for call in calls(clean.shape, seed).values():
        ours = outcome(call, clean, noised)
        with other_way():
            assert_same(ours, outcome(call, clean, noised))


def test_in_place_a_view_keeps_its_backward_node() -> None:
    """A view whose version moves before the loss is in the graph would hand its gradient on through a copy of all of it."""
    model = torch.nn.Linear(4, 1031)
    logits = [model(torch.randn(2, 3, 4)) for _ in range(2)]
    loss = fastpost.r3f_loss(*logits, torch.zeros(2, 3, dtype=torch.long), inplace=True).loss
    assert loss.grad_fn is not None
    assert [node.name() for node, _ in loss.grad_fn.next_functions[:2] if node is not None] == ["ViewBackward0"] * 2
