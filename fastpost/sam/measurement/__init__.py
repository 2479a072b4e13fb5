"""Sharpness as a measurement: how far the loss rises around the weights, and how it curves, with standard errors.

Worst-case rise to first order and m-sharpness: 2010.01412 (eq. 2, section 4.1); ASAM's scale: 2102.11600; average-case rise
along random directions: 2302.07011.
"""

from fastpost.sam.measurement.measure import sharpness
from fastpost.sam.measurement.results import Around, Estimate, Sharpness

__all__ = ["Around", "Estimate", "Sharpness", "sharpness"]
