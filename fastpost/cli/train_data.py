"""Training data of `fastpost train`: text, JSONL, CSV, TSV and what `datasets` loads, as examples for a model."""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastpost.cli import tables
from fastpost.cli.train_options import DataOptions
from fastpost.errors import unknown

HELD_OUT = 10  # one row in so many, where no validation data are given


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
        held_out: the validation rows are of the training data; of a single text there are none yet, and `streams` holds out
            its last tokens.
        notes: what was recognised in the files.
    """

    train: list[Row]
    validation: list[Row]
    labels: tuple[str, ...]
    held_out: bool
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        where = "validation data as given"
        if self.held_out:
            where = "a tenth held out by a fixed draw" if self.validation else "its last tenth held out"
            where += ", of every label alike" if self.labels else ""
        what = f"{len(self.labels)} labels" if self.labels else "text"
        counts = f"{len(self.train)} training and {len(self.validation)} validation rows" if self.validation else "1 text"
        return "; ".join((f"{counts} ({where}), {what}", *self.notes))

    def majority(self) -> tuple[str, float]:
        """The most frequent label of the training rows, and the accuracy on the validation rows of always saying it."""
        label, _ = Counter(str(row.label) for row in self.train).most_common(1)[0]
        return label, sum(row.label == label for row in self.validation) / len(self.validation)


def read(options: DataOptions) -> Data:
    """The data that the options name; where no validation data are given, some of the training data are held out.

    Raises:
        ValueError: a broken row (file and line are named), a missing column, columns of which nobody said whether one is the
            label, a label that training data do not have, too few rows. ImportError: `datasets` is needed and missing.
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
    held_out = not validation
    if held_out and (len(train) > 1 or labels):
        train, validation = hold_out(train)
    return Data(train, validation, labels, held_out, notes)


def read_texts(options: DataOptions) -> tuple[list[str], list[str]]:
    """The training texts and the validation texts (none where none are given), whatever labels and pairs there are.

    Raises:
        ValueError, ImportError: as `read`.
    """
    train, validation, _ = _both(replace(options, pair_column="none", label_column="none"))
    return [row.text for row in train], [row.text for row in validation]


def hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """A tenth of the rows, the same every time, and of every label alike; a label's last row stays in training.

    Raises:
        ValueError: no row can be spared.
    """
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


