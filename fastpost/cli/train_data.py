"""Training data of `fastpost train`: text, JSONL, CSV, TSV and what `datasets` loads, as examples for a model."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpost.cli.train_options import DataOptions
from fastpost.errors import unknown

HELD_OUT = 10  # one row in so many, where no validation data are given
KINDS = {".txt": "text", ".jsonl": "JSON lines", ".csv": "CSV", ".tsv": "TSV"}


@dataclass(frozen=True)
class Row:
    """A text, for pairs a second one, and the name of its label (None: text to model)."""

    text: str
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows to evaluate on; `labels` is empty for text to model."""

    train: list[Row]
    validation: list[Row]
    labels: tuple[str, ...]
    held_out: bool

    def told(self) -> str:
        where = "validation data as given"
        if self.held_out:
            where = "a tenth held out by a fixed draw" if len(self.train) > 1 else "its last tenth held out"
        what = f"{len(self.labels)} labels" if self.labels else "text"
        return f"{len(self.train)} training and {len(self.validation)} validation rows ({where}), {what}"


def read(options: DataOptions, needs_validation: bool = True) -> Data:
    """The data that the options name.

    Args:
        needs_validation: False leaves all rows to training where no validation data are given.

    Raises:
        ValueError: a broken row (file and line are named), a missing column, a label that training data do not have, too
            few rows. ImportError: `datasets` is needed and missing.
    """
    if options.dataset is not None:
        train, validation = _from_hub(options)
    else:
        assert options.train_file is not None
        train = _rows_of_file(Path(options.train_file), options)
        validation = [] if options.validation_file is None else _rows_of_file(Path(options.validation_file), options)
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
    if held_out:
        train, validation = hold_out(train)
    return Data(train, validation, labels, held_out)


def _order(label: str) -> tuple[int, int, str]:
    """Whole numbers by their value, before names."""
    return (0, int(label), label) if re.fullmatch("-?[0-9]+", label) else (1, 0, label)


def hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """A tenth of the rows, the same every time; of a single text its last tenth, by lines."""
    if len(rows) == 1 and rows[0].label is None:
        lines = rows[0].text.splitlines(keepends=True)
        cut = len(lines) - max(len(lines) // HELD_OUT, 1)
        parts = "".join(lines[:cut]), "".join(lines[cut:])
        if all(part.strip() for part in parts):
            return [Row(parts[0])], [Row(parts[1])]
    if len(rows) < 2:
        raise ValueError("the training data are a single row, none of which can be held out; give --validation_file")
    held = set(random.Random(0).sample(range(len(rows)), max(len(rows) // HELD_OUT, 1)))
    return [row for k, row in enumerate(rows) if k not in held], [row for k, row in enumerate(rows) if k in held]


# -- where rows come from ---------------------------------------------------------------------------------------------------


def _rows_of_file(path: Path, options: DataOptions) -> list[Row]:
    if path.suffix not in KINDS:
        known = ", ".join(f"{kind} ({suffix})" for suffix, kind in KINDS.items())
        raise ValueError(f"{path}: what kind of data is a {path.suffix or 'file without an ending'}? Known: {known}")
    text = text_of(path)
    if path.suffix == ".txt":
        if not text.strip():
            raise ValueError(f"{path} holds no text")
        return [Row(text)]
    lines = _json_lines(path, text) if path.suffix == ".jsonl" else _table(path, text)
    return _rows(lines, options, str(path))


def text_of(path: Path) -> str:
    """A file's text, without the mark that some editors begin it with; ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _json_lines(path: Path, text: str) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with a text, found {type(row).__name__}")
        found.append((where, row))
    return found


def _table(path: Path, text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows under a header. In TSV quotes are literal, as GLUE's files want it."""
    csv.field_size_limit(1 << 30)
    # Not splitlines: it cuts at characters that a text may hold.
    lines = io.StringIO(text, newline="") if path.suffix == ".csv" else text.replace("\r\n", "\n").split("\n")
    kind: dict[str, Any] = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, **kind)
    header = next(reader, [])
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}")
    found: list[tuple[str, Mapping[str, Any]]] = []
    for cells in reader:
        if not cells:
            continue
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} columns, the header has {len(header)}")
        found.append((where, dict(zip(header, cells, strict=True))))
    return found


def _from_hub(options: DataOptions) -> tuple[list[Row], list[Row]]:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"--dataset needs the package datasets ({error}). Run: pip install datasets") from error
    name = options.dataset
    try:
        loaded = datasets.load_dataset(name, options.dataset_config)
    except Exception as error:  # whatever its many readers raise, the name was wrong, or what is there cannot be read
        raise ValueError(f"--dataset {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    validation = options.validation_split or ("validation" if "validation" in loaded else None)
    parts = []
    for split in (options.train_split, validation):
        if split is not None and split not in loaded:
            raise unknown(f"split of {name}", split, loaded)
        parts.append(
            [] if split is None else _rows(_named_labels(loaded[split], options, f"{name}, {split}"), options, str(name))
        )
    return parts[0], parts[1]


def _named_labels(split: Any, options: DataOptions, where: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    column = options.label_column or "label"
    names = getattr(split.features.get(column), "names", None)
    for number, row in enumerate(split):
        if names is not None and row[column] is not None:
            if row[column] < 0:
                raise ValueError(f"{where}, row {number}: no label (-1)")
            row = {**row, column: names[row[column]]}
        yield f"{where}, row {number}", row


def _rows(lines: Iterable[tuple[str, Mapping[str, Any]]], options: DataOptions, source: str) -> list[Row]:
    """Rows from mappings by the names of their columns."""
    found: list[Row] = []
    columns: tuple[str, str | None, str | None] | None = None
    for where, line in lines:
        if columns is None:
            columns = _columns(list(line), options, where)
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
        found.append(Row(text, pair, None if columns[2] is None else _label(label, where)))
    if not found:
        raise ValueError(f"{source} holds no rows")
    return found


def _columns(there: Sequence[str], options: DataOptions, where: str) -> tuple[str, str | None, str | None]:
    if options.text_column not in there:
        raise unknown(f"--text_column (in {where})", options.text_column, there)
    found: list[str | None] = []
    for asked, usual, option in (
        (options.pair_column, "pair", "pair_column"),
        (options.label_column, "label", "label_column"),
    ):
        if asked is not None and asked != "none" and asked not in there:
            raise unknown(f"--{option} (in {where})", asked, there)
        found.append(None if asked == "none" else asked or (usual if usual in there else None))
    pair, label = found
    if options.text_column in found or (pair is not None and pair == label):
        raise ValueError(f"{where}: text, pair and label are three columns, not {options.text_column}, {pair} and {label}")
    if pair is not None and label is None:
        raise ValueError(
            f"{where} has a {pair} but no label: pairs are classified. Say --label_column, or --pair_column none"
        )
    return options.text_column, pair, label


def _cell(line: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in line:
        raise ValueError(f"{where}: there is no {name}")
    return line[name]


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{where}: the label {value} is a number with a fraction; labels are names or whole numbers")
    if not isinstance(value, (str, int, float)) or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where}: no label")
    return value.strip() if isinstance(value, str) else str(int(value))


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


def blocks(
    rows: Sequence[Row], encode: Callable[[str], list[int]], end: int | None, size: int, which: str
) -> list[dict[str, Any]]:
    """Blocks of `size` tokens from all texts on end, each followed by `end`; what is left over is dropped.

    Raises:
        ValueError: not one whole block; `which` names the data.
    """
    stream: list[int] = []
    for row in rows:
        stream += encode(row.text)
        if end is not None and len(rows) > 1:
            stream.append(end)
    whole = [stream[k : k + size] for k in range(0, len(stream) - size + 1, size)]
    if not whole:
        raise ValueError(f"the {which} data are {len(stream)} tokens, less than one block of --max_length {size}")
    return [{"input_ids": block, "labels": block} for block in whole]
