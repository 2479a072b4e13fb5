"""How an operation on lists of tensors finds its way to a kernel.

A call works from a plan: lists checked, sorted into buckets of one kernel call each, addresses and backends known. A plan
is kept after its call, without any tensor, and serves later calls with lists that look the same; the rule is in
csrc/tensors.h (`TensorLists::refresh`). The way down:

    public function -> ListOperation.call -> ListPlans.call (in the core) -> body -> a backend's function -> the core

or, where the backend offers the whole operation on one bucket, from `ListPlans.call` straight on in the core.

A call that torch has to see (torch.compile, torch.func, fake tensors, modes, subclasses, profilers) goes through its
dispatcher instead:

    public function -> ListOperation.call -> torch.ops.fastpost -> body -> ...
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastpost import plan
from fastpost.backends import native
from fastpost.dispatch import forced, select, serving, shortcut
from fastpost.ops.registry import define, eager

Lists = tuple["list[Tensor] | None", ...]  # one per argument that is a list, in the schema's order

_KEPT = 32  # plans per operation


# -- what may be worked on ------------------------------------------------------------------------------------------------


def check_lists(op: str, columns: Mapping[str, Sequence[Tensor]], *, written: Sequence[str]) -> None:
    """Raises one clear error when the lists cannot be worked on; touches no data.

    Raises:
        TypeError: an element is no tensor, or its dtype is not a real floating-point one.
        ValueError: lengths, shapes, dtypes or devices do not match, the lists are empty, a layout cannot be walked, or a
            tensor that is to be written appears twice.
    """
    (first_name, first), *others = columns.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{op}: {len(first)} {first_name} but {len(tensors)} {name}")
    if not first:
        raise ValueError(f"{op}: the list of {first_name} is empty")
    for name, tensors in columns.items():
        for i, t in enumerate(tensors):
            where = f"{op}: {name}[{i}]"
            if not isinstance(t, Tensor):
                raise TypeError(f"{where} is a {type(t).__name__}, not a tensor")
            if not t.dtype.is_floating_point or t.dtype.itemsize < 2:
                raise TypeError(f"{where} has dtype {t.dtype}; only float16, bfloat16, float32 and float64 are served")
            if t.layout != torch.strided or t.is_quantized:
                raise ValueError(f"{where} has layout {t.layout}, which cannot be walked; use a dense (strided) tensor")
            if t.is_meta != first[0].is_meta:
                raise ValueError(
                    f"{where} is on {t.device}, but {first_name}[0] is on {first[0].device}; meta tensors hold no data, so "
                    "either all tensors are on meta or none"
                )
            like = first[i]
            if t.shape != like.shape:
                raise ValueError(f"{where} has shape {tuple(t.shape)}, but {first_name}[{i}] has {tuple(like.shape)}")
            if t.dtype != like.dtype:
                raise ValueError(f"{where} has dtype {t.dtype}, but {first_name}[{i}] has {like.dtype}")
            if t.device != like.device:
                raise ValueError(f"{where} is on {t.device}, but {first_name}[{i}] is on {like.device}")
        if name in written:
            check_memory(op, name, tensors)


def check_memory(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raises ValueError where writing one element would change another, of the same tensor or of another."""
    if is_compiling():
        return
    rows = [i for i, t in enumerate(tensors) if t.device.type != "meta"]
    for i in rows:
        if not plan.distinct(tensors[i]):
            raise ValueError(f"{op}: {name}[{i}] is expanded (elements share memory); it cannot be written in place")
    shared = plan.overlap([tensors[i] for i in rows])
    if shared is not None:
        i, earlier = (rows[k] for k in shared)
        raise ValueError(f"{op}: {name}[{i}] and {name}[{earlier}] are the same memory; pass tied tensors once")


def mark_modified(tensors: Iterable[Tensor]) -> None:
    """Tells autograd that these tensors were written behind its back."""
    torch._C._increment_version(tensors if isinstance(tensors, list) else list(tensors))


# -- buckets --------------------------------------------------------------------------------------------------------------


