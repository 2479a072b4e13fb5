"""Losses, noise and list operations where tensors have no values to read, so that whatever waits for a device fails.

Meta tensors go the ways of torch's operations; the compiled core's own are looked at in test_row_losses.py, and GPUs in
tests/test_gpu_*.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost.gap import losses
from fastpost.ops import params as ops

there = torch.device("meta")
ROWS, CLASSES, WIDTH = 4, 9, 6
Streams = tuple[Tensor, Tensor]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, device=there, requires_grad=True)


def labels(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device=there)


def items() -> Tensor:
    return torch.full((), 3, device=there)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        f"symmetric_kl {reduction}": lambda a, b, how=reduction: fastpost.symmetric_kl(a, b, reduction=how).sum()  # type: ignore[misc]
        for reduction in ("none", "sum", "mean", "batchmean")
    },
    "symmetric_kl, mask": lambda a, b: fastpost.symmetric_kl(a, b, mask=labels(ROWS) == 0, reduction="mean"),
    "js_divergence": lambda a, b: fastpost.js_divergence(a, b, mask=labels(ROWS) == 0, reduction="mean"),
    **{
        f"r3f_loss {reduction}": lambda a, b, how=reduction: fastpost.r3f_loss(a, b, labels(ROWS), reduction=how).loss  # type: ignore[misc]
        for reduction in ("token", "sentence", "fairseq", "sum")
    },
    "r3f_loss, smoothed": lambda a, b: fastpost.r3f_loss(a, b, labels(ROWS), label_smoothing=0.1).loss,
    "r3f_loss, items": lambda a, b: fastpost.r3f_loss(a, b, labels(ROWS), num_items=items()).loss,
    "linear_symmetric_kl": lambda a, b: fastpost.linear_symmetric_kl(a, b, leaf(7, CLASSES)),
    "linear_js_divergence": lambda a, b: fastpost.linear_js_divergence(a, b, leaf(7, CLASSES)),
    "linear_r_drop_loss": lambda a, b: fastpost.linear_r_drop_loss(a, b, leaf(7, CLASSES), labels(ROWS)).loss,
    "linear_r3f_loss": lambda a, b: fastpost.linear_r3f_loss(a, b, leaf(7, CLASSES), labels(ROWS), num_items=items()).loss,
    "add_noise": lambda a, b: fastpost.add_noise(a, 0.1).sum() + b.sum(),
    "embedding_noise": lambda a, b: sum(fastpost.embedding_noise(a, labels(5), 0.1)).sum() + b.sum(),  # type: ignore[union-attr]
    "ascent_loss": lambda a, b: losses.ascent_loss(a[None], labels(1, ROWS)) + b.sum(),
    "weighted_ascent_loss": lambda a, b: losses.weighted_ascent_loss(a[None], labels(1, ROWS)) + b.sum(),
    "simnpo_loss": lambda a, b: losses.simnpo_loss(a[None], labels(1, ROWS)) + b.sum(),
}


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradients(name: str, scale: float | None) -> None:
    with fastpost.use_backend("reference"):
        leaves = leaf(ROWS, CLASSES), leaf(ROWS, CLASSES)
        loss = LOSSES[name](*leaves)
        (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
        assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
        with torch.no_grad():
            LOSSES[name](*leaves)


def test_there_is_nothing_to_read() -> None:
    with pytest.raises(RuntimeError):
        labels(1).item()
    with pytest.raises(RuntimeError):
        bool(labels(1))


OPERATIONS: dict[str, Callable[[list[Tensor], list[Tensor], list[Tensor]], object]] = {
    "squared_norm": lambda w, g, s: ops.squared_norm(g, w, eta=0.01),
    "chunk_squares": lambda w, g, s: ops.chunk_squares(g),
    "squared_distance": lambda w, g, s: ops.squared_distance(w, s),
    "dot": lambda w, g, s: ops.dot(g, s),
    "sam_perturb_": lambda w, g, s: ops.sam_perturb_(w, g, s, ops.squared_norm(g), rho=0.1, adaptive=True, eta=0.01),
    "sam_perturb_ at random": lambda w, g, s: ops.sam_perturb_(w, g, s, ops.squared_norm(g), rho=0.1, seed=3),
    "sam_restore_": lambda w, g, s: ops.sam_restore_(w, s),
    "negate_": lambda w, g, s: ops.negate_(g),
    "negate_clip_": lambda w, g, s: ops.negate_clip_(g, 1.0),
    "flip_signs_": lambda w, g, s: ops.flip_signs_(g, 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_lists(name: str) -> None:
    with fastpost.use_backend("reference"):
        w, g, s = ([torch.randn(5, device=there), torch.randn(2, 3, device=there)] for _ in range(3))
        OPERATIONS[name](w, g, s)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 24), nn.Linear(24, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).mean(1))


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"divergence": "js"}], ids=str)
@pytest.mark.parametrize("forward", ["two_pass", "double_batch"])
def test_a_step_of_r3f(forward: str, options: dict[str, object]) -> None:
    with fastpost.use_backend("reference"):
        model = Classifier().to(there)
        r3f = fastpost.R3F(eps=0.1, forward=forward, embedding="embed", seed=3, **options)  # type: ignore[arg-type]
        r3f._measured.add(torch.float32)  # what the noise becomes is read in the first step, once
        r3f(model, input_ids=labels(6, 9), labels=labels(6)).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
