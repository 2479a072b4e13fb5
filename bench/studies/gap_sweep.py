"""Gradient ascent post-training (2306.07052) on many texts, one at a time from the same weights: table, CSV and plot.

python -m fastpost.bench.studies gap-sweep --texts a.csv b.csv --seeds 0 1 2
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpost
from fastpost.bench.studies import results as shared
from fastpost.bench.studies import small_lm
from fastpost.bench.studies.arguments import parsed, seeds_of
from fastpost.bench.studies.results import Panel, Results, Series
from fastpost.cli import tables
from fastpost.cli.files import check_folder
from fastpost.cli.models import Loaded, load_lm, negative_log_likelihoods, windows_of
from fastpost.cli.options import Range, check, complain, option
from fastpost.gap.many import COLUMNS, Row, sweep
from fastpost.gap.tasks import Suite, Task, read_task
from fastpost.gap.zero_shot import LIMIT, mean_of

PROGRAM = "studies gap-sweep"
LISTS = ("texts", "seeds", "tasks")


@dataclass
class SweepArguments:
    """Options; the same names serve as keys of a JSON or YAML file given as the first argument."""

    texts: str = option("", "files to climb on: CSV, TSV or JSON lines with a column `text`, or plain text (one text)")
    limit: int = option(10, "texts per file, drawn at random")
    seeds: str = option("0", "each draws other texts, and trains another small model; the ascent draws nothing")
    model: str | None = option(None, "folder or hub name of a causal language model; default: a small one, trained here")
    held_out: str | None = option(
        None, "plain text to score on, half to choose and half to report; default: files of the standard library"
    )
    tasks: str = option(
        "",
        "zero-shot tasks to score on instead: dialogues .json, questions with choices .jsonl, "
        "PubMedQA .csv; half of the examples choose, half are reported",
    )
    task_limit: int = option(LIMIT, "examples per task at most, its first")
    output_dir: str = option("fastpost-runs/gap-sweep", "where table and plot go; a stopped sweep goes on there")
    n_steps: int = option(15, "steps uphill per text")
    lr: float = option(5e-5, "Adam's learning rate")
    max_tokens: int = option(512, "tokens of a text at most, its last")
    max_drift: float | None = option(None, "stop before the weights are farther than this from the start")
    max_loss: float | None = option(None, "stop before the text's loss exceeds this, nats per token")
    lm_steps: int = option(300, "training steps of the small model")

    def __post_init__(self) -> None:
        if not self.paths():
            raise ValueError("--texts names no file")
        for path in self.paths():
            if not path.is_file():
                raise ValueError(f"--texts: {path} is not a file")
        stems = [path.stem for path in self.paths()]
        if twice := next((stem for stem in stems if stems.count(stem) > 1), ""):
            raise ValueError(f"--texts: two files are called {twice!r}, by which their rows are told apart; rename one")
        check(self, {"limit": Range(1), "n_steps": Range(0), "lm_steps": Range(1), "task_limit": Range(4)})
        seeds_of(self.seeds)
        if self.tasks and self.held_out is not None:
            raise ValueError("--tasks and --held-out are two ways to score; give one")
        if self.model is not None and not self.tasks and self.held_out is None:
            raise ValueError("--model needs --tasks or --held-out, something to score on")
        if self.held_out is not None and not Path(self.held_out).is_file():
            raise ValueError(f"--held-out: {self.held_out} is not a file")
        self.recipe()

    def paths(self) -> list[Path]:
        return [Path(part.strip()) for part in self.texts.split(",") if part.strip()]

    def read_tasks(self) -> list[Task]:
        return [read_task(part.strip()) for part in self.tasks.split(",") if part.strip()]

    def recipe(self) -> fastpost.GAP:
        return fastpost.GAP(
            self.n_steps, self.lr, max_drift=self.max_drift, max_loss=self.max_loss, max_tokens=self.max_tokens
        )


def parse(argv: Sequence[str]) -> SweepArguments:
    """Options from the command line or a file; raises as `parsed`."""
    return parsed(SweepArguments, PROGRAM, str(__doc__), argv, LISTS)


def read(path: Path) -> list[str]:
    """The texts of a file: of a table or JSON lines the column `text`, of any other file the whole.

    Raises:
        ValueError: no such column, or no text in the file.
    """
    suffix = tables.suffix_of(path)
    if suffix == ".json":
        raise ValueError(f"{path}: texts are CSV, TSV or JSON lines with a column `text`, or plain text")
    if suffix in tables.KINDS and suffix != ".txt":
        texts = [row.get("text") or "" for _, row in tables.read(path, "text", "")[0]]
        if odd := next((text for text in texts if not isinstance(text, str)), None):
            raise ValueError(f"{path}: a text is no text but {odd!r}")
    else:
        texts = [tables.text_of(path)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path} holds no text")
    return texts


def drawn(texts: dict[Path, list[str]], limit: int, seed: int) -> dict[str, str]:
    """`limit` texts of each file, by the file's name and the number of their row, in the file's order."""
    found: dict[str, str] = {}
    for path, rows in texts.items():
        filled = [k for k, text in enumerate(rows) if text.strip()]
        picked = random.Random(f"{seed} {path.stem}").sample(filled, min(limit, len(filled)))
        found |= {f"{path.stem}/{k}": rows[k] for k in sorted(picked)}
    return found


@dataclass
class Setting:
    """A model, how it reads text, and what scores it.

    Attributes:
        choose, report: functions of the model, higher is better, on data that the other does not see.
        unit: what a score is.
        scored_on: a digest of the data of both.
        error: standard error of `report` of the untouched model.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    choose: Callable[[Any], float]
    report: Callable[[Any], float]
    unit: str
    scored_on: str
    error: float = math.nan


