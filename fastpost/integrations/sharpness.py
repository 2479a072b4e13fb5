"""Sharpness, measured while transformers' Trainer trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpost.integrations import COMPUTE_DTYPES
from fastpost.sam import Sharpness, sharpness
from fastpost.sam.measurement.study import NotFinite

_NOT_LOGGED = ("rho", "batches", "micro_batches", "resolution")  # the same in every line


class SharpnessCallback(TrainerCallback):
    """Measures `fastpost.sharpness` before the first step and after every so many steps, and logs it.

    The lines are called `sharpness/own_rise`, `sharpness/own_rise_se` and so on, as in `Sharpness.as_dict()`. fastpost's
    trainers hand them to whoever reports. A plain Trainer keeps them in `state.log_history`; it reports them as well after
    `callback.log = trainer.log`. Training goes on as without the callback, bit for bit; where the loss is not finite, a
    warning takes the place of the line. FSDP2 has to be given the sharded model's ranks' parts of each batch, as
    `fastpost.sharpness` says; other ranks all measure the same batches.

    Args:
        batches: what to measure on, always the same, as the model takes them; read once and kept.
        every: measure after every so many-th step, >= 1.
        loss: from (model, batch) to a scalar; None: the model's own, `model(**batch).loss`.
        **options: `rho`, `micro_batch_size`, `eval_mode` and the others of `fastpost.sharpness`.

    Attributes:
        results: (step, Sharpness) of this run, oldest first.
        log: takes a dictionary of numbers; None: `state.log_history` alone.

    Raises:
        ValueError: `every` below 1, or no batch.
    """

    def __init__(
        self, batches: Iterable[Any], every: int, *, loss: Callable[[Any, Any], Tensor] | None = None, **options: Any
    ) -> None:
        if every < 1:
            raise ValueError(f"SharpnessCallback: every must be >= 1, not {every}")
        self.every, self.options = every, options
        self.results: list[tuple[int, Sharpness]] = []
        self.log: Callable[[dict[str, float]], None] | None = None
        self._batches, self._loss = list(batches), loss or _own_loss
        if not self._batches:
            raise ValueError("SharpnessCallback: there is no batch to measure on")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.results = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._measure(args, state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(args, state, model)

    def _measure(self, args: Any, state: Any, model: Any) -> None:
        device = next(model.parameters()).device
        batches = [_to(batch, device) for batch in self._batches]
        precision = COMPUTE_DTYPES.get("bf16" if args.bf16 else "fp16" if args.fp16 else "no")
        try:
            found = sharpness(model, self._loss, batches, **{"compute_dtype": precision, **self.options})
        except NotFinite as error:
            warnings.warn(f"SharpnessCallback: nothing is measured at step {state.global_step}. {error}", stacklevel=2)
            return
        self.results.append((state.global_step, found))
        numbers = {f"sharpness/{name}": value for name, value in found.as_dict().items() if name not in _NOT_LOGGED}
        if self.log is not None:
            self.log(numbers)
        else:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})


def _own_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise TypeError("SharpnessCallback: the model returns no loss; batches need labels, or give loss=")
    return loss


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to(part, device) for name, part in batch.items()}
    return [_to(part, device) for part in batch] if isinstance(batch, (list, tuple)) else batch
