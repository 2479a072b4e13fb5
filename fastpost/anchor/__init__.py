"""Fine-tuning that is held to a reference: a divergence from it beside the cross-entropy, and DFT's weights of tokens."""

from __future__ import annotations

from fastpost.anchor.model import Anchor as Anchor
from fastpost.anchor.model import AnchorOutput as AnchorOutput
from fastpost.anchor.references import AdaptersOff as AdaptersOff
from fastpost.anchor.references import Frozen as Frozen
from fastpost.anchor.references import MovingAverage as MovingAverage
from fastpost.anchor.references import Reference as Reference

__all__ = ["AdaptersOff", "Anchor", "AnchorOutput", "Frozen", "MovingAverage", "Reference"]
