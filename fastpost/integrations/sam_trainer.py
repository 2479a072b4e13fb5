"""SAM in transformers' Trainer: both passes over the accumulation window, and an optimizer that stays the trainer's."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpost.distributed import is_a, unwrap
from fastpost.integrations import COMPUTE_DTYPES, cuts_sequences, shares_each_batch
from fastpost.integrations.masters import Masters, check_weights
from fastpost.integrations.mixin import PostTrainingMixin, accelerated_sync, innermost
from fastpost.integrations.stand_ins import refuse_early
from fastpost.ranks import NormGroup
from fastpost.sam import ExternalSAM, FunctionalSAM, PassInfo, PerturbationReport, SAMWindow
from fastpost.sam.options import RADIUS_KEYS, fill_groups

STEPS_IN_BACKWARD = ("lomo", "adalomo")


@dataclass
class _Radius:
    """What the options have given to an optimizer's groups: the values, and which keys of each group they are."""

    optimizer: torch.optim.Optimizer
    values: dict[str, Any]
    given: list[set[str]]


class _FunctionalPath:
    """Functional-SAM at the head of a trainer's model."""

    def __init__(self, sam: ExternalSAM, model: Any) -> None:
        self._sam = sam
        self._at_head = FunctionalSAM(sam)
        self._handle = self._at_head.watch(output_head(model))

    @contextlib.contextmanager
    def refuse_unseen(self) -> Iterator[None]:
        """Around a pass at w: raises RuntimeError where its loss has gone past the head."""
        before = self._at_head.waiting
        yield
        if self._sam.ascends and self._at_head.waiting == before:
            raise RuntimeError(
                "SAM: sam_functional_path acts on the logits that the model's head puts out, and this loss takes the head's "
                "weight itself (a fused head: Liger, TRL, R3F's or the anchor's); switch that off, or leave it out"
            )

    def end(self) -> None:
        self._handle.remove()


def output_head(model: Any) -> nn.Module:
    """The layer that makes the logits.

    Raises:
        ValueError: the model names none.
    """
    head = getattr(unwrap(model), "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"sam_functional_path needs the layer that makes the logits, and {type(unwrap(model)).__name__} names none in "
            "get_output_embeddings(); leave it out, or say fastpost.sam.FunctionalSAM(opt).watch(head) in a loop of your own"
        )
    return head


class TrainerWindow(SAMWindow):
    """A window whose passes decide about gradient synchronisation themselves, and say which pass they are."""

    def __init__(self, trainer: Any, optimizer: ExternalSAM) -> None:
        options = trainer.post_training
        super().__init__(
            optimizer,
            trainer._plain_step,
            per_micro_batch=options.sam_per_micro_batch,
            no_sync=contextlib.nullcontext,  # said per pass, below
        )
        self.sync_each = shares_each_batch(trainer.accelerator)
        self.trainer = trainer
        self.model: Any = None
        self.extra_args: tuple[Any, ...] = ()  # arguments of training_step after the inputs, the same for the whole window
        self.named: dict[str, Any] = {}

    def run_pass(self, micro_batch: Any, info: PassInfo) -> Any:
        """As SAMWindow's, in the trainer's own way; `trainer._pass_info` says which pass it is."""
        trainer = self.trainer
        path = trainer._functional_path
        if cuts_sequences(trainer.accelerator):
            micro_batch = _copied(micro_batch)
        trainer._pass_info = info
        try:
            with (
                accelerated_sync(self.model, trainer.accelerator, info.sync),
                unlogged(trainer) if info.is_replay else contextlib.nullcontext(),
                contextlib.nullcontext() if path is None or info.is_replay else path.refuse_unseen(),
            ):
                return self.forward_backward(micro_batch)
        finally:
            trainer._pass_info = None


