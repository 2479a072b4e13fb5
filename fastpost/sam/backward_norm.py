"""norm="backward": the ascent's norm summed up as gradients arrive, while they lie in a cache.

A hook on each parameter only notes it. Once the gradients noted fill a cache, one call sums up their squares, chunk by
chunk. At the ascent the sums of all chunks are added up in the order of the parameters, so that the order in which hooks
fired changes no bit. A gradient that is not the one that was summed up is summed up then.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost import distributed
from fastpost.ops import params as ops
from fastpost.sam.buckets import ParameterBucket, ShardReducer
from fastpost.sam.hooks import ParameterHooks
from fastpost.sam.perturbation import PerturbParams
from fastpost.sam.scopes import Scope, StepScope
from fastpost.sam.variants import Variant

# Bytes of gradients that are noted before they are summed up: what a core's own cache holds, and an accelerator's.
ON_CPU, ELSEWHERE = 1 << 20, 16 << 20
_SERVED = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
TOLERANCE = 1e-4  # of e e against rho^2, where float32's rounding leaves about 1e-7


def refuse_options(variant: Variant, scope: Scope) -> None:
    """Raises ValueError where the norm is not that of the gradients as backward leaves them."""
    if variant.overrides("direction"):
        raise ValueError(
            f"SAM: norm='backward' sums up the squares of gradients, and {type(variant).__name__} makes a direction of its "
            "own from them; leave norm out"
        )
    if isinstance(scope, StepScope):
        raise ValueError(
            f"SAM: norm='backward' has to know during backward what is in scope, and {type(scope).__name__} says it at the "
            "ascent; leave norm out"
        )


def refuse_groups(groups: Iterable[dict[str, Any]]) -> None:
    """The same for an optimizer's groups."""
    for group in groups:
        if group["adaptive"]:
            raise ValueError("SAM: norm='backward' sums up the squares of g, and ASAM's norm is of t g; leave norm out")
        if distributed.several() and not all(map(distributed.is_sharded, group["params"])):
            raise ValueError(
                "SAM: norm='backward' serves one process, and sharded parameters (FSDP2): replicas (DDP) exchange their "
                "gradients after they have been accumulated; leave norm out"
            )


class Norms(NamedTuple):
    """The norm of an ascent's gradients over all ranks, in float64 scalars.

    Attributes:
        norm: its square, which is not finite where a gradient, or a variant's radius, is not.
        squared: what perturbing divides by.
        weighted: the sum of rho^2 |g|^2 over buckets with radii of their own; None where the norm was summed up just now.
        readable: whether on all ranks it can be read without waiting for a device; all have the same answer.
    """

    norm: Tensor
    squared: Tensor
    weighted: Tensor | None = None
    readable: bool = False

    def within(self, radius: Tensor) -> Norms:
        """With a factor d on rho: rho d / |g| is rho / sqrt(|g|^2 / d^2); where d is 0 nothing moves."""
        radius = radius.to(self.squared.device, torch.float64)
        return self._replace(norm=self.norm + 0 * radius, squared=self.squared / radius.square())

    def _missed(self, sums: Tensor) -> Tensor | None:
        """Whether e e, summed up from the gradients that perturbing has read, is not what these norms make it: somebody has
        written gradients behind autograd's back."""
        if self.weighted is None:
            return None
        expected = (self.weighted / self.squared).to(sums.device)
        return (sums[0] - expected).abs() > TOLERANCE * expected

    def are_stale(self, sums: Tensor, reducer: ShardReducer) -> bool:
        """Whether they are not those of the gradients that perturbing has read, on any rank; False where asking waits for a
        device, on any rank: all ask the others, or none does.

        Args:
            sums: as `Perturbation.apply` returns them.
            reducer: by which all ranks come to one answer, or some would sum up anew alone.
        """
        missed = self._missed(sums)
        if missed is None or not self.readable or not bool(reducer.agree(missed.float())):
            return False
        warnings.warn(
            "SAM: gradients were written after backward where autograd does not see it, as through .grad.data; "
            "norm='backward' sums them up twice then, so take norm='step'",
            stacklevel=5,
        )
        return True

    def judged(self, sums: Tensor) -> Tensor:
        """`norm`; NaN where nobody has asked and it is stale, so that the step is skipped."""
        missed = None if self.readable else self._missed(sums)
        return self.norm if missed is None else torch.where(missed.to(self.norm.device), torch.nan, self.norm)


class Part(NamedTuple):
    """The squares of one gradient, and what it was when they were summed up.

    Attributes:
        gradient: a weak reference to this rank's part of it.
        version, address: of that tensor. Writing that autograd counts changes the one, other memory the other.
        sums: float64, of each chunk.
        stream: of the device, that sums them.
    """

    gradient: Callable[[], Tensor | None]
    version: int
    address: int
    sums: Tensor
    stream: int

    def is_of(self, gradient: Tensor) -> bool:
        """Whether this gradient is known to be what was summed up."""
        return self.gradient() is gradient and gradient._version == self.version and gradient.data_ptr() == self.address


