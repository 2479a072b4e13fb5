"""What GAP refuses before it begins: options out of range, models whose weights cannot be moved."""

from __future__ import annotations

import functools
import math
import numbers
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.distributed import is_a, is_sharded, unwrap


def real(value: object) -> bool:
    """Whether this is a real number, True and False not counted."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless value is a whole number >= least."""
    if type(value) is bool or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"GAP: {name} must be a whole number >= {least}, not {value!r}")


def check_adam(lr: float, betas: tuple[float, float], eps: float) -> None:
    """Raises ValueError for what Adam cannot use."""
    for name, value in (("lr", lr), ("eps", eps)):
        if not (real(value) and 0 < value < math.inf):
            raise ValueError(f"GAP: {name} must be finite and > 0, not {value!r}")
    if len(betas) != 2 or not all(real(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"GAP: betas must be two numbers in [0, 1), not {betas!r}")


def check_bounds(bounds: Mapping[str, float | None]) -> None:
    """Raises ValueError for a bound that is neither None nor > 0."""
    for name, bound in bounds.items():
        if bound is not None and not (real(bound) and bound > 0):
            raise ValueError(f"GAP: {name} must be > 0 or None, not {bound!r}")


def check_callables(evaluate: Any, test: Any, allow_leak: bool) -> None:
    """Raises TypeError for what cannot be called, ValueError where a state would be chosen on what is reported."""
    for name, function in (("evaluate", evaluate), ("test", test)):
        if function is not None and not callable(function):
            raise TypeError(f"GAP: {name} must be a function of the model, not {type(function).__name__}")
    if test is not None and _same(test, evaluate) and not allow_leak:
        raise ValueError(
            "GAP: test and evaluate are the same object, or the same method or partial of it, so the state would be chosen "
            "on the scores that are reported; give test other data, or allow_leak=True"
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two things are one: the same object, method of one object, partial of equal parts, or equal value."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, types.MethodType):  # every access makes a new one
        return bool(a == b)
    if isinstance(a, functools.partial):
        return _same(a.func, b.func) and _same(a.args, b.args) and _same(a.keywords, b.keywords)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    return isinstance(a, str | bytes | numbers.Number) and bool(a == b)


def movable_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that an ascent moves: those with `requires_grad`.

    Raises:
        ValueError: there are none, they are sharded, or the model's weights are quantised for evaluation: integers that no
            gradient reaches (only norms and embeddings would move), or moved by adapters at most, of which there are none.
    """
    how = _quantised(model)
    if how is not None:
        raise ValueError(
            f"GAP: the model's weights are quantised ({how}): no step can be made in them. Load the model unquantised, in "
            "float32 or 16 bits, or climb with adapters on top (PEFT), where the quantisation allows to train these"
        )
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("GAP: the model has no weights with requires_grad; there is nothing to move")
    if any(is_sharded(p) for p in weights):
        raise ValueError(
            "GAP: the model's weights are sharded (DTensor). One text is no work for many ranks: run it on the whole model, "
            "one text per rank; signs for micro-batches in a sharded loop are SignedWindow's"
        )
    return weights


def check_causal(who: str, model: object) -> None:
    """Refuses transformers' encoder-decoders, and those of its models that read a text in both directions: what they predict
    they have seen. Other modules are served as they are; of them nothing is known.

    Raises:
        ValueError: such a model, by itself or inside of torch.compile, DDP and PEFT, however these are nested.
    """
    inner = unwrap(model)
    if hasattr(inner, "peft_config") and callable(getattr(inner, "get_base_model", None)):
        inner = unwrap(inner.get_base_model())
    if not is_a("PreTrainedModel", "transformers.modeling_utils", inner):
        return
    told = f"{who} needs a causal language model, which predicts each token from those before it: {type(inner).__name__} is "
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(f"{told}an encoder-decoder; use a decoder alone, such as AutoModelForCausalLM loads")
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    both_ways: set[str] = set()
    for kind, masked in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.items():
        for names in (masked, causal.get(kind, ())):  # of one body, whose config says how it reads
            both_ways.update((names,) if isinstance(names, str) else names)
    one_way = any(getattr(inner.config, name, False) for name in ("is_decoder", "causal", "is_causal"))
    if not one_way and not both_ways.isdisjoint(cls.__name__ for cls in type(inner).__mro__):
        raise ValueError(
            f"{told}set to read in both directions; use a decoder, or where this one was trained as such set "
            "is_decoder=True in its config before it is loaded"
        )


def _quantised(model: nn.Module) -> str | None:
    """What keeps the weights from being moved, in a few words; None where nothing does."""
    for module in model.modules():
        # torch's own and torchao's module swaps; their integers are buffers or packed, never parameters
        if ".nn.quantized" in type(module).__module__:
            return f"{type(module).__module__.split('.')[0]}'s quantised {type(module).__name__}"
    for part in model.modules():  # PEFT wraps the model that was loaded
        quantizer = getattr(part, "hf_quantizer", None)
        if quantizer is None:
            continue
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", type(quantizer).__name__)
        method = str(getattr(method, "value", method))
        if not quantizer.is_trainable:
            return f"{method}, for evaluation only"
        inside = getattr(part, "_hf_peft_config_loaded", False)
        adapted = inside or any(hasattr(module, "peft_config") for module in model.modules())  # also below DDP
        if not adapted:
            return f"{method}, without adapters"
    return None


def trained_parameters(who: str, model: object) -> list[Tensor]:
    """The parameters of a module, or those given, that require gradients; a tied weight counts once.

    Raises:
        TypeError: neither a module nor parameters. ValueError: none requires a gradient.
    """
    wrong = TypeError(f"{who}: model must be a torch.nn.Module or its parameters, not {type(model).__name__}")
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    if not isinstance(parameters, Iterable) or isinstance(parameters, Tensor):
        raise wrong
    found: dict[int, Tensor] = {}
    for p in parameters:
        if not isinstance(p, Tensor):
            raise wrong
        if p.requires_grad:
            found[id(p)] = p
    if not found:
        raise ValueError(f"{who}: no parameter requires a gradient")
    return list(found.values())
