"""R3F in transformers' Trainer: the loss of a training pass, normalised as the trainer normalises its own."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch

from fastpost.distributed import unwrap
from fastpost.integrations.mixin import PostTrainingMixin
from fastpost.r3f import R4F
from fastpost.r3f.conventions import has_router_loss, logits_of
from fastpost.r3f.head import linear_head
from fastpost.r3f.noise import find_embedding
from fastpost.r3f.passes import Step
from fastpost.r3f.relatives import FreeLB, HyPe, NEFTune, SymNoise
from fastpost.r3f.relatives.hype import find_layers
from fastpost.r3f.spectral import find_classifier
from fastpost.sam import TRAM, PassInfo

RANK = 1 << 32  # tokens of one step and one rank's data; noise depends on the token's number


class R3FTrainerMixin(PostTrainingMixin):
    """R3F for a Trainer or a subclass of it: `class MyTrainer(R3FTrainerMixin, Trainer)`.

    In training, `compute_loss` is `fastpost.R3F`'s: cross-entropy plus r3f_lambda times the symmetric KL between the clean
    and the noised pass. Both terms are divided by `num_items_in_batch` where the trainer counts it (and multiplied by the
    number of processes under `average_tokens_across_devices`, since gradients are averaged over them), else averaged over
    the micro-batch. `label_smoothing_factor` smooths the cross-entropy. Evaluation is the trainer's own plain loss.

    Noise belongs to the token of the optimizer step: the micro-batches of a window share one seed and count their tokens on,
    so a step does not depend on how it was cut. Ranks draw different noise; those of one tensor-parallel group, which have
    the same tokens, draw the same. With an integer `r3f_seed` it depends on the number of the step only.

    Over a trainer with a `compute_loss` of its own, the divergence is added to that loss, at the rows whose labels count; it
    has to return outputs with logits when asked to, for a batch with `labels`.

    `r3f_relative` puts another loss of `fastpost.r3f.relatives` in R3F's place; `r3f_spectral` normalises a classifier's
    head (R4F). Under TRAM the divergence is measured in SAM's first passes, averaged over processes, and is SAM's radius;
    with r3f_lambda = 0 it is no part of the loss.

    At logging steps it logs `r3f/symm_kl` and `r3f/task_loss`, averaged over the steps since the last time.

    Attributes:
        r3f: the R3F, or its relative; its attributes may be changed between steps (schedules).
        r4f: the R4F, or None.

    Raises:
        TypeError: a `compute_loss_func`, or a trainer of TRL other than SFT.
        ValueError: over a loss of the trainer's own, options that need R3F to make the clean pass; a model whose loss has a
            part for its router; sequence parallelism; context parallelism with noise that is scaled by length.
    """

    _method = "r3f"
    _fused_by_default = False
    _adds_to: type | None = None  # the class whose loss the divergence is added to
    _r3f_step: Step | None = None
    _r3f_fed = 0
    _r3f_counted: list[dict[str, Any]]
    _r3f_sums: torch.Tensor | None = None
    _r3f_logged_at = 0
    _normalised: tuple[Any, ...] = ()
    r3f: Any = None
    r4f: R4F | None = None

    def _use_options(self) -> None:
        super()._use_options()
        if "r3f" not in self._methods:
            return
        who, options = type(self).__name__, self.post_training
        owner = self._loss_owner()
        self._adds_to = None if owner in self._computes_plain_loss else owner
        if owner.__module__.split(".")[0] == "trl" and self._adds_to is not None:
            raise TypeError(
                f"{type(self).__name__}: {owner.__name__} has a loss that R3F does not know. For SFT use "
                "fastpost.integrations.trl.R3FSFTTrainer; a preference loss compares whole answers with a reference, "
                "and has no distribution over classes to take R3F's divergence of: use SAM there"
            )
        if self.compute_loss_func is not None:
            raise TypeError(
                f"{type(self).__name__}: compute_loss_func computes a loss of its own, which R3F would replace by "
                "cross-entropy plus its divergence; call fastpost.symmetric_kl inside it, or leave it out"
            )
        if "anchor" in self._methods:  # which makes the clean pass
            self._adds_to = next(c for c in type(self).__mro__ if vars(c).get("_method") == "anchor")
        parallel: Any = getattr(self.accelerator, "parallelism_config", None)
        if getattr(parallel, "sp_size", 1) > 1:
            raise ValueError(
                f"{who}: under sequence parallelism (sp_size={parallel.sp_size}) the Trainer weighs each rank's loss by its "
                "labels, and R3F's divergence would stand beside that; take context parallelism (cp_size)"
            )
        if self._adds_to is None and has_router_loss(self.model):
            raise ValueError(
                f"{type(self).__name__}: the model adds a loss of its router (output_router_logits=True) to its own, which "
                "R3F's cross-entropy would leave out; set model.config.output_router_logits=False"
            )
        if self.args.neftune_noise_alpha is not None:
            raise ValueError(
                f"{who}: neftune_noise_alpha={self.args.neftune_noise_alpha} adds noise to the embeddings of both passes "
                "that R3F compares; leave one of the two out (r3f_noise_scale='neftune' measures R3F's own noise as NEFTune "
                "does, r3f_relative='neftune' is NEFTune)"
            )
        smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
        fused = options.r3f_fused_linear
        if fused is None:
            fused = self._fused_by_default and self._builds_no_logits
        self.r3f = options.build_r3f(smoothing, fused)
        if getattr(parallel, "cp_size", 1) > 1 and (
            options.r3f_noise_scale == "neftune" or isinstance(self.r3f, NEFTune | SymNoise | FreeLB)
        ):
            raise ValueError(
                f"{who}: this noise is scaled by the length of a sequence, of which a rank has a part under context "
                f"parallelism (cp_size={parallel.cp_size}); take r3f_noise_scale='relative' or 'absolute', and another "
                "r3f_relative than NEFTune, SymNoise and FreeLB"
            )
        if self._adds_to is None:
            return
        if options.r3f_relative is not None:
            raise ValueError(
                f"{who}: r3f_relative={options.r3f_relative!r} is a loss of its own, and would replace that of "
                f"{self._adds_to.__name__}.compute_loss; R3F's divergence is added to it (leave r3f_relative out)"
            )
        if fused or options.r3f_dropout != "independent" or options.r3f_forward != "two_pass":
            raise ValueError(
                f"{who}: {self._adds_to.__name__}.compute_loss makes the clean pass itself, so R3F's "
                "own goes with r3f_fused_linear=False, r3f_dropout='independent' and r3f_forward='two_pass'"
            )

    @property
    def _builds_no_logits(self) -> bool:
        """Whether what the options ask for can do without logits."""
        options = self.post_training
        if "anchor" in self._methods:  # whose pass makes those that R3F compares
            return False
        if "sam" in self._methods and options.sam_perturb == "functional":  # a fused head is perturbed by none of its layers
            return False
        if options.r3f_relative is not None:
            return options.relative_fuses
        return not (options.r3f_lambda == 0 and isinstance(options.build_variant(), TRAM))

    def _prepare_model(self) -> None:
        super()._prepare_model()
        options = self.post_training
        asked = (options.r3f_spectral, options.r3f_spectral_mode) if "r3f" in self._methods else (None, "")
        stays = self.r4f is not None and asked == self._normalised and find_classifier(self.model) is self.r4f.head
        if self.r4f is not None and not stays:
            self.r4f.merge()
            self.r4f = None
        if asked[0] is not None and self.r4f is None:
            self.r4f = R4F(find_classifier(self.model), layers=asked[0], mode=asked[1])
            self._normalised = asked
        if "r3f" in self._methods and isinstance(self.r3f, HyPe):
            if self.args.gradient_checkpointing and self.r3f.dropout:
                raise ValueError(
                    f"{type(self).__name__}: r3f_relative={options.r3f_relative!r} noises layers, which "
                    "gradient_checkpointing runs a second time without the noise; leave one of the two out, or say "
                    "hype:dropout=false"
                )
            find_layers(unwrap(self.model), self.r3f.layers)
        if "r3f" in self._methods and options.r3f_embedding is not None:
            find_embedding(self.model, options.r3f_embedding)
        if "r3f" in self._methods and options.r3f_fused_linear:
            linear_head(unwrap(self.model))

    # -- a step, one micro-batch after another ------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, *extra_args: Any, **named: Any) -> Any:
        """One pass over one micro-batch, with the noise of its tokens."""
        if "r3f" not in self._methods:
            return super().training_step(model, inputs, *extra_args, **named)
        info = PassInfo(self._r3f_fed) if self._pass_info is None else self._pass_info
        self._r3f_begin(info)
        try:
            with self.r3f.window(step=self._r3f_step):
                return super().training_step(model, inputs, *extra_args, **named)
        finally:
            if not info.is_replay:
                self._r3f_fed = (info.index + 1) % self.current_gradient_accumulation_steps

    def _r3f_begin(self, info: PassInfo) -> None:
        if self._r3f_step is None or (info.index == 0 and not info.is_replay):
            # The ranks of a tensor-parallel group are neighbours and have the same tokens. Those of a context-parallel group
            # have other tokens of the same rows, with numbers of their own.
            first = self.args.process_index // self.get_tp_size() * RANK
            self._r3f_step = Step((first, first))
            self._r3f_counted = []
        step = self._r3f_step
        if info.index == 0:  # the seed is drawn anew: a second pass that draws the first one's dropout draws its seed too
            step.seeds = {}
            self.r3f.step = self.state.global_step
        if info.is_replay:
            step.counted = dict(self._r3f_counted[info.index])
        else:
            self._r3f_counted.append(dict(step.counted))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **extra_args: Any
    ) -> Any:
        """R3F's loss in training, the trainer's own in evaluation."""
        if "r3f" not in self._methods or not model.training:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **extra_args
            )
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        if self._adds_to is not None:
            return self._added(model, inputs, return_outputs, num_items_in_batch, items, **extra_args)
        factor = self._factor(items)
        own_backward = isinstance(self.r3f, FreeLB)
        if own_backward:
            self.r3f.backward = lambda loss: self._backward(loss * factor, summed=items is not None)
        # The trainer's autocast surrounds the model only; the fused head computes with its weight outside of that.
        autocast = self.accelerator.autocast() if getattr(self.r3f, "fused_linear", False) else contextlib.nullcontext()
        with autocast:
            out = self.r3f(model, num_items=items, **inputs)
        kl = self._divergence_beside(model, out.logits, inputs, items) if self._measures_only else out.symm_kl
        share = torch.stack((kl, out.task_loss)).double() * factor
        share = share if items is not None else share / self.current_gradient_accumulation_steps
        self._note(share)
        self._observe(share[0])
        # FreeLB has made its backward passes; what the trainer makes reaches no weight.
        loss = (out.loss.detach().requires_grad_() if own_backward else out.loss) * factor
        return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss

    def _added(
        self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any, items: Any, **extra_args: Any
    ) -> Any:
        """The trainer's own loss, plus r3f_lambda times the divergence at the rows whose labels count."""
        loss, outputs = super().compute_loss(
            model, copy.copy(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch, **extra_args
        )
        # Divided as the trainer divides its own: what is no sum over the whole window will be divided by its length.
        said = getattr(self, "loss_is_scaled_for_ga", None)  # older trainers of transformers 5 do not ask
        scaled = items is not None if said is None else said
        factor = self._factor(items if scaled else None)
        divergence = self._divergence_beside if self._measures_only else self.r3f.noised_divergence
        kl = divergence(model, logits_of(outputs), self._own_inputs(inputs), items if scaled else None) * factor
        steps = self.current_gradient_accumulation_steps
        if scaled and items is None:
            kl = kl / steps
        share = torch.stack((kl.detach(), loss.detach())).double()
        share = share if scaled else share / steps
        self._note(share)
        self._observe(share[0])
        if not self._measures_only:
            loss = loss + self.r3f.r3f_lambda * kl
        return (loss, outputs) if return_outputs else loss

    def _backward(self, loss: Any, summed: bool) -> None:
        """A backward pass as `training_step` makes it: what is no sum over the window is divided by its length."""
        self.accelerator.backward(loss if summed else loss / self.current_gradient_accumulation_steps)

    # -- TRAM -------------------------------------------------------------------------------------------------------------

    @property
    def _measures_only(self) -> bool:
        """Whether R3F's divergence is TRAM's radius and no part of the loss."""
        sam = getattr(self, "sam", None)
        return sam is not None and isinstance(sam.variant, TRAM) and self.r3f.r3f_lambda == 0

    @property
    def _in_ascent(self) -> bool:
        sam = getattr(self, "sam", None)
        return sam is not None and sam.ascends and not sam.is_perturbed

    @torch.no_grad()
    def _divergence_beside(self, model: Any, logits: torch.Tensor, inputs: Any, items: Any) -> torch.Tensor:
        """R3F's divergence from these logits; 0 outside of the ascent, where nobody asks for it."""
        if not self._in_ascent:
            return torch.zeros((), device=logits.device)
        found: torch.Tensor = self.r3f.noised_divergence(model, logits.detach(), dict(inputs), items)
        return found

    def _observe(self, share: torch.Tensor) -> None:
        """Tells TRAM of a micro-batch's share in the window's divergence, of all processes."""
        sam = getattr(self, "sam", None)
        if sam is None or not isinstance(sam.variant, TRAM) or not self._in_ascent:
            return
        if sam.sync_ascent is not False:
            share = self.accelerator.reduce(share, "mean")
        assert self._pass_info is not None
        assert self._pass_info.share is not None
        sam.variant.observe(share, self._pass_info.share)

    def _note(self, share: torch.Tensor) -> None:
        if self._pass_info is None or not self._pass_info.is_replay:
            self._r3f_sums = share if self._r3f_sums is None else self._r3f_sums + share

    # -- the trainer around it ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds R3F's lines to those of a logging step."""
        if "loss" in logs and "r3f" in self._methods and self._r3f_sums is not None:
            steps = max(1, self.state.global_step - self._r3f_logged_at)
            means = self.accelerator.gather(self._r3f_sums.unsqueeze(0)).mean(0) / steps
            self._r3f_sums, self._r3f_logged_at = None, self.state.global_step
            logs["r3f/symm_kl"], logs["r3f/task_loss"] = means.tolist()
        super().log(logs, *args, **kwargs)

    def _on_train_begin(self) -> None:
        self._r3f_step, self._r3f_sums = None, None
        self._r3f_logged_at = self.state.global_step
        super()._on_train_begin()

    def _on_step_begin(self) -> None:
        self._r3f_fed = 0
        super()._on_step_begin()
