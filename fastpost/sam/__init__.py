"""Sharpness-aware minimization."""

from fastpost.sam.optimizer import SAM
from fastpost.sam.report import PerturbationReport

__all__ = ["SAM", "PerturbationReport"]
