"""Options of SAM and R3F as trainers take them: one flat list of fields, for command lines and files of settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastpost.errors import unknown
from fastpost.integrations.masking import WithoutSecrets
from fastpost.modes import check_norm_stats
from fastpost.r3f import R3F
from fastpost.sam.options import check_options

METHODS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "sam": frozenset({"sam"}),
    "sam_lm": frozenset({"sam"}),
    "asam": frozenset({"sam"}),
    "r3f": frozenset({"r3f"}),
    "sam+r3f": frozenset({"sam", "r3f"}),
}


def part_of(option: str) -> str | None:
    """Which of the methods' parts an option of `PostTrainingOptions` belongs to: "sam", "r3f", or None for `method`."""
    return "sam" if option.startswith("sam_") else "r3f" if option.startswith("r3f_") or option == "noise_type" else None


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(repr=False)
class PostTrainingOptions(WithoutSecrets):
    """What to train with beside the plain loss; every field is an option of `PostTrainingArguments` too.

    Attributes:
        method: "sam", "sam_lm" (the recipe of 2110.08529: rho 0.15, ascent on a quarter of the window), "r3f", "sam+r3f", or
            "asam" (adaptive, rho 0.5), "none"; None: all that the trainer's class does.
        sam_rho: radius of the perturbation, >= 0; None is 0.05, under "sam_lm" 0.15, under "asam" 0.5.
        sam_adaptive, sam_eta: ASAM, and its constant.
        sam_ascent_fraction: share of the accumulation window that the ascent uses, in (0, 1]; None is 1.0, under "sam_lm"
            0.25.
        sam_per_micro_batch: m-SAM: each micro-batch is perturbed by its own gradient.
        sam_interval: SAM on every so many-th step.
        sam_scope: names of the parameters to perturb, patterns with commas between ("*.lora_*"); None is all.
        sam_rounding: how w + e is stored in 16-bit weights, "nearest" or "stochastic".
        sam_dropout_rng: "same" masks in both passes, or "independent".
        sam_norm_stats: which passes move the running statistics of batch norm layers: the "first", or "both".
        sam_sync_ascent: under DDP, False lets each process perturb by its own gradient (the original); None averages.
        r3f_lambda, r3f_eps, noise_type: weight of the KL, scale of the noise, "uniform" or "normal".
        r3f_noise_scale: what r3f_eps is measured in: "absolute", "relative", "neftune".
        r3f_grad, r3f_dropout, r3f_forward: as in `fastpost.R3F`.
        r3f_seed: None draws noise from torch's generator; an integer makes the n-th step's noise that of `r3f_seed + n`.
        r3f_embedding: name of the module whose output gets the noise; None: the model's input embedding.
        r3f_fused_linear: never build the logits; None: where the trainer does not either (TRL's SFT).

    Raises:
        ValueError: an option that does not exist or is out of range; a negative rho.
    """

    method: str | None = _option(None, "sam, sam_lm, asam, r3f, sam+r3f or none; by default what the trainer's class does.")
    sam_rho: float | None = _option(None, "SAM's radius, >= 0 (0.05; under sam_lm 0.15, under asam 0.5).")
    sam_adaptive: bool = _option(False, "ASAM: e scaled by the weights.")
    sam_eta: float = _option(0.0, "ASAM's constant beside |w|, >= 0.")
    sam_ascent_fraction: float | None = _option(None, "Share of the window that the ascent uses (1.0; under sam_lm 0.25).")
    sam_per_micro_batch: bool = _option(False, "m-SAM: each micro-batch is perturbed by its own gradient.")
    sam_interval: int = _option(1, "SAM on every so many-th step.")
    sam_scope: str | None = _option(None, "Patterns of parameter names to perturb, with commas between; all by default.")
    sam_rounding: str = _option("nearest", "How 16-bit weights store w + e: nearest or stochastic.")
    sam_dropout_rng: str = _option("same", "Dropout masks of the two passes: same or independent.")
    sam_norm_stats: str = _option("first", "Passes that move the running statistics of batch norm layers: first or both.")
    sam_sync_ascent: bool | None = _option(None, "False: under DDP each process perturbs by its own gradient.")
    r3f_lambda: float = _option(1.0, "Weight of R3F's divergence, >= 0.")
    r3f_eps: float = _option(1e-5, "Scale of R3F's noise, >= 0.")
    noise_type: str = _option("uniform", "R3F's noise: uniform or normal.")
    r3f_noise_scale: str = _option("absolute", "What r3f_eps is measured in: absolute, relative or neftune.")
    r3f_grad: str = _option("both", "Branches that R3F's divergence sends gradients into: both, noised or clean.")
    r3f_dropout: str = _option("independent", "Dropout masks of R3F's two passes: independent or shared.")
    r3f_forward: str = _option("two_pass", "two_pass or double_batch.")
    r3f_seed: int | None = _option(None, "Seed of R3F's noise; by default drawn from torch's generator.")
    r3f_embedding: str | None = _option(None, "Name of the module that embeds the input, where the model does not tell.")
    r3f_fused_linear: bool | None = _option(None, "R3F without ever building the logits; by default in TRL's SFT only.")

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        for name in ("sam_rho", "sam_eta", "sam_ascent_fraction", "r3f_lambda", "r3f_eps"):
            value = getattr(self, name)
            if isinstance(value, str):  # YAML takes 1e-5 for a text
                try:
                    setattr(self, name, float(value))
                except ValueError:
                    raise ValueError(f"{name} must be a number, not {value!r}") from None
        lm = self.method == "sam_lm"
        if self.sam_rho is None:
            self.sam_rho = {"sam_lm": 0.15, "asam": 0.5}.get(self.method or "", 0.05)
        self.sam_adaptive = self.sam_adaptive or self.method == "asam"
        if self.sam_ascent_fraction is None:
            self.sam_ascent_fraction = 0.25 if lm else 1.0
        for name in ("sam_rho", "sam_eta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, not {value}")
        check_options(self.sam_ascent_fraction, self.sam_dropout_rng, self.sam_interval, None, None)
        check_norm_stats("sam_norm_stats", self.sam_norm_stats)
        if self.sam_per_micro_batch and self.sam_ascent_fraction != 1:
            raise ValueError(
                f"sam_per_micro_batch perturbs by every micro-batch, which leaves no sam_ascent_fraction of "
                f"{self.sam_ascent_fraction}; leave one of the two out"
            )
        if self.sam_rounding not in ("nearest", "stochastic"):
            raise unknown("sam_rounding", self.sam_rounding, ("nearest", "stochastic"))
        self.build_r3f()
        further = getattr(super(), "__post_init__", None)  # of the arguments that these are mixed into
        if further is not None:
            further()

    def build_r3f(self, label_smoothing: float = 0.0, fused_linear: bool = False) -> R3F:
        """The R3F that these options describe."""
        return R3F(
            self.r3f_eps,
            self.r3f_lambda,
            self.noise_type,
            noise_scale=self.r3f_noise_scale,
            grad=self.r3f_grad,
            dropout=self.r3f_dropout,
            forward=self.r3f_forward,
            seed=self.r3f_seed,
            embedding=self.r3f_embedding,
            label_smoothing=label_smoothing,
            fused_linear=fused_linear,
        )

    def patterns(self) -> list[str] | None:
        """`sam_scope`, taken apart."""
        if self.sam_scope is None:
            return None
        return [part.strip() for part in self.sam_scope.split(",") if part.strip()]
