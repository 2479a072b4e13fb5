"""The halves of a double batch: gradients written over the logits are the whole gradient, without a copy."""

from __future__ import annotations

import pytest
import torch

import fastpost
from fastpost.ops.halves import writable_halves

from .conftest import same_bits


def logits(rows: int = 6, classes: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = torch.randn(rows, classes, requires_grad=True)
    return leaf, leaf * 1.0


def test_the_gradient_is_that_of_slices_and_lies_where_the_logits_lay() -> None:
    leaf, both = logits()
    labels = torch.tensor([3, -100, 7])
    caught: list[torch.Tensor] = []
    both.register_hook(caught.append)
    clean, noised = writable_halves(both)
    assert clean.data_ptr() == both.data_ptr()
    fastpost.r3f_loss(clean, noised, labels, inplace=True).loss.backward()
    plain = leaf.detach().clone().requires_grad_()
    fastpost.r3f_loss(*(plain * 1.0).chunk(2), labels).loss.backward()
    assert leaf.grad is not None
    assert plain.grad is not None
    assert same_bits(leaf.grad, plain.grad)
    assert caught[0].data_ptr() == both.data_ptr()


def test_gradients_from_elsewhere_are_put_together() -> None:
    leaf, both = logits()
    clean, noised = writable_halves(both)
    (clean * 2).sum().backward(retain_graph=True)  # the noised half got none
    assert leaf.grad is not None
    assert leaf.grad[:3].unique().tolist() == [2.0]
    assert leaf.grad[3:].unique().tolist() == [0.0]
    (clean.sum() + 3 * noised.sum()).backward()
    assert leaf.grad[:3].unique().tolist() == [3.0]
    assert leaf.grad[3:].unique().tolist() == [3.0]


def test_who_kept_the_logits_for_its_own_backward_pass_is_told() -> None:
    leaf = torch.randn(6, 40, requires_grad=True)
    clean, noised = writable_halves(torch.tanh(leaf))  # tanh differentiates through its own output
    loss = fastpost.symmetric_kl(clean, noised, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
