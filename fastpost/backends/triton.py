"""Tensors on any device that Triton compiles for; CPU tensors through Triton's interpreter, for tests."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpost.backends.reference import sam_direction_ as sam_direction_  # torch's operations; no kernel of its own
from fastpost.backends.serving import coded, contiguous, contiguous_floats, number_on, refusal, seed_on
from fastpost.plan import AdamWPart, Bucket
from fastpost.row_tasks import DivergenceTask, NoiseTask, OperandTask


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def status() -> tuple[bool, str]:
    """Availability, and the device in use or the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (`pip install triton`)."
    if _interpreted():
        return True, "Triton's interpreter on the CPU (TRITON_INTERPRET=1): right, and very slow"
    for device in ("cuda", "xpu"):
        if getattr(torch, device).is_available():
            return True, f"Triton on {device}: {getattr(torch, device).get_device_name()}"
    return False, "torch sees no GPU that Triton compiles for; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests."


def refuses(op: str, device: str, dtype: torch.dtype, walkable: bool) -> str | None:
    """Why this backend cannot serve the call, or None."""
    on_cpu = device == "cpu" and not _interpreted()
    wrong = "serves GPU tensors (CPU tensors only under TRITON_INTERPRET=1)" if on_cpu else None
    return refusal(globals(), op, wrong, dtype, walkable)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, wherever a kernel's tensors are."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def on_device(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """An operation of this backend for tensors of this device."""
    if device.type == "cpu":
        return function

    @functools.wraps(function)
    def there(*arguments: Any, **named: Any) -> Any:
        with _current(device):
            return function(*arguments, **named)

    return there


def _kernels(family: str) -> Any:
    return importlib.import_module(f"fastpost.triton_kernels.{family}")


_STEPPED = ("weights", "grads", "stash", "first", "second")  # what AdamW's step reads and writes, in the kernel's order

# Tables of addresses, by the columns that are in them, for as long as their bucket lives.
_tables: weakref.WeakKeyDictionary[Bucket, dict[tuple[str, ...], Any]] = weakref.WeakKeyDictionary()


def _table(bucket: Bucket, *columns: str) -> Any:
    """The bucket's table of these columns, pointing at where the tensors lie now."""
    tables = _tables.setdefault(bucket, {})
    lists = [getattr(bucket, name) for name in columns]
    if columns not in tables:
        # AdamW has a row of factors per tensor of the bucket; all else knows a tensor by its place in the user's list.
        streams = range(len(lists[0])) if "first" in columns else bucket.streams
        tables[columns] = _kernels("params").Table([t.numel() for t in lists[0]], streams)
    return tables[columns].point(lists)


def squared_norm(bucket: Bucket, eta: float | None) -> Tensor:
    columns = ("grads",) if eta is None else ("grads", "weights")
    total: Tensor = _kernels("params").squared_norm(_table(bucket, *columns), bucket.dtype, eta)
    return total


def squared_distance(bucket: Bucket) -> Tensor:
    total: Tensor = _kernels("params").squared_distance(_table(bucket, "weights", "stash"), bucket.dtype)
    return total


def dot(bucket: Bucket) -> Tensor:
    total: Tensor = _kernels("params").dot(_table(bucket, "grads", "stash"), bucket.dtype)
    return total


def sam_perturb_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    table = _table(bucket, "weights", "grads", "stash")
    squared, seed = number_on(bucket.device, squared), seed_on(bucket.device, seed)
    kernels = _kernels("params")
    if _interpreted():  # which runs a kernel in pieces, and may be interrupted between them
        for w, stash in zip(bucket.weights, bucket.stash, strict=True):
            stash.copy_(w.detach())
        bucket.stashed = True
    # A launch and the note of it are two lines of Python. An interrupt between them is found out from the sums.
    bucket.launched = partial = kernels.room_for_sums(table)
    sums: Tensor = kernels.sam_perturb_(table, bucket.dtype, squared, rho, eta, compute_dtype, seed, partial=partial)
    bucket.stashed = True
    return sums


