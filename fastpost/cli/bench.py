"""`fastpost bench`: the operations beside their floors and beside the published formulas, with hit or miss."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benches named (all by default). Returns 1 when a case failed or, with --strict, a goal was missed."""
    parser = argparse.ArgumentParser(prog="fastpost bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases to run, or what their names begin with; --list shows them")
    parser.add_argument(
        "--backend",
        help="what serves fastpost's calls (default: FASTPOST_BACKEND, or the compiled core for the device); without it, "
        "nothing is timed in its place: name reference or triton to time those",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N; each has cases of its own")
    parser.add_argument("--list", action="store_true", help="print the device's cases and stop; needs no such device")
    parser.add_argument("--repeats", type=int, help="rounds; each runs every contender once (default 9; on a GPU 25)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further case after this time")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="on the CPU: freed memory stays with the process, as in a long run's heap, so that nobody pays for fresh pages",
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="on the CPU: count the processor's time, not the clock's, on a machine that others use as well",
    )
    parser.add_argument("--output", type=Path, help="write a CSV here, after every case")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a goal is missed")
    options = parser.parse_args(argv)
    kind = options.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:N, not {options.device}")
    rounds = options.repeats if options.repeats is not None else 9 if kind == "cpu" else 25
    if rounds < 1:
        parser.error("--repeats must be at least 1")
    from fastpost.bench import run
    from fastpost.dispatch import use_backend
    from fastpost.errors import BackendUnavailable

    try:
        cases = run.load(options.names, kind)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(run.described(cases) if kind == "cpu" else run.listing(options.names, rounds, options.device)))
        return 0
    if options.keep_memory and kind == "cuda":
        parser.error("--keep-memory is about the CPU's allocator")
    if options.processor_time and kind == "cuda":
        parser.error("--processor-time is about the CPU")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device; --list shows what would be timed")
    backend = options.backend or run.default_backend(kind)
    try:
        with use_backend(backend):
            pass  # before minutes are spent: the backend that is to be timed has to be there
    except ValueError as error:
        parser.error(str(error))
    except BackendUnavailable as error:
        parser.error(f"{error} `--backend reference` times the reference implementation, in rows that say so.")
    heap = None if kind == "cuda" else "kept" if options.keep_memory else "returned"
    outcome = run.run(
        options.names,
        rounds,
        options.output,
        device=options.device,
        seconds=options.seconds,
        heap=heap,
        processor=options.processor_time,
        backend=backend,
    )
    return 1 if outcome.failed or (options.strict and not outcome) else 0