def digest(rows: Iterable[Row]) -> str:
    """Tells other rows, or rows in another order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((row.text, row.pair, row.label)).encode())
    return found.hexdigest()[:32]


# -- where rows come from ---------------------------------------------------------------------------------------------------


def _both(options: DataOptions) -> tuple[list[Row], list[Row], tuple[str, ...]]:
    """Training rows, validation rows, and notes on what was recognised and what is not used."""
    notes: list[str] = []
    if options.dataset is not None:
        train, validation = _from_hub(options, notes)
    else:
        assert options.train_file is not None
        train = _rows_of_file(Path(options.train_file), options, notes)
        given = options.validation_file
        validation = [] if given is None else _rows_of_file(Path(given), options, notes)
    return train, validation, tuple(dict.fromkeys(notes))


def _rows_of_file(path: Path, options: DataOptions, notes: list[str]) -> list[Row]:
    suffix = tables.suffix_of(path)
    if suffix not in tables.KINDS:
        known = ", ".join(f"{kind} ({ending})" for ending, kind in tables.KINDS.items())
        raise ValueError(f"{path}: what kind of data is a {path.suffix or 'file without an ending'}? Known: {known}")
    if suffix == ".txt":
        text = tables.text_of(path)
        if not text.strip():
            raise ValueError(f"{path} holds no text")
        return [Row(text)]
    lines, note = tables.read(path, options.text_column)
    notes += [note] if note else []
    return _rows(lines, options, str(path), notes)


def _from_hub(options: DataOptions, notes: list[str]) -> tuple[list[Row], list[Row]]:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"--dataset needs the package datasets ({error}). Run: pip install datasets") from error
    name = options.dataset
    columns = (options.text_column, options.pair_column or "pair", options.label_column or "label")
    try:
        config = datasets.load_dataset_builder(name, options.dataset_config).config
        as_written: dict[str, Any] = {}
        if hasattr(config, "keep_default_na"):  # the reader of CSV: cells are what --train_file reads
            as_written = {"keep_default_na": False, "converters": dict.fromkeys(columns, str)}
            if "\t" in (config.sep, config.delimiter):
                as_written["quoting"] = csv.QUOTE_NONE
        loaded = datasets.load_dataset(name, options.dataset_config, **as_written)
    except Exception as error:  # whatever its many readers raise, the name was wrong, or what is there cannot be read
        raise ValueError(f"--dataset {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    validation = options.validation_split or ("validation" if "validation" in loaded else None)
    parts: list[list[Row]] = [[], []]
    for part, split in zip(parts, (options.train_split, validation), strict=True):
        if split is not None and split not in loaded:
            raise unknown(f"split of {name}", split, loaded)
        if split is not None:
            part += _rows_of_split(loaded[split], options, f"{name}, {split}", notes)
    return parts[0], parts[1]


def _rows_of_split(split: Any, options: DataOptions, source: str, notes: list[str]) -> list[Row]:
    named = {column: kind.names for column, kind in split.features.items() if hasattr(kind, "names")}

    def lines() -> Iterable[tables.Line]:
        for number, row in enumerate(split):
            for column, names in named.items():  # -1: no label
                row[column] = None if row[column] is None or row[column] < 0 else names[row[column]]
            yield f"{source}, row {number}", {column.strip(): value for column, value in row.items()}

    return _rows(lines(), options, source, notes)


def _rows(lines: Iterable[tables.Line], options: DataOptions, source: str, notes: list[str]) -> list[Row]:
    """Rows from mappings by the names of their columns."""
    found: list[Row] = []
    lines = iter(lines)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{source} holds no rows")
    columns = _columns(*first, options, source)
    is_open = columns[2] is None and options.label_column is None  # nobody said that another column is no label
    unused: dict[str, None] = {}
    for where, line in itertools.chain([first], lines):
        if lacking := next((name for name in columns if name is not None and name not in line), None):
            raise ValueError(f"{where}: there is no {lacking}")
        text, pair, label = (None if name is None else line[name] for name in columns)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: the {columns[0]} is empty or no text")
        if pair is not None and not isinstance(pair, str):
            raise ValueError(f"{where}: the {columns[1]} is no text")
        if found and (pair is None) != (found[0].pair is None):
            raise ValueError(f"{where}: a row without a pair among rows with one, or the other way round")
        for usual, asked, taken in (("pair", options.pair_column, columns[1]), ("label", options.label_column, columns[2])):
            if asked is None and taken is None and line.get(usual) is not None:
                raise ValueError(f"{where} has a {usual}, and the first row has none; say --{usual}_column, or none for it")
        others = [name for name in line if name not in columns]
        fresh = [name for name in others if name and name not in first[1] and line[name] is not None]
        if is_open and fresh:
            raise ValueError(
                f"{where} has a column {fresh[0]}, the first row none, and none is called label. Say --label_column none to "
                f"model the text, or give every row a {fresh[0]} and say --label_column {fresh[0]}"
            )
        unused.update(dict.fromkeys(name or "one without a name" for name in others))
        found.append(Row(text, pair, None if columns[2] is None else label_of(label, where)))
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    return found


def _columns(where: str, first: Mapping[str, Any], options: DataOptions, source: str) -> tuple[str, str | None, str | None]:
    """Names of the columns of text, pair and label, None for what there is not.

    Args:
        first: the first row, which stands at `where`.
    """
    found: list[str | None] = []
    for usual in ("text", "pair", "label"):
        asked = getattr(options, f"{usual}_column")
        if asked not in (None, "none") and asked not in first:
            raise unknown(f"--{usual}_column (in {where})", asked, first)
        found.append(None if asked == "none" else asked or (usual if usual in first else None))
    text, pair, label = options.text_column, *found[1:]
    if text in (pair, label) or (pair is not None and pair == label):
        raise ValueError(f"{where}: text, pair and label are three columns, not {text}, {pair} and {label}")
    others = [name for name in first if name and name not in (text, pair)]
    if label is None and options.label_column is None and others:
        which = others[0] if len(others) == 1 else f"NAME to learn one of {', '.join(others[:8])}"
        raise ValueError(
            f"{source}: no column is called label. Say --label_column {which}, or --label_column none to model the text"
        )
    if pair is not None and label is None:
        raise ValueError(
            f"{where} has a {pair} but no label: pairs are classified. Say --label_column, or --pair_column none"
        )
    return text, pair, label


# -- labels -----------------------------------------------------------------------------------------------------------------


def _order(label: str) -> tuple[int, int, str]:
    """Whole numbers by their value, before names."""
    return (0, int(label), label) if re.fullmatch("-?[0-9]+", label) else (1, 0, label)


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
        if not float(text).is_integer():
            raise ValueError(f"{where}: the label {text} is a number with a fraction; labels are names or whole numbers")
        return str(int(float(text)))
    return text.removeprefix("+") if re.fullmatch(r"\+\d+", text) else text


# -- what a model takes -----------------------------------------------------------------------------------------------------


def classified(rows: Sequence[Row], tokenizer: Any, label2id: Mapping[str, int], max_length: int) -> list[dict[str, Any]]:
    """Token ids, cut to `max_length`, and labels, not padded yet."""
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    encoded = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=max_length)
    columns = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [{**inputs, "labels": label2id[row.label or ""]} for inputs, row in zip(columns, rows, strict=True)]


def streams(data: Data, encode: Callable[[str], list[int]], end: int | None, size: int) -> tuple[list[int], list[int]]:
    """The token ids of all training and of all validation texts on end, each text followed by `end` where there are several.

    Of a single text the last tenth of its tokens is held out, and at least one block of `size`.
    """
    if not data.validation:
        return cut(encode(data.train[0].text), size)
    found: list[list[int]] = []
    for rows in (data.train, data.validation):
        after = [] if end is None or len(rows) == 1 else [end]
        found.append([token for row in rows for token in (*encode(row.text), *after)])
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
