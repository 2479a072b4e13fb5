"""Parameters and gradients as views of one buffer per dtype and device."""

from __future__ import annotations

import collections
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor, nn

from fastpost.plan import distinct, flat_like, overlap

_Scripted: type[nn.Module] = torch.jit.RecursiveScriptModule  # type: ignore[attr-defined]  # takes no hooks; traced ones do


class FlatParameters:
    """The buffers behind a flattened model; made by `flatten_parameters`.

    Attributes:
        parameters: one buffer per (dtype, device), each holding every parameter of that kind from a 256-byte boundary on;
            padding is zero.
        gradients: the same for gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._hooks: list[Any] = []
        self._warned = False
        self._build(model)

    def reflatten(self) -> None:
        """Builds the buffers anew from where the parameters are now, after `model.to()` or the like."""
        model = self._model()
        if model is None:
            raise RuntimeError("FlatParameters: the model is gone")
        self._build(model)

    @torch.no_grad()
    def _build(self, model: nn.Module) -> None:
        if isinstance(model, _Scripted):
            raise TypeError(
                "flatten_parameters: the model was made by torch.jit.script, and its state_dict takes no hooks; put it into "
                "a plain module, such as torch.nn.Sequential(model), and flatten and save that"
            )
        parameters = list(model.parameters())
        _check(parameters)
        self.parameters: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.gradients: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        while self._hooks:
            self._hooks.pop().remove()
        # Of a module with two names each of its parameters has two as well.
        names = collections.Counter(_key(p) for _, p in model.named_parameters(remove_duplicate=False))
        for module in model.modules():
            if isinstance(module, _Scripted):
                continue  # which takes no hooks; the module that holds it saves its weights
            tied = frozenset(name for name, p in _saved_by(module) if names[_key(p)] > 1)
            saved_apart = functools.partial(_saved_apart, tied)
            self._hooks.append(module.register_state_dict_post_hook(saved_apart))  # type: ignore[no-untyped-call]
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in parameters:
            kinds.setdefault((p.dtype, p.device), []).append(p)
        for kind, members in kinds.items():
            owners = _owners(members)
            self.parameters[kind], views = flat_like(list(owners.values()))
            self.gradients[kind], gradient_views = flat_like(list(owners.values()))
            place = {key: (v, g) for key, v, g in zip(owners, views, gradient_views, strict=True)}
            for p in members:
                view, gradient = place[_key(p)]
                view.copy_(p)
                p.data = view
                if p.grad is not None:
                    gradient.copy_(p.grad)
                    p.grad = gradient
                if p.requires_grad:
                    hook = self._keep_in(gradient, view.data_ptr())
                    self._hooks.append(p.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        self._warned = False

    @property
    def intact(self) -> bool:
        """Whether every parameter still lies in its buffer. Assigning `p.data` from outside moves one out."""
        model = self._model()
        if model is None:
            return False
        homes = {(b.device, b.untyped_storage().data_ptr()) for b in self.parameters.values()}
        return all((p.device, p.untyped_storage().data_ptr()) in homes for p in model.parameters() if p.numel())

    def _keep_in(self, gradient: Tensor, home: int) -> Callable[[Tensor], None]:
        """A hook that brings a gradient made elsewhere (after zero_grad(set_to_none=True)) back into the buffer."""

        def hook(p: Tensor) -> None:
            if p.data_ptr() != home:
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        "flattened parameters have left their buffer (model.to(), or p.data was assigned); results stay "
                        "right, but call reflatten() to have one span again",
                        stacklevel=2,
                    )
            elif p.grad is not None and p.grad.data_ptr() != gradient.data_ptr() and p.grad.dtype == gradient.dtype:
                with torch.no_grad():
                    gradient.copy_(p.grad)
                    p.grad = gradient

        return hook


def _check(parameters: list[nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("flatten_parameters: the model has no parameters")
    for p in parameters:
        if hasattr(p, "device_mesh"):
            raise TypeError("flatten_parameters: the model holds DTensors (sharded parameters), which cannot be flattened")
        if p.device.type == "meta":
            raise ValueError("flatten_parameters: a parameter is on the meta device; load the weights first")
        if p.layout != torch.strided:
            raise TypeError(f"flatten_parameters: a parameter has the layout {p.layout}; only dense ones can be flattened")
        if not p.dtype.is_floating_point:
            raise TypeError(
                f"flatten_parameters: a parameter has dtype {p.dtype}; only floating-point ones can be flattened"
            )
    owners = list(_owners(parameters).values())
    if not all(map(distinct, owners)) or overlap(owners) is not None:
        raise ValueError(
            "flatten_parameters: parameters share memory without being the same tensor (expanded, transposed, or parts of "
            "one another), which places of their own would end; tie them by using one parameter in both modules"
        )


def _key(p: Tensor) -> tuple[Any, ...]:
    """The same for parameters that are one tensor under two names, which keep sharing their memory."""
    return (p.dtype, p.data_ptr(), p.shape, p.stride()) if p.numel() else (id(p),)


def _owners(parameters: list[nn.Parameter]) -> dict[tuple[Any, ...], nn.Parameter]:
    return {_key(p): p for p in parameters}


def _saved_by(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters whose entries in a state dict are a module's: its own, and all of the scripted modules in it."""
    yield from ((name, p) for name, p in module._parameters.items() if p is not None)
    for prefix, child in module._modules.items():
        if isinstance(child, _Scripted):
            yield from child.named_parameters(prefix, remove_duplicate=False)