def build_setting(options: SweepArguments, tasks: list[Task], seed: int, progress: Callable[[int, int], object]) -> Setting:
    """The model, loaded or trained on the standard library's sources, and how it is scored."""
    if options.model is None:
        sizes = small_lm.LmOptions(steps=options.lm_steps)
        corpus = small_lm.build_corpus(sizes)
        loaded = Loaded(small_lm.train_lm(corpus, sizes, seed, progress), corpus.encode, corpus.decode)
        windows = corpus.validation, corpus.test
    else:
        loaded = load_lm(options.model)
    model, encode, decode = loaded.model, loaded.encode, loaded.decode
    if tasks:
        suite = Suite(tasks, encode, decode, options.task_limit)
        choose, report = suite.halves()
        report(model)
        scored_on = _digest(repr((tasks, options.task_limit)).encode())
        return Setting(model, encode, decode, choose, report, "score", scored_on, mean_of(report.last)[1])
    if options.held_out is not None:
        positions = getattr(model.config, "max_position_embeddings", 128)
        windows = windows_of(encode(tables.text_of(Path(options.held_out))), min(128, positions) + 1)
    ours, others = windows

    def mean_on(ids: Tensor) -> Callable[[Any], float]:
        return lambda m: -float(negative_log_likelihoods(m, ids).mean())

    nats = negative_log_likelihoods(model.eval(), others)
    error = float(nats.std()) / math.sqrt(len(nats))
    scored_on = _digest(*(ids.numpy().tobytes() for ids in windows))
    return Setting(model, encode, decode, mean_on(ours), mean_on(others), "nats per token", scored_on, error)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def main(argv: Sequence[str]) -> int:
    """Runs the command; 2 where an option, a file or a text is wrong, 130 when interrupted; what was finished is on disk."""
    try:
        options = parse(argv)
        texts = {path: read(path) for path in options.paths()}
        tasks = options.read_tasks()
        check_folder(Path(options.output_dir))
        _run(options, texts, tasks)
    except (ValueError, OSError) as error:
        complain(PROGRAM, error)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from what {options.output_dir} holds", file=sys.stderr)
        return 130
    return 0


