"""Options of SAM, R3F and the anchor as trainers take them: one flat list of fields, for command lines and files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.errors import unknown
from fastpost.integrations import contradictions, specs
from fastpost.integrations.anchor_options import NUMBERS as ANCHOR_NUMBERS
from fastpost.integrations.anchor_options import AnchorOptions, option, take_text_for_numbers
from fastpost.integrations.masking import WithoutSecrets
from fastpost.norm_stats import check_norm_stats
from fastpost.r3f import R3F
from fastpost.r3f.spectral import LAYERS, MODES
from fastpost.sam import TRAM, Variant, norm_layers
from fastpost.sam.options import NORM_IN, check_options
from fastpost.sam.perturbation.stash import KINDS as STASHES
from fastpost.sam.scopes import Scope, scope_in

METHODS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "sam": frozenset({"sam"}),
    "sam_lm": frozenset({"sam"}),
    "asam": frozenset({"sam"}),
    "r3f": frozenset({"r3f"}),
    "r4f": frozenset({"r3f"}),
    "sam+r3f": frozenset({"sam", "r3f"}),
    "sam+r4f": frozenset({"sam", "r3f"}),
    "tram": frozenset({"sam", "r3f"}),
    "anchor": frozenset({"anchor"}),
    "sam+anchor": frozenset({"sam", "anchor"}),
    "r3f+anchor": frozenset({"r3f", "anchor"}),
    "sam+r3f+anchor": frozenset({"sam", "r3f", "anchor"}),
}
# Options that say what is trained: one that the method does not use is refused.
STRUCTURAL = (
    "sam_variant",
    "sam_functional_path",
    "sam_perturb",
    "sam_masters",
    "sam_stash",
    "sam_rounding_seed",
    "r3f_relative",
    "r3f_spectral",
    "r3f_spectral_mode",
)

# Options whose values follow the method and the variant where they are not given.
PRESET = ("sam_variant", "sam_rho", "sam_adaptive", "sam_ascent_fraction", "sam_interval", "r3f_lambda", "r3f_spectral")

NORMS = "norm_layers"  # in `sam_scope`


def part_of(option: str) -> str | None:
    """Which of the methods' parts an option of `PostTrainingOptions` belongs to: "sam", "r3f", "anchor", or None for
    `method`."""
    if option.startswith("anchor") or option == "sft_weighting":
        return "anchor"
    return "sam" if option.startswith("sam_") else "r3f" if option.startswith("r3f_") or option == "noise_type" else None


@dataclass(repr=False)
class PostTrainingOptions(AnchorOptions, WithoutSecrets):
    """What to train with beside the plain loss; every field is an option of `PostTrainingArguments` too.

    Attributes:
        method: "sam", "sam_lm" (the recipe of 2110.08529: rho 0.15, ascent on a quarter of the window), "asam" (adaptive,
            rho 0.5), "r3f", "r4f" (R3F, the last layer of the head normalised), "sam+r3f", "sam+r4f", "tram" (ASAM with the
            divergence under R3F's noise for its radius, 2310.03646: rho 1.0, no KL in the loss), "anchor", "sam+anchor",
            "r3f+anchor", "sam+r3f+anchor", "none"; None: all that the trainer's class does. What a method sets follows
            it where it was not given, also where it is changed between two runs.
        sam_rho: radius of the perturbation, >= 0; None is 0.05, under "sam_lm" 0.15, under "asam" 0.5, for TRAM 1.0.
        sam_adaptive, sam_eta: ASAM, and its constant.
        sam_ascent_fraction: share of the accumulation window that the ascent uses, in (0, 1]; None is 1.0, under "sam_lm"
            0.25.
        sam_per_micro_batch: m-SAM: each micro-batch is perturbed by its own gradient.
        sam_interval: SAM on every so many-th step; None is 1, for "looksam" 5.
        sam_variant: a class of `fastpost.sam.variants` in lower case, and after a colon its parameters: "looksam",
            "gsam:alpha=0.2", "friendlysam:sigma=1,decay=0.95", "momentumsam:buffers=exp_avg+momentum_buffer". "tram" takes
            its radius from R3F's divergence, so R3F has to be there (as under "sam+r3f").
        sam_functional_path: Functional-SAM (2502.02407): the Jacobian at w + e, the loss's derivative by the logits from w
            (`fastpost.sam.FunctionalSAM`). For models with an output head; another thing than sam_perturb="functional".
        sam_perturb: "stored" writes w + e over w; "functional" adds what e would add to the outputs of the model's layers.
        sam_masters: keep float32 masters of 16-bit weights in the optimizer, which steps and saves them; w + e and w are
            casts, and nothing is stashed (`fastpost.SAM(master_params=...)`).
        sam_stash: how w is kept between the passes: as a "copy", as its distance from w + e in "ulp" (half the room, bit for
            bit), or on the host ("cpu").
        sam_scope: names of the parameters to perturb, patterns with commas between ("*.lora_*"), among them "norm_layers"
            for the gains and offsets of all norm layers (SAM-ON, 2306.04226); None is all.
        sam_rounding: how w + e is stored in 16-bit weights, "nearest" or "stochastic".
        sam_rounding_seed: key of the random numbers of "stochastic", a whole number >= 0; None is 0.
        sam_dropout_rng: "same" masks in both passes, or "independent".
        sam_norm: when the ascent's norm is summed up, in the "step" or during "backward", as `fastpost.SAM(norm=)`.
        sam_norm_stats: which passes move the running statistics of batch norm layers: the "first", or "both".
        sam_sync_ascent: under DDP, False lets each process perturb by its own gradient (the original; with m-SAM each of its
            micro-batches, as in 2302.09693). None and True take the mean of all processes, with m-SAM too.
        r3f_lambda: weight of the KL, >= 0; None is 1.0, under "tram" 0.
        r3f_eps, noise_type: scale of the noise, "uniform" or "normal".
        r3f_noise_scale: what r3f_eps is measured in: "absolute", "relative", "neftune".
        r3f_grad, r3f_dropout, r3f_forward: as in `fastpost.R3F`.
        r3f_divergence, r3f_where: "symmetric_kl" or "js"; the side of an encoder-decoder that is noised.
        r3f_detach_embedding: the noised branch sends no gradient into the embedding table.
        r3f_seed: None draws noise from torch's generator; an integer gives each step noise of its own, alike in every run.
        r3f_embedding: name of the module whose output gets the noise; None: the model's input embedding.
        r3f_fused_linear: never build the logits; None: where the trainer does not either (TRL's SFT).
        r3f_relative: a class of `fastpost.r3f.relatives` in R3F's place, written as `sam_variant` is: "rdrop:alpha=0.5",
            "freelb:adv_steps=2". Of R3F's options `r3f_seed` and `r3f_embedding` are its too, `r3f_fused_linear` R-Drop's.
        r3f_spectral: R4F: divides weights of a classifier's head by their largest singular value, "last": of its last layer
            (as under "r4f"), or "all".
        r3f_spectral_mode: "exact", or "at_most", as in `fastpost.R4F`.
        anchor_kl and the rest of the anchor's: see `AnchorOptions`.

    Raises:
        ValueError: an option that does not exist or is out of range; options that contradict each other.
    """

    method: str | None = option(None, f"{', '.join(METHODS)}; by default what the trainer's class does.")
    sam_rho: float | None = option(None, "SAM's radius, >= 0 (0.05; under sam_lm 0.15, under asam 0.5, for tram 1).")
    sam_adaptive: bool = option(False, "ASAM: e scaled by the weights.")
    sam_eta: float = option(0.0, "ASAM's constant beside |w|, >= 0.")
    sam_ascent_fraction: float | None = option(None, "Share of the window that the ascent uses (1.0; under sam_lm 0.25).")
    sam_per_micro_batch: bool = option(False, "m-SAM: each micro-batch is perturbed by its own gradient.")
    sam_interval: int | None = option(None, "SAM on every so many-th step (1; for looksam 5).")
    sam_variant: str | None = option(None, f"Variant of SAM and its parameters: {specs.shown(specs.VARIANTS)}.")
    sam_functional_path: bool = option(False, "Functional-SAM: the loss's derivative by the logits stays that at w.")
    sam_perturb: str = option("stored", "stored writes w + e over w, functional adds what e does to the layers' outputs.")
    sam_masters: bool = option(False, "float32 masters of 16-bit weights, stepped and saved by the optimizer.")
    sam_stash: str = option(
        "copy", "How w is kept between the passes: copy, ulp (half the room) or cpu (the host's memory)."
    )
    sam_scope: str | None = option(
        None, "Patterns of parameter names to perturb, or norm_layers, with commas between; all by default."
    )
    sam_rounding: str = option("nearest", "How 16-bit weights store w + e: nearest or stochastic.")
    sam_rounding_seed: int | None = option(None, "Key of the random numbers of stochastic rounding, >= 0 (0).")
    sam_dropout_rng: str = option("same", "Dropout masks of the two passes: same or independent.")
    sam_norm: str = option("step", "When the ascent's norm is summed up: in the step, or during backward.")
    sam_norm_stats: str = option("first", "Passes that move the running statistics of batch norm layers: first or both.")
    sam_sync_ascent: bool | None = option(
        None, "False: under DDP each process perturbs by its own gradient; else by the mean of all."
    )
    r3f_lambda: float | None = option(None, "Weight of R3F's divergence, >= 0 (1.0; under tram 0).")
    r3f_eps: float = option(1e-5, "Scale of R3F's noise, >= 0.")
    noise_type: str = option("uniform", "R3F's noise: uniform or normal.")
    r3f_noise_scale: str = option("absolute", "What r3f_eps is measured in: absolute, relative or neftune.")
    r3f_grad: str = option("both", "Branches that R3F's divergence sends gradients into: both, noised or clean.")
    r3f_dropout: str = option("independent", "Dropout masks of R3F's two passes: independent or shared.")
    r3f_forward: str = option("two_pass", "two_pass or double_batch.")
    r3f_divergence: str = option("symmetric_kl", "R3F's divergence: symmetric_kl or js (Jensen-Shannon).")
    r3f_where: str = option("encoder", "Side of an encoder-decoder that is noised: encoder, decoder or both.")
    r3f_detach_embedding: bool = option(True, "R3F's noised branch sends no gradient into the embedding table.")
    r3f_seed: int | None = option(None, "Seed of R3F's noise; by default drawn from torch's generator.")
    r3f_embedding: str | None = option(None, "Name of the module that embeds the input, where the model does not tell.")
    r3f_fused_linear: bool | None = option(None, "R3F without ever building the logits; by default in TRL's SFT only.")
    r3f_relative: str | None = option(
        None, f"A relative in R3F's place, and its parameters: {specs.shown(specs.RELATIVES, specs.OF_RELATIVES)}."
    )
    r3f_spectral: str | None = option(None, "Layers of a classifier's head that R4F normalises: last or all.")
    r3f_spectral_mode: str = option("exact", "R4F's divisor: exact, the norm, or at_most, the norm where it is above 1.")

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        take_text_for_numbers(self, "sam_rho", "sam_eta", "sam_ascent_fraction", "r3f_lambda", "r3f_eps")
        take_text_for_numbers(self, *ANCHOR_NUMBERS)
        self.check()
        further = getattr(super(), "__post_init__", None)  # of the arguments that these are mixed into
        if further is not None:
            further()

    def _fill_presets(self) -> None:
        """What the method and the variant say of options that were not given; said anew where these have changed since."""
        defaults = {f.name: f.default for f in fields(PostTrainingOptions)}
        for name, value in vars(self).get("_filled", {}).items():
            if getattr(self, name) == value:
                setattr(self, name, defaults[name])
        given = {name: getattr(self, name) for name in PRESET}
        method = self.method or ""
        if method == "tram" and self.sam_variant is None:
            self.sam_variant = "tram"
        variant = self.build_variant()
        if self.sam_rho is None:
            self.sam_rho = 1.0 if isinstance(variant, TRAM) else {"sam_lm": 0.15, "asam": 0.5}.get(method, 0.05)
        self.sam_adaptive = self.sam_adaptive or method in ("asam", "tram")
        if self.sam_ascent_fraction is None:
            self.sam_ascent_fraction = 0.25 if method == "sam_lm" else 1.0
        if self.sam_interval is None:
            self.sam_interval = 5 if variant.overrides("between") else 1
        if self.r3f_lambda is None:
            self.r3f_lambda = 0.0 if method == "tram" else 1.0
        if self.r3f_spectral is None and method in ("r4f", "sam+r4f"):
            self.r3f_spectral = LAYERS[0]
        self._filled = {name: getattr(self, name) for name in PRESET if getattr(self, name) != given[name]}

    def values(self) -> dict[str, Any]:
        """The options of this class, by name."""
        return {f.name: getattr(self, f.name) for f in fields(PostTrainingOptions)}

    # -- checks -----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Trainers ask before each run, since attributes may have been changed.

        Raises:
            ValueError: an option that does not exist or is out of range; options that contradict each other.
        """
        if self.method is not None and self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        self._fill_presets()
        for name in ("sam_rho", "sam_eta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, not {value}")
        assert self.sam_ascent_fraction is not None
        assert self.sam_interval is not None
        check_options(self.sam_ascent_fraction, self.sam_dropout_rng, self.sam_interval, None, None, "step")
        check_norm_stats("sam_norm_stats", self.sam_norm_stats)
        choices = {
            "sam_rounding": ("nearest", "stochastic"),
            "sam_perturb": ("stored", "functional"),
            "sam_stash": STASHES,
            "sam_norm": NORM_IN,
            "r3f_spectral": (None, *LAYERS),
            "r3f_spectral_mode": MODES,
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), [word for word in valid if word is not None])
        seed = self.sam_rounding_seed
        if seed is not None and not (int(seed) == seed and 0 <= seed < 2**64):
            raise ValueError(f"sam_rounding_seed must be a whole number >= 0 and < 2^64, not {seed}")
        self.build_r3f(fused_linear=bool(self.r3f_fused_linear))
        self.check_anchor()
        if self.method is not None:
            self.refuse_unused(METHODS[self.method], f"method={self.method!r}")
        for message in contradictions.of(self):
            raise ValueError(message)

    def refuse_unused(self, parts: Collection[str], who: str) -> None:
        """Raises ValueError for an option that says what is trained, of a part that is not done.

        Args:
            parts: what is done: "sam", "r3f", "anchor". who: does it, for the error.
        """
        for f in fields(PostTrainingOptions):
            if f.name in STRUCTURAL and part_of(f.name) not in parts and getattr(self, f.name) != f.default:
                part = str(part_of(f.name)).upper()
                raise ValueError(f"{f.name}={getattr(self, f.name)!r}: {who} does no {part}; leave one of the two out")
        if "anchor" not in parts and (given := self.anchor_options_given()):
            named = " and ".join(f"{name}={getattr(self, name)!r}" for name in given)
            joined = "+".join((*(part for part in ("sam", "r3f") if part in parts), "anchor"))
            raise ValueError(
                f"{who} does no anchor and would not read {named}; say a method with an anchor, such as method={joined!r}, "
                f"to PostTrainer, or leave {'it' if len(given) == 1 else 'them'} out"
            )
        if "sam" in parts and "r3f" not in parts and isinstance(self.build_variant(), TRAM):
            raise ValueError(
                f"sam_variant={self.sam_variant!r} takes R3F's divergence for its radius, and {who} does no R3F; say "
                "method='tram', or 'sam+r3f', in a trainer that does both (PostTrainer)"
            )

    # -- what they describe ------------------------------------------------------------------------------------------------

    def build_variant(self, loss_scale: Callable[[], float | Tensor] | None = None) -> Variant:
        """A fresh variant of SAM; SAM itself where none was asked for.

        Args:
            loss_scale: the current factor on gradients, of a GradScaler.
        """
        if self.sam_variant is None:
            return Variant()
        given = {} if loss_scale is None else {"loss_scale": loss_scale}
        variant: Variant = specs.build("sam_variant", self.sam_variant, specs.VARIANTS, **given)
        return variant

    def sam_keywords(
        self,
        model: nn.Module | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        loss_scale: Callable[[], float | Tensor] | None = None,
    ) -> dict[str, Any]:
        """`fastpost.SAM`'s keywords that these options describe; every trainer builds its SAM from them.

        Args:
            model: that is trained; perturbing in its layers and scopes by name need it.
            compute_dtype: that the forward pass computes in, as for `fastpost.SAM`.
            loss_scale: as for `build_variant`.

        Raises:
            ValueError: no parameter's name fits a pattern of `sam_scope`.
        """
        return {
            "rho": self.sam_rho,
            "adaptive": self.sam_adaptive,
            "eta": self.sam_eta,
            "ascent_fraction": self.sam_ascent_fraction,
            "interval": self.sam_interval,
            "scope": self.scope(model),
            "compute_dtype": compute_dtype,
            "dropout_rng": self.sam_dropout_rng,
            "sync_ascent": self.sam_sync_ascent,
            "rounding": self.sam_rounding,
            "rounding_seed": self.sam_rounding_seed or 0,
            "perturb": self.sam_perturb,
            "stash": self.sam_stash,
            "model": model,
            "norm": self.sam_norm,
            "norm_stats": self.sam_norm_stats,
            "variant": self.build_variant(loss_scale),
        }

    def scope(self, model: nn.Module | None) -> Scope:
        """`sam_scope` in a model; without one its patterns."""
        patterns = self.patterns()
        if patterns is None or model is None:
            return patterns
        scope = scope_in(model, [pattern for pattern in patterns if pattern != NORMS])
        return scope | norm_layers(model) if NORMS in patterns else scope

    def build_r3f(self, label_smoothing: float = 0.0, fused_linear: bool = False) -> Any:
        """The R3F that these options describe, or its relative.

        Raises:
            ValueError: label smoothing, which relatives do not have.
        """
        if self.r3f_relative is not None:
            if label_smoothing:
                raise ValueError(
                    f"label_smoothing_factor={label_smoothing} does not go with r3f_relative={self.r3f_relative!r}, whose "
                    "cross-entropy is not smoothed; leave one of the two out"
                )
            own = {"fused_linear": fused_linear} if self.relative_fuses else {}
            given = {"embedding": self.r3f_embedding, "seed": self.r3f_seed, **own}
            return specs.build("r3f_relative", self.r3f_relative, specs.RELATIVES, **given)
        assert self.r3f_lambda is not None
        return R3F(
            self.r3f_eps,
            self.r3f_lambda,
            self.noise_type,
            noise_scale=self.r3f_noise_scale,
            grad=self.r3f_grad,
            dropout=self.r3f_dropout,
            forward=self.r3f_forward,
            divergence=self.r3f_divergence,
            where=self.r3f_where,
            detach_noised_embedding=self.r3f_detach_embedding,
            seed=self.r3f_seed,
            embedding=self.r3f_embedding,
            label_smoothing=label_smoothing,
            fused_linear=fused_linear,
        )

    @property
    def relative(self) -> str | None:
        """The name in `r3f_relative`, without parameters."""
        return None if self.r3f_relative is None else specs.name_in(self.r3f_relative)

    @property
    def relative_fuses(self) -> bool:
        """Whether the relative that was asked for can do without logits."""
        cls = specs.RELATIVES.get(self.relative or "")
        return cls is not None and "fused_linear" in inspect.signature(cls).parameters

    def patterns(self) -> list[str] | None:
        """`sam_scope`, taken apart."""
        if self.sam_scope is None:
            return None
        return [part.strip() for part in self.sam_scope.split(",") if part.strip()]
