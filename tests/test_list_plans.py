"""Plans that list operations keep from call to call; long, as every change is tried between every pair of calls.

A plan is used for lists that look the same, and for no others.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import plan
from fastpost.backends import cpu, native, reference
from fastpost.ops import lists as lists_of
from fastpost.ops import params as ops

from .conftest import CPU_BACKENDS, DTYPES, Seen, bits, same_bits

pytestmark = pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="about the CPU core, which is tested in a run of its own")

SHAPES = ((5,), (3, 4), (0,), (1,), (700,))
COLUMNS = {  # of lists: how many, and which of them are written
    "squared_norm": (1, ()),
    "squared_norm of ASAM": (2, ()),
    "squared_distance": (2, ()),
    "dot": (2, ()),
    "sam_perturb_": (3, (0, 2)),
    "sam_perturb_ at random": (3, (0, 2)),
    "sam_restore_": (2, (0,)),
    "sam_restore_adamw_": (5, (0, 3, 4)),
    "negate_": (1, (0,)),
    "flip_signs_": (1, (0,)),
    "negate_clip_": (1, (0,)),
    "negate_clip_ within a bound": (1, (0,)),
}
NORM = torch.tensor(7.0, dtype=torch.float64)


def eager(name: str, lists: list[list[Tensor]]) -> Tensor | None:
    """The operation by its public function."""
    steps = [torch.tensor(3.0) for _ in lists[0]]
    calls: dict[str, Callable[..., Tensor | None]] = {
        "squared_norm": ops.squared_norm,
        "squared_norm of ASAM": functools.partial(ops.squared_norm, eta=0.01),
        "squared_distance": ops.squared_distance,
        "dot": ops.dot,
        "sam_perturb_": lambda *a: ops.sam_perturb_(*a, NORM, rho=0.5),
        "sam_perturb_ at random": lambda *a: ops.sam_perturb_(*a, NORM, rho=0.5, adaptive=True, eta=0.1, seed=5),
        "sam_restore_": ops.sam_restore_,
        "sam_restore_adamw_": lambda *a: ops.sam_restore_adamw_(*a, steps, lr=0.1),
        "negate_": ops.negate_,
        "flip_signs_": lambda a: ops.flip_signs_(a, 9),
        "negate_clip_": ops.negate_clip_,
        "negate_clip_ within a bound": lambda a: ops.negate_clip_(a, 0.1),
    }
    return calls[name](*lists)


def by_torch(name: str, lists: list[list[Tensor]]) -> Tensor | None:
    """The same through torch's dispatcher."""
    steps = [torch.tensor(3.0) for _ in lists[0]]
    op, inf = torch.ops.fastpost, float("inf")
    calls: dict[str, Callable[..., Tensor | None]] = {
        "squared_norm": lambda a: op.squared_norm(a, None, 0.0),
        "squared_norm of ASAM": lambda *a: op.squared_norm(*a, 0.01),
        "squared_distance": op.squared_distance,
        "dot": op.dot,
        "sam_perturb_": lambda *a: op.sam_perturb_(*a, NORM, 0.5, False, 0.0, None),
        "sam_perturb_ at random": lambda *a: op.sam_perturb_(*a, NORM, 0.5, True, 0.1, None, torch.tensor(5)),
        "sam_restore_": op.sam_restore_,
        "sam_restore_adamw_": lambda *a: op.sam_restore_adamw_(*a, steps, 0.1, 0.9, 0.999, 1e-8, 1e-2, False, None, None),
        "negate_": op.negate_,
        "flip_signs_": lambda a: op.flip_signs_(a, torch.tensor(9)),
        "negate_clip_": lambda a: op.negate_clip_(a, inf).sqrt(),
        "negate_clip_ within a bound": lambda a: op.negate_clip_(a, 0.1).sqrt(),
    }
    return calls[name](*lists)


