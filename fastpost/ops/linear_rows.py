"""The output head and the divergence of its rows, as torch.library sees them: one walk over chunks of rows.

Both streams are stacked, so the head's weight is read once for both. A chunk of rows costs three products: one makes the
logits, one carries their gradients to the hidden states, one to the weight. Between them the row kernel turns logits into
the operands of the other two.

The KL lives on what the streams differ by, and its two gradients G1 and G2 all but cancel. So what is multiplied is

    [G1 + G2; G2]    with [X1; X2 - X1] for the weight's gradient,    with the weight for [dX1 + dX2; dX2],

where neither the rounding of operands nor that of sums drowns the difference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.dispatch import select
from fastpost.ops.chunks import even_chunk, padded, skips_rows
from fastpost.ops.head import Head, grad_dtype, power_of_two
from fastpost.ops.reductions import out_dtype, smoothing_gap
from fastpost.ops.registry import define
from fastpost.ops.vocab_parallel import group_named, sharded_operand_rows
from fastpost.row_tasks import OperandTask


class Settings(NamedTuple):
    """A call but for its tensors, as the operation takes it.

    softcap 0: none. chunk: the most rows of a chunk. grad "none": the divergence has no weight, and only the clean stream is
    looked at. group "": the vocabulary is whole. divergence: a key of ROW_KERNELS. both_classify: the noised stream has a
    cross-entropy as well, where its row has a divergence.
    """

    ignore_index: int
    smoothing: float
    softcap: float
    temperature: float
    chunk: int
    grad: str
    dtype: torch.dtype
    group: str
    divergence: str = "symmetric_kl"
    both_classify: bool = False


# Which row kernel makes operands of a divergence's gradients.
ROW_KERNELS = {"symmetric_kl": "operand_rows", "js": "js_operand_rows"}


def _linear_divergence(
    hidden: Tensor,
    noised: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    temperature: float,
    chunk: int,
    grad: str,
    dtype: torch.dtype,
    group: str,
    divergence: str,
    both_classify: bool,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = Settings(ignore_index, smoothing, softcap, temperature, chunk, grad, dtype, group, divergence, both_classify)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Run(hidden, noised, weight, bias, labels, weights, how, want).over_all_rows()


class _Chunk(NamedTuple):
    """Memory for one chunk after another, as blocks of so many rows per stream.

    hidden: operands of the products, see `_Run._operands`.
    logits: of both streams, in the order of their operands.
    grads: the logits' gradients as operands, where those are not of the logits' dtype; else None, and they take the logits'
        place.
    carried: what goes back to the hidden states, and behind it a block of zeros; None where they want nothing.
    """

    rows: int
    hidden: Tensor
    logits: Tensor
    grads: Tensor | None
    carried: Tensor | None


class _Run:
    """One walk over the rows, a chunk at a time."""

    def __init__(
        self,
        hidden: Tensor,
        noised: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        weights: Tensor,
        how: Settings,
        want: list[bool],
    ) -> None:
        self.hidden, self.noised, self.labels, self.how = hidden, noised, labels, how
        self.head = Head(weight, bias, how.dtype)
        self.group = group_named(how.group) if how.group else None
        self.weights = weights if how.temperature == 1 else weights / how.temperature
        self.both = how.grad != "none"
        self.want_hidden, (self.want_weight, self.want_bias) = (want[0], want[1]), want[2:]
        shared = self.want_weight or self.want_bias
        # Which logits get a gradient: their operands are (G1 + G2, G2), or one of them alone.
        self.want = (want[0] or shared, (want[1] or shared) and how.grad in ("both", "noised"))
        # Streams that came in 16 bits are multiplied as they are. Elsewhere rounding, of operands or of float32 logits, may
        # drown what they differ by, so it is the difference that is multiplied.
        self.as_they_are = self.both and how.dtype.itemsize == 2 and min(hidden.dtype.itemsize, noised.dtype.itemsize) == 2
        self.skips = skips_rows(hidden.device)
        # Rows that do not count may hold NaN, and 0 times NaN is not 0.
        self.live = None if self.skips else weights.any(0).unsqueeze(-1)
        self.zero = hidden.new_zeros(())

    def over_all_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head, device = self.head, self.hidden.device
        n, (vocab, width) = len(self.hidden), head.weight.shape
        used = self._used()
        total = n if used is None else len(used)

        def room(shape: tuple[int, ...], dtype: torch.dtype, written: bool) -> Tensor:
            return (torch.empty if written else torch.zeros)(shape, dtype=dtype, device=device)

        all_rows = used is None and total > 0
        self.values = room(tuple(self.weights.shape), torch.float64, all_rows)
        reached = [wanted and live for wanted, live in zip(self.want_hidden, self.want, strict=True)]
        self.grad_hidden = room(
            (sum(self.want_hidden), n, width), grad_dtype(self.hidden, self.noised),
            all_rows and reached == list(self.want_hidden),
        )  # fmt: skip
        # Which of the blocks that are carried back are handed out, and to which of the hidden states.
        first, count = int(not reached[0]), sum(reached)
        source, target = first - int(not self.want[0]), first - int(not self.want_hidden[0])
        self.source, self.target = slice(source, source + count), slice(target, target + count)
        self.grad_weight = room((vocab, width) if self.want_weight else (0,), head.work, self.want_weight and total > 0)
        self.grad_bias = room((vocab,) if self.want_bias else (0,), head.work, False)
        if total:
            size = even_chunk(total, self.how.chunk)
            chunk = self._chunk(size, any(reached))
            for at in range(0, total, size):
                rows = slice(at, min(at + size, total))
                if rows.stop - at < chunk.rows and chunk.carried is not None:
                    chunk = chunk._replace(carried=self._carried(rows.stop - at))
                self._over(rows if used is None else used[rows], rows.stop - at, chunk, add=at > 0)
        if self.group is not None and self.grad_hidden.numel():  # each rank's columns have given their part of dX
            dist.all_reduce(self.grad_hidden, group=self.group)
        return self.values, self.grad_hidden, self.grad_weight, self.grad_bias

    def _used(self) -> Tensor | None:
        """The rows that have a weight, where asking is free; None for all. Padding and prompts then cost nothing."""
        if not self.skips:
            return None
        used = self.weights.any(0)
        return None if bool(used.all()) else used.nonzero().squeeze(-1)

    def _chunk(self, rows: int, carries: bool) -> _Chunk:
        head, device = self.head, self.hidden.device
        vocab, width = head.weight.shape
        blocks = 3 if self.as_they_are else 2 if self.both else 1

        def matrix(blocks: int, columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((blocks * rows, columns), dtype=dtype, device=device)

        return _Chunk(
            rows,
            matrix(blocks, width, head.dtype),
            matrix(2 if self.both else 1, padded(vocab), head.work)[:, :vocab],
            matrix(sum(self.want), padded(vocab), head.dtype)[:, :vocab] if head.dtype != head.work else None,
            self._carried(rows) if carries else None,
        )

    def _carried(self, rows: int) -> Tensor:
        shape = (sum(self.want) + 1, rows, self.head.weight.shape[1])
        carried = torch.empty(shape, dtype=self.head.work, device=self.hidden.device)
        carried[-1].zero_()
        return carried

    # -- a chunk ----------------------------------------------------------------------------------------------------------

    def _over(self, rows: slice | Tensor, n: int, chunk: _Chunk, add: bool) -> None:
        """One chunk of n rows; `add`: there were others before."""
        head = self.head
        x, factor = self._operands(rows, n, chunk.hidden)
        clean, noised = self._logits(x, factor, n, chunk.logits)
        # float16 has to know its largest before it can hold gradients: so they are float32 first.
        scaled = head.dtype == torch.float16
        if chunk.grads is None or scaled:
            places = [clean, noised]
        else:
            places = [*torch.split(chunk.grads[: n * sum(self.want)], n)] * (1 if all(self.want) else 2)
        first, second = (place if wanted else None for place, wanted in zip(places, self.want, strict=True))
        self._divergence(rows, n, (clean, noised), first, second)
        grads = [g for g in (first, second) if g is not None]
        if not grads:
            return
        if self.want_bias:
            self.grad_bias += grads[0].sum(0, dtype=head.work)
        carried = chunk.carried
        if scaled:
            assert chunk.grads is not None
            self._carry_scaled(grads, chunk.grads, x, factor, carried, add)
        else:
            stacked = grads[0] if len(grads) == 1 else (chunk.logits if chunk.grads is None else chunk.grads)[: 2 * n]
            if carried is not None:
                head.hidden_gradient(stacked, carried[:-1].view(len(stacked), -1))
            if self.want_weight:
                at = n if self.as_they_are else 0
                head.weight_gradient(stacked, x[at : at + len(stacked)], self.grad_weight, add=add)
        if carried is not None:
            self._hand_out(rows, carried)

    def _operands(self, rows: slice | Tensor, n: int, room: Tensor) -> tuple[Tensor, Tensor | None]:
        """The hidden states as the products take them, and the power of two that float16 differences were multiplied by.

        Blocks of n rows: the noised stream where it is multiplied as it is, the clean one, the difference. Logits are made
        of the first two, the weight's gradient of the last two.
        """
        room = room[: n * (3 if self.as_they_are else 2 if self.both else 1)]
        blocks = list(torch.split(room, n))
        clean_block = blocks[1 if self.as_they_are else 0]
        clean = self._counting(self.hidden, rows, clean_block)
        if not self.both:
            return room, None
        if self.as_they_are:
            noised = self._counting(self.noised, rows, blocks[0])
            clean, noised = clean_block, blocks[0]
        else:
            noised = self._counting(self.noised, rows, None)
            if noised.dtype.itemsize < clean_block.dtype.itemsize:
                noised = noised.to(clean_block.dtype)
            if clean.dtype.itemsize < noised.dtype.itemsize:
                clean = clean_block
        if self.head.dtype != torch.float16:
            torch.sub(noised, clean, out=blocks[-1])
            return room, None
        difference = noised.float() - clean.float()
        factor = power_of_two(difference)
        torch.mul(difference, factor, out=blocks[-1])
        return room, factor

    def _counting(self, stream: Tensor, rows: slice | Tensor, out: Tensor | None) -> Tensor:
        """These rows of a stream, zeros in place of those that do not count; copied to `out`, where there is one."""
        part = stream[rows]
        if self.live is not None:
            live = self.live[rows]
            if out is not None and out.dtype == part.dtype:
                return torch.where(live, part, self.zero, out=out)
            part = torch.where(live, part, self.zero)
        if out is not None:
            out.copy_(part)
        return part

    def _logits(self, x: Tensor, factor: Tensor | None, n: int, room: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams' logits, made in `room`; with one stream that stands in for the other."""
        head, how = self.head, self.how
        logits = room[: (2 if self.both else 1) * n]
        head.products(x[: len(logits)], logits)
        clean, noised = (logits[n:], logits[:n]) if self.as_they_are else (logits[:n], logits[-n:])
        apart = self.both and not self.as_they_are  # the noised ones are the difference as yet
        if head.bias is not None:
            (clean if apart else logits).add_(head.bias)
        if apart:
            if factor is not None:
                noised.div_(factor)
            noised.add_(clean)
        if how.softcap:
            logits.div_(how.softcap).tanh_().mul_(how.softcap)
        if how.temperature != 1:
            logits.div_(how.temperature)
        return clean, noised

    def _divergence(
        self, rows: slice | Tensor, n: int, logits: tuple[Tensor, Tensor], first: Tensor | None, second: Tensor | None
    ) -> None:
        """Values of these rows, and the logits' gradients in `first` and `second`."""
        how, group = self.how, self.group
        weights = self.weights[:, rows]
        labels = None if self.labels is None else self.labels[rows]
        gap = None
        if how.smoothing and labels is not None and group is None:
            counts = labels != how.ignore_index
            gap = sum(smoothing_gap(z, labels, counts) for z in (logits if how.both_classify else logits[:1]))
        values = self.values[:, rows] if isinstance(rows, slice) else torch.empty_like(weights)
        task = OperandTask(
            *logits,
            labels,
            how.ignore_index,
            weights[0],
            None if labels is None else weights[1],
            kl_out=values[0],
            ce_out=None if labels is None else values[1],
            first=first,
            second=second,
            smoothing=how.smoothing,
            cap=how.softcap / how.temperature,
            teaches=how.grad != "noised",
            noised_classifies=how.both_classify,
        )
        if group is None:
            select(ROW_KERNELS[how.divergence], task.clean.device, task.clean.dtype)(task)
        else:
            sharded_operand_rows(task, group)
        if gap is not None:
            values[1].add_(gap, alpha=how.smoothing)
        if not isinstance(rows, slice):
            self.values[:, rows] = values

    def _carry_scaled(
        self,
        grads: list[Tensor],
        room: Tensor,
        x: Tensor,
        difference_factor: Tensor | None,
        carried: Tensor | None,
        add: bool,
    ) -> None:
        """Both products of float16 operands, each stream's gradient multiplied by a power of two of its own: float16 ends at
        6e-8, where the gradients of a mean over tokens lie."""
        n = len(grads[0])
        against = x[n if self.as_they_are else 0 :]
        for k, grad in enumerate(grads):
            block = slice(k * n, (k + 1) * n)
            factor = power_of_two(grad)
            operand = torch.mul(grad, factor, out=room[block])
            if carried is not None:
                self.head.hidden_gradient(operand, carried[k])
                carried[k].div_(factor)
            if self.want_weight:
                both = factor if k == 0 or difference_factor is None else factor * difference_factor
                self.head.weight_gradient(operand, against[block], self.grad_weight, add=add or k > 0, factor=both)

    def _hand_out(self, rows: slice | Tensor, carried: Tensor) -> None:
        """[dX1 + dX2, dX2, 0] less what comes next are the hidden states' gradients."""
        blocks = carried[:-1][self.source], carried[1:][self.source]
        if isinstance(rows, slice):
            torch.sub(*blocks, out=self.grad_hidden[self.target, rows])
        else:
            self.grad_hidden[self.target, rows] = torch.sub(*blocks).to(self.grad_hidden.dtype)


def _fake(hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    weights, dtype, want = rest[1], rest[8], rest[-1]
    work = out_dtype(dtype)
    return (
        hidden.new_empty(weights.shape, dtype=torch.float64),
        hidden.new_empty((sum(want[:2]), *hidden.shape), dtype=grad_dtype(hidden, noised)),
        hidden.new_empty(weight.shape if want[2] else 0, dtype=work),
        hidden.new_empty(weight.shape[0] if want[3] else 0, dtype=work),
    )


linear_divergence = define(
    "linear_divergence(Tensor hidden, Tensor noised, Tensor weight, Tensor? bias, Tensor? labels, Tensor weights, "
    "int ignore_index, float smoothing, float softcap, float temperature, int chunk, str grad, ScalarType dtype, str group, "
    "str divergence, bool both_classify, bool[] want) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_divergence,
    _fake,
)
