"""What the differentiable operations share: torch.func's transforms, second derivatives, forward mode.

Gradients come from kernels, which autograd does not see through. Where a gradient may be differentiated again
(`create_graph=True`, torch.func), it has to be an operation of its own, whose derivative is right or an error. As the mere
result of a backward pass it would count as a constant, and a gradient penalty would lose it without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastpost.dispatch import strict
from fastpost.ops.registry import eager


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is active."""
    return bool(torch._C._are_functorch_transforms_active())


def traced() -> bool:
    """Whether tensors have no values to look at: under torch.compile and the transforms of torch.func."""
    return torch.compiler.is_compiling() or transformed()


def waits(device: torch.device) -> bool:
    """Whether looking at tensors' values waits for the device."""
    return device.type != "cpu"


def checks_values(device: torch.device) -> bool:
    """Whether to look at tensors' values: where that waits for nothing, and everywhere under FASTPOST_CHECKS=1."""
    return (not waits(device) or strict()) and not traced()


def by_operation() -> bool:
    """In a backward pass: whether its gradients have to come from an operation of their own, to be differentiated or mapped.

    Under torch.compile they cannot be differentiated, as torch says itself.
    """
    return transformed() or (torch.is_grad_enabled() and not torch.compiler.is_compiling())


def unmapped_batch(upstream: Tensor) -> bool:
    """Whether a backward pass runs under `torch.autograd.grad(..., is_grads_batched=True)`.

    It maps torch's own operations and knows no vmap of anybody else's.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(upstream)


def refuse_nested_forward_mode() -> None:
    """Raises NotImplementedError inside of two forward modes: torch hands a function's `jvp` what it saved without the outer
    tangents, so that the result would be wrong."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            "this operation of fastpost has no forward mode within forward mode (jacfwd of jacfwd, jvp of jvp); take "
            "reverse mode for one of the two: torch.func.hessian, or jacfwd(jacrev(...))"
        )


class Function(torch.autograd.Function):
    """A `torch.autograd.Function` with `setup_context`, as torch.func wants it, and `tangent` in the place of `jvp`.

    Called eagerly, it is a subclass of itself that has a `jvp`: torch.compile refuses functions that do, and does not see
    that one. Arguments are positional and complete, so that torch need not look up the signature of `forward` in every call,
    which takes several times as long as the rest. Where nothing records, `apply` is `forward`.
    """

    _eager: type[Function]

    def __init_subclass__(cls) -> None:
        if "jvp" not in vars(cls):
            cls._eager = type(cls.__name__, (cls,), {"jvp": staticmethod(cls.tangent)})

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if forward_ad._current_level < 0 and eager(args):  # no derivative can be asked for
            with torch.no_grad():
                return cls.forward(*args)
        if transformed():
            return super(Function, cls._eager).apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls._eager).apply(*args)  # type: ignore[misc]

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        """Forward mode: tangents of the results from those of the arguments."""
        raise NotImplementedError(
            "this operation of fastpost has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); take reverse "
            "mode: torch.func.vjp, jacrev, or backward()"
        )


def apply_any(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`, of a function whose `forward` takes any number of tensors.

    Where nothing is recorded, torch.compile would hand such a `forward` a context that it does not take. Whether a transform
    of torch.func records cannot be seen there, so that it is left to eager torch.
    """
    if is_dynamo_compiling():
        if transformed():
            torch._dynamo.graph_break()
        elif not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)):
            return function.forward(*args)
    return function.apply(*args)


# -- vmap -----------------------------------------------------------------------------------------------------------------


def over_rows(function: type[Function], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of a function whose tensors all begin with the rows, each on its own: more rows, in one call.

    Results that hold nothing, (0,), are handed on without a batch.
    """
    given = [
        batched(t, dim, size).flatten(0, 1).contiguous() if isinstance(t, Tensor) else t
        for t, dim in zip(args, in_dims, strict=True)
    ]
    found = function.apply(*given)
    outputs = [t if t.shape == (0,) else t.unflatten(0, (size, -1) if len(t) else (size, 0)) for t in found]
    return tuple(outputs), tuple(None if t.shape == (0,) else 0 for t in outputs)


def one_by_one(function: type[Function], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of any function: a call for each sample."""
    calls = []
    for k in range(size):
        sample = [
            t.select(dim, k) if isinstance(t, Tensor) and dim is not None else t
            for t, dim in zip(args, in_dims, strict=True)
        ]
        calls.append(function.apply(*sample))
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


def batched(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with the dimension that vmap runs over in front."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
