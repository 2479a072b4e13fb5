"""Sharpness-aware minimization."""

from fastpost.sam.optimizer import SAM
from fastpost.sam.report import PerturbationReport
from fastpost.sam.window import SAMWindow

__all__ = ["SAM", "PerturbationReport", "SAMWindow"]
