"""SAM's own refusals before a run has begun: a SAM is built over stand-ins and thrown away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpost.sam import SAM


def refuse_early(keywords: dict[str, Any], params: list[Tensor] | None = None, *, moves: bool = True) -> None:
    """Raises what SAM will raise for these keywords, as far as it can be known now.

    Args:
        keywords: those of `fastpost.SAM` but params and the base optimizer.
        params: that will be stepped; None where there is no model yet: one of two bfloat16 weights then stands in for it,
            and what is in scope is not asked.
        moves: whether the parameters go to an accelerator later, where stash="cpu" serves them.
    """
    stands_in: dict[str, Any] = {}
    if params is None:  # by way of meta, where no random number is drawn
        model = torch.nn.Linear(1, 1, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
        params, stands_in = list(model.parameters()), {"scope": None, "model": model}
    if moves and keywords.get("stash") == "cpu":
        stands_in["stash"] = "copy"
    SAM(None, torch.optim.SGD(params, lr=0.0), **{**keywords, **stands_in})
