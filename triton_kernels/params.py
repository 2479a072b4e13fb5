"""Parameter lists: norm, perturb, restore, sign flips; long, as all kernels share one table and one walk over it.

A table in device memory says where the tensors of a list lie, so that one launch walks all of them; each program finds the
chunk of 65,536 elements that is its own. A table is kept from call to call, and sent again only if an address has changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import in_two_floats
from .numerics import CHUNK, ordered_sum, philox_words, round_randomly, round_to

SUMS = 6  # e.e, s.s, e.s, v.v, e.v, changed
_BLOCK = 2048
CODED_BLOCK = 1024  # of a perturbation that keeps codes: twice as many take 230 registers a thread


class Table:
    """Where some columns of a list of tensors lie (weights, gradients, ...; all of a column of one dtype).

    Attributes:
        chunks: how many programs walk the list.
        width: of a tensor's row in `memory`.
        memory: int64 on the tensors' device, for `_row`: how many tensors there are; for each a row of its addresses,
            length, stream and first chunk; then for every chunk the tensor that it lies in.
        aligned: whether every address lies on 16 bytes.
    """

    def __init__(self, lengths: Sequence[int], streams: Sequence[int]) -> None:
        self._lengths, self._streams = np.asarray(lengths, np.int64), np.asarray(streams, np.int64)
        counts = -(-self._lengths // CHUNK.value)
        self._first = np.cumsum(counts) - counts
        self._owners = np.repeat(np.arange(len(counts)), counts)
        self.chunks = len(self._owners)
        self.aligned = True
        self.width = 0
        self.memory: Tensor = torch.empty(0, dtype=torch.int64)
        self._sent: object = None

    def point(self, columns: Sequence[Sequence[Tensor]]) -> Table:
        """Follows the tensors to where they lie now. The upload waits for nothing."""
        addresses = [[t.data_ptr() for t in column] for column in columns]
        device = columns[0][0].device
        # What one stream has sent another may not have received.
        state = (addresses, device if device.type == "cpu" else torch.accelerator.current_stream(device))
        if state != self._sent:
            table = np.array(addresses, np.int64)
            rows = np.column_stack([*table, self._lengths, self._streams, self._first])
            flat = torch.from_numpy(np.concatenate(([len(rows)], rows.ravel(), self._owners)))
            self.memory, self.width = flat.to(device, non_blocking=True), rows.shape[1]
            self.aligned = not bool((table[:, self._lengths > 0] % 16).any())
            self._sent = state
        return self


@triton.jit
def _row(table, width: tl.constexpr):
    """Of this program's chunk: its tensor's row in the table, the chunk's first element in the tensor, and its length."""
    tensors = tl.load(table)
    chunk = tl.program_id(0).to(tl.int64)
    row = table + 1 + width * tl.load(table + 1 + width * tensors + chunk)
    begin = (chunk - tl.load(row + width - 1)) * CHUNK
    return row, begin, tl.minimum(tl.load(row + width - 3) - begin, CHUNK)


@triton.jit
def _pointer(row, begin, column: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype)) + begin
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _term(x, y, at, inside, masked: tl.constexpr, eta, eta_rest, terms: tl.constexpr, total):
    """total with one more of the `terms` in every place: x^2, ((abs(y) + eta) x)^2, (x - y)^2 or x y."""
    a = (tl.load(x + at, mask=inside, other=0.0) if masked else tl.load(x + at)).to(tl.float32).to(tl.float64)
    if terms != "squares":
        b = (tl.load(y + at, mask=inside, other=0.0) if masked else tl.load(y + at)).to(tl.float32)
        if terms == "products":
            return tl.fma(a, b.to(tl.float64), total)
        if terms == "scaled":
            a *= (tl.abs(b).to(tl.float64) + eta) + eta_rest
        else:
            a -= b.to(tl.float64)
    return tl.fma(a, a, total)


