"""What the compiled and the Triton backends have in common: the dtypes they serve, and how they refuse a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpost.plan import Bucket, CodeList
from fastpost.row_tasks import DistillationTask, OperandTask, TopKTask

# Each dtype with its name in the native core.
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def refusal(
    operations: Mapping[str, object], op: str, wrong_device: str | None, dtype: torch.dtype, walkable: bool
) -> str | None:
    """Why a backend cannot serve a call, or None.

    Args:
        operations: the backend's module namespace.
        op: name of the operation.
        wrong_device: what to say of a device that the backend does not serve; None where it does.
        dtype: of the tensors.
        walkable: whether their memory can be walked by address.
    """
    if op not in operations:
        return "has no such operation"
    if wrong_device is not None:
        return wrong_device
    if dtype not in DTYPES:
        return f"serves {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if not walkable:
        return "the tensors' memory cannot be walked in step (mixed dtypes or strides that differ)"
    return None


def coded(bucket: Bucket) -> CodeList:
    """The list beside a stash of codes."""
    assert bucket.codes is not None
    return bucket.codes


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def contiguous_floats(tensor: Tensor | None) -> Tensor | None:
    """What a kernel that takes float32 by address may be given."""
    return None if tensor is None else tensor.float().contiguous()


def number_on(device: torch.device, squared: Tensor) -> Tensor:
    """A squared norm as kernels read it: float64, on their device."""
    return squared.to(device, torch.float64)


def seed_on(device: torch.device, seed: Tensor | None) -> Tensor | None:
    """A seed where kernels can read it."""
    return None if seed is None else seed.to(device)


def address(tensor: Tensor | None) -> int:
    """Where the tensor begins; 0, the native core's null, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def address_and_stride(block: Tensor | None) -> tuple[int, int]:
    """Of a matrix: where it begins, and from row to row how many elements."""
    return (0, 0) if block is None else (block.data_ptr(), block.stride(0))


def addresses_and_strides(*blocks: Tensor | None) -> list[int]:
    """The same of several, one after another."""
    return [part for block in blocks for part in address_and_stride(block)]


def operand_dtype(logits: Tensor, *operands: Tensor | None) -> torch.dtype:
    """Of the operands that are wanted, the logits' where none is.

    Raises:
        ValueError: they differ, and a kernel would write past the narrower one's memory.
    """
    dtypes = {operand.dtype: None for operand in operands if operand is not None} or {logits.dtype: None}
    if len(dtypes) > 1:
        names = " and ".join(sorted((str(dtype).removeprefix("torch.") for dtype in dtypes), reverse=True))
        raise ValueError(f"gradients of {names}: a kernel writes them in one dtype; make both the wider one")
    return next(iter(dtypes))


def operand_arguments(core: Any, task: OperandTask, mixture: bool) -> tuple[Any, ...]:
    """A task of operands as both cores take it, but for where it runs; `mixture`: of Jensen-Shannon's divergence."""
    clean = task.clean
    return (
        *addresses_and_strides(clean, task.noised, task.first, task.second),
        getattr(core.DType, DTYPES[operand_dtype(clean, task.first, task.second)]), *clean.shape, address(task.labels),
        task.ignore_index, address(task.kl_weights), address(task.ce_weights), task.smoothing, task.cap, task.teaches,
        task.noised_classifies, mixture, address(task.kl_out), address(task.ce_out),
    )  # fmt: skip


def distillation_arguments(core: Any, task: DistillationTask) -> tuple[Any, ...]:
    """A task of distillation as both cores take it, but for where it runs."""
    student = task.student
    dtype = operand_dtype(student, task.grad_student, task.grad_teacher)
    return (
        *addresses_and_strides(task.teacher, student, task.grad_teacher, task.grad_student),
        getattr(core.DType, DTYPES[dtype]), *student.shape, address(task.labels), task.ignore_index, address(task.weights),
        address(task.ce_weights), getattr(core.Divergence, task.divergence), task.beta, task.temperature, task.teacher_cap,
        task.student_cap, task.smoothing, address(task.value_out), address(task.ce_out),
    )  # fmt: skip


def top_k_arguments(core: Any, task: TopKTask) -> tuple[Any, ...]:
    """A task of a teacher's most probable classes as both cores take it, but for where it runs."""
    logits, k = task.logits, task.ids.shape[1]
    dtype = operand_dtype(logits, task.grad)
    return (
        *addresses_and_strides(logits, task.grad), getattr(core.DType, DTYPES[dtype]), *logits.shape, address(task.ids),
        address(task.log_probs), k, task.log_probs.shape[1] > k, address(task.labels), task.ignore_index,
        address(task.weights), address(task.ce_weights), getattr(core.Divergence, task.divergence), task.beta,
        task.temperature, task.cap, task.smoothing, task.has_rest, address(task.value_out), address(task.ce_out),
    )  # fmt: skip
