"""`fastpost gap-sweep`: gradient ascent on many texts, one at a time from the same weights; a table, a CSV and a plot."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpost
from fastpost.cli import lm
from fastpost.cli.options import check_least, option, parsed
from fastpost.gap.many import Row, sweep

DESCRIPTION = "Gradient ascent post-training (2306.07052) on many texts: score against step and against drift."
CSV_NAME, PNG_NAME = "gap-sweep.csv", "gap-sweep.png"
HELD_OUT = 64  # windows each for choosing and for reporting, where a text file is given


@dataclass
class SweepArguments:
    """Options of `fastpost gap-sweep`."""

    texts: str = option("", "files to climb on, comma-separated: CSV with a column `text`, or plain text (one text)")
    limit: int = option(10, "texts per file")
    model: str | None = option(None, "folder or hub name of a causal language model; default: a small one, trained here")
    held_out: str | None = option(
        None, "plain text to score on, half to choose and half to report; default: files of the standard library"
    )
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
        check_least(self, {"limit": 1, "n_steps": 0, "lm_steps": 1})
        if self.held_out is not None and not Path(self.held_out).is_file():
            raise ValueError(f"--held-out: {self.held_out} is not a file")
        self.recipe()

    def paths(self) -> list[Path]:
        return [Path(part.strip()) for part in self.texts.split(",") if part.strip()]

    def recipe(self) -> fastpost.GAP:
        return fastpost.GAP(
            self.n_steps, self.lr, max_drift=self.max_drift, max_loss=self.max_loss, max_tokens=self.max_tokens
        )


def parse(argv: Sequence[str]) -> SweepArguments:
    """Options from the command line or a file; raises as `parsed`."""
    return parsed(SweepArguments, "gap-sweep", DESCRIPTION, argv)


def read(path: Path, limit: int) -> list[str]:
    """The texts of a file.

    Raises:
        ValueError: a CSV without a column `text`, or no text in the file.
    """
    if path.suffix == ".csv":
        csv.field_size_limit(1 << 30)
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "text" not in (reader.fieldnames or ()):
                raise ValueError(f"{path} has no column 'text', only {', '.join(reader.fieldnames or ()) or 'none'}")
            texts = [row["text"] for row in reader]
    else:
        texts = [path.read_text(encoding="utf-8")]
    texts = [text for text in texts if text and text.strip()][:limit]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


@dataclass
class Setting:
    """A model, how it reads text, and windows of token ids to choose and to report on."""

    model: Any
    encode: Callable[[str], list[int]]
    choose: Tensor
    report: Tensor


def small_setting(options: SweepArguments, progress: Callable[[int, int], object]) -> Setting:
    """A small model trained on the standard library's sources, and windows of files that it has not seen."""
    sizes = lm.LmOptions(steps=options.lm_steps)
    corpus = lm.build_corpus(sizes)
    model = lm.train_lm(corpus, sizes, 0, progress)
    return Setting(model, corpus.encode, corpus.validation, corpus.test)


def loaded_setting(name: str) -> Setting:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Setting(model, encode, torch.empty(0, 0), torch.empty(0, 0))


