"""Bounds on a training run, as callbacks of transformers' Trainer: a run that breaks one stops at its last good state.

Made for ascent (unlearning, GAP), where a loss has no floor, and useful for any fine-tuning.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpost import distributed, ranks
from fastpost.gap.guards import layer_drifts
from fastpost.gap.weights import Snapshot, write_tensors
from fastpost.ops.params import squared_norm


class _Weights:
    """Copies of the trainable weights that this rank holds, and the distance from them over all ranks."""

    def __init__(self, model: nn.Module) -> None:
        params = [p for p in model.parameters() if p.requires_grad]
        if not params:
            raise ValueError("the model has no trainable weights to guard")
        self._model, self._ranks = model, ranks.Ranks()
        distributed.reshard(params)
        groups: dict[ranks.Sharing, list[torch.Tensor]] = {}
        for p in params:
            groups.setdefault(self._ranks.sharing(p), []).append(p)
        self.copies = {sharing: Snapshot(weights, model) for sharing, weights in groups.items()}

    @property
    def sharded(self) -> bool:
        return any(self.copies)

    def _follow(self) -> None:
        self._reshard()
        for copy in self.copies.values():
            copy.follow()

    def _reshard(self) -> None:
        distributed.reshard(p for copy in self.copies.values() for p in copy.weights)

    def save(self) -> None:
        self._follow()
        for copy in self.copies.values():
            copy.save()

    def restore(self) -> None:
        self._reshard()
        for copy in self.copies.values():
            copy.restore()
        self._reshard()

    def distance(self) -> float:
        self._follow()
        squares = {key: copy.squared_distance().cpu() for key, copy in self.copies.items()}
        return math.sqrt(float(self._ranks.sum(squares)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The copies by the names of their weights; of a sharded one this rank's part."""
        self._reshard()
        return {name: t for copy in self.copies.values() for name, t in copy.by_name(self._model).items()}

    def fingerprint(self) -> str:
        """The squared norm of all copies over all ranks: it tells apart what different runs began with."""
        copies = {key: list(copy.by_name(self._model).values()) for key, copy in self.copies.items()}
        return float(self._ranks.sum({key: squared_norm(found).cpu() for key, found in copies.items()})).hex()


# What a safetensors file calls the dtypes of weights that can be guarded.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class _StartFile:
    """The weights that a run began with, in a file of its output folder; of sharded ones each rank writes its own."""

    def __init__(self, start: _Weights) -> None:
        self._start, self._fingerprint = start, start.fingerprint()
        self.name = "drift_guard_start.safetensors"
        if start.sharded:
            self.name = f"drift_guard_start-{dist.get_rank():05}-of-{dist.get_world_size():05}.safetensors"

    def recorded(self, folder: str) -> dict[str, str]:
        """What a checkpoint tells of it."""
        return {"start_folder": folder, "start_fingerprint": self._fingerprint}

    def write(self, folder: str, here: bool) -> None:
        """`here`: this process writes whole weights."""
        if here or self._start.sharded:
            write_tensors(Path(folder, self.name), self._start.tensors(), {"fingerprint": self._fingerprint})

    def read(self, recorded: Mapping[str, str], folder: str) -> str | None:
        """Puts into `start` what the file holds, on all ranks or on none.

        Args:
            recorded: `recorded()` of the run that is resumed.
            folder: the output folder now, where the file is looked for as well.

        Returns:
            The folder where it was found; None where a rank has none that fits.
        """
        copies = self._start.tensors()
        fingerprint, where = recorded["start_fingerprint"], [recorded["start_folder"], folder]
        found = next((f for f in where if self._fits(Path(f, self.name), fingerprint, copies)), None)
        if not distributed.everywhere(found is not None) or found is None:
            return None
        with safe_open(Path(found, self.name), "pt") as file:
            for name, copy in copies.items():
                copy.copy_(file.get_tensor(name))
        self._fingerprint = fingerprint
        return found

    @staticmethod
    def _fits(path: Path, fingerprint: str, copies: Mapping[str, torch.Tensor]) -> bool:
        try:
            with safe_open(path, "pt") as file:
                told = (file.metadata() or {}).get("fingerprint")
                names = file.keys()  # a file is no mapping
                parts = {name: file.get_slice(name) for name in names}
                found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except (OSError, SafetensorError):
            return False
        return told == fingerprint and found == {name: (tuple(t.shape), _DTYPES[t.dtype]) for name, t in copies.items()}


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


