"""CPU tensors through the compiled core: portable SIMD, chosen at run time, and as many threads as torch uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpost.backends import native
from fastpost.backends.reference import sam_direction_ as sam_direction_  # torch's operations; no kernel of its own
from fastpost.backends.serving import (
    DTYPES,
    address,
    address_and_stride,
    addresses_and_strides,
    coded,
    contiguous,
    contiguous_floats,
    distillation_arguments,
    operand_arguments,
    refusal,
    top_k_arguments,
)
from fastpost.plan import AdamWPart, Bucket
from fastpost.row_tasks import DistillationTask, DivergenceTask, LossTask, NoiseTask, OperandTask, TopKTask


def whole_operation(name: str) -> Any | None:
    """The core's function that does all of an operation of `torch.ops.fastpost` on lists of one bucket, if it has one; it
    takes the native plan and the schema's arguments behind the lists."""
    return getattr(native.core().cpu.lists, name, None)


_HUGE = 4 << 20  # bytes from which a buffer holds at least one aligned huge page


def status() -> tuple[bool, str]:
    """Availability, and the instruction set in use or the reason why not."""
    why = native.failure()
    if why is not None:
        return False, why
    try:
        return True, f"{native.core().cpu.isa()} (this build and machine: {native.core().cpu.isas()})"
    except ValueError as error:  # FASTPOST_CPU_ISA names something else
        return False, str(error)


def refuses(op: str, device: str, dtype: torch.dtype, walkable: bool) -> str | None:
    """Why this backend cannot serve the call, or None."""
    wrong = None if device == "cpu" else f"serves CPU tensors, not {device}"
    return refusal(globals(), op, wrong, dtype, walkable)


@functools.cache
def _dtype(dtype: torch.dtype) -> Any:
    return getattr(native.core().DType, DTYPES[dtype])


def _plan(bucket: Bucket) -> Any:
    return bucket.kept_plan or bucket.native(native.core(), _dtype(bucket.dtype))


def _seed(seed: Tensor | None) -> int | None:
    return None if seed is None else int(seed.item()) & (2**64 - 1)


