"""Classification tasks: docstrings of the standard library, and GLUE tasks from local TSV files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpost.bench.studies import stdlib
from fastpost.errors import unknown

TASKS = ("stdlib", "rte", "cola", "mrpc")
# Docstrings of one source file in the validation or test split at most, so that no split is one file's style.
_PER_FILE = 20


@dataclass(frozen=True)
class Example:
    """A text, for pair tasks a second one, and the index of its label."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True)
class Task:
    """A classification task. `train` is for learning, `validation` for choosing, `test` for reporting only."""

    name: str
    labels: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    source: str

    def majority(self) -> float:
        """Accuracy on `test` of always saying its most frequent label."""
        counts = [0] * len(self.labels)
        for example in self.test:
            counts[example.label] += 1
        return max(counts) / len(self.test)


def load(name: str, data_dir: str | None, sizes: tuple[int, int, int]) -> Task:
    """The task, its splits cut to (train, validation, test) sizes; 0 takes all there is.

    The same files give the same splits in the same order everywhere.

    Raises:
        ValueError: no such task, a broken row (the message names file and line), too few examples, or a `data_dir` that is
            missing or not wanted.
        FileNotFoundError: a file of the task is missing.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    if name == "stdlib":
        if data_dir is not None:
            raise ValueError("--data-dir is for the GLUE tasks; --task stdlib reads the sources of this Python")
        return docstring_task(sizes)
    if data_dir is None:
        raise ValueError(f"--task {name} needs --data-dir, a folder with train.tsv and dev.tsv in GLUE's form")
    return glue_task(name, Path(data_dir), sizes)


def docstring_task(sizes: tuple[int, int, int], folder: Path | None = None) -> Task:
    """Which area of the standard library does a docstring come from?

    Every area has the same number of examples. No source file gives examples to two splits, and no text occurs twice, so the
    test asks for the area and not for an author's phrases.
    """
    by_area: dict[str, dict[str, list[str]]] = {}
    for area, file, text in stdlib.docstrings(folder):
        by_area.setdefault(area, {}).setdefault(file, []).append(text)
    labels = tuple(sorted(by_area))
    if len(labels) < 2:
        raise ValueError(
            f"found docstrings for {len(labels)} of {len(stdlib.AREAS)} areas in {folder or stdlib.root()}; this Python "
            "has no library sources with docstrings. Take --task rte, cola or mrpc."
        )
    train: list[Example] = []
    validation: list[Example] = []
    test: list[Example] = []
    for label, area in enumerate(labels):
        files = dict(sorted(by_area[area].items(), key=lambda item: stdlib.order(area, item[0])))
        for split, size in ((test, sizes[2]), (validation, sizes[1]), (train, sizes[0])):
            last = split is train
            wanted = -(-size // len(labels)) if size else (10**9 if last else sum(map(len, files.values())) // 4)
            texts = _take(files, wanted, None if last else _PER_FILE)
            split += [Example(text, None, label) for text in texts]
    for split, size in ((train, sizes[0]), (validation, sizes[1]), (test, sizes[2])):
        split.sort(key=lambda example: stdlib.order(example.text))
        del split[size or len(split) :]
    return _checked(
        Task("stdlib", labels, train, validation, test, f"docstrings in {folder or stdlib.root()}, {len(labels)} areas")
    )


def _take(files: dict[str, list[str]], wanted: int, per_file: int | None) -> list[str]:
    """Up to `wanted` texts, from as many files as that needs in their order; those files are removed, whole."""
    texts: list[str] = []
    while files and len(texts) < wanted:
        file = next(iter(files))
        texts += sorted(files.pop(file), key=stdlib.order)[:per_file]
    return sorted(texts, key=stdlib.order)[:wanted]


@dataclass(frozen=True)
class _Form:
    """Where a GLUE file holds what: columns of the texts and of the label, the header's first cell, and the labels."""

    folder: str
    columns: int
    texts: tuple[int, ...]
    label: int
    header: str | None
    labels: tuple[str, ...]


_FORMS = {
    "rte": _Form("RTE", 4, (1, 2), 3, "index", ("entailment", "not_entailment")),
    "mrpc": _Form("MRPC", 5, (3, 4), 0, "Quality", ("0", "1")),
    "cola": _Form("CoLA", 4, (3,), 1, None, ("0", "1")),
}


def glue_task(name: str, data_dir: Path, sizes: tuple[int, int, int]) -> Task:
    """A GLUE task from train.tsv and dev.tsv in `data_dir` (or in its subfolder of the task's name).

    `test` is GLUE's dev split, whose labels are public; `validation` is cut from train.
    """
    form = _FORMS[name]
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir} is not a folder")
    folder = data_dir if (data_dir / "train.tsv").exists() else data_dir / form.folder
    rows = read_tsv(folder / "train.tsv", form)
    test = read_tsv(folder / "dev.tsv", form)
    rows.sort(key=lambda example: stdlib.order(example.text, example.pair or ""))
    cut = min(sizes[1] or len(rows) // 10, len(rows) // 4)
    train, validation = rows[cut:], rows[:cut]
    return _checked(
        Task(
            name,
            form.labels,
            train[: sizes[0] or None],
            validation,
            test[: sizes[2] or None],
            f"{folder} (test: dev.tsv; validation: cut from train.tsv)",
        )
    )


def read_tsv(path: Path, form: _Form) -> list[Example]:
    """The rows of a GLUE file. Quotes are literal and a byte-order mark is passed over, as GLUE's files want it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the first row that is not UTF-8, has the wrong number of columns, an empty text or an unknown label;
            names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; GLUE's {form.folder} comes as train.tsv and dev.tsv")
    examples = []
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, raw in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            cells = raw.decode().removesuffix("\r").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
        if number == 1 and form.header is not None:
            if cells[0] != form.header:
                raise ValueError(f"{where}: expected a header that begins with {form.header!r}, found {cells[0]!r}")
            continue
        if len(cells) != form.columns:
            raise ValueError(f"{where}: {len(cells)} columns where {form.columns} are expected, separated by tabs")
        texts = [cells[i].strip() for i in form.texts]
        if not all(texts):
            raise ValueError(f"{where}: a text is empty")
        if cells[form.label] not in form.labels:
            raise ValueError(f"{where}: label {cells[form.label]!r} is none of {', '.join(form.labels)}")
        examples.append(Example(texts[0], texts[1] if len(texts) > 1 else None, form.labels.index(cells[form.label])))
    return examples


def _checked(task: Task) -> Task:
    splits: Sequence[tuple[str, list[Example]]] = (
        ("train", task.train),
        ("validation", task.validation),
        ("test", task.test),
    )
    for split, examples in splits:
        if not examples:
            raise ValueError(f"task {task.name}: nothing left for the {split} split; ask for smaller sizes")
    return task