def make_buckets(*, streams: Sequence[int] | None = None, **columns: Sequence[Tensor] | None) -> list[plan.Bucket]:
    """Sorts checked lists into buckets that one kernel call can serve, in order of first appearance.

    Args:
        streams: each tensor's number, which keys its random numbers; by default its place in the lists.
        columns: by the names of `plan.COLUMNS`; None for those left out.
    """
    given = {name: tensors for name, tensors in columns.items() if tensors is not None}
    lists = list(given.values())
    rows: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for i, t in enumerate(lists[0]):
        walkable = plan.dense(t) and all(other[i].stride() == t.stride() for other in lists[1:])
        walkable = walkable and not any(tensors[i].is_neg() for tensors in lists)
        rows.setdefault((t.device, t.dtype, walkable), []).append(i)
    return [
        plan.Bucket(
            [streams[i] if streams is not None else i for i in row],
            walkable=walkable,
            **{name: [tensors[i] for i in row] for name, tensors in given.items()},
        )
        for (_, _, walkable), row in rows.items()
    ]


def follow(bucket: plan.Bucket, *, held: bool) -> None:
    """Has the core look after the weights and gradients of a bucket that is kept from step to step: one call says whether
    they are laid out as they were, and points the native plan at them (`plan.Bucket.follow`).

    Nothing is done where there is no core, or where it cannot read these tensors.

    Args:
        held: whether the bucket's weights are always these very tensors.
    """
    if not bucket.walkable or native.failure() is not None:
        return
    lists = native.core().TensorLists
    columns = {"weights": bucket.weights, "grads": bucket.grads}
    bucket.followed = {
        "weights": lists((bucket.weights,), written=1, held=held),
        "grads": lists((bucket.grads,), written=0),
    }
    if not bucket.follow(**columns):
        bucket.unfollow()


def gradients_of(tensors: list[Tensor]) -> list[Tensor]:
    """The gradients that there are, in the tensors' order."""
    if native.failure() is not None:
        return [g for t in tensors if (g := t.grad) is not None]
    found: list[Tensor] = native.core().gradients_of(tensors)
    return found


class Selection:
    """Which of a list of tensors have a gradient, or require one, to be compared with later lists in one call of the core.

    Holds none of them: whoever relies on it holds those that have it.

    Args:
        tensors: in their order.
        attribute: "grad" or "requires_grad".
    """

    def __init__(self, tensors: list[Tensor], attribute: str) -> None:
        known = native.failure() is None
        self._known = native.core().Selection(tensors, attribute == "grad") if known else None

    def same_tensors(self, lists: list[list[Tensor]]) -> bool:
        """Whether these lists, one after another, hold the same tensors; False without a core."""
        return self._known is not None and self._known.same_tensors(lists)

    def same(self, lists: list[list[Tensor]]) -> bool:
        """The same, and whether none of those that had no gradient, or required none, has one, or requires one, now.

        Whether those that had one still do is not looked at: `plan.Bucket.take_gradients` does.
        """
        return self._known is not None and self._known.same(lists)


def run(op: str, bucket: plan.Bucket, *args: object) -> Tensor:
    """Runs one operation on one bucket through the backend that serves it."""
    function = bucket.functions.get(op)
    if function is None:
        function = select(op, bucket.device, bucket.dtype, walkable=bucket.walkable)
        if bucket.kept_plan is not None:
            bucket.functions[op] = function
    result: Tensor = function(bucket, *args)
    return result


def served_alike(operations: Sequence[str], buckets: Sequence[plan.Bucket]) -> bool:
    """Whether one backend serves all of these operations on all of these buckets, so that one call can."""
    found = {serving(op, b.device, b.dtype, walkable=b.walkable) for op in operations for b in buckets}
    return len(found) < 2 and None not in found


def plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum over one bucket more; buckets may lie on any devices, their sum lies on the first one's."""
    return part if total is None else total + part.to(total.device)


# -- plans ----------------------------------------------------------------------------------------------------------------


