"""Hidden states instead of logits: a model's output head, taken out for the length of a forward pass."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpost.r3f.conventions import accelerators, logits_of, text_config
from fastpost.rng import RandomState

# What models do to their logits, as it was seen: by what was asked, the cap and the temperature, or why no head serves.
_seen: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[float | None, float] | str]] = weakref.WeakKeyDictionary()

# Of the machine, and not of the model.
_FAILURES = (
    torch.OutOfMemoryError,
    torch.AcceleratorError,
    MemoryError,
    *((dist.DistError,) if dist.is_available() else ()),
)

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # names in transformers' configs


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


def linear_head(root: Any) -> nn.Linear:
    """The output head of a model without its wrappers.

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
    return linear


def find_head(root: Any, inputs: dict[str, Any]) -> Head:
    """The output head of a model, and what the model does to its logits.

    The first time, the model runs once on these inputs, without a graph and with a stand-in for a few rows of logits; what
    becomes of the stand-in is compared with the caps and scales that the model's configs name. Random numbers and buffers
    are put back, and a cache among the inputs stays as it is. A pass that fails is no answer: the next call asks again.

    Args:
        root: a model without its wrappers. inputs: of its forward pass, without labels.

    Raises:
        ValueError: no output embeddings, or they are no plain nn.Linear; the head does not run, or runs twice; the model
            changes its logits in another way; what it does to three rows of logits fails.
        torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError, MemoryError: as the pass raised it.
    """
    linear = linear_head(root)
    extra = getattr(_owner(root), "final_logits_bias", None)
    plain = Head(linear, extra if isinstance(extra, Tensor) else None, None, 1.0)
    ways = _ways(getattr(_owner(root), "config", None))
    asked = (linear.weight.shape, ways, getattr(root, "training", None))  # in eval mode a model may do something else
    seen = _seen.setdefault(root, {})
    if asked not in seen:
        seen[asked] = _way_of(root, plain, ways, inputs)
    way = seen[asked]
    if isinstance(way, str):
        raise ValueError(way)
    return plain._replace(softcap=way[0], temperature=way[1])


def fused_head(model: Any, root: Any, inputs: dict[str, Any]) -> Head:
    """`find_head` of a model whose head's weight is to be used outside of its forward pass.

    Args:
        model: with its wrappers. root: without them. inputs: as in `find_head`.

    Raises:
        ValueError: as `find_head`; DistributedDataParallel that looks for unused parameters.
    """
    if getattr(model, "find_unused_parameters", False):
        raise ValueError(
            "R3F: fused_linear uses the head's weight outside of the forward pass, which DistributedDataParallel "
            "refuses under find_unused_parameters=True; leave that off, or use fused_linear=False"
        )
    return find_head(root, inputs)


def _owner(root: Any) -> Any:
    """The model inside PEFT's."""
    return root.get_base_model() if callable(getattr(root, "get_base_model", None)) else root


def _ways(config: Any) -> tuple[tuple[float | None, float], ...]:
    """Caps and temperatures that a config or its parts for text name, and none; the model may have any of them."""
    parts = (config, text_config(config), getattr(config, "decoder", None))
    caps: list[float | None] = [cap for part in parts for name in _CAPS if (cap := _number(part, name)) is not None]
    temperatures = []
    for part in parts:
        scale = _number(part, "logit_scale") or _number(part, "lm_head_multiplier") or 1.0
        divisor = _number(part, "logits_scaling") or 1.0
        temperatures += [divisor / scale, 1 / divisor / scale]  # HyperCLOVA X multiplies by what Granite divides by
    return tuple((cap, t) for cap in dict.fromkeys([*caps, None]) for t in dict.fromkeys([*temperatures, 1.0]))


