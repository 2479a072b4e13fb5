"""Dialogues and questions that a language model is scored on: likelihoods, which are cheap, and generated answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpost.bench.studies import smollm2
from fastpost.bench.studies.study import check_apart
from fastpost.cli.models import Loaded, load_lm
from fastpost.gap.tasks import Task, read_task
from fastpost.gap.zero_shot import Choice, dialogue_f1, dialogue_prompt, encoded, log_likelihoods
from fastpost.modes import evaluating

DIALOGUES = ("blended_skill_talk", "empathetic_dialogues", "wizard_of_internet", "wizard_of_wikipedia")
QUESTIONS = "pubmed_qa"
HALVES = ("even", "odd")


def model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder of a causal language model (default: SmolLM2-135M-Instruct, see smollm2.py)")
    parser.add_argument("--cache", type=Path, help="where the converted SmolLM2 lies or goes")


def load(options: argparse.Namespace) -> Loaded:
    """The model on its device, in float32 and eval mode."""
    loaded = load_lm(options.model or str(smollm2.folder(options.cache)))
    loaded.model.to(options.device).eval()
    return loaded


def check_halves(choose_on: str, report_on: str) -> None:
    """Raises ValueError where one half is to serve for both: the best of many states scores too high on what chose it."""
    if choose_on == report_on:
        raise ValueError(
            f"--choose-on {choose_on} --report-on {report_on}: a state that was chosen on some examples cannot be reported "
            f"on them; take the other half ({' or '.join(half for half in HALVES if half != choose_on)})"
        )


def tasks_of(folder: Path) -> tuple[dict[str, Task], Task]:
    """The dialogue sets by name, and PubMedQA, from the files of GAP's authors."""
    dialogues = {name: read_task(folder / f"validation_data_{name}.json") for name in DIALOGUES}
    return dialogues, read_task(folder / f"validation_data_{QUESTIONS}.csv")


@dataclass(frozen=True)
class Sizes:
    """How much is scored: dialogues of each set, questions, tokens read of each, dialogues to answer in words."""

    dialogues: int
    questions: int
    dialogue_tokens: int
    question_tokens: int
    answers: int


@dataclass
class Part:
    """Examples that serve one purpose, encoded.

    Attributes:
        dialogues: of each set, (first turn, the turns after it), token ids.
        questions: (context, answers, number of the right one).
        to_answer: turns of dialogues that are answered in words.
        texts: all of it as text, to tell two parts apart.
    """

    dialogues: list[tuple[list[int], list[int]]]
    questions: list[tuple[list[int], list[list[int]], int]]
    to_answer: list[Sequence[str]]
    texts: list[str]
    loaded: Loaded

    def scores(self, model: Any, batch_size: int = 8) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Means and their examples, higher is better each.

        `dialogue`: nats per token of the turns after the first, with a minus. `pubmed_accuracy`: share of the questions
        whose right answer is the likeliest. `pubmed`: log-probability of the right one among the three answers.
        """
        dialogue: list[float] = [0.0] * len(self.dialogues)
        accuracy, right = [], []
        with evaluating(model):
            order = sorted(range(len(self.dialogues)), key=lambda i: sum(map(len, self.dialogues[i])))
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                contexts, rest = zip(*(self.dialogues[i] for i in part), strict=True)
                for i, value in zip(part, log_likelihoods(model, contexts, rest).tolist(), strict=True):
                    dialogue[i] = value / len(self.dialogues[i][1])
            for start in range(0, len(self.questions), batch_size):
                batch = self.questions[start : start + batch_size]
                flat = [(context, answer) for context, answers, _ in batch for answer in answers]
                likely = log_likelihoods(model, *zip(*flat, strict=True)).view(len(batch), -1).log_softmax(1)
                for row, (_, _, answer) in zip(likely, batch, strict=True):
                    accuracy.append(float(row.argmax() == answer))
                    right.append(row[answer].item())
        examples = {"dialogue": dialogue, "pubmed_accuracy": accuracy, "pubmed": right}
        return {name: sum(values) / len(values) for name, values in examples.items()}, {
            name: [round(value, 6) for value in values] for name, values in examples.items()
        }

    def f1(self, model: Any) -> list[float]:
        """Unigram F1 of generated answers, one per dialogue."""
        return list(dialogue_f1(model, self.loaded.encode, self.loaded.decode, self.to_answer, max_tokens=256).values)


def parts(folder: Path, loaded: Loaded, choose_on: str, report_on: str, choose: Sizes, report: Sizes) -> tuple[Part, Part]:
    """Every other example to choose by, and the others to report on.

    Raises:
        ValueError: one half for both, or the same text in both halves.
    """
    check_halves(choose_on, report_on)
    dialogues, questions = tasks_of(folder)

    def part(half: str, sizes: Sizes) -> Part:
        start = HALVES.index(half)
        talks = [talk for task in dialogues.values() for talk in list(task.dialogues[start::2])[: sizes.dialogues]]
        to_answer = [talk for task in dialogues.values() for talk in list(task.dialogues[start::2])[: sizes.answers]]
        asked = list(questions.questions[start::2])[: sizes.questions]
        made = [_dialogue(loaded, talk, sizes.dialogue_tokens) for talk in talks]
        texts = ["\n".join(talk) for talk in (*talks, *to_answer)] + [question.context for question in asked]
        return Part(
            made, [_question(loaded, question, sizes.question_tokens) for question in asked], to_answer, texts, loaded
        )

    one, other = part(choose_on, choose), part(report_on, report)
    check_apart(one.texts, other.texts, str(folder))
    return one, other


def _dialogue(loaded: Loaded, turns: Sequence[str], tokens: int) -> tuple[list[int], list[int]]:
    whole = dialogue_prompt(turns).rpartition("\n")[0]  # without whose turn is next
    first = dialogue_prompt(turns[:1])
    context, (rest,) = encoded(loaded.encode, Choice(first, [whole[len(first) :]], 0))
    context = list(context)[: tokens // 2]
    return context, rest[: tokens - len(context)]


def _question(loaded: Loaded, question: Choice, tokens: int) -> tuple[list[int], list[list[int]], int]:
    context, answers = encoded(loaded.encode, question)
    return list(context)[-tokens:], answers, question.answer
