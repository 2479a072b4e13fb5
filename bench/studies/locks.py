"""Locks on bytes of an open file, far behind its end, that go when the process that holds them dies, however it dies.

They are Linux's locks of open file descriptions: unlike `lockf`, closing another descriptor of the file drops none, and
two descriptions in one process exclude each other as two processes do.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, pid (which has to be 0)
# Three ranges of bytes; a file never reaches them.
_APPENDING = 1 << 40
_PRESENT = 1 << 41
_CLAIMS = 1 << 42
_NAMES = 1 << 40  # bytes of the last two ranges, one for each name


def _byte_of(name: str) -> int:
    """A name's place in a range. Two names at one place would only wait for each other."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:5], "big")


class Locks:
    """Locks through one descriptor, which has to be open for reading and writing."""

    def __init__(self, file: int) -> None:
        self._file = file

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Waits until nobody else is in here."""
        self._set(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, _APPENDING)
        try:
            yield
        finally:
            self._set(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _APPENDING)

    def claim(self, name: str) -> bool:
        """Takes what has this name; False where another holds it."""
        try:
            self._set(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _CLAIMS + _byte_of(name))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def release(self, name: str) -> None:
        self._set(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _CLAIMS + _byte_of(name))

    def enter(self, name: str) -> bool:
        """Is present under a name, shared with others, until the file is closed; False where some are under another name."""
        own = _PRESENT + _byte_of(name)
        self._set(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, own)
        return not self._held(_PRESENT, own - _PRESENT) and not self._held(own + 1, _PRESENT + _NAMES - own - 1)

    def others(self) -> bool:
        """Whether anybody else is present."""
        return self._held(_PRESENT, _NAMES)

    def _set(self, how: int, kind: int, start: int) -> None:
        fcntl.fcntl(self._file, how, struct.pack(_FLOCK, kind, os.SEEK_SET, start, 1, 0))

    def _held(self, start: int, length: int) -> bool:
        """Whether others hold a lock in a range; what this descriptor holds does not count."""
        if length == 0:  # which would mean all bytes behind
            return False
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        found = struct.unpack(_FLOCK, fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, asked))
        return bool(found[0] != fcntl.F_UNLCK)