def _number(part: Any, name: str) -> float | None:
    """A positive number of a config."""
    value = getattr(part, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _way_of(
    root: Any, head: Head, ways: tuple[tuple[float | None, float], ...], inputs: dict[str, Any]
) -> tuple[float | None, float] | str:
    """The cap and the temperature with which the model treats a stand-in for its logits, or why no head serves.

    What is returned holds for the model. What is raised may hold for these inputs or this moment alone.
    """
    stand_in = _stand_in(head)
    buffers = [(b, b.clone()) for b in root.buffers()] if isinstance(root, nn.Module) else []
    random, captured = RandomState(accelerators(root)), Captured()

    def hand_on(states: Tensor) -> Tensor:
        # A learnt scale may be 1 as yet. It shows by the graph that it begins.
        torch.set_grad_enabled(True)
        return stand_in.to(states.device).reshape(*(1,) * (states.ndim - 2), *stand_in.shape).clone()

    try:
        with warnings.catch_warnings(), torch.no_grad(), _in_place_of(head.linear, hand_on, captured):
            warnings.simplefilter("ignore")  # such as that nothing wants a gradient; the first step warns of the rest
            output = root(**_shielded(inputs))
    except Exception as error:
        if captured.states is None or isinstance(error, _FAILURES):
            raise
        if str(error) == _CALLED_AGAIN:
            return _CALLED_AGAIN
        raise ValueError(_unknown(root, f"a few rows of logits end in {type(error).__name__}")) from error
    finally:
        random.put()
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    if captured.states is None:
        return _NOT_CALLED
    found = logits_of(output)
    if found.shape[-1] != stand_in.shape[-1] or found.numel() != stand_in.numel():
        made = f"{found.shape[-1]} classes" if found.shape[-1] != stand_in.shape[-1] else "other rows"
        return _unknown(root, f"of its head's {stand_in.shape[-1]} classes it makes {made}")
    if found.requires_grad and not (head.extra_bias is not None and head.extra_bias.requires_grad):
        return _unknown(root, "a trained parameter takes part")
    with torch.no_grad():
        found = found.reshape(stand_in.shape)
        # As exact as its dtype, through a few operations and another tanh.
        rtol = max(4 * torch.finfo(found.dtype).eps, 1e-5)
        logits = stand_in.to(found.device)
        if head.extra_bias is not None:
            logits = logits + head.extra_bias.reshape(-1).to(logits)
        for cap, temperature in ways:
            expected = head._replace(softcap=cap, temperature=temperature).after(logits)
            if torch.allclose(found.to(expected.dtype), expected, rtol=rtol, atol=1e-7):
                return cap, temperature
    return _unknown(root, "no cap or scale of its config explains them")


def _shielded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, with copies of those that a pass may change, such as a cache (past_key_values).

    What cannot be copied, such as a cache with a graph, is left out.
    """
    shielded = {}
    for name, value in inputs.items():
        if not _of_tensors(value):
            try:
                value = copy.deepcopy(value)
            except Exception:
                continue
        shielded[name] = value
    return shielded


def _of_tensors(value: Any) -> bool:
    """Whether an input is made of tensors and constants alone."""
    if isinstance(value, Mapping):
        return all(map(_of_tensors, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_of_tensors, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _stand_in(head: Head) -> Tensor:
    """Three rows for logits, (3, vocab): numbers of either sign between 1e-2 and 1e4, no two alike, the same with the other
    sign, and zeros. A cap shows by the large ones, a bias by the zeros, a mask or a scale anywhere."""
    classes = head.linear.weight.shape[0]
    place = torch.arange(classes, dtype=torch.float64)
    values = 10 ** ((place * 0.6180339887498949) % 1 * 6 - 2) * (1 - 2 * (place % 2))
    rows = torch.stack((values, -values, torch.zeros_like(values)))
    return rows.to(torch.promote_types(head.linear.weight.dtype, torch.float32))


def _unknown(root: Any, how: str) -> str:
    return (
        f"R3F: {type(root).__name__} changes its logits after the head in a way that fused_linear does not know ({how}); "
        "use fused_linear=False"
    )


_CALLED_AGAIN = "R3F: the head runs more than once in a forward pass, so fused_linear cannot serve this model"
_NOT_CALLED = "R3F: the output head was not called in the forward pass, so fused_linear cannot serve this model"


class Captured:
    """The hidden states that reached the head."""

    states: Tensor | None = None


@contextlib.contextmanager
def _in_place_of(linear: nn.Linear, instead: Any, captured: Captured) -> Iterator[None]:
    """While open, the head calls this with its input, which is noted, once."""

    def forward(input: Tensor) -> Tensor:  # nn.Linear.forward's own argument name
        if captured.states is not None:
            raise ValueError(_CALLED_AGAIN)
        captured.states = input
        handed: Tensor = instead(input)
        return handed

    linear.__dict__["forward"] = forward  # shadows the class's method; hooks of others still run around it
    try:
        yield
    finally:
        linear.__dict__.pop("forward", None)


@contextlib.contextmanager
def bypass_head(root: Any, head: Head) -> Iterator[Captured]:
    """While open, the head hands its input on as it is, so that a forward pass ends with hidden states.

    They travel through the model's output rather than past it: wrappers (DDP, FSDP2) hang their backward hooks on that.
    """
    found, owner = Captured(), _owner(root)
    if head.extra_bias is not None:
        owner.final_logits_bias = head.extra_bias.new_zeros(1, 1)
    try:
        with _in_place_of(head.linear, lambda states: states, found):
            yield found
    finally:
        if head.extra_bias is not None:
            owner.final_logits_bias = head.extra_bias


def hidden_of(head: Head, output: Any, captured: Captured) -> Tensor:
    """The hidden states in what a model returned while its head was out, (..., width).

    Raises:
        ValueError: the head did not run.
    """
    states, returned = captured.states, logits_of(output)
    if states is None:
        raise ValueError(_NOT_CALLED)
    # Untouched, the output itself: hooks that wrappers put on it then see the backward pass begin.
    return returned if head.softcap is None and head.temperature == 1 and returned.dtype == states.dtype else states


def last_stream(model: Any, root: Any, head: Head | None, inputs: dict[str, Any]) -> Tensor:
    """One forward pass: its logits, or with a head the hidden states that reach it, (..., width)."""
    if head is None:
        return logits_of(model(**inputs))
    with bypass_head(root, head) as captured:
        output = model(**inputs)
    return hidden_of(head, output, captured)
