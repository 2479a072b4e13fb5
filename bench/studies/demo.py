"""What fastpost is for, on real models, in a few minutes: costs, 16 bits, fine-tuning, GAP. One picture, one table.

python -m fastpost.bench.studies demo [--quick] [--device cuda] [--output-dir DIR]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastpost
from fastpost.bench import measure
from fastpost.bench.studies import results as shared
from fastpost.bench.studies import small_lm, smollm2, tasks, tuning
from fastpost.bench.studies.compare import device_of, served_by
from fastpost.bench.studies.results import Bars, Panel, Results, Series
from fastpost.cli.files import check_folder
from fastpost.cli.models import Loaded, load_lm, negative_log_likelihoods
from fastpost.cli.options import complain

PROGRAM = "studies demo"
COLUMNS = ("kind", "method", "side", "seed", "step", "seconds", "peak_mib", "value", "along", "beside", "rise", "chosen")
RHO = 0.05
# Ways to keep w + e in bfloat16: options of SAM, and their names in the picture.
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "nearest": ({}, "rounded to\nnearest (usual)"),
    "stochastic": ({"rounding": "stochastic", "rounding_seed": 0}, "stochastic\nrounding"),
    "functional": ({"perturb": "functional"}, "functional\n(never stored)"),
}
TUNED = ("adamw", "sam", "r3f")
NAMES = {"adamw": "AdamW", "sam": "SAM", "r3f": "R3F"}


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        rows, tokens: of the language model's batch. rounds: timed steps of each side.
        seeds, train, test, epochs: of fine-tuning. length: tokens of an example at most.
        climb, windows: GAP's steps, and windows of text that choose and that report, each.
    """

    rows: int = 2
    tokens: int = 64
    rounds: int = 3
    seeds: int = 3
    train: int = 64
    test: int = 240
    epochs: int = 4
    length: int = 24
    climb: int = 6
    windows: int = 12


QUICK = Sizes(rows=1, tokens=48, rounds=1, seeds=2, train=32, test=96, epochs=3, climb=3, windows=4)


