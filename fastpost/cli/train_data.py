"""Training data of `fastpost train`: text, JSONL, CSV, TSV and what `datasets` loads, as examples for a model."""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastpost.cli import tables
from fastpost.cli.train_options import DataOptions
from fastpost.errors import unknown

HELD_OUT = 10  # one row in so many, where no validation data are given
HEAD = 1000  # rows that are looked at for a label that nobody named


@dataclass(frozen=True)
class Row:
    """A text, for pairs a second one, and the name of its label (None: text to model)."""

    text: str
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows to evaluate on; `labels` is empty for text to model.

    Attributes:
        by_tokens: a single text of a few lines, whose last tenth of tokens is to be held out (`streams` does it).
        notes: what was recognised in the files.
    """

    train: list[Row]
    validation: list[Row]
    labels: tuple[str, ...]
    held_out: bool
    by_tokens: bool = False
    notes: tuple[str, ...] = ()

    def told(self) -> str:
        where = "validation data as given"
        if self.held_out:
            where = "a tenth held out by a fixed draw" if len(self.train) > 1 else "its last tenth held out"
            where += ", of every label alike" if self.labels else ""
        what = f"{len(self.labels)} labels" if self.labels else "text"
        counts = "1 text" if self.by_tokens else f"{len(self.train)} training and {len(self.validation)} validation rows"
        return "; ".join((f"{counts} ({where}), {what}", *self.notes))

    def majority(self) -> tuple[str, float]:
        """The most frequent label of the training rows, and the accuracy on the validation rows of always saying it."""
        label, _ = Counter(str(row.label) for row in self.train).most_common(1)[0]
        return label, sum(row.label == label for row in self.validation) / len(self.validation)


def read(options: DataOptions, needs_validation: bool = True) -> Data:
    """The data that the options name.

    Args:
        needs_validation: False leaves all rows to training where no validation data are given.

    Raises:
        ValueError: a broken row (file and line are named), a missing column, a column that looks like a label and is not
            used, a label that training data do not have, too few rows. ImportError: `datasets` is needed and missing.
    """
    train, validation, notes = _both(options)
    names = {row.label for row in train if row.label is not None}
    labels = tuple(sorted(names, key=_order))
    if len(labels) == 1:
        raise ValueError(f"every training row has the label {labels[0]!r}; there is nothing to learn")
    for row in validation:
        if (row.pair is None) != (train[0].pair is None):
            raise ValueError("training and validation data differ in having pairs; see --pair_column")
        if (row.label is None) != (not labels):
            raise ValueError("training and validation data differ in having labels; see --label_column")
        if row.label is not None and row.label not in names:
            raise unknown("label of the validation data", row.label, labels)
    held_out = not validation and needs_validation
    by_tokens = held_out and len(train) == 1 and not labels and last_lines(train[0].text) is None
    if held_out and not by_tokens:
        train, validation = hold_out(train)
    return Data(train, validation, labels, held_out, by_tokens, notes)


def read_texts(options: DataOptions) -> tuple[list[str], list[str]]:
    """The training texts and the validation texts (none where none are given), whatever labels and pairs there are.

    Raises:
        ValueError, ImportError: as `read`.
    """
    alone = replace(options, pair_column="none", label_column="none")
    train, validation, _ = _both(alone)
    return [row.text for row in train], [row.text for row in validation]


def _both(options: DataOptions) -> tuple[list[Row], list[Row], tuple[str, ...]]:
    if options.dataset is not None:
        (train, notes), (validation, others) = _from_hub(options)
    else:
        assert options.train_file is not None
        train, notes = _rows_of_file(Path(options.train_file), options)
        given = options.validation_file
        validation, others = ([], ()) if given is None else _rows_of_file(Path(given), options)
    return train, validation, tuple(dict.fromkeys((*notes, *others)))


def _order(label: str) -> tuple[int, int, str]:
    """Whole numbers by their value, before names."""
    return (0, int(label), label) if re.fullmatch("-?[0-9]+", label) else (1, 0, label)


def last_lines(text: str) -> tuple[str, str] | None:
    """A text without the last tenth of its lines, and these; None where it has too few lines."""
    lines = text.splitlines(keepends=True)
    cut = len(lines) - len(lines) // HELD_OUT
    parts = "".join(lines[:cut]), "".join(lines[cut:])
    return parts if all(part.strip() for part in parts) else None


def hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """A tenth of the rows, the same every time, and of every label alike; of a single text its last tenth, by lines.

    A label's last row stays in training.

    Raises:
        ValueError: no row can be spared.
    """
    if len(rows) == 1 and rows[0].label is None and (parts := last_lines(rows[0].text)):
        return [Row(parts[0])], [Row(parts[1])]
    spare = {label: min(math.ceil(count / HELD_OUT), count - 1) for label, count in Counter(r.label for r in rows).items()}
    held: set[int] = set()
    for k in random.Random(0).sample(range(len(rows)), len(rows)):
        if len(held) < max(len(rows) // HELD_OUT, 1) and spare[rows[k].label]:
            spare[rows[k].label] -= 1
            held.add(k)
    if not held:
        what = "are a single row" if len(rows) == 1 else "have a single row of each label"
        raise ValueError(f"the training data {what}, so that none can be held out; give --validation_file")
    return [row for k, row in enumerate(rows) if k not in held], [row for k, row in enumerate(rows) if k in held]


# -- where rows come from ---------------------------------------------------------------------------------------------------


Read = tuple[list[Row], tuple[str, ...]]  # rows, and notes on what was recognised and what is not used


def _rows_of_file(path: Path, options: DataOptions) -> Read:
    suffix = tables.suffix_of(path)
    if suffix not in tables.KINDS:
        known = ", ".join(f"{kind} ({ending})" for ending, kind in tables.KINDS.items())
        raise ValueError(f"{path}: what kind of data is a {path.suffix or 'file without an ending'}? Known: {known}")
    if suffix == ".txt":
        text = tables.text_of(path)
        if not text.strip():
            raise ValueError(f"{path} holds no text")
        return [Row(text)], ()
    lines = tables.read(path, options.text_column)
    rows, notes = _rows(lines.rows, options, str(path))
    return rows, (lines.note, *notes) if lines.note else notes


def _from_hub(options: DataOptions) -> tuple[Read, Read]:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"--dataset needs the package datasets ({error}). Run: pip install datasets") from error
    name = options.dataset
    columns = (options.text_column, options.pair_column or "pair", options.label_column or "label")
    try:
        config = datasets.load_dataset_builder(name, options.dataset_config).config
        loaded = datasets.load_dataset(name, options.dataset_config, **_as_written(config, columns))
    except Exception as error:  # whatever its many readers raise, the name was wrong, or what is there cannot be read
        raise ValueError(f"--dataset {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    validation = options.validation_split or ("validation" if "validation" in loaded else None)
    parts: list[Read] = []
    for split in (options.train_split, validation):
        if split is not None and split not in loaded:
            raise unknown(f"split of {name}", split, loaded)
        parts.append(([], ()) if split is None else _rows_of_split(loaded[split], options, f"{name}, {split}"))
    return parts[0], parts[1]


def _as_written(config: Any, columns: Sequence[str]) -> dict[str, Any]:
    """Options of the CSV reader by which cells are what --train_file reads; none for other readers."""
    if not hasattr(config, "keep_default_na"):
        return {}
    tsv = "\t" in (config.sep, config.delimiter)
    literal = {"quoting": csv.QUOTE_NONE} if tsv else {}
    return {"keep_default_na": False, "converters": dict.fromkeys(columns, str), **literal}


def _rows_of_split(split: Any, options: DataOptions, where: str) -> Read:
    named = {column: kind.names for column, kind in split.features.items() if hasattr(kind, "names")}

    def lines() -> Iterable[tables.Line]:
        for number, row in enumerate(split):
            for column, names in named.items():
                if column.strip() == (options.label_column or "label") and row[column] is not None and row[column] < 0:
                    raise ValueError(f"{where}, row {number}: no label (-1)")
                row[column] = None if row[column] is None or row[column] < 0 else names[row[column]]
            yield f"{where}, row {number}", {column.strip(): value for column, value in row.items()}

    return _rows(lines(), options, where, {column.strip() for column in named})


def _rows(lines: Iterable[tables.Line], options: DataOptions, source: str, labels: Collection[str] = ()) -> Read:
    """Rows from mappings by the names of their columns; `labels` are columns that are known to be labels."""
    found: list[Row] = []
    lines = iter(lines)
    head = list(itertools.islice(lines, HEAD))
    if not head:
        raise ValueError(f"{source} holds no rows")
    columns = _columns(head, options, source, labels)
    for where, line in itertools.chain(head, lines):
        text, pair, label = (None if name is None else _cell(line, name, where) for name in columns)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: the {columns[0]} is empty or no text")
        if pair is not None and not isinstance(pair, str):
            raise ValueError(f"{where}: the {columns[1]} is no text")
        if found and (pair is None) != (found[0].pair is None):
            raise ValueError(f"{where}: a row without a pair among rows with one, or the other way round")
        for usual, asked, taken in (("pair", options.pair_column, columns[1]), ("label", options.label_column, columns[2])):
            if asked is None and taken is None and line.get(usual) is not None:
                raise ValueError(f"{where} has a {usual}, and the first row has none; say --{usual}_column, or none for it")
        found.append(Row(text, pair, None if columns[2] is None else label_of(label, where)))
    unused = [name or "one without a name" for name in head[0][1] if name not in columns]
    return found, (f"columns not used: {', '.join(unused)}",) if unused else ()


def _columns(
    head: Sequence[tables.Line], options: DataOptions, source: str, labels: Collection[str]
) -> tuple[str, str | None, str | None]:
    where, first = head[0]
    if options.text_column not in first:
        raise unknown(f"--text_column (in {where})", options.text_column, first)
    found: list[str | None] = []
    for asked, usual, option in (
        (options.pair_column, "pair", "pair_column"),
        (options.label_column, "label", "label_column"),
    ):
        if asked is not None and asked != "none" and asked not in first:
            raise unknown(f"--{option} (in {where})", asked, first)
        found.append(None if asked == "none" else asked or (usual if usual in first else None))
    pair, label = found
    if options.text_column in found or (pair is not None and pair == label):
        raise ValueError(f"{where}: text, pair and label are three columns, not {options.text_column}, {pair} and {label}")
    if label is None and options.label_column is None:
        rows = [line for _, line in head]
        others = [name for name in first if name not in (options.text_column, pair)]
        like = [name for name in others if name in labels or looks_like_a_label(name, [row.get(name) for row in rows])]
        if like:
            raise ValueError(
                f"{source}: no column is called label, and {' and '.join(map(repr, like))} "
                f"{'looks' if len(like) == 1 else 'look'} like one. Say --label_column {like[0]} to learn it, or "
                "--label_column none to leave it aside and model the text"
            )
    if pair is not None and label is None:
        raise ValueError(
            f"{where} has a {pair} but no label: pairs are classified. Say --label_column, or --pair_column none"
        )
    return options.text_column, pair, label


def _cell(line: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in line:
        raise ValueError(f"{where}: there is no {name}")
    return line[name]


def digest(rows: Iterable[Row]) -> str:
    """Tells other rows, or rows in another order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((row.text, row.pair, row.label)).encode())
    return found.hexdigest()[:32]


