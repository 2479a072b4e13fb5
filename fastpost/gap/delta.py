"""After a run: what it changed, scaled, reflected or faded out with depth, in place, and without a second model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.gap.weights import memory, write_tensors


class Delta:
    """weights - base of a model, held as the weights and a copy of the base.

        result = gap(model, text)
        delta = result.delta(model)
        delta.scale_(0.5)                # halfway back
        delta.scale_(-1.0)               # reflected: task negation
        delta.lines_(0.3, 0.7)           # LiNeS: 0.3 of it in the first layer, all of it in the last
        delta.save("text.safetensors")   # another run from the same base can merge_ it

    Every call starts from the delta as it is now, in the parameters that the model has now. One pass over memory, two reads
    and one write: base + factor * delta, exact at 0 (the base, bit for bit) and at 1 (nothing changes, bit for bit). The
    model is a plain one all the time: save it as ever.

    Args:
        model: holds the weights, by name.
        base: copies of its weights before the run, by name; those that have none stay as they are.

    Raises:
        ValueError: no weight has a copy, or a copy's shape, dtype or device is not its weight's.
    """

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor]) -> None:
        self._model = model
        names = _names(dict(model.named_parameters(remove_duplicate=False)), base)
        # Under every name: weights that are tied now may have parameters of their own later.
        self._base = {name: base[known] for name, known in names.items() if known in base}
        if not self._base:
            raise ValueError("Delta: no weight of the model has a copy in base")
        self._present()

    def _present(self) -> tuple[dict[str, str], dict[str, tuple[Tensor, Tensor]]]:
        """Every name of a weight with the one that it goes by here (an output head may be tied to the embedding), and by the
        latter the weight and its copy.

        Raises:
            ValueError: a weight and its copy do not fit, or the weight is gone.
        """
        here = dict(self._model.named_parameters(remove_duplicate=False))
        names = _names(here, self._base)
        missing = [name for name in self._base if name not in here]
        if missing:
            raise ValueError(f"Delta: the model has no weight {missing[0]!r} any more; build the delta anew")
        pairs: dict[str, tuple[Tensor, Tensor]] = {
            name: (here[name], b) for name, b in self._base.items() if names[name] == name
        }
        for name, (p, b) in pairs.items():
            if (p.shape, p.dtype, p.device) != (b.shape, b.dtype, b.device):
                now, then = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (p, b))
                raise ValueError(f"Delta: {name} is {now}, its copy {then}; convert the model back (model.to(...))")
        return names, pairs

    @torch.no_grad()
    def scale_(self, factor: float | Mapping[str, float]) -> None:
        """weights = base + factor * (weights - base), in place.

        Args:
            factor: one number, or one per name; names that it lacks stay as they are.

        Raises:
            ValueError: a factor that is not finite, or an unknown name. TypeError: a factor that is no number. Nothing is
                written then.
        """
        _, pairs = self._present()
        given = factor if isinstance(factor, Mapping) else dict.fromkeys(pairs, factor)
        for name in given:
            if name not in pairs:
                raise ValueError(f"Delta: {name!r} is none of the weights with a copy")
        factors = {name: _finite("a factor", value) for name, value in given.items()}
        for name, value in factors.items():
            p, base = pairs[name]
            if value == 1:
                continue
            if value == 0:
                p.copy_(base)
            else:
                p.lerp_(base, 1 - value)

    def lines_(self, alpha: float | None = None, beta: float | None = None) -> dict[str, float]:
        """LiNeS (2410.17146): layer l of L keeps alpha + beta * l / (L - 1) of its delta, everything else alpha.

        The layers are those of the model's largest stack; in an encoder-decoder, encoder and decoder are counted each by
        itself.

        Args:
            alpha: >= 0; None: 0.5. beta: >= 0; None: 1 - alpha, as the paper takes for a single task.

        Returns:
            The factor of each weight, by name.

        Raises:
            ValueError: alpha or beta out of range; no stack of at least two layers in the model.
        """
        alpha = 0.5 if alpha is None else alpha
        beta = 1 - alpha if beta is None else beta
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Delta: {name} must be finite and >= 0, not {value}")
        stacks = stacks_of(self._model)
        depth = {block: at / (len(stack) - 1) for stack in stacks for at, block in enumerate(stack)}
        factors = {}
        for name in self._present()[1]:
            at = next((at for block, at in depth.items() if name.startswith(f"{block}.")), None)
            factors[name] = alpha if at is None else alpha + beta * at
        self.scale_(factors)
        return factors

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """weights - base by name, as new tensors, 16-bit ones in float32: what `merge_` of another run's delta takes.

        A tied weight is there under each of its names, as one tensor.
        """
        names, pairs = self._present()
        own = {name: p.sub(b) if p.dtype.itemsize >= 4 else p.float().sub_(b) for name, (p, b) in pairs.items()}
        return {name: own[known] for name, known in names.items() if known in own}

    def save(self, path: str | Path) -> None:
        """Writes `tensors()` as a safetensors file, whole or not at all.

        Raises:
            ModuleNotFoundError: safetensors is not installed. OSError: the file cannot be written.
        """
        found = self.tensors()
        tied = {name: known for name, known in self._present()[0].items() if name != known and name in found}
        once = {name: d for name, d in found.items() if name not in tied}
        write_tensors(Path(path), once, {"tied": json.dumps(tied)})

    @torch.no_grad()
    def merge_(self, other: Mapping[str, Tensor] | str | Path, weight: float = 1.0) -> None:
        """weights += weight * other, in place: the sum of several runs' deltas from one base (task arithmetic, 2212.04089).

        Args:
            other: another delta's `tensors()`, or the file that its `save` wrote. Weights that it lacks stay as they are. A
                weight that was tied there and is not here moves under both names.
            weight: finite.

        Raises:
            ValueError: a weight or a delta that is not finite, a name that has no copy in base, a shape that does not fit,
                a delta of another kind of numbers than its weight (complex, whole, bool), two deltas for what is one tied
                weight here. TypeError: a delta that is no tensor, or a weight that is no number. Nothing is written then.
        """
        weight = _finite("a weight", weight)
        if not isinstance(other, Mapping):
            other = _read(other)
        names, pairs = self._present()
        moves: dict[str, Tensor] = {}
        for name, d in other.items():
            known = names.get(name)
            if known not in pairs:
                raise ValueError(f"Delta: {name!r} is none of the weights with a copy")
            if not isinstance(d, Tensor):
                raise TypeError(f"Delta: the other delta's {name} is a {type(d).__name__}, not a tensor")
            here = pairs[known][0]
            if d.shape != here.shape:
                raise ValueError(f"Delta: {name} is {tuple(here.shape)}, the other delta's {tuple(d.shape)}")
            if (d.is_floating_point(), d.is_complex()) != (here.is_floating_point(), here.is_complex()):
                raise ValueError(f"Delta: {name} is {here.dtype}, the other delta's {d.dtype}; give one of its kind")
            if not bool(torch.isfinite(d if d.layout == torch.strided else d.to_dense()).all()):
                raise ValueError(f"Delta: the other delta's {name} is not finite")
            if known in moves and not torch.equal(moves[known], d):
                raise ValueError(
                    f"Delta: {name} is tied to {known} in this model, and the other delta moves them apart; untie them "
                    "first (tie_word_embeddings=False)"
                )
            moves[known] = d
        for name, d in moves.items():
            p = pairs[name][0]
            p.add_(d.to(p.device), alpha=weight)

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """2-norm of each weight's delta, by name; differences in float32 or wider."""
        return {
            name: float(
                torch.linalg.vector_norm(p - b if p.dtype.itemsize >= 4 else p.float() - b.float(), dtype=torch.float64)
            )
            for name, (p, b) in self._present()[1].items()
        }

    def norm(self) -> float:
        """2-norm of the whole delta."""
        return math.sqrt(sum(n * n for n in self.norms().values()))


