"""Many texts, one model: climb on each, score, go back to the same bits; rows on disk after every text."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.gap.run import GAP, Evaluate
from fastpost.gap.weights import Snapshot

COLUMNS = (
    "text", "digest", "tokens", "step", "loss", "drift", "score", "kl", "kept", "test_untouched", "test_kept",
    "moved_fraction", "skipped_steps", "stop_reason",
)  # fmt: skip
Row = dict[str, Any]


def sweep(
    gap: GAP,
    model: nn.Module,
    texts: Mapping[str, Tensor],
    evaluate: Evaluate | None = None,
    *,
    test: Evaluate | None = None,
    probe: Tensor | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    scored_on: str = "",
    progress: Callable[[int, int, str], object] | None = None,
) -> list[Row]:
    """Runs `gap` from the same weights on every text; afterwards the model is the untouched one, bit for bit.

    One copy of the weights serves all texts. With `output`, the rows are a CSV file that is replaced as a whole after every
    text, so it never holds half a run, and a sweep that was stopped goes on where it ended. A file of another sweep (other
    options, weights, `scored_on`, probe or texts of the same name, or with `test` where that had none) is refused: beside it
    lies `<output>.json`, which says what made it.

    Args:
        gap: the recipe. model: as in `GAP`.
        texts: token ids by a name of each text, in order.
        evaluate, test, probe: as in `GAP`; `test` runs twice per text.
        output: the CSV; its folder is made.
        scored_on: names the data of `evaluate` and `test`; a file of other data is refused.
        progress: called with (texts done, texts in all, name of the text just done).

    Returns:
        One row per text and state: `COLUMNS`. kept is 1 for the state that the run ended with, where also the columns about
        the whole run are filled.

    Raises:
        ValueError: no texts; an output of another sweep. TypeError, ValueError: as `GAP`; what was finished is on disk.
    """
    if not texts:
        raise ValueError("GAP: no texts to climb on")
    for name in texts:
        if not isinstance(name, str):  # a file would give back another name
            raise TypeError(f"GAP: texts are named by strings, not {type(name).__name__} ({name!r})")
    path = None if output is None else Path(output)
    identity = _identity(gap, model, evaluate is not None, test is not None, probe, scored_on)
    rows = [] if path is None else _resume(path, identity)
    done = {row["text"]: row["digest"] for row in rows}
    for name, digest in done.items():
        if name not in texts or _digest(texts[name]) != digest:
            raise ValueError(f"GAP: {path} holds a text {name!r} that is not among the texts; give another output")
    base = Snapshot([p for p in model.parameters() if p.requires_grad], model)
    try:
        for number, (name, ids) in enumerate(texts.items(), start=1):
            if name not in done:
                result = gap(model, ids, evaluate=evaluate, test=test, probe=probe, base=base)
                result.rollback()
                rows += rows_of(name, ids, result)
                if path is not None:
                    _write(path, rows, identity)
            if progress is not None:
                progress(number, len(texts), name)
    finally:
        base.restore()
    return rows


def rows_of(name: str, ids: Tensor, result: Any) -> list[Row]:
    """A run's states as rows, in order."""
    rows = []
    for step, drift in enumerate(result.drift):
        row: Row = dict.fromkeys(COLUMNS, "")
        row |= {"text": name, "digest": _digest(ids), "tokens": ids.numel(), "step": step, "drift": drift}
        row["kept"] = int(step == result.best_step)
        for column, values in (("loss", result.losses), ("score", result.scores), ("kl", result.kl)):
            if step < len(values):
                row[column] = values[step]
        if row["kept"]:
            row |= {name: getattr(result, name) for name in ("moved_fraction", "skipped_steps", "stop_reason")}
            if result.test_scores:
                row["test_untouched"], row["test_kept"] = result.test_scores
        rows.append(row)
    return rows


def _identity(gap: GAP, model: nn.Module, selects: bool, tests: bool, probe: Any, scored_on: str) -> Row:
    """What a sweep's rows depend on, beside its texts; as a file gives it back."""
    watched = {"": probe} if isinstance(probe, Tensor) else dict(probe or {})
    told = {
        "options": dict(sorted(vars(gap).items())),
        "weights": _digest_of(dict(model.named_parameters())),
        "selects": selects,
        "tests": tests,
        "probe": _digest_of({name: value for name, value in watched.items() if isinstance(value, Tensor)}),
        "scored_on": scored_on,
    }
    found: Row = json.loads(json.dumps(told, default=float))  # numbers of numpy, too
    return found


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.detach().cpu().long().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()[:12]


def _resume(path: Path, identity: Row) -> list[Row]:
    if not path.exists():
        return []
    told = Path(f"{path}.json")
    if not told.exists() or json.loads(told.read_text(encoding="utf-8")) != identity:
        raise ValueError(
            f"GAP: {path} is of another sweep (other options or other weights, another probe or other data to score on); "
            "give another output, or remove it"
        )
    with path.open(newline="", encoding="utf-8") as file:
        return [_parsed(row) for row in csv.DictReader(file)]


def _parsed(row: dict[str, str]) -> Row:
    whole = ("tokens", "step", "kept", "skipped_steps")
    texts = ("text", "digest", "stop_reason")
    return {k: v if k in texts or v == "" else int(v) if k in whole else float(v) for k, v in row.items()}


def _write(path: Path, rows: list[Row], identity: Row) -> None:
    """Replaces both files as wholes: whoever reads them, or a disk that is full, finds the old ones or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = Path(f"{path}.json")
    if not path.exists():  # rows that are there have their identity beside them
        _replace(told, lambda file: json.dump(identity, file, indent=1))

    def fill(file: Any) -> None:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)

    _replace(path, fill)


def _replace(path: Path, fill: Callable[[Any], object]) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", newline="", encoding="utf-8") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
