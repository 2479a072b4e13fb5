"""fastpost: SAM, R3F/R4F and gradient ascent for post-training language models.

Importing this package builds nothing, probes no hardware and loads no model library; each name is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SAM": "fastpost.sam",
    "SAMWindow": "fastpost.sam",
    "PerturbationReport": "fastpost.sam",
    "Sharpness": "fastpost.sam",
    "sharpness": "fastpost.sam",
    "R3F": "fastpost.r3f",
    "R3FOutput": "fastpost.r3f",
    "R4F": "fastpost.r3f",
    "GAP": "fastpost.gap",
    "GapResult": "fastpost.gap",
    "flatten_parameters": "fastpost.flat",
    "symmetric_kl": "fastpost.ops.divergence",
    "r3f_loss": "fastpost.ops.divergence",
    "js_divergence": "fastpost.ops.jensen_shannon",
    "linear_r3f_loss": "fastpost.ops.linear_divergence",
    "linear_symmetric_kl": "fastpost.ops.linear_divergence",
    "linear_js_divergence": "fastpost.ops.linear_divergence",
    "linear_r_drop_loss": "fastpost.ops.linear_divergence",
    "linear_distillation_loss": "fastpost.ops.linear_distillation",
    "distillation_loss": "fastpost.ops.linear_distillation",
    "linear_top_k_distillation_loss": "fastpost.ops.top_k_distillation",
    "linear_top_log_probs": "fastpost.ops.top_k_distillation",
    "add_noise": "fastpost.ops.noise",
    "embedding_noise": "fastpost.ops.noise",
    "negate_grads_": "fastpost.ops.params",
    "flip_signs_": "fastpost.ops.params",
    "use_backend": "fastpost.dispatch",
    "backends": "fastpost.backends",
}

_PARTS = ("anchor", "conformance", "distributed", "flat", "gap", "integrations", "ops", "r3f", "sam")

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from fastpost.dispatch import backends as backends
    from fastpost.dispatch import use_backend as use_backend
    from fastpost.flat import flatten_parameters as flatten_parameters
    from fastpost.gap import GAP as GAP
    from fastpost.gap import GapResult as GapResult
    from fastpost.ops.divergence import r3f_loss as r3f_loss
    from fastpost.ops.divergence import symmetric_kl as symmetric_kl
    from fastpost.ops.jensen_shannon import js_divergence as js_divergence
    from fastpost.ops.linear_distillation import distillation_loss as distillation_loss
    from fastpost.ops.linear_distillation import linear_distillation_loss as linear_distillation_loss
    from fastpost.ops.linear_divergence import linear_js_divergence as linear_js_divergence
    from fastpost.ops.linear_divergence import linear_r3f_loss as linear_r3f_loss
    from fastpost.ops.linear_divergence import linear_r_drop_loss as linear_r_drop_loss
    from fastpost.ops.linear_divergence import linear_symmetric_kl as linear_symmetric_kl
    from fastpost.ops.noise import add_noise as add_noise
    from fastpost.ops.noise import embedding_noise as embedding_noise
    from fastpost.ops.params import flip_signs_ as flip_signs_
    from fastpost.ops.params import negate_grads_ as negate_grads_
    from fastpost.ops.top_k_distillation import linear_top_k_distillation_loss as linear_top_k_distillation_loss
    from fastpost.ops.top_k_distillation import linear_top_log_probs as linear_top_log_probs
    from fastpost.r3f import R3F as R3F
    from fastpost.r3f import R4F as R4F
    from fastpost.r3f import R3FOutput as R3FOutput
    from fastpost.sam import SAM as SAM
    from fastpost.sam import PerturbationReport as PerturbationReport
    from fastpost.sam import SAMWindow as SAMWindow
    from fastpost.sam import Sharpness as Sharpness
    from fastpost.sam import sharpness as sharpness


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module = importlib.import_module(_HOME[name])
        value = module if _HOME[name] == f"fastpost.{name}" else getattr(module, name)
        globals()[name] = value
        return value
    if name in _PARTS:
        return importlib.import_module(f"fastpost.{name}")
    raise AttributeError(f"module 'fastpost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