def make(name: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[list[Tensor]]:
    """Lists for an operation, positive so that they can be anybody's second moments."""
    count, _ = COLUMNS[name]
    return [[torch.rand(shape).to(dtype) + 0.1 for shape in SHAPES for dtype in dtypes] for _ in range(count)]


def copied(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.detach().clone() for t in tensors] for tensors in lists]


def assert_same(a: list[list[Tensor]], b: list[list[Tensor]]) -> None:
    for i, (one, other) in enumerate(zip(itertools.chain(*a), itertools.chain(*b), strict=True)):
        assert same_bits(one, other), i


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's dispatcher is asked to do from here on, by the operations' names."""
    asked: list[str] = []
    plain = type(ops._OP_NEGATE_)._by_dispatcher

    def spy(self: Any, lists: Any, args: Any) -> Any:
        asked.append(self.name)
        return plain(self, lists, args)

    monkeypatch.setattr(type(ops._OP_NEGATE_), "_by_dispatcher", spy)
    return asked


def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plans that are made from here on, by what their operations do."""
    made: list[str] = []
    plain = lists_of.ListPlan.__init__

    def spy(self: Any, name: str, body: Any, *args: Any) -> None:
        made.append(body.__name__)
        plain(self, name, body, *args)

    monkeypatch.setattr(lists_of.ListPlan, "__init__", spy)
    return made


