"""Training and eval mode, put back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def kept_modes(model: Any) -> Iterator[None]:
    """Every module of the model has afterwards the mode that it has now."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, every module's own mode put back afterwards."""
    with kept_modes(model):
        model.eval()
        yield
