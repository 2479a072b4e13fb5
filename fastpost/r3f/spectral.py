"""R4F: R3F with a spectrally normalised head, so that the head cannot enlarge what the noise moved (2008.03156, eq. 6)."""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastpost.distributed import is_sharded
from fastpost.errors import unknown

LAYERS = ("last", "all")
MODES = ("exact", "at_most")

_DIRECT = 128  # up to this many rows or columns (a head of few classes), eigenvectors are had directly
_TOLERANCE = 1e-6  # of the leading pair's residual, relative to sigma^2
_MAX_STEPS = 128  # then a full decomposition is cheaper than going on


class R4F:
    """Divides the weight matrices of a head by their largest singular value, W / sigma_max(W) (2008.03156, section 3).

        r4f = R4F(model.classifier)      # before or after the optimizer is made; parameters stay the same objects
        ...                              # train with R3F
        r4f.merge()                      # plain Linear layers again, same outputs

    The weights are parametrised (torch.nn.utils.parametrize): the optimizer trains W, the layer computes with W / sigma.
    sigma is exact to about 1e-7: from eigenvectors where a head has few classes, in larger layers by Lanczos' method (15 ms
    for 768 x 768 on two cores), in float64. Its vectors count as constants, as in torch's spectral_norm: with sigma =
    u' W v that is the exact gradient. Nothing but W enters, so a loaded checkpoint gives the same bits.

    They are sought only when W has changed, as its memory, its version counter and optimizers' steps tell: both passes of
    an R3F step, and evaluation, see one sigma, and zero noise gives exactly zero KL. (Released R4F iterates
    in every forward pass, so there the two passes differ by up to 2.5e-2 without any noise.) Writes through `weight.data`
    outside of an optimizer's step go unnoticed; sigma then still follows to first order. Weights that
    `torch.func.functional_call` puts in place of W are normalised by their own sigma, also inside `grad`, `jvp` and `vmap`.

    What is saved loads without fastpost: the model's state dict, and so `save_pretrained` and a Trainer's checkpoints, hold
    W / sigma under the layer's plain name, and beside it W (`parametrizations.weight.original`), from which a model with R4F
    goes on with the same bits. It takes a state dict that has no W as well (one of a plain model, or of another R4F model's
    `plain_state_dict`), and then trains W / sigma.

    Args:
        head: a module that holds nn.Linear layers, or one itself: `model.classifier` of transformers' classifiers.
        layers: "last": the last nn.Linear of the head in registration order, as in the released code; "all": each of them,
            as in the paper.
        mode: "exact": W / sigma, which also enlarges small matrices (paper and release); "at_most": W / max(sigma, 1).

    Attributes:
        layers: names of the normalised layers inside `head` ("" for the head itself).

    Raises:
        TypeError: head is no module. ValueError: no nn.Linear in it, one that is parametrised already or whose weight is
            not floating point, not finite, empty or on the meta device; unknown `layers` or `mode`.
    """

    def __init__(self, head: nn.Module, layers: str = "last", mode: str = "exact") -> None:
        if not isinstance(head, nn.Module):
            raise TypeError(f"R4F: head must be a torch.nn.Module, not {type(head).__name__}")
        if layers not in LAYERS:
            raise unknown("layers", layers, LAYERS)
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        found = {name: module for name, module in head.named_modules() if isinstance(module, nn.Linear)}
        if not found:
            raise ValueError(f"R4F: {type(head).__name__} holds no nn.Linear to normalise")
        names = list(found)[-1:] if layers == "last" else list(found)
        for name in names:  # all of them before the first is changed
            layer, what = found[name], f"R4F: the weight of {name or 'the head'}"
            if parametrize.is_parametrized(layer, "weight"):
                raise ValueError(f"{what} is parametrised already; merge() or remove that first")
            if layer.weight.is_meta:
                raise ValueError(f"{what} is on the meta device; load or initialise the model first")
            if not layer.weight.numel():
                raise ValueError(f"{what} has shape {tuple(layer.weight.shape)}, nothing to normalise; name another head")
            if not layer.weight.dtype.is_floating_point:
                raise ValueError(f"{what} is {layer.weight.dtype}; only floating-point weights can be normalised")
            if not bool(torch.isfinite(layer.weight).all()):
                raise ValueError(f"{what} is not finite")
        self.head, self.mode = head, mode
        self.layers = tuple(names)
        self._linear = {name: found[name] for name in names}
        _watch_optimizers()
        self._hooks: list[Any] = []
        for layer in self._linear.values():
            parametrize.register_parametrization(layer, "weight", SpectralNorm(at_most=mode == "at_most"))
            hooked = cast(Any, layer)
            self._hooks.append(hooked.register_state_dict_post_hook(_with_plain_weight))
            self._hooks.append(hooked.register_load_state_dict_pre_hook(_without_plain_weight))

    def __repr__(self) -> str:
        return f"R4F({type(self.head).__name__}, layers={self.layers}, mode={self.mode!r})"

    @torch.no_grad()
    def sigmas(self) -> dict[str, Tensor]:
        """Largest singular value of each layer's own weight W (not of what it computes with), by name; scalars."""
        sigmas: dict[str, Tensor] = {}
        for name, layer in self._linear.items():
            weights = cast(Any, layer).parametrizations.weight
            sigmas[name] = weights[0].sigma(weights.original)
        return sigmas

    def plain_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of a model that holds the head, without a trace of fastpost: what the model would have after
        `merge()`, for `load_state_dict(..., strict=True)` on a model that has no R4F.

        Raises:
            ValueError: the head is no part of the model.
        """
        inside = {id(module) for module in model.modules()}
        if not all(id(layer) in inside for layer in self._linear.values()):
            raise ValueError(f"R4F: {type(model).__name__} does not hold the head that is normalised; give the whole model")
        return {
            name: t for name, t in model.state_dict().items() if not name.endswith(f".{_ORIGINAL}") and name != _ORIGINAL
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Makes the layers plain again, with W / sigma as their weight: same outputs, bit for bit, and no trace of fastpost.

        The parameters stay the same objects. A second call does nothing.
        """
        for layer in self._linear.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        for hook in self._hooks:
            hook.remove()
        self._linear, self._hooks = {}, []


