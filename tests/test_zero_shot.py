"""Zero-shot scores against the definition, one token at a time; F1 by hand; the bootstrap on planted differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastpost.gap.zero_shot import (
    Choice,
    Score,
    bootstrap,
    choice_accuracy,
    dialogue_f1,
    dialogue_prompt,
    encoded,
    log_likelihoods,
    mean_of,
    tidy,
    unigram_f1,
)

from .test_gap import VOCABULARY, tiny_model

WORDS = [f"w{k}" for k in range(VOCABULARY - 1)]


def encode(text: str) -> list[int]:
    return [1 + WORDS.index(word) for word in text.split()]


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
    (short,) = log_likelihoods(model, [context[-31:]], [[5, 6]])  # the last token is not read
    assert float(found) == float(short)
    with torch.no_grad():
        assert float(found) == pytest.approx(one_by_one(model, context[-31:], [5, 6]), rel=1e-5)
    (whole,) = log_likelihoods(model, [context], [context[:32]])  # as many as there are positions
    assert math.isfinite(float(whole))
    with pytest.raises(ValueError, match="a continuation of 33 tokens, the model has 32 positions"):
        log_likelihoods(model, [context], [context[:33]])


def test_choices_are_ranked_by_the_unnormalised_sum() -> None:
    model = tiny_model()
    questions = []
    with torch.no_grad():
        model.eval()
        for k in range(6):
            choices = [f" w{k} w{k + 1}", f" w{k + 2}", f" w{k + 3} w{k} w{k + 9}"]
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


def letters(text: str) -> list[int]:
    return [ord(letter) % 64 for letter in text]


def spelled(ids: list[int]) -> str:
    return "".join(chr(i + 32) if i else "\n" for i in ids)


def by_hand(model: torch.nn.Module, prompt: list[int], n: int, end: int | None) -> list[int]:
    made: list[int] = []
    while len(made) < n:
        token = int(model(input_ids=torch.tensor([prompt + made])).logits[0, -1].argmax())
        if token == end:
            break
        made.append(token)
    return made


DIALOGUES = [
    ["hi there", "good morning . how are you"],
    ["what is it", "a cat", "is it yours ?", "no"],
    ["see you", "bye"],
    ["this one is not asked", "indeed"],
]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_greedy_answers(batch_size: int) -> None:
    """Prompts, padding, the model's end token and the cut at another turn, against one token at a time."""
    model = tiny_model(vocab_size=64, n_positions=96, initializer_range=0.3)
    model.eval()
    end = by_hand(model, letters(dialogue_prompt(DIALOGUES[0][:-1])), 3, None)[-1]
    model.generation_config.eos_token_id = end
    expected = []
    for turns in DIALOGUES[:3]:
        made = by_hand(model, letters(dialogue_prompt(turns[:-1]))[-64:], 32, end)
        expected.append(unigram_f1(spelled(made).split("\nUser ")[0], tidy(turns[-1])))
    model.train()
    seen: list[str] = []

    def decode(ids: list[int]) -> str:
        seen.append(spelled(ids))
        return seen[-1]

    score = dialogue_f1(model, letters, decode, DIALOGUES, limit=3, batch_size=batch_size)
    assert score.values == pytest.approx(tuple(expected))
    assert len(seen) == 3
    assert len(seen[0]) <= 2
    assert model.training


def test_a_checkpoint_s_own_settings_do_not_change_greedy_answers() -> None:
    model = tiny_model(vocab_size=64, n_positions=96, initializer_range=0.3).eval()
    plain = dialogue_f1(model, letters, spelled, DIALOGUES)
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 5.0, 1
    settings = model.generation_config
    answers: list[list[int]] = []
    assert dialogue_f1(model, letters, lambda ids: answers.append(ids) or spelled(ids), DIALOGUES) == plain
    assert any(len(set(ids)) < len(ids) for ids in answers)  # which the settings would forbid
    assert model.generation_config is settings