def _run(options: SweepArguments, texts: dict[Path, list[str]], tasks: list[Task]) -> None:
    from rich.progress import Progress

    console = shared.console()
    folder = Path(options.output_dir)
    rows: list[Row] = []
    errors: list[float] = []
    unit = ""
    with Progress(console=console, transient=True) as progress:
        for seed in seeds_of(options.seeds):
            task = progress.add_task("a small language model", total=options.lm_steps, visible=options.model is None)
            setting = build_setting(options, tasks, seed, _advance(progress, task))
            unit, named = setting.unit, encoded(drawn(texts, options.limit, seed), setting, options, console)
            climbing = progress.add_task(f"climbing, seed {seed}", total=len(named))
            found = sweep(
                options.recipe(),
                setting.model,
                named,
                setting.choose,
                test=setting.report,
                output=folder / f"seed-{seed}.csv",
                scored_on=setting.scored_on,
                progress=_advance(progress, climbing),
            )
            rows += [{"seed": seed, **row} for row in found]
            errors.append(setting.error)
    results = Results(folder, "gap-sweep", ("seed", *COLUMNS), {"arguments": vars(options), "unit": unit})
    results.rows = rows
    results.save()
    console.print(table(rows, unit))
    told = ", ".join(f"{error:.4f}" for error in errors)
    console.print(f"The untouched model's own score on that other data has a standard error of {told}.")
    console.print(f"{results.csv}, {plot(rows, unit, results.png)}", markup=False)


def encoded(texts: dict[str, str], setting: Setting, options: SweepArguments, console: Any) -> dict[str, Tensor]:
    """Token ids by name, the last of them where there are more than the recipe or the model takes."""
    ids = {name: torch.tensor(setting.encode(text), dtype=torch.int64) for name, text in texts.items()}
    ids = {name: row for name, row in ids.items() if len(row) > 1}
    most = min(options.max_tokens, getattr(setting.model.config, "max_position_embeddings", options.max_tokens))
    long = sum(len(row) > most for row in ids.values())
    if long:
        console.print(f"{long} of {len(ids)} texts have more than {most} tokens; their last {most} are used.")
    return {name: row[-most:] for name, row in ids.items()}


def _advance(progress: Any, task: Any) -> Callable[..., object]:
    """A callback of (done, all, ...) for one bar."""
    return lambda done, *_: progress.update(task, completed=done)


# -- what is shown ----------------------------------------------------------------------------------------------------------


def groups(rows: list[Row]) -> dict[str, list[list[Row]]]:
    """Runs by the file of their text, each in the order of its states."""
    runs: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["seed"], row["text"]), []).append(row)
    found: dict[str, list[list[Row]]] = {}
    for (_, name), states in runs.items():
        found.setdefault(name.rsplit("/", 1)[0], []).append(states)
    return found


def table(rows: list[Row], unit: str) -> Any:
    """Gains on the data that chose and on the data that did not; `unit` is what a score is."""
    lines = []
    for name, runs in groups(rows).items():
        kept = [next(state for state in run if state["kept"]) for run in runs]
        chosen = [k["score"] - run[0]["score"] for k, run in zip(kept, runs, strict=True)]
        reported = [k["test_kept"] - k["test_untouched"] for k in kept]
        step = statistics.median(k["step"] for k in kept)
        lines.append((name, str(len(runs)), f"{step:g}", _mean(chosen), _mean(reported), str(sum(r > 0 for r in reported))))
    return shared.table(
        f"{unit} gained by the kept state: mean over runs ± its standard error",
        ("texts", "runs", "step", "on what chose", "on other data", "gained"),
        lines,
        "step: median of those kept; gained: runs that did on the other data",
    )


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.4f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:+.4f} ±{spread:.4f}"


def plot(rows: list[Row], unit: str, output: Path) -> Path:
    """Score gained against step and against drift, one line per run."""
    by_file = groups(rows)
    panels = []
    for key, label in (("step", "step"), ("drift", "drift: 2-norm of the weights' change")):
        series = []
        for number, (name, runs) in enumerate(by_file.items()):
            look = shared.distinct(number, len(by_file), widest=2.6, dashes=False)  # there are many of each
            for k, run in enumerate(runs):
                gained = [state["score"] - run[0]["score"] for state in run]
                at = [state[key] for state in run]
                series.append(Series(gained, at, name if k == 0 else "", number, marker=".", look=look))
        panels.append(Panel("", series, label, f"{unit} gained on what chooses", level=(0, ""), steps=key == "step"))
    return shared.plot(output, panels, width=5.5)
