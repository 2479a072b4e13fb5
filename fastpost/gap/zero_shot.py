"""Zero-shot scores as GAP's authors take them (2306.07052), each with its standard error, and whether two of them differ.

Choices are ranked by the unnormalised summed log-probability of their tokens after the context; dialogues are answered
greedily and compared by unigram F1. The first 320 examples of a task count, as in the authors' code.
"""

from __future__ import annotations

import contextlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpost.gap.checks import check_causal
from fastpost.modes import evaluating

Encode = Callable[[str], Sequence[int]]
LIMIT = 320
DRAWN = 1 << 22  # examples that the bootstrap draws at a time, which bounds its memory


class Choice(NamedTuple):
    """A question with its answers: the number of the right one among `choices`, texts that continue `context`."""

    context: str
    choices: Sequence[str]
    answer: int


@dataclass(frozen=True)
class Score:
    """A mean over examples.

    Attributes:
        values: one per example, in [0, 1].
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float:
        """Of the mean, over examples; NaN for a single one."""
        n, mean = len(self.values), self.mean
        if n < 2:
            return math.nan
        return math.sqrt(sum((v - mean) ** 2 for v in self.values) / (n - 1) / n)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_error:.4f}"


@torch.no_grad()
def log_likelihoods(model: Any, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probability of each continuation after its context: float64 (batch,).

    Args:
        model: a causal language model in transformers' calling convention; its mode is left as it is.
        contexts, continuations: token ids, none of them empty. The last token is predicted and not read; of what is longer
            than the model's positions beyond that, the beginning is left out (as lm-eval does).

    Raises:
        ValueError: an empty context or continuation, or a continuation that leaves no room for a token before it; a model of
            transformers that is not causal.
    """
    check_causal("zero-shot", model)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 1 << 30
    rows = []
    for context, continuation in zip(contexts, continuations, strict=True):
        if not len(context) or not len(continuation):
            raise ValueError("zero-shot: a context and a continuation of at least one token each are needed")
        if len(continuation) > positions:
            raise ValueError(f"zero-shot: a continuation of {len(continuation)} tokens, the model has {positions} positions")
        rows.append([*context, *continuation][-(positions + 1) :])
    # What predicts the last token ends before it; single-token answers to one question then share one row.
    inputs = list(dict.fromkeys(tuple(row[:-1]) for row in rows))
    width = max(map(len, inputs))
    device = next(model.parameters()).device
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in inputs], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs], device=device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    found = []
    for row, continuation in zip(rows, continuations, strict=True):
        scores = logits[inputs.index(tuple(row[:-1])), len(row) - 1 - len(continuation) : len(row) - 1]
        nll = F.cross_entropy(scores.float(), torch.tensor(list(continuation), device=device), reduction="none")
        found.append(-nll.double().sum())
    return torch.stack(found).cpu()


def encoded(encode: Encode, question: Choice) -> tuple[Sequence[int], list[list[int]]]:
    """Token ids of a question's context and of each choice after it.

    Each choice is encoded together with the context, of which it is the tail: alone, many tokenizers would begin it as they
    begin a text (a mark for a space in Llama 2 and SentencePiece, a whole word in WordPiece). Spaces that end the context go
    to the choices, because tokenizers join them to the word that follows (both as lm-eval does).

    Raises:
        ValueError: a choice that adds no token to its context.
    """
    text = question.context.rstrip() or question.context
    spaces = question.context[len(text) :]
    context = encode(text)
    tails = [list(encode(text + spaces + choice))[len(context) :] for choice in question.choices]
    for choice, tail in zip(question.choices, tails, strict=True):
        if not tail:
            raise ValueError(
                f"zero-shot: the choice {choice!r} adds no token to its context; begin it with a space, or end the context "
                "at a whole word"
            )
    return context, tails


def choice_accuracy(model: Any, encode: Encode, questions: Sequence[Choice], limit: int = LIMIT) -> Score:
    """Share of questions whose right answer is the likeliest by its summed log-probability, not normalised by length.

    A question for which the model's predictions are NaN is not answered.

    Args:
        model: as in `log_likelihoods`; put into eval mode for the time being.
        encode: text to token ids, without special tokens.
        questions: the first `limit` count. Context and choice are encoded together.

    Raises:
        ValueError: no questions, or one whose answer is none of its choices or one of whose choices adds no token.
    """
    if not questions:
        raise ValueError("zero-shot: no questions")
    values = []
    with evaluating(model):
        for question in questions[:limit]:
            if not 0 <= question.answer < len(question.choices):
                raise ValueError(f"zero-shot: answer {question.answer} of {len(question.choices)} choices")
            context, continuations = encoded(encode, question)
            scores = log_likelihoods(model, [context] * len(continuations), continuations)
            answered = not bool(scores.isnan().any())  # argmax takes a NaN for the largest
            values.append(float(answered and int(scores.argmax()) == question.answer))
    return Score(tuple(values))


