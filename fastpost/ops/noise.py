"""Noise on activations: added out of place, drawn from (seed, element), identity in the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastpost.dispatch import select, strict
from fastpost.errors import unknown
from fastpost.ops.autograd import Function, batched, checks_values, one_by_one
from fastpost.ops.params import seed_tensor
from fastpost.ops.registry import define
from fastpost.ops.scalars import check_number
from fastpost.row_tasks import NoiseTask

NOISE_TYPES = ("uniform", "normal")


def check_noise(op: str, eps: float, noise_type: str) -> None:
    """Raises ValueError for a negative or non-finite eps or a noise type that does not exist, TypeError for no number."""
    if not (type(eps) is float and 0 <= eps < math.inf):  # as nearly always
        check_number(op, "eps", eps)
    if noise_type not in NOISE_TYPES:
        raise unknown("noise_type", noise_type, NOISE_TYPES)


def fresh_seed(device: torch.device) -> Tensor:
    """A seed from torch's own generator of the device, so that torch.manual_seed makes noise repeatable."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _add_noise(x: Tensor, *how: Any) -> Tensor:
    task = NoiseTask(*how)
    function = select("add_noise", x.device, x.dtype, walkable=task.out_dtype != torch.float64)
    result: Tensor = function(x, task)
    return result


def _embedding_noise(table: Tensor, ids: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    task = NoiseTask(*how)
    # Here rather than at the door, where torch.compile and vmap show no values. On a GPU, where a bad index gives NaN, to
    # read the range would wait for the device.
    if ids.numel() and (ids.device.type == "cpu" or strict()):
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= table.shape[0]:
            raise IndexError(
                f"embedding_noise: index {low if low < 0 else high} is outside a table of {table.shape[0]} rows"
            )
    function = select("embedding_noise", table.device, table.dtype, walkable=task.out_dtype != torch.float64)
    clean, noised = function(table, ids, task)
    return clean, noised


_HOW = "float eps, str noise_type, Tensor seed, Tensor? rows, Tensor? scales, ScalarType out_dtype"  # a NoiseTask's
_op_add_noise = define(
    f"add_noise(Tensor x, {_HOW}) -> Tensor",
    _add_noise,
    lambda x, *how: torch.empty(x.shape, dtype=NoiseTask(*how).out_dtype, device=x.device),
)
_op_embedding_noise = define(
    f"embedding_noise(Tensor table, Tensor ids, {_HOW}) -> (Tensor, Tensor)",
    _embedding_noise,
    lambda table, ids, *how: (
        table.new_empty((*ids.shape, table.shape[1])),
        table.new_empty((*ids.shape, table.shape[1]), dtype=NoiseTask(*how).out_dtype),
    ),
)


# torch.compile hands a `forward` of any number of arguments a context, so they are told one by one.


class _AddNoise(Function):
    @staticmethod
    def forward(
        x: Tensor,
        eps: float,
        noise_type: str,
        seed: Tensor,
        rows: Tensor | None,
        scales: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        noised: Tensor = _op_add_noise(x, eps, noise_type, seed, rows, scales, out_dtype)
        return noised

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.out_dtype = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, move: Tensor, *_: Any) -> Tensor:
        return move.to(ctx.out_dtype, copy=True)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        size, how = info.batch_size, NoiseTask(*args[1:])
        dims: Any = NoiseTask(*in_dims[1:])
        if dims.seed is not None:  # one for each sample
            return one_by_one(_AddNoise, size, in_dims, args)
        x = batched(args[0], in_dims[0], size)
        if x.ndim == 1:  # of scalars, which are rows of one element
            rows = torch.zeros(size, dtype=torch.int64, device=x.device)
            return _AddNoise.apply(x.unsqueeze(1), *how._replace(rows=rows)).squeeze(1), 0
        return _AddNoise.apply(x, *_of_samples(how, dims, x.shape[1:-1], size, x.device)), 0


def _of_samples(how: NoiseTask, dims: Any, shape: torch.Size, size: int, device: torch.device) -> NoiseTask:
    """Of so many samples with rows of this shape, each of which counts its rows from 0; dims: vmap's, of each."""
    rows, dim = how.rows, dims.rows
    if rows is None:
        rows, dim = torch.arange(math.prod(shape), device=device).reshape(shape), None
    scales = None if how.scales is None else batched(how.scales, dims.scales, size)
    return how._replace(rows=batched(rows, dim, size), scales=scales)


class _EmbeddingNoise(Function):
    @staticmethod
    def forward(
        table: Tensor,
        ids: Tensor,
        padding_idx: int,
        detach_noised: bool,
        eps: float,
        noise_type: str,
        seed: Tensor,
        rows: Tensor | None,
        scales: Tensor | None,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        clean, noised = _op_embedding_noise(table, ids, eps, noise_type, seed, rows, scales, out_dtype)
        return clean, noised

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        table, ids, ctx.padding_idx, ctx.detach_noised, *how = inputs
        ctx.out_dtype = NoiseTask(*how).out_dtype
        ctx.save_for_backward(ids)
        ctx.save_for_forward(ids)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        ctx.set_materialize_grads(False)
        if ctx.detach_noised:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, clean: Tensor | None, noised: Tensor | None) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        grad = clean
        if noised is not None and not ctx.detach_noised:
            noised = noised.to(ctx.dtype)
            grad = noised if grad is None else grad + noised
        table = None
        if grad is not None:
            table = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, ctx.padding_idx, False)
        return table, None, None, None, None, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, move: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
        (ids,) = ctx.saved_tensors
        rows = torch.nn.functional.embedding(ids, move)
        return rows, None if ctx.detach_noised else rows.to(ctx.out_dtype, copy=True)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size, (table, ids, padding_idx, detach_noised) = info.batch_size, args[:4]
        how = NoiseTask(*args[4:])
        dims: Any = NoiseTask(*in_dims[4:])
        if in_dims[0] is not None or dims.seed is not None:  # a table or a seed for each sample
            return one_by_one(_EmbeddingNoise, size, in_dims, args)
        ids = batched(ids, in_dims[1], size)
        how = _of_samples(how, dims, ids.shape[1:], size, ids.device)
        return _EmbeddingNoise.apply(table, ids, padding_idx, detach_noised, *how), (0, 0)


