"""Options of the anchor as trainers take them; part of `PostTrainingOptions`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fastpost.errors import unknown
from fastpost.ops.linear_distillation import DIVERGENCES

ANCHORS = ("reference", "ema", "lora_off")
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
        anchor_kl: weight of the divergence from the reference, >= 0; None is 0.1, under sft_weighting="dft" 0.
        anchor: the "reference" is the model as the first run with an anchor begins (or the trainer's `anchor_model`), a
            second copy of what is trained; "ema", an average of the weights; "lora_off", the model with its PEFT adapters
            switched off.
        anchor_divergence: "forward_kl" (reference to model), "reverse_kl", "symmetric_kl", "js" or "total_variation".
        anchor_ema_decay: of the average, in [0, 1); None is 0.999.
        anchor_fused_linear: never build the logits; None: where the head is a plain matrix, and R3F does not need logits.
        sft_weighting: "none"; "dft", each token's cross-entropy times its probability (2508.05629); "asft", that with an
            anchor (2509.23753).

    Raises:
        ValueError: an option that does not exist or is out of range; options that contradict each other.
    """

    anchor_kl: float | None = option(None, "Weight of the divergence from the anchor's reference, >= 0 (0.1; for dft 0).")
    anchor: str = option("reference", "What the model is held to: reference (its start), ema or lora_off.")
    anchor_divergence: str = option("forward_kl", f"The anchor's divergence: {', '.join(DIVERGENCES)}.")
    anchor_ema_decay: float | None = option(None, "Decay of the average that anchor=ema holds to, in [0, 1) (0.999).")
    anchor_fused_linear: bool | None = option(None, "The anchor without ever building logits; by default where it can be.")
    sft_weighting: str = option("none", "Weights of the tokens' cross-entropy: none, dft or asft (dft with an anchor).")

    def __post_init__(self) -> None:
        take_text_for_numbers(self, "anchor_kl", "anchor_ema_decay")
        self.check_anchor()
        further = getattr(super(), "__post_init__", None)  # of the arguments that these are mixed into
        if further is not None:
            further()

    def check_anchor(self) -> None:
        """Raises ValueError for an option that does not exist or is out of range, or for a contradiction."""
        for name, valid in (("anchor", ANCHORS), ("anchor_divergence", DIVERGENCES), ("sft_weighting", SFT_WEIGHTINGS)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        if self.anchor_kl is not None and not (math.isfinite(self.anchor_kl) and self.anchor_kl >= 0):
            raise ValueError(f"anchor_kl must be finite and >= 0, not {self.anchor_kl}")
        if self.anchor_ema_decay is not None:
            if not 0 <= self.anchor_ema_decay < 1:
                raise ValueError(f"anchor_ema_decay must lie in [0, 1), not {self.anchor_ema_decay}")
            if self.anchor != "ema":
                raise ValueError(f"anchor_ema_decay is of anchor='ema', not of {self.anchor!r}; leave it out")
        if self.sft_weighting == "asft" and self.anchor_kl == 0:
            raise ValueError("sft_weighting='asft' is dft with an anchor, and anchor_kl is 0; say 'dft', or give a weight")
        for name, plain in (("anchor", "reference"), ("anchor_divergence", "forward_kl")):
            if self.anchor_kl is None and self.anchor_weight == 0 and getattr(self, name) != plain:
                raise ValueError(f"{name}={getattr(self, name)!r} has no weight; give anchor_kl, or leave it out")

    @property
    def anchor_weight(self) -> float:
        """`anchor_kl`, or what it is where it was not given."""
        if self.anchor_kl is not None:
            return self.anchor_kl
        return 0.0 if self.sft_weighting == "dft" else 0.1

    @property
    def ema_decay(self) -> float:
        """`anchor_ema_decay`, or what it is where it was not given."""
        return 0.999 if self.anchor_ema_decay is None else self.anchor_ema_decay

    def asks_for_anchor(self) -> bool:
        """Whether any of these options was given; False where anchor_kl is 0 and no weighting is asked for."""
        if self.anchor_kl == 0 and self.sft_weighting == "none":
            return False
        return any(getattr(self, f.name) != f.default for f in fields(AnchorOptions))