def windows_of(text: str, encode: Callable[[str], list[int]], size: int) -> tuple[Tensor, Tensor]:
    """Windows of a text to choose and to report on, taken in turns from all over it."""
    ids = torch.tensor(encode(text), dtype=torch.int64)
    whole = ids[: len(ids) // size * size].view(-1, size)
    if len(whole) < 2:
        raise ValueError(f"--held-out holds {len(ids)} tokens; at least {2 * size} are needed")
    even, odd = whole[0::2], whole[1::2]
    return even[:: max(len(even) // HELD_OUT, 1)][:HELD_OUT], odd[:: max(len(odd) // HELD_OUT, 1)][:HELD_OUT]


def main(argv: Sequence[str]) -> int:
    """Runs the command; 2 where an option is wrong."""
    from rich.console import Console
    from rich.progress import Progress

    try:
        options = parse(argv)
        named = {f"{path.stem}/{k}": text for path in options.paths() for k, text in enumerate(read(path, options.limit))}
    except (ValueError, FileNotFoundError) as error:
        print(f"fastpost gap-sweep: error: {error}", file=sys.stderr)
        return 2
    console = Console()
    with Progress(console=console, transient=True) as progress:
        if options.model is None:
            task = progress.add_task("a small language model", total=options.lm_steps)
            setting = small_setting(options, lambda step, _: progress.update(task, completed=step))
        else:
            setting = loaded_setting(options.model)
        if options.held_out is not None:
            text = Path(options.held_out).read_text(encoding="utf-8")
            positions = getattr(setting.model.config, "max_position_embeddings", 128)
            setting.choose, setting.report = windows_of(text, setting.encode, min(128, positions) + 1)
        elif options.model is not None:
            print("fastpost gap-sweep: error: --model needs --held-out, a text to score on", file=sys.stderr)
            return 2
        texts = {name: torch.tensor(setting.encode(text), dtype=torch.int64) for name, text in named.items()}
        texts = {name: ids for name, ids in texts.items() if len(ids) > 1}
        longest = min(options.max_tokens, getattr(setting.model.config, "max_position_embeddings", options.max_tokens))
        long = sum(len(ids) > longest for ids in texts.values())
        if long:
            console.print(f"{long} of {len(texts)} texts have more than {longest} tokens; their last {longest} are used.")
        texts = {name: ids[-longest:] for name, ids in texts.items()}
        task = progress.add_task("climbing", total=len(texts))
        folder = Path(options.output_dir)
        rows = sweep(
            options.recipe(),
            setting.model,
            texts,
            lambda m: -float(lm.negative_log_likelihoods(m, setting.choose).mean()),
            test=lambda m: -float(lm.negative_log_likelihoods(m, setting.report).mean()),
            output=folder / CSV_NAME,
            progress=lambda done, total, name: progress.update(task, completed=done, description=name[:40]),
        )
    nats = lm.negative_log_likelihoods(setting.model, setting.report)
    show(console, rows, float(nats.std()) / math.sqrt(len(nats)))
    plot(rows, folder / PNG_NAME)
    console.print(f"{folder / CSV_NAME}, {folder / PNG_NAME}")
    return 0


def groups(rows: list[Row]) -> dict[str, list[list[Row]]]:
    """Runs by the file of their text, each in the order of its states."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["text"], []).append(row)
    found: dict[str, list[list[Row]]] = {}
    for name, states in runs.items():
        found.setdefault(name.rsplit("/", 1)[0], []).append(states)
    return found


def show(console: Any, rows: list[Row], error: float) -> None:
    """Gains in nats per token, on the data that chose and on the data that did not."""
    from rich.table import Table

    table = Table(title="nats per token gained by the state that was kept (mean over texts ± its standard error)")
    for column in ("texts", "runs", "median step", "on what chose", "on other data", "gained there"):
        table.add_column(column, justify="left" if column == "texts" else "right", no_wrap=True)
    for name, runs in groups(rows).items():
        kept = [next(state for state in run if state["kept"]) for run in runs]
        chosen = [k["score"] - run[0]["score"] for k, run in zip(kept, runs, strict=True)]
        reported = [k["test_kept"] - k["test_untouched"] for k in kept]
        steps = sorted(k["step"] for k in kept)
        table.add_row(
            name,
            str(len(runs)),
            str(steps[len(steps) // 2]),
            _mean(chosen),
            _mean(reported),
            str(sum(r > 0 for r in reported)),
        )
    console.print(table)
    console.print(f"The untouched model's own loss on that other data has a standard error of {error:.4f}.")


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.4f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:+.4f} ± {spread:.4f}"


def plot(rows: list[Row], output: Path) -> None:
    """Score gained against step and against drift, one line per text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for number, (name, runs) in enumerate(groups(rows).items()):
        for k, run in enumerate(runs):
            gained = [state["score"] - run[0]["score"] for state in run]
            for axis, key in zip(axes, ("step", "drift"), strict=True):
                label = name if k == 0 else None
                axis.plot(
                    [state[key] for state in run], gained, ".-", color=f"C{number}", alpha=0.6, linewidth=1, label=label
                )
    for axis, label in zip(axes, ("step", "drift: 2-norm of the weights' change"), strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("nats per token gained on the data that chooses")
    axes[0].legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)