class SAMTrainerMixin(PostTrainingMixin):
    """SAM for a Trainer or a subclass of it: `class MyTrainer(SAMTrainerMixin, Trainer)`.

    A step is SAM's over the whole accumulation window, as in `fastpost.SAMWindow`: the ascent takes the window's first
    ceil(sam_ascent_fraction * n) micro-batches, which are kept and run again at w + e; then w is back, the gradients are
    those of the second pass, and the trainer goes on as always: it clips them, logs their norm, unscales and steps. The
    optimizer is the trainer's own (`optim=`, `optimizers=`, `optimizer_cls_and_kwargs=`), and so are schedules and
    checkpoints; its parameter groups hold `rho`, `adaptive` and `eta`, which a callback may change.

    The logged training loss is the one at w for micro-batches of the ascent (with the default fraction, all), else at w + e.
    At logging steps it logs `sam/seen_over_intended`, `sam/seen_cosine` and `sam/seen_gain`, pooled over the steps since the
    last time (see `PerturbationReport`), and `sam/skipped_steps`, so far. Nothing waits for the device at other steps,
    except where the optimizer cannot learn on the device that a step is skipped (`ExternalSAM`).

    Where a gradient is not finite no step is made: the GradScaler skips it, or without one the optimizer finds no gradients.
    Micro-batches that an iterable data set leaves over at its end, and on which the Trainer makes no step, are dropped.

    Attributes:
        sam: the ExternalSAM of this run; None before its first step.

    Raises:
        ValueError: DeepSpeed, FSDP1, or an optimizer that steps inside backward.
    """

    _method = "sam"
    sam: ExternalSAM | None = None
    _window: TrainerWindow | None = None
    _given_up = False
    _radius: _Radius | None = None
    _masters: Masters | None = None
    _functional_path: _FunctionalPath | None = None
    _sam_sums: Any = None
    _sam_elements: int | torch.Tensor = 0
    _concerned = False

    def _use_options(self) -> None:
        super()._use_options()
        who, options = type(self).__name__, self.post_training
        held = None if self._masters is None else self._masters.optimizer
        wanted = "sam" in self._methods and options.sam_masters
        if not wanted and self.optimizer is not None and held is innermost(self.optimizer):
            raise ValueError(
                f"{who}: the optimizer holds masters by now, and sam_masters is off; set trainer.optimizer to None, so that "
                "the trainer makes another, or leave sam_masters and the method as they were"
            )
        if "sam" not in self._methods:
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                f"{who}: DeepSpeed's engine partitions gradients and steps inside backward(), where SAM can "
                "neither perturb nor restore; shard with FSDP2 (fsdp=..., version 2) instead"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 2) == 1:
            raise ValueError(
                f"{who}: FSDP1 keeps weights in flat buffers of its own, which SAM cannot perturb; use "
                "FSDP2 (fsdp_config={'version': 2})"
            )
        if self.is_fsdp_enabled and options.sam_perturb == "functional":
            raise ValueError(
                f"{who}: sam_perturb='functional' needs whole weights, which FSDP shards; take sam_perturb='stored'"
            )
        if options.sam_masters and (self.is_fsdp_enabled or self.accelerator.scaler is not None):
            other = "FSDP shards weights" if self.is_fsdp_enabled else "fp16=True scales the loss"
            raise ValueError(
                f"{who}: {other}, which sam_masters does not serve; load the model in float32, which then holds its own "
                "masters, and let bf16=True compute with casts"
            )
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if optim in STEPS_IN_BACKWARD or "layerwise" in optim:
            raise ValueError(f"{who}: optim={optim!r} steps inside backward, and leaves SAM no second pass")

    def _prepare_model(self) -> None:
        """Builds a SAM beside the one of the run, which refuses what that would refuse at its first step."""
        super()._prepare_model()
        if "sam" not in self._methods:
            return
        if self.post_training.sam_functional_path:
            output_head(self.model)
        if self.post_training.sam_masters:
            check_weights(self.model)
            self.post_training.scope(self.model)
            return
        if self.optimizer is None:
            params = [p for p in self.model.parameters() if p.requires_grad]
        else:
            params = [p for group in innermost(self.optimizer).param_groups for p in group["params"]]
        if params:
            refuse_early(self._sam_keywords(), params, moves=self.args.device.type != "cpu")  # FSDP moves weights later
        if self.post_training.sam_perturb == "functional":
            self._refuse_fused_head()

    def _refuse_fused_head(self) -> None:
        """Raises ValueError where the loss takes the head's weight past its layer, where the perturbation would come in."""
        by_r3f = "r3f" in self._methods
        if by_r3f:
            fused = bool(getattr(self.r3f, "fused_linear", False))
        else:
            fused = self.args.use_liger_kernel or any(c.__module__.partition(".")[0] == "trl" for c in type(self).__mro__)
        head = getattr(unwrap(self.model), "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        if not fused or weight is None or not weight.requires_grad:
            return
        name = next((name for name, p in self.model.named_parameters() if p is weight), "the head's weight")
        scope = self.post_training.scope(self.model)
        if scope is None or (callable(scope) and scope(name, weight)):
            how = "say r3f_fused_linear=False" if by_r3f else "take sam_perturb='stored'"
            raise ValueError(
                f"{type(self).__name__}: sam_perturb='functional' comes in through layers, and the loss multiplies hidden "
                f"states by {name} itself, outside of one (a fused head); {how}, or leave that weight out by sam_scope"
            )

    # -- a window, one training_step after another ------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, *extra_args: Any, **named: Any) -> Any:
        """One micro-batch; the window's last one leaves the gradients of SAM's second pass."""
        if "sam" not in self._methods:
            return super().training_step(model, inputs, *extra_args, **named)
        if self._given_up:
            raise RuntimeError(
                "SAM: the model was saved in the middle of an accumulation window, which gave the window up; stop training "
                "there, or save after a step"
            )
        window = self._window
        if window is None:
            window = self._window = TrainerWindow(self, self._sam_of_this_run())
        if not window.is_open:
            window.open(self.current_gradient_accumulation_steps)
        window.model, window.extra_args, window.named = model, extra_args, named
        items = extra_args[0] if extra_args else named.get("num_items_in_batch")
        loss = window.feed(inputs, share=self._share_in_window(inputs, items) if window.needs_shares else None)
        if not window.is_open:
            self._finish_step()
        return loss

    def _share_in_window(self, inputs: Any, items: Any) -> torch.Tensor | None:
        """Which part of the window's labels a micro-batch has, the mean of processes; None where the trainer divides losses
        by the number of micro-batches."""
        counts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if items is None or not counts or getattr(self, "loss_is_scaled_for_ga", None) is False:
            return None
        device = self.args.device
        own = self._get_num_items_in_batch([inputs], device)  # of all processes, where `items` is
        if own is None:
            return None
        # DataParallel has one number for each of its devices, all alike.
        own, items = (torch.as_tensor(number, dtype=torch.float64, device=device).flatten()[0] for number in (own, items))
        share: torch.Tensor = own / items.clamp(min=1)  # without any label all shares are 0
        return share if self.args.average_tokens_across_devices else self.accelerator.reduce(share, "mean")

    def _plain_step(self, inputs: Any) -> Any:
        assert self._window is not None
        return super().training_step(self._window.model, inputs, *self._window.extra_args, **self._window.named)

    def _finish_step(self) -> None:
        assert self.sam is not None
        step = self.sam.finish_step(scaled=self.accelerator.scaler is not None)
        if step.sums is not None:
            sums, self._sam_elements = step.sums
            sums = torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))
            self._sam_sums = sums if self._sam_sums is None else self._sam_sums + sums

    def sam_norm_group(self) -> NormGroup:
        """The ranks that hold other parameters of the model than this one, as `fastpost.SAM(norm_group=)`; None where no
        rank does. Override it where experts lie apart in plain tensors, which DDP has to ignore; a function of (name,
        parameter) gets the model's names. The trainer's clipping does not know these ranks: set max_grad_norm=0.
        """
        return None

    def _named_norm_group(self) -> NormGroup:
        given = self.sam_norm_group()
        if is_a("DeviceMesh", "torch.distributed.device_mesh", given) or not callable(given):
            return given
        group_of, names = given, {}

        def named(name: str | None, p: torch.Tensor) -> Any:
            if id(p) not in names:
                names.update({id(q): known for known, q in unwrap(self.model).named_parameters()})
            return group_of(names.get(id(p), name), p)

        return named

    def _sam_keywords(self) -> dict[str, Any]:
        accelerator = self.accelerator
        seen = COMPUTE_DTYPES.get(accelerator.mixed_precision)
        keywords = self.post_training.sam_keywords(
            self.model,
            compute_dtype=seen if not accelerator.is_fsdp2 else None,  # FSDP2 is asked for its own
            loss_scale=None if accelerator.scaler is None else accelerator.scaler.get_scale,
        )
        return {**keywords, "norm_group": self._named_norm_group()}

    def _sam_of_this_run(self) -> ExternalSAM:
        pairs: dict[str, Any] = {}
        if self.post_training.sam_masters:
            assert self._masters is not None
            pairs = {"params": self._masters.weights, "master_params": self._masters.masters}
        self.sam = ExternalSAM(innermost(self.optimizer), **pairs, **self._sam_keywords())
        if self.post_training.sam_functional_path:
            self._functional_path = _FunctionalPath(self.sam, self.model)
        return self.sam

    def _end_window(self) -> None:
        """Whatever happens, nobody sees w + e outside of a window."""
        if self._window is not None and self._window.is_open:
            self._window.abort()
            self._given_up = True

    # -- the trainer around it --------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; its groups get the keys that SAM's checkpoints have, before one is loaded into them."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if "sam" in self._methods:
            inner = innermost(self.optimizer)
            if self.post_training.sam_masters and (self._masters is None or self._masters.optimizer is not inner):
                self._masters = Masters(inner)
            self._fill_groups(inner)
        return optimizer

    def _fill_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives groups the radius of the options where they have none; one that the options gave follows them."""
        options, groups = self.post_training, optimizer.param_groups
        now = dict(zip(RADIUS_KEYS, (options.sam_rho, options.sam_adaptive, options.sam_eta), strict=True))
        if self._radius is None or self._radius.optimizer is not optimizer:
            self._radius = _Radius(optimizer, now, [set(now) - set(group) for group in groups])
        changed = {key for key, value in now.items() if value != self._radius.values[key]}
        for group, given in zip(groups, self._radius.given, strict=False):  # groups that came later have what they came with
            group.update({key: now[key] for key in changed & given})
        self._radius.values = now
        fill_groups(groups, options.sam_rho, options.sam_adaptive, options.sam_eta)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; however it ends the weights are w again, also where `train` begins it anew
        (`auto_find_batch_size`)."""
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            try:
                self._end_window()
            finally:
                self._given_up = False
                if self._functional_path is not None:
                    self._functional_path.end()
                    self._functional_path = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; never measures w + e.

        Raises:
            RuntimeError: in the middle of an accumulation window, while the weights are w + e.
        """
        if self.sam is not None and self.sam.is_perturbed:
            raise RuntimeError(
                "SAM: evaluating in the middle of an accumulation window would measure w + e; evaluate after a step, or "
                "leave sam_ascent_fraction at 1"
            )
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; never saves w + e."""
        self._end_window()
        return super().save_model(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds SAM's lines to those of a logging step."""
        if "loss" in logs and self._sam_sums is not None:
            logs.update(self._sam_logs())
        super().log(logs, *args, **kwargs)

    def _sam_logs(self) -> dict[str, float]:
        assert self.sam is not None
        report = PerturbationReport(self._sam_sums, self._sam_elements)
        self._sam_sums = None
        v = report.as_dict()
        if not self._concerned and (concern := report.concern()) is not None:
            self._concerned = True
            warnings.warn(concern, stacklevel=2)
        intended = v["intended_norm"]
        return {
            "sam/seen_over_intended": v["seen_norm"] / intended if intended else 0.0,
            "sam/seen_cosine": v["seen_cosine"],
            "sam/seen_gain": v["seen_gain"],
            "sam/skipped_steps": self.sam.skipped_steps,
        }

    def _on_train_begin(self) -> None:
        self._window = self.sam = self._sam_sums = None  # the optimizer, or its groups, may be others than in the last run
        if self._masters is not None:
            self._masters.follow()
        super()._on_train_begin()

    def _on_step_begin(self) -> None:
        if self._window is not None and self._window.is_open:
            self._window.abort()  # micro-batches on which the trainer made no step
        super()._on_step_begin()

    def _on_epoch_end(self) -> None:
        if self._window is not None and self._window.is_open:
            self._window.abort()
        super()._on_epoch_end()


def _copied(inputs: Any) -> Any:
    """A batch with tensors of its own."""
    copied = copy.copy(inputs)
    copied.update({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
    return copied


@contextlib.contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """Keeps what TRL's trainers note in `compute_loss` from being noted twice."""
    metrics, tokens = getattr(trainer, "_metrics", None), getattr(trainer, "_total_train_tokens", None)
    if not isinstance(metrics, dict):
        yield
        return
    before = {mode: {name: list(values) for name, values in named.items()} for mode, named in metrics.items()}
    try:
        yield
    finally:
        for mode, named in metrics.items():
            named.clear()
            named.update(before.get(mode, {}))
        if tokens is not None:
            trainer._total_train_tokens = tokens
