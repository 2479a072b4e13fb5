"""Perturbation without writing a weight: the second pass adds c (x G^T) to x W^T."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastpost.sam.buckets import ParameterBucket
from fastpost.sam.perturbation import Perturbation, Term
from fastpost.sam.reduction import Reduction

Direction = dict[str, Tensor]
Rule = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Direction], Tensor]

# -- what a layer's output gains per unit of direction: every layer here is affine in its parameters ------------------------


def _linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], u: Direction) -> Tensor:
    if "weight" not in u:
        return u["bias"]
    return F.linear(_input(args, kwargs), u["weight"], u.get("bias"))


def _conv1d(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], u: Direction) -> Tensor:
    """transformers' Conv1D, a linear layer whose weight is stored (in, out)."""
    if "weight" not in u:
        return u["bias"]
    return F.linear(_input(args, kwargs), u["weight"].t(), u.get("bias"))


def _embedding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], u: Direction) -> Tensor:
    return F.embedding(_input(args, kwargs), u["weight"])


def _layer_norm(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], u: Direction) -> Tensor:
    if "weight" not in u:
        return u["bias"]
    return F.layer_norm(_input(args, kwargs), module.normalized_shape, u["weight"], u.get("bias"), module.eps)


def _affine(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], u: Direction) -> Tensor:
    """Any other layer that is affine in its parameters: f(x; u) - f(x; 0). Cheap for norms and look-ups only."""
    zero = {name: torch.zeros_like(value) for name, value in u.items()}
    at_u: Tensor = functional_call(module, u, args, kwargs)
    at_zero: Tensor = functional_call(module, zero, args, kwargs)
    return at_u - at_zero


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


_EXACT: dict[Any, Rule] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
}


def rule_for(module: nn.Module) -> Rule | None:
    """How a module's output moves with its parameters; None when nothing is known of it."""
    rule = _EXACT.get(type(module).forward)
    if rule is not None:
        return None if getattr(module, "max_norm", None) is not None else rule  # such a look-up rewrites its table
    name = type(module).__name__
    if name == "Conv1D" and type(module).__module__.startswith("transformers."):
        return _conv1d
    if name.endswith("Norm") and not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _affine
    if isinstance(module, nn.Embedding) and module.max_norm is None:  # scaled look-ups (Gemma, BART)
        return _affine
    return None


class _Layer:
    """The forward hook of one module; without a direction it does nothing. Copies and pickles of it never do anything."""

    def __init__(self, rule: Rule | None = None) -> None:
        self.rule = rule
        self.direction: Direction | None = None
        self.factor = 0.0
        self.called = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        direction, rule = self.direction, self.rule
        if direction is None or rule is None:
            self.called = True
            return None
        self.direction = None  # rules may call the module
        try:
            usable = {name: _as_used(u, getattr(module, name)) for name, u in direction.items()}
            gain = rule(module, args, kwargs, usable)
        finally:
            self.direction = direction
        return torch.add(output, gain, alpha=self.factor).to(output.dtype)

    def __deepcopy__(self, memo: Any) -> _Layer:
        return _Layer()

    def __reduce__(self) -> Any:
        return _Layer, ()


def _as_used(u: Tensor, weight: Tensor) -> Tensor:
    return u if torch.is_autocast_enabled(u.device.type) else u.to(weight.dtype)


