"""How much memory torch's CPU allocator hands out at most."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def cpu_peak_bytes(work: Callable[[], object]) -> int:
    """Bytes allocated at most while `work` runs, beside what was there; operations are seen from inside."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes, initial=0))
