"""Bounds on an ascent: each state is measured before it counts, and one that breaks a bound is taken back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpost.gap.delta import stack_of
from fastpost.gap.weights import Snapshot


class Probe:
    """How far a model's predictions have moved from those that it began with: KL(start || now) on a batch, nats per token.

    Args:
        model: as it is now, in eval mode; its predictions on the batch are kept (batch * time * vocabulary numbers).
        batch: token ids (batch, time), or a mapping of the model's inputs. Positions whose `attention_mask` is 0 do not
            count.

    Raises:
        ValueError: the batch is empty or none of its tokens counts, or the model gives no logits (batch, time, vocabulary).
    """

    def __init__(self, model: nn.Module, batch: Tensor | Mapping[str, Any]) -> None:
        inputs: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        inputs.pop("labels", None)
        device = next(model.parameters()).device
        self._inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        if "use_cache" in inspect.signature(model.forward).parameters:
            self._inputs.setdefault("use_cache", False)
        ids = self._inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
            raise ValueError("GAP: probe must be token ids of shape (batch, time), or a mapping with such input_ids")
        mask = self._inputs.get("attention_mask")
        self._counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device) != 0
        if self._counts.shape != ids.shape or not bool(self._counts.any()):
            raise ValueError(
                f"GAP: probe's attention_mask, of shape {tuple(self._counts.shape)}, must have the shape of its input_ids, "
                f"{tuple(ids.shape)}, and leave at least one token to count"
            )
        self._start = self._log_probabilities(model)

    @torch.no_grad()
    def _log_probabilities(self, model: nn.Module) -> Tensor:
        """(tokens that count, vocabulary)."""
        output = model(**self._inputs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != self._counts.shape:
            raise ValueError("GAP: the model returns no logits of shape (batch, time, vocabulary) for the probe")
        return F.log_softmax(logits[self._counts].float(), dim=-1)

    @torch.no_grad()
    def kl(self, model: nn.Module) -> float:
        """KL(start || now), averaged over the tokens that count; never negative but for rounding."""
        absent = self._start == -math.inf  # of a class that was never there 0 * log(0 / q) is 0
        now, start = (x.masked_fill(absent, 0.0) for x in (self._log_probabilities(model), self._start))
        return float(F.kl_div(now, start, log_target=True, reduction="sum").double() / len(now))


def layer_drifts(model: nn.Module, base: Snapshot) -> dict[str, float]:
    """2-norm of what each layer of the model's largest stack has moved, and of each weight outside of it, by name."""
    try:
        blocks = list(stack_of(model))
    except ValueError:
        blocks = []
    return base.distances(model, lambda name: next((block for block in blocks if name.startswith(f"{block}.")), name))
