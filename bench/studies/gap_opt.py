"""Gradient ascent post-training as its paper set it up (Yoon et al., 2306.07052): single texts, zero-shot tasks.

    python -m fastpost.bench.studies.gap_opt DATA --model facebook/opt-350m   # from a hub, or a local folder
    python -m fastpost.bench.studies.gap_opt DATA       # a small model, trained here on DATA's own text

DATA holds the authors' files: `train_data_*.csv` (columns doc_id, text, corpus) to climb on and `validation_data_*`:
dialogues (.json) and PubMedQA (.csv). Further tasks are given as .jsonl files (`fastpost.gap.tasks.read_task`), or by
`fastpost.gap.harness` by name.

Each text: Adam at 5e-5 with betas (0.9, 0.98) uphill, at most 15 steps, all tasks after each. One run is read in two ways:

- as published: the state with the best score, on the examples that are reported;
- held out: the state chosen on every other example, reported on those between.

Each with its standard error over examples and a paired bootstrap against the untouched model. Steps are counted twice too:
ours change the weights, every one; in the released results the first two evaluations are those of the untouched model (a
loss scaler probably skipped two steps), so our step n is evaluation n + 1 there, counted from 0, after n + 2 optimizer
calls.

Without --model a GPT-2 of about two million parameters learns from the dialogues behind the first 320, which are reported,
and from the texts that are not climbed on: enough to see the code run, not to say what ascent does to a large model.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fastpost
from fastpost.bench.studies import small_lm
from fastpost.bench.studies.gap_sweep import drawn, read
from fastpost.cli.models import Loaded, load_lm
from fastpost.gap.tasks import Suite, Task, read_task
from fastpost.gap.zero_shot import Score, bootstrap, dialogue_prompt, mean_of, tidy

State = dict[str, Score]  # the tasks' scores, by name


class Reading(NamedTuple):
    """The state that was kept: its step, and the scores that are reported of it and of the untouched model."""

    step: int
    untouched: State
    kept: State


def small_model(tasks: Sequence[Task], texts: list[str], options: argparse.Namespace) -> Loaded:
    """Trained on what is neither reported nor climbed on."""
    dialogues = [turns for task in tasks for turns in task.dialogues[options.limit :]]
    unseen = [f"{dialogue_prompt(turns[:-1])} {tidy(turns[-1])}\n" for turns in dialogues] + texts
    random.Random(0).shuffle(unseen)
    held = max(len(unseen) // 20, 1)
    sizes = small_lm.LmOptions(vocabulary=4096, context=options.context, steps=options.lm_steps)
    parts = unseen[3 * held :], unseen[:held], unseen[held : 2 * held], unseen[2 * held : 3 * held]
    corpus = small_lm.split_corpus(*parts, sizes, str(options.data))
    with Progress(transient=True) as progress:
        bar = progress.add_task("a small language model", total=sizes.steps)
        model = small_lm.train_lm(corpus, sizes, 0, lambda step, _: progress.update(bar, completed=step))
    return Loaded(model, corpus.encode, corpus.decode)


def part(state: State, start: int) -> State:
    return {name: Score(score.values[start::2]) for name, score in state.items()}


def as_published(states: Sequence[State]) -> Reading:
    best = max(range(len(states)), key=lambda k: mean_of(states[k])[0])
    return Reading(best, states[0], states[best])


def held_out(states: Sequence[State]) -> Reading:
    best = max(range(len(states)), key=lambda k: mean_of(part(states[k], 0))[0])
    return Reading(best, part(states[0], 1), part(states[best], 1))


def of_metric(states: Sequence[State], tasks: Sequence[Task], metric: str) -> list[State]:
    names = [task.name for task in tasks if task.metric == metric]
    return [{name: state[name] for name in names} for state in states]


def show(console: Console, title: str, states: Sequence[State], tasks: Sequence[Task]) -> None:
    table = Table(title=title)
    columns = ("score", "read", "step", "theirs", "untouched", "kept", "p")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for metric, name in (("f1", "F1"), ("accuracy", "acc.")):
        chosen = of_metric(states, tasks, metric)
        if not chosen[0]:
            continue
        for how, reading in (("published", as_published(chosen)), ("held out", held_out(chosen))):
            before, after = mean_of(reading.untouched), mean_of(reading.kept)
            found = bootstrap(reading.untouched, reading.kept)
            there = "0 or 1" if reading.step == 0 else str(reading.step + 1)
            scores = [f"{mean:.3f} ± {error:.3f}" for mean, error in (before, after)]
            table.add_row(name, how, str(reading.step), there, *scores, f"{found.p_value:.2f}")
    console.print(table)


def write(path: Path, runs: dict[str, list[State]], tasks: Sequence[Task]) -> None:
    """One row per text, state and task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "step", "evaluation_there", "task", "metric", "examples", "score", "standard_error"])
        for name, states in runs.items():
            for step, state in enumerate(states):
                for task in tasks:
                    score = state[task.name]
                    numbers = len(score.values), round(score.mean, 6), round(score.standard_error, 6)
                    writer.writerow([name, step, step + 1, task.name, task.metric, *numbers])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the authors' files")
    parser.add_argument("--model", help="causal language model: folder or hub name")
    parser.add_argument("--texts", type=int, default=1, help="texts per corpus, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="which texts")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--limit", type=int, default=320, help="examples per task, its first")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="further tasks")
    parser.add_argument("--lm-steps", type=int, default=600, help="training steps of the small model")
    parser.add_argument("--context", type=int, default=256, help="tokens that the small model reads at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("fastpost-runs/gap-opt.csv"))
    options = parser.parse_args(argv)
    console = Console()
    corpora = sorted(options.data.glob("train_data_*.csv"))
    tasks = [read_task(path) for path in [*sorted(options.data.glob("validation_data_*.*")), *options.tasks]]
    if not corpora or not tasks:
        raise SystemExit(f"{options.data} holds {len(corpora)} train_data_*.csv and {len(tasks)} validation_data_* files")
    rows = {path: read(path) for path in corpora}
    texts = drawn(rows, options.texts, options.seed)
    if options.model is None:
        climbed = set(texts.values())
        loaded = small_model(tasks, [text for part in rows.values() for text in part if text not in climbed], options)
    else:
        loaded = load_lm(options.model)
    loaded.model.to(options.device)
    suite = Suite(tasks, loaded.encode, loaded.decode, options.limit)
    gap = fastpost.GAP(n_steps=options.steps)
    runs: dict[str, list[State]] = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("climbing", total=len(texts) * (options.steps + 1))
        for name, text in texts.items():
            states = runs.setdefault(name, [])

            def evaluate(model: Any, states: list[State] = states) -> float:
                states.append(suite.scores(model))
                progress.advance(bar)
                return mean_of(states[-1])[0]

            ids = torch.tensor(loaded.encode(text))[
                -min(512, getattr(loaded.model.config, "max_position_embeddings", 512)) :
            ]
            result = gap(loaded.model, ids, evaluate=evaluate)
            result.rollback()
            progress.update(bar, completed=len(runs) * (options.steps + 1))
    write(options.output, runs, tasks)
    for name, states in runs.items():
        show(console, name, states, tasks)
    console.print("step: of ours; theirs: the evaluation of the same state in the released results, counted from 0")
    console.print(f"{len(texts)} texts, {len(tasks)} tasks; every state's scores: {options.output}")


if __name__ == "__main__":
    main()
