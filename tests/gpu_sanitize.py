"""Every operation a few times on small awkward inputs, for compute-sanitizer: `python -m tests.gpu_sanitize cuda`.

What is computed is the tests' business; here addresses are. PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an
allocation of its own, so that the step beyond its end is seen. Two words in place of a backend plant a defect each, which
shows that a sanitizer looks at our kernels at all: "overrun" walks past an allocation, "unwritten" reads what nobody wrote.

A number of seconds may follow: no further input is begun after it. Families take turns, each with the inputs first that
differ most, and the last line says how many were run. `python -m tests.gpu_sanitize judge LOG` reads what initcheck wrote:
torch's own copies of memory that it has not filled are no matter of ours, a report that names our library or kernels is.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastpost
from fastpost import (
    SAM,
    dispatch,
    linear_distillation_loss,
    linear_js_divergence,
    linear_r3f_loss,
    linear_r_drop_loss,
    linear_top_k_distillation_loss,
    plan,
)
from fastpost.backends.vocab_shards import own_columns
from fastpost.errors import BackendUnavailable
from fastpost.ops import params as ops
from fastpost.ops.divergence import r3f_loss, symmetric_kl
from fastpost.ops.noise import NOISE_TYPES, add_noise, embedding_noise
from fastpost.row_tasks import IGNORED, OperandTask, ShardTask

LENGTHS = (1, 7, 0, 33, 1025, 65537)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OFFSETS = ((0, 0, 0), (3, 3, 3), (1, 2, 3))
NOISE_SHAPES = ((4, 1031), (5, 3), (1, 65537), (3, 8))
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")
ROWS = ((4, 1031), (5, 33), (2, 5000), (3, 2))
T = TypeVar("T")


def pairs(others: Sequence[T]) -> Iterator[tuple[torch.dtype, T]]:
    """Every dtype with every other thing; the first few hold all dtypes and as many of the others."""
    for shift in range(len(others)):
        for i, dtype in enumerate(DTYPES):
            yield dtype, others[(i + shift) % len(others)]


def shifted(t: Tensor, offset: int) -> Tensor:
    """A copy that starts `offset` elements into its allocation and ends with it. A kernel writes it, because
    initcheck complains of torch's copies."""
    return torch.mul(t.flatten(), 1, out=torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)[offset:])


def lists(device: str, dtype: torch.dtype, offsets: tuple[int, int, int]) -> list[list[Tensor]]:
    made = [[torch.randn(n, device=device).to(dtype) for n in LENGTHS] for _ in range(3)]
    return [[shifted(t, k) for t in column] for column, k in zip(made, offsets, strict=True)]


def params(device: str) -> Iterator[str]:
    for dtype, offsets in pairs(OFFSETS):
        w, g, s = lists(device, dtype, offsets)
        for eta in (None, 0.01):
            squared = ops.squared_norm(g, None if eta is None else w, eta=eta or 0.0)
            for seen in (dtype, torch.bfloat16):
                ops.sam_perturb_(w, g, s, squared, rho=0.3, adaptive=eta is not None, eta=eta or 0.0, compute_dtype=seen)
                ops.sam_restore_(w, s)
        ops.squared_distance(w, s)
        ops.dot(w, s)
        moments = [[torch.ones_like(t) for t in w] for _ in range(2)]
        for found_inf in (0.0, 1.0):
            counts = [torch.ones((), device=device) for _ in w]
            flag = torch.full((), found_inf, device=device)
            ops.sam_restore_adamw_(w, g, s, *moments, counts, lr=0.1, found_inf=flag, grad_scale=torch.ones_like(flag))
        ops.negate_(g)
        ops.flip_signs_(g, 3)
        ops.negate_clip_(g)
        ops.negate_clip_(g, 1.0)
        yield f"lists of {dtype}, offsets {offsets}"
    many = [torch.randn(1 + i % 9, device=device) for i in range(1700)]
    ops.flip_signs_(many, 3)
    ops.squared_norm(many)
    yield "1,700 tensors"


def noise(device: str) -> Iterator[str]:
    for dtype, shape in pairs(NOISE_SHAPES):
        x = shifted(torch.randn(shape, device=device).to(dtype), 1).view(shape)
        keep = torch.rand(shape[0], device=device) < 0.6
        for kind in NOISE_TYPES:
            for out in (dtype, torch.float32):
                add_noise(x, 0.1, kind, seed=3, out_dtype=out)
                add_noise(x, 0.1, kind, seed=3, keep=keep, out_dtype=out)
            ids = torch.randint(0, shape[0], (2, 7), device=device)
            embedding_noise(x, ids, 0.1, kind, seed=3)
            embedding_noise(x, ids, 0.1, kind, seed=3, keep=ids > 1)
            step = {
                "token_index": torch.arange(shape[0], device=device) - 1,
                "scale": torch.rand(shape[0], device=device),
            }
            add_noise(x, 0.1, kind, seed=3, **step)
            embedding_noise(x, ids, 0.1, kind, seed=3, token_index=ids - 1, scale=torch.rand(2, 7, device=device))
            if device != "cpu":  # rows that do not exist
                embedding_noise(x, torch.tensor([0, shape[0], -1, 2**40], device=device), 0.1, kind, seed=3)
        yield f"noise on {dtype} {shape}"