def test_an_adapter_leaves_the_settings_of_the_model_inside_alone() -> None:
    model = tiny_model(vocab_size=64, n_positions=96)
    model.generation_config.repetition_penalty = 1.3
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    settings = model.generation_config
    dialogue_f1(wrapped, letters, spelled, DIALOGUES, limit=1)
    assert model.generation_config is settings
    assert settings.repetition_penalty == 1.3
    assert "generation_config" not in vars(wrapped)


def test_an_answer_ends_where_it_begins_another_turn() -> None:
    model = tiny_model(vocab_size=64, n_positions=96)
    score = dialogue_f1(model, letters, lambda ids: " bye.\nUser 1: a long story", [["see you", "bye"]])
    assert score.values == (1.0,)


def test_dialogues_are_laid_out_as_lines_of_two_users() -> None:
    assert dialogue_prompt(["hi i 'm BOB", "ok . what now ?"]) == "User 1: Hi I 'm bob.\nUser 2: Ok. What now?\nUser 1:"
    assert dialogue_prompt(["Hello!"]) == "User 1: Hello!\nUser 2:"


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("", ""),
        ("i think so , and i've seen it", "I think so, and I've seen it."),
        ("it is . is it ?  yes", "It is. Is it? Yes."),
        ("he said (no)", "He said (no)"),
        ("xi and hi-fi i", "Xi and hi-fi I."),
    ],
)
def test_tidy(typed: str, written: str) -> None:
    assert tidy(typed) == written


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


def test_the_bootstrap_draws_the_same_however_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (Score(tuple(np.random.default_rng(seed).random(37))) for seed in (1, 2))
    whole = bootstrap(a, b, draws=1000)
    monkeypatch.setattr("fastpost.gap.zero_shot.DRAWN", 100)
    assert bootstrap(a, b, draws=1000) == whole


def test_tasks_count_alike_whatever_their_length() -> None:
    rng = np.random.default_rng(4)
    short, long = (Score(tuple(rng.random(n))) for n in (20, 200))
    better = Score(tuple(np.asarray(short.values) + 0.1))
    before, after = {"short": short, "long": long}, {"short": better, "long": long}
    mean, error = mean_of(before)
    assert mean == pytest.approx((short.mean + long.mean) / 2)
    assert error == pytest.approx(math.hypot(short.standard_error, long.standard_error) / 2)
    assert bootstrap(before, after).difference == pytest.approx(0.05)
    assert bootstrap(before, after).p_value < 1e-3  # every example of one task gains as much
    assert bootstrap({"": short}, {"": better}) == bootstrap(short, better)


def test_bad_input() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no questions"):
        choice_accuracy(model, encode, [])
    with pytest.raises(ValueError, match="answer 2 of 2 choices"):
        choice_accuracy(model, encode, [Choice("w1", ["w2", "w3"], 2)])
    with pytest.raises(ValueError, match="at least one token"):
        choice_accuracy(model, encode, [Choice("", ["w2", "w3"], 0)])
    with pytest.raises(ValueError, match="needs two turns"):
        dialogue_f1(model, letters, spelled, [["w1"]])
    with pytest.raises(ValueError, match="no dialogues"):
        dialogue_f1(model, letters, spelled, [])
    with pytest.raises(TypeError, match=r"Linear has no generate\(\)"):
        dialogue_f1(torch.nn.Linear(2, 2), letters, spelled, [["w1", "w2"]])
    with pytest.raises(ValueError, match="32 new tokens leave no room in the model's 32 positions"):
        dialogue_f1(model, letters, spelled, [["w1", "w2"]])
    with pytest.raises(ValueError, match="no scores"):
        mean_of({})
    with pytest.raises(ValueError, match="tasks a and b; both need the same"):
        bootstrap({"a": Score((1.0, 0.0))}, {"b": Score((1.0, 0.0))})
    with pytest.raises(ValueError, match="33 tokens, the model has 32"):
        log_likelihoods(model, [[1]], [[2] * 33])
    with pytest.raises(ValueError, match="both need the same"):
        bootstrap(Score((1.0, 0.0)), Score((1.0,)))
    assert math.isnan(Score((1.0,)).standard_error)


