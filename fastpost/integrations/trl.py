"""SAM, R3F and an anchor in TRL's trainers (TRL 1): supervised fine-tuning and DPO.

    from fastpost.integrations.trl import PostSFTConfig as SFTConfig, SAMSFTTrainer as SFTTrainer

Trainers that generate while they train (GRPO, RLOO, online DPO, ...) are refused at construction: a SAM step runs the same
micro-batch at w and at w + e, and theirs belong to the policy of one moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

try:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # made known lazily
except ImportError as error:
    raise ImportError(f"fastpost.integrations.trl needs TRL 1 ({error}): pip install 'fastpost[trl]'") from error

from transformers import Trainer

from fastpost.integrations.anchor_trainer import AnchorTrainerMixin
from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.r3f_trainer import R3FTrainerMixin
from fastpost.integrations.sam_trainer import SAMTrainerMixin

__all__ = [
    "AnchorSFTTrainer",
    "AnchorTrainerMixin",
    "PostDPOConfig",
    "PostSFTConfig",
    "PostSFTTrainer",
    "R3FSFTTrainer",
    "R3FTrainerMixin",
    "SAMDPOTrainer",
    "SAMSFTTrainer",
    "SAMTrainerMixin",
]


@dataclass(repr=False)
class PostSFTConfig(PostTrainingOptions, SFTConfig):
    """SFTConfig with the fields of `PostTrainingOptions`."""


@dataclass(repr=False)
class PostDPOConfig(PostTrainingOptions, DPOConfig):
    """DPOConfig with the fields of `PostTrainingOptions`."""


class SAMSFTTrainer(SAMTrainerMixin, SFTTrainer):
    """SFTTrainer with SAM; what it notes of entropy, accuracy and tokens is noted once per micro-batch."""


class SAMDPOTrainer(SAMTrainerMixin, DPOTrainer):
    """DPOTrainer with SAM. The reference does not move: it is another model, or this one without its adapters."""


class R3FSFTTrainer(R3FTrainerMixin, SFTTrainer):
    """SFTTrainer with R3F, which like SFT itself never builds the logits (`r3f_fused_linear=False` does).

    In training the loss is R3F's alone, so `entropy`, `mean_token_accuracy` and `num_tokens` are logged in evaluation only.

    Raises:
        ValueError: another loss than "nll", or the auxiliary loss of a mixture of experts, which R3F's would replace.
    """

    _fused_by_default = True
    _computes_plain_loss = (SFTTrainer, Trainer)

    def _use_options(self) -> None:
        super()._use_options()
        if "r3f" in self._methods:
            _check_plain_loss(self, "R3F")


class AnchorSFTTrainer(AnchorTrainerMixin, SFTTrainer):
    """SFTTrainer with an anchor or DFT's weights, which like SFT itself never builds the logits.

    In training the loss is the anchor's alone, so `entropy`, `mean_token_accuracy` and `num_tokens` are logged in evaluation
    only.

    Raises:
        ValueError: another loss than "nll", or the auxiliary loss of a mixture of experts, which the anchor's would replace.
    """

    _computes_plain_loss = (SFTTrainer, Trainer)

    def _use_options(self) -> None:
        super()._use_options()
        if "anchor" in self._methods:
            _check_plain_loss(self, "the anchor")


class PostSFTTrainer(SAMTrainerMixin, R3FSFTTrainer, AnchorSFTTrainer):
    """SFTTrainer that goes by `args.method`, as `fastpost.integrations.transformers.PostTrainer` does."""

    _goes_by_method = True


def _check_plain_loss(trainer: Any, method: str) -> None:
    loss_type = getattr(trainer.args, "loss_type", "nll")
    if loss_type == "nll" and not trainer.aux_loss_enabled:
        return
    extra = "an auxiliary loss of its experts" if trainer.aux_loss_enabled else f"loss_type={loss_type!r}"
    hint = "; sft_weighting='dft' is DFT there" if loss_type == "dft" and method != "R3F" else ""
    raise ValueError(
        f"{type(trainer).__name__}: {method}'s loss would replace {extra}; it goes with loss_type='nll' alone{hint}"
    )