_threads = torch.get_num_threads


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A fresh tensor; a large one on huge pages where the kernel grants them, since touching fresh pages costs more than
    the arithmetic."""
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= _HUGE:
        native.core().cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def squared_norm(bucket: Bucket, eta: float | None) -> Tensor:
    total: Tensor = native.core().cpu.squared_norm(_plan(bucket), eta is not None, eta or 0.0)
    return total


def chunk_squares(bucket: Bucket) -> Tensor:
    plan = _plan(bucket)
    sums = torch.empty(plan.chunks, dtype=torch.float64)
    native.core().cpu.chunk_squares(plan, sums.data_ptr(), _threads())
    return sums


def squared_distance(bucket: Bucket) -> Tensor:
    total: Tensor = native.core().cpu.squared_distance(_plan(bucket), _threads())
    return total


def dot(bucket: Bucket) -> Tensor:
    total: Tensor = native.core().cpu.dot(_plan(bucket), _threads())
    return total


def sam_perturb_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    sums: Tensor = native.core().cpu.sam_perturb(
        _plan(bucket), squared, rho, eta is not None, eta or 0.0, compute_dtype, seed
    )
    return sums


def sam_perturb_coded_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    codes = coded(bucket)

    def run(pending: bool) -> Tensor:
        sums: Tensor = native.core().cpu.sam_perturb_coded(
            _plan(bucket), squared, rho, eta is not None, eta or 0.0, compute_dtype, seed,
            codes.words.data_ptr(), codes.capacity, pending,
        )  # fmt: skip
        return sums

    sums = run(pending=False)
    if codes.grown():
        run(pending=True)
    return sums


def sam_decode_(bucket: Bucket) -> None:
    codes = coded(bucket)
    native.core().cpu.sam_decode(_plan(bucket), codes.words.data_ptr(), codes.capacity, _threads())


def sam_perturb_masters_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype
) -> Tensor:
    sums: Tensor = native.core().cpu.sam_perturb_masters(
        _plan(bucket), squared, rho, eta is not None, eta or 0.0, compute_dtype
    )
    return sums


def sam_cast_(bucket: Bucket) -> None:
    native.core().cpu.sam_cast(_plan(bucket), _threads())


def sam_restore_(bucket: Bucket) -> None:
    native.core().cpu.sam_restore(_plan(bucket))


def sam_restore_adamw_(
    bucket: Bucket, steps: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    scale = 1.0 if grad_scale is None else float(grad_scale)
    skip = found_inf is not None and bool(found_inf)
    native.core().cpu.sam_restore_adamw(
        _plan(bucket), lr, *betas, eps, weight_decay, maximize, [float(step) for step in steps], scale, skip, _threads()
    )


def sam_decode_adamw_(bucket: Bucket, parts: list[AdamWPart]) -> None:
    native.core().cpu.sam_decode_adamw(
        [
            (
                _plan(b), lr, *betas, eps, weight_decay, maximize, [0.0 if step is None else float(step) for step in steps],
                1.0 if scale is None else float(scale), found_inf is not None and bool(found_inf),
                coded(b).words.data_ptr(), coded(b).capacity,
            )
            for b, steps, lr, betas, eps, weight_decay, maximize, scale, found_inf in parts
        ],
        _threads(),
    )  # fmt: skip


def negate_(bucket: Bucket) -> None:
    native.core().cpu.negate(_plan(bucket), _threads())


def flip_signs_(bucket: Bucket, seed: Tensor) -> None:
    native.core().cpu.flip_signs(_plan(bucket), _seed(seed), _threads())


def negate_norm_(bucket: Bucket) -> Tensor:
    total: Tensor = native.core().cpu.negate_norm(_plan(bucket), _threads())
    return total


def negate_clip_(bucket: Bucket, squared: Tensor, max_norm: float) -> None:
    native.core().cpu.negate_clip(_plan(bucket), squared.item(), max_norm, _threads())


def add_noise(x: Tensor, how: NoiseTask) -> Tensor:
    core = native.core()
    x, rows, scales = x.contiguous(), contiguous(how.rows), contiguous_floats(how.scales)
    out = _empty(x.shape, how.out_dtype)
    core.cpu.add_noise(
        x.data_ptr(), out.data_ptr(), _dtype(x.dtype), _dtype(how.out_dtype), x.numel(), how.eps,
        getattr(core.NoiseType, how.noise_type), _seed(how.seed), address(rows), address(scales),
        x.shape[-1] if x.ndim else 1, _threads(),
    )  # fmt: skip
    return out


def embedding_noise(table: Tensor, ids: Tensor, how: NoiseTask) -> tuple[Tensor, Tensor]:
    core = native.core()
    if table.stride(-1) != 1:
        table = table.contiguous()
    width = table.shape[1]
    clean = _empty((*ids.shape, width), table.dtype)
    noised = _empty((*ids.shape, width), how.out_dtype)
    ids, rows, scales = ids.to(torch.int64).contiguous(), contiguous(how.rows), contiguous_floats(how.scales)
    core.cpu.embedding_noise(
        table.data_ptr(), ids.data_ptr(), clean.data_ptr(), noised.data_ptr(), _dtype(table.dtype), _dtype(how.out_dtype),
        ids.numel(), width, table.stride(0), how.eps, getattr(core.NoiseType, how.noise_type), _seed(how.seed),
        address(rows), address(scales), _threads(),
    )  # fmt: skip
    return clean, noised


def divergence_rows(task: DivergenceTask) -> tuple[Tensor, Tensor]:
    rows, cols = task.clean.shape
    kl, ce = (torch.empty(rows, dtype=torch.float64) for _ in range(2))
    blocks = addresses_and_strides(task.clean, task.noised, task.grad_clean, task.grad_noised)
    native.core().cpu.divergence_rows(
        *blocks, _dtype(task.clean.dtype), rows, cols, address(task.labels), task.ignore_index, address(task.kl_weights),
        address(task.ce_weights), kl.data_ptr(), ce.data_ptr(), _threads(),
    )  # fmt: skip
    return kl, ce


def operand_rows(task: OperandTask) -> None:
    core = native.core()
    core.cpu.operand_rows(*operand_arguments(core, task, mixture=False), _threads())


def js_operand_rows(task: OperandTask) -> None:
    core = native.core()
    core.cpu.operand_rows(*operand_arguments(core, task, mixture=True), _threads())


def distillation_rows(task: DistillationTask) -> None:
    core = native.core()
    core.cpu.distillation_rows(*distillation_arguments(core, task), _threads())


def top_k_rows(task: TopKTask) -> None:
    core = native.core()
    core.cpu.top_k_rows(*top_k_arguments(core, task), _threads())


def js_rows(
    clean: Tensor, noised: Tensor, weights: Tensor | None, grad_clean: Tensor | None, grad_noised: Tensor | None
) -> Tensor:
    rows, cols = clean.shape
    value = torch.empty(rows, dtype=torch.float64)
    weights = contiguous(weights)
    blocks = addresses_and_strides(clean, noised, grad_clean, grad_noised)
    native.core().cpu.js_rows(
        *blocks, _dtype(clean.dtype), rows, cols, address(weights), value.data_ptr(), _threads()
    )  # fmt: skip
    return value


def row_losses(task: LossTask, grad_clean: Tensor | None, grad_noised: Tensor | None) -> tuple[Tensor, ...] | None:
    """The loss and, with labels, the cross-entropy and the divergence, as float32 scalars; its gradients go where asked.

    None, and nothing is written, where the core cannot say: a tensor is not plain or does not lie as it walks them, a label
    is no class, or torch has to see the call. A divergence that is not finite gives None as well, unless gradients have
    taken the logits' place: then the divergences of all rows, a list, come last.
    """
    found: tuple[Tensor, ...] | None = native.core().cpu.row_losses(*task[:-1], grad_clean, grad_noised, _threads())
    return found


def kl_loss(jensen_shannon: bool) -> Callable[..., tuple[Tensor] | None]:
    """The core's function of (clean, noised, mask, reduction) that does all of `symmetric_kl` or `js_divergence` where
    autograd does not record. It returns None, and nothing is written, as `row_losses`."""
    return functools.partial(native.core().cpu.kl_loss, jensen_shannon)


def scale_gradients_(first: Tensor, second: Tensor | None, factor: Tensor) -> bool:
    """Multiplies one or two gradients of rows by a float32 scalar; False where the core cannot: `row_losses` says when."""
    served: bool = native.core().cpu.scale_gradients(first, second, factor, _threads())
    return served


def scale_rows_(block: Tensor, factors: Tensor) -> None:
    stride = 1 if factors.numel() > 1 else 0
    native.core().cpu.scale_rows(
        *address_and_stride(block), _dtype(block.dtype), *block.shape, factors.data_ptr(), stride, _threads()
    )


def gradient_like(logits: Tensor) -> Tensor:
    """Room for a gradient, not yet written."""
    return _empty(logits.shape, logits.dtype)
