"""Bounds on a training run, as callbacks of transformers' Trainer: a run that breaks one stops at its last good state.

Made for ascent (unlearning, GAP), where a loss has no floor, and useful for any fine-tuning.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from fastpost import distributed, ranks
from fastpost.gap.guards import layer_drifts
from fastpost.gap.weights import Snapshot


class _Weights:
    """Copies of the trainable weights that this rank holds, and the distance from them over all ranks."""

    def __init__(self, model: nn.Module) -> None:
        self._params = [p for p in model.parameters() if p.requires_grad]
        if not self._params:
            raise ValueError("the model has no trainable weights to guard")
        self._ranks = ranks.Ranks()
        distributed.reshard(self._params)
        groups: dict[ranks.Sharing, list[torch.Tensor]] = {}
        for p in self._params:
            part = distributed.local(p).detach()
            groups.setdefault(self._ranks.sharing(p), []).append(part if distributed.is_sharded(p) else p)
        self.copies = {sharing: Snapshot(tensors) for sharing, tensors in groups.items()}

    @property
    def sharded(self) -> bool:
        return any(self.copies)

    def save(self) -> None:
        for copy in self.copies.values():
            copy.save()

    def restore(self) -> None:
        for copy in self.copies.values():
            copy.restore()
        distributed.reshard(self._params)

    def distance(self) -> float:
        squares = {key: copy.squared_distance().cpu() for key, copy in self.copies.items()}
        return math.sqrt(float(self._ranks.sum(squares)))


class Guard(TrainerCallback):
    """Base of the guards: keeps the last good state, goes back to it and stops.

    Weights go back bit for bit; the optimizer's moments are those of the step that broke the bound, so this ends the run.

    Attributes:
        stopped_at: the step after which the bound was found broken; None while it holds.
        last_good: the step whose weights the model has after that.
        reason: what broke, in words.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        self.last_good = 0
        self.reason = ""
        self._good: _Weights | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.stopped_at, self.reason, self.last_good = None, "", state.global_step
        self._good = _Weights(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._good = None

    def _stop(self, broken: str, state: Any, control: Any) -> None:
        assert self._good is not None
        self._good.restore()
        self.stopped_at, self.reason = (
            state.global_step,
            f"{broken}; the model has the weights of step {self.last_good} again",
        )
        control.should_training_stop = True


class DriftGuard(Guard):
    """Stops a run before its weights have gone too far from those that it began with.

    Keeps two copies of the trainable weights. A check reads the distance, which waits for the device.

    Args:
        max_drift: bound on the 2-norm of (now - start) over all trainable weights, > 0; None: none.
        max_layer_drift: the same for each layer of the model's largest stack and each weight outside of it; None: none. Not
            for sharded models.
        every: check after every so many-th step.

    Raises:
        ValueError: no bound, or one that is not positive; `max_layer_drift` on a sharded model.
    """

    def __init__(self, max_drift: float | None = None, max_layer_drift: float | None = None, every: int = 1) -> None:
        super().__init__()
        if max_drift is None and max_layer_drift is None:
            raise ValueError("DriftGuard: give max_drift, max_layer_drift or both")
        for name, bound in (("max_drift", max_drift), ("max_layer_drift", max_layer_drift), ("every", every)):
            if bound is not None and not bound > 0:
                raise ValueError(f"DriftGuard: {name} must be > 0, not {bound}")
        self.max_drift, self.max_layer_drift, self.every = max_drift, max_layer_drift, every
        self.drift = 0.0
        self._start: _Weights | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, model=model)
        self._start = _Weights(model)
        if self.max_layer_drift is not None and self._start.sharded:
            raise ValueError("DriftGuard: max_layer_drift needs whole weights, and this model is sharded; use max_drift")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control)
        self._start = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._start is None or state.global_step % self.every:
            return
        drift, broken = self._start.distance(), ""
        if self.max_drift is not None and not drift <= self.max_drift:  # a NaN breaks it too
            broken = f"drift {drift:.4g} exceeds max_drift={self.max_drift:g}"
        elif self.max_layer_drift is not None:
            layers = layer_drifts(model, self._start.copies[()])
            name = max(layers, key=lambda layer: layers[layer])
            if not layers[name] <= self.max_layer_drift:
                broken = f"drift {layers[name]:.4g} of {name} exceeds max_layer_drift={self.max_layer_drift:g}"
        if self._good is None or self.stopped_at is not None:
            return
        if broken:
            self._stop(broken, state, control)
            return
        self._good.save()
        self.last_good, self.drift = state.global_step, drift


class LossGuard(Guard):
    """Stops a run whose training loss rises above a bound, or is not finite; judged at logging steps, where it is known.

    The loss is the mean since the last logging step: with `logging_steps=1` each step's. It was measured before that step's
    update, so what a loss vouches for are the weights of the logging step before: `last_good` is the youngest such step.
    The Trainer hides a loss that is not finite unless `logging_nan_inf_filter=False`. Keeps two copies of the trainable
    weights.

    Args:
        max_loss: bound on the logged `loss`.
    """

    def __init__(self, max_loss: float) -> None:
        super().__init__()
        if math.isnan(max_loss):
            raise ValueError("LossGuard: max_loss must be a number, not nan")
        self.max_loss = max_loss
        self._pending: _Weights | None = None  # of the last logging step; no loss has been measured at them yet
        self._pending_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, model=model)
        self._pending, self._pending_step = _Weights(model), state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control)
        self._pending = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None or self._good is None or self._pending is None or self.stopped_at is not None:
            return
        if not loss <= self.max_loss:
            self._stop(f"loss {loss:.4g} exceeds max_loss={self.max_loss:g}", state, control)
            return
        self._good, self._pending = self._pending, self._good
        self.last_good, self._pending_step = self._pending_step, state.global_step
        self._pending.save()