def dialogue_f1(
    model: Any,
    encode: Encode,
    decode: Callable[[list[int]], str],
    dialogues: Sequence[Sequence[str]],
    limit: int = LIMIT,
    max_new_tokens: int = 32,
    max_tokens: int = 512,
    batch_size: int = 16,
) -> Score:
    """Unigram F1 of greedy answers with the last turn of each dialogue, given the turns before it.

    Args:
        model: with transformers' `generate`; put into eval mode for the time being.
        encode, decode: text to token ids, without special tokens, and back.
        dialogues: turns; at least two each. The first `limit` count. They are laid out by `dialogue_prompt`.
        max_new_tokens: an answer ends there, at the model's end token, or where it begins another turn.
        max_tokens: of a longer prompt the last so many are used, and as many as leave room for the answer.
        batch_size: dialogues answered at a time, padded on the left; a rounding apart it changes nothing.

    Raises:
        ValueError: no dialogues, or one with fewer than two turns. TypeError: the model has no `generate`.
    """
    if not dialogues:
        raise ValueError("zero-shot: no dialogues")
    if not callable(getattr(model, "generate", None)):
        raise TypeError(
            f"zero-shot: {type(model).__name__} has no generate(); dialogues are answered by transformers' models"
        )
    for turns in dialogues[:limit]:
        if len(turns) < 2:
            raise ValueError("zero-shot: a dialogue needs two turns, one to answer")
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 1 << 30
    room = min(max_tokens, positions - max_new_tokens)
    if room < 1:
        raise ValueError(f"zero-shot: {max_new_tokens} new tokens leave no room in the model's {positions} positions")
    chosen = dialogues[:limit]
    values: list[float] = []
    with evaluating(model):
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            prompts = [list(encode(dialogue_prompt(turns[:-1])))[-room:] for turns in part]
            for answer, turns in zip(_greedy(model, prompts, max_new_tokens), part, strict=True):
                values.append(unigram_f1(decode(answer).split("\nUser ")[0], tidy(turns[-1])))
    return Score(tuple(values))


@torch.no_grad()
def _greedy(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(end) if isinstance(end, list | tuple) else {end}
    with _plainly_greedy(model, end):
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=0
        )
    answers = made[:, width:].tolist()
    return [row[: next((k for k, token in enumerate(row) if token in ends), len(row))] for row in answers]


@contextlib.contextmanager
def _plainly_greedy(model: Any, end: Any) -> Iterator[None]:
    """Without what a checkpoint's own settings add to greedy decoding, such as a penalty on repetition."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        yield
        return
    # PEFT's generate hands its own settings on to the model inside.
    own = [(module, vars(module).get("generation_config")) for module in model.modules()]
    model.generation_config = type(settings)(eos_token_id=end, pad_token_id=0)
    try:
        yield
    finally:
        for module, before in own:
            vars(module).pop("generation_config", None)
            if before is not None:
                module.generation_config = before


def dialogue_prompt(turns: Sequence[str]) -> str:
    """Turns of two speakers, one per line, and whose turn it is: `User 1: ...`, `User 2: ...`, `User 1:`."""
    lines = [f"User {k % 2 + 1}: {tidy(turn)}" for k, turn in enumerate(turns)]
    return "\n".join([*lines, f"User {len(turns) % 2 + 1}:"])


def tidy(text: str) -> str:
    """A turn as written text: lower case but for the first letter of a sentence and I, no space before punctuation, a final
    full stop where none of `.!?)"'` stands there. The corpora differ in how they were typed; the protocol evens that out."""
    text = re.sub(r"\s+([.,?!])", r"\1", " ".join(text.lower().split()))
    text = re.sub(r"(?<![\w'])i(?=$|[ .,?!]|'(?:m|ve|ll|d)\b)", "I", text)
    text = re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda letter: letter.group().upper(), text)
    return text if not text or text[-1] in ".!?)\"'" else f"{text}."


def unigram_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as multisets; lower case, without punctuation and articles."""
    a, b = (_words(text) for text in (answer, reference))
    common = sum((Counter(a) & Counter(b)).values())
    if not common:
        return float(not a and not b)
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


class Comparison(NamedTuple):
    """A difference of means on the same examples: b - a, its 95 % interval, and how likely one as large is by chance."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap(
    a: Score | Mapping[str, Score], b: Score | Mapping[str, Score], draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Paired bootstrap of b - a over examples; two-sided p-value by centring the differences at 0.

    Args:
        a, b: scores of the same examples; or of several tasks by name, whose means count alike and whose examples are drawn
            task by task.

    Raises:
        ValueError: scores of different tasks or examples, or of a single one.
    """
    before = {"": a} if isinstance(a, Score) else dict(a)
    after = {"": b} if isinstance(b, Score) else dict(b)
    if before.keys() != after.keys() or not before:
        raise ValueError(
            f"bootstrap: tasks {', '.join(before) or 'none'} and {', '.join(after) or 'none'}; both need the same"
        )
    generator = np.random.default_rng(seed)
    mean, means = 0.0, np.zeros(draws)
    for name, score in before.items():
        other = after[name]
        if len(score.values) != len(other.values) or len(score.values) < 2:
            raise ValueError(
                f"bootstrap: {len(score.values)} and {len(other.values)} examples; both need the same, two or more"
            )
        differences = np.asarray(other.values) - np.asarray(score.values)
        at_once = max(DRAWN // len(differences), 1)
        for start in range(0, draws, at_once):
            part = means[start : start + at_once]
            picks = generator.integers(0, len(differences), (len(part), len(differences)))
            part += differences[picks].mean(1) / len(before)
        mean += float(differences.mean()) / len(before)
    low, high = (float(q) for q in np.quantile(means, (0.025, 0.975)))
    p_value = float((np.abs(means - mean) >= abs(mean) - 1e-15).mean())
    return Comparison(mean, low, high, p_value)


def mean_of(scores: Mapping[str, Score]) -> tuple[float, float]:
    """Mean over tasks, each counting alike, and its standard error over their examples."""
    if not scores:
        raise ValueError("zero-shot: no scores to average")
    errors = [score.standard_error for score in scores.values()]
    return sum(s.mean for s in scores.values()) / len(scores), math.sqrt(sum(e * e for e in errors)) / len(scores)
