"""The native plan of spans on made-up addresses: nothing is dereferenced, so tensors may be larger than this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpost.backends import native

core = native.core()
CHUNK = 65536
ALIGNMENT = 256
SIZES = {core.DType.f32: 4, core.DType.bf16: 2, core.DType.f16: 2}
WEIGHT, GRAD, STASH = core.Column.weight, core.Column.grad, core.Column.stash

# Around nothing, vectors, the alignment and chunks; then around what 32 bits hold, signed and not, in elements and in bytes.
small = st.one_of(st.integers(0, 300), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]), st.integers(0, 5 * CHUNK))
huge = st.builds(
    lambda power, off: (1 << power) + off, st.sampled_from([29, 30, 31, 32, 33]), st.sampled_from([-1, 0, 1, 63, 70_001])
)


@st.composite
def lengths(draw: st.DrawFn) -> list[int]:
    """Up to 12 tensors, of which one may be huge."""
    numels = draw(st.lists(small, max_size=12))
    if draw(st.booleans()):
        numels.insert(draw(st.integers(0, len(numels))), draw(huge))
    return numels


def plan_of(numels: Sequence[int], dtype: Any = core.DType.f32, **columns: tuple[Sequence[int], bool]) -> Any:
    plan = core.Plan(dtype, list(numels), list(range(len(numels))))
    for name, (addresses, padded) in columns.items():
        plan.point(getattr(core.Column, name), list(addresses), padded)
    return plan


# -- chunks and tasks -----------------------------------------------------------------------------------------------------


def check_chunks(numels: Sequence[int], plan: Any) -> None:
    """Every element once, in order, in chunks that start on multiples of 65,536 within their tensor."""
    tensor, begin, length = np.array(plan.chunk_list(), dtype=np.int64).reshape(-1, 3).T
    assert plan.chunks == len(tensor)
    assert plan.elements == sum(numels)
    assert ((length > 0) & (length <= CHUNK)).all()
    assert (begin % CHUNK == 0).all()
    assert (np.diff(tensor) >= 0).all()
    first = np.diff(tensor, prepend=-1) > 0
    end = begin + length
    assert (begin[first] == 0).all()
    assert (begin[1:] == end[:-1])[~first[1:]].all()
    last = np.diff(tensor, append=len(numels)) > 0
    covered = np.zeros(len(numels), dtype=np.int64)
    covered[tensor[last]] = end[last]
    assert covered.tolist() == list(numels)


def check_tasks(plan: Any) -> None:
    """Consecutive chunks, each in one task; a task is the shortest run that holds 65,536 elements, but for the last one."""
    tasks = np.array(plan.task_list(), dtype=np.int64)
    length = np.array(plan.chunk_list(), dtype=np.int64).reshape(-1, 3)[:, 2]
    assert tasks[0] == 0
    assert tasks[-1] == len(length)
    assert (np.diff(tasks) > 0).all()
    if len(tasks) == 1:
        return
    held = np.add.reduceat(length, tasks[:-1])
    assert (held[:-1] >= CHUNK).all()
    assert (held - length[tasks[1:] - 1] < CHUNK).all()


@settings(deadline=None, max_examples=60)
@given(lengths())
def test_chunks_hold_every_element_once_and_tasks_every_chunk(numels: list[int]) -> None:
    plan = plan_of(numels)
    check_chunks(numels, plan)
    check_tasks(plan)


@settings(deadline=None, max_examples=40)
@given(lengths(), st.sampled_from(list(SIZES)), st.integers(0, 1 << 46), st.data())
def test_chunks_lie_where_their_elements_do(numels: list[int], dtype: Any, base: int, data: st.DataObject) -> None:
    """Each address is the tensor's plus element times size, past 2^32 bytes too; tensors start at any byte."""
    heads = [base + 1 + (t << 40) + data.draw(st.integers(0, 511)) for t in range(len(numels))]
    plan = plan_of(numels, dtype, grad=(heads, False))
    tensor, begin, _ = np.array(plan.chunk_list(), dtype=np.int64).reshape(-1, 3).T
    expected = np.array(heads, dtype=np.int64)[tensor] + begin * SIZES[dtype] if len(tensor) else []
    assert plan.chunk_addresses(GRAD) == list(expected)


