"""After a run: what it changed, scaled, reflected or faded out with depth, in place, and without a second model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


class Delta:
    """weights - base of a model, held as the weights and a copy of the base.

        result = gap(model, text)
        delta = result.delta(model)
        delta.scale_(0.5)                # halfway back
        delta.scale_(-1.0)               # reflected: task negation
        delta.lines_(0.3, 0.7)           # LiNeS: 0.3 of it in the first layer, all of it in the last
        delta.save("text.safetensors")   # another run from the same base can merge_ it

    Every call starts from the delta as it is now. One pass over memory, two reads and one write: base + factor * delta,
    exact at 0 (the base, bit for bit) and at 1 (nothing changes, bit for bit). The model is a plain one all the time: save
    it as ever.

    Args:
        model: holds the weights, by name.
        base: copies of its weights before the run, by name; those that have none stay as they are.

    Raises:
        ValueError: no weight has a copy, or a copy's shape, dtype or device is not its weight's.
    """

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor]) -> None:
        self._model = model
        first = {id(p): name for name, p in model.named_parameters()}
        # Every name of a weight that has several (an output head tied to the embedding), and the one that it goes by here.
        self._names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._pairs = {name: (p, base[name]) for name, p in model.named_parameters() if name in base}
        if not self._pairs:
            raise ValueError("Delta: no weight of the model has a copy in base")
        for name, (p, b) in self._pairs.items():
            if (p.shape, p.dtype, p.device) != (b.shape, b.dtype, b.device):
                now, then = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (p, b))
                raise ValueError(f"Delta: {name} is {now}, its copy {then}")

    @torch.no_grad()
    def scale_(self, factor: float | Mapping[str, float]) -> None:
        """weights = base + factor * (weights - base), in place.

        Args:
            factor: one number, or one per name; names that it lacks stay as they are.

        Raises:
            ValueError: a factor that is not finite, or an unknown name; nothing is written then.
        """
        factors = {name: float(factor) for name in self._pairs} if not isinstance(factor, Mapping) else dict(factor)
        for name, value in factors.items():
            if name not in self._pairs:
                raise ValueError(f"Delta: {name!r} is none of the weights with a copy")
            if not math.isfinite(value):
                raise ValueError(f"Delta: a factor must be finite, not {value}")
        for name, value in factors.items():
            p, base = self._pairs[name]
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
        for name in self._pairs:
            at = next((at for block, at in depth.items() if name.startswith(f"{block}.")), None)
            factors[name] = alpha if at is None else alpha + beta * at
        self.scale_(factors)
        return factors

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """weights - base by name, as new tensors, 16-bit ones in float32: what `merge_` of another run's delta takes.

        A tied weight is there under each of its names, as one tensor.
        """
        own = {name: p.sub(b) if p.dtype.itemsize >= 4 else p.float().sub_(b) for name, (p, b) in self._pairs.items()}
        return {name: own[known] for name, known in self._names.items() if known in own}

    def save(self, path: str | Path) -> None:
        """Writes `tensors()` as a safetensors file, whole or not at all.

        Raises:
            ModuleNotFoundError: safetensors is not installed. OSError: the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        try:
            found = self.tensors()
            tied = {name: known for name, known in self._names.items() if name != known and name in found}
            once = {name: d.contiguous() for name, d in found.items() if name not in tied}
            save_file(once, new, metadata={"tied": json.dumps(tied)})
            new.replace(path)
        except SafetensorError as error:  # a disk that is full
            raise OSError(f"{path} cannot be written: {error}") from error
        finally:
            new.unlink(missing_ok=True)

    @torch.no_grad()
    def merge_(self, other: Mapping[str, Tensor] | str | Path, weight: float = 1.0) -> None:
        """weights += weight * other, in place: the sum of several runs' deltas from one base (task arithmetic, 2212.04089).

        Args:
            other: another delta's `tensors()`, or the file that its `save` wrote. Weights that it lacks stay as they are. A
                weight that was tied there and is not here moves under both names.
            weight: finite.

        Raises:
            ValueError: a weight that is not finite, a name that has no copy in base, a shape that does not fit, two
                deltas for what is one tied weight here; nothing is written then.
        """
        if not math.isfinite(weight):
            raise ValueError(f"Delta: a weight must be finite, not {weight}")
        if not isinstance(other, Mapping):
            other = _read(other)
        moves: dict[str, Tensor] = {}
        for name, d in other.items():
            known = self._names.get(name)
            if known not in self._pairs:
                raise ValueError(f"Delta: {name!r} is none of the weights with a copy")
            if d.shape != self._pairs[known][0].shape:
                raise ValueError(
                    f"Delta: {name} is {tuple(self._pairs[known][0].shape)}, the other delta's {tuple(d.shape)}"
                )
            if known in moves and not torch.equal(moves[known], d):
                raise ValueError(
                    f"Delta: {name} is tied to {known} in this model, and the other delta moves them apart; untie them "
                    "first (tie_word_embeddings=False)"
                )
            moves[known] = d
        for name, d in moves.items():
            p = self._pairs[name][0]
            p.add_(d.to(p.device), alpha=weight)

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """2-norm of each weight's delta, by name; differences in float32 or wider."""
        return {
            name: float(
                torch.linalg.vector_norm(p - b if p.dtype.itemsize >= 4 else p.float() - b.float(), dtype=torch.float64)
            )
            for name, (p, b) in self._pairs.items()
        }

    def norm(self) -> float:
        """2-norm of the whole delta."""
        return math.sqrt(sum(n * n for n in self.norms().values()))


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