# -- context and choice are encoded together ------------------------------------------------------------------------------


def llama_like() -> Callable[[str], list[int]]:
    """Puts a mark for a space in front of every text, so that " yes" alone gets one more token than after a context."""
    pieces = ["<unk>", "\u2581", "\u2581one", "\u2581two", "\u2581three", "\u2581yes", "\u2581no"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - (piece == "\u2581")) for piece in pieces], 0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return lambda text: list(tokenizer.encode(text).ids)


class Bigrams(torch.nn.Module):
    """Logits of the next token by the last one."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_choice_is_what_follows_its_context() -> None:
    """Encoded alone, " yes" and " no" would both begin with a mark of their own, after which this model always says yes."""
    encode, table = llama_like(), torch.zeros(7, 7)
    one, two, three, yes, no = range(2, 7)
    table[one, yes] = table[two, yes] = table[three, no] = 3.0
    table[1, yes] = 5.0
    questions = [Choice("one", [" yes", " no"], 0), Choice("two", [" yes", " no"], 0), Choice("three", [" yes", " no"], 1)]
    model = Bigrams(table)
    apart = [log_likelihoods(model, [encode(q.context)] * 2, [encode(c) for c in q.choices]).argmax() for q in questions]
    assert sum(int(a) == q.answer for a, q in zip(apart, questions, strict=True)) / 3 == pytest.approx(0.67, abs=0.01)
    assert choice_accuracy(model, encode, questions).mean == 1.0
    assert encoded(encode, questions[0]) == ([one], [[yes], [no]])
    # A space at the end of the context is the choice's.
    assert encoded(encode, Choice("one ", ["yes", "no"], 0)) == ([one], [[yes], [no]])


def test_pairs_are_those_of_lm_eval() -> None:
    corpus = ["one two three yes no maybe onetwo yesno " * 3] * 4
    tokenizers: dict[str, Tokenizer] = {}
    bpe, unigram, wordpiece = (
        trainers.BpeTrainer(vocab_size=300),
        trainers.UnigramTrainer(vocab_size=40, unk_token="?", special_tokens=["?"]),
        trainers.WordPieceTrainer(vocab_size=60),
    )
    for name, model, pre_tokenizer, trainer in (
        ("byte level", models.BPE(), pre_tokenizers.ByteLevel(), bpe),
        ("no prefix", models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), bpe),
        ("metaspace", models.BPE(), pre_tokenizers.Metaspace(), bpe),
        ("unigram", models.Unigram(), pre_tokenizers.Metaspace(), unigram),
        ("wordpiece", models.WordPiece(unk_token="?"), pre_tokenizers.Whitespace(), wordpiece),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.train_from_iterator(corpus, trainer)
        tokenizers[name] = tokenizer
    encoders = {name: lambda text, t=t: list(t.encode(text).ids) for name, t in tokenizers.items()}
    encoders["llama"] = llama_like()
    for name, encode in encoders.items():
        theirs = SimpleNamespace(backend="causal", tok_encode=lambda text, encode=encode, **_: encode(text))
        for context, choices in (
            ("one two", [" yes", " no"]),
            ("one two ", ["yes", "no one"]),
            ("three no", [" two", " one two"]),
        ):
            question = Choice(context, choices, 0)
            start, tails = encoded(encode, question)
            for choice, tail in zip(choices, tails, strict=True):
                assert (list(start), list(tail)) == TemplateLM._encode_pair(theirs, context, choice), name
    # Parts of one word, and a choice that disappears in its context.
    parts = Tokenizer(models.WordPiece({"?": 0, "one": 1, "##two": 2}, unk_token="?"))
    assert encoded(lambda text: list(parts.encode(text).ids), Choice("one", ["two"], 0)) == ([1], [[2]])
    merged = Tokenizer(models.WordLevel({"onetwo": 0, "one": 1, "?": 2}, "?"))
    with pytest.raises(ValueError, match="the choice 'two' adds no token to its context; begin it with a space"):
        encoded(lambda text: list(merged.encode(text).ids), Choice("one", ["two"], 0))
