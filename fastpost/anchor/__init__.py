"""Fine-tuning that is held to a reference: a divergence from it beside the cross-entropy, and DFT's weights of tokens."""

from __future__ import annotations

from fastpost.anchor.context import InContext as InContext
from fastpost.anchor.context import without_context as without_context
from fastpost.anchor.examples import ContextCollator as ContextCollator
from fastpost.anchor.model import Anchor as Anchor
from fastpost.anchor.model import AnchorOutput as AnchorOutput
from fastpost.anchor.references import AdaptersOff as AdaptersOff
from fastpost.anchor.references import Frozen as Frozen
from fastpost.anchor.references import Live as Live
from fastpost.anchor.references import MovingAverage as MovingAverage
from fastpost.anchor.references import Reference as Reference

__all__ = [
    "AdaptersOff",
    "Anchor",
    "AnchorOutput",
    "ContextCollator",
    "Frozen",
    "InContext",
    "Live",
    "MovingAverage",
    "Reference",
    "without_context",
]
