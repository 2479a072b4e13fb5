"""Zero-shot scores against the definition, one token at a time; F1 by hand; the bootstrap on planted differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastpost.gap.zero_shot import (
    Choice,
    Score,
    bootstrap,
    choice_accuracy,
    dialogue_f1,
    log_likelihoods,
    unigram_f1,
)

from .test_gap import VOCABULARY, tiny_model

WORDS = [f"w{k}" for k in range(VOCABULARY - 1)]


def encode(text: str) -> list[int]:
    return [1 + WORDS.index(word) for word in text.split()]


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[i - 1] if i else "\n" for i in ids)


def one_by_one(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    """log p of each token from a pass over what lies before it, in float64."""
    total, seen = 0.0, list(context)
    for token in continuation:
        logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        seen.append(token)
    return total


def test_log_likelihoods_are_sums_over_tokens() -> None:
    model = tiny_model().eval()
    contexts = [[3, 4, 5], [7], [9, 8, 7, 6, 5]]
    continuations = [[1, 2], [30, 31, 32, 33], [11]]
    found = log_likelihoods(model, contexts, continuations)
    with torch.no_grad():
        expected = [one_by_one(model, a, b) for a, b in zip(contexts, continuations, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_long_contexts_lose_their_beginning() -> None:
    model = tiny_model().eval()
    context = [1 + k % 40 for k in range(50)]  # the model has 32 positions
    (found,) = log_likelihoods(model, [context], [[5, 6]])
    (short,) = log_likelihoods(model, [context[-30:]], [[5, 6]])
    assert float(found) == float(short)


def test_choices_are_ranked_by_the_unnormalised_sum() -> None:
    model = tiny_model()
    questions = []
    with torch.no_grad():
        model.eval()
        for k in range(6):
            choices = [f"w{k} w{k + 1}", f"w{k + 2}", f"w{k + 3} w{k} w{k + 9}"]
            sums = [one_by_one(model, encode(f"w{k + 5} w7"), encode(c)) for c in choices]
            best = int(np.argmax(sums))
            questions.append(Choice(f"w{k + 5} w7", choices, best if k % 2 == 0 else (best + 1) % 3))
    model.train()
    score = choice_accuracy(model, encode, questions)
    assert score.values == (1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    assert score.mean == 0.5
    assert score.standard_error == pytest.approx(math.sqrt(0.3 / 6))
    assert all(m.training for m in model.modules())
    assert len(choice_accuracy(model, encode, questions, limit=2).values) == 2


def test_greedy_answers() -> None:
    """A model that always says the next word of the alphabet is right about dialogues that do, up to their end."""

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor) -> object:
            logits = torch.nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY).float()
            return type("Out", (), {"logits": logits})

    def encode_turns(text: str) -> list[int]:
        return [1 + WORDS.index(word) for word in text.replace("\n", " ").split()]

    score = dialogue_f1(
        Counting(), encode_turns, decode, [["w0 w1", "w2 w3"], ["w4", "w5 w6 w7 w8"], ["w1", "w9"]], max_new_tokens=2
    )
    assert score.values == pytest.approx((1.0, 2 * 1 * 0.5 / 1.5, 0.0))


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The cat sat.", "a cat sat", 1.0),
        ("cat", "dog", 0.0),
        ("", "", 1.0),
        ("", "dog", 0.0),
        ("cat cat dog", "cat bird", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
    ],
)
def test_unigram_f1(answer: str, reference: str, f1: float) -> None:
    assert unigram_f1(answer, reference) == pytest.approx(f1)


def test_bootstrap_sees_a_difference_and_none() -> None:
    rng = np.random.default_rng(3)
    a = Score(tuple(rng.integers(0, 2, 300).astype(float)))
    better = Score(tuple(np.where(rng.random(300) < 0.2, 1.0, np.asarray(a.values))))
    found = bootstrap(a, better)
    assert found.difference == pytest.approx(better.mean - a.mean)
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.001
    same = bootstrap(a, a)
    assert same == (0.0, 0.0, 0.0, 1.0)
    other = Score(tuple(rng.permutation(np.asarray(a.values))))
    assert bootstrap(a, other).p_value > 0.5  # the same mean
    spread = (found.high - found.low) / (2 * 1.96)
    differences = np.asarray(better.values) - np.asarray(a.values)
    assert spread == pytest.approx(differences.std(ddof=1) / math.sqrt(300), rel=0.1)


def test_bad_input() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no questions"):
        choice_accuracy(model, encode, [])
    with pytest.raises(ValueError, match="answer 2 of 2 choices"):
        choice_accuracy(model, encode, [Choice("w1", ["w2", "w3"], 2)])
    with pytest.raises(ValueError, match="at least one token"):
        choice_accuracy(model, encode, [Choice("", ["w2", "w3"], 0)])
    with pytest.raises(ValueError, match="needs two turns"):
        dialogue_f1(model, encode, decode, [["w1"]])
    with pytest.raises(ValueError, match="no dialogues"):
        dialogue_f1(model, encode, decode, [])
    with pytest.raises(ValueError, match="33 tokens, the model has 32"):
        log_likelihoods(model, [[1]], [[2] * 33])
    with pytest.raises(ValueError, match="both need the same"):
        bootstrap(Score((1.0, 0.0)), Score((1.0,)))
    assert math.isnan(Score((1.0,)).standard_error)
