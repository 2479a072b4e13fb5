"""Signals held back for a moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Holds Ctrl-C, and a SIGTERM that Python handles, back until the block is left.

    For work that is noted in Python after it was done by Python: a signal would be delivered between the two.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        own = {}  # signals are the main thread's
    pending: list[tuple[int, Any]] = []
    for number in own:
        signal.signal(number, lambda *arrived: pending.append(arrived))
    try:
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
        if pending:
            own[signal.Signals(pending[0][0])](*pending[0])
