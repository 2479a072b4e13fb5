"""Zero-shot tasks from local files, scored together: what `evaluate` and `test` of `fastpost.GAP` may be."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastpost.errors import no_file, not_utf8
from fastpost.gap.zero_shot import LIMIT, Choice, Encode, Score, choice_accuracy, dialogue_f1, mean_of

ANSWERS = ("yes", "maybe", "no")  # of PubMedQA


@dataclass(frozen=True)
class Task:
    """Examples of one kind: questions with choices, scored by accuracy, or dialogues, scored by unigram F1."""

    name: str
    questions: Sequence[Choice] = ()
    dialogues: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        if bool(self.questions) == bool(self.dialogues):
            raise ValueError(f"task {self.name}: either questions or dialogues are needed")

    @property
    def metric(self) -> str:
        return "accuracy" if self.questions else "f1"

    def __len__(self) -> int:
        return len(self.questions) or len(self.dialogues)

    def part(self, start: int, step: int, limit: int) -> Task:
        """Every `step`-th of the first `limit` examples."""
        return replace(self, questions=self.questions[:limit][start::step], dialogues=self.dialogues[:limit][start::step])


def read_task(path: str | Path) -> Task:
    """A task of the name of its file.

    | file | holds |
    | --- | --- |
    | `.json` | dialogues: a list of lists of turns, or such a list (or mapping) under `text` |
    | `.jsonl` | per line `context`, `choices` (texts that continue it) and `answer` (the number of the right one, from 0) |
    | `.csv` | PubMedQA: columns `abstract`, `question`, `final_decision` (yes, maybe, no, in any case) |

    Raises:
        FileNotFoundError: no such file. ValueError: another format, a broken row (named), or no usable example.
    """
    path = Path(path)
    if not path.is_file():
        raise no_file(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return Task(path.stem, dialogues=_dialogues(json.loads(path.read_text(encoding="utf-8-sig"))))
        if suffix == ".jsonl":
            lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
            return Task(path.stem, questions=[_question(line, number) for number, line in lines if line.strip()])
        if suffix == ".csv":
            return Task(path.stem, questions=_pubmed_qa(path))
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
    raise ValueError(f"{path}: dialogues are .json, questions with choices .jsonl, PubMedQA .csv")


def _dialogues(data: Any) -> list[list[str]]:
    data = data["text"] if isinstance(data, dict) else data
    named = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if named is None:
        raise ValueError(f"expected lists of turns, not {json.dumps(data)[:60]}")
    found: list[list[str]] = []
    for name, row in named:
        if not isinstance(row, list) or not all(isinstance(turn, str) for turn in row):
            raise ValueError(f"expected lists of turns, and dialogue {name!r} is {json.dumps(row)[:60]}")
        _check_text(row, f"dialogue {name!r}: ")
        found.append(row)
    return [row for row in found if len(row) > 1]


def _check_text(row: Any, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()  # halves of surrogate pairs, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}{error}") from None


def _question(line: str, number: int) -> Choice:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number}: expected a mapping of context, choices and answer, not {line.strip()[:60]}")
    _check_text(row, f"line {number}: ")
    for name in ("context", "choices", "answer"):
        if name not in row:
            raise ValueError(f"line {number} lacks {name!r}")
    context, choices, answer = row["context"], row["choices"], row["answer"]
    if not isinstance(context, str) or not context:
        raise ValueError(f"line {number}: the context is empty or no text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"line {number}: choices are a list of two texts or more, none of them empty")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"line {number}: answer {answer!r} of {len(choices)} choices, numbered from 0")
    return Choice(context, choices, answer)


def _pubmed_qa(path: Path) -> list[Choice]:
    csv.field_size_limit(1 << 30)
    choices = [f" {answer}" for answer in ANSWERS]
    found = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for row in reader:
            answer = (row["final_decision"] or "").strip().lower()
            if answer not in ANSWERS:
                raise ValueError(
                    f"line {reader.line_num}: final_decision {row['final_decision']!r} is none of {', '.join(ANSWERS)}"
                )
            for name in ("abstract", "question"):  # a row of too few cells has None there
                if not (row[name] or "").strip():
                    raise ValueError(f"line {reader.line_num}: the {name} is missing or empty")
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than columns; quote texts that hold commas")
            context = f"Context: {row['abstract']}\nQuestion: {row['question']}\nAnswer:"
            found.append(Choice(context, choices, ANSWERS.index(answer)))
    return found


@dataclass(frozen=True)
class Suite:
    """Several tasks and how a model reads them; called with a model it gives the mean of their scores.

        suite = Suite([read_task(path) for path in paths], tokenizer_encode, tokenizer.decode)
        choose, report = suite.halves()
        result = fastpost.GAP()(model, text, evaluate=choose, test=report)

    Attributes:
        tasks: each counts alike in the mean, whatever its length.
        encode, decode: text to token ids, without special tokens, and back.
        limit: examples per task at most, its first.
        batch_size: dialogues answered at a time.
    """

    tasks: Sequence[Task]
    encode: Encode
    decode: Callable[[list[int]], str]
    limit: int = LIMIT
    batch_size: int = 16
    last: dict[str, Score] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a suite needs tasks of different names, not {', '.join(names) or 'none'}")

    def halves(self) -> tuple[Suite, Suite]:
        """The same tasks on every other example: one suite to choose a state by, one to report.

        Raises:
            ValueError: a task of a single example.
        """
        for task in self.tasks:
            if min(len(task), self.limit) < 2:
                raise ValueError(f"task {task.name} has a single example, which makes no two halves")
        even, odd = ([task.part(k, 2, self.limit) for task in self.tasks] for k in (0, 1))
        return replace(self, tasks=even, last={}), replace(self, tasks=odd, last={})

    def of(self, metric: str) -> Suite:
        """Only the tasks of one metric, "accuracy" or "f1"."""
        return replace(self, tasks=[task for task in self.tasks if task.metric == metric], last={})

    def scores(self, model: Any) -> dict[str, Score]:
        """Of every task, by name."""
        found: dict[str, Score] = {}
        for task in self.tasks:
            if task.questions:
                found[task.name] = choice_accuracy(model, self.encode, task.questions, self.limit)
            else:
                found[task.name] = dialogue_f1(
                    model, self.encode, self.decode, task.dialogues, self.limit, batch_size=self.batch_size
                )
        return found

    def __call__(self, model: Any) -> float:
        """The mean over tasks; the scores themselves stay in `last`."""
        self.last.clear()
        self.last.update(self.scores(model))
        return mean_of(self.last)[0]