# -- both ways ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [*((d,) for d in DTYPES), (torch.float64,), (*DTYPES, torch.float64)], ids=str)
@pytest.mark.parametrize("name", COLUMNS)
def test_eager_calls_are_those_of_the_dispatcher_bit_by_bit(
    name: str, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = make(name, dtypes)
    other = copied(lists)
    asked = counted(monkeypatch)
    for _ in range(3):
        ours, theirs = eager(name, lists), by_torch(name, other)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert theirs is not None
            assert same_bits(ours, theirs)
            assert ours.device == theirs.device
        assert_same(lists, other)
    assert asked == []


@pytest.mark.parametrize("name", COLUMNS)
def test_version_counters_rise_both_ways(name: str) -> None:
    lists, (_, written) = make(name), COLUMNS[name]
    for way in (contextlib.nullcontext(), contextlib.nullcontext(), Seen()):
        before = [[t._version for t in tensors] for tensors in lists]
        with way:
            eager(name, lists)
        for c, tensors in enumerate(lists):
            for t, version in zip(tensors, before[c], strict=True):
                assert (t._version > version) == (c in written), (way, c)


def test_autograd_sees_what_was_written_between_forward_and_backward() -> None:
    w, stash = torch.ones(4, requires_grad=True), torch.zeros(4)
    for _ in range(2):
        loss = w.square().sum()
        with torch.no_grad():
            ops.sam_restore_([w], [stash])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# -- what changes between two calls ---------------------------------------------------------------------------------------


def given_other_memory(t: Tensor) -> None:
    t.data = t.detach().clone()


def swapped_for_other_numbers(t: Tensor) -> None:
    t.data = t.detach().clone() * 0.5


def shrunk(t: Tensor) -> None:
    t.data = t.detach().flatten()[: t.numel() // 2].clone()


def grown(t: Tensor) -> None:
    t.data = torch.cat([t.detach().flatten(), torch.ones(3, dtype=t.dtype)])


def reshaped(t: Tensor) -> None:
    t.data = t.detach().reshape(1, *t.shape)


def shrunk_in_place(t: Tensor) -> None:
    t.resize_(t.numel() // 2)


def of_half_the_width(t: Tensor) -> None:
    t.data = t.detach().to(torch.float16 if t.dtype == torch.float32 else torch.float32)


def in_the_same_bytes(t: Tensor) -> None:
    t.data = t.detach().view(torch.bfloat16 if t.element_size() == 2 else torch.int32)


def replaced_by_one_without_data(t: Tensor) -> Tensor:
    return t.detach().to("meta")


def strided(t: Tensor) -> None:
    wide = torch.zeros(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t.detach()
    t.data = wide[..., 0]


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    f.__name__: f
    for f in (
        given_other_memory, swapped_for_other_numbers, shrunk, grown, reshaped, shrunk_in_place, of_half_the_width,
        in_the_same_bytes, replaced_by_one_without_data, strided,
    )
}  # fmt: skip


def outcome(call: Callable[[], Tensor | None]) -> tuple[str, Any]:
    """What a call comes to: its result, or its error without the numbers of the tensors."""
    try:
        return "result", call()
    except Exception as error:
        return type(error).__name__, str(error)


def fresh(name: str, lists: list[list[Tensor]]) -> tuple[str, Any]:
    """What the operation comes to where no plan is known."""
    operation = {n: o for n, o in vars(ops).items() if isinstance(o, type(ops._OP_NEGATE_))}
    kept = {n: o.__dict__.pop("_plans", None) for n, o in operation.items()}
    try:
        return outcome(functools.partial(eager, name, lists))
    finally:
        for n, o in operation.items():
            o.__dict__.pop("_plans", None)
            if kept[n] is not None:
                o.__dict__["_plans"] = kept[n]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", COLUMNS)
def test_a_plan_is_never_used_for_lists_that_have_changed(name: str, change: str) -> None:
    """Every column in turn, one tensor of it and all; what comes of it is what comes of the first call with such lists."""
    for column, whole, everywhere in itertools.product(range(COLUMNS[name][0]), (False, True), (False, True)):
        lists = make(name)
        eager(name, lists)
        eager(name, lists)
        for c in range(len(lists)) if everywhere else (column,):
            for i in range(len(SHAPES)) if whole else (1,):
                new = CHANGES[change](lists[c][i])
                lists[c][i] = lists[c][i] if new is None else new
        # Clones of expanded or strided tensors are laid out anew, so the changes are made to copies once more.
        other = [[t.detach().as_strided(t.shape, t.stride()) for t in tensors] for tensors in lists]
        other = [
            [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in o] for o in other
        ]
        kind, value = outcome(functools.partial(eager, name, lists))
        expected_kind, expected = fresh(name, other)
        assert kind == expected_kind, (value, expected)
        if isinstance(value, Tensor) and not value.is_meta:
            assert same_bits(value, expected)
        elif kind != "result":
            assert value == expected
        for one, two in zip(itertools.chain(*lists), itertools.chain(*other), strict=True):
            if not one.is_meta:
                assert torch.equal(one, two)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(("norm", "perturb", "restore"), repeat=2)))
@pytest.mark.parametrize("change", ["died", "moved", "shrank", "another dtype"])
def test_tensors_that_change_between_every_pair_of_calls(first: str, second: str, change: str) -> None:
    weights, grads = [torch.randn(1000), torch.randn(30)], [torch.randn(1000), torch.randn(30)]
    stash = [torch.zeros_like(w) for w in weights]

    def call(which: str) -> Tensor | None:
        if which == "norm":
            return ops.squared_norm(grads)
        if which == "perturb":
            return ops.sam_perturb_(weights, grads, stash, NORM, rho=1.0)
        return ops.sam_restore_(weights, stash)

    for _ in range(2):
        call(first)
        call(second)
    call(first)
    if change == "died":  # new tensors, which the allocator may well put where the old ones lay
        del weights[:], grads[:], stash[:]
        gc.collect()
        weights += [torch.randn(1000), torch.randn(30)]
        grads += [torch.randn(1000), torch.randn(30)]
        stash += [torch.randn(1000), torch.randn(30)]
    for tensors in (weights, grads, stash):
        for t in tensors:
            if change == "moved":
                t.data = t.clone()
            elif change == "shrank":
                t.resize_(t.numel() // 3)
            elif change == "another dtype":
                t.data = t.bfloat16()
    before = copied([weights, grads, stash])
    result = call(second)
    if second == "norm":
        assert result is not None
        assert result.item() == pytest.approx(sum(float(g.double().square().sum()) for g in before[1]), rel=1e-12)
    elif second == "restore":
        assert_same([weights], [before[2]])
        assert_same([stash], [before[2]])
    else:
        assert_same([stash], [before[0]])
        for w, was, g in zip(weights, before[0], before[1], strict=True):
            assert torch.allclose(
                w.double(), was.double() + g.double() / NORM.sqrt(), atol=5e-2 if w.itemsize == 2 else 1e-6
            )
    assert_same([grads], [before[1]])


@pytest.mark.parametrize("name", COLUMNS)
def test_new_gradients_at_every_step_take_the_plan_of_the_last_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after zero_grad(set_to_none=True): other tensors, laid out the same, elsewhere."""
    steps = [make(name, (torch.float32, torch.bfloat16)) for _ in range(5)]  # all alive, so that none lies where another did
    expected = [copied(lists) for lists in steps[1:]]
    eager(name, steps[0])
    asked, made = counted(monkeypatch), planned(monkeypatch)
    for lists, other in zip(steps[1:], expected, strict=True):
        ours, theirs = eager(name, lists), by_torch(name, other)
        if ours is not None:
            assert theirs is not None
            assert same_bits(ours, theirs)
        assert_same(lists, other)
    assert (asked, made) == ([], [])


def test_a_step_of_training_makes_no_plan_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2)), []
    made = planned(monkeypatch)
    for step in range(4):
        model.zero_grad(set_to_none=True)
        model(torch.randn(8, 40)).square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        kept.append(grads)  # their memory is not given out again
        before = [g.clone() for g in grads]
        ops.negate_grads_(model.parameters(), max_norm=1e9)
        ops.squared_norm(grads)
        assert all(torch.equal(g, -b) for g, b in zip(grads, before, strict=True))
        if step == 0:
            del made[:]
    assert made == []


@pytest.mark.parametrize("shared", ["the same", "the end", "the beginning", "all of a larger one"])
def test_written_tensors_that_come_to_share_memory_are_refused(shared: str) -> None:
    sizes = (6, 2) if shared == "all of a larger one" else (6, 6)
    a, b = (torch.ones(n) for n in sizes)
    for _ in range(2):
        ops.negate_([a, b])
    whole = torch.ones(20)
    a.data = whole[6:12]
    b.data = whole[{"the same": 6, "the end": 11, "the beginning": 1, "all of a larger one": 8}[shared] :][: sizes[1]]
    for tensors in ([a, b], [b, a]) if sizes[0] == sizes[1] else ([a, b],):
        with pytest.raises(ValueError, match="same memory"):
            ops.negate_(tensors)
    assert whole.tolist() == [1.0] * 20
    a.data, b.data = whole[:6], whole[6 : 6 + sizes[1]]  # side by side: nothing is shared
    ops.negate_([a, b])
    assert whole.tolist() == [-1.0] * (6 + sizes[1]) + [1.0] * (14 - sizes[1])


def test_written_tensors_that_interleave_are_served_wherever_they_lie() -> None:
    for _ in range(3):
        whole = torch.ones(5, 2)
        ops.negate_([whole[:, 0], whole[:, 1]])
        assert whole.eq(-1).all()
    whole = torch.ones(5, 2)
    with pytest.raises(ValueError, match="same memory"):
        ops.negate_([whole[:, 0], whole[:, 0]])


def test_memory_that_comes_back_as_another_dtype_or_size_takes_no_old_plan() -> None:
    """One piece of memory as an allocator hands it out again and again: the address says nothing about the tensor."""
    memory = torch.zeros(4096, dtype=torch.uint8)
    forms = [(d, n, stride) for d in (*DTYPES, torch.float64) for n in (1, 8, 100) for stride in (1, 2)]
    for dtype, n, stride in [*forms, *reversed(forms), *forms[::3]]:
        t = memory.view(dtype)[: n * stride : stride]
        values = torch.rand(n).to(dtype) + 0.5
        t.copy_(values)
        before = memory.clone()
        assert ops.squared_norm([t]).item() == pytest.approx(float(values.double().square().sum()), rel=1e-12)
        ops.negate_([t])
        assert same_bits(t, -values)
        ops.negate_([t])
        assert torch.equal(memory, before), (dtype, n, stride)


def test_memory_that_two_tensors_share_until_one_is_written_is_parted() -> None:
    """torch's lazy clones: reading their address for writing makes the copy."""
    for _ in range(3):
        first = torch.ones(9)
        second = first._lazy_clone()
        ops.negate_([second])
        assert (first.tolist(), second.tolist()) == ([1.0] * 9, [-1.0] * 9)
        third = second._lazy_clone()
        ops.sam_restore_([second], [first])
        assert (second.tolist(), third.tolist()) == ([1.0] * 9, [-1.0] * 9)


def test_memory_that_was_given_away_is_refused() -> None:
    t = torch.ones(50)
    for _ in range(2):
        ops.negate_([t])
    t.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no storage"):
        ops.negate_([t])


def test_a_view_with_its_sign_turned_is_not_taken_for_what_lies_in_memory() -> None:
    g, zeros = torch.randn(9), torch.zeros(9)
    assert ops.squared_distance([g], [g]).item() == 0
    assert ops.squared_distance([torch._neg_view(g)], [g]).item() == pytest.approx(float((2 * g).double().square().sum()))
    stash = torch.empty(9)
    for source in (g, torch._neg_view(g)):
        ops.sam_restore_([zeros], [source])
        assert torch.equal(zeros, source)
    ops.sam_perturb_([zeros], [torch._neg_view(g)], [stash], ops.squared_norm([g]), rho=0.0)
    part = torch.tensor([1 + 2j]).conj().imag  # what complex models hand over: one element, negated when it is read
    assert part.is_neg()
    ops.sam_restore_([zeros[:1]], [part])
    assert zeros[0].item() == -2


def test_padding_of_a_flat_buffer_is_nobodys_once_the_buffer_is_gone() -> None:
    buffer, views = plan.flat_like([torch.empty(3), torch.empty(64)])
    for _ in range(2):
        ops.negate_(views)
    storage = torch.tensor([], dtype=views[0].dtype).set_(views[0].untyped_storage())
    del buffer
    gc.collect()
    gap = storage[views[0].storage_offset() + 3 : views[1].storage_offset()]
    gap.fill_(5.0)
    ops.negate_(views)
    assert gap.eq(5.0).all()


def test_other_lengths_and_missing_columns_take_other_plans() -> None:
    grads = [torch.full((4,), float(i)) for i in range(1, 4)]
    for n in (3, 2, 3, 1, 2):
        assert ops.squared_norm(grads[:n]).item() == 4 * sum(i * i for i in range(1, n + 1))
        assert ops.squared_norm(grads[:n], grads[:n]).item() == 4 * sum(i**4 for i in range(1, n + 1))
        with pytest.raises(ValueError, match=f"{n} grads but {n + 1} weights"):
            ops.squared_norm(grads[:n], [*grads[:n], grads[0]])
    for bad, error in (([], ValueError), ([3.0], TypeError), ([torch.ones(2).int()], TypeError), ([None], TypeError)):
        with pytest.raises(error):
            ops.squared_norm(bad)


# -- what plans hold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize("name", COLUMNS)
def test_plans_keep_no_tensor(name: str, chosen: str) -> None:
    lists = make(name)
    with fastpost.use_backend(chosen):
        eager(name, lists)
        eager(name, lists)
    dead = [weakref.ref(t) for t in itertools.chain(*lists)]
    gc.disable()  # it shall not take the collector
    try:
        del lists
        assert all(ref() is None for ref in dead)
    finally:
        gc.enable()


def test_plans_keep_no_flat_buffer() -> None:
    buffer, views = plan.flat_like([torch.empty(3), torch.empty(64)])
    for _ in range(2):
        ops.negate_(views)
    dead = weakref.ref(buffer)
    gc.disable()
    try:
        del buffer, views
        assert dead() is None
    finally:
        gc.enable()


def test_old_plans_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(monkeypatch)
    for _ in range(2):
        del made[:]
        for n in range(1, 100):
            assert ops.squared_norm([torch.ones(n)]).item() == n
    assert len(made) == 99  # nothing of the first time, which may have found plans of other tests, is left
    del made[:]
    for n in range(99, 99 - lists_of._KEPT, -1):
        assert ops.squared_norm([torch.ones(n)]).item() == n
    assert made == []  # the latest are kept
    assert ops.squared_norm([torch.ones(99 - lists_of._KEPT)]).item() == 99 - lists_of._KEPT
    assert len(made) == 1


def test_a_backend_chosen_by_hand_serves_lists_that_another_has_served(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = reference.negate_
    monkeypatch.setattr(reference, "negate_", lambda bucket: (asked.append("reference"), plain(bucket)))
    from fastpost import dispatch

    dispatch._select.cache_clear()
    try:
        t = [torch.ones(3)]
        ops.negate_(t)
        ops.negate_(t)
        assert asked == []
        with fastpost.use_backend("reference"):
            ops.negate_(t)
            ops.negate_(t)
        assert asked == ["reference"] * 2
        ops.negate_(t)
        assert asked == ["reference"] * 2
        assert t[0].tolist() == [-1.0] * 3
    finally:
        dispatch._select.cache_clear()


def test_a_call_that_fails_leaves_no_plan_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    w, g, stash = [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]
    for _ in range(2):
        ops.sam_perturb_(w, g, stash, NORM, rho=0.0)
    for _ in range(3):
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            ops.sam_perturb_(w, g, stash, torch.ones(2), rho=0.0)
        ops.sam_perturb_(w, g, stash, NORM, rho=0.0)
    assert w[0].tolist() == [1.0] * 3


# -- what torch has to see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLUMNS)
def test_modes_and_profilers_see_calls_that_plans_could_serve(name: str) -> None:
    lists, op = make(name), name.split(" ")[0]
    eager(name, lists)
    eager(name, lists)
    with Seen() as mode:
        eager(name, lists)
    assert f"fastpost.{op}.default" in mode.names
    with torch.autograd.profiler.profile() as profile:
        eager(name, lists)
    assert f"fastpost::{op}" in {event.name for event in profile.function_events}


def test_fake_tensors_take_the_fake_kernels() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    g = [torch.ones(3), torch.ones(4)]
    ops.squared_norm(g)
    with FakeTensorMode() as mode:
        fake = ops.squared_norm([mode.from_tensor(t) for t in g])
    assert (fake.shape, fake.dtype, type(fake).__name__) == ((), torch.float64, "FakeTensor")
    assert ops.squared_norm([t.to("meta") for t in g]).is_meta


def test_subclasses_are_handed_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Logged(Tensor):
        pass

    asked = counted(monkeypatch)
    g = [torch.ones(3)]
    ops.squared_norm(g)
    assert ops.squared_norm([nn.Parameter(t, requires_grad=False) for t in g]).item() == 3
    assert asked == []
    assert float(ops.squared_norm([t.as_subclass(Logged) for t in g])) == 3
    assert asked == ["squared_norm"]


def test_tensors_that_autograd_records_are_handed_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(monkeypatch)
    w = torch.ones(3, requires_grad=True)
    ops.squared_norm([w.detach()])
    ops.squared_norm([w])
    assert asked == ["squared_norm"]
    with torch.no_grad():
        ops.squared_norm([w])
    assert asked == ["squared_norm"]


def test_requiring_a_gradient_or_no_longer_changes_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, made = counted(monkeypatch), planned(monkeypatch)
    w, stash = torch.ones(21), torch.zeros(21)
    for requires_grad in (False, True, False, True, True, False):
        w.requires_grad_(requires_grad)
        del asked[:]
        ops.squared_distance([w], [stash])
        assert asked == ["squared_distance"] * requires_grad
        with torch.no_grad():
            ops.squared_distance([w], [stash])
        assert asked == ["squared_distance"] * requires_grad
    assert made == ["_squared_distance"]


@pytest.mark.parametrize("name", COLUMNS)
def test_inference_mode_is_that_of_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = make(name)
    eager(name, outside)
    asked = counted(monkeypatch)
    with torch.inference_mode():
        inside = copied(outside)
        for lists in (outside, inside):
            other = copied(lists)
            for _ in range(2):
                ours, theirs = eager(name, lists), by_torch(name, other)
                assert_same(lists, other)
                if ours is not None:
                    assert theirs is not None
                    assert same_bits(ours, theirs)
                    assert ours.is_inference() == theirs.is_inference() is True
    assert asked == []
    other = copied(inside)
    eager(name, inside)  # inference tensors can be read and written, unrecorded, when the mode is over
    eager(name, other)
    assert_same(inside, other)
    ours = eager(name, outside)
    assert ours is None or not ours.is_inference()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "functionalize"])
@pytest.mark.parametrize("given", ["wrapped", "captured"])
@pytest.mark.parametrize("name", ["squared_norm", "negate_"])
def test_transformations_see_calls_that_plans_could_serve(
    name: str, given: str, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dispatcher makes of them is its affair; it is asked, both times."""
    captured, asked = torch.ones(3, 4), counted(monkeypatch)
    eager(name, [[captured]])

    def function(x: Tensor) -> Tensor:
        eager(name, [[x if given == "wrapped" else captured]])
        return x.square().sum()

    x, f = torch.ones(3, 4), torch.func
    run: dict[str, Callable[[], Any]] = {
        "grad": lambda: f.grad(function)(x),
        "vmap": lambda: f.vmap(function)(x),
        "jvp": lambda: f.jvp(function, (x,), (x,)),
        "functionalize": lambda: f.functionalize(function)(x),
    }
    assert asked == []
    for n in (1, 2):
        with contextlib.suppress(RuntimeError):  # most have no rule for these operations
            run[transform]()
        assert asked == [name] * n
    asked.clear()
    eager(name, [[captured]])
    assert asked == []


def test_sharded_tensors_are_handed_to_torch() -> None:
    """In a process of its own, which makes itself a group of one."""
    program = """
import torch, torch.distributed as dist
from fastpost.ops import params as ops
weight = torch.ones(8)
assert ops.squared_norm([weight]).item() == ops.squared_norm([weight]).item() == 8
asked, plain = [], type(ops._OP_NEGATE_)._by_dispatcher
type(ops._OP_NEGATE_)._by_dispatcher = lambda self, *a: (asked.append(self.name), plain(self, *a))[1]
from torch.distributed.tensor import DTensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sharded = DTensor.from_local(weight, init_device_mesh("cpu", (1,)))
for n in (1, 2):
    try:
        ops.squared_norm([sharded])
        raise AssertionError("a rule for shards: compare the result")
    except NotImplementedError as error:  # torch's own words, which it has for operations that it asks
        assert "squared_norm.default does not have a sharding strategy" in str(error), error
    assert asked == ["squared_norm"] * n, asked
assert ops.squared_norm([sharded.to_local()]).item() == 8
assert len(asked) == 2
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiled_calls_are_eager_ones_bit_by_bit() -> None:
    def step(weights: list[Tensor], grads: list[Tensor], stash: list[Tensor]) -> tuple[Tensor, Tensor]:
        norm = ops.squared_norm(grads)
        sums = ops.sam_perturb_(weights, grads, stash, norm, rho=0.1)
        ops.negate_(grads)
        return norm, sums

    lists = [[torch.randn(33), torch.randn(4, 5)] for _ in range(3)]
    other = copied(lists)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for ours, theirs in zip(step(*lists), compiled(*other), strict=True):
            assert same_bits(ours, theirs)
        assert_same(lists, other)


# -- threads --------------------------------------------------------------------------------------------------------------


def test_threads_that_call_the_same_operation_at_once() -> None:
    """Lists that look the same and lie elsewhere, long enough for the core to release the interpreter's lock."""
    count, rounds, errors = 4, 150, []
    start = threading.Barrier(count)
    shared = [torch.ones(9000), torch.ones(7)]

    def work(mine: int) -> None:
        try:
            weights = [torch.full((9000,), float(mine)), torch.full((7,), float(mine))]
            stash = [torch.zeros_like(w) for w in weights]
            kept = copied([weights])[0]
            start.wait()
            for _ in range(rounds):
                norm = ops.squared_norm(weights)
                assert norm.item() == 9007.0 * mine * mine
                assert ops.squared_norm(shared).item() == 9007.0
                ops.sam_perturb_(weights, weights, stash, norm, rho=1.0)
                assert not torch.equal(weights[0], kept[0])
                ops.sam_restore_(weights, stash)
                assert torch.equal(weights[0], kept[0])
                assert torch.equal(weights[1], kept[1])
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


class Normed(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        x = [torch.full((9000,), float(i)), torch.full((7,), float(i))]
        ops.negate_(x)
        return torch.stack([ops.squared_norm(x), x[0][0].double()])


def test_workers_of_a_loader_use_the_plans_they_inherit() -> None:
    warmed = [torch.ones(9000), torch.ones(7)]
    for _ in range(2):
        ops.negate_(warmed)
        ops.squared_norm(warmed)
    loader = torch.utils.data.DataLoader(Normed(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    rows = torch.cat(list(loader))
    assert rows.tolist() == [[9007.0 * i * i, -float(i)] for i in range(6)]
    assert ops.squared_norm(warmed).item() == 9007.0


def test_a_plan_in_use_is_not_lent_to_a_call_within_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    t, other = [torch.ones(4)], [torch.full((4,), 2.0)]
    plain, depth = cpu._plan, []

    def nested(bucket: plan.Bucket) -> Any:
        if not depth:
            depth.append(1)
            assert ops.squared_norm(other).item() == 16.0
            depth.clear()
        return plain(bucket)

    for _ in range(2):
        ops.squared_norm(t)
    monkeypatch.setattr(cpu, "_plan", nested)
    for _ in range(3):
        assert ops.squared_norm(t).item() == 4.0


# -- a torch whose tensors cannot be borrowed -----------------------------------------------------------------------------


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)
        native._attach(native.core())
        yield
    native._attach(native.core())


@pytest.mark.parametrize("name", COLUMNS)
def test_tensors_are_read_by_their_attributes_where_torch_lends_none(
    without_exchange: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_eager_calls_are_those_of_the_dispatcher_bit_by_bit(name, (torch.float32, torch.bfloat16), monkeypatch)
    for change in CHANGES:
        test_a_plan_is_never_used_for_lists_that_have_changed(name, change)


def test_results_are_ordinary_tensors() -> None:
    g = [torch.ones(3)]
    for _ in range(2):
        norm = ops.squared_norm(g)
        assert type(norm) is Tensor
        assert (norm.shape, norm.dtype, norm.device.type, norm.requires_grad) == ((), torch.float64, "cpu", False)
        norm += 1
        sums = ops.sam_perturb_([torch.ones(3)], g, [torch.ones(3)], norm, rho=0.1)
        assert (sums.shape, sums.is_contiguous(), sums.untyped_storage().nbytes()) == ((6,), True, 48)
        assert bits(sums).numel() == 6