class DriftGuard(Guard, ExportableState):
    """Stops a run before its weights have gone too far from those that it began with, before it was ever resumed.

    Keeps two copies of the trainable weights. A check reads the distance, which waits for the device.

    With the first checkpoint it writes the weights that the run began with into `output_dir`, once:
    `drift_guard_start.safetensors`, as large as the trainable weights; where they are sharded, a file per rank, its part.
    A resumed run reads them there. Without that file, in another dtype, or on another number of ranks where weights are
    sharded, it warns, and the drift is that from the weights of the checkpoint. It writes no other start then, and its
    checkpoints still tell of the first one: once the file is back, a later run finds it.

    Args:
        max_drift: bound on the 2-norm of (now - start) over all trainable weights, > 0; None: none.
        max_layer_drift: the same for each layer of the model's largest stack and each weight outside of it; None: none. Not
            for sharded models.
        every: check after every so many-th step.

    Raises:
        ValueError: no bound, or one that is not positive; `max_layer_drift` on a sharded model.
        OSError: the file cannot be written.
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
        self._file: _StartFile | None = None
        self._to_write = False
        self._recorded: dict[str, str] = {}

    def state(self) -> dict[str, Any]:
        """For transformers: what a checkpoint keeps of it. The weights themselves are beside, in `output_dir`."""
        options = {"max_drift": self.max_drift, "max_layer_drift": self.max_layer_drift, "every": self.every}
        return {"args": options, "attributes": dict(self._recorded)}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, model=model)
        self._start = _Weights(model)
        if self.max_layer_drift is not None and self._start.sharded:
            raise ValueError("DriftGuard: max_layer_drift needs whole weights, and this model is sharded; use max_drift")
        self._file, self._to_write = _StartFile(self._start), True
        folder = os.path.abspath(args.output_dir)
        kept = self._kept(state, folder)
        found = self._file.read(kept, folder) if kept else None
        if kept and found is None:  # a later run may find the file: it is left alone, and checkpoints go on to tell of it
            self._recorded, self._to_write = kept, False
        else:
            self._recorded, self._to_write = self._file.recorded(folder), found != folder
        if state.global_step and found is None:
            why, remedy = "the checkpoint that is resumed was saved without a DriftGuard", ""
            if kept:
                why = f"{self._file.name} of the run that is resumed is not in {folder}, or does not fit its weights"
                remedy = ". Put the file there and resume again to have the bounds hold from its start"
            warnings.warn(
                f"DriftGuard: {why}, so that the drift is measured from the weights of step {state.global_step}, not from "
                f"those that the run began with{remedy}",
                stacklevel=2,
            )
        if state.stateful_callbacks is not None:  # transformers has no place for it on going on without one
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def _kept(self, state: Any, folder: str) -> dict[str, str]:
        """What the checkpoint that is resumed tells of the run's start; empty where it tells nothing."""
        kept = (state.stateful_callbacks or {}).get(type(self).__name__) or {} if state.global_step else {}
        kept = kept[-1] if isinstance(kept, list) else kept  # of several guards, which began together, the newest
        told = kept.get("attributes", {})
        if "start_fingerprint" not in told:
            return {}
        return {"start_folder": str(told.get("start_folder", folder)), "start_fingerprint": str(told["start_fingerprint"])}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._file is not None and self._to_write and not args.save_only_model:  # such a run is not resumed
            self._file.write(args.output_dir, here=args.should_save)
            self._to_write = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control)
        self._start = self._file = None

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
