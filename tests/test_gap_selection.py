"""GAP: evaluation, selection and stopping; bad input."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastpost
from fastpost.gap.zero_shot import log_likelihoods
from tests.test_gap import VOCABULARY, a_text, bits, same, tiny_model, torch_ascent


def scripted(scores):
    remaining = iter(scores)
    return lambda model: next(remaining)


def test_evaluate_runs_in_eval_mode_without_gradients_and_the_best_state_is_held():
    model = tiny_model()
    states = []
    script = iter([1.0, 2.0, 5.0, torch.tensor(3.0), 5.0, 0])

    def evaluate(m):
        assert not any(module.training for module in m.modules())
        assert not torch.is_grad_enabled()
        states.append(bits(m))
        m.train()  # an evaluation that leaves another mode behind
        return next(script)

    result = fastpost.GAP(n_steps=5)(model, a_text(), evaluate=evaluate)
    assert result.best_step == 2  # the first of the two that score 5
    assert result.scores == [1, 2, 5, 3, 5, 0]
    assert same(bits(model), states[2])
    assert not same(states[2], states[4])
    assert all(m.training for m in model.modules())
    result.rollback()
    assert same(bits(model), states[0])


def test_when_nothing_beats_the_untouched_model_it_is_held():
    model = tiny_model()
    before = bits(model)
    result = fastpost.GAP(n_steps=3)(model, a_text(), evaluate=scripted([0.5, 0.5, -math.inf, 0.4]))
    assert result.best_step == 0
    assert same(before, bits(model))


@pytest.mark.parametrize(
    ("options", "scores", "states", "why"),
    [
        # Falls before min_steps do not count; those after it count without being in a row.
        ({}, [9, 1, 1, 1, 1, 1, 1, 10, 3, 2, 2], 9, "patience"),
        ({}, [9, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2], 8, "patience"),
        ({}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 11, "n_steps"),  # level is not below
        ({"min_steps": 0, "patience": 1}, [9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2, "patience"),
        ({"patience": None}, [9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 11, "n_steps"),
    ],
)
def test_patience(options, scores, states, why):
    result = fastpost.GAP(n_steps=10, **options)(tiny_model(), a_text(), evaluate=scripted(scores))
    assert len(result.scores) == len(result.drift) == len(result.losses) == states
    assert result.scores == scores[:states]
    assert result.stop_reason == why


@pytest.mark.parametrize("scores", [None, [1, 2, 3, 4, 5, 6], [1, 5, 3, 3, 3, 3], [5, 1, 1, 1, 1, 1]])
def test_max_drift_stops_within_the_bound(scores):
    free = fastpost.GAP(n_steps=5)(tiny_model(), a_text())
    bound = (free.drift[3] + free.drift[4]) / 2
    oracle, model = tiny_model(), tiny_model()
    torch_ascent(oracle, a_text(), {None: 3, 2: 3, 5: 1, 1: 0}[scores and scores[1]], fused=True)
    evaluate = scripted(scores) if scores else None
    result = fastpost.GAP(n_steps=5, max_drift=bound)(model, a_text(), evaluate=evaluate)
    assert result.stop_reason == "max_drift"
    assert result.drift == free.drift[:4]
    assert len(result.losses) == 4
    assert same(bits(model), bits(oracle))
    tight = fastpost.GAP(n_steps=5, max_drift=free.drift[1] / 2)(model := tiny_model(), a_text())
    assert tight.best_step == 0
    assert same(bits(model), bits(tiny_model()))


def test_progress(capsys):
    calls = []
    fastpost.GAP(n_steps=3)(tiny_model(), a_text(), progress=lambda *a: calls.append(a))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    fastpost.GAP(n_steps=3)(tiny_model(), a_text(), progress=True)
    shown = "".join(capsys.readouterr())
    assert "3/3" in shown


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_steps": -1}, "n_steps"),
        ({"n_steps": 1.5}, "n_steps"),
        ({"n_steps": True}, "n_steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": -1e-5}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"eps": 0.0}, "eps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (math.nan, 0.9)}, "betas"),
        ({"min_steps": -1}, "min_steps"),
        ({"patience": 0}, "patience"),
        ({"max_drift": 0.0}, "max_drift"),
        ({"max_drift": -1.0}, "max_drift"),
        ({"max_drift": math.nan}, "max_drift"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"loss": "negatives"}, "loss of GAP 'negatives'. Did you mean 'negative'"),
    ],
)
def test_bad_options(options, named):
    with pytest.raises(ValueError, match=named):
        fastpost.GAP(**options)


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), None, ValueError, "the text is empty"),
        (torch.zeros(1, 0, dtype=torch.int64), None, ValueError, "the text is empty"),
        (torch.full((1, 6), 51), None, ValueError, "nothing but padding"),
        (torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 6), ValueError, "nothing but padding"),
        (torch.tensor([[3]]), None, ValueError, "single token"),
        (torch.tensor([[3, 4, 5]]), torch.tensor([[0, 1, 0]]), ValueError, "single token"),
        (torch.tensor([[3, 4, 5]]), torch.tensor([[1, 0, 1]]), ValueError, "holes"),
        (torch.tensor([[3, 4, 5]]), torch.ones(1, 2), ValueError, "does not fit"),
        (torch.tensor([[3, 4, VOCABULARY]]), None, ValueError, f"token {VOCABULARY} is not in the model's vocabulary"),
        (torch.tensor([[3, -100, 4]]), None, ValueError, "token -100 is not in the model's vocabulary"),
        (torch.ones(2, 5, dtype=torch.int64), None, ValueError, r"one text.*\(2, 5\)"),
        (torch.ones(1, 5), None, TypeError, "integers"),
        ([1, 2, 3], None, TypeError, "tensor of token ids"),
    ],
)
def test_bad_texts_write_nothing(ids, mask, error, message):
    model = tiny_model(pad_token_id=51)
    before = bits(model)
    with pytest.raises(error, match=message):
        fastpost.GAP()(model, ids, mask, evaluate=lambda m: pytest.fail("evaluated before the text was checked"))
    assert same(before, bits(model))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(("max_tokens", "used"), [(512, 32), (None, 32), (10, 10)])
def test_long_texts_are_cut_on_the_left(max_tokens, used):
    long = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(3))
    found = []
    for text, warned in ((long, True), (long[-used:], False)):
        model = tiny_model()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = fastpost.GAP(n_steps=2, max_tokens=max_tokens)(model, text)
        assert any(f"40 tokens; its last {used} are used" in str(w.message) for w in caught) == warned
        found.append((result.losses, bits(model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("state", [0, 2])
@pytest.mark.parametrize(
    ("score", "error"),
    [
        (math.nan, ValueError),
        (torch.tensor(math.nan), ValueError),
        (None, TypeError),
        ("0.5", TypeError),
        (True, TypeError),
        (torch.zeros(2), TypeError),
        (1j, TypeError),
    ],
)
def test_bad_scores_restore_the_weights(score, error, state):
    model = tiny_model()
    before = bits(model)
    with pytest.raises(error, match="evaluate"):
        fastpost.GAP()(model, a_text(), evaluate=scripted([1.0] * state + [score]))
    assert same(before, bits(model))


def test_bad_models_and_evaluate():
    with pytest.raises(ValueError, match="requires_grad"):
        fastpost.GAP()(tiny_model().requires_grad_(False), a_text())
    with pytest.raises(TypeError, match="evaluate"):
        fastpost.GAP()(tiny_model(), a_text(), evaluate=0.5)
    with pytest.raises(ValueError, match="causal language model"):
        fastpost.GAP()(nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Flatten(1)), a_text())
    positional = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    assert len(fastpost.GAP(n_steps=2)(positional, a_text()).losses) == 3


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def bert(cls: Any = transformers.BertForMaskedLM, **config: Any) -> Any:
    return cls(transformers.BertConfig(**SMALL, **config))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    return transformers.T5ForConditionalGeneration(config)


class OfOnesOwn(transformers.BertForMaskedLM):
    pass


def with_adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


def replica(model: nn.Module) -> nn.Module:
    """DDP around a model; what looks into it needs no process group."""
    found = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(found)
    found.module = model
    return found


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (bert, "BertForMaskedLM is set to read in both directions"),
        (lambda: bert(transformers.BertLMHeadModel), "BertLMHeadModel is set to read in both directions"),
        (lambda: bert(OfOnesOwn), "OfOnesOwn is set to read in both directions"),
        (lambda: torch.compile(bert()), "BertForMaskedLM is set"),
        (lambda: replica(bert()), "BertForMaskedLM is set"),
        (lambda: replica(torch.compile(bert())), "BertForMaskedLM is set"),
        (lambda: torch.compile(replica(bert())), "BertForMaskedLM is set"),
        (lambda: replica(torch.compile(with_adapters(bert()))), "BertForMaskedLM is set"),
        (lambda: with_adapters(bert()), "BertForMaskedLM is set"),
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_a_model_that_sees_what_it_predicts_is_refused(make: Any, what: str) -> None:
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=f"GAP needs a causal language model, .*{what}"):
        fastpost.GAP(n_steps=2)(model, a_text())
    with pytest.raises(ValueError, match=f"zero-shot needs a causal language model, .*{what}"):
        log_likelihoods(model, [[1]], [[2]])
    assert same(before, bits(model))


def test_models_that_read_one_way_are_served_whoever_made_them() -> None:
    class Anybodys(nn.Module):
        """Says nothing of what it is, and keeps a config that says too much."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()
            self.config = transformers.T5Config()

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.inner(input_ids).logits

    bart = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    for model in (
        Anybodys(),
        bert(is_decoder=True),
        bert(transformers.BertLMHeadModel, is_decoder=True),
        transformers.BartForCausalLM(bart),
    ):
        assert len(fastpost.GAP(n_steps=2)(model, a_text()).losses) == 3