class ListPlan:
    """The buckets of a call's lists, for calls to come; holds no tensor between them.

    Args:
        name: of the operation.
        body: takes the buckets and the schema's arguments behind the lists.
        columns: which columns of a bucket the lists fill.
        lists: of the first call.
    """

    def __init__(self, name: str, body: Callable[..., Any], columns: Sequence[str], lists: Lists) -> None:
        self._name = name
        self._body = body
        self._columns = columns
        self.buckets = make_buckets(streams=None, **dict(zip(columns, lists, strict=True)))
        self._by_tensor: list[plan.Bucket] = []  # those whose backends take tensors, not addresses

    def settle(self, known: Any) -> tuple[Callable[..., Any], Any]:
        """After the first call, which has shown what backends work from: how to serve the next (see `ListPlans::keep`).

        Args:
            known: the lists as the core knows them; from now on it keeps the native plans pointed at where tensors lie.
        """
        numbers = [plan.COLUMNS.index(name) for name in self._columns]
        for bucket in self.buckets:
            if bucket.native_plan is None:
                self._by_tensor.append(bucket)
            else:
                bucket.kept_plan = bucket.native_plan
                known.bind(bucket.kept_plan, bucket.streams, numbers)
                for buffer in bucket.flat_buffers():
                    known.require_alive(weakref.ref(buffer))
            bucket.drop()
        if self._by_tensor:
            return self._with_tensors, None
        if len(self.buckets) == 1:
            (bucket,) = self.buckets
            whole = shortcut("whole_operation", bucket.device, bucket.dtype)
            serve = None if whole is None else whole(self._name)
            if serve is not None:
                return serve, bucket.kept_plan
        return self._body, self.buckets

    def _with_tensors(self, lists: Lists, args: tuple[Any, ...]) -> Any:
        for bucket in self._by_tensor:
            bucket.take(self._columns, lists)
        try:
            return self._body(self.buckets, *args)
        finally:
            for bucket in self._by_tensor:
                bucket.drop()


class ListOperation:
    """An operation on lists of tensors. Called by its public function; `torch.ops.fastpost` holds the same body.

    Args:
        schema: as for `registry.define`; its first arguments are the lists.
        body: takes the buckets and the schema's other arguments.
        fake: as for `registry.define`.
        columns: which column of a bucket each list fills, by the name of the argument.
    """

    def __init__(
        self, schema: str, body: Callable[..., Any], fake: Callable[..., Any] | None, columns: Mapping[str, str]
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self._body = body
        self._arguments, self._columns = tuple(columns), tuple(columns.values())
        self._op = define(schema, self._by_torch, fake).overload
        self._written = tuple(a.name for a in self._op._schema.arguments if a.is_write)

    def call(self, lists: Lists, *args: Any) -> Any:
        """Checks the lists, runs the operation and tells autograd what was written.

        Raises:
            TypeError, ValueError: as `check_lists`.
        """
        if is_dynamo_compiling() or self._plans is None:
            return self._by_dispatcher(lists, args)
        result = self._plans.call(lists, args, forced())
        return self._first(lists, args) if result is NotImplemented else result

    @functools.cached_property
    def _plans(self) -> Any:
        """The plans that are not in use (`ListPlans` in csrc/tensors.h); None without a core, which keeps them."""
        return None if native.failure() is not None else native.core().ListPlans(self._written_bits, _KEPT)

    @functools.cached_property
    def _written_bits(self) -> int:
        return sum(1 << self._arguments.index(name) for name in self._written)

    def _first(self, lists: Lists, args: tuple[Any, ...]) -> Any:
        """A call that no plan fits: makes one."""
        if not eager(lists):
            return self._by_dispatcher(lists, args)
        self._check(lists)
        backend, known = forced(), native.core().TensorLists(lists, self._written_bits)
        made = ListPlan(self.name, self._body, self._columns, lists)
        result = self._body(made.buckets, *args)
        self._plans.keep(known, *made.settle(known), backend)
        self._wrote(lists)
        return result

    def _by_dispatcher(self, lists: Lists, args: tuple[Any, ...]) -> Any:
        self._check(lists)
        result = self._op(*lists, *args)
        self._wrote(lists)
        return result

    def _by_torch(self, *args: Any) -> Any:
        """What `torch.ops.fastpost` runs."""
        lists = dict(zip(self._columns, args, strict=False))
        return self._body(make_buckets(**lists), *args[len(lists) :])

    def _check(self, lists: Lists) -> None:
        given = {name: tensors for name, tensors in zip(self._arguments, lists, strict=True) if tensors is not None}
        check_lists(self.name, given, written=self._written)

    def _wrote(self, lists: Lists) -> None:
        for name, tensors in zip(self._arguments, lists, strict=True):
            if name in self._written and tensors is not None:
                mark_modified(tensors)
