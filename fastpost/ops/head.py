"""The three products of an output head: logits, the gradient of the hidden states, the gradient of the weight.

Operands may be rounded to 16 bits, results are float32 (float64 for float64): logits are never rounded between the product
and the loss, and gradients are summed over chunks before they are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE_BYTES = 1 << 25  # of what is held beside the operands: the weight in float32 on CPUs, parts of dW on GPUs


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
        self._native = weight.is_cuda and dtype.itemsize == 2
        self.weight = weight.to(dtype) if self._native else weight
        vocab, width = weight.shape
        whole = not self._native and weight.dtype == dtype == self.work
        step = vocab if whole else _SLICE_BYTES // (4 * max(width, 1))
        self._slices = [slice(at, min(at + step, vocab)) for at in range(0, vocab, max(step, 1))]

    def _part(self, part: slice) -> Tensor:
        return self.weight[part].to(self.dtype).to(self.work)

    def products(self, x: Tensor, out: Tensor) -> None:
        """out = x W^T, without the bias; x (rows, width) of the operands' dtype, out (rows, vocab)."""
        if self._native:
            torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)
            return
        x = x.to(self.work)
        for part in self._slices:
            torch.mm(x, self._part(part).t(), out=out[:, part])

    def hidden_gradient(self, grad: Tensor, factor: Tensor | None) -> Tensor:
        """grad W / factor; grad (rows, vocab) and factor as `operand` gives them."""
        if self._native:
            total = torch.mm(grad, self.weight, out_dtype=torch.float32)
        else:
            total = torch.zeros(grad.shape[0], self.weight.shape[1], dtype=self.work, device=grad.device)
            for part in self._slices:
                total.addmm_(grad[:, part].to(self.work), self._part(part))
        return total if factor is None else total.div_(factor)

    def add_weight_gradient_(self, total: Tensor, grad: Tensor, factor: Tensor | None, x: Tensor) -> None:
        """total += grad^T x / factor; total (vocab, width)."""
        x = x if self._native else x.to(self.work)
        for part in self._slices:
            if self._native:
                product = torch.mm(grad[:, part].t(), x, out_dtype=torch.float32)
            elif factor is None:
                total[part].addmm_(grad[:, part].to(self.work).t(), x)
                continue
            else:
                product = grad[:, part].to(self.work).t() @ x
            total[part] += product if factor is None else product.div_(factor)

    def operand(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits' gradient as an operand, and the power of two it was multiplied by (None: 1).

        Float16 ends at 6e-8, where the gradients of a mean over tokens lie, so they are brought near 1.
        """
        if self.dtype != torch.float16:
            return grad.to(self.dtype), None
        factor = power_of_two(grad)
        return grad.mul_(factor).to(self.dtype), factor


def power_of_two(x: Tensor) -> Tensor:
    """The power of two that brings the largest magnitude in x into [1/2, 1), on x's device; 1 where there is none."""
    largest = torch.linalg.vector_norm(x.float(), torch.inf) if x.numel() else x.new_zeros((), dtype=torch.float32)
    exponent = torch.frexp(largest).exponent.clamp(-120, 120)
    usable = (largest > 0) & largest.isfinite()
    one = torch.ones_like(largest)
    return torch.where(usable, torch.ldexp(one, -exponent), one)