# -- labels -----------------------------------------------------------------------------------------------------------------

_LABELS = frozenset(
    """label labels class classes target targets category categories sentiment polarity stance intent emotion rating stars
    verdict outcome decision annotation gold spam toxic toxicity y""".split()  # noqa: SIM905
)
_NOT_LABELS = frozenset(
    """id ids idx index number row source lang language split date time year timestamp url domain subset meta file path
    author title license version dump set fold group part tokens count length""".split()  # noqa: SIM905
)


def looks_like_a_label(name: str, values: Sequence[Any]) -> bool:
    """By its name, or because a few short values recur; fractions and long texts are none, whatever the name."""
    words = set(re.split(r"[\W_]+", name.lower()))
    there = [value for value in values if value is not None and value != ""]
    try:
        names = [label_of(value, "") for value in there]
    except ValueError:
        return False
    if not names or max(map(len, names)) > 40:
        return False
    if words & _LABELS:
        return True
    kinds = len(set(names))
    return not words & _NOT_LABELS and 2 <= kinds <= 20 and len(names) >= 2 * max(kinds, 2)


def label_of(value: Any, where: str) -> str:
    """The name of a label, the same for 1, 1.0, "1", "+1" and "1.0", and for true and "True", wherever it was read.

    Raises:
        ValueError: none there, or a number with a fraction.
    """
    text = str(value).strip() if isinstance(value, (str, bool, int, float)) else ""
    if text == "" or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{where}: no label")
    if text.lower() in ("true", "false"):
        return text.lower()
    if isinstance(value, float) or re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", text):
        number = float(text)
        if not number.is_integer():
            raise ValueError(f"{where}: the label {text} is a number with a fraction; labels are names or whole numbers")
        return str(int(number))
    return text.removeprefix("+") if re.fullmatch(r"\+\d+", text) else text


