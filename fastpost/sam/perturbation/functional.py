"""Perturbation without writing a weight: the second pass adds c (x G^T) to x W^T."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpost.ops.perturbed import plus_small, product
from fastpost.sam.buckets import ParameterBucket, ShardReducer
from fastpost.sam.perturbation.stored import Perturbation, PerturbParams
from fastpost.sam.step import PerturbationSums

# A layer's directions and the factor that they are multiplied with: e = factor * direction.
Directions = dict[str, Tensor]
Rule = Callable[[Any, Directions, float, tuple[Any, ...], dict[str, Any]], Tensor]

# -- layers at w + e --------------------------------------------------------------------------------------------------------


def _plus_bias(y: Tensor, bias: Tensor | None, u: Directions, factor: float) -> Tensor:
    if bias is None:
        return y
    return (y + _moved(bias, u.get("bias"), factor)).to(y.dtype)


def _moved(p: Tensor, u: Tensor | None, factor: float) -> Tensor:
    """p + e in float32 at least; small tensors only."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return p.to(wide) if u is None else torch.add(p.to(wide), u.to(wide), alpha=factor)


def _linear(module: Any, u: Directions, factor: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    direction = u.get("weight")
    y = product(_input(args, kwargs), module.weight.t(), None if direction is None else direction.t(), factor)
    return _plus_bias(y, module.bias, u, factor)


def _conv1d(module: Any, u: Directions, factor: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """transformers' Conv1D, a linear layer whose weight is stored (in, out)."""
    return _plus_bias(product(_input(args, kwargs), module.weight, u.get("weight"), factor), module.bias, u, factor)


def _embedding(module: Any, u: Directions, factor: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Rows of w + e; each element of the table is rounded the same way wherever it is looked up."""
    rows: Tensor = _original(module)(module, *args, **kwargs)
    ids = _input(args, kwargs)
    index = ids.unsqueeze(-1) * rows.shape[-1] + torch.arange(rows.shape[-1], device=rows.device)
    return plus_small(rows, F.embedding(ids, u["weight"]), factor, index)


def _norm(module: Any, u: Directions, factor: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Any layer with small parameters: its own forward, with w + e in float32 in their place."""
    moved = {name: _moved(p, u.get(name), factor) for name, p in module.named_parameters(recurse=False)}
    forward, x = _original(module), _input(args, kwargs)
    narrow = any(p.dtype.itemsize == 2 for p in module.parameters(recurse=False))
    if not narrow:
        with _holding(module, moved):
            return forward(module, *args, **kwargs)  # type: ignore[no-any-return]
    with _holding(module, moved):
        y: Tensor = forward(module, *_widened(args), **dict(zip(kwargs, _widened(kwargs.values()), strict=True)))
    return y.to(x.dtype)


@contextlib.contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with these tensors in the place of its parameters, without running its hooks again."""
    own = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(own)


def _original(module: Any) -> Any:
    """The forward that the module has when it is not perturbed."""
    return type(module)._sam_original.forward


def _widened(values: Any) -> tuple[Any, ...]:
    return tuple(v.float() if isinstance(v, Tensor) and v.dtype.itemsize == 2 else v for v in values)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


_EXACT: dict[Any, Rule] = {nn.Linear.forward: _linear, nn.Embedding.forward: _embedding}


def rule_for(module: nn.Module) -> Rule | None:
    """How a module computes at w + e; None when nothing is known of it."""
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return None  # such a look-up rewrites its table, or has no dense gradient
    name = type(module).__name__
    if name == "Conv1D" and type(module).__module__.startswith("transformers."):
        return _conv1d
    if name.endswith("Norm") and not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _norm
    return _EXACT.get(type(module).forward) or (_scaled_embedding if isinstance(module, nn.Embedding) else None)


def _scaled_embedding(module: Any, u: Directions, factor: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A look-up with more in it (a scale in Gemma, an offset in BART), affine in its table: f(x; w) + f(x; u) - f(x; 0)."""
    forward = _original(module)
    y: Tensor = forward(module, *args, **kwargs)
    gains = []
    for table in (u["weight"].to(module.weight.dtype), torch.zeros_like(module.weight)):
        with _holding(module, {"weight": table}):
            gains.append(forward(module, *args, **kwargs))
    index = torch.arange(y.numel(), device=y.device).view(y.shape)
    return plus_small(y, gains[0] - gains[1], factor, index)


@functools.cache
def _perturbed_class(cls: Any, rule: Rule) -> Any:
    """A subclass whose forward computes at w + e. A module is of this class between perturbing and restoring."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if "_sam_directions" not in self.__dict__:  # restored, but of this class still: somebody has put a class on top
            return cls.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        directions: Directions = {name: _as_used(u, getattr(self, name)) for name, u in self._sam_directions.items()}
        return rule(self, directions, self._sam_factor, args, kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "_sam_original": cls})


def _as_used(u: Tensor, weight: Tensor) -> Tensor:
    return u if torch.is_autocast_enabled(u.device.type) or u.ndim < 2 else u.to(weight.dtype)


class _Called:
    """A forward hook that notes, in passes with gradients, that its module computed (`yes`), or that a forward put on the
    module handed its input on (`passed_by`), as fused heads do. Copies and pickles of it note nothing of this one.

    Once its optimizer is gone it takes itself off in the next forward pass. The garbage collector must not: it may run while
    torch walks through the hooks.
    """

    def __init__(self) -> None:
        self.yes = self.passed_by = self.over = False
        self.handle: RemovableHandle | None = None

    def put_on(self, module: nn.Module) -> _Called:
        self.handle = module.register_forward_hook(self)
        return self

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self.yes = self.yes or "forward" not in vars(module)
            self.passed_by = "forward" in vars(module)  # in the last of these passes
        if self.over and self.handle is not None:
            self.handle.remove()

    def __deepcopy__(self, memo: Any) -> _Called:
        return _Called()

    def __reduce__(self) -> Any:
        return _Called, ()


class FunctionalPerturbation(Perturbation):
    """w stays as it is; layers add what e would have added to their outputs.

    For y = x W^T the second pass computes x W^T + c (x U^T), with c U = e: U is the ascent gradient scaled to elements of
    about 1, in the dtype that the forward computes in, and c a power of two; the sum is rounded once. So e is rounded
    relative to its own size and never to the grid of the weights, nothing has to be restored, and autograd gives the
    gradient at w + e. Costs two more products per linear layer in the second pass (forward, and the gradient of x), and room
    for U.

    Args:
        model: whose layers compute with the parameters. Linear and embedding layers, transformers' Conv1D and norms are
            served; a parameter must be used through the forward of the module that owns it.
    """

    def __init__(self, reducer: ShardReducer, model: nn.Module) -> None:
        super().__init__(reducer, None)
        self._model = model
        self._install()

    def _install(self) -> None:
        self._layers: list[tuple[nn.Module, Rule, _Called]] = []
        self._moved: list[tuple[nn.Module, Any]] = []  # with the class that each has when it is not perturbed
        self._directions: dict[int, tuple[Tensor, float]] = {}
        self._room: dict[int, Tensor] = {}
        self._checked: set[int] = set()  # ids of parameters that are served
        self._root = _Called().put_on(self._model)
        for module in self._model.modules():
            rule = rule_for(module)
            if rule is not None and any(True for _ in module.parameters(recurse=False)):
                self._layers.append((module, rule, _Called().put_on(module)))
        weakref.finalize(self, _end, [self._root, *(called for _, _, called in self._layers)])

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError when one of these parameters belongs to a layer that is not served, or is sharded."""
        served = {module for module, _, _ in self._layers}
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
        self._refuse_replaced(wanted)
        _refuse_shards(params)
        self._checked |= wanted

    def _refuse_replaced(self, wanted: set[int]) -> None:
        """A forward put on the module itself hides the one of its class, by which the perturbation comes in."""
        names = [
            name
            for name, module in self._model.named_modules()
            if "forward" in vars(module) and any(id(p) in wanted for p in module.parameters(recurse=False))
        ]
        if names:
            raise ValueError(
                f"SAM: functional perturbation: the forward of {', '.join(names[:5])} has been replaced (device_map=, "
                "Accelerate's hooks and FlatLoRA do that), and would compute at w; leave them out with scope=, or use "
                "perturb='stored'"
            )

    def apply(self, buckets: Any, settings: Any, squared: Tensor) -> PerturbationSums:
        _refuse_shards([p for b in buckets for p in b.params])
        params = [p for b in buckets for p in b.params]
        if not self._checked.issuperset(map(id, params)):  # somebody has added a group to the base optimizer
            self.check(params)
        self._refuse_replaced({id(p) for p in params})
        self._refuse_unused(params)
        elements = sum(b.elements for b in buckets)
        self._unit = math.sqrt(max(elements, 1))
        sums = super().apply(buckets, settings, squared)
        for module, rule, _ in self._layers:
            mine = {name: self._directions.get(id(p)) for name, p in module.named_parameters(recurse=False)}
            found = {name: pair for name, pair in mine.items() if pair is not None}
            if found:
                factor = max(f for _, f in found.values())
                same = {name: u if f == factor else u * (f / factor) for name, (u, f) in found.items()}
                cls: Any = type(module)
                self._moved.append((module, cls))  # first, so that an interrupt finds it
                module.__dict__.update(_sam_directions=same, _sam_factor=factor)
                module.__class__ = _perturbed_class(cls, rule)
        return sums

    def _refuse_unused(self, params: list[Tensor]) -> None:
        wanted = {id(p) for p in params}
        called = {id(p) for module, _, hook in self._layers if hook.yes for p in module.parameters(recurse=False)}
        unused = wanted - called
        ran = self._root.yes or self._root.passed_by  # whatever has been put on the model itself
        if unused and (called or ran):  # else the first pass came before this optimizer was built
            names = [name for name, p in self._model.named_parameters() if id(p) in unused]
            raise RuntimeError(
                f"SAM: functional perturbation: {', '.join(names[:5])} got a gradient although the layer was not called: "
                "its weight is used elsewhere, where the perturbation would not reach. Leave it out with scope=, or use "
                "perturb='stored'"
            )
        # A head that is tied to the embedding, whose layer was called. Embeddings may be there twice and be called once.
        silent = {
            module for module, _, hook in self._layers if isinstance(module, nn.Linear) and (hook.passed_by or not hook.yes)
        }
        heads = [
            name
            for name, module in self._model.named_modules()
            if module in silent and any(id(p) in wanted for p in module.parameters(recurse=False))
        ]
        if heads and ran:
            raise RuntimeError(
                f"SAM: functional perturbation: the model was called and {', '.join(heads[:5])} was not, which holds a tied "
                "weight: a fused head (fused_linear=True, linear_r3f_loss) computes with it at w. Let the model build its "
                "logits, leave the weight out with scope=, or use perturb='stored'"
            )

    def _prepare(self, b: ParameterBucket, setting: PerturbParams, squared: Tensor) -> Iterable[Any]:
        # float16 ends at 65,504, which a product with elements of about 1 may reach.
        room_above = 5 if setting.compute_dtype == torch.float16 else 0
        factor = 2.0 ** (round(math.log2(abs(setting.rho) / self._unit)) + room_above) if setting.rho else 1.0
        room: list[Tensor] = []
        for p, w in zip(b.params, b.bucket.weights, strict=True):
            u = self._room.get(id(p))
            dtype = setting.compute_dtype if w.ndim > 1 else w.dtype  # norms compute in the dtype of their weights
            if u is None or u.dtype != dtype or u.shape != w.shape or u.device != w.device:
                u = self._room[id(p)] = torch.empty_like(w, dtype=dtype, requires_grad=False)
            room.append(u)
            self._directions[id(p)] = (u, factor)
        return ("sam_direction_", room, squared, setting.rho, setting.eta, factor)

    def _is_written(self, b: ParameterBucket) -> None:
        """No weight is."""

    def undo(self, convert: bool = False) -> None:
        """The layers compute at w again. No weight was written, so whatever has become of the weights is right."""
        for module, cls in self._moved:
            if type(module).__bases__ == (cls,) and "_sam_original" in vars(type(module)):
                module.__class__ = cls
            for name in ("_sam_directions", "_sam_factor"):
                module.__dict__.pop(name, None)
        for called in (self._root, *(called for _, _, called in self._layers)):
            called.yes = called.passed_by = False
        self._moved = []
        self._directions.clear()
        self._noted = []

    def check_weights(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_reducer": self._reducer, "stash": None, "_noted": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._install()


def _refuse_shards(params: Sequence[Tensor]) -> None:
    if any(hasattr(p, "device_mesh") for p in params):
        raise ValueError("SAM: functional perturbation needs whole parameters, not DTensors; use perturb='stored'")


def _end(hooks: list[_Called]) -> None:
    for hook in hooks:
        hook.over = True
