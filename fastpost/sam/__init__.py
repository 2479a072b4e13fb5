"""Sharpness-aware minimization."""

from fastpost.sam.logits import FunctionalSAM, logits_sam
from fastpost.sam.norm_stats import frozen_norm_stats
from fastpost.sam.optimizer import SAM
from fastpost.sam.options import norm_layers
from fastpost.sam.report import PerturbationReport
from fastpost.sam.variants import GSAM, TRAM, FriendlySAM, LookSAM, MomentumSAM, StableSAM, Variant
from fastpost.sam.window import SAMWindow

__all__ = [
    "GSAM",
    "SAM",
    "TRAM",
    "FriendlySAM",
    "FunctionalSAM",
    "LookSAM",
    "MomentumSAM",
    "PerturbationReport",
    "SAMWindow",
    "StableSAM",
    "Variant",
    "frozen_norm_stats",
    "logits_sam",
    "norm_layers",
]
