"""All losses under torch.compile, in one graph: with a gradient, in validation, and with sizes that change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import fastpost

ROWS, WIDTH, CLASSES = 6, 8, 11
_DRAWN = torch.Generator().manual_seed(0)  # at import, where nobody has seeded torch's own: every process tests the same
WEIGHT, TEACHER, OTHER = (torch.randn(n, WIDTH, generator=_DRAWN) for n in (CLASSES, CLASSES, 9))


def top(hidden: Tensor) -> Tensor:
    known = fastpost.linear_top_log_probs(OTHER[: len(hidden)], TEACHER, 3)
    return fastpost.linear_top_k_distillation_loss(
        hidden, WEIGHT, known.ids, known.log_probs, teacher_rest=known.rest
    ).loss  # fmt: skip


def labels(hidden: Tensor) -> Tensor:
    return torch.arange(len(hidden)) % CLASSES


def logits(hidden: Tensor) -> Tensor:
    return linear(hidden, WEIGHT)


def others(hidden: Tensor) -> Tensor:
    return linear(hidden + 0.1, TEACHER)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "symmetric_kl": lambda h: fastpost.symmetric_kl(logits(h), others(h)),
    "js_divergence": lambda h: fastpost.js_divergence(logits(h), others(h)),
    "r3f_loss": lambda h: fastpost.r3f_loss(logits(h), others(h), labels(h), label_smoothing=0.1).loss,
    "distillation_loss": lambda h: fastpost.distillation_loss(logits(h), others(h)).loss,
    "linear_symmetric_kl": lambda h: fastpost.linear_symmetric_kl(h, h + 0.1, WEIGHT),
    "linear_r3f_loss": lambda h: fastpost.linear_r3f_loss(h, h + 0.1, WEIGHT, labels(h)).loss,
    "linear_r_drop_loss": lambda h: fastpost.linear_r_drop_loss(h, h + 0.1, WEIGHT, labels(h)).loss,
    "linear_distillation_loss": lambda h: fastpost.linear_distillation_loss(h, WEIGHT, h + 0.1, TEACHER).loss,
    "linear_top_k_distillation_loss": top,
    "linear_top_log_probs": lambda h: fastpost.linear_top_log_probs(h, WEIGHT, 3).log_probs.sum(),
}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", LOSSES)
def test_one_graph(name: str, dynamic: bool | None, recorded: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    loss = LOSSES[name]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (ROWS, ROWS + 1) if dynamic else (ROWS,):
        hidden = torch.randn(rows, WIDTH, requires_grad=True)
        with torch.set_grad_enabled(recorded):
            found, expected = compiled(hidden), loss(hidden)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(value, hidden) for value in (found, expected)))
        elif not recorded:
            plain = hidden.detach()
            torch.testing.assert_close(compiled(plain), loss(plain))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["symmetric_kl", "js_divergence", "r3f_loss"])
def test_transforms_inside(name: str) -> None:
    """torch.func records what torch.compile does not see recorded."""
    torch.manual_seed(0)
    torch.compiler.reset()
    loss, hidden, move = LOSSES[name], torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    for transform in (torch.func.grad(loss), lambda h: torch.func.jvp(loss, (h,), (move,))[1]):
        expected = transform(hidden)
        assert expected.any()
        torch.testing.assert_close(torch.compile(transform, backend="aot_eager")(hidden), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["symmetric_kl", "r3f_loss"])
def test_in_place_runs_between_two_graphs(name: str) -> None:
    """As it does without a compiler, in the logits' memory; one graph for all cannot be had, and the error says why."""

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        clean, noised = logits(hidden), others(hidden)
        if name == "symmetric_kl":
            return fastpost.symmetric_kl(clean, noised, inplace=True), clean
        return fastpost.r3f_loss(clean, noised, labels(hidden), inplace=True).loss, clean

    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager")):
        torch.compiler.reset()
        hidden = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value, clean = run(hidden)
        assert not torch.equal(clean, logits(hidden))
        value.backward()
        found.append((value.detach(), hidden.grad, clean.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out inplace=True or fullgraph=True"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden.detach().requires_grad_())
