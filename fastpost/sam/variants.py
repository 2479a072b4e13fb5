"""Variants of SAM: what each changes in a step, through the same few hooks."""

from __future__ import annotations


class Variant:
    """SAM itself: every hook leaves the step as it is.

    Attributes:
        ascent_pass: whether the direction comes from a gradient at w, that is from a pass of its own.
        keeps_gradient: whether the gradient at w is kept until the second one is there.
    """

    ascent_pass = True
    keeps_gradient = False