@triton.jit
def _sum_kernel(
    table, partial, eta, eta_rest, dtype: tl.constexpr, terms: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    width: tl.constexpr = 4 if terms == "squares" else 5
    row, begin, length = _row(table, width)
    x = _pointer(row, begin, 0, dtype, aligned)
    y = x
    if terms != "squares":
        y = _pointer(row, begin, 1, dtype, aligned)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    body = length // BLOCK
    for block in range(body):  # whole blocks need no mask, which keeps their accesses wide
        total = _term(x, y, block * BLOCK + tl.arange(0, BLOCK), True, False, eta, eta_rest, terms, total)
    i = body * BLOCK + tl.arange(0, BLOCK)
    total = _term(x, y, i, i < length, True, eta, eta_rest, terms, total)
    tl.store(partial + tl.program_id(0), ordered_sum(total))


@triton.jit
def _random_halves(row, begin, seed, i):
    """16 bits for element e = begin + i of a tensor: half e % 2 of word e % 8 // 2 of philox(seed, e // 8, tensor)."""
    element = begin + i
    w0, w1, w2, w3 = philox_words(tl.load(seed), element // 8, tl.load(row + 4))
    which = (element % 8) // 2
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return (word >> ((element % 2) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _pattern(x, dtype: tl.constexpr):
    """The bits of an element as a signed int32."""
    if dtype == tl.float32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _of_pattern(bits, dtype: tl.constexpr):
    if dtype == tl.float32:
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _difference(x, y, narrow: tl.constexpr):
    """x - y modulo 2^32, or modulo 2^16 with the sign of 16 bits."""
    if narrow:
        return ((x - y) << 16) >> 16
    else:
        return x - y


@triton.jit
def _ordered(bits, narrow: tl.constexpr):
    """Patterns in the order of the numbers that they stand for; its own inverse."""
    return tl.where(bits < 0, bits ^ (0x7FFF if narrow else 0x7FFFFFFF), bits)


@triton.jit
def _code_of(before, after, narrow: tl.constexpr):
    """How far a pattern is from another, where that fits into a code (csrc/core/params.h).

    The least code: the list has w. The next two: w has found no room there and has not been moved; w is +0.
    """
    least: tl.constexpr = -128 if narrow else -32768
    distance = _difference(_ordered(after, narrow), _ordered(before, narrow), narrow)
    fits = (distance > least + 2) & (distance < -least)
    return tl.where(fits, distance, tl.where(before == 0, least + 2, least))


@triton.jit
def _decoded(code, after, narrow: tl.constexpr):
    """w's pattern from that of w + e; of what is listed or pending, `after` itself."""
    least: tl.constexpr = -128 if narrow else -32768
    near = _ordered(_difference(_ordered(after, narrow), code, narrow), narrow)
    return tl.where(code > least + 2, near, tl.where(code == least + 2, 0, after))


@triton.jit
def _keep_codes(
    codes, words, capacity, i, inside, before, after, narrow: tl.constexpr, pending: tl.constexpr
):  # fmt: skip
    """Writes the codes of one block and lists what has none; returns what is to be stored: of what found no room, `before`.

    pending: only of what found no room before.
    """
    least: tl.constexpr = -128 if narrow else -32768
    width: tl.constexpr = 16 if narrow else 32
    if pending:
        if inside is None:
            code = tl.load(codes + i).to(tl.int32)
        else:
            code = tl.load(codes + i, mask=inside, other=0).to(tl.int32)
        wanted = code == least + 1
        after = tl.where(wanted, after, before)
    else:
        code = _code_of(before, after, narrow)
        wanted = code == least
    places = wanted.to(tl.int32)
    count = tl.sum(places, axis=0)
    if count > 0:
        slot = tl.atomic_add(words, count.to(tl.int64)) + (tl.cumsum(places, axis=0) - places)
        fits = slot < capacity
        where = (tl.program_id(0).to(tl.int64) << 16) + i
        entry = (where << width) | (before.to(tl.int64) & (0xFFFF if narrow else 0xFFFFFFFF))
        tl.store(words + 1 + slot, entry, mask=wanted & fits)
        code = tl.where(wanted, tl.where(fits, least, least + 1), code)
        after = tl.where(wanted & (slot >= capacity), before, after)
    tl.store(codes + i, code.to(tl.int8 if narrow else tl.int16), mask=inside)
    return after


@triton.jit
def _perturb_block(
    w, g, stash, words, capacity, row, begin, seed, i, inside, high, low, eta, dtype: tl.constexpr, seen: tl.constexpr,
    adaptive: tl.constexpr, kept: tl.constexpr, stochastic: tl.constexpr,
):  # fmt: skip
    """Perturbs one block; returns e, and of the move its stored value s and what `seen` shows of it, v. inside: None for a
    whole block."""
    if inside is None:
        slope = tl.load(g + i).to(tl.float32)
    else:
        slope = tl.load(g + i, mask=inside, other=0.0).to(tl.float32)
    if kept == "masters":  # the stash holds them, and is not written
        if inside is None:
            exact = tl.load(stash + i)
        else:
            exact = tl.load(stash + i, mask=inside, other=0.0)
        before = round_to(exact, dtype).to(tl.float32)
    else:
        if inside is None:
            raw = tl.load(w + i)
        else:
            raw = tl.load(w + i, mask=inside, other=0.0)
        if kept == "copy":
            tl.store(stash + i, raw, mask=inside)
        exact = raw.to(tl.float32)
        before = exact
    e = slope * low * high
    if adaptive:
        t = tl.abs(exact) + eta
        e = e * t * t
    if high == 0.0:  # nothing moves: 0 * inf is not 0, and -0 + 0 is not -0
        e = tl.zeros_like(e)
    if stochastic:
        written = round_randomly(exact + e, _random_halves(row, begin, seed, i), dtype)
    else:
        written = round_to(exact + e, dtype)
    if kept == "masters":
        tl.store(w + i, written, mask=inside)
    elif kept == "copy":
        if high != 0.0:
            tl.store(w + i, written, mask=inside)
    else:
        narrow: tl.constexpr = dtype != tl.float32
        held = _pattern(raw, dtype)
        moved = _pattern(written, dtype)
        if high == 0.0:
            moved = held
        moved = _keep_codes(stash, words, capacity, i, inside, held, moved, narrow, kept == "pending")
        tl.store(w + i, _of_pattern(moved, dtype), mask=inside)
    after = written.to(tl.float32)
    s = after - before
    v = round_to(after, seen).to(tl.float32) - round_to(before, seen).to(tl.float32)
    if high == 0.0:
        s = tl.zeros_like(s)  # NaN weights: NaN - NaN is not 0 either
        v = tl.zeros_like(v)
    return e, s, v


@triton.jit
def _add_terms(e, s, v, ee, ss, es, vv, ev, changed):
    """The six sums of every place in a block, with one more element each."""
    ee, ss, es = tl.fma(e, e, ee), tl.fma(s, s, ss), tl.fma(e, s, es)
    return ee, ss, es, tl.fma(v, v, vv), tl.fma(e, v, ev), changed + tl.where(s != 0.0, 1.0, 0.0)


@triton.jit(do_not_specialize=["capacity"])
def _sam_perturb_kernel(
    table,
    partial,
    scale,
    seed,
    words,
    capacity,
    eta,
    dtype: tl.constexpr,
    seen: tl.constexpr,
    adaptive: tl.constexpr,
    kept: tl.constexpr,
    stochastic: tl.constexpr,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, begin, length = _row(table, 6)
    w = _pointer(row, begin, 0, dtype, aligned)
    g = _pointer(row, begin, 1, dtype, aligned)
    if kept == "masters":
        stash = _pointer(row, begin, 2, tl.float32, aligned)
    elif kept == "copy":
        stash = _pointer(row, begin, 2, dtype, aligned)
    else:
        stash = _pointer(row, begin, 2, tl.int16 if dtype == tl.float32 else tl.int8, aligned)
    # Two factors, the second a power of two, hold a scale that float32 alone could not; 0 means that nothing moves.
    high = tl.load(scale)
    low = tl.load(scale + 1)
    ee = tl.zeros((BLOCK,), dtype=tl.float32)
    ss = ee
    es = ee
    vv = ee
    ev = ee
    changed = ee
    body = length // BLOCK
    for block in range(body):  # whole blocks need no mask, which keeps their accesses wide
        i = block * BLOCK + tl.arange(0, BLOCK)
        e, s, v = _perturb_block(
            w, g, stash, words, capacity, row, begin, seed, i, None, high, low, eta, dtype, seen, adaptive, kept,
            stochastic,
        )  # fmt: skip
        ee, ss, es, vv, ev, changed = _add_terms(e, s, v, ee, ss, es, vv, ev, changed)
    i = body * BLOCK + tl.arange(0, BLOCK)
    e, s, v = _perturb_block(
        w, g, stash, words, capacity, row, begin, seed, i, i < length, high, low, eta, dtype, seen, adaptive, kept,
        stochastic,
    )  # fmt: skip
    ee, ss, es, vv, ev, changed = _add_terms(e, s, v, ee, ss, es, vv, ev, changed)
    at = partial + tl.program_id(0).to(tl.int64) * 6
    tl.store(at, ordered_sum(ee.to(tl.float64)))
    tl.store(at + 1, ordered_sum(ss.to(tl.float64)))
    tl.store(at + 2, ordered_sum(es.to(tl.float64)))
    tl.store(at + 3, ordered_sum(vv.to(tl.float64)))
    tl.store(at + 4, ordered_sum(ev.to(tl.float64)))
    tl.store(at + 5, ordered_sum(changed.to(tl.float64)))


@triton.jit
def _restore_kernel(table, bits: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr):
    row, begin, length = _row(table, 5)
    w = _pointer(row, begin, 0, bits, aligned)
    stash = _pointer(row, begin, 1, bits, aligned)
    body = length // BLOCK
    for block in range(body):
        i = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(w + i, tl.load(stash + i))
    i = body * BLOCK + tl.arange(0, BLOCK)
    tl.store(w + i, tl.load(stash + i, mask=i < length), mask=i < length)


@triton.jit(do_not_specialize=["capacity"])
def _put_listed_kernel(
    table, waits, words, capacity, row_width: tl.constexpr, bits: tl.constexpr, narrow: tl.constexpr, BLOCK: tl.constexpr
):
    """Puts w of what is listed in the place of w + e, where decoding leaves it; not in chunks that are decoded."""
    width: tl.constexpr = 16 if narrow else 32
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < tl.minimum(tl.load(words), capacity)
    entry = tl.load(words + 1 + k, mask=inside, other=0)
    chunk = (entry >> (width + 16)) & (0xFFFFFFFF if narrow else 0xFFFF)
    inside = inside & (tl.load(waits + chunk, mask=inside, other=0) != 0)
    tensor = tl.load(table + 1 + row_width * tl.load(table) + chunk, mask=inside, other=0)
    row = table + 1 + row_width * tensor
    place = (chunk - tl.load(row + row_width - 1, mask=inside, other=0)) * CHUNK + ((entry >> width) & 0xFFFF)
    w = tl.load(row, mask=inside, other=0).to(tl.pointer_type(bits)) + place
    tl.store(w, entry.to(bits), mask=inside)


@triton.jit
def _decode_kernel(table, waits, bits: tl.constexpr, narrow: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr):
    row, begin, length = _row(table, 5)
    if tl.atomic_xchg(waits + tl.program_id(0), 0) != 0:  # once: after a launch that nobody has noted there may come another
        w = _pointer(row, begin, 0, bits, aligned)
        codes = _pointer(row, begin, 1, tl.int8 if narrow else tl.int16, aligned)
        body = length // BLOCK
        for block in range(body):
            i = block * BLOCK + tl.arange(0, BLOCK)
            before = _decoded(tl.load(codes + i).to(tl.int32), tl.load(w + i).to(tl.int32), narrow)
            tl.store(w + i, before.to(bits))
        i = body * BLOCK + tl.arange(0, BLOCK)
        code = tl.load(codes + i, mask=i < length, other=0).to(tl.int32)
        before = _decoded(code, tl.load(w + i, mask=i < length, other=0).to(tl.int32), narrow)
        tl.store(w + i, before.to(bits), mask=i < length)


@triton.jit
def _adamw_block(row, begin, at, i, inside, dtype: tl.constexpr, coded: tl.constexpr, aligned: tl.constexpr):
    """One block of AdamW from the stash.

    at: the tensor's factors, as in csrc/core/params.h, the gradients' scale first; last, 0 where it is stepped and
    not only restored.
    """
    w = _pointer(row, begin, 0, dtype, aligned)
    g = _pointer(row, begin, 1, dtype, aligned)
    first = _pointer(row, begin, 3, dtype, aligned)
    second = _pointer(row, begin, 4, dtype, aligned)
    if coded:
        narrow: tl.constexpr = dtype != tl.float32
        codes = _pointer(row, begin, 2, tl.int8 if narrow else tl.int16, aligned)
        held = _decoded(tl.load(codes + i, mask=inside).to(tl.int32), _pattern(tl.load(w + i, mask=inside), dtype), narrow)
        raw = _of_pattern(held, dtype)
    else:
        raw = tl.load(_pointer(row, begin, 2, dtype, aligned) + i, mask=inside)
    if tl.load(at + 8) == 0.0:
        slope = tl.load(g + i, mask=inside).to(tl.float32) * tl.load(at)
        m = tl.load(first + i, mask=inside).to(tl.float32)
        v = tl.load(second + i, mask=inside).to(tl.float32)
        m += tl.load(at + 2) * (slope - m)
        v = tl.load(at + 3) * v + tl.load(at + 4) * slope * slope
        value = raw.to(tl.float32)
        value -= tl.load(at + 1) * value
        value -= tl.load(at + 7) * (m / (tl.sqrt(v) * tl.load(at + 5) + tl.load(at + 6)))
        tl.store(w + i, round_to(value, dtype), mask=inside)
        tl.store(first + i, round_to(m, dtype), mask=inside)
        tl.store(second + i, round_to(v, dtype), mask=inside)
    else:
        tl.store(w + i, raw, mask=inside)


@triton.jit
def _restore_adamw_kernel(
    table, factors, waits, dtype: tl.constexpr, coded: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    row, begin, length = _row(table, 8)
    at = factors + tl.load(row + 6) * 9
    if coded:
        length *= tl.atomic_xchg(waits + tl.program_id(0), 0)  # 1, or 0 where it is decoded already; as in `_decode_kernel`
    body = length // BLOCK
    for block in range(body):
        _adamw_block(row, begin, at, block * BLOCK + tl.arange(0, BLOCK), None, dtype, coded, aligned)
    i = body * BLOCK + tl.arange(0, BLOCK)
    _adamw_block(row, begin, at, i, i < length, dtype, coded, aligned)


@triton.jit
def _flipped(x, i, row, begin, seed, sign: tl.constexpr, random: tl.constexpr):
    if random:
        element = begin + i
        w0, w1, w2, w3 = philox_words(tl.load(seed), element // 128, tl.load(row + 2))
        which = (element % 128) // 32
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        flip = ((word >> (element % 32).to(tl.uint32)) & 1) != 0
        return tl.where(flip, x ^ sign, x)
    else:
        return x ^ sign


@triton.jit
def _flip_kernel(
    table, seed, bits: tl.constexpr, sign: tl.constexpr, random: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    row, begin, length = _row(table, 4)
    g = _pointer(row, begin, 0, bits, aligned)
    body = length // BLOCK
    for block in range(body):
        i = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(g + i, _flipped(tl.load(g + i), i, row, begin, seed, sign, random))
    i = body * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(g + i, mask=i < length, other=0)
    tl.store(g + i, _flipped(x, i, row, begin, seed, sign, random), mask=i < length)


@triton.jit
def _scaled(x, by, dtype: tl.constexpr):
    return round_to((x.to(tl.float32).to(tl.float64) * by).to(tl.float32), dtype)


@triton.jit
def _scale_kernel(table, factor, dtype: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr):
    row, begin, length = _row(table, 4)
    g = _pointer(row, begin, 0, dtype, aligned)
    by = tl.load(factor)
    body = length // BLOCK
    for block in range(body):
        i = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(g + i, _scaled(tl.load(g + i), by, dtype))
    i = body * BLOCK + tl.arange(0, BLOCK)
    tl.store(g + i, _scaled(tl.load(g + i, mask=i < length, other=0.0), by, dtype), mask=i < length)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _bits(dtype: torch.dtype) -> tuple[tl.dtype, int]:
    """The integer type of an element's width, and its sign bit as a value of that type."""
    return (tl.int32, -(1 << 31)) if dtype.itemsize == 4 else (tl.int16, -(1 << 15))


def _sum(table: Table, dtype: torch.dtype, terms: str, eta: float = 0.0) -> Tensor:
    """Float64 scalar. One partial sum per chunk, folded in order of the chunks."""
    partial = torch.zeros(table.chunks, dtype=torch.float64, device=table.memory.device)
    if table.chunks:
        _sum_kernel[(table.chunks,)](
            table.memory,
            partial,
            *in_two_floats(eta),
            _TYPES[dtype],
            terms,
            table.aligned,
            BLOCK=_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return partial.sum()


def squared_norm(table: Table, dtype: torch.dtype, eta: float | None) -> Tensor:
    """Sum of g^2, or with eta of ((abs(w) + eta) g)^2; columns: gradients, then weights where there is an eta."""
    return _sum(table, dtype, "squares") if eta is None else _sum(table, dtype, "scaled", eta)


def squared_distance(table: Table, dtype: torch.dtype) -> Tensor:
    """Sum of (w - stash)^2; columns: weights, stash."""
    return _sum(table, dtype, "differences")


def dot(table: Table, dtype: torch.dtype) -> Tensor:
    """Sum of g * stash; columns: gradients, stash."""
    return _sum(table, dtype, "products")


def room_for_sums(table: Table) -> Tensor:
    """NaN for every sum of every chunk. A perturbation writes over all; the last is a count, which is never NaN."""
    return torch.full((table.chunks, SUMS), torch.nan, dtype=torch.float64, device=table.memory.device)


def sam_perturb_(
    table: Table, dtype: torch.dtype, squared: Tensor, rho: float, eta: float | None, seen: torch.dtype,
    seed: Tensor | None = None, kept: str = "copy", words: Tensor | None = None, partial: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """stash = w, w = w + e; returns the six sums in float64. Columns: weights, gradients, stash.

    seed: round 16-bit weights at random. partial: room from `room_for_sums`. kept: what the stash holds. "copy"; "masters":
    float32 masters m, which are only read, and w = m + e; "codes", with their list in `words`, whose first word says where
    to go on; "pending": codes, and only what found no room in that list before is perturbed.
    """
    partial = room_for_sums(table) if partial is None else partial
    if table.chunks:
        stochastic = seed is not None and dtype.itemsize == 2
        block = CODED_BLOCK if kept in ("codes", "pending") else _BLOCK
        seed, words = (table.memory if t is None else t for t in (seed, words))  # unread where there is none
        _sam_perturb_kernel[(table.chunks,)](
            table.memory, partial, _split(squared, rho), seed, words, words.numel() - 1, eta or 0.0, _TYPES[dtype],
            _TYPES[seen], eta is not None, kept, stochastic, table.aligned, BLOCK=block, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return partial.sum(dim=0)


@triton.jit
def _cast_kernel(table, dtype: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr):
    row, begin, length = _row(table, 5)
    w = _pointer(row, begin, 0, dtype, aligned)
    masters = _pointer(row, begin, 1, tl.float32, aligned)
    body = length // BLOCK
    for block in range(body):
        i = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(w + i, round_to(tl.load(masters + i), dtype))
    i = body * BLOCK + tl.arange(0, BLOCK)
    tl.store(w + i, round_to(tl.load(masters + i, mask=i < length, other=0.0), dtype), mask=i < length)


def sam_cast_(table: Table, dtype: torch.dtype) -> None:
    """w = m, rounded to nearest; columns: weights, masters."""
    if table.chunks:
        _cast_kernel[(table.chunks,)](table.memory, _TYPES[dtype], table.aligned, BLOCK=_BLOCK, num_warps=8)


def copy_block(itemsize: int) -> int:
    """Elements per step of a copy or of AdamW: 16 bytes for each of 256 threads. Twice that takes too many registers."""
    return 4096 // itemsize


def sam_restore_(table: Table, dtype: torch.dtype) -> None:
    """w = stash, bit for bit; columns: weights, stash."""
    if table.chunks:
        block = copy_block(dtype.itemsize)
        _restore_kernel[(table.chunks,)](table.memory, _bits(dtype)[0], table.aligned, BLOCK=block, num_warps=8)


def all_wait(table: Table) -> Tensor:
    """For `sam_decode_` and `sam_decode_adamw_`: that no chunk has been decoded."""
    return torch.ones(table.chunks, dtype=torch.int32, device=table.memory.device)


def sam_decode_(table: Table, dtype: torch.dtype, words: Tensor, waits: Tensor) -> None:
    """w, bit for bit, from w + e, codes and list; columns: weights, codes.

    waits: from `all_wait`; a chunk that is decoded waits no more, and is not decoded again.
    """
    bits, narrow = _bits(dtype)[0], dtype.itemsize == 2
    if table.chunks:
        _put_listed(table, dtype, words, waits)
        block = copy_block(dtype.itemsize)
        _decode_kernel[(table.chunks,)](table.memory, waits, bits, narrow, table.aligned, BLOCK=block, num_warps=8)


def _put_listed(table: Table, dtype: torch.dtype, words: Tensor, waits: Tensor) -> None:
    bits, narrow, capacity = _bits(dtype)[0], dtype.itemsize == 2, words.numel() - 1
    _put_listed_kernel[(triton.cdiv(words.numel(), 1024),)](
        table.memory, waits, words, capacity, table.width, bits, narrow, BLOCK=1024, num_warps=4
    )


def adamw_factors(
    table: Table, steps: Sequence[Tensor | None], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> Tensor:  # fmt: skip
    """What `_adamw_block` takes, a row per tensor. steps: as in `fastpost.plan.AdamWPart`, in the order of the list."""
    device = table.memory.device
    one = torch.ones((), device=device)
    count = torch.stack([one if step is None else step.reshape(()) for step in steps]).to(device).double()
    unscale = torch.ones_like(count) if grad_scale is None else 1.0 / grad_scale.double().expand(len(steps))
    stays = torch.zeros_like(count) if found_inf is None else found_inf.double().expand(len(steps))
    if any(step is None for step in steps):
        stays = stays + torch.tensor([step is None for step in steps]).to(device, non_blocking=True)
    return torch.stack(
        [
            -unscale if maximize else unscale,
            torch.full_like(count, lr * weight_decay),
            torch.full_like(count, 1 - betas[0]),
            torch.full_like(count, betas[1]),
            torch.full_like(count, 1 - betas[1]),
            (1 - betas[1] ** count).rsqrt(),
            torch.full_like(count, eps),
            lr / (1 - betas[0] ** count),
            stays,
        ],
        dim=1,
    ).float()


def sam_restore_adamw_(table: Table, dtype: torch.dtype, factors: Tensor) -> None:
    """One step of AdamW from the stash; columns: weights, gradients, stash, first and second moments.

    The table's streams are the tensors' rows in `factors`, which are from `adamw_factors`.
    """
    if table.chunks:
        _restore_adamw_kernel[(table.chunks,)](
            table.memory, factors, table.memory, _TYPES[dtype], False, table.aligned, BLOCK=copy_block(dtype.itemsize),
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


def sam_decode_adamw_(table: Table, dtype: torch.dtype, factors: Tensor, words: Tensor, waits: Tensor) -> None:
    """The same from w + e, codes and list; the stash's column holds the codes. Chunks that do not wait are left alone."""
    if table.chunks:
        _put_listed(table, dtype, words, waits)
        _restore_adamw_kernel[(table.chunks,)](
            table.memory, factors, waits, _TYPES[dtype], True, table.aligned, BLOCK=copy_block(dtype.itemsize), num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip


def flip_(table: Table, dtype: torch.dtype, seed: Tensor | None) -> None:
    """Flips every sign bit, or with a seed those that its Philox bits choose; column: gradients."""
    if table.chunks:
        bits, sign = _bits(dtype)
        given = table.memory if seed is None else seed
        _flip_kernel[(table.chunks,)](
            table.memory, given, bits, sign, seed is not None, table.aligned, BLOCK=_BLOCK, num_warps=8
        )


def scale_(table: Table, dtype: torch.dtype, factor: Tensor) -> None:
    """g = factor * g, with the factor in device memory (float64, one element); column: gradients."""
    if table.chunks:
        _scale_kernel[(table.chunks,)](table.memory, factor, _TYPES[dtype], table.aligned, BLOCK=_BLOCK, num_warps=8)


def _split(squared: Tensor, rho: float) -> Tensor:
    """rho / sqrt(squared) as two float32 factors, the second a power of two; (0, 0) where nothing may move."""
    scale = rho / squared.double().sqrt()
    moves = torch.isfinite(squared) & (squared > 0) & (rho != 0)
    mantissa, exponent = torch.frexp(torch.where(moves, scale, torch.ones_like(scale)))
    kept = exponent.clamp(-100, 100)
    pair = torch.stack((torch.ldexp(mantissa, kept), torch.ldexp(torch.ones_like(mantissa), exponent - kept)))
    return torch.where(moves, pair, torch.zeros_like(pair)).float()
