"""Plans of spans: where the elements of tensor lists lie, so that one kernel call can walk them all.

A plan sorts the tensors of a list into buckets that one call can serve: same device, same dtype, memory that can be walked
by address. The native side of a bucket (chunks, spans) is kept from call to call and repointed when an address changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 16  # elements, as kChunkElements in csrc/core/plan.h
ALIGNMENT = 256  # bytes; every tensor of a flat buffer or a stash starts on this boundary


def aligned_offsets(numels: Sequence[int], itemsize: int) -> list[int]:
    """Where each tensor starts in a flat buffer, in elements, and at the end the size of the buffer."""
    unit = ALIGNMENT // itemsize
    offsets = [0]
    for n in numels:
        offsets.append(offsets[-1] + -(-n // unit) * unit)
    return offsets


def dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill a stretch of memory without gaps or overlap, in some order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def distinct(tensor: Tensor) -> bool:
    """Whether no two elements of the tensor share memory."""
    if tensor.numel() < 2 or tensor.is_contiguous():
        return True
    reach = 0  # of the dimensions so far, in elements
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                break
            reach += stride * (size - 1)
    else:
        return True
    if 0 in (stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        return False
    places = torch.zeros(tensor.shape, dtype=torch.int64)  # strides that interleave: only counting can tell
    for dimension, stride in enumerate(tensor.stride()):
        along = [-1 if d == dimension else 1 for d in range(tensor.ndim)]
        places += stride * torch.arange(tensor.shape[dimension]).view(along)
    return len(set(places.flatten().tolist())) == places.numel()


def overlap(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two tensors, the later one first, that share memory; None where there are none.

    Seen are tensors that begin at the same address and those that begin inside of a dense one.
    """
    where: dict[torch.device, list[tuple[int, int]]] = {}
    for i, t in enumerate(tensors):
        if t.numel():
            where.setdefault(t.device, []).append((t.data_ptr(), i))
    for begins in where.values():
        begins.sort()
        end, owner, last = 0, 0, -1
        for k, (begin, i) in enumerate(begins):
            if begin < end:
                return max(i, owner), min(i, owner)
            if begin == last:
                return i, begins[k - 1][1]
            last = begin
            if dense(tensors[i]):
                end, owner = begin + tensors[i].numel() * tensors[i].element_size(), i
    return None


