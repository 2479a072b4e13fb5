"""Gradient ascent post-training."""

from fastpost.gap.delta import Delta
from fastpost.gap.many import sweep
from fastpost.gap.run import GAP, GapResult
from fastpost.gap.signs import SignedWindow
from fastpost.gap.surgery import SurgeryWindow

__all__ = ["GAP", "Delta", "GapResult", "SignedWindow", "SurgeryWindow", "sweep"]
