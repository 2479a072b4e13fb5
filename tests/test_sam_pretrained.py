"""What 16 bits do to SAM on a pretrained encoder with real gradients, and what helps; the table is in docs/sam.md."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.bench.studies.tasks import Example
from fastpost.bench.studies.tuning import Classifier

RHO = 0.05


TOPICS = (
    (
        "The kettle boils before the bread is cut, and butter softens beside the stove.",
        "Two eggs, a cup of flour and a pinch of salt make a batter thin enough for crêpes.",
        "Roast the onions slowly until their edges turn brown and sweet.",
    ),
    (
        "The ferry crosses the strait twice a day unless the wind is from the north.",
        "Trains to the coast leave from the platform behind the old customs house.",
        "She drove through the night and reached the border shortly before sunrise.",
    ),
    (
        "A prime number has exactly two divisors, one and itself.",
        "The sum of two random variables has the convolution of their densities.",
    ),
)


class Pass(NamedTuple):
    """Losses and gradients at w and at w + e."""

    loss: float
    gradient: Tensor
    perturbed_loss: float
    perturbed_gradient: Tensor
    gain: float


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Any, Pass]:
    """all-MiniLM-L6-v2 in bfloat16 after four steps on a batch, and the truth in float64 from the same weights."""
    classifier = Classifier(None, len(TOPICS))
    model = classifier.fresh(0).eval()
    examples = [Example(text, None, label) for label, topic in enumerate(TOPICS) for text in topic]
    batch = classifier.collate(classifier.encode(examples, 32))
    base = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(4):
        base.zero_grad()
        loss_of(model, batch).backward()
        base.step()
    low = model.bfloat16()
    return low, batch, both_passes(copy.deepcopy(low).double(), batch)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits.double(), batch["labels"])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def both_passes(encoder: nn.Module, batch: Any, **options: Any) -> Pass:
    opt = SAM(encoder.parameters(), torch.optim.SGD, rho=RHO, lr=0.0, **options)
    encoder.zero_grad()
    loss = loss_of(encoder, batch)
    loss.backward()
    gradient = flat(encoder)
    with opt.perturbed():
        perturbed = loss_of(encoder, batch)
        perturbed.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gain = opt.report.stored_gain.item()
    return Pass(loss.item(), gradient, perturbed.item(), flat(encoder), gain)


def error(got: Tensor, truth: Tensor) -> float:
    return ((got - truth).norm() / truth.norm()).item()


def test_in_bfloat16_a_stored_perturbation_is_partly_lost_and_a_functional_one_is_not(setting) -> None:
    model, batch, truth = setting
    rise = truth.perturbed_loss - truth.loss
    assert rise == pytest.approx(RHO * truth.gradient.norm().item(), rel=0.15)  # small for this loss
    stored = both_passes(model, batch)
    functional = both_passes(model, batch, perturb="functional", model=model)
    own = error(functional.gradient, truth.gradient)  # what bfloat16 does to a gradient without any SAM
    # One draw of rounding noise against another: 0.98 with one thread, 1.59 with two; stored 9.6 and 14.8.
    assert error(functional.perturbed_gradient, truth.perturbed_gradient) < 2 * own
    assert error(stored.perturbed_gradient, truth.perturbed_gradient) > 5 * own
    assert (functional.perturbed_loss - functional.loss) / rise == pytest.approx(1.0, abs=0.05)
    assert (stored.perturbed_loss - stored.loss) / rise < 0.97
    # and the report knew it from the perturb pass itself
    assert (stored.perturbed_loss - stored.loss) / rise == pytest.approx(stored.gain, abs=0.04)
    assert functional.gain == pytest.approx(1.0, abs=1e-3)


def test_fair_rounding_keeps_the_second_gradient_although_the_noise_is_larger_than_e(setting) -> None:
    model, batch, truth = setting
    rise = truth.perturbed_loss - truth.loss
    got = both_passes(model, batch, rounding="stochastic")
    own = error(got.gradient, truth.gradient)
    assert error(got.perturbed_gradient, truth.perturbed_gradient) < 2 * own
    assert (got.perturbed_loss - got.loss) / rise == pytest.approx(1.0, abs=0.03)