def test_five_thousand_tensors() -> None:
    numels = np.random.default_rng(0).integers(0, 2000, 5000).tolist()
    numels[::7] = [0] * len(numels[::7])
    numels[2500] = (1 << 32) + 3
    plan = plan_of(numels)
    check_chunks(numels, plan)
    check_tasks(plan)
    # Small tensors share tasks: 5 million elements besides the huge one, gathered by 65,536.
    assert len(plan.task_list()) < (1 << 16) + 100


def test_a_plan_grows_with_chunks_not_with_elements() -> None:
    """64 billion elements in two tensors, 256 GiB: a million chunks and one span."""
    half = 1 << 35
    plan = plan_of([half, half], weight=([1 << 20, (1 << 20) + 4 * half], False))
    assert plan.elements == 1 << 36
    assert plan.chunks == 1 << 20
    assert len(plan.task_list()) == (1 << 20) + 1
    assert plan.chunk_addresses(WEIGHT)[-1] == (1 << 20) + 4 * ((1 << 36) - CHUNK)
    assert plan.span_list(1) == [([1 << 20], 1 << 38)]


# -- spans ----------------------------------------------------------------------------------------------------------------


def up(address: int) -> int:
    return -(-address // ALIGNMENT) * ALIGNMENT


class Layout(NamedTuple):
    """Where one column of tensors lies; padded: in one buffer of its own, each on 256 bytes."""

    addresses: list[int]
    padded: bool


@st.composite
def layouts(draw: st.DrawFn, sizes: Sequence[int]) -> Layout:
    """Tensors of these sizes in bytes: in one buffer, of which some are in another list, or side by side, or anywhere."""
    padded = draw(st.booleans())
    at = draw(st.integers(1, 1 << 30)) * (ALIGNMENT if padded else 1)
    addresses = []
    for size in sizes:
        kind = draw(st.sampled_from(["next", "next", "next", "boundary", "foreign", "missing"]))
        if padded:
            at = up(at) + (ALIGNMENT * draw(st.integers(1, 3)) if kind in ("foreign", "missing") else 0)
        elif kind == "boundary":  # as in a padded buffer, but what lies between belongs to somebody
            at = up(at)
        elif kind != "next":
            at += draw(st.one_of(st.integers(1, 600), st.integers(1, 1 << 40)))
        addresses.append(at if size or draw(st.booleans()) else 0)  # a tensor without elements may have no storage
        at += size
    return Layout(addresses, padded)


def check_spans(sizes: Sequence[int], columns: Sequence[Layout], spans: Sequence[tuple[list[int], int]]) -> None:
    """The spans, walked tensor by tensor, in bytes.

    Each tensor lies in the span it has reached, at one distance in every column; what a span holds besides is padding, where
    every column has some; and no two neighbours could have been one span.
    """
    padded = all(c.padded for c in columns)
    rest = iter(spans)
    base: list[int] = []
    length = reached = 0
    for size, *at in zip(sizes, *(c.addresses for c in columns), strict=True):
        if not size:
            continue
        distance = at[0] - base[0] if base else -1
        aligned = [a == b + distance for a, b in zip(at, base, strict=False)]
        follows = bool(base) and all(aligned) and distance in {reached, up(reached) if padded else reached}
        if not base or reached == length:
            assert not follows, "two spans that could be one"
            base, length = next(rest)
            assert base == at
            reached = 0
        else:
            assert follows, "a span holds foreign memory"
            reached = distance
        reached += size
        assert reached <= length, "a span ends within a tensor"
    assert reached == length, "a span goes on after its last tensor"
    assert next(rest, None) is None


@settings(deadline=None, max_examples=300)
@given(st.data(), lengths(), st.sampled_from(list(SIZES)), st.integers(1, 3))
def test_spans_hold_every_byte_and_nothing_foreign(data: st.DataObject, numels: list[int], dtype: Any, width: int) -> None:
    sizes = [n * SIZES[dtype] for n in numels]
    first = data.draw(layouts(sizes))
    # Half of the time the other columns lie like the first, elsewhere: only so do spans of several columns merge.
    columns = [first]
    for _ in range(width - 1):
        moved = Layout([a + (1 << 52) if a else 0 for a in first.addresses], data.draw(st.booleans()) and first.padded)
        columns.append(moved if data.draw(st.booleans()) else data.draw(layouts(sizes)))
    names = ("weight", "grad", "stash")[:width]
    plan = plan_of(numels, dtype, **dict(zip(names, columns, strict=True)))
    for chosen in itertools.product([False, True], repeat=width):
        mask = sum(1 << c for c in range(width) if chosen[c])
        if mask:
            spans = plan.span_list(mask)
            assert plan.spans(mask) == len(spans)
            check_spans(sizes, [c for c, wanted in zip(columns, chosen, strict=True) if wanted], spans)


@pytest.mark.parametrize("padded", [False, True])
def test_five_thousand_tensors_in_one_buffer_are_one_span(padded: bool) -> None:
    numels = np.random.default_rng(1).integers(0, 3000, 5000).tolist()
    sizes = [2 * n for n in numels]
    place: Callable[[int], int] = up if padded else (lambda address: address)
    addresses = []
    at = (1 << 33) + (0 if padded else 6)  # a head on no vector's boundary
    for size in sizes:
        at = place(at)
        addresses.append(at)
        at += size
    start = next(a for a, size in zip(addresses, sizes, strict=True) if size)
    plan = plan_of(numels, core.DType.bf16, weight=(addresses, padded), stash=([a + (1 << 40) for a in addresses], padded))
    assert plan.span_list(0b001) == [([start], at - start)]
    assert plan.span_list(0b101) == [([start, start + (1 << 40)], at - start)]
    # The same addresses, but the gaps are not the buffer's own: every gap parts two spans.
    gaps = sum(a % ALIGNMENT != 0 for a in itertools.accumulate(sizes[:-1], lambda end, size: up(end) + size, initial=0))
    plan.point(WEIGHT, addresses, False)
    separate = plan.span_list(0b101)
    check_spans(sizes, [Layout(addresses, False)] * 1, plan.span_list(0b001))
    assert len(separate) > gaps / 2 if padded else len(separate) == 1


def test_padding_is_crossed_only_where_every_column_has_it() -> None:
    addresses = [ALIGNMENT, 2 * ALIGNMENT, 3 * ALIGNMENT]
    numels = [10, 64, 7]
    merged = [([ALIGNMENT], 2 * ALIGNMENT + 28)]
    plan = plan_of(numels, weight=(addresses, True), grad=(addresses, False))
    assert plan.span_list(0b01) == merged
    # The second tensor fills its 256 bytes, so the third follows it without padding.
    parted = [(ALIGNMENT, 40), (2 * ALIGNMENT, ALIGNMENT + 28)]
    assert plan.span_list(0b10) == [([a], n) for a, n in parted]
    assert plan.span_list(0b11) == [([a, a], n) for a, n in parted]


def test_spans_follow_the_addresses() -> None:
    """Spans are kept from call to call; a column that is pointed elsewhere makes those it belongs to anew, and no others."""
    plan = plan_of([5, 5], weight=([1000, 1020], False), grad=([1000, 1020], False))
    assert plan.span_list(0b01) == [([1000], 40)]
    assert plan.span_list(0b11) == [([1000, 1000], 40)]
    plan.point(GRAD, [1000, 5000], False)
    assert plan.span_list(0b01) == [([1000], 40)]
    assert plan.span_list(0b10) == [([1000], 20), ([5000], 20)]
    assert plan.span_list(0b11) == [([1000, 1000], 20), ([1020, 5000], 20)]
    plan.point(GRAD, [5000, 5020], False)
    assert plan.span_list(0b11) == [([1000, 5000], 40)]


@pytest.mark.parametrize("numels", [[], [0], [0, 0, 0]])
def test_nothing_to_do(numels: list[int]) -> None:
    plan = plan_of(numels, weight=([0] * len(numels), False))
    assert plan.elements == plan.chunks == plan.spans(1) == 0
    assert plan.chunk_list() == plan.chunk_addresses(WEIGHT) == plan.span_list(1) == []
    assert plan.task_list() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.Plan(core.DType.f32, [1, 2], [0]), "one stream index per tensor"),
        (lambda: core.Plan(core.DType.f32, [1, -2], [0, 1]), "negative"),
        (lambda: plan_of([1, 2], weight=([64], False)), "1 addresses for 2 tensors"),
        (lambda: plan_of([1, 2], weight=([64, 0], False)), "tensor 1 has elements but no storage"),
        (lambda: plan_of([1], weight=([64], False)).span_list(0b11), "column 1 has no addresses"),
        (lambda: plan_of([1], weight=([64], False)).spans(0), "no such columns"),
        (lambda: plan_of([1], weight=([64], False)).spans(1 << 5), "no such columns"),
        (lambda: plan_of([1], weight=([64], False)).chunk_addresses(STASH), "column 2 has no addresses"),
    ],
)
def test_a_plan_refuses_what_makes_no_sense(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
