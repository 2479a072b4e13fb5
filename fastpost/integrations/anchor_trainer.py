"""An anchor in transformers' Trainer: the loss of a training pass, normalised as the trainer normalises its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastpost.anchor import (
    AdaptersOff,
    Anchor,
    ContextCollator,
    Frozen,
    InContext,
    Live,
    MovingAverage,
    Reference,
    without_context,
)
from fastpost.anchor.context import FIELDS
from fastpost.anchor.examples import check_examples, collate_without_context
from fastpost.distributed import unwrap
from fastpost.integrations.mixin import PostTrainingMixin
from fastpost.r3f.conventions import has_router_loss, named
from fastpost.r3f.head import linear_head

AVERAGE = "anchor_ema.safetensors"  # in each checkpoint


class AnchorTrainerMixin(PostTrainingMixin):
    """An anchor, or DFT's weights, for a Trainer or a subclass of it: `class MyTrainer(AnchorTrainerMixin, Trainer)`.

    In training, `compute_loss` is `fastpost.anchor.Anchor`'s: cross-entropy plus anchor_kl times the divergence from the
    reference, at the rows whose labels count. Both are divided by `num_items_in_batch` where the trainer counts it (and
    multiplied by the number of processes under `average_tokens_across_devices`), else averaged over the micro-batch.
    Evaluation is the trainer's own plain loss.

    The start that anchor="reference" holds to, and that an average begins from, is the model that the trainer is given, also
    where a run is resumed: give it the same start again. Weights that are frozen then (LoRA's base) are not copied. An
    average takes a step after each of the optimizer's and is saved in checkpoints; a resumed run goes on bit for bit.

    Under anchor="context" training examples have `context_input_ids` (tokens in front of `input_ids`), or the teacher's
    whole row, `teacher_input_ids` with `teacher_labels`, of any length; a `ContextCollator` is put around the trainer's
    collator.

    At logging steps it logs `anchor/kl`, the divergence before its weight, and `anchor/task_loss`, averaged over the steps
    since the last time.

    Args:
        anchor_model: the reference of anchor="reference", in place of a copy of the start.

    Attributes:
        anchor: the Anchor of this run; its attributes may be changed between steps (schedules). None without the method.

    Raises:
        TypeError: a loss of the trainer's own, or a `compute_loss_func`; R3F's mixin behind this one.
        ValueError: a loss of a router, DeepSpeed, FSDP1; under FSDP an average or a copy of the start.
    """

    _method = "anchor"
    _signature_columns: Any  # of the Trainer
    data_collator: Any
    anchor: Anchor | None = None
    _anchor_reference: Reference | None = None
    _anchor_taken: tuple[Any, tuple[str, str] | None] = (None, None)  # the model that it was taken of, and its kind
    _anchor_sums: torch.Tensor | None = None
    _anchor_logged_at = 0

    def __init__(self, *args: Any, anchor_model: nn.Module | None = None, **kwargs: Any) -> None:
        self._anchor_given = anchor_model
        super().__init__(*args, **kwargs)

    def _use_options(self) -> None:
        super()._use_options()
        name = type(self).__name__
        if "anchor" in self._methods:
            self._check_anchor(name)
        elif self._anchor_given is not None:
            raise ValueError(f"{name}: anchor_model is for an anchor, which method={self.post_training.method!r} is not")

    def _prepare_model(self) -> None:
        super()._prepare_model()
        self.anchor = None
        if "anchor" in self._methods:
            if self.post_training.anchor_fused_linear:
                with named("Anchor"):
                    linear_head(unwrap(self.model))
            self._renew_reference(self.model)
            self._build_anchor()

    def _check_anchor(self, name: str) -> None:
        options = self.post_training
        if self._anchor_given is not None and options.held_to != "reference":
            raise ValueError(f"{name}: anchor_model is the reference of anchor='reference', not of {options.held_to!r}")
        trained = {id(p) for p in self.model.parameters() if p.requires_grad} if self.model is not None else set()
        if self._anchor_given is not None and any(id(p) in trained for p in self._anchor_given.parameters()):
            raise ValueError(
                f"{name}: anchor_model shares weights with the model that is trained; give a copy, or leave it out"
            )
        owner = self._loss_owner()
        if owner not in self._computes_plain_loss:
            raise TypeError(
                f"{name}: {owner.__name__} has a loss of its own, which the anchor's cross-entropy would replace; call "
                "fastpost.anchor.Anchor or fastpost.linear_distillation_loss inside it"
            )
        if self.compute_loss_func is not None:
            raise TypeError(
                f"{name}: compute_loss_func computes a loss of its own, which the anchor's would replace; call "
                "fastpost.linear_distillation_loss inside it, or leave it out"
            )
        if has_router_loss(self.model):
            raise ValueError(
                f"{name}: the model adds a loss of its router (output_router_logits=True) to its own, which the anchor's "
                "cross-entropy would leave out; set model.config.output_router_logits=False"
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                f"{name}: DeepSpeed's engine partitions weights, of which the anchor can take neither a copy nor the head; "
                "shard with FSDP2 (fsdp=..., version 2) instead"
            )
        if self.is_fsdp_enabled:
            self._check_fsdp(name)
        order = [method for c in type(self).__mro__ if (method := vars(c).get("_method")) in ("r3f", "anchor")]
        if "r3f" in self._methods and order[0] == "anchor":
            raise TypeError(
                f"{name}: put R3FTrainerMixin before AnchorTrainerMixin, since R3F adds its divergence to the anchor's loss"
            )
        if self._functional and options.anchor_fused_linear:
            raise ValueError(
                f"{name}: sam_perturb='functional' perturbs in the layers' outputs, and a fused head has none; leave "
                "anchor_fused_linear out, or take sam_perturb='stored'"
            )
        if self._functional and options.held_to == "lora_off":
            raise ValueError(
                f"{name}: sam_perturb='functional' perturbs in layers that anchor='lora_off' runs as well; take "
                "sam_perturb='stored', or anchor='reference'"
            )
        if "sam" in self._methods and options.held_to == "live":
            raise ValueError(
                f"{name}: between SAM's passes the model is w + e, and anchor_teacher='live' would teach from there; take "
                "'ema', 'reference' or 'lora_off'"
            )
        if options.ce_weight == 0 and self.label_smoother is not None:
            raise ValueError(
                f"{name}: label_smoothing_factor={self.args.label_smoothing_factor} smooths the cross-entropy, which "
                "anchor_ce=0 (the default of anchor='context') leaves out; leave one of the two out"
            )
        packs = [word for word in ("packing", "padding_free") if getattr(self.args, word, False)]
        if packs and self._takes_contexts:
            raise ValueError(
                f"{name}: {packs[0]} puts several examples into a row, and a context stands in front of one; leave it off, "
                "or take another anchor"
            )
        if "r3f" in self._methods and options.anchor_fused_linear:
            raise ValueError(f"{name}: R3F compares the logits of the anchor's pass; leave anchor_fused_linear out, or R3F")

    @property
    def _functional(self) -> bool:
        return "sam" in self._methods and self.post_training.sam_perturb == "functional"

    def _check_fsdp(self, name: str) -> None:
        options = self.post_training
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if getattr(plugin, "fsdp_version", 2) == 1:
            raise ValueError(f"{name}: FSDP1 keeps weights in flat buffers of its own; use FSDP2 (version 2)")
        if options.anchor_weight and options.held_to == "ema":
            raise ValueError(
                f"{name}: anchor='ema' averages whole weights, and under FSDP no rank has them; use 'lora_off', or "
                "'reference' with anchor_model="
            )
        if options.anchor_weight and options.held_to == "reference" and self._anchor_given is None:
            raise ValueError(
                f"{name}: under FSDP the start is not whole on every rank, to be copied; pass the reference as "
                "anchor_model=, or use 'lora_off'"
            )

    def _take_reference(self, model: nn.Module) -> Reference | None:
        options = self.post_training
        if not options.anchor_weight:
            return None
        made = self._weights_to_hold_to(model, options.held_to)
        return InContext(made) if options.anchor == "context" else made

    def _weights_to_hold_to(self, model: nn.Module, kind: str) -> Reference:
        if kind == "live":
            return Live()
        if kind == "lora_off":
            AdaptersOff.check(unwrap(model))
            return AdaptersOff()
        if kind == "ema":
            return MovingAverage(model, self.post_training.ema_decay)
        return Frozen.copy_of(model) if self._anchor_given is None else Frozen(self._anchor_given)

    @property
    def _average(self) -> MovingAverage | None:
        """The average of the weights, where the run has one."""
        held = self._anchor_reference
        held = held.weights if isinstance(held, InContext) else held
        return held if isinstance(held, MovingAverage) else None

    def _renew_reference(self, model: nn.Module) -> None:
        """Takes the reference where there is none yet of this model and kind."""
        options = self.post_training
        kind = (options.anchor, options.held_to) if options.anchor_weight else None
        wanted = (model, kind)
        if self._anchor_taken[0] is not model or self._anchor_taken[1] != wanted[1]:
            self._anchor_reference, self._anchor_taken = self._take_reference(model), wanted

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; a new model is a new start, before a checkpoint is loaded into it."""
        model = super().call_model_init(*args, **kwargs)
        if "anchor" in self._methods:
            self._renew_reference(model)
        return model

    def _build_anchor(self) -> None:
        options = self.post_training
        fused = False if "r3f" in self._methods or self._functional else options.anchor_fused_linear
        self.anchor = Anchor(
            self._anchor_reference,
            options.anchor_weight,
            divergence=options.anchor_divergence,
            weighting="none" if options.sft_weighting == "none" else "dft",
            ce_weight=options.ce_weight,
            label_smoothing=0.0 if self.label_smoother is None else self.args.label_smoothing_factor,
            fused_linear=fused,
        )
        if self._average is not None:
            self._average.decay = options.ema_decay

    # -- batches ------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """As the trainer's own; under anchor="context" with the contexts of the examples."""
        if not self._takes_contexts:
            return super().get_train_dataloader()
        model = self.model if self._anchor_given is None else self._anchor_given
        collator = ContextCollator(self.data_collator, model=model)
        with self._collating(collator, *FIELDS):
            columns = self._signature_columns if self.args.remove_unused_columns else None
            check_examples(self.train_dataset, collator, columns)
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; under anchor="context" of examples without their contexts."""
        with self._collating_without_context():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As `get_eval_dataloader`."""
        with self._collating_without_context():
            return super().get_test_dataloader(*args, **kwargs)

    def _collating_without_context(self) -> contextlib.AbstractContextManager[None]:
        if not self._takes_contexts:
            return contextlib.nullcontext()
        return self._collating(functools.partial(collate_without_context, self.data_collator))

    @contextlib.contextmanager
    def _collating(self, collator: Any, *further: str) -> Iterator[None]:
        """While open, dataloaders get another collator, and keep further columns: only some batches have contexts."""
        self._set_signature_columns_if_needed()
        before = self._signature_columns, self.data_collator
        self._signature_columns, self.data_collator = [*before[0], *further], collator
        try:
            yield
        finally:
            self._signature_columns, self.data_collator = before

    @property
    def _takes_contexts(self) -> bool:
        options = self.post_training
        return "anchor" in self._methods and options.anchor == "context" and options.anchor_weight > 0

    def _own_inputs(self, inputs: Any) -> dict[str, Any]:
        found = super()._own_inputs(inputs)
        return without_context(found) if self._takes_contexts else found

    # -- a step -------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **extra_args: Any
    ) -> Any:
        """The anchor's loss in training, the trainer's own in evaluation."""
        if "anchor" not in self._methods or not model.training:
            own = self._own_inputs(inputs) if self._takes_contexts else inputs
            return super().compute_loss(
                model, own, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **extra_args
            )
        assert self.anchor is not None
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        factor = self._factor(items)
        # The trainer's autocast surrounds the model only; the reference is to see the same one.
        with self.accelerator.autocast():
            out = self.anchor(model, num_items=items, **inputs)
        share = torch.stack((out.divergence, out.task_loss)).double() * factor
        if self._pass_info is None or not self._pass_info.is_replay:
            share = share if items is not None else share / self.current_gradient_accumulation_steps
            self._anchor_sums = share if self._anchor_sums is None else self._anchor_sums + share
        loss = out.loss * factor
        return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss

    # -- the trainer around it ----------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            state = {name: t.contiguous() for name, t in self._average.state_dict().items()}
            save_file(state, str(Path(output_dir) / AVERAGE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._average is None:
            return
        path = Path(checkpoint) / AVERAGE
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} holds no average of the weights ({AVERAGE}): it was saved without one (anchor='ema'); resume "
                "it as it was made, or train from its weights anew"
            )
        self._average.load_state_dict(load_file(str(path)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the anchor's lines to those of a logging step."""
        if "loss" in logs and self._anchor_sums is not None:
            steps = max(1, self.state.global_step - self._anchor_logged_at)
            means = self.accelerator.gather(self._anchor_sums.unsqueeze(0)).mean(0) / steps
            self._anchor_sums, self._anchor_logged_at = None, self.state.global_step
            logs["anchor/kl"], logs["anchor/task_loss"] = means.tolist()
        super().log(logs, *args, **kwargs)

    def _on_train_begin(self) -> None:
        self._anchor_sums, self._anchor_logged_at = None, self.state.global_step
        super()._on_train_begin()

    def _on_step_end(self) -> None:
        if self._anchor_reference is not None:
            self._anchor_reference.update(self.model)
        super()._on_step_end()
