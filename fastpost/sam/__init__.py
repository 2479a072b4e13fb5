"""Sharpness-aware minimization."""

from fastpost.norm_stats import frozen_norm_stats
from fastpost.sam.decoupled import DecoupledWSAM
from fastpost.sam.external import ExternalSAM
from fastpost.sam.frameworks import find_sam
from fastpost.sam.measurement import Around, Estimate, Sharpness, sharpness
from fastpost.sam.optimizer import SAM
from fastpost.sam.scopes import SampledLayers, StepScope, norm_layers
from fastpost.sam.step import PerturbationReport, PerturbationSums, Phase, SAMStep
from fastpost.sam.variants import (
    GSAM,
    TRAM,
    WSAM,
    FriendlySAM,
    FunctionalSAM,
    LookSAM,
    MomentumSAM,
    PreconditionedSAM,
    StableSAM,
    Variant,
    logits_sam,
)
from fastpost.sam.window import BeforePass, PassInfo, SAMWindow
from fastpost.sam.zeroth_order import ZerothOrderSAM

__all__ = [
    "GSAM",
    "SAM",
    "TRAM",
    "WSAM",
    "Around",
    "BeforePass",
    "DecoupledWSAM",
    "Estimate",
    "ExternalSAM",
    "FriendlySAM",
    "FunctionalSAM",
    "LookSAM",
    "MomentumSAM",
    "PassInfo",
    "PerturbationReport",
    "PerturbationSums",
    "Phase",
    "PreconditionedSAM",
    "SAMStep",
    "SAMWindow",
    "SampledLayers",
    "Sharpness",
    "StableSAM",
    "StepScope",
    "Variant",
    "ZerothOrderSAM",
    "find_sam",
    "frozen_norm_stats",
    "logits_sam",
    "norm_layers",
    "sharpness",
]
