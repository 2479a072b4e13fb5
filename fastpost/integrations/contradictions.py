"""Options of SAM and R3F that do not go together, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastpost.integrations import specs
from fastpost.r3f.spectral import MODES
from fastpost.sam import TRAM

# What relatives of R3F have parameters of their own for, with the values that mean nothing was asked for.
_R3F_ALONE = {
    "r3f_lambda": 1.0,
    "r3f_eps": 1e-5,
    "noise_type": "uniform",
    "r3f_noise_scale": "absolute",
    "r3f_grad": "both",
    "r3f_dropout": "independent",
    "r3f_forward": "two_pass",
    "r3f_divergence": "symmetric_kl",
    "r3f_where": "encoder",
    "r3f_detach_embedding": True,
}
# What counts for nothing where SAM makes no pass at w.
_OF_THE_ASCENT = {
    "sam_ascent_fraction": 1.0,
    "sam_per_micro_batch": False,
    "sam_dropout_rng": "same",
    "sam_norm_stats": "first",
    "sam_sync_ascent": None,
}
# What counts for nothing where R3F's divergence is measured and not trained on.
_OF_THE_KL = {"r3f_grad": "both", "r3f_dropout": "independent", "r3f_forward": "two_pass", "r3f_detach_embedding": True}
# What changes nothing in a relative: R-Drop draws no noise, HyPe noises layers.
_WITHOUT = {"rdrop": ("r3f_seed", "r3f_embedding"), "hype": ("r3f_embedding",)}
_LEAVE = "leave one of the two out"


def of(options: Any) -> Iterator[str]:
    """Each contradiction in the options, in words.

    Args:
        options: PostTrainingOptions, each in its range.
    """
    yield from _in_sam(options)
    yield from _in_r3f(options)


def _in_sam(o: Any) -> Iterator[str]:
    variant, named = o.build_variant(), f"sam_variant={o.sam_variant!r}"
    if o.sam_per_micro_batch and o.sam_ascent_fraction != 1:
        yield (
            f"sam_per_micro_batch perturbs by every micro-batch, which leaves no sam_ascent_fraction of "
            f"{o.sam_ascent_fraction}; {_LEAVE}"
        )
    if o.method == "tram" and not isinstance(variant, TRAM):
        yield f"method='tram' is a variant of SAM by itself, and {named} another; {_LEAVE}"
    if o.sam_per_micro_batch and variant.combines:
        yield f"{named} combines the gradients of two whole passes, which sam_per_micro_batch does not make; {_LEAVE}"
    if o.sam_sync_ascent is False and variant.combines:
        yield f"{named} mixes the ascent's gradient into the ranks' mean, and sam_sync_ascent=False keeps it apart; {_LEAVE}"
    if o.sam_interval == 1 and variant.overrides("between"):
        yield f"{named} acts on the steps between ascents, and sam_interval=1 leaves none; say 5, or no sam_variant"
    if not variant.ascent_pass:
        for name, value in _others(o, _OF_THE_ASCENT):
            yield f"{named} makes no ascent pass, which {name}={value!r} is about; {_LEAVE}"
    if o.sam_functional_path:
        yield from _in_functional_sam(o, variant, named)
    for other, clash in (
        (named, o.sam_variant is not None),
        ("sam_perturb='functional'", o.sam_perturb == "functional"),
        ("sam_rounding='stochastic'", o.sam_rounding == "stochastic"),
    ):
        if o.sam_masters and clash:
            yield f"sam_masters makes w + e by casting masters, which {other} does not do; {_LEAVE}"
    if o.sam_stash != "copy" and (o.sam_masters or o.sam_perturb == "functional"):
        other = "sam_masters keeps w itself" if o.sam_masters else "sam_perturb='functional' writes no weight"
        yield f"sam_stash={o.sam_stash!r} says how w is kept, and {other}; {_LEAVE}"
    if o.sam_perturb == "functional" and o.sam_rounding == "stochastic":
        yield f"sam_perturb='functional' writes no weight, so sam_rounding='stochastic' has nothing to round; {_LEAVE}"
    if o.sam_perturb == "functional" and o.r3f_spectral is not None:
        yield (
            f"sam_perturb='functional' does not reach weights that r3f_spectral={o.r3f_spectral!r} (R4F) divides; take "
            "sam_perturb='stored'"
        )
    if o.sam_rounding_seed is not None and o.sam_rounding != "stochastic":
        yield f"sam_rounding_seed={o.sam_rounding_seed} is for sam_rounding='stochastic', not {o.sam_rounding!r}; {_LEAVE}"
    if o.sam_norm == "backward" and o.sam_adaptive:
        yield f"sam_norm='backward' sums up the squares of g, and ASAM's norm is of t g; {_LEAVE}"
    if o.sam_norm == "backward" and variant.overrides("direction"):
        yield f"sam_norm='backward' sums up the squares of gradients, and {named} makes a direction of its own; {_LEAVE}"
    if o.sam_eta and not o.sam_adaptive:
        yield f"sam_eta={o.sam_eta} is ASAM's constant, and sam_adaptive is off; set it, or leave sam_eta out"


def _in_functional_sam(o: Any, variant: Any, named: str) -> Iterator[str]:
    both = "sam_functional_path takes the derivative by every micro-batch's logits from its pass at w"
    if o.sam_ascent_fraction != 1:
        yield f"{both}, and sam_ascent_fraction={o.sam_ascent_fraction} runs some of them at w + e only; {_LEAVE}"
    if not variant.ascent_pass:
        yield f"{both}, which {named} does not make; {_LEAVE}"
    if o.r3f_fused_linear:
        yield f"{both}, and r3f_fused_linear never builds logits; {_LEAVE}"


def _in_r3f(o: Any) -> Iterator[str]:
    if o.r3f_spectral is None and o.r3f_spectral_mode != MODES[0]:
        yield (
            f"r3f_spectral_mode={o.r3f_spectral_mode!r} is R4F's, and nothing is divided; say r3f_spectral or method='r4f'"
        )
    if isinstance(o.build_variant(), TRAM):
        yield from _in_tram(o)
    if o.r3f_relative is None:
        return
    named, name = f"r3f_relative={o.r3f_relative!r}", specs.name_in(o.r3f_relative)
    own = ", ".join(specs.parameters_of(specs.RELATIVES[name], specs.OF_RELATIVES))
    for option, value in _others(o, _R3F_ALONE):
        yield f"{option}={value!r} is R3F's, and {named} takes R3F's place with parameters of its own ({own}); {_LEAVE}"
    for option in _WITHOUT.get(name, ()):
        if getattr(o, option) is not None:
            yield f"{option} changes nothing in {named}; {_LEAVE}"
    if o.r3f_fused_linear and not o.relative_fuses:
        yield f"r3f_fused_linear is for R3F and R-Drop, and {named} needs the logits; {_LEAVE}"


def _in_tram(o: Any) -> Iterator[str]:
    named = f"sam_variant={o.sam_variant!r}"
    if o.r3f_relative is not None:
        yield f"{named} takes R3F's divergence for its radius, and r3f_relative={o.r3f_relative!r} R3F's place; {_LEAVE}"
    elif o.r3f_lambda == 0:
        for name, value in _others(o, _OF_THE_KL):
            yield f"{named} measures the divergence beside the trainer's pass, without {name}={value!r}; {_LEAVE}"
        if o.r3f_fused_linear:
            yield f"{named} measures the divergence of logits, which r3f_fused_linear never builds; {_LEAVE}"


def _others(options: Any, usual: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options that have another value than the usual one."""
    return ((name, getattr(options, name)) for name, value in usual.items() if getattr(options, name) != value)