def sam_perturb_coded_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """Waits for the device, which says how many elements found no room in the list."""
    codes, table = coded(bucket), _table(bucket, "weights", "grads", "stash")
    how = (number_on(bucket.device, squared), rho, eta, compute_dtype, seed_on(bucket.device, seed))
    kernels = _kernels("params")
    if _interpreted():  # as above
        codes.origins = [w.detach().clone() for w in bucket.weights]
        bucket.stashed = True
    codes.words[:1].zero_()
    bucket.launched = partial = kernels.room_for_sums(table)
    sums: Tensor = kernels.sam_perturb_(table, bucket.dtype, *how, kept="codes", words=codes.words, partial=partial)
    bucket.stashed = True
    if codes.grown():
        kernels.sam_perturb_(table, bucket.dtype, *how, kept="pending", words=codes.words)
    codes.origins = None
    return sums


def sam_decode_(bucket: Bucket) -> None:
    codes, kernels = coded(bucket), _kernels("params")
    if _interpreted():  # into copies first
        codes.origins = origins = _decoded_copies(bucket)
        for w, origin in zip(bucket.weights, origins, strict=True):
            w.detach().copy_(origin)
    else:  # an interrupt may come between the launch and its note, and then a second launch, which changes nothing
        table = _table(bucket, "weights", "stash")
        codes.waits = kernels.all_wait(table) if codes.waits is None else codes.waits
        kernels.sam_decode_(table, bucket.dtype, codes.words, codes.waits)
    bucket.stashed = False
    codes.origins = codes.waits = None


def _decoded_copies(bucket: Bucket) -> list[Tensor]:
    """w in tensors of its own, by the kernels; w + e stays."""
    origins = [w.detach().clone() for w in bucket.weights]
    kernels = _kernels("params")
    table = kernels.Table([w.numel() for w in origins], bucket.streams).point([origins, bucket.stash])
    kernels.sam_decode_(table, bucket.dtype, coded(bucket).words, kernels.all_wait(table))
    return origins


def sam_perturb_masters_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype
) -> Tensor:
    table, squared = _table(bucket, "weights", "grads", "stash"), number_on(bucket.device, squared)
    sums: Tensor = _kernels("params").sam_perturb_(table, bucket.dtype, squared, rho, eta, compute_dtype, kept="masters")
    return sums


def sam_cast_(bucket: Bucket) -> None:
    _kernels("params").sam_cast_(_table(bucket, "weights", "stash"), bucket.dtype)


def sam_restore_(bucket: Bucket) -> None:
    _kernels("params").sam_restore_(_table(bucket, "weights", "stash"), bucket.dtype)


def sam_restore_adamw_(
    bucket: Bucket, steps: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    table, kernels = _table(bucket, *_STEPPED), _kernels("params")
    how = (lr, betas, eps, weight_decay, maximize, grad_scale, found_inf)
    kernels.sam_restore_adamw_(table, bucket.dtype, kernels.adamw_factors(table, steps, *how))


def sam_decode_adamw_(bucket: Bucket, parts: list[AdamWPart]) -> None:
    step = _step_in_copies if _interpreted() else _step_in_place
    step(parts)
    parts[-1].bucket.stashed = False  # from here on all weights count as stepped
    for part in parts:
        codes = coded(part.bucket)
        part.bucket.stashed, codes.origins, codes.waits = False, None, None


def _step_in_place(parts: list[AdamWPart]) -> None:
    kernels, launches = _kernels("params"), []
    for part in parts:
        codes, table = coded(part.bucket), _table(part.bucket, *_STEPPED)
        codes.waits = kernels.all_wait(table) if codes.waits is None else codes.waits
        launches.append((table, part.bucket.dtype, kernels.adamw_factors(table, *part[1:]), codes.words, codes.waits))
    parts[-1].bucket.stepping = launches[-1][-1]  # the last launch tells that all were made

    def launch_all() -> None:
        for launch in launches:
            with _current(launch[-1].device):
                kernels.sam_decode_adamw_(*launch)

    try:
        launch_all()
    except BaseException:
        # Nobody knows how many launches were made before the interrupt. A second one changes nothing where there was a
        # first, and with all of them every weight is stepped. What fails for another reason fails again.
        launch_all()
        raise


def _step_in_copies(parts: list[AdamWPart]) -> None:
    """For the interpreter, which runs a kernel in pieces and may be interrupted between them: until all copies are written
    back, all weights can be put back."""
    kernels, stepped = _kernels("params"), []
    for part in parts:
        b, codes = part.bucket, coded(part.bucket)
        written = [[t.detach().clone() for t in column] for column in (b.weights, b.first, b.second)]
        table = kernels.Table([w.numel() for w in b.weights], range(len(b.weights)))
        table.point([written[0], b.grads, b.stash, *written[1:]])
        factors, waits = kernels.adamw_factors(table, *part[1:]), kernels.all_wait(table)
        kernels.sam_decode_adamw_(table, b.dtype, factors, codes.words, waits)
        stepped.append((written, _decoded_copies(b)))
    for part, (_, origins) in zip(parts, stepped, strict=True):
        coded(part.bucket).origins = origins
    for part, (written, _) in zip(parts, stepped, strict=True):
        b = part.bucket
        for row, step in enumerate(part.steps):
            for column, new in zip((b.weights, b.first, b.second), written, strict=True):
                if step is not None or column is b.weights:
                    column[row].detach().copy_(new[row])


def negate_(bucket: Bucket) -> None:
    _kernels("params").flip_(_table(bucket, "grads"), bucket.dtype, None)


def flip_signs_(bucket: Bucket, seed: Tensor) -> None:
    _kernels("params").flip_(_table(bucket, "grads"), bucket.dtype, seed.to(bucket.device))


def negate_norm_(bucket: Bucket) -> Tensor:
    squared = squared_norm(bucket, None)
    negate_(bucket)
    return squared


def negate_clip_(bucket: Bucket, squared: Tensor, max_norm: float) -> None:
    norm = number_on(bucket.device, squared).sqrt()
    clips = torch.isfinite(norm) & (norm > max_norm)
    factor = torch.where(clips, -max_norm / norm, torch.full_like(norm, -1.0))
    _kernels("params").scale_(_table(bucket, "grads"), bucket.dtype, factor)


def add_noise(x: Tensor, how: NoiseTask) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=how.out_dtype, device=x.device)
    _kernels("noise").add_noise(x, out, *_drawn(how))
    return out


