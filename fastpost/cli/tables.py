"""Rows of data files: JSON lines, and tables with any usual separator, as mappings by the names of their columns."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpost.errors import nearest, not_utf8

KINDS = {".txt": "text", ".jsonl": "JSON lines", ".csv": "CSV", ".tsv": "TSV"}
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

Line = tuple[str, Mapping[str, Any]]  # where it stands, for errors; cells by column


def suffix_of(path: Path) -> str:
    """A file's ending in small letters, the key of `KINDS`."""
    return path.suffix.lower()


def text_of(path: Path) -> str:
    """A file's text, without the mark that some editors begin it with; ValueError where it is not UTF-8."""
    return _decoded(path).replace("\r\n", "\n").replace("\r", "\n")


def read(path: Path, column: str, option: str = "text_column") -> tuple[list[Line], str]:
    """The rows of a `.jsonl`, `.csv` or `.tsv` file, and what was recognised and is not as its ending says ("" for nothing).

    Names of columns are stripped. A table is separated as its ending says, or else by whatever gives its first row the
    column asked for. A table of texts and labels without a header is recognised. In TSV quotes are
    literal, as GLUE's files want it.

    Args:
        column: a column that a table has to have.
        option: by which the user may name another; "" for none.

    Raises:
        ValueError: not UTF-8, a broken row (file and line are named), a table without that column.
    """
    text = _decoded(path)
    if suffix_of(path) == ".jsonl":
        return list(_json_lines(path, text)), ""
    return _table(path, text, column, option)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None


def _json_lines(path: Path, text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character; remove it") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with a text, found {type(row).__name__}")
        yield where, {name.strip(): value for name, value in row.items()}


def _table(path: Path, text: str, column: str, option: str) -> tuple[list[Line], str]:
    if "\n" not in text:
        text = text.replace("\r", "\n")  # which ended lines on old Macs
    usual = "\t" if suffix_of(path) == ".tsv" else ","
    ways = [usual, *(separator for separator in SEPARATORS if separator != usual)]
    first = {way: _first_row(path, text, way) for way in ways}
    way = next((way for way in ways if column in first[way]), None)
    is_headless = way is None
    if way is None:
        way = max(ways, key=lambda way: len(first[way]))
        header = _inferred_header([cells for _, cells in _cells(path, text, way)]) if column == "text" else None
        if header is None:
            raise _no_column(path, column, option, first[way], way)
    else:
        header = first[way]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}")
    found: list[Line] = []
    for number, cells in _cells(path, text, way):
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} columns, the header has {len(header)}")
        found.append((where, dict(zip(header, cells, strict=True))))
    notes = [f"columns separated by {SEPARATORS[way]}"] if way != usual else []
    if is_headless:
        notes.append(f"no header: the columns are taken as {', '.join(header)}")
    return found if is_headless else found[1:], "; ".join(notes)


def _inferred_header(rows: Sequence[Sequence[str]]) -> list[str] | None:
    """Names for the columns of a table whose first row is data; None where that is not certain.

    Certain is: one column of labels (short values, each of them at least twice, the first row's too, which no column's name
    would be), and one or two columns of texts of several words.
    """
    if not rows or len(rows[0]) not in (2, 3) or any(len(row) != len(rows[0]) for row in rows):
        return None
    names: list[str] = []
    for values in zip(*rows, strict=True):
        counts = Counter(value.strip() for value in values)
        if min(counts.values()) > 1 and len(counts) > 1 and max(map(len, counts)) <= 40 and "" not in counts:
            names.append("label")
        elif sum(len(value.split()) > 1 for value in values) > len(values) / 2 and len(counts) > len(values) / 2:
            names.append("pair" if "text" in names else "text")
        else:
            return None
    return names if names.count("label") == 1 else None


def _first_row(path: Path, text: str, separator: str) -> list[str]:
    """Stripped; empty where nothing can be read this way."""
    try:
        return [name.strip() for name in next(_cells(path, text, separator), (1, []))[1]]
    except ValueError:
        return []


def _cells(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the line (of a row's last one) and cells; lines end at line feeds only, empty ones are passed over."""
    if separator == "\t" and suffix_of(path) == ".tsv":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.removesuffix("\r"):
                yield number, line.removesuffix("\r").split("\t")
        return
    csv.field_size_limit(1 << 30)
    spaced = f"{separator} " in text.partition("\n")[0]  # "text, label"
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True, skipinitialspace=spaced)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        told = "a carriage return in a field without quotes" if "new-line" in str(error) else str(error)
        raise ValueError(f"{path}, line {reader.line_num}: {told}") from None


def _no_column(path: Path, column: str, option: str, header: Sequence[str], separator: str) -> ValueError:
    if not header:
        return ValueError(f"{path} holds no rows")
    shown = " | ".join(name if len(name) <= 30 else f"{name[:27]}..." for name in header[:8])
    rename = f"choose one by --{option}" if option else f"call one of them {column}"
    names = {1: ("text",), 3: ("text", "pair", "label")}.get(len(header), ("text", "label"))
    example = ("<tab>" if separator == "\t" else separator).join(names)
    return ValueError(
        f"{path}: no column {column!r} in its first row, which separated by {SEPARATORS[separator]} is: {shown}."
        f"{nearest(column, header)} If these are the columns' names, {rename}; if they are data, the file has no header: "
        f"put one on top, such as {example}"
    )