# -- what a model takes -----------------------------------------------------------------------------------------------------


def classified(rows: Sequence[Row], tokenizer: Any, label2id: Mapping[str, int], max_length: int) -> list[dict[str, Any]]:
    """Token ids, cut to `max_length`, and labels, not padded yet."""
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    encoded = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=max_length)
    columns = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [{**inputs, "labels": label2id[row.label or ""]} for inputs, row in zip(columns, rows, strict=True)]


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to token ids, without special tokens, and without a word about texts longer than the model's context."""
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def streams(data: Data, encode: Callable[[str], list[int]], end: int | None, size: int) -> tuple[list[int], list[int]]:
    """The token ids of all training and of all validation texts on end, each text followed by `end` where there are several.

    Of a single text of a few lines the last tenth of its tokens is held out, and at least one block of `size`.
    """
    if data.by_tokens:
        return cut(encode(data.train[0].text), size)
    found = []
    for rows in (data.train, data.validation):
        ids: list[int] = []
        for row in rows:
            ids += encode(row.text)
            if end is not None and len(rows) > 1:
                ids.append(end)
        found.append(ids)
    return found[0], found[1]


def cut(ids: list[int], least: int) -> tuple[list[int], list[int]]:
    """A text's tokens without its last tenth, and that: at least `least` tokens of it, but no more than half."""
    at = len(ids) - max(len(ids) // HELD_OUT, min(least, len(ids) // 2))
    return ids[:at], ids[at:]


def blocks(ids: Sequence[int], size: int, which: str) -> list[dict[str, Any]]:
    """Blocks of `size` tokens; what is left over is dropped.

    Raises:
        ValueError: not one whole block; `which` names the data.
    """
    whole = [list(ids[k : k + size]) for k in range(0, len(ids) - size + 1, size)]
    if not whole:
        raise ValueError(f"the {which} data are {len(ids)} tokens, less than one block of --max_length {size}")
    return [{"input_ids": block, "labels": block} for block in whole]
