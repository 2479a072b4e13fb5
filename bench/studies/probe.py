"""Representation collapse (2008.03156, section 4): fine-tunes an encoder through a chain of tasks and probes it, frozen.

python -m fastpost.bench.studies probe --tasks cola mrpc rte --data-dir glue
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastpost
from fastpost.bench.studies import results as shared
from fastpost.bench.studies import tasks, tuning
from fastpost.bench.studies.arguments import names_of, parsed, seeds_of
from fastpost.bench.studies.results import Bars, Panel, Results, Row, Series
from fastpost.cli.models import PACKAGED_MODEL
from fastpost.cli.options import Range, check, complain, option
from fastpost.errors import unknown
from fastpost.ops.noise import check_noise
from fastpost.r3f import relatives
from fastpost.r3f.probe import POOLINGS, ProbeResult, encoder_of, features, linear_probe
from fastpost.r3f.relatives.base import Method
from fastpost.r3f.spectral import find_classifier

PROGRAM = "studies probe"
LISTS = ("tasks", "probes", "methods", "seeds")
# method and seed: which run, "pretrained" for the encoder before any. stage: how many tasks were behind it, trained_on the
# last of them. kind: "probe" (linear, on the frozen encoder) or "head" (the fine-tuned classifier itself).
COLUMNS = (
    "method", "seed", "stage", "trained_on", "task", "kind", "accuracy", "standard_error", "train_accuracy", "majority",
    "train_size", "test_size", "converged", "seconds",
)  # fmt: skip
# By their own defaults, but for the weight of a KL.
RELATIVES: dict[str, Callable[[tuning.Hyperparameters], Method]] = {
    "rdrop": lambda hyper: relatives.RDrop(hyper.r3f_lambda),
    "neftune": lambda hyper: relatives.NEFTune(),
    "smart": lambda hyper: relatives.SMART(hyper.r3f_lambda),
    "freelb": lambda hyper: relatives.FreeLB(),
    "hype": lambda hyper: relatives.HyPe(),
    "student": lambda hyper: relatives.NoisedStudent(r3f_lambda=hyper.r3f_lambda),
}
METHODS = (*tuning.CLASSIFIERS, *RELATIVES)
PRETRAINED = "pretrained"

Rows = list[dict[str, Any]]


@dataclass
class ProbeArguments:
    """Options; the same names serve as keys of a JSON or YAML file given as the first argument."""

    tasks: str = option("cola,mrpc,rte", f"the chain, in order; of {', '.join(tasks.TASKS)}")
    probes: str = option("", "tasks to probe before the chain and after each of its stages; default: those of the chain")
    methods: str = option("adamw,r3f,r4f", f"of {', '.join(METHODS)}; the first is compared with")
    seeds: str = option("0,1", "order of data, heads, dropout and noise")
    data_dir: str | None = option(None, "folder with one folder per GLUE task (RTE, CoLA, MRPC)")
    model: str | None = option(None, f"folder or hub name of an encoder; default: {PACKAGED_MODEL} from PyPI")
    output_dir: str = option("fastpost-runs/probe", "where probe.csv and probe.png go")
    train_size: int = option(512, "examples a stage learns from (0: all)")
    probe_size: int = option(1000, "examples a probe is fitted to, others than those while there are enough (0: all)")
    test_size: int = option(0, "examples to report on (0: all)")
    epochs: float = option(2.0, "passes over a stage's training examples")
    max_steps: int = option(-1, "steps of a stage; -1: as epochs say")
    batch_size: int = option(16, "examples per step")
    max_length: int = option(64, "tokens per example")
    pooling: str = option("first", f"features: {', '.join(POOLINGS)}")
    probe_c: float = option(
        0.0, "inverse strength of the probe's L2 penalty; 0: cross-validated on the probe's own examples"
    )
    lr: float = option(2e-4, "AdamW's learning rate")
    weight_decay: float = option(0.01, "AdamW's")
    rho: float = option(0.05, "SAM's radius")
    asam_rho: float = option(0.5, "ASAM's radius")
    eps: float = option(1e-5, "R3F's and R4F's noise")
    r3f_lambda: float = option(1.0, "weight of R3F's KL")
    noise_type: str = option("uniform", "R3F's noise: uniform or normal")

    def __post_init__(self) -> None:
        check(self, _RANGES)
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)
        check_noise("probe", self.eps, self.noise_type)

    def named(self, option: str, valid: Sequence[str]) -> list[str]:
        """The names given for a list option, checked."""
        return names_of(getattr(self, option), option, valid)

    def seed_list(self) -> list[int]:
        return seeds_of(self.seeds)


_RANGES = {
    **dict.fromkeys(("train_size", "probe_size", "test_size", "weight_decay", "probe_c"), Range(0)),
    **dict.fromkeys(("rho", "asam_rho", "eps", "r3f_lambda", "lr"), Range(0)),
    "epochs": Range(0, above=True),
    "batch_size": Range(1),
    "max_steps": Range(1, also=(-1,)),
    "max_length": Range(4),
}


def parse(argv: Sequence[str]) -> ProbeArguments:
    """Options from the command line or a file; raises as `parsed`."""
    return parsed(ProbeArguments, PROGRAM, str(__doc__), argv, LISTS)


# -- what is read before anything runs --------------------------------------------------------------------------------


@dataclass
class Data:
    """A task in token ids: what a stage learns from, what a probe is fitted to, and what both are scored on."""

    task: tasks.Task
    classifier: tuning.Classifier
    train: Rows
    probe: Rows
    test: Rows


@dataclass
class Plan:
    arguments: ProbeArguments
    chain: list[str]
    probes: list[str]
    methods: list[str]
    seeds: list[int]
    data: dict[str, Data]
    hyper: tuning.Hyperparameters

    def steps(self, name: str) -> int:
        a = self.arguments
        per_epoch = -(-len(self.data[name].train) // a.batch_size)
        return a.max_steps if a.max_steps > 0 else max(round(per_epoch * a.epochs), 1)


def prepare(arguments: ProbeArguments) -> Plan:
    """Reads data and models, and refuses what cannot work, before anything is trained or written.

    Raises:
        ValueError, FileNotFoundError: the first thing that is wrong.
    """
    a = arguments
    chain, methods = a.named("tasks", tasks.TASKS), a.named("methods", METHODS)
    probes = a.named("probes", tasks.TASKS) if a.probes.strip() else chain
    hyper = tuning.Hyperparameters(a.lr, a.weight_decay, a.rho, a.asam_rho, a.eps, a.r3f_lambda, a.noise_type)
    seeds = a.seed_list()
    data: dict[str, Data] = {}
    classifiers: dict[int, tuning.Classifier] = {}
    for name in dict.fromkeys([*chain, *probes]):
        # Nothing is chosen on validation here, so its rows are better spent on training.
        task = tasks.load(name, None if name == "stdlib" else a.data_dir, (0, 1, a.test_size))
        labels = len(task.labels)
        if labels not in classifiers:
            classifiers[labels] = tuning.Classifier(a.model, labels)
        classifier = classifiers[labels]
        # A fine-tuned encoder separates the rows it has learnt from far better than others; a probe wants others.
        rows = {
            "train": task.train[: a.train_size or None],
            "probe": task.train[-a.probe_size :] if a.probe_size else task.train,
            "test": task.test,
        }
        for split, examples in rows.items():
            if split != "test" and len({example.label for example in examples}) < 2:
                raise ValueError(f"task {name}: {len(examples)} {split} examples hold one label only; ask for more")
        encoded = {split: classifier.encode(examples, a.max_length) for split, examples in rows.items()}
        data[name] = Data(task, classifier, **encoded)
    first = data[chain[0]].classifier.fresh(0)
    if encoder_of(first) is first:
        raise ValueError(f"--model {data[chain[0]].classifier.name}: its encoder cannot be told from its head")
    if "r4f" in methods:
        find_classifier(first)
    probe_of(first, data[probes[0]], a, limit=4)  # a pooling that this encoder has not, say
    return Plan(a, chain, list(dict.fromkeys(probes)), list(dict.fromkeys(methods)), seeds, data, hyper)


# -- the study --------------------------------------------------------------------------------------------------------


def pooled(model: nn.Module, data: Data, rows: Rows, pooling: str, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Features and labels of the rows, shortest text first."""
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    batches = [data.classifier.collate(by_length[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return features(model, batches, pooling=pooling), torch.cat([batch["labels"] for batch in batches])


def probe_of(model: nn.Module, data: Data, arguments: ProbeArguments, limit: int | None = None) -> ProbeResult | None:
    """A linear probe of the task on the model's encoder as it stands; with `limit`, only so many features, and no probe."""
    fitted = pooled(model, data, data.probe[:limit], arguments.pooling)
    if limit is not None:
        return None
    return linear_probe(*fitted, *pooled(model, data, data.test, arguments.pooling), C=arguments.probe_c or None)


def build(method: str, model: nn.Module, hyper: tuning.Hyperparameters) -> tuning.Trainee:
    """A method's training step on a model; all but SAM's on the same AdamW."""
    if method in tuning.CLASSIFIERS:
        return tuning.build(method, "fastpost", model, hyper)
    loss_of = RELATIVES[method](hyper)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hyper.lr, weight_decay=hyper.weight_decay, fused=True)

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = loss_of(model, **batch).loss
        if loss.requires_grad:  # FreeLB has been through its backward passes
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return tuning.Trainee(model, optimizer, step)


class Study:
    """Runs a plan; every row is in probe.csv as soon as it is there."""

    def __init__(self, plan: Plan, results: Results, start: Callable[[str, int], Callable[[int], None]]) -> None:
        self.plan, self.results, self.start = plan, results, start

    def run(self) -> None:
        """The pretrained encoder first, then every method with every seed through the chain."""
        plan = self.plan
        self.probe(plan.data[plan.chain[0]].classifier.fresh(0), PRETRAINED, 0, 0, "")
        for seed in plan.seeds:
            for method in plan.methods:
                state: dict[str, Tensor] | None = None
                for stage, name in enumerate(plan.chain, start=1):
                    model = self.fine_tune(method, seed, stage, name, state)
                    self.probe(model, method, seed, stage, name)
                    state = encoder_of(model).state_dict()

    def fine_tune(self, method: str, seed: int, stage: int, name: str, state: dict[str, Tensor] | None) -> nn.Module:
        """One stage: the encoder of the stage before under a fresh head. Warm-up over a tenth of the steps, then decay."""
        plan, data = self.plan, self.plan.data[name]
        began = time.perf_counter()
        model = data.classifier.fresh(seed + 1000 * stage)
        if state is not None:
            encoder_of(model).load_state_dict(state)
        trainee = build(method, model, plan.hyper)
        steps = plan.steps(name)
        warmup = max(steps // 10, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            trainee.optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
        )
        advance = self.start(f"{method}, seed {seed}: {name}", steps)
        batches = data.classifier.batches(data.train, plan.arguments.batch_size, steps, seed + 1000 * stage)
        for step, batch in enumerate(batches, start=1):
            trainee.step(batch)
            schedule.step()
            advance(step)
        accuracy = tuning.accuracy(data.classifier, model, data.test)
        self.results.add(
            method=method, seed=seed, stage=stage, trained_on=name, task=name, kind="head", accuracy=accuracy,
            standard_error=shared.share_error(accuracy, len(data.test)),
            train_accuracy=tuning.accuracy(data.classifier, model, data.train), majority=data.task.majority(),
            train_size=len(data.train), test_size=len(data.test), converged=True, seconds=time.perf_counter() - began,
        )  # fmt: skip
        return model

    def probe(self, model: nn.Module, method: str, seed: int, stage: int, trained_on: str) -> None:
        for task in self.plan.probes:
            began = time.perf_counter()
            self.start(f"{method}, seed {seed}, stage {stage}: probing {task}", 1)
            result = probe_of(model, self.plan.data[task], self.plan.arguments)
            assert result is not None
            self.results.add(
                method=method, seed=seed, stage=stage, trained_on=trained_on, task=task, kind="probe",
                accuracy=result.accuracy, standard_error=result.standard_error, train_accuracy=result.train_accuracy,
                majority=result.majority, train_size=result.train_size, test_size=result.test_size,
                converged=result.converged, seconds=time.perf_counter() - began, correct=result.correct.int().tolist(),
            )  # fmt: skip


# -- what is shown --------------------------------------------------------------------------------------------------------


class Found:
    """Reads the rows of a chain: `results` with the names of its tasks, probes and methods."""

    def __init__(self, results: Results, chain: list[str], probes: list[str], methods: list[str]) -> None:
        self.results, self.chain, self.probes, self.methods = results, chain, probes, methods

    def probed(self, method: str, stage: int, task: str) -> list[Row]:
        """Stage 0 is the pretrained encoder, the same for every method."""
        return self.results.where(kind="probe", method=method if stage else PRETRAINED, stage=stage, task=task)

    def difference(self, method: str, task: str) -> tuple[float, float] | None:
        """After the whole chain, accuracy minus that of the first method, and its standard error.

        Both were asked the same rows, so the error is taken over the rows' differences (averaged over seeds first), which
        leaves out what the rows have in common. None where a run is missing.
        """
        if method == self.methods[0]:
            return None
        mine, base = (
            {row["seed"]: torch.tensor(row["correct"]).double() for row in self.probed(name, len(self.chain), task)}
            for name in (method, self.methods[0])
        )
        differences = [mine[seed] - base[seed] for seed in mine if seed in base]
        if not differences:
            return None
        rows = torch.stack(differences).mean(0)
        return float(rows.mean()), float(rows.std() / math.sqrt(len(rows)))


def mean_and_errors(rows: list[Row]) -> tuple[float, float, float]:
    """Mean accuracy, its standard error from the test rows, and the standard deviation over seeds (NaN for one).

    All seeds are scored on the same rows, so more seeds do not make the first error smaller.
    """
    mean, spread = shared.mean_and_spread([row["accuracy"] for row in rows])
    return mean, shared.share_error(mean, rows[0]["test_size"]), spread


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "-"
    mean, error, spread = mean_and_errors(rows)
    return f"{mean * 100:.1f} ± {error * 100:.1f}" + ("" if math.isnan(spread) else f" ({spread * 100:.1f})")


def table(found: Found) -> Any:
    """Probe accuracies: a line per probed task and method, a column per stage."""
    stages = [PRETRAINED, *(f"{i}: after {name}" for i, name in enumerate(found.chain, start=1))]
    lines = []
    for task in found.probes:
        for method in found.methods:
            cells = [found.probed(method, stage, task) for stage in range(len(stages))]
            paired = found.difference(method, task)
            last = "-" if paired is None else f"{paired[0] * 100:+.1f} ± {paired[1] * 100:.1f}"
            majority = next((f"{row['majority'] * 100:.1f}" for rows in cells for row in rows), "-")
            lines.append((task, majority, method, *map(_cell, cells), last))
    return shared.table(
        "linear probes on the frozen encoder, test accuracy in %",
        ("probed task", "majority", "method", *stages, f"end, minus {found.methods[0]}"),
        lines,
        "±: standard error from the test rows; in brackets: standard deviation over seeds",
        left=3,
    )


def heads(found: Found) -> Any:
    """What each stage's own classifier scores on its own task."""
    stages = list(enumerate(found.chain, start=1))
    lines = [
        (m, *(_cell(found.results.where(kind="head", method=m, stage=i, task=name)) for i, name in stages))
        for m in found.methods
    ]
    names = ("method", *(f"{i}: {name}" for i, name in stages))
    return shared.table("the fine-tuned classifiers themselves, test accuracy in %", names, lines)


def note(found: Found) -> str:
    """What the numbers can and cannot show."""
    seeds = len({row["seed"] for row in found.results.where(kind="head")})
    stuck = sum(not row["converged"] for row in found.results.rows)
    sizes = ", ".join(
        f"{task}: fitted to {rows[0]['train_size']}, scored on {rows[0]['test_size']}"
        for task in found.probes
        if (rows := found.probed("", 0, task))
    )
    text = (
        f"{sizes}; {seeds} seed(s). The errors hold the draw of the test rows; the draw of the training rows and, but for "
        "the spread shown, the seeds come on top. Hyper-parameters are defaults, searched for no method. Differences within "
        "two standard errors rank nothing."
    )
    return text + (f" {stuck} probe(s) stopped before the solver converged." if stuck else "")


def plot(found: Found) -> Path:
    """A panel per probed task: accuracy after each stage with the test rows' standard error, and single seeds."""
    labels = [PRETRAINED, *(f"after\n{name}" for name in found.chain)]
    panels = []
    for task in found.probes:
        series = []
        for index, method in enumerate(found.methods):
            rows = {stage: found.probed(method, stage, task) for stage in range(len(labels))}
            stages = [stage for stage in rows if rows[stage]]
            at = [stage + 0.06 * (index - (len(found.methods) - 1) / 2) for stage in stages]
            means = [mean_and_errors(rows[stage]) for stage in stages]
            mean, error = ([100 * one[k] for one in means] for k in (0, 1))
            series.append(Series(mean, at, method, index, marker="s", error=error, look={"markersize": 5}))
            points = [(x, 100 * row["accuracy"]) for x, stage in zip(at, stages, strict=True) for row in rows[stage]]
            series.append(Series([y for _, y in points], [x for x, _ in points], colour=index, line="", marker="."))
        pretrained = found.probed("", 0, task)
        level = (100 * pretrained[0]["majority"], "most frequent label") if pretrained else None
        panels.append(Panel(f"probe: {task}", series, y="test accuracy, %", ticks=labels, level=level))
    title = f"probe: {' → '.join(found.chain)} (bars: standard error; points: seeds)"
    return shared.plot(found.results.png, panels, title)


def main(argv: Sequence[str]) -> int:
    """Runs the study; 0, 2 for what cannot be started, 130 when interrupted."""
    console = shared.console(140)
    began = time.perf_counter()
    try:
        import sklearn  # noqa: F401

        arguments = parse(argv)
        with console.status("reading data and models"):
            plan = prepare(arguments)
        results = Results(Path(arguments.output_dir), "probe", COLUMNS, {"arguments": vars(arguments)})
    except (ValueError, OSError) as error:
        complain(PROGRAM, error)
        return 2
    found = Found(results, plan.chain, plan.probes, plan.methods)
    classifier = plan.data[plan.chain[0]].classifier
    console.print(
        f"fastpost {fastpost.__version__}; model {classifier.name}: {classifier.parameters / 1e6:.1f}M parameters; "
        f"chain {' → '.join(plan.chain)}; features: {arguments.pooling}"
    )
    status = 0
    try:
        with Bars(console) as bars:

            def start(what: str, total: int) -> Callable[[int], None]:
                bars.start(what, total)
                return bars.advance

            Study(plan, results, start).run()
    except KeyboardInterrupt:
        status = 130
        console.print("interrupted; what was finished is kept")
    finally:
        if results.rows:
            picture = plot(found)
            console.print(table(found))
            console.print(heads(found))
            console.print(note(found))
            console.print(f"written: {results.csv}, {picture}", markup=False)
        console.print(f"{time.perf_counter() - began:.0f} s in all")
    return status
