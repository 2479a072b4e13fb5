"""R3F and R4F: fine-tuning with a trust region on the outputs (Aghajanyan et al. 2008.03156)."""

from fastpost.r3f.model import R3F, R3FOutput
from fastpost.r3f.spectral import R4F

__all__ = ["R3F", "R4F", "R3FOutput"]
