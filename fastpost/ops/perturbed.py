"""Products and sums at w + e that are rounded once.

Adding c (x U) to an output that is rounded already would lose it: below half a unit in the last place nothing changes. It
has to be there before the product x W is rounded.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastpost.backends.reference import round_randomly
from fastpost.ops.autograd import Function
from fastpost.ops.noise import add_noise


class _Product(Function):
    """x W + factor * x U, and the gradient of x likewise, each sum rounded once.

    Autograd by itself would round dy W and dy U apart and lose the second in the sum; in float16 factor * dy underflows.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, u: Tensor, factor: float) -> Tensor:
        return torch.addmm(x @ u, x, weight, beta=factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.factor = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, u = ctx.saved_tensors
        dx = torch.addmm(dy @ u.t(), dy, weight.t(), beta=ctx.factor) if ctx.needs_input_grad[0] else None
        return dx, x.t() @ dy if ctx.needs_input_grad[1] else None, None, None


def product(x: Tensor, weight: Tensor, u: Tensor | None, factor: float) -> Tensor:
    """x W + factor * x U, in autocast's dtype where autocast is on.

    Args:
        x: (..., in).
        weight, u: (in, out); u=None leaves the second term out, and has no gradient.

    Returns:
        (..., out).
    """
    flat = x.reshape(-1, x.shape[-1])
    if u is None:
        out = flat @ weight
    else:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            flat, weight, u = flat.to(dtype), weight.to(dtype), u.to(dtype)
        out = cast("Tensor", _Product.apply(flat, weight, u, factor))
    return out.view(*x.shape[:-1], out.shape[-1])


def plus_small(y: Tensor, gain: Tensor, factor: float, index: Tensor) -> Tensor:
    """y + factor * gain; 16 bits are rounded at random, by `index`, because y lies on their grid already.

    Args:
        y, gain: of one shape; the gradient of y is that of the sum.
        index: int64 of that shape (or one that broadcasts to it); elements of the same index are rounded the same way.
    """
    if y.dtype.itemsize > 2:
        return torch.add(y, gain, alpha=factor)
    with torch.no_grad():
        moved = round_randomly(y.float() + gain.float() * factor, hashed_bits(index), y.dtype)
    return moved + (y - y.detach())  # the second term is 0 and carries the gradient


def hashed_bits(index: Tensor) -> Tensor:
    """16 well-mixed bits for each int64 index: the same ones every time, without a generator."""
    mask = 0xFFFFFFFF
    h = index & mask
    for factor in (0x7FEB352D, 0x846CA68B):  # a 32-bit finaliser, in int64, where products of 32 and 16 bits still fit
        h = h ^ (h >> 16)
        h = ((h & 0xFFFF) * factor + (((h >> 16) * factor & 0xFFFF) << 16)) & mask
    return (h ^ (h >> 16)) & 0xFFFF


class _NoisedLinear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, eps: float, seed: int, transposed: bool
    ) -> Tensor:
        return torch.nn.functional.linear(x, _noised(weight, scale, eps, seed, transposed), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, scale, ctx.eps, ctx.seed, ctx.transposed = inputs
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ _noised(weight, scale, ctx.eps, ctx.seed, ctx.transposed).to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.flatten(0, -2).sum(0)
        return of_x, None, of_bias, None, None, None, None


def noised_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, eps: float, seed: int, *, transposed: bool = False
) -> Tensor:
    """x (W + e)^T + bias with normal noise e on a frozen weight, drawn again in the backward pass rather than kept.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) if `transposed`; gets no gradient.
        bias: (out,) or None.
        scale: (out,), of each row's noise, beside `eps`.
        seed: key of the noise.

    Returns:
        (..., out).
    """
    noised: Tensor = _NoisedLinear.apply(x, weight, bias, scale, eps, seed, transposed)
    return noised


def _noised(weight: Tensor, scale: Tensor, eps: float, seed: int, transposed: bool) -> Tensor:
    rows = weight.detach().T.contiguous() if transposed else weight.detach()
    return add_noise(rows, eps, "normal", seed=seed, scale=scale)