def _saved_apart(tied: frozenset[str], module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict's hook: the parameters of `_saved_by` as tensors of the same memory, with a storage each.

    Who saves a model takes tensors of one storage for one tensor under several names, or writes all of the storage.

    Args:
        tied: names of parameters that the model has under another name too; they stay one tensor.
    """
    for name, p in _saved_by(module):
        found = state.get(prefix + name)
        if found is None or found is p or found.data_ptr() != p.data_ptr():
            continue  # `keep_vars`, or another hook's
        if found.untyped_storage().nbytes() <= found.numel() * found.element_size() or not found.numel():
            continue
        others = state.values() if name in tied else ()
        apart = next((t for t in others if _is_apart(t, found)), None)
        state[prefix + name] = _apart(found) if apart is None else apart


def _is_apart(other: Any, found: Tensor) -> bool:
    """Whether this is the same weight with a storage of its own. Buffers may be anything, such as sparse."""
    if type(other) is not Tensor or other is found or other.layout != torch.strided or other.data_ptr() != found.data_ptr():
        return False
    return _key(other) == _key(found) and other.untyped_storage().nbytes() < found.untyped_storage().nbytes()


@torch.inference_mode(False)  # or what is saved could not be written to outside of inference
def _apart(tensor: Tensor) -> Tensor:
    """The same memory with a storage of its own; the tensor itself, with a warning, on devices that do not export memory."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    memory = torch.as_strided(tensor, (reach,), (1,)).view(torch.uint8)
    try:
        # By way of a capsule: a tensor by itself is exported from the current CUDA device only.
        capsule = torch.utils.dlpack.to_dlpack(memory)  # type: ignore[attr-defined]
        taken = torch.utils.dlpack.from_dlpack(capsule)
        return taken.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    except (BufferError, RuntimeError) as error:
        warnings.warn(
            f"flatten_parameters: {tensor.device} exports no memory ({error}), so weights are saved as parts of one "
            "storage, which Accelerate and safetensors take for one tensor; save copies of them",
            stacklevel=2,
        )
        return tensor


def flatten_parameters(model: nn.Module) -> FlatParameters:
    """Moves all parameters and gradients of a model into one buffer per dtype and device, in place.

    Parameters stay the same objects with the same values and shapes, and strides where they leave no gaps, so optimizers,
    `state_dict`, tied weights and hooks keep working; element-wise operations on the list then see one span. What
    `state_dict` returns can be saved by any library: its tensors are the weights' memory, with a storage each. (Read or copy
    them; autograd does not see what is written through them. A device without DLPack brings a warning. Scripted modules are
    saved so by the plain module that holds them.) A pickle of the whole model needs fastpost where it is loaded. After
    `zero_grad(set_to_none=True)` gradients come back into the buffer, at the price of one copy. `model.to()` moves
    parameters out of it again: a warning says so, and `reflatten()` mends it. Flatten before building anything that
    remembers addresses (CUDA graphs, DDP).

    Args:
        model: any module whose parameters are plain dense tensors.

    Returns:
        The buffers, which live as long as the model's parameters.

    Raises:
        ValueError: no parameters, one on the meta device, or two that share memory without being the same tensor.
        TypeError: sharded (DTensor), sparse or non-floating-point parameters; a model that is itself scripted.
    """
    return FlatParameters(model)
