"""Gradient ascent post-training."""

from fastpost.gap.run import GAP, GapResult

__all__ = ["GAP", "GapResult"]
