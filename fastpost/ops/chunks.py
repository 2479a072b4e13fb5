"""How many rows the fused head holds at a time, and the memory that a row costs: decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fastpost.ops.scalars import POSITIVE, check_number

# Where fresh memory has to be paged in (CPUs), a chunk that is written again and again is faster than one that holds all.
_MOST_ROWS = {"cpu": 1024}
_LEAST_ROWS = 64
# Products run at full speed on multiples of these. Preferred first.
_MULTIPLES = (256, 128)
_COLUMNS = 64  # elements that a row of logits is a multiple of, so that every row starts at a wide boundary


def skips_rows(device: torch.device) -> bool:
    """Whether rows without a weight are left out of a walk: where asking for them waits for nothing."""
    return device.type == "cpu"


def padded(vocab: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-vocab // _COLUMNS) * _COLUMNS


def row_bytes(vocab: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a row of both streams costs while its chunk is worked on.

    Logits, float32 or float64; where the products' operands are narrower, the logits' gradients beside them (else they take
    the logits' place). Of the hidden states three blocks of operands (clean, noised, difference) and three of results, and
    two more while operands are made.

    Args:
        dtype: of the products' operands.
    """
    work = 8 if dtype == torch.float64 else 4
    logits = work + (dtype.itemsize if dtype.itemsize < work else 0)
    return 2 * padded(vocab) * logits + width * (3 * dtype.itemsize + 5 * work)


def chunk_rows(
    op: str, rows: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device, budget: int,
    group: dist.ProcessGroup | None = None,
) -> int:  # fmt: skip
    """The most rows that a chunk may have under a budget in bytes: all of them where they fit, but on CPUs 1,024.

    Args:
        group: ranks that hold a slice of the vocabulary each. They walk their rows together, so that the widest slice
            decides for all; asking waits for the device.

    Raises:
        ValueError: the budget holds fewer than 64 rows, and fewer than there are.
    """
    return fitting_rows(op, rows, row_bytes(vocab, width, dtype), vocab, device, budget, group)


def distillation_row_bytes(vocab: int, streams: Sequence[tuple[int, torch.dtype, bool]]) -> int:
    """`row_bytes` of streams that have a head each.

    Args:
        streams: of each its width, its operands' dtype, and whether it has gradients.
    """
    total = 0
    for width, dtype, wanted in streams:
        work = 8 if dtype == torch.float64 else 4
        logits = work + (dtype.itemsize if wanted and dtype.itemsize < work else 0)
        total += padded(vocab) * logits + width * (dtype.itemsize + (2 * work if wanted else 0) + work)
    return total


def fitting_rows(
    op: str, rows: int, per_row: int, vocab: int, device: torch.device, budget: int,
    group: dist.ProcessGroup | None = None,
) -> int:  # fmt: skip
    """`chunk_rows` of rows of which each costs so many bytes."""
    if type(budget) is not int or budget <= 0:
        check_number(op, "memory_budget", budget, POSITIVE)
    if group is not None:
        most = torch.tensor(per_row, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        per_row = int(most)
    least = max(min(_LEAST_ROWS, rows), 1)
    fitting = int(budget) // per_row
    if fitting < least:
        raise ValueError(
            f"{op}: memory_budget of {int(budget):,} bytes holds {fitting} rows of two streams of {vocab:,} logits; "
            f"{least} rows need {least * per_row:,}"
        )
    return min(_MOST_ROWS.get(device.type, fitting), fitting)


def even_chunk(rows: int, most: int) -> int:
    """Rows of each chunk but the last: as few chunks as `most` rows allow, of a multiple of 256 rows, or of 128."""
    chunks = -(-rows // most)
    even = -(-rows // chunks)
    if chunks == 1:
        return even
    for multiple in _MULTIPLES:
        rounded = -(-even // multiple) * multiple
        if rounded <= most:
            return rounded
    return most // _MULTIPLES[-1] * _MULTIPLES[-1] or even