def flat_like(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """One zeroed buffer with a view for each tensor, of its shape and strides; padding between them is zero.

    Args:
        tensors: at least one, all of one dtype, on one device.
        dtype: of the buffer; by default that of the tensors.
    """
    dtype = dtype or tensors[0].dtype
    numels = [t.numel() for t in tensors]
    offsets = aligned_offsets(numels, dtype.itemsize)
    # Room to start on an aligned address whatever the allocator returns.
    unit = ALIGNMENT // dtype.itemsize
    whole = torch.zeros(offsets[-1] + unit, dtype=dtype, device=tensors[0].device)
    skip = (-whole.data_ptr() % ALIGNMENT) // whole.element_size()
    buffer = whole[skip : skip + offsets[-1]]
    views = [
        torch.as_strided(buffer, t.shape, t.stride(), buffer.storage_offset() + o)
        if dense(t)
        else buffer[o : o + t.numel()].view(t.shape)
        for t, o in zip(tensors, offsets, strict=False)
    ]
    _flat_buffers[whole.untyped_storage().data_ptr()] = buffer
    return buffer, views


CODES = {torch.bfloat16: torch.int8, torch.float16: torch.int8, torch.float32: torch.int16}  # by the weights' dtype


class CodeList:
    """What the codes in a bucket's stash cannot tell of w: the elements whose distance from w + e does not fit into a code.

    How both are read is said in csrc/core/params.h.

    Args:
        elements: of the bucket.
        dtype: of its weights: bfloat16, float16 or float32.
        device: where they lie.

    Attributes:
        words: int64; the first counts the elements that wanted a place, of which as many as there are words left have one.
        waits: where a kernel that Python launches itself (Triton) notes which chunks it has decoded, or decoded and stepped:
            1 before, 0 after; None as long as nothing was launched.
        origins: w itself, while it is put back by operations of which each may be interrupted; else None. In the place of a
            tensor whose w is lost stands None.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        room = 64 + elements // (256 if dtype == torch.float32 else 4096)
        self.words = torch.zeros(1 + room, dtype=torch.int64, device=device)
        self.origins: Sequence[Tensor | None] | None = None
        self.waits: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.words.numel() - 1

    def grown(self) -> bool:
        """Makes room for those that found none, if there are any; waits for the device."""
        wanted = int(self.words[0])
        if wanted <= self.capacity:
            return False
        longer = torch.empty(1 + wanted + wanted // 8, dtype=torch.int64, device=self.words.device)
        longer[: self.words.numel()] = self.words
        longer[0] = self.capacity
        self.words = longer
        return True


COLUMNS = ("weights", "grads", "stash", "first", "second")  # in the order of csrc/core/plan.h


class Bucket:
    """The part of a tensor list that one kernel call serves, with up to five columns of equal shapes.

    Attributes:
        weights, grads, stash, first, second: the columns (the last two an optimizer's moments); empty where the operation
            does not use them.
        columns: the names of those that it does use.
        streams: each tensor's index in the user's list, which keys its random numbers.
        walkable: False when only the reference backend can serve these tensors.
        stashed: whether the stash holds the weights as they were. Whoever is about to perturb clears it; what perturbs sets
            it, before a weight is written or in the same call.
        launched: sums of a perturbation, which hold NaN until its kernel has run: what tells, after an interrupt, whether it
            was launched. None where nobody has to ask.
        stepping: the same for a step that takes the stash with it: not 0 for chunks that it has not reached.
        native_plan: where the core knows the tensors to lie; None as long as no backend has asked.
        kept_plan: the same, where the core keeps it pointed at the tensors of each call (`TensorLists` in csrc/tensors.h)
            and the columns are empty.
        followed: columns, by name, at which the core keeps the native plan pointed, as `TensorLists`; see `follow`.
        functions: the backends' functions by the operation's name, where they are kept.
        codes: what belongs to a stash of codes; None where the stash is a copy.
    """

    def __init__(
        self,
        streams: list[int],
        *,
        weights: list[Tensor] | None = None,
        grads: list[Tensor] | None = None,
        stash: list[Tensor] | None = None,
        first: list[Tensor] | None = None,
        second: list[Tensor] | None = None,
        walkable: bool = True,
    ) -> None:
        self.streams = streams
        self.weights = weights or []
        self.grads = grads or []
        self.stash = stash or []
        self.first = first or []
        self.second = second or []
        self.columns = tuple(name for name in COLUMNS if getattr(self, name))
        sample = (self.weights or self.grads)[0]
        self.device = sample.device
        self.dtype = sample.dtype
        self.walkable = walkable
        self.native_plan: Any = None
        self.kept_plan: Any = None
        self.followed: dict[str, Any] = {}
        self.functions: dict[str, Callable[..., Any]] = {}
        self.codes: CodeList | None = None
        self._stashed = False
        self.launched: Tensor | None = None
        self.stepping: Tensor | None = None
        self._pointed: dict[str, tuple[list[Tensor], list[int]]] = {}

    def take(self, columns: Sequence[str], lists: Sequence[list[Tensor] | None]) -> None:
        """Fills columns from the user's lists, of which the bucket has the rows of its streams."""
        for name, tensors in zip(columns, lists, strict=True):
            setattr(self, name, [] if tensors is None else [tensors[i] for i in self.streams])

    def drop(self) -> None:
        """Forgets all tensors; where they lay is known to the core."""
        for name in COLUMNS:
            setattr(self, name, [])
        self._pointed = {}

    @property
    def stashed(self) -> bool:
        if self.stepping is not None and not bool(self.stepping.any()):
            return False
        if self._stashed or (self.native_plan is not None and self.native_plan.stashed):
            return True
        return self.launched is not None and not bool(self.launched[:, -1].isnan().any())

    @stashed.setter
    def stashed(self, value: bool) -> None:
        # The native plan has it where there is one, so that a call of the core that decodes can clear it.
        self._stashed, self.launched, self.stepping = value and self.native_plan is None, None, None
        if self.native_plan is not None:
            self.native_plan.stashed = value

    def release_gradients(self) -> None:
        """Forgets the gradients, whose memory is then their owner's to free; where they lay is remembered, to compare."""
        self.grads = []
        if "grads" in self._pointed:
            self._pointed["grads"] = ([], self._pointed["grads"][1])

    def release_moments(self) -> None:
        """The same for the moments."""
        self.first, self.second = [], []
        for name in ("first", "second"):
            if name in self._pointed:
                self._pointed[name] = ([], self._pointed[name][1])

    def native(self, core: Any, dtype: Any) -> Any:
        """The bucket's native plan, its columns pointing at where the tensors lie now."""
        if self.native_plan is None:
            made = core.Plan(dtype, [t.numel() for t in self.weights or self.grads], self.streams)
            for name, lists in self.followed.items():
                lists.bind(made, range(len(self.streams)), [COLUMNS.index(name)])
            made.stashed = self._stashed
            self.native_plan, self._stashed = made, False  # an interrupt must not leave a plan that does not follow
        for number, name in enumerate(COLUMNS):
            tensors = getattr(self, name)
            known, addresses = self._pointed.get(name, (None, None))
            # Reading a thousand addresses costs more than a small kernel. Gradients and stashes stay where they are as
            # long as their list does; a weight can be given new storage behind our back at any time.
            if not tensors or (known is tensors and name != "weights") or (addresses and name in self.followed):
                continue
            now = list(map(Tensor.data_ptr, tensors))
            if now != addresses:
                self._pointed.pop(name, None)  # an interrupt must not leave the old addresses noted as the plan's
                self.native_plan.point(core.Column(number), now, flat_buffer(tensors) is not None)
            self._pointed[name] = (tensors, now)
        return self.native_plan

    def follow(self, **columns: list[Tensor]) -> bool:
        """Whether these tensors may take the place of followed ones: laid out as they were, and plain. Where they lie
        elsewhere the native plan follows."""
        for name, tensors in columns.items():
            lists = self.followed[name]
            if not lists.refresh((tensors,)):
                return False
            if lists.moved:  # maybe into a flat buffer, whose padding may then be written: pointed at anew
                self._pointed.pop(name, None)
        return True

    def take_gradients(self) -> bool:
        """Takes the gradients that the weights hold in place of those before; False, and nothing is taken, where `follow`
        would refuse one list or the other."""
        weights, grads = self.followed["weights"], self.followed["grads"]
        found = weights.take_gradients(grads, self.weights)
        if found is None:
            return False
        for name, lists in self.followed.items():
            if lists.moved:
                self._pointed.pop(name, None)
        self.grads = found
        return True

    def unfollow(self) -> None:
        """The core looks at the columns no more."""
        for name in self.followed:
            self._pointed.pop(name, None)
        self.followed = {}

    def flat_buffers(self) -> list[Tensor]:
        """The buffers of `flat_like` that the columns lie in, one each."""
        found = (flat_buffer(getattr(self, name)) for name in COLUMNS)
        return [buffer for buffer in found if buffer is not None]


class AdamWPart(NamedTuple):
    """One bucket of a step of AdamW that is made of several in one call, with what the formulas take.

    Attributes:
        bucket: with gradients and moments beside the weights.
        steps: one scalar per tensor, how many steps its moments have seen with this one; None for a tensor that is only
            restored, of which neither gradient nor moments are read.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        grad_scale: scalar that the gradients are divided by, on the bucket's device; None is 1.
        found_inf: scalar there; where it is not 0 the weights are only restored. None is 0.
    """

    bucket: Bucket
    steps: list[Tensor | None]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None


# Live buffers made by flat_like, by the address of their storage, so that a span crosses padding only where padding is all
# there is between two tensors.
_flat_buffers: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def flat_buffer(tensors: Sequence[Tensor]) -> Tensor | None:
    """The buffer made by `flat_like` in which all these tensors lie, whose padding may be written along with them."""
    if not tensors:
        return None
    storage = tensors[0].untyped_storage().data_ptr()
    alone = all(t.untyped_storage().data_ptr() == storage for t in tensors)
    return _flat_buffers.get(storage) if alone else None