def _finite(what: str, value: Any) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"Delta: {what} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"Delta: {what} must be finite, not {value}")
    return float(value)


def _names(here: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name of a weight with the one that it goes by: of those of a tied weight the first one with a copy in `base`,
    without which it would have none; else the first one."""
    first: dict[int, str] = {}
    for name in sorted(here, key=lambda name: name not in base):
        first.setdefault(memory(here[name]), name)
    return {name: first[memory(p)] for name, p in here.items()}


def _read(path: str | Path) -> dict[str, Tensor]:
    """What `Delta.save` wrote, tied weights under each of their names."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    return found | {name: found[known] for name, known in tied.items()}


def stacks_of(model: nn.Module) -> list[Sequence[str]]:
    """Names of the layers of each stack that counts depth: one, or those of an encoder-decoder's two sides.

    Raises:
        ValueError: a side without a stack of at least two layers.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [stack_of(model)]
    names = {id(module): name for name, module in model.named_modules()}
    stacks: list[Sequence[str]] = []
    for side in ("encoder", "decoder"):
        module = getattr(model, f"get_{side}", lambda: None)()
        if not isinstance(module, nn.Module) or id(module) not in names:
            raise ValueError(
                f"Delta: {type(model).__name__} is an encoder-decoder that does not tell its {side}; use scale_"
            )
        stacks.append([f"{names[id(module)]}.{block}" for block in stack_of(module)])
    return stacks


def stack_of(model: nn.Module) -> Sequence[str]:
    """Names of the layers of the model's largest stack (the nn.ModuleList with most parameters), in order.

    Raises:
        ValueError: there is none of at least two layers.
    """
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            size = sum(p.numel() for p in module.parameters())
            if size > best[0]:
                best = (size, [f"{name}.{k}" for k in range(len(module))])
    if not best[1]:
        raise ValueError(f"Delta: {type(model).__name__} has no stack of two layers or more")
    return best[1]
