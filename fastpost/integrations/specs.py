"""Options that name a class and set its parameters in one word: `gsam:alpha=0.2`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from fastpost.errors import unknown
from fastpost.r3f import relatives
from fastpost.sam import Variant, variants

# Every variant of SAM and every relative of R3F, by its name in lower case.
VARIANTS: dict[str, type] = {
    cls.__name__.lower(): cls
    for cls in vars(variants).values()
    if isinstance(cls, type) and issubclass(cls, Variant) and cls is not Variant
}
RELATIVES: dict[str, type] = {name.lower(): getattr(relatives, name) for name in sorted(relatives.__all__, key=str.lower)}
# Variants that a trainer's loop cannot serve, and what does.
OF_LOOPS: dict[str, str] = {
    "zerothordersam": "estimates its direction from losses, in a call before each step; in a loop of your own build "
    "SAM(..., variant=ZerothOrderSAM()). A trainer's variant with one gradient is momentumsam",
    "decoupledwsam": "steps beside the base optimizer, and a trainer steps its own; in a loop of your own build SAM(..., "
    "variant=DecoupledWSAM()) and attach it. A trainer's form is wsam, which for SGD without momentum is the same",
}
OF_RELATIVES = ("embedding", "seed", "fused_linear")  # parameters that are options of R3F already

_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "words with + between"}


def name_in(text: str) -> str:
    """The name that a word begins with."""
    return text.partition(":")[0].strip().lower()


def parameters_of(cls: type, given: Collection[str] = ()) -> dict[str, Any]:
    """The parameters of a class that can be written in a word, with their defaults: numbers, words, truth values.

    Args:
        given: parameters that come from elsewhere.
    """
    found = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in found if p.name not in given and isinstance(p.default, tuple(_KINDS))}


def shown(classes: Mapping[str, type], given: Collection[str] = ()) -> str:
    """All there is to write, with defaults: `gsam:alpha=0.1, tram`."""
    return ", ".join(_written(name, parameters_of(cls, given)) for name, cls in classes.items())


def _written(name: str, values: Mapping[str, Any]) -> str:
    texts = [f"{key}={'+'.join(value) if isinstance(value, tuple) else value}" for key, value in values.items()]
    return f"{name}:{','.join(texts)}" if texts else name


def build(option: str, text: str, classes: Mapping[str, type], **given: Any) -> Any:
    """The object that a word describes.

    Args:
        option: whose value it is, for errors.
        text: a name, and after a colon `parameter=value` with commas between.
        classes: by their names.
        given: values of parameters that come from elsewhere; those that the class does not have are left out.

    Raises:
        ValueError: a class or a parameter that does not exist, a value that is none or out of range.
    """
    name = name_in(text)
    _, colon, rest = text.partition(":")
    if classes is VARIANTS and name in OF_LOOPS:
        raise ValueError(f"{option}: {name} {OF_LOOPS[name]}")
    if name not in classes:
        raise unknown(option, name, classes)
    cls = classes[name]
    own = parameters_of(cls, given)
    values: dict[str, Any] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(
                f"{option}: cannot read {part!r} in {text!r}; parameters are written {_written(name, own) if own else name}"
            )
        if key not in own:
            if not own:
                raise ValueError(f"{option}: {name} has no parameters, and {key} was given")
            raise unknown(f"parameter of {name}", key, own)
        if key in values:
            raise ValueError(f"{option}: {key} is set twice in {text!r}")
        values[key] = _read(f"{option}: {key} of {name}", value, type(own[key]))
    served = inspect.signature(cls).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in served.values())
    try:
        return cls(**values, **{key: value for key, value in given.items() if free or key in served})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{option}={text!r}: {error}") from None


def _read(what: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return _TRUTH[text.lower()]
        if kind is tuple:
            return tuple(word for word in text.split("+") if word)
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{what} must be {_KINDS[kind]}, not {text!r}") from None
