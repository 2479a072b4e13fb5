"""Runs fastpost's own contenders of cases once each, for a profiler that is started and stopped around every one.

`ncu --profile-from-start off python -m fastpost.bench.profiled NAME ...`

What runs before (inputs, compilation, a warm-up) lies outside the profiled range.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence

import torch

from fastpost import dispatch
from fastpost.bench.registry import Target
from fastpost.bench.run import default_backend, load


def profile(names: Sequence[str], at: Target, start: Callable[[], object], stop: Callable[[], object]) -> list[str]:
    """Calls start() before and stop() after each contender that the compiled core serves; returns their names."""
    done = []
    with dispatch.use_backend(default_backend(at.device.type)):
        for name, build in load(names, "cuda").items():
            for contender in build(at).build():
                if contender.backend:
                    continue
                for profiled in (False, True):
                    if contender.before is not None:
                        contender.before()
                    if profiled:
                        start()
                    contender.run()
                    if profiled:
                        stop()
                done.append(f"{name}: {contender.name}")
            del contender
            gc.collect()
    return done


def main(names: Sequence[str]) -> int:
    def stop() -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    def start() -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()

    print(*profile(names, Target(torch.device("cuda")), start, stop), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