def embedding_noise(table: Tensor, ids: Tensor, how: NoiseTask) -> tuple[Tensor, Tensor]:
    if table.stride(-1) != 1:
        table = table.contiguous()
    clean = torch.empty((*ids.shape, table.shape[1]), dtype=table.dtype, device=table.device)
    noised = torch.empty(clean.shape, dtype=how.out_dtype, device=table.device)
    _kernels("noise").embedding_noise(table, ids.long().contiguous(), clean, noised, *_drawn(how))
    return clean, noised


def _drawn(how: NoiseTask) -> tuple[Any, ...]:
    """As the kernels take it."""
    return how.eps, how.noise_type, how.seed, contiguous(how.rows), contiguous_floats(how.scales)


def divergence_rows(task: DivergenceTask) -> tuple[Tensor, Tensor]:
    ones = torch.ones(len(task.clean), dtype=torch.float64, device=task.clean.device)
    kl_weights = ones if task.kl_weights is None else task.kl_weights
    ce_weights = _counting(ones if task.ce_weights is None else task.ce_weights, task.labels, task.ignore_index)
    kl, ce = _kernels("divergence").divergence_rows(
        task.clean, task.noised, task.labels, kl_weights, ce_weights, task.grad_clean, task.grad_noised
    )
    return kl, ce


def operand_rows(task: OperandTask) -> None:
    weights = torch.zeros_like(task.kl_weights) if task.ce_weights is None else task.ce_weights
    _kernels("divergence").operand_rows(
        task.clean, task.noised, task.labels, task.kl_weights, _counting(weights, task.labels, task.ignore_index),
        task.smoothing, task.cap, task.teaches, task.noised_classifies, task.first, task.second, task.kl_out,
        torch.empty_like(task.kl_out) if task.ce_out is None else task.ce_out,
    )  # fmt: skip


def _counting(weights: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Weights of the cross-entropy, 0 where there is none."""
    return torch.zeros_like(weights) if labels is None else torch.where(labels == ignore_index, 0.0, weights)


def js_rows(
    clean: Tensor, noised: Tensor, weights: Tensor | None, grad_clean: Tensor | None, grad_noised: Tensor | None
) -> Tensor:
    if weights is None:
        weights = torch.ones(clean.shape[0], dtype=torch.float64, device=clean.device)
    value: Tensor = _kernels("divergence").js_rows(clean, noised, weights.contiguous(), grad_clean, grad_noised)
    return value


def scale_rows_(block: Tensor, factors: Tensor) -> None:
    _kernels("divergence").scale_rows_(block, factors)


def gradient_like(logits: Tensor) -> Tensor:
    """Room for a gradient, not yet written."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
