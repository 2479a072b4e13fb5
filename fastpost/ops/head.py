"""The three products of an output head: logits, the gradient of the hidden states, the gradient of the weight.

Operands may be rounded to 16 bits, results are float32 (float64 for float64): logits are never rounded between the product
and the loss, and gradients are summed over chunks before they are rounded.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastpost.distributed import is_sharded
from fastpost.ops.scalars import POSITIVE, check_number

_SLICE_BYTES = 1 << 25  # of what is held beside the operands: the weight in float32 on CPUs, parts of dW on GPUs


def _multiplies_16_bits(device: torch.device) -> bool:
    """Whether operands of 16 bits give float32 products here."""
    return device.type == "cuda"


def operand_dtype(weight: Tensor, *hidden: Tensor) -> torch.dtype:
    """What a head's operands are rounded to before they are multiplied.

    That of autocast or of 16-bit weights where the hardware multiplies it with float32 results; CPUs multiply in float32.
    """
    if torch.float64 in (weight.dtype, *(t.dtype for t in hidden)):
        return torch.float64
    if not weight.is_cuda:
        return torch.float32
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return weight.dtype


def grad_dtype(*hidden: Tensor) -> torch.dtype:
    """What the hidden states' gradients are kept in until the upstream gradient is known: float16 might lose them before a
    loss scale arrives."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in hidden))
    return torch.float32 if dtype == torch.float16 else dtype


def check_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, prefix: str = "",
    sharded: str = "under tensor parallelism gather the head",
) -> None:  # fmt: skip
    """Refuses a stream of hidden states and a head that do not go together.

    Args:
        prefix: of the arguments' names. sharded: what to do with a DTensor of tensor parallelism.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    for name, t in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if t is None and name == "bias":
            continue
        check_tensor(op, prefix + name, t, sharded)
        if t is not None and t.device != hidden.device:
            raise ValueError(f"{op}: {prefix}hidden is on {hidden.device}, {prefix}{name} on {t.device}")
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: {prefix}hidden (..., width) has shape {tuple(hidden.shape)}, {prefix}weight (vocab, width) "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {prefix}bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    if softcap is not None:
        check_number(op, f"{prefix}softcap", softcap, POSITIVE)


def check_tensor(op: str, name: str, t: Tensor | None, sharded: str) -> None:
    """Refuses what is no plain tensor of floating point."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
    if is_sharded(t):
        raise TypeError(
            f"{op}: {name} is a DTensor. Under FSDP call this where the head's weight is gathered (or pass "
            f"{name}.full_tensor()); {sharded}"
        )
    if not t.dtype.is_floating_point or t.dtype.itemsize < 2:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; float16, bfloat16, float32 and float64 are served")


@functools.cache
def _adds_up(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of 16-bit operands to a float32 matrix. Some versions want that in 16 bits as well."""
    a, total = torch.zeros(8, 8, dtype=dtype, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


class Head:
    """Logits = x W^T + bias, and what its backward pass needs.

    Args:
        weight: (vocab, width).
        bias: (vocab,) or None.
        dtype: what operands are rounded to before they are multiplied. GPUs multiply 16-bit operands as they are and give
            float32; CPUs multiply them as float32, a slice of the vocabulary at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.work = torch.float64 if dtype == torch.float64 else torch.float32
        self.bias = None if bias is None else bias.to(self.work)
        self._native = dtype.itemsize == 2 and _multiplies_16_bits(weight.device)
        self.weight = weight.to(dtype) if self._native else weight
        vocab, width = weight.shape
        step = max(_SLICE_BYTES // (4 * max(width, 1)), 1)
        self._slices = [slice(at, min(at + step, vocab)) for at in range(0, vocab, step)]
        # Multiplied as they are, in one product. Else the weight is converted, a slice at a time.
        self._whole = self._native or weight.dtype == dtype == self.work

    def _part(self, part: slice) -> Tensor:
        return self.weight[part].to(self.dtype).to(self.work)

    def _product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if self._native:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out=out)

    def products(self, x: Tensor, out: Tensor) -> None:
        """out = x W^T, without the bias; x (rows, width) of the operands' dtype, out (rows, vocab)."""
        if self._whole:
            self._product(x, self.weight.t(), out)
            return
        x = x.to(self.work)
        for part in self._slices:
            torch.mm(x, self._part(part).t(), out=out[:, part])

    def hidden_gradient(self, grad: Tensor, out: Tensor) -> None:
        """out = grad W; grad (rows, vocab) of the operands' dtype, out (rows, width)."""
        if self._whole:
            self._product(grad, self.weight, out)
            return
        out.zero_()
        for part in self._slices:
            out.addmm_(grad[:, part].to(self.work), self._part(part))

    def weight_gradient(self, grad: Tensor, x: Tensor, total: Tensor, *, add: bool, factor: Tensor | None = None) -> None:
        """total = grad^T x / factor, or with `add` total += that; total (vocab, width), grad and x of the operands' dtype.

        A factor costs two passes more over every slice of the total.
        """
        if factor is None and self._whole and not add:
            self._product(grad.t(), x, total)
        elif factor is None and self._native and _adds_up(x.device, x.dtype):
            torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
        elif factor is None and not self._native:
            total = total if add else total.zero_()
            total.addmm_(grad.to(self.work).t(), x.to(self.work))
        else:
            for part in self._slices:
                if self._native:
                    product = torch.mm(grad[:, part].t(), x, out_dtype=torch.float32)
                else:
                    product = grad[:, part].to(self.work).t() @ x.to(self.work)
                if factor is not None:
                    product.div_(factor)
                if add:
                    total[part] += product
                else:
                    total[part] = product


def power_of_two(x: Tensor) -> Tensor:
    """The power of two that brings the largest magnitude in x into [1/2, 1), on x's device; 1 where there is none."""
    largest = torch.linalg.vector_norm(x.float(), torch.inf) if x.numel() else x.new_zeros((), dtype=torch.float32)
    exponent = torch.frexp(largest).exponent.clamp(-120, 120)
    usable = (largest > 0) & largest.isfinite()
    one = torch.ones_like(largest)
    return torch.where(usable, torch.ldexp(one, -exponent), one)