def find_classifier(model: Any) -> nn.Module:
    """The classification head of a transformers classifier, which R4F normalises.

    Raises:
        ValueError: none of the usual names is there.
    """
    for name in ("classifier", "score", "classification_head"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            return head
    raise ValueError(f"{type(model).__name__} has no classifier, score or classification_head; R4F cannot find its head")


# -- state dicts ----------------------------------------------------------------------------------------------------------

_ORIGINAL = "parametrizations.weight.original"


def _normalised(layer: nn.Module) -> bool:
    weights = getattr(getattr(layer, "parametrizations", None), "weight", None)
    return weights is not None and isinstance(weights[0], SpectralNorm)


@torch.no_grad()
def _with_plain_weight(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """What anybody without fastpost looks for: the weight that the layer computes with, under its plain name."""
    name = prefix + _ORIGINAL
    if not _normalised(layer) or name not in state_dict:
        return
    weight = state_dict[name].detach()
    if is_sharded(weight):  # sharded: every rank is here, and none holds enough to find sigma
        weight = weight.full_tensor()
    state_dict[prefix + "weight"] = layer.parametrizations.weight[0](weight)


def _without_plain_weight(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The way back: W where it was saved, else the plain weight is what training goes on from."""
    plain, name = prefix + "weight", prefix + _ORIGINAL
    if _normalised(layer) and plain in state_dict:
        weight = state_dict.pop(plain)
        state_dict.setdefault(name, weight)


class SpectralNorm(nn.Module):
    """The parametrisation W -> W / sigma_max(W), or W / max(sigma_max(W), 1).

    Args:
        at_most: leave matrices alone whose norm is at most 1.
    """

    def __init__(self, at_most: bool = False) -> None:
        super().__init__()
        self.at_most = at_most
        # Plain attributes: as buffers they would enter the state dict, and be rounded by model.bfloat16().
        self._u: Tensor | None = None
        self._v: Tensor | None = None
        self._seen: _Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a copy has memory of its own, and finds the same sigma there

    def extra_repr(self) -> str:
        return f"at_most={self.at_most}"

    def forward(self, weight: Tensor) -> Tensor:
        work = _working(weight)
        sigma = self.sigma(weight)
        # A weight of zeros has no direction to normalise; it stays zero. A NaN stays one.
        divisor = sigma.clamp(min=1) if self.at_most else torch.where(sigma == 0, 1, sigma)
        return (weight.to(work) / divisor).to(weight.dtype)

    def sigma(self, weight: Tensor) -> Tensor:
        """sigma_max(W) = u' W v, a scalar in W's dtype (float32 for 16-bit W), differentiable in W."""
        u, v = self._vectors(weight)
        work = _working(weight)
        with torch.autocast(weight.device.type, enabled=False):  # in 16 bits sigma would be off by 1e-3
            return torch.dot(u.to(work), torch.mv(weight.to(work), v.to(work)))

    def _vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The leading singular vectors, sought anew where the weight is not the one seen last, or has changed."""
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return _without_looking(weight.detach())  # what a transform made ends with it, and vmap shows no values
        seen = _Seen(weight)
        if seen != self._seen:
            # A transform of other tensors leaves this one plain. Outside of it, the vectors outlive it.
            with torch.no_grad(), torch._C._DisableFuncTorch():
                self._refresh(weight.detach())
            self._seen = seen
        assert self._u is not None
        assert self._v is not None
        return self._u, self._v

    def _refresh(self, weight: Tensor) -> None:
        """Brings u and v up to date with the weight."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = _exact(weight)
            if not bool(torch.isfinite(matrix).all()):  # a run that has diverged: sigma is NaN, and so is the output
                self._u, self._v = matrix.new_zeros(matrix.shape[0]), matrix.new_zeros(matrix.shape[1])
                return
            v = _leading(matrix) if min(matrix.shape) <= _DIRECT else _lanczos(matrix)
            if v is None:
                v = torch.linalg.svd(matrix, full_matrices=False).Vh[0]
            self._u, self._v = _with_image(matrix, v)


@torch.no_grad()
def _without_looking(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The leading singular vectors, zeros where the weight is not finite, by operations that branch on no value."""
    with torch.autocast(weight.device.type, enabled=False):
        matrix = _exact(weight)
        finite = torch.isfinite(matrix).all()
        u, v = _with_image(matrix, _leading(torch.where(finite, matrix, 0)))
        return torch.where(finite, u, 0), torch.where(finite, v, 0)


def _exact(weight: Tensor) -> Tensor:
    """The weight in numbers whose squares stay in range: in float64, if that is wider; else its largest element is brought
    near 1 by a power of two, which leaves its vectors the same."""
    matrix = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)  # MPS has no float64
    if matrix.dtype == torch.float64 and weight.dtype != torch.float64:
        return matrix
    numbers = torch.finfo(matrix.dtype)
    exponent = matrix.abs().amax().log2().floor().clamp(math.log2(numbers.tiny), math.floor(math.log2(numbers.max)) - 1)
    return matrix / exponent.exp2()


def _with_image(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vector beside the right one."""
    image = matrix @ v
    length = image.norm()
    return image / torch.where(length > 0, length, 1), v.contiguous()


def _leading(matrix: Tensor) -> Tensor:
    """The leading right singular vector, by the eigenvectors of the smaller Gram matrix."""
    if matrix.shape[0] >= matrix.shape[1]:
        right: Tensor = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -1]
        return right
    v: Tensor = matrix.mT @ torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -1]
    length = v.norm()
    return v / torch.where(length > 0, length, 1)


def _lanczos(matrix: Tensor) -> Tensor | None:
    """The leading right singular vector, or None when it does not settle in time.

    Lanczos' method on W'W: power iteration that keeps every power, so that it needs tens of products where the power
    iteration needs thousands when singular values lie close. It starts from the same random direction every time: to start
    from the last step's vector saves a sixth of the products, and makes sigma depend on more than W.
    """
    generator = torch.Generator().manual_seed(0)  # torch's own is not to be moved by looking at sigma
    v = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64).to(matrix)
    v = v / v.norm()
    steps = min(_MAX_STEPS, *matrix.shape)
    basis = matrix.new_empty(matrix.shape[1], steps)
    images = matrix.new_empty(matrix.shape[0], steps)
    for k in range(1, steps + 1):
        basis[:, k - 1] = v
        images[:, k - 1] = matrix @ v
        known, w = basis[:, :k], matrix.mT @ images[:, k - 1]
        for _ in range(2):  # once leaves rounding errors that grow into copies of the leader
            w = w - known @ (known.mT @ w)
        length = w.norm()
        if k % 8 == 0 or k == steps:
            values, vectors = torch.linalg.eigh(images[:, :k].mT @ images[:, :k])
            # The residual of the leading pair; its square bounds the error of sigma^2. One read from the device.
            if bool(length * vectors[-1, -1].abs() <= _TOLERANCE * values[-1]):
                leader: Tensor = known @ vectors[:, -1]
                return leader
        v = w / torch.where(length > 0, length, 1)
    return None


def _working(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


_steps = 0  # of all optimizers; torch's fused ones write weights without a word to the version counter


def _note_step(*_: Any) -> None:
    global _steps
    _steps += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)


class _Seen:
    """A weight as it is now: differs whenever it may have changed. Loading and fastpost's own kernels bump the version.

    The memory is told by a weak reference: while that is held, no other memory takes its name, as an address may be taken.
    """

    def __init__(self, weight: Tensor) -> None:
        self._memory = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        version = None if weight.is_inference() else weight._version
        place = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device)
        self._told = (_steps, version, *place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen) and self._memory == other._memory and self._told == other._told
