"""Curves: how time grows with parameters, tensors, vocabulary, threads and processes, beside a copy of as many bytes.

A curve is a family of cases, one for each size, such as `scaling_tensors_100`. `bench/scaling_figure.py` draws them from
their CSV file; `fastpost bench scaling_tensors scaling_vocabulary` measures two of them.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.bench.divergence import Logits, kl_div_both_ways
from fastpost.bench.params import Parameters, rounds, sam
from fastpost.bench.registry import CASES, Case, Contender, Floor, Goal, peer
from fastpost.published import PublishedSAM, fairseq_symmetric_kl, foreach_sam_perturb, foreach_sam_restore

COPY, OURS = "copy", "fastpost"
FOREACH, PUBLISHED = "torch._foreach_ recipe", "published loop"
FAIRSEQ, KL_DIV = "fairseq formula", "F.kl_div both ways"
PLAIN, BY_SAM = "two passes + AdamW", "SAM"
PARAMETERS = tuple(10**k for k in range(5, 10))
TENSORS = (1, 10, 100, 1_000, 10_000)
VOCABULARY = (2, 16, 128, 1_024, 8_192, 65_536, 262_144)
THREADS = tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= (os.cpu_count() or 1))
PROCESSES = tuple(n for n in (1, 2, 4) if n <= (os.cpu_count() or 1))
PAIRS = 1 << 22  # positions of a stream, whatever the vocabulary
LAYERS = 32  # tensors that the parameters are divided among
SMALL = 256  # elements of a small tensor
KL, LISTS = "symmetric_kl", "norm + perturb + restore"
WIDTH, BATCH, STEPS = 1024, 512, 10  # of the network that several processes train
PEERS_NEED = 36  # bytes a parameter where torch's recipe and the published loop run beside fastpost, at the peak

# What a curve is called in the CSV, by the name of its cases.
CURVES: dict[str, str] = {}


def curve(title: str, sizes: Iterable[int]) -> Callable[[Callable[[int], Case]], Callable[[int], Case]]:
    """Registers a builder of a case for each size; its name and shape are the curve's."""

    def register(build: Callable[[int], Case]) -> Callable[[int], Case]:
        CURVES[build.__name__] = title
        for size in sizes:
            CASES[f"{build.__name__}_{size}"] = partial(build, size)
        return build

    return register