class FunctionalPerturbation(Perturbation):
    """w stays as it is; layers add what e would have added to their outputs.

    For y = x W^T the second pass computes x W^T + c (x U^T), with c U = e: U is the ascent gradient scaled to elements of
    about 1, in the dtype that the forward computes in, and c a power of two. So e is rounded relative to its own size and
    never to the grid of the weights, nothing has to be restored, and autograd gives the gradient at w + e. Costs two more
    products per linear layer in the second pass (forward, and the gradient of x), and room for U.

    Args:
        model: whose layers compute with the parameters. Linear and embedding layers, transformers' Conv1D and norms are
            served; a parameter must be used through the forward of the module that owns it.
    """

    stash = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._install()

    def _install(self) -> None:
        self._layers: list[tuple[nn.Module, _Layer]] = []
        self._directions: dict[int, tuple[Tensor, float]] = {}
        self._room: dict[int, Tensor] = {}
        handles: list[Any] = []
        for module in self._model.modules():
            rule = rule_for(module)
            if rule is not None and any(True for _ in module.parameters(recurse=False)):
                layer = _Layer(rule)
                handles.append(module.register_forward_hook(layer, with_kwargs=True))
                self._layers.append((module, layer))
        weakref.finalize(self, _remove, handles)

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError when one of these parameters belongs to a layer that is not served, or is sharded."""
        served = {module for module, _ in self._layers}
        wanted = {id(p) for p in params}
        owners = [
            f"{name or 'the model'} ({type(module).__name__})"
            for name, module in self._model.named_modules()
            if module not in served and any(id(p) in wanted for p in module.parameters(recurse=False))
        ]
        strangers = wanted - {id(p) for p in self._model.parameters()}
        if strangers:
            raise ValueError(f"SAM: functional perturbation: {len(strangers)} parameters are not of the model given")
        if owners:
            shown = ", ".join(owners[:5]) + (", ..." if len(owners) > 5 else "")
            raise ValueError(
                "SAM: functional perturbation serves linear and embedding layers, transformers' Conv1D and norms, not "
                f"{shown}; leave them out with scope=, or use perturb='stored'"
            )
        if any(hasattr(p, "device_mesh") for p in params):
            raise ValueError("SAM: functional perturbation needs whole parameters, not DTensors; use perturb='stored'")

    def apply(self, buckets: Any, terms: Any, squared: Tensor, reduction: Reduction) -> Tensor:
        self._refuse_unused([p for b in buckets for p in b.params])
        elements = sum(b.elements for b in buckets)
        self._unit = math.sqrt(max(elements, 1))
        sums = super().apply(buckets, terms, squared, reduction)
        for module, layer in self._layers:
            mine = {
                n: self._directions[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in self._directions
            }
            if mine:
                layer.factor = max(factor for _, factor in mine.values())
                layer.direction = {n: u if f == layer.factor else u * (f / layer.factor) for n, (u, f) in mine.items()}
        return sums

    def _refuse_unused(self, params: list[Tensor]) -> None:
        called = {id(p) for module, layer in self._layers if layer.called for p in module.parameters(recurse=False)}
        unused = {id(p) for p in params} - called
        if unused:
            names = [name for name, p in self._model.named_parameters() if id(p) in unused]
            raise RuntimeError(
                f"SAM: functional perturbation: {', '.join(names[:5])} got a gradient although the layer was not called: "
                "its weight is used elsewhere, where the perturbation would not reach. Leave it out with scope=, or use "
                "perturb='stored'"
            )

    def write(self, b: ParameterBucket, term: Term, squared: Tensor) -> Tensor:
        factor = 2.0 ** round(math.log2(term.rho / self._unit)) if term.rho else 1.0
        room = []
        for p, w in zip(b.params, b.bucket.weights, strict=True):
            u = self._room.get(id(p))
            dtype = term.seen if w.ndim > 1 else w.dtype  # norms compute in the dtype of their weights
            if u is None or u.dtype != dtype or u.shape != w.shape or u.device != w.device:
                u = self._room[id(p)] = torch.empty_like(w, dtype=dtype, requires_grad=False)
            room.append(u)
            self._directions[id(p)] = (u, factor)
        return direction_(b, room, squared, term, factor)

    def put_back(self, b: ParameterBucket) -> None:
        self._directions.clear()
        for _, layer in self._layers:
            layer.direction = None
            layer.called = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_done": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._install()


def direction_(b: ParameterBucket, out: list[Tensor], squared: Tensor, term: Term, factor: float) -> Tensor:
    """out = e / factor, rounded to out's dtype, or 0 where nothing moves; returns the six sums of `ops.sam_perturb_`.

    "Stored" is factor * out, "seen" the same (out has the dtype that the forward computes in).
    """
    moves = torch.isfinite(squared) & (squared > 0)
    scale = torch.where(moves, term.rho / squared.sqrt(), torch.zeros_like(squared))
    sums = torch.zeros(6, dtype=torch.float64, device=squared.device)
    for w, g, u in zip(b.bucket.weights, b.bucket.grads, out, strict=True):
        work = torch.float64 if w.dtype == torch.float64 else torch.float32
        e = g.to(work)
        if term.eta is not None:
            e = e * (w.to(work).abs() + term.eta).square()
        e = torch.where(moves, e * scale.to(work), torch.zeros_like(e))
        u.copy_(e / factor)
        e, stored = e.double(), u.double() * factor
        square, dot = (stored * stored).sum(), (e * stored).sum()
        sums += torch.stack([(e * e).sum(), square, dot, square, dot, (stored != 0).sum().double()])
    return sums


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