def _check_rows(op: str, name: str, given: Tensor, shape: torch.Size, device: torch.device) -> None:
    if given.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}, expected {tuple(shape)}")
    if given.device != device:
        raise ValueError(f"{op}: {name} is on {given.device}, expected {device}")


def _places(
    op: str, keep: Tensor | None, token_index: Tensor | None, shape: torch.Size, device: torch.device
) -> Tensor | None:
    """The number by which each row draws, and -1 for rows without noise: int64 of `shape`; None for 0, 1, 2, ...

    Without a token index that is the row's place among those that are kept.
    """
    if keep is not None:
        _check_rows(op, "keep", keep, shape, device)
        if keep.dtype != torch.bool:
            raise TypeError(f"{op}: keep must be bool (True = gets noise), not {keep.dtype}")
    if token_index is not None:
        _check_rows(op, "token_index", token_index, shape, device)
        if token_index.dtype != torch.int64:
            raise TypeError(f"{op}: token_index must be int64, not {token_index.dtype}")
    elif keep is None:
        return None
    else:
        token_index = (keep.reshape(-1).cumsum(0) - 1).reshape(shape)
    return token_index if keep is None else torch.where(keep, token_index, -1)


def _scales(op: str, scale: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    if scale is None:
        return None
    _check_rows(op, "scale", scale, shape, device)
    if not scale.dtype.is_floating_point:
        raise TypeError(f"{op}: scale must be floating point, not {scale.dtype}")
    if checks_values(device) and bool((scale < 0).any()):
        raise ValueError(f"{op}: scale must be >= 0, and its least value is {float(scale.min()):g}")
    return scale.detach()


def add_noise(
    x: Tensor,
    eps: float = 1e-5,
    noise_type: str = "uniform",
    *,
    seed: int | Tensor | None = None,
    keep: Tensor | None = None,
    token_index: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x + eps * z, out of place; gradients pass through unchanged (R3F, 2008.03156, section 3).

    The product and the sum are rounded separately in float32 (float64 for float64 input), then once to `out_dtype`; z
    depends on the seed and the element's index (among the kept rows) alone. Uniform noise is the same bits in every backend.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        eps: scale of the noise, >= 0, in the units of x.
        noise_type: "uniform" on (-eps, eps), or "normal" with standard deviation eps.
        seed: integer, int64 scalar tensor, or None to draw one from torch's generator.
        keep: bool of shape x.shape[:-1]; rows where it is False get no noise (padding). They are not counted either, so
            that the numbers a row gets do not depend on how much padding lies before it.
        token_index: int64 of shape x.shape[:-1]: the row's number in the whole step. Noise then depends on the seed, this
            number and the channel alone, however a batch is cut, packed or spread over ranks. Negative: no noise.
        scale: floating point of shape x.shape[:-1], >= 0: a row's noise is eps * scale * z (that product in float32).
        out_dtype: dtype of the result; default that of x.

    Returns:
        A new tensor of x's shape.

    Raises:
        ValueError: eps negative or not finite; unknown noise type; `keep`, `token_index` or `scale` of another shape or on
            another device; on the CPU, and under FASTPOST_CHECKS=1, a scale below 0.
        TypeError: wrong dtype of x, `keep`, `token_index` or `scale`; a seed that is no whole number.
    """
    check_noise("add_noise", eps, noise_type)
    out_dtype = out_dtype or x.dtype
    for name, dtype in (("x", x.dtype), ("out_dtype", out_dtype)):
        if not dtype.is_floating_point:
            raise TypeError(f"add_noise: {name} must be floating point, not {dtype}")
    if keep is not None and x.ndim == 0:
        raise ValueError("add_noise: keep needs an x with rows, not a scalar")
    if x.ndim == 0 and (token_index is not None or scale is not None):
        raise ValueError("add_noise: token_index and scale need an x with rows, not a scalar")
    rows = _places("add_noise", keep, token_index, x.shape[:-1], x.device)
    scales = _scales("add_noise", scale, x.shape[:-1], x.device)
    seed = fresh_seed(x.device) if seed is None else seed_tensor(seed, x.device)
    noised: Tensor = _AddNoise.apply(x, eps, noise_type, seed, rows, scales, out_dtype)
    return noised


class _AsksForGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, noised: Tensor, asking: Tensor) -> Tensor:
        ctx.mark_dirty(noised)  # the same tensor, which the model may change in place
        return noised

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def asks_for_gradient(noised: Tensor) -> Tensor:
    """`noised` itself, as a part of a graph of its own that lets no gradient through to anything.

    Reentrant checkpointing gives the weights inside no gradients where none of its inputs asks for one. What asks here is a
    leaf: above a tensor of the model's, DTensor's operations would not know what to do with a gradient that is none.

    Args:
        noised: without a graph.
    """
    leaf = torch.zeros((), dtype=noised.dtype, device=noised.device, requires_grad=True)
    asking: Tensor = _AsksForGradient.apply(noised, leaf)  # type: ignore[no-untyped-call]
    return asking


def embedding_noise(
    table: Tensor,
    ids: Tensor,
    eps: float = 1e-5,
    noise_type: str = "uniform",
    *,
    seed: int | Tensor | None = None,
    keep: Tensor | None = None,
    token_index: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    padding_idx: int | None = None,
    detach_noised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Looks rows up once and returns them twice: as they are, and with noise (R3F's two streams).

    Args:
        table: (rows, width) embedding weights.
        ids: int64 or int32 indices, any shape.
        eps, noise_type, seed, out_dtype: as in `add_noise`; `out_dtype` is that of the noised rows.
        keep: bool of ids' shape; rows where it is False get no noise and are not counted.
        token_index, scale: of ids' shape, as in `add_noise`.
        padding_idx: row whose gradient is left out, as in torch.nn.Embedding.
        detach_noised: no gradient reaches the table through the noised rows (fairseq's classifier).

    Returns:
        (clean, noised), each (*ids.shape, width).

    Raises:
        IndexError: an index lies outside the table (on the CPU and under FASTPOST_CHECKS=1; on GPUs it gives rows of NaN).
        ValueError: a padding_idx outside the table, and as `add_noise`. TypeError: as `add_noise`.
    """
    check_noise("embedding_noise", eps, noise_type)
    if table.ndim != 2 or not table.dtype.is_floating_point:
        raise TypeError(f"embedding_noise: table must be a floating-point matrix, not {tuple(table.shape)} {table.dtype}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding_noise: ids must be int64 or int32, not {ids.dtype}")
    if ids.device != table.device:
        raise ValueError(f"embedding_noise: ids are on {ids.device}, the table on {table.device}")
    rows = _places("embedding_noise", keep, token_index, ids.shape, table.device)
    scales = _scales("embedding_noise", scale, ids.shape, table.device)
    if padding_idx is not None and not -table.shape[0] <= padding_idx < table.shape[0]:
        raise ValueError(f"embedding_noise: padding_idx={padding_idx} is outside a table of {table.shape[0]} rows")
    seed = fresh_seed(table.device) if seed is None else seed_tensor(seed, table.device)
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += table.shape[0]
    clean, noised = _EmbeddingNoise.apply(
        table, ids, padding_idx, detach_noised, eps, noise_type, seed, rows, scales, out_dtype or table.dtype
    )
    return clean, noised
