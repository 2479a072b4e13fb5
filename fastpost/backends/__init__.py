"""One module per backend. The package itself can be called: `fastpost.backends()` says which backends this machine has."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpost.dispatch import BackendStatus


class _Backends(ModuleType):
    """Python binds a subpackage's name to its module, which would hide a function of that name."""

    def __call__(self) -> dict[str, BackendStatus]:
        from fastpost import dispatch

        return dispatch.backends()


sys.modules[__name__].__class__ = _Backends