def divergence(device: str) -> Iterator[str]:
    for dtype, (rows, cols) in pairs(ROWS):
        wide = torch.randn(2, rows, cols + 3, device=device).to(dtype)
        labels = torch.randint(0, cols, (rows,), device=device)
        labels[0] = -100
        for a, b in ((wide[0, :, 3:], wide[1, :, 3:]), (wide[0, :, :cols].contiguous(), wide[1, :, 1 : cols + 1])):
            x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
            (symmetric_kl(x, y) * 2).backward()
            symmetric_kl(x, y, mask=labels >= 0, reduction="none").sum().backward()
            (r3f_loss(x * 1, y * 1, labels, inplace=True).loss * 3).backward()
            if device != "cpu":  # classes that do not exist
                r3f_loss(x, y, torch.where(labels < 0, 2**40, -labels - 1)).loss.backward()
            symmetric_kl(a, b)
        yield f"rows of {dtype}, {rows} x {cols}"


def steps(device: str) -> Iterator[str]:
    for fused_restore in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Linear(33, 5)).to(device)
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, fused=True, fused_restore=fused_restore)
        for _ in range(3):
            model(torch.randn(4, 9, device=device)).square().sum().backward()
            opt.first_step(zero_grad=True)
            model(torch.randn(4, 9, device=device)).square().sum().backward()
            opt.second_step(zero_grad=True)
        yield f"SAM steps, fused_restore={fused_restore}"


STORED: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"stash": "ulp", "fused_restore": True}),
    (torch.bfloat16, {"rounding": "stochastic", "stash": "ulp"}),
    (torch.bfloat16, {"master_params": None}),
    (torch.float32, {"norm": "backward"}),
    (torch.bfloat16, {"stash": "ulp", "fused_restore": True, "adaptive": True}),
    (torch.float16, {"rounding": "stochastic", "adaptive": True}),
    (torch.float16, {"stash": "ulp"}),
    (torch.float32, {"stash": "ulp", "adaptive": True}),
    (torch.float16, {"master_params": None, "adaptive": True}),
)


def stored(device: str) -> Iterator[str]:
    """SAM's steps, by how weights and norm are kept; the first input asks for every kernel of theirs.

    The second radius is so large that no distance fits into a code.
    """
    for cases in (STORED[:3], *([case] for case in STORED[3:])):
        for dtype, options in cases:
            if options.get("norm") == "backward" and not serves("chunk_squares", device):
                continue
            for rho in (0.3, 1e4):
                leaves = [torch.nn.Parameter(shifted(torch.randn(n, device=device).to(dtype), 3)) for n in LENGTHS]
                masters = [p.detach().float() for p in leaves] if "master_params" in options else None
                more = {**options, "master_params": masters} if masters else options
                opt = SAM(leaves, torch.optim.AdamW, rho=rho, lr=1e-2, fused=True, **more)
                for _ in range(2):
                    for step in (opt.first_step, opt.second_step):
                        sum((p * torch.randn_like(p)).float().sum() for p in leaves).backward()  # type: ignore[union-attr]
                        step(zero_grad=True)
        names = (f"{dtype} {'+'.join(options)}" for dtype, options in cases)
        yield f"SAM of {', '.join(names)}"


def heads(device: str) -> Iterator[str]:
    """Losses of output heads: rows of a warp and of a block, of operands in both dtypes."""
    for cols, dtype in ((33, torch.float32), (1031, torch.bfloat16), (1031, torch.float32), (33, torch.bfloat16)):
        made = [torch.randn(n, 24, device=device).to(dtype).requires_grad_() for n in (5, 5, cols, cols)]
        hidden, noised, weight, teacher = made
        labels = torch.randint(0, cols, (5,), device=device)
        labels[0] = -100
        for options in ({}, {"softcap": 20.0, "temperature": 0.7}):
            r3f = linear_r3f_loss(hidden, noised, weight, labels, label_smoothing=0.1, **options)  # type: ignore[arg-type]
            r3f.loss.backward()
            linear_r_drop_loss(hidden, noised, weight, labels, **options).loss.backward()  # type: ignore[arg-type]
            if serves("js_operand_rows", device):
                linear_js_divergence(hidden, noised, weight, mask=labels >= 0, **options).backward()  # type: ignore[arg-type]
            for divergence in DIVERGENCES:
                how: dict[str, Any] = {**options, "divergence": divergence, "ce_weight": 0.5}
                if serves("distillation_rows", device):
                    for grad in ("student", "both"):
                        linear_distillation_loss(hidden, weight, noised, teacher, labels, grad=grad, **how).loss.backward()
                if serves("top_k_rows", device):
                    ids = torch.rand(5, cols, device=device).argsort(-1)[:, :7]
                    if device != "cpu":  # classes that do not exist
                        ids[1, 2], ids[2, 3] = 2**40, -1
                    known = torch.full((5, 7), -3.0, device=device)
                    for rest in ("one_class", "dropped"):
                        linear_top_k_distillation_loss(hidden, weight, ids, known, labels, rest=rest, **how).loss.backward()
        if serves("shard_sums", device):
            cut_rows(cols, dtype, device)
        yield f"heads of {dtype}, {cols} classes"


