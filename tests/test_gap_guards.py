"""Guards of an ascent: the state that breaks a bound is taken back, bit for bit, and the result says which bound it was."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastpost
from fastpost.gap import checks
from fastpost.gap.guards import Probe

from .test_gap import VOCABULARY, a_text, bits, same, tiny_model
from .test_gap_selection import scripted

LR = 1e-2  # fast enough for bounds to be crossed within a few steps


def states(n: int = 6) -> list[torch.nn.Module]:
    """The model after 0, 1, ... n steps without any guard."""
    found = []
    for steps in range(n + 1):
        model = tiny_model()
        fastpost.GAP(n_steps=steps, lr=LR)(model, a_text())
        found.append(model)
    return found


def probe_batch() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))


def kl_of(model: torch.nn.Module, batch: torch.Tensor) -> float:
    """KL(start || now) from the equation, in float64."""
    p, q = (F.softmax(m.eval()(input_ids=batch).logits.double(), -1) for m in (tiny_model(), model))
    return float((p * (p.log() - q.log())).sum(-1).mean().detach())


def between(values: list[float]) -> float:
    """A bound that the fourth state is within and the fifth is not."""
    assert all(values[4] > value for value in values[:4])
    return (values[3] + values[4]) / 2


def check(result: fastpost.GapResult, model: torch.nn.Module, why: str, kept: int = 3) -> None:
    assert result.stop_reason == why
    assert result.best_step == kept
    assert len(result.drift) == kept + 1
    assert same(bits(model), bits(states(kept)[kept]))


def test_max_loss() -> None:
    free = fastpost.GAP(n_steps=6, lr=LR)(tiny_model(), a_text())
    model = tiny_model()
    result = fastpost.GAP(n_steps=6, lr=LR, max_loss=between(free.losses))(model, a_text())
    check(result, model, "max_loss")
    assert result.losses == free.losses[:4]


def test_max_kl() -> None:
    batch = probe_batch()
    kls = [kl_of(m, batch) for m in states()]
    model = tiny_model()
    result = fastpost.GAP(n_steps=6, lr=LR, max_kl=between(kls))(model, a_text(), probe=batch)
    check(result, model, "max_kl")
    assert result.kl == pytest.approx(kls[:4], rel=1e-4, abs=1e-7)


def test_max_layer_drift() -> None:
    free = fastpost.GAP(n_steps=4, lr=LR, max_layer_drift=1e9)
    layers = free(tiny_model(), a_text()).layer_drift
    assert any(".h." in name or "layers." in name for name in layers)
    model = tiny_model()
    three = fastpost.GAP(n_steps=3, lr=LR, max_layer_drift=1e9)(tiny_model(), a_text()).layer_drift
    bound = (max(three.values()) + max(layers.values())) / 2
    result = fastpost.GAP(n_steps=6, lr=LR, max_layer_drift=bound)(model, a_text())
    check(result, model, "max_layer_drift")
    assert result.layer_drift == three
    assert math.sqrt(sum(d * d for d in three.values())) == pytest.approx(result.drift[-1], rel=1e-5)


def test_max_grad_norm_stops_ahead_of_the_step() -> None:
    model = tiny_model()
    result = fastpost.GAP(n_steps=6, lr=LR, max_grad_norm=1e-9)(model, a_text())
    check(result, model, "max_grad_norm", kept=0)
    assert len(result.losses) == 1
    assert len(fastpost.GAP(n_steps=3, lr=LR, max_grad_norm=1e9)(tiny_model(), a_text()).drift) == 4


@pytest.mark.parametrize("scores", [[1, 2, 3, 4, 5], [1, 5, 3, 3, 3], [5, 1, 1, 1, 1]])
def test_with_evaluate_the_best_state_within_the_bounds_is_kept(scores: list[float]) -> None:
    free = fastpost.GAP(n_steps=6, lr=LR)(tiny_model(), a_text())
    model = tiny_model()
    gap = fastpost.GAP(n_steps=6, lr=LR, max_loss=between(free.losses), patience=None)
    result = gap(model, a_text(), evaluate=scripted(scores))
    best = scores[:4].index(max(scores[:4]))
    assert result.stop_reason == "max_loss"
    assert result.best_step == best
    assert same(bits(model), bits(states(4)[best]))


def test_a_loss_that_is_no_number_breaks_the_bound() -> None:
    model = tiny_model()
    start = bits(model)
    calls = [0]

    def poison(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return output * math.nan if calls[0] == 2 else output  # the first state that a step has made

    handle = model.lm_head.register_forward_hook(poison)
    result = fastpost.GAP(n_steps=4, lr=LR, max_loss=1e9)(model, a_text())
    handle.remove()
    assert result.stop_reason == "max_loss"
    assert same(bits(model), start)


def test_bounds_never_reached_change_nothing() -> None:
    model = tiny_model()
    result = fastpost.GAP(n_steps=4, lr=LR, max_loss=1e9, max_kl=1e9, max_drift=1e9, max_layer_drift=1e9, max_grad_norm=1e9)(
        model, a_text(), probe={"input_ids": probe_batch(), "attention_mask": torch.ones(3, 9), "labels": None}
    )
    assert result.stop_reason == "n_steps"
    assert same(bits(model), bits(states(4)[4]))
    assert len(result.kl) == len(result.drift) == 5


def test_padding_of_the_probe_does_not_count() -> None:
    model, moved = tiny_model(), states(2)[2]
    batch = probe_batch()
    mask = torch.ones_like(batch)
    longer = F.pad(batch, (0, 3))
    with_padding = {"input_ids": longer, "attention_mask": F.pad(mask, (0, 3))}
    assert Probe(model.eval(), with_padding).kl(moved.eval()) == pytest.approx(Probe(model, batch).kl(moved), rel=1e-4)


# -- selection and report -------------------------------------------------------------------------------------------------


def test_test_scores_are_of_the_untouched_and_of_the_kept_state() -> None:
    model, seen = tiny_model(), []

    def test(m: torch.nn.Module) -> float:
        assert not m.training
        seen.append(bits(m))
        return float(len(seen))

    result = fastpost.GAP(n_steps=4, lr=LR)(model, a_text(), evaluate=scripted([1, 5, 2, 2, 2]), test=test)
    assert result.test_scores == [1.0, 2.0]
    assert same(seen[0], bits(tiny_model()))
    assert same(seen[1], bits(states(1)[1]))
    assert fastpost.GAP(n_steps=1)(tiny_model(), a_text()).test_scores == []


def test_choosing_on_the_reported_data_is_refused() -> None:
    model = tiny_model()
    before = bits(model)
    score = scripted([1.0] * 12)
    with pytest.raises(ValueError, match=r"same object.*allow_leak=True"):
        fastpost.GAP(n_steps=2)(model, a_text(), evaluate=score, test=score)
    assert same(before, bits(model))
    result = fastpost.GAP(n_steps=2)(model, a_text(), evaluate=score, test=score, allow_leak=True)
    assert len(result.test_scores) == 2


class Scorer:
    """Scores on data of its own."""

    def __init__(self, score: float = 1.0) -> None:
        self.value = score

    def score(self, model: torch.nn.Module) -> float:
        return self.value


def on(ids: torch.Tensor, model: torch.nn.Module, weights: tuple[float, ...] = ()) -> float:
    return float(ids.sum()) + sum(weights)


@pytest.mark.parametrize(
    "make",
    [
        lambda scorer: scorer.score,
        lambda scorer: functools.partial(scorer.score),
        lambda scorer: functools.partial(on, a_text(), weights=(0.5, 1)),
        lambda scorer: functools.partial(functools.partial(Scorer.score, scorer)),
    ],
)
def test_two_names_for_one_score_are_one(make: Any) -> None:
    scorer = Scorer()
    evaluate, test = make(scorer), make(scorer)
    assert evaluate is not test
    with pytest.raises(ValueError, match=r"same object, or the same method or partial of it.*allow_leak=True"):
        checks.check_callables(evaluate, test, False)
    checks.check_callables(evaluate, test, True)


def test_methods_of_two_objects_and_partials_of_other_parts_are_two() -> None:
    partial, text, model = functools.partial, a_text(), tiny_model()
    for evaluate, test in (
        (Scorer().score, Scorer().score),
        (partial(on, text), partial(on, text + 1)),
        (partial(on, text), partial(on, text, weights=(1.0,))),
        (partial(on, text, weights=(1.0,)), partial(on, text, weights=(2.0,))),
        (partial(on, text), partial(on, text.float())),
        (partial(on, text), lambda m: on(text, m)),
    ):
        checks.check_callables(evaluate, test, False)
    result = fastpost.GAP(n_steps=1)(model, text, evaluate=Scorer(1.0).score, test=Scorer(2.0).score)
    assert (result.scores, result.test_scores) == ([1.0, 1.0], [2.0, 2.0])


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"max_loss": 0.0}, {}, "max_loss must be > 0"),
        ({"max_kl": -1.0}, {}, "max_kl must be > 0"),
        ({"max_layer_drift": math.nan}, {}, "max_layer_drift"),
        ({"max_grad_norm": "1"}, {}, "max_grad_norm"),
        ({"max_tokens": 1}, {}, "max_tokens"),
        ({"max_kl": 0.1}, {}, "max_kl and probe go together"),
        ({}, {"probe": torch.zeros(1, 4, dtype=torch.int64)}, "max_kl and probe go together"),
        ({"max_kl": 0.1}, {"probe": torch.zeros(4, dtype=torch.int64)}, "probe must be token ids"),
        ({"max_kl": 0.1}, {"probe": torch.zeros(0, 4, dtype=torch.int64)}, "probe must be token ids"),
        (
            {"max_kl": 0.1},
            {"probe": dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(1, 4).long())},
            "leave at least",
        ),
    ],
)
def test_bad_input_writes_nothing(options: dict, call: dict, message: str) -> None:
    model = tiny_model()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        fastpost.GAP(n_steps=2, **options)(model, a_text(), **call)
    assert same(before, bits(model))


def test_a_test_that_fails_restores_the_weights() -> None:
    model = tiny_model()
    before = bits(model)
    with pytest.raises(ValueError, match="NaN"):
        fastpost.GAP(n_steps=2, lr=LR)(model, a_text(), test=scripted([1.0, math.nan]))
    assert same(before, bits(model))