class Demo:
    """The four parts; every row is on disk as soon as it is there."""

    def __init__(self, sizes: Sizes, device: str, loaded: Loaded, results: Results, bars: Bars) -> None:
        self.sizes, self.device, self.results, self.bars = sizes, device, results, bars
        self.model = loaded.model.to(device)
        for p in self.model.parameters():
            p.data = p.data.clone()  # in memory of its own: pages of the file would come and go in what is measured
        texts = small_lm.library_texts(1_500_000)
        self.corpus = small_lm.encoded_corpus(texts, loaded.encode, sizes.tokens, sizes.windows, "the standard library")
        self.language = tuning.Language("SmolLM2-135M", loaded, self.corpus, sizes.tokens, device)
        task = tasks.load("stdlib", None, (sizes.train, 8, sizes.test))
        self.task = tuning.Classification(tuning.Classifier(None, len(task.labels)), task, sizes.length, device)

    def run(self) -> None:
        for part in (self.steps, self.bits, self.tune, self.climb):
            part()
            self.bars.finish()

    def steps(self) -> None:
        """One step of SAM and one of R3F on the language model, published loop and fastpost in turns."""
        batch = next(self.language.batches(self.sizes.rows, 1, 0))
        wall, processor = time.perf_counter(), time.process_time()
        hyper = tuning.Hyperparameters(lr=0.0, weight_decay=0.0, rho=RHO, fused_linear=True)  # the model stays what it is
        for method in ("sam", "r3f"):

            def make(side: str, method: str = method) -> measure.Step:
                trainee = tuning.build(method, side, self.model.train(), hyper)

                def step() -> None:
                    trainee.step(batch)
                    trainee.optimizer.zero_grad()

                return step

            self.bars.start(f"SmolLM2: a step of {NAMES[method]}", 2 * (self.sizes.rounds + measure.WARMUP))
            sides = {side: lambda side=side: make(side) for side in ("published", "fastpost")}
            costs = measure.costs(sides, self.sizes.rounds, self.bars.advance, device=self.device)
            for side, cost in costs.items():
                self.results.add(kind="step", method=method, side=side, seconds=cost.seconds, peak_mib=cost.peak_mib)
        had = (time.process_time() - processor) / (time.perf_counter() - wall) / torch.get_num_threads()
        self.results.about["processor_share"] = round(had, 2)

    def bits(self) -> None:
        """What the forward pass sees of SAM's perturbation with weights in bfloat16, and how far the loss rises."""
        self.bars.start("SmolLM2: SAM in bfloat16", len(WAYS))
        batch = next(self.language.batches(1, 1, 1))
        model = self.model.to(torch.bfloat16)
        for done, (way, (options, _)) in enumerate(WAYS.items(), start=1):
            seen, rise = perturbed(model, batch, options)
            self.results.add(kind="bits", method=way, **seen, rise=rise)
            self.bars.advance(done)
        self.model = model.float()

    def tune(self) -> None:
        """MiniLM fine-tuned on few examples."""
        steps = -(-self.sizes.train // 16) * self.sizes.epochs
        for seed in range(self.sizes.seeds):
            for method in TUNED:
                self.bars.start(f"MiniLM, {NAMES[method]}, seed {seed}", steps)
                outcome = tuning.finetune(
                    method, seed, self.task, tuning.Hyperparameters(rho=RHO),
                    steps=steps, batch_size=16, evaluations=1, progress=self.bars.advance,
                )  # fmt: skip
                self.results.add(kind="tune", method=method, seed=seed, value=outcome.test)

    def climb(self) -> None:
        """GAP on the language model: the loss of text that chooses the state, and of text that reports it, at every step."""
        self.bars.start("SmolLM2: GAP", self.sizes.climb)
        choose, report = (windows.to(self.device) for windows in (self.corpus.validation, self.corpus.test))
        reported: list[torch.Tensor] = []

        def score(model: Any) -> float:
            reported.append(negative_log_likelihoods(model, report, 4))
            return -float(negative_log_likelihoods(model, choose, 4).mean())

        gap = fastpost.GAP(n_steps=self.sizes.climb, patience=None)
        text = self.corpus.climb[0].to(self.device)
        result = gap(self.model.eval(), text, evaluate=score, progress=self.bars.advance)
        for step, (score_then, other) in enumerate(zip(result.scores, reported, strict=True)):
            self.results.add(kind="gap", step=step, chosen=-score_then, value=float(other.mean()))
        change = reported[-1] - reported[0]  # window by window: what the windows differ in does not count as error
        self.results.about["gap"] = {"kept": result.best_step, "error": float(change.std()) / math.sqrt(len(change))}
        result.rollback()


def perturbed(model: Any, batch: tuning.Batch, options: dict[str, Any]) -> tuple[dict[str, float], float]:
    """SAM's perturbation by one batch's gradient: what the forward pass sees of it, and how far the loss rises.

    Returns:
        `along`: the part of what is seen that lies along e, 1 for all of it; `beside`: the length of the rest, rounding
        noise, in units of e. And the loss at w + e less that at w.
    """
    sam = fastpost.SAM(model.named_parameters(), torch.optim.SGD, rho=RHO, lr=0.0, model=model, **options)
    loss = model(**batch).loss
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that e is lost in rounding is what is measured
        with sam.perturbed(), torch.no_grad():
            rise = (model(**batch).loss.float() - loss.float()).item()
        report = sam.report
    sam.zero_grad()
    assert report is not None
    found = report.as_dict()
    norm = found["seen_norm"] / found["intended_norm"]
    along = norm * found["seen_cosine"]
    return {"along": along, "beside": math.sqrt(max(norm**2 - along**2, 0.0))}, rise


# -- what is shown ----------------------------------------------------------------------------------------------------------


def accuracy(results: Results, method: str, tested: int) -> tuple[float, float]:
    """Mean test accuracy and two standard errors, of the draw of test examples and of the seeds together."""
    values = results.values("value", kind="tune", method=method)
    mean, spread = shared.mean_and_spread(values)
    seeds = 0.0 if math.isnan(spread) else spread / math.sqrt(len(values))
    return mean, 2 * math.hypot(shared.share_error(mean, tested), seeds)


def sides(results: Results, method: str) -> tuple[shared.Row, shared.Row]:
    published, ours = (results.where(kind="step", method=method, side=side)[0] for side in ("published", "fastpost"))
    return published, ours


def table(results: Results, tested: int) -> Any:
    """Nine lines."""
    lines = []
    for method in ("sam", "r3f"):
        if results.where(kind="step", method=method):
            theirs, ours = sides(results, method)
            mib = [f", {row['peak_mib']:,.0f} MiB" if row["peak_mib"] is not None else "" for row in (theirs, ours)]
            ratio = f"{theirs['seconds'] / ours['seconds']:.2f} times as fast"
            told = [f"{row['seconds'] * 1e3:,.0f} ms{more}" for row, more in zip((theirs, ours), mib, strict=True)]
            lines.append((f"SmolLM2, a step of {NAMES[method]}", f"published loop {told[0]}", f"fastpost {told[1]}", ratio))
    for row in results.where(kind="bits"):
        arrived, noise = f"{row['along']:.0%} of the perturbation seen", f"rounding noise {row['beside']:.2f} times as long"
        lines.append((f"SAM in bfloat16, {row['method']}", arrived, noise, verdict(row["along"], row["beside"])))
    for method in TUNED:
        if results.where(kind="tune", method=method):
            mean, error = accuracy(results, method, tested)
            shown = f"{mean:.1%} ± {error * 100:.1f} points"
            seeds = f"{len(results.where(kind='tune', method=method))} seeds, {tested} examples"
            lines.append((f"MiniLM fine-tuned, {NAMES[method]}", "test accuracy", shown, seeds))
    states = results.where(kind="gap")
    if states:
        kept, start, end = results.about["gap"]["kept"], states[0]["value"], states[-1]["value"]
        change = f"after {len(states) - 1} steps {end - start:+.3f} ± {2 * results.about['gap']['error']:.3f}"
        told = f"state {kept} kept: {states[kept]['value'] - start:+.3f}"
        lines.append(("SmolLM2, GAP", f"held-out loss {start:.3f} nats per token", change, told))
    return shared.table("fastpost demo", ("what", "", "", ""), lines, left=3)


def verdict(along: float, beside: float) -> str:
    """What bfloat16 did to SAM's perturbation, in words."""
    if along < 0.9:
        return "a part is lost"
    return "all arrives, in noise" if beside > 0.1 else "all arrives"


def note(results: Results, sizes: Sizes, device: str) -> str:
    """What this can and cannot show, in one paragraph."""
    had = results.about.get("processor_share", 1.0)
    busy = f"This machine was busy, the steps had {had:.0%} of its processors: do not go by their times. "
    return (busy if device == "cpu" and had < 0.7 else "") + (
        f"The first two lines hold on this machine ({where(device)}): medians of {sizes.rounds} step(s) of {sizes.rows} x "
        f"{sizes.tokens} tokens, both sides in turns around the same AdamW. Other work on the machine disturbs them. "
        "Memory is the peak above the weights. SAM steps to w + e: the lines on bfloat16 say how much of e the model sees "
        "once w + e is rounded, for one gradient. Stochastic rounding's noise has no direction, so e survives it on "
        f"average. The accuracies do not rank methods: {sizes.train} training and {sizes.test} test examples, and "
        "hyper-parameters that were not searched. GAP climbs on one text; other text chooses the state, and state 0 is the "
        "model as it was, kept when no step helps. Each ± is two standard errors. Whether the methods help is measured with "
        "more data and seeds in docs/studies.md."
    )


def where(device: str) -> str:
    """The device, in words."""
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s'[: threads - 1]}" if device == "cpu" else torch.cuda.get_device_name(device)


def panels(results: Results, sizes: Sizes) -> list[Panel]:
    """Five panels, whose titles say what to look for."""
    found = []
    methods = [method for method in ("sam", "r3f") if results.where(kind="step", method=method)]
    for column, unit, scale, title in (
        ("seconds", "seconds", 1.0, "time of one step, SmolLM2 135M\n(lower is better)"),
        ("peak_mib", "GiB", 1 / 1024, "peak memory of that step, beside the weights\n(lower is better)"),
    ):
        rows = [sides(results, method) for method in methods]
        if not rows or any(row[column] is None for pair in rows for row in pair):
            continue
        values = [[scale * pair[k][column] for pair in rows] for k in (0, 1)]
        bars = [
            Series(values[k], [x + 0.4 * k - 0.2 for x in range(len(rows))], label, ("0.65", 2)[k], is_bar=0.38)
            for k, label in enumerate(("published loop", "fastpost"))
        ]
        notes = [(x + 0.4 * k - 0.2, values[k][x], f"{values[k][x]:.2f}") for k in (0, 1) for x in range(len(rows))]
        found.append(Panel(title, bars, y=unit, ticks=[NAMES[method] for method in methods], notes=notes))
    bits = results.where(kind="bits")
    in_bfloat16 = "SAM in bfloat16: "
    for column, scale, form, level, colour, y, title in (
        ("along", 100, "{:.0f}%", 100, "C2", "%", "how much of the perturbation\nthe model sees (should be 100%)"),
        ("beside", 1, "{:.2f}", 0, "C3", "lengths of the perturbation", "rounding noise on top\n(should be 0)"),
    ):
        if bits:
            values = [scale * row[column] for row in bits]
            notes = [(x, value, form.format(value)) for x, value in enumerate(values)]
            series = [Series(values, colour=colour, is_bar=0.6)]
            ticks = [WAYS[row["method"]][1] for row in bits]
            found.append(Panel(in_bfloat16 + title, series, y=y, ticks=ticks, notes=notes, level=(level, "")))
    tuned = [method for method in TUNED if results.where(kind="tune", method=method)]
    if tuned:
        found.append(_tuned(results, sizes, tuned))
    states = results.where(kind="gap")
    if states:
        kept = results.about["gap"]["kept"]
        chosen, reported = ([state[name] - states[0][name] for state in states] for name in ("chosen", "value"))
        found.append(
            Panel(
                "GAP on SmolLM2: loss of other text\nafter each step uphill (lower is better)",
                [
                    Series(chosen, label="text that chooses the state", colour="0.6", marker="."),
                    Series(reported, label="held-out text, which is reported", colour=2, marker="."),
                    Series([reported[kept]], [kept], "the state that is kept", 3, line="", marker="o",
                           look={"markersize": 11, "fillstyle": "none", "markeredgewidth": 2}),
                ],
                "step uphill", "change of nats per token", level=(0.0, ""), steps=True,
            )
        )  # fmt: skip
    return found


def _tuned(results: Results, sizes: Sizes, methods: Sequence[str]) -> Panel:
    pairs = [accuracy(results, method, sizes.test) for method in methods]
    values = [(k + 0.15, 100 * v) for k, m in enumerate(methods) for v in results.values("value", kind="tune", method=m)]
    means, errors = ([100 * pair[k] for pair in pairs] for k in (0, 1))
    return Panel(
        f"MiniLM fine-tuned on {sizes.train} examples\n(higher is better; overlapping bars do not rank)",
        [
            Series(means, label="mean ± two standard errors", line="", marker="s", error=errors, look={"markersize": 7}),
            Series([y for _, y in values], [x for x, _ in values], "single seeds", 1, line="", marker="."),
        ],
        y="test accuracy, %",
        ticks=[NAMES[method] for method in methods],
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute instead of a few: smaller, and less to be seen")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("fastpost-runs/demo"), help="of demo.png, demo.csv, demo.json"
    )
    parser.add_argument("--model", help="folder of a causal language model (default: SmolLM2-135M, from its package)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Runs the demo; 0, 2 for what cannot be started, 130 when interrupted."""
    options = parse(argv)
    began = time.perf_counter()
    console = shared.console(130)
    sizes = QUICK if options.quick else Sizes()
    try:
        device = device_of(options.device)
        backend = served_by(device)
        check_folder(options.output_dir)
        with console.status("reading SmolLM2 (the first time, a minute of conversion) and MiniLM"):
            loaded = load_lm(options.model or str(smollm2.folder()))
        versions = {"fastpost": fastpost.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
        about = {"device": device, "backend": backend, "threads": torch.get_num_threads(), "versions": versions}
        bars = Bars(console, 4)
        demo = Demo(sizes, device, loaded, Results(options.output_dir, "demo", COLUMNS, about), bars)
    except (ValueError, OSError) as error:
        complain(PROGRAM, error)
        return 2
    results, status = demo.results, 0
    try:
        with bars:
            demo.run()
    except KeyboardInterrupt:
        status = 130
        console.print("interrupted; what was finished is kept")
    finally:
        results.about["seconds"] = round(time.perf_counter() - began, 1)
        results.save()
        if results.rows:
            title = f"fastpost demo: SmolLM2-135M and MiniLM on this machine ({where(device)})"
            shared.plot(results.png, panels(results, sizes), title, across=3)
            console.print(table(results, sizes.test))
            console.print(note(results, sizes, device))
            told = f"{results.about['seconds']:.0f} s; picture: {results.png}; numbers: {results.csv}"
            console.print(told, markup=False, soft_wrap=True)
    return status