class BackwardNorm:
    """The squares of gradients, taken as these arrive.

    Attributes:
        listens: whether gradients that arrive now may be those of an ascent. Only time depends on it.
    """

    def __init__(self, reducer: ShardReducer) -> None:
        self.listens = False
        self._reducer = reducer
        self._hooks = ParameterHooks()
        self._noted: dict[Hashable, dict[int, Tensor]] = {}  # by device, dtype and stream: parameters, by id
        self._bytes: dict[Hashable, int] = {}
        self._parts: dict[int, Part] = {}  # by the parameter's id

    def watch(self, params: list[list[Tensor]]) -> None:
        """Looks at the gradients of the parameters in these lists, and at no others."""
        mine = weakref.ref(self)

        def arrived(p: Tensor) -> None:
            this = mine()
            if this is not None and this.listens:
                this._note(p)

        self._hooks.put(params, lambda p: [p.register_post_accumulate_grad_hook(arrived)])  # type: ignore[no-untyped-call]

    def begin(self, listens: bool) -> None:
        """The gradients were used or dropped, and what arrives next is an ascent's, or is not."""
        self.listens = listens
        self._noted.clear()
        self._bytes.clear()
        self._parts.clear()

    def _note(self, p: Tensor) -> None:
        gradient = p.grad
        if gradient is None:  # another hook took it
            return
        kind: Hashable = gradient.dtype  # on the CPU; tuples of devices take longer than a small gradient
        limit = ON_CPU
        if not gradient.is_cpu:
            kind, limit = (gradient.device, gradient.dtype, _stream(gradient.device)), ELSEWHERE
        noted = self._noted.get(kind)
        if noted is None:
            noted, self._bytes[kind] = self._noted.setdefault(kind, {}), 0
        noted[id(p)] = p
        self._bytes[kind] += gradient.nbytes
        if self._bytes[kind] >= limit:
            self._sum_up(kind)

    @ops.without_grad
    def _sum_up(self, kind: Hashable) -> None:
        params = self._noted.pop(kind)
        found = {key: g for key, p in params.items() if (g := _part_of_gradient(p)) is not None}
        if not found:
            return
        gradients = list(found.values())
        stream = _stream(gradients[0].device)
        sums = ops.chunk_squares(gradients)
        for key, g, mine in zip(found, gradients, sums, strict=True):
            self._parts[key] = Part(weakref.ref(g), g._version, g.data_ptr(), mine, stream)

    def _squares(self, b: ParameterBucket) -> Tensor:
        """The sum over a bucket, of the parts known and of those that are summed up now."""
        gradients = b.bucket.grads
        parts = [self._parts.get(id(p)) for p in b.params]
        sums = [None if part is None or not part.is_of(g) else part.sums for part, g in zip(parts, gradients, strict=True)]
        if b.device_type == "cuda":
            self._hand_over([part for part in parts if part is not None], b.bucket.device)
        rest = [row for row, known in enumerate(sums) if known is None]
        for row, fresh in zip(rest, ops.chunk_squares([gradients[row] for row in rest]) if rest else (), strict=True):
            sums[row] = fresh
        every = torch.cat([part for part in sums if part is not None])
        if not every.numel():
            return every.sum()
        # On the CPU one after another, as `squared_norm` adds them up.
        return every.cumsum(0)[-1] if every.is_cpu else every.sum()

    def _hand_over(self, parts: Sequence[Part], device: torch.device) -> None:
        """Keeps sums that another stream has allocated until this one has read them."""
        here = _stream(device)
        for part in parts:
            if part.stream != here:
                part.sums.record_stream(torch.cuda.current_stream(device))

    def norms(self, buckets: Sequence[ParameterBucket], settings: Sequence[PerturbParams]) -> Norms | None:
        """The norm over all ranks; None where it has to be summed up anew to be known."""
        for kind in list(self._noted):
            self._sum_up(kind)
        others = self._reducer.others
        sums = []
        for b, setting in zip(buckets, settings, strict=True):
            squares = self._squares(b)
            parts = [squares, squares * setting.rho**2]
            if others:
                # A rank without buckets has its sums on the CPU: whether all ranks have is summed up as well.
                parts.append(torch.full_like(squares, b.device_type != "cpu"))
            sums.append((b.key, torch.stack(parts)))
        squared, weighted, *elsewhere = self._reducer.total(sums, (2 + others,)).unbind()
        readable = squared.is_cpu and not any(map(float, elsewhere))
        if readable and not 0 < float(squared) < math.inf:
            return None  # nothing will be perturbed that could tell
        return Norms(squared, squared, weighted, readable)


def _part_of_gradient(p: Tensor) -> Tensor | None:
    """This rank's part of a gradient, where it can be summed up and talks to no other rank."""
    gradient = p.grad
    if type(gradient) is Tensor and gradient.dtype in _SERVED and gradient.layout == torch.strided:
        return None if gradient.is_meta else gradient
    if gradient is None or (distributed.is_sharded(gradient) and _is_placed_otherwise(p, gradient)):
        return None
    part = distributed.local(gradient)
    served = type(part) is Tensor and part.layout == torch.strided and not part.is_meta
    return part if served and part.dtype in _SERVED else None


def _is_placed_otherwise(p: Any, gradient: Any) -> bool:
    return tuple(gradient.placements) != tuple(p.placements)


def _stream(device: torch.device) -> int:
    """The stream that works on a CUDA device now; 0 on others."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))