def cut_rows(cols: int, dtype: torch.dtype, device: str) -> None:
    """Rows of two ranks' columns: labels of either and of none, and rows that are looked at again."""
    clean, noised = torch.randn(2, 6, cols, device=device).unbind()
    noised[1, 20] = -math.inf
    noised[2] = clean[2] + 4
    noised[2, 22], clean[2, 22] = 7, 5
    weights = torch.ones(6, dtype=torch.float64, device=device)
    labels = torch.tensor([0, cols - 1, 3, -100, 7, cols], device=device)
    top = torch.stack((clean.amax(-1), noised.amax(-1)))
    vocab = torch.full((), float(cols), dtype=torch.float64, device=device)
    ranks = []
    for first, end in ((0, 21), (21, cols)):
        own = own_columns(labels, -100, first, end - first, cols)
        logits = [t[:, first:end] for t in (clean, noised)]
        operands = [torch.empty(6, end - first, dtype=dtype, device=device) for _ in range(2)]
        values = (torch.empty_like(weights) for _ in range(2))
        task = OperandTask(*logits, own, IGNORED, weights, weights, *values, *operands, smoothing=0.1)
        ranks.append(ShardTask(task, top, vocab))
    sums_of, finish = (dispatch.select(op, clean.device, clean.dtype) for op in ("shard_sums", "shard_operands"))
    before = torch.stack([sums_of(rank, None) for rank in ranks]).sum(0)
    sums = torch.stack([sums_of(rank, before) for rank in ranks]).sum(0)
    for rank in ranks:
        finish(rank, before, sums)


def serves(op: str, device: str) -> bool:
    """Whether the backend in force has this operation, as Triton has not all."""
    try:
        dispatch.select(op, torch.device(device), torch.float32)
    except BackendUnavailable:
        return False
    return True


def overrun(device: str) -> None:
    """Negates 4,096 elements where 64 were allocated."""
    large, small = torch.zeros(4096, device=device), torch.zeros(64, device=device)
    bucket = plan.Bucket([0], grads=[large])
    ops.run("negate_", bucket)
    bucket.grads = [small]  # the plan keeps its lengths
    ops.run("negate_", bucket)


def unwritten(device: str) -> None:
    """The norm of an allocation that nothing was written to."""
    ops.squared_norm([torch.empty(5000, device=device)])


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def judge(log: Path) -> int:
    """0 where initcheck came to its end and no report is ours, 86 where one is, 1 where the log does not say.

    Raises:
        OSError: there is no such log.
    """
    text = log.read_text(errors="replace")
    total = re.search(r"^=+ ERROR SUMMARY: (\d+) error", text, re.M)
    if total is None:
        print("initcheck did not come to its end")
        return 1
    reports = [part for part in re.split(r"^=========\s*$", text, flags=re.M) if re.search(r"ninitialized", part)]
    ours = [part for part in reports if re.search(r"fastpost::|/fastpost/_C", part)]
    print(f"initcheck: {total[1]} reports, {len(reports)} of them in the log, {len(ours)} ours")
    if ours:
        print(*ours[:3], sep="\n")
        return 86
    return 0 if len(reports) >= int(total[1]) else 1  # what was not printed may be ours


def run(families: Sequence[Callable[[str], Iterator[str]]], device: str, seconds: float) -> int:
    """Takes turns until all is done or time is over. Returns 0 if every family was there at least once."""
    begun = time.monotonic()
    rounds = [family(device) for family in families]
    done = [0] * len(rounds)
    left = set(range(len(rounds)))
    while left and (time.monotonic() - begun < seconds or not all(done)):
        for i in sorted(left):
            if time.monotonic() - begun >= seconds and done[i]:
                continue
            line = next(rounds[i], None)
            wait(device)
            if line is None:
                left.discard(i)
                continue
            done[i] += 1
            print(line, flush=True)
    print(f"{sum(done)} inputs run, {'all there are' if not left else 'then time was over'}", flush=True)
    return 0 if all(done) else 1


def main(what: str, device: str = "cuda", seconds: float = math.inf) -> int:
    """Runs all operations through the backend named, or plants one of the defects. Returns 0 if all went well."""
    if what in ("overrun", "unwritten"):
        {"overrun": overrun, "unwritten": unwritten}[what](device)
        wait(device)
        return 0
    with fastpost.use_backend(what):
        return run((stored, heads, params, noise, divergence, steps), device, seconds)


if __name__ == "__main__":
    word, *rest = sys.argv[1:]
    sys.exit(judge(Path(rest[0])) if word == "judge" else main(word, seconds=float(rest[0]) if rest else math.inf))
