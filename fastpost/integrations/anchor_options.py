"""Options of the anchor as trainers take them; part of `PostTrainingOptions`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fastpost.errors import unknown
from fastpost.ops.linear_distillation import DIVERGENCES

ANCHORS = ("reference", "ema", "lora_off", "context")
TEACHERS = ("ema", "reference", "lora_off", "live")
NUMBERS = ("anchor_kl", "anchor_ce", "anchor_ema_decay")
SFT_WEIGHTINGS = ("none", "dft", "asft")


def option(default: Any, text: str) -> Any:
    """A field with its line of help."""
    return field(default=default, metadata={"help": text})


def take_text_for_numbers(options: Any, *names: str) -> None:
    """Options that came as texts become numbers: YAML takes 1e-5 for a text. Raises ValueError where one is none."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, str):
            try:
                setattr(options, name, float(value))
            except ValueError:
                raise ValueError(f"{name} must be a number, not {value!r}") from None


@dataclass(kw_only=True, repr=False)
class AnchorOptions:
    """What a fine-tuned model is held to, and how its tokens are weighed.

    Attributes:
        anchor_kl: weight of the divergence from the reference, >= 0; None is 0.1, under sft_weighting="dft" 0, under
            anchor="context" 1.
        anchor_ce: weight of the cross-entropy beside it, >= 0; None is 1, under anchor="context" 0.
        anchor: the "reference" is the model as the first run with an anchor begins (or the trainer's `anchor_model`), a
            second copy of what is trained; "ema", an average of the weights; "lora_off", the model with its PEFT adapters
            switched off; "context", a teacher that reads a context in front of the same tokens (self-distillation where the
            texts are given, after 2601.19897; examples have `context_input_ids`, see `fastpost.anchor.InContext`).
        anchor_teacher: whose weights the teacher of anchor="context" has: "ema" (the paper's), "reference", "lora_off", or
            "live", the model as it is; None is "ema".
        anchor_divergence: "forward_kl" (reference to model), "reverse_kl", "symmetric_kl", "js" or "total_variation".
        anchor_ema_decay: of the average, in [0, 1); None is 0.999, under anchor="context" 0.99.
        anchor_fused_linear: never build the logits; None: where the head is a plain matrix, and R3F does not need logits.
        sft_weighting: "none"; "dft", each token's cross-entropy times its probability (2508.05629); "asft", that with an
            anchor (2509.23753).

    Raises:
        ValueError: an option that does not exist or is out of range; options that contradict each other.
    """

    anchor_kl: float | None = option(None, "Weight of the anchor's divergence, >= 0 (0.1; for dft 0; for context 1).")
    anchor_ce: float | None = option(None, "Weight of the cross-entropy beside the anchor, >= 0 (1; for context 0).")
    anchor: str = option("reference", "What the model is held to: reference (its start), ema, lora_off or context.")
    anchor_teacher: str | None = option(None, f"Weights of the teacher that reads a context: {', '.join(TEACHERS)} (ema).")
    anchor_divergence: str = option("forward_kl", f"The anchor's divergence: {', '.join(DIVERGENCES)}.")
    anchor_ema_decay: float | None = option(None, "Decay of anchor=ema's average, in [0, 1) (0.999; for context 0.99).")
    anchor_fused_linear: bool | None = option(None, "The anchor without ever building logits; by default where it can be.")
    sft_weighting: str = option("none", "Weights of the tokens' cross-entropy: none, dft or asft (dft with an anchor).")

    def __post_init__(self) -> None:
        take_text_for_numbers(self, *NUMBERS)
        self.check_anchor()
        further = getattr(super(), "__post_init__", None)  # of the arguments that these are mixed into
        if further is not None:
            further()

    def check_anchor(self) -> None:
        """Raises ValueError for an option that does not exist or is out of range, or for a contradiction."""
        for name, valid in (("anchor", ANCHORS), ("anchor_divergence", DIVERGENCES), ("sft_weighting", SFT_WEIGHTINGS)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        for name in ("anchor_kl", "anchor_ce"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, not {value}")
        if self.anchor_teacher is not None:
            if self.anchor_teacher not in TEACHERS:
                raise unknown("anchor_teacher", self.anchor_teacher, TEACHERS)
            if self.anchor != "context":
                raise ValueError(f"anchor_teacher is of anchor='context', not of {self.anchor!r}; leave it out")
        if self.anchor_ema_decay is not None:
            if not 0 <= self.anchor_ema_decay < 1:
                raise ValueError(f"anchor_ema_decay must lie in [0, 1), not {self.anchor_ema_decay}")
            if self.held_to != "ema":
                of = self.anchor if self.anchor_teacher is None else self.anchor_teacher
                raise ValueError(f"anchor_ema_decay is of anchor='ema', not of {of!r}; leave it out")
        if self.sft_weighting == "asft" and self.anchor_kl == 0:
            raise ValueError("sft_weighting='asft' is dft with an anchor, and anchor_kl is 0; say 'dft', or give a weight")
        for name, plain in (("anchor", "reference"), ("anchor_divergence", "forward_kl")):
            if self.anchor_kl is None and self.anchor_weight == 0 and getattr(self, name) != plain:
                raise ValueError(f"{name}={getattr(self, name)!r} has no weight; give anchor_kl, or leave it out")

        if self.ce_weight == 0 and self.sft_weighting != "none":
            raise ValueError(
                f"sft_weighting={self.sft_weighting!r} weighs the tokens of the cross-entropy, of which anchor_ce leaves "
                "nothing; give anchor_ce (under anchor='context' it is 0), or leave sft_weighting out"
            )
        if self.ce_weight == 0 and self.anchor_weight == 0:
            raise ValueError("anchor_ce=0 and anchor_kl=0 leave no loss; give one of the two a weight")

    @property
    def anchor_weight(self) -> float:
        """`anchor_kl`, or what it is where it was not given."""
        if self.anchor_kl is not None:
            return self.anchor_kl
        if self.anchor == "context":
            return 1.0
        return 0.0 if self.sft_weighting == "dft" else 0.1

    @property
    def ema_decay(self) -> float:
        """`anchor_ema_decay`, or what it is where it was not given."""
        if self.anchor_ema_decay is not None:
            return self.anchor_ema_decay
        return 0.99 if self.anchor == "context" else 0.999

    @property
    def ce_weight(self) -> float:
        """`anchor_ce`, or what it is where it was not given."""
        if self.anchor_ce is not None:
            return self.anchor_ce
        return 0.0 if self.anchor == "context" else 1.0

    @property
    def held_to(self) -> str:
        """Whose weights the reference has: `anchor`, of a teacher in a context `anchor_teacher` or what that is."""
        return (self.anchor_teacher or "ema") if self.anchor == "context" else self.anchor

    def anchor_options_given(self) -> list[str]:
        """Names of those of these options that are not at their defaults, in their order."""
        return [f.name for f in fields(AnchorOptions) if getattr(self, f.name) != f.default]