def free_memory() -> int:
    """Bytes that could be allocated without swapping; on systems that do not tell, all of the memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def there_and_back(count: int, elements: int) -> list[Contender]:
    """To w + e and back over `count` tensors of so many elements, by everybody, on the same weights and gradients."""
    size, free = 4 * count * elements, free_memory()
    needs = {COPY: 16, OURS: 16, FOREACH: PEERS_NEED, PUBLISHED: PEERS_NEED}  # bytes a parameter
    missing = {
        name: f"needs {need * size / 4e9:.3g} GB of memory, of which {free / 1e9:.3g} are free"
        for name, need in needs.items()
        if need * size / 4 > free
    }
    absent = [Contender.absent(name, "" if name == OURS else "torch", why) for name, why in missing.items()]
    if OURS in missing:
        return absent
    model = Parameters([(elements,)] * count).give_gradients()
    params: list[Tensor] = [p.detach() for p in model.parameters()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    stash = [torch.empty_like(p) for p in params]
    slow = size >= 1 << 30
    ours = [
        peer(COPY, lambda: torch._foreach_copy_(stash, params), 2 * size, slow=slow),
        Contender(OURS, rounds(sam(model)), 7 * size, slow=slow),
    ]
    if absent:
        return [*ours, *absent]
    # A model of its own, whose parameters that loop gives other memory at every step.
    moved = [nn.Parameter(p.clone()) for p in params]
    for p, g in zip(moved, grads, strict=True):
        p.grad = g
    popular = PublishedSAM(moved, None)

    def foreach() -> None:
        foreach_sam_perturb(params, grads, stash, 0.05)
        foreach_sam_restore(params, stash)

    def loop() -> None:
        popular.first_step()
        popular.restore()

    return [*ours, peer(FOREACH, foreach, 10 * size, slow=slow), peer(PUBLISHED, loop, 12 * size, slow=slow)]


@curve("SAM norm + perturb + restore, by parameters", PARAMETERS)
def scaling_parameters(size: int) -> Case:
    """Floor: seven reads or writes of the parameters."""
    elements = math.ceil(size / LAYERS)
    return Case(
        CURVES["scaling_parameters"], f"{size:,}", "float32", partial(there_and_back, LAYERS, elements),
        [Floor(OURS, COPY, {}, bytes=28 * LAYERS * elements), Goal(OURS, FOREACH, {}), Goal(OURS, PUBLISHED, {})],
    )  # fmt: skip


@curve("SAM norm + perturb + restore, by tensors of 1 KB", TENSORS)
def scaling_tensors(size: int) -> Case:
    """Small tensors: what each costs besides its memory."""
    return Case(
        CURVES["scaling_tensors"], f"{size:,}", "float32", partial(there_and_back, size, SMALL),
        [Floor(OURS, COPY, {}, bytes=28 * size * SMALL), Goal(OURS, FOREACH, {}), Goal(OURS, PUBLISHED, {})],
    )  # fmt: skip


@curve("symmetric KL, forward + backward, by classes", VOCABULARY)
def scaling_vocabulary(size: int) -> Case:
    """As many logits at every width. Floor: each is read and its gradient written."""
    rows = PAIRS // size
    logits = Logits(rows, size, 0.1)
    target, moved = torch.empty(rows, size), 16 * rows * size

    def contenders() -> list[Contender]:
        return [
            peer(COPY, lambda: target.copy_(logits.kept[0].detach()), moved // 2),
            Contender(OURS, logits.forward_backward(fastpost.symmetric_kl, inplace=True), moved, logits.renew),
            peer(FAIRSEQ, logits.forward_backward(fairseq_symmetric_kl), 0, logits.renew),
            peer(KL_DIV, logits.forward_backward(kl_div_both_ways), 0, logits.renew),
        ]

    return Case(
        CURVES["scaling_vocabulary"], f"{size:,}", "float32", contenders,
        [Floor(OURS, COPY, {}, bytes=moved), Goal(OURS, FAIRSEQ, {}), Goal(OURS, KL_DIV, {})],
    )  # fmt: skip


@curve("symmetric KL and SAM's lists, by threads", THREADS)
def scaling_threads(size: int) -> Case:
    """Both kernels on the same data with more and more threads, beside a copy by as many."""
    logits, target = Logits(256, 50257, 0.1), torch.empty(256, 50257)
    moved = 16 * target.numel()
    model = Parameters([(1 << 20,)] * LAYERS).give_gradients()
    weights = 4 * LAYERS << 20
    return Case(
        CURVES["scaling_threads"], f"{size:,}", "float32",
        [
            peer(COPY, lambda: target.copy_(logits.kept[0].detach()), moved // 2),
            Contender(KL, logits.forward_backward(fastpost.symmetric_kl, inplace=True), moved, logits.renew),
            Contender(LISTS, rounds(sam(model)), 7 * weights),
        ],
        [Floor(KL, COPY, {}, bytes=moved), Floor(LISTS, COPY, {}, bytes=7 * weights)],
        threads=size,
    )  # fmt: skip


@curve("a step of SAM under DistributedDataParallel, by processes", PROCESSES)
def scaling_processes(size: int) -> Case:
    """Beside two passes and AdamW in as many processes, a thread each, which exchange gradients by gloo."""
    return Case(
        CURVES["scaling_processes"], f"{size:,}", "float32",
        [
            peer(PLAIN, partial(in_processes, size, False), slow=True, reports=True),
            Contender(BY_SAM, partial(in_processes, size, True), slow=True, reports=True),
        ],
        [Goal(BY_SAM, PLAIN, {})],
    )  # fmt: skip


def in_processes(count: int, by_sam: bool, width: int = WIDTH) -> float:
    """Seconds of a step in `count` processes: the first one's median. `width` is that of the network's layers."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(count) as pool:
        return pool.starmap(
            _trained, [(rank, count, by_sam, width, f"{folder}/meeting") for rank in range(count)], chunksize=1
        )[0]


def _trained(rank: int, count: int, by_sam: bool, width: int, meeting: str) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    seconds = _step_times(by_sam, width)
    # DDP's reducer must not be the last to hold the group: it would wait, with the interpreter locked, for threads that wait
    # for the interpreter.
    gc.collect()
    dist.destroy_process_group()
    return statistics.median(seconds)


def _step_times(by_sam: bool, width: int) -> list[float]:
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())))
    parallel = nn.parallel.DistributedDataParallel(model)
    base = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(BATCH, width)

    def backward() -> Tensor:
        loss: Tensor = parallel(x).square().mean()
        loss.backward()
        return loss

    def plain() -> None:
        for _ in range(2):
            base.zero_grad()
            backward()
        base.step()

    opt = SAM(None, base)

    def ours() -> None:
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step(zero_grad=True)

    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        begun = time.perf_counter()
        (ours if by_sam else plain)()
        seconds.append(time.perf_counter() - begun)
    return seconds
