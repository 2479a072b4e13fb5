"""Hidden states instead of logits: a model's output head, taken out for the length of a forward pass."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpost.r3f.conventions import logits_of

# Models whose way from head to logits has been looked at and is known.
_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Head(NamedTuple):
    """A linear head, and what its model does to the logits after it.

    Attributes:
        linear: the module; its weight is (vocab, width).
        extra_bias: a bias that the model adds itself (BART's final_logits_bias), (1, vocab), or None.
        softcap, temperature: as in `linear_r3f_loss`.
    """

    linear: nn.Linear
    extra_bias: Tensor | None
    softcap: float | None
    temperature: float

    @property
    def bias(self) -> Tensor | None:
        own: Tensor | None = self.linear.bias
        if self.extra_bias is None:
            return own
        extra = self.extra_bias.reshape(-1)
        return extra if own is None else own + extra

    def after(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's output."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1 else logits / self.temperature


def find_head(root: Any) -> Head:
    """The output head of a model.

    Raises:
        ValueError: no output embeddings, or they are no plain nn.Linear.
    """
    get = getattr(root, "get_output_embeddings", None)
    linear = get() if callable(get) else None
    # FSDP2 gives its modules classes of their own; what counts is the forward pass.
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward or "forward" in linear.__dict__:
        kind = "missing" if linear is None else type(linear).__name__
        raise ValueError(
            f"R3F: fused_linear needs a model whose get_output_embeddings() is a plain nn.Linear; in "
            f"{type(root).__name__} it is {kind}. Without fused_linear any head serves"
        )
    owner = root.get_base_model() if callable(getattr(root, "get_base_model", None)) else root  # PEFT
    config = getattr(owner, "config", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    temperature = getattr(config, "logits_scaling", None) or 1.0
    extra = getattr(owner, "final_logits_bias", None)
    return Head(linear, extra if isinstance(extra, Tensor) else None, softcap, temperature / scale)


def fused_head(model: Any, root: Any) -> Head:
    """`find_head` of a model whose head's weight is to be used outside of its forward pass.

    Args:
        model: with its wrappers. root: without them.

    Raises:
        ValueError: as `find_head`; DistributedDataParallel that looks for unused parameters.
    """
    if getattr(model, "find_unused_parameters", False):
        raise ValueError(
            "R3F: fused_linear uses the head's weight outside of the forward pass, which DistributedDataParallel "
            "refuses under find_unused_parameters=True; leave that off, or use fused_linear=False"
        )
    return find_head(root)


class Captured:
    """The hidden states that reached the head."""

    states: Tensor | None = None


@contextlib.contextmanager
def bypass_head(root: Any, head: Head) -> Iterator[Captured]:
    """While open, the head hands its input on as it is, so that a forward pass ends with hidden states.

    They travel through the model's output rather than past it: wrappers (DDP, FSDP2) hang their backward hooks on that.
    """
    found = Captured()

    def hand_on(input: Tensor) -> Tensor:  # nn.Linear.forward's own argument name
        if found.states is not None:
            raise ValueError("R3F: the head runs more than once in a forward pass, so fused_linear cannot serve this model")
        found.states = input
        return input

    owner = root.get_base_model() if callable(getattr(root, "get_base_model", None)) else root
    head.linear.__dict__["forward"] = hand_on  # shadows the class's method; hooks of others still run around it
    if head.extra_bias is not None:
        owner.final_logits_bias = head.extra_bias.new_zeros(1, 1)
    try:
        yield found
    finally:
        head.linear.__dict__.pop("forward", None)
        if head.extra_bias is not None:
            owner.final_logits_bias = head.extra_bias


def hidden_of(root: Any, head: Head, output: Any, captured: Captured) -> Tensor:
    """The hidden states in what a model returned while its head was out, (..., width).

    What stands where logits are expected has passed through all that the model does after its head; the first time, it is
    compared with what is known of that.

    Raises:
        ValueError: the head did not run, or the model changes its logits in a way that is not known here.
    """
    states, returned = captured.states, logits_of(output)
    if states is None:
        raise ValueError("R3F: the output head was not called in the forward pass, so fused_linear cannot serve this model")
    if root not in _known:
        with torch.no_grad():
            expected = head.after(states.detach().float())
            if returned.shape != states.shape or not torch.allclose(returned.float(), expected, rtol=2e-2, atol=1e-5):
                raise ValueError(
                    f"R3F: {type(root).__name__} changes its logits after the head in a way that fused_linear does not "
                    "know; use fused_linear=False"
                )
        _known.add(root)
    # Untouched, the output itself: hooks that wrappers put on it then see the backward pass begin.
    return returned if head.softcap is None and head.temperature == 1 and returned.dtype == states.dtype else states


def last_stream(model: Any, root: Any, head: Head | None, inputs: dict[str, Any]) -> Tensor:
    """One forward pass: its logits, or with a head the hidden states that reach it, (..., width)."""
    if head is None:
        return logits_of(model(**inputs))
    with bypass_head(root, head) as captured:
        output = model(**inputs)
    return hidden_of(root, head, output, captured)
