"""The one text that GAP climbs on: checked, and freed of padding."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def prepare(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, max_tokens: int | None = None) -> Tensor:
    """The text's own tokens as int64 of shape (1, n), n >= 2, on the device of the model's embedding.

    Padding is cut off rather than masked, so that neither its length nor its side can reach positions, attention or loss.

    Args:
        model: gives the vocabulary, the longest text and, where no mask is given, the padding token.
        input_ids: integer tensor, (T,) or (1, T).
        max_tokens: longer texts are cut on the left, as the authors do, and to the model's positions; a warning says so.
        attention_mask: of the same shape, nonzero = text. None: runs of `model.config.pad_token_id` at either end, if the
            model has one, are padding.

    Raises:
        TypeError: no tensor, or not of an integer dtype.
        ValueError: several texts, an empty or all-padding one, one token only, a mask that does not fit or has holes, tokens
            outside the vocabulary.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"GAP: input_ids must be a tensor of token ids, not {type(input_ids).__name__}")
    if input_ids.dtype not in _INTEGERS:
        raise TypeError(f"GAP: input_ids must be integers, not {input_ids.dtype}")
    if input_ids.ndim not in (1, 2) or (input_ids.ndim == 2 and input_ids.shape[0] > 1):
        raise ValueError(f"GAP works on one text, of shape (T,) or (1, T); input_ids has shape {tuple(input_ids.shape)}")
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(f"GAP: attention_mask ({shape}) does not fit input_ids of shape {tuple(input_ids.shape)}")
        counts = attention_mask.reshape(-1).cpu() != 0
    else:
        counts = input_ids.reshape(-1).cpu() != (pad if pad is not None else -1)
    ids = input_ids.reshape(-1)
    where = counts.nonzero().reshape(-1)
    if where.numel() == 0:
        raise ValueError("GAP: the text is empty" if ids.numel() == 0 else "GAP: the text is nothing but padding")
    first, last = int(where[0]), int(where[-1]) + 1
    if attention_mask is not None and last - first != where.numel():
        raise ValueError("GAP: attention_mask has holes inside the text; only padding at its ends can be left out")
    ids = ids[first:last]
    if ids.numel() < 2:
        raise ValueError("GAP: the text has a single token, so there is none to predict; at least two are needed")
    embedding = _embedding(model)
    vocabulary = embedding.weight.shape[0] if embedding is not None else getattr(config, "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        bad = low if low < 0 else high
        raise ValueError(
            f"GAP: token {bad} is not in the model's vocabulary of {vocabulary}; do tokenizer and model belong together?"
        )
    positions = getattr(config, "max_position_embeddings", None)
    limits = [n for n in (max_tokens, positions) if isinstance(n, int)]
    if limits and ids.numel() > min(limits):
        warnings.warn(
            f"GAP: the text has {ids.numel()} tokens; its last {min(limits)} are used ("
            f"{'max_tokens' if min(limits) == max_tokens else 'the positions that the model has'})",
            stacklevel=3,
        )
        ids = ids[-min(limits) :]
    device = embedding.weight.device if embedding is not None else next(model.parameters()).device
    return ids.to(device=device, dtype=torch.int64).unsqueeze(0)


def _embedding(model: nn.Module) -> nn.Embedding | None:
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    return embedding if isinstance(embedding, nn.Embedding) else None


class CausalLoss:
    """Mean cross-entropy of each token given those before it, the causal-LM loss of a text without padding.

    Args:
        model: called with the ids (by the name `input_ids` where it has that) and a mask of ones where it takes one; returns
            logits of shape (1, n, V), or an object with `.logits`, or a tuple that begins with them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._by_name = "input_ids" in parameters or anything
        # Without a mask, transformers warns of padding in any text that ends with the padding token.
        self._takes_mask = "attention_mask" in parameters or anything
        self._takes_cache = "use_cache" in parameters

    def __call__(self, ids: Tensor) -> Tensor:
        """Scalar loss in nats per token, float32 (float64 for float64 logits), of ids of shape (1, n)."""
        keywords: dict[str, Any] = {"input_ids": ids} if self._by_name else {}
        if self._takes_mask:
            keywords["attention_mask"] = torch.ones_like(ids)
        if self._takes_cache:
            keywords["use_cache"] = False
        output = self._model(**keywords) if self._by_name else self._model(ids, **keywords)
        logits = getattr(output, "logits", output)
        if isinstance(logits, tuple | list):
            logits = logits[0]
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"GAP needs a causal language model, with logits of shape (1, {ids.shape[1]}, V), not {shape}")
        scores = logits[0, :-1]
        return F.cross_entropy(scores if scores.dtype == torch.float64 else scores.float(), ids[0, 1:].to(scores.device))
