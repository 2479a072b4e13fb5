"""Post-trains real models by every method, beside the published formulas in plain PyTorch.

python -m fastpost.bench.studies compare                              # an encoder, and a small language model for GAP
python -m fastpost.bench.studies compare --task lm --model FOLDER     # any causal language model, GAP included
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastpost
from fastpost import published
from fastpost.bench import measure
from fastpost.bench.run import default_backend
from fastpost.bench.studies import results as shared
from fastpost.bench.studies import small_lm, smollm2, tasks, tuning
from fastpost.bench.studies.arguments import names_of, parsed, seeds_of
from fastpost.bench.studies.results import Bars, Panel, Results, Series
from fastpost.cli.models import PACKAGED_MODEL, load_lm, negative_log_likelihoods
from fastpost.cli.options import Range, check, complain, option
from fastpost.errors import BackendUnavailable, unknown
from fastpost.integrations.masking import Mask
from fastpost.r3f.spectral import find_classifier

PROGRAM = "studies compare"
METHODS = (*tuning.CLASSIFIERS, "gap")
TASKS = (*tasks.TASKS, "lm")
COLUMNS = (
    "kind", "method", "seed", "side", "metric", "value", "validation", "untouched", "best_step", "seconds", "peak_mib",
    "intended_norm", "stored_norm", "seen_norm", "seen_cosine", "moved_fraction",
)  # fmt: skip
GAP_TIMED_STEPS = 15  # the whole of a run: saving and going back belong to it


@dataclass
class CompareArguments:
    """Options; the same names serve as keys of a JSON or YAML file given as the first argument."""

    task: str = option("stdlib", f"what to learn: {', '.join(tasks.TASKS)} (classes), or lm (text, by a language model)")
    data_dir: str | None = option(
        None, "folder with train.tsv and dev.tsv, for rte, cola and mrpc; for lm with train, validation and test .txt"
    )
    model: str | None = option(
        None, f"folder or hub name of an encoder, for lm of a causal language model; default: {PACKAGED_MODEL}, SmolLM2"
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto: a GPU where there is one")
    methods: str = option("", "default: all that the task has; gap climbs, without --task lm in a small language model")
    seeds: str = option("0,1", "order of data, head, dropout and noise, and GAP's text")
    output_dir: str = option("fastpost-runs/compare", "where compare.csv, compare.json and compare.png go")
    train_size: int = option(256, "examples to learn from (0: all)")
    validation_size: int = option(128, "examples to choose by (0: as many as the task gives)")
    test_size: int = option(480, "examples to report on (0: all)")
    epochs: float = option(2.5, "passes over the training examples")
    max_steps: int = option(-1, "steps of fine-tuning; -1: as epochs say, for lm 20")
    batch_size: int = option(16, "examples per step")
    max_length: int = option(0, "tokens per example; 0: 32 for stdlib, 64 for lm, 128 otherwise")
    evaluations: int = option(2, "how often a run asks validation; the best state is reported")
    lr: float = option(2e-4, "AdamW's learning rate, for every method but gap; for lm 2e-5 is usual")
    weight_decay: float = option(0.01, "AdamW's")
    rho: float = option(0.05, "SAM's radius")
    asam_rho: float = option(0.5, "ASAM's radius, in its own scaled units")
    eps: float = option(1e-5, "R3F's and R4F's noise")
    r3f_lambda: float = option(1.0, "weight of R3F's KL")
    noise_type: str = option("uniform", "R3F's noise: uniform or normal")
    timing_rounds: int = option(5, "timed steps of each side; 0 leaves times and memory out")
    lm_steps: int = option(300, "steps that train the small language model before GAP")
    lm_width: int = option(128, "its width")
    lm_layers: int = option(4, "its layers")
    lm_context: int = option(128, "its context, in tokens; also the length of GAP's text")
    lm_bytes: int = option(6_000_000, "characters of the standard library that a language model reads at most")
    gap_steps: int = option(15, "GAP's steps at most")
    gap_lr: float = option(5e-5, "GAP's learning rate")

    def __post_init__(self) -> None:
        check(self, _RANGES)

    def method_list(self) -> list[str]:
        valid = METHODS if self.task != "lm" else tuple(method for method in METHODS if method != "r4f")
        return list(dict.fromkeys(names_of(self.methods or ",".join(valid), "methods", valid)))


LISTS = ("methods", "seeds")
_RANGES = {
    **dict.fromkeys(("train_size", "validation_size", "test_size", "max_length", "timing_rounds", "gap_steps"), Range(0)),
    **dict.fromkeys(("weight_decay", "rho", "asam_rho", "eps", "r3f_lambda", "lr"), Range(0)),
    **dict.fromkeys(("batch_size", "evaluations", "lm_steps", "lm_layers"), Range(1)),
    **dict.fromkeys(("epochs", "gap_lr"), Range(0, above=True)),
    "max_steps": Range(1, also=(-1,)),
    "lm_width": Range(4),
    "lm_context": Range(8),
    "lm_bytes": Range(10_000),
}


def parse(argv: Sequence[str]) -> CompareArguments:
    """Options from the command line or a file; raises as `parsed`."""
    return parsed(CompareArguments, PROGRAM, str(__doc__), argv, LISTS)


def device_of(asked: str) -> str:
    """The device to run on.

    Raises:
        ValueError: no such device here.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = asked.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {asked}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {asked}: torch sees no CUDA device")
    if number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"--device {asked}: there are {torch.cuda.device_count()} CUDA devices, from 0")
    return asked


def served_by(device: str) -> str:
    """The backend that will serve fastpost's side: the compiled core, or the one that FASTPOST_BACKEND names.

    Raises:
        ValueError: the core is missing and no other backend was named, so that the specification would be timed in its
            place; or FASTPOST_BACKEND names none.
    """
    backend = default_backend(device)
    try:
        with fastpost.use_backend(backend):
            return backend
    except BackendUnavailable as error:
        raise ValueError(f"{error} FASTPOST_BACKEND=reference compares with the reference implementation.") from error


# -- what is read before anything runs --------------------------------------------------------------------------------------


@dataclass
class Plan:
    """All that is read and checked before the first training step.

    Attributes:
        subject: what is fine-tuned; None for gap alone on a small model.
        corpus: text that gap climbs and is scored on; None without gap.
    """

    arguments: CompareArguments
    device: str
    methods: list[str]
    seeds: list[int]
    task: tasks.Task | None
    subject: tuning.Classification | tuning.Language | None
    corpus: small_lm.Corpus | None
    lm_options: small_lm.LmOptions
    hyper: tuning.Hyperparameters

    @property
    def steps(self) -> int:
        if self.arguments.max_steps > 0:
            return self.arguments.max_steps
        if self.task is None:
            return 20
        return max(round(-(-len(self.task.train) // self.arguments.batch_size) * self.arguments.epochs), 1)


def prepare(arguments: CompareArguments) -> Plan:
    """Reads data and models, and refuses what cannot work, before anything is trained.

    Raises:
        ValueError, FileNotFoundError: the first thing that is wrong.
    """
    a = arguments
    device = device_of(a.device)
    if a.task not in TASKS:
        raise unknown("task", a.task, TASKS)
    methods, seeds = a.method_list(), seeds_of(a.seeds)
    if a.noise_type not in ("uniform", "normal"):
        raise unknown("noise type", a.noise_type, ("uniform", "normal"))
    hyper = tuning.Hyperparameters(a.lr, a.weight_decay, a.rho, a.asam_rho, a.eps, a.r3f_lambda, a.noise_type)
    fastpost.GAP(n_steps=a.gap_steps, lr=a.gap_lr)  # checks its options
    heads = max(h for h in (1, 2, 4) if a.lm_width % h == 0)
    sizes = small_lm.LmOptions(
        width=a.lm_width, layers=a.lm_layers, heads=heads, context=a.lm_context, steps=a.lm_steps, files_bytes=a.lm_bytes
    )
    if a.task == "lm":
        language = _language(a, device)
        return Plan(a, device, methods, seeds, None, language, language.corpus, sizes, hyper)
    task = subject = None
    if any(method in tuning.CLASSIFIERS for method in methods):
        task = tasks.load(a.task, a.data_dir, (a.train_size, a.validation_size, a.test_size))
        classifier = tuning.Classifier(a.model, len(task.labels))
        if "r4f" in methods:
            find_classifier(classifier.fresh(0))
        length = a.max_length or (32 if a.task == "stdlib" else 128)
        subject = tuning.Classification(classifier, task, length, device)
    corpus = small_lm.build_corpus(sizes) if "gap" in methods else None
    return Plan(a, device, methods, seeds, task, subject, corpus, sizes, hyper)


def _language(a: CompareArguments, device: str) -> tuning.Language:
    name = a.model or str(smollm2.folder())
    parts: Sequence[list[str]] = small_lm.library_texts(a.lm_bytes)
    where = "the standard library"
    if a.data_dir is not None:
        where = f"--data-dir {a.data_dir}"
        files = [Path(a.data_dir) / f"{split}.txt" for split in ("train", "validation", "test")]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"--task lm: {file} is missing; --data-dir holds train, validation and test .txt")
        train, validation, test = ([file.read_text(encoding="utf-8")] for file in files)
        parts = (train, validation, test, train)
    loaded = load_lm(name)
    context = min(a.max_length or 64, getattr(loaded.model.config, "max_position_embeddings", None) or 64)
    corpus = small_lm.encoded_corpus(parts, loaded.encode, context, min(a.test_size or 96, 96), where)
    return tuning.Language(Path(name).name, loaded, corpus, context, device)


# -- the run ----------------------------------------------------------------------------------------------------------------


class Session:
    """Runs a plan under progress bars; every row is on disk as soon as it is there."""

    def __init__(self, plan: Plan, results: Results, bars: Bars) -> None:
        self.plan, self.results, self.bars = plan, results, bars

    @staticmethod
    def units(plan: Plan) -> int:
        timed = bool(plan.arguments.timing_rounds)
        trains = "gap" in plan.methods and plan.task is not None
        return len(plan.methods) * (len(plan.seeds) + timed) + trains

    def run(self) -> None:
        tuned = [method for method in self.plan.methods if method != "gap"]
        timed = bool(self.plan.arguments.timing_rounds)
        for method in tuned if timed else []:
            self.time_step(method)
        for seed in self.plan.seeds:
            for method in tuned:
                self.finetune(method, seed)
        if "gap" in self.plan.methods:
            model = self.language_model()
            if timed:
                self.time_gap(model)
            for seed in self.plan.seeds:
                self.ascend(model, seed)

    def time_step(self, method: str) -> None:
        plan, subject = self.plan, self.plan.subject
        assert subject is not None
        batch = next(subject.batches(plan.arguments.batch_size, 1, seed=0))

        def make(side: str) -> measure.Step:
            trainee = tuning.build(method, side, subject.fresh(0), plan.hyper)
            return lambda: trainee.step(batch)

        sides = ("published",) if method == "adamw" else ("published", "fastpost")  # AdamW is one and the same loop
        self._time(method, {side: lambda side=side: make(side) for side in sides}, 1)

    def _time(self, method: str, sides: dict[str, Any], steps_per_call: int) -> None:
        rounds = self.plan.arguments.timing_rounds
        self.bars.start(f"{method}: step time", len(sides) * (rounds + measure.WARMUP))
        costs = measure.costs(sides, rounds, self.bars.advance, device=self.plan.device, steps_per_call=steps_per_call)
        for side, cost in costs.items():
            self.results.add(kind="step", method=method, side=side, seconds=cost.seconds, peak_mib=cost.peak_mib)
        self.bars.finish()

    def finetune(self, method: str, seed: int) -> None:
        plan, subject = self.plan, self.plan.subject
        assert subject is not None
        self.bars.start(f"{method}, seed {seed}: fine-tuning", plan.steps)
        began = time.perf_counter()
        outcome = tuning.finetune(
            method,
            seed,
            subject,
            plan.hyper,
            steps=plan.steps,
            batch_size=plan.arguments.batch_size,
            evaluations=plan.arguments.evaluations,
            progress=self.bars.advance,
        )
        seconds = time.perf_counter() - began
        names = ("intended_norm", "stored_norm", "seen_norm", "seen_cosine")
        seen = {name: outcome.perturbation[name] for name in names} if outcome.perturbation else {}
        self.results.add(
            kind="run", method=method, seed=seed, metric=subject.metric, value=outcome.test, validation=outcome.validation,
            best_step=outcome.best_step, seconds=seconds, **seen,
        )  # fmt: skip
        show = "{:.1%}" if subject.metric == "accuracy" else "{:.3f}"
        told = f"test {subject.metric} {show.format(outcome.test)} (validation {show.format(outcome.validation)})"
        self.bars.say(f"{method:>6}, seed {seed}: {told}, {plan.steps} steps in {seconds:.0f} s")
        self.bars.finish()

    def language_model(self) -> Any:
        """The pretrained one of --task lm, or a small one that is trained here."""
        plan = self.plan
        assert plan.corpus is not None
        if isinstance(plan.subject, tuning.Language):
            model = plan.subject.fresh(0).eval()
        else:
            self.bars.start("language model: training", plan.lm_options.steps)
            model = small_lm.train_lm(plan.corpus, plan.lm_options, 0, self.bars.advance).to(plan.device).eval()
            self.bars.finish()
        size = sum(p.numel() for p in model.parameters())
        value, error = small_lm.perplexity(negative_log_likelihoods(model, plan.corpus.test.to(plan.device), 8))
        self.bars.say(f"language model of {size / 1e6:.1f}M parameters: test perplexity {value:.1f} ± {error:.1f}")
        self.results.about["language_model"] = {"parameters": size, "test_perplexity": value, "standard_error": error}
        return model

    def time_gap(self, model: Any) -> None:
        assert self.plan.corpus is not None
        ids = self.plan.corpus.climb[0].unsqueeze(0).to(self.plan.device)
        lr = self.plan.arguments.gap_lr

        def theirs() -> None:
            start, _ = published.gap_ascent(model, ids, GAP_TIMED_STEPS, lr)
            model.load_state_dict(start)

        def ours() -> None:
            fastpost.GAP(n_steps=GAP_TIMED_STEPS, lr=lr)(model, ids).rollback()

        self._time("gap", {"published": lambda: theirs, "fastpost": lambda: ours}, GAP_TIMED_STEPS)

    def ascend(self, model: Any, seed: int) -> None:
        corpus, a = self.plan.corpus, self.plan.arguments
        assert corpus is not None
        ids = corpus.climb[seed * 7919 % len(corpus.climb)].to(self.plan.device)
        choose, report = (windows.to(self.plan.device) for windows in (corpus.validation, corpus.test))
        before, _ = small_lm.perplexity(negative_log_likelihoods(model, report, 8))
        self.bars.start(f"gap, text of seed {seed}", a.gap_steps)
        began = time.perf_counter()
        result = fastpost.GAP(n_steps=a.gap_steps, lr=a.gap_lr)(
            model,
            ids,
            evaluate=lambda m: -float(negative_log_likelihoods(m, choose, 8).mean()),
            progress=self.bars.advance,
        )
        seconds = time.perf_counter() - began
        after, _ = small_lm.perplexity(negative_log_likelihoods(model, report, 8))
        curve = [math.exp(-score) for score in result.scores]
        chosen = curve[result.best_step]
        self.results.add(
            kind="run", method="gap", seed=seed, metric="perplexity", value=after, validation=chosen, untouched=before,
            best_step=result.best_step, seconds=seconds, moved_fraction=result.moved_fraction, validation_perplexity=curve,
            text_loss=result.losses, drift=result.drift, skipped_steps=result.skipped_steps, stop_reason=result.stop_reason,
        )  # fmt: skip
        self.bars.say(
            f"   gap, text of seed {seed}: test perplexity {before:.2f} → {after:.2f} (step {result.best_step} of "
            f"{len(curve) - 1}, chosen on validation: {curve[0]:.2f} → {chosen:.2f})"
        )
        self.bars.finish()
        result.rollback()


# -- what is shown ----------------------------------------------------------------------------------------------------------


def methods_of(results: Results) -> list[str]:
    """Every method with a run or a time, in order of appearance."""
    return list(dict.fromkeys(row["method"] for kind in ("run", "step") for row in results.where(kind=kind)))


def cost_of(results: Results, method: str, side: str) -> shared.Row | None:
    return next(iter(results.where(kind="step", method=method, side=side)), None)


def table(results: Results) -> Any:
    heads = ("method", "test accuracy / perplexity", "step, published", "step, fastpost", "ratio", "peak memory (published)",
             "stored / seen")  # fmt: skip
    rows = []
    for method in methods_of(results):
        runs = results.where(kind="run", method=method)
        rows.append((method, _score(runs), *_cost_cells(results, method), _survival(runs)))
    return shared.table("compare", heads, rows, "±: standard deviation over seeds; step times: medians")


def _score(runs: list[shared.Row]) -> str:
    if not runs:
        return "-"
    mean, spread = shared.mean_and_spread([run["value"] for run in runs])
    if runs[0]["metric"] == "accuracy":
        return f"{mean:.1%}" + ("" if math.isnan(spread) else f" ± {spread * 100:.1f}")
    before = f"{shared.mean_and_spread([run['untouched'] for run in runs])[0]:.2f} → " if "untouched" in runs[0] else ""
    return f"{before}{mean:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}")


def _cost_cells(results: Results, method: str) -> tuple[str, str, str, str]:
    theirs, ours = (cost_of(results, method, side) for side in ("published", "fastpost"))
    if theirs is None:
        return "-", "-", "-", "-"
    here = ours or theirs
    memory = "-" if here["peak_mib"] is None else f"{here['peak_mib']:.0f} MiB"
    if ours is None:
        return f"{theirs['seconds'] * 1e3:.0f} ms", "same", "-", memory
    if theirs["peak_mib"] is not None:
        memory += f" ({theirs['peak_mib']:.0f})"
    ratio = theirs["seconds"] / ours["seconds"]
    return f"{theirs['seconds'] * 1e3:.0f} ms", f"{ours['seconds'] * 1e3:.0f} ms", f"{ratio:.2f}x", memory


def _survival(runs: list[shared.Row]) -> str:
    last = runs[-1] if runs else {}
    if last.get("intended_norm"):
        return f"{last['stored_norm'] / last['intended_norm']:.2f} / {last['seen_norm'] / last['intended_norm']:.2f}"
    return f"{last['moved_fraction']:.0%} moved" if "moved_fraction" in last else "-"


def note(plan: Plan, results: Results) -> str:
    """What the numbers can and cannot show, with the numbers that limit them."""
    parts = []
    accuracies = results.values("value", kind="run", metric="accuracy")
    if accuracies and plan.task is not None:
        error = shared.share_error(sum(accuracies) / len(accuracies), len(plan.task.test))
        sizes = (
            f"{len(plan.task.train)} training, {len(plan.task.validation)} validation, {len(plan.task.test)} test examples"
        )
        parts.append(
            f"{sizes}; {len(plan.seeds)} seed(s). The test set alone gives one accuracy a standard error of about "
            f"{error * 100:.1f} points, and the difference of two up to {error * math.sqrt(2) * 100:.1f}; seeds add to "
            "that. Differences of this size rank nothing. Always saying the most frequent label gives "
            f"{plan.task.majority():.1%}. Hyper-parameters are defaults, searched for no method."
        )
    if results.where(kind="run", method="gap"):
        parts.append("GAP's state is chosen on validation text and reported on other text.")
    if results.where(kind="step"):
        where = f"{torch.get_num_threads()} threads of this machine" if plan.device == "cpu" else plan.device
        parts.append(
            f"Step times are medians of {plan.arguments.timing_rounds} steps, both sides in turns, on {where}. Forward, "
            "backward and AdamW (one fused kernel of torch's) are the same on both sides and dilute every ratio; `fastpost "
            "bench` times the operations themselves. Peak memory is what weights, gradients, moments and activations add to "
            "what was held before; for gap without the weights, which were there already."
        )
    return "\n\n".join(parts)


def plot(results: Results) -> Path:
    """The score of each method, step times of both sides, and GAP's curve."""
    panels = []
    tuned = [method for method in methods_of(results) if method != "gap" and results.where(kind="run", method=method)]
    if tuned:
        panels.append(_scores(results, tuned))
    if results.where(kind="step"):
        panels.append(_times(results))
    climbs = results.where(kind="run", method="gap")
    if climbs:
        panels.append(_climbs(climbs))
    title = f"compare: {results.about.get('task', '')}, {results.about.get('model', '')}"
    return shared.plot(results.png, panels, title, width=5.2)


def _scores(results: Results, methods: list[str]) -> Panel:
    values = [results.values("value", kind="run", method=method) for method in methods]
    means = [shared.mean_and_spread(found)[0] for found in values]
    is_share = results.where(kind="run", method=methods[0])[0]["metric"] == "accuracy"
    tested, unit = results.about.get("test_examples") or 0, 100 if is_share else 1
    errors = [unit * shared.share_error(mean, tested) for mean in means] if is_share and tested else None
    label = "mean, with the test set's standard error" if errors else "mean"
    points = [(k + 0.18, unit * value) for k, found in enumerate(values) for value in found]
    return Panel(
        "after fine-tuning",
        [
            Series([unit * mean for mean in means], label=label, line="", marker="s", error=errors),
            Series([y for _, y in points], [x for x, _ in points], "single seeds", colour=1, line="", marker="."),
        ],
        y="test accuracy, %" if is_share else "test perplexity",
        ticks=methods,
    )


def _times(results: Results) -> Panel:
    methods = list(dict.fromkeys(results.values("method", kind="step")))
    sides = {"published": "published, plain PyTorch", "fastpost": "fastpost"}
    bars, notes = [], []
    times = {
        side: [1e3 * (cost_of(results, method, side) or cost_of(results, method, "published"))["seconds"]
               for method in methods]
        for side in sides
    }  # fmt: skip
    for k, (side, label) in enumerate(sides.items()):
        at = [x + 0.4 * k - 0.2 for x in range(len(methods))]
        bars.append(Series(times[side], at, label, colour=("0.65", 2)[k], is_bar=0.38))
    for x, method in enumerate(methods):
        if method != "adamw":
            theirs, ours = times["published"][x], times["fastpost"][x]
            notes.append((x, max(theirs, ours), f"{theirs / ours:.2f}x"))
    everything = [*times["published"], *times["fastpost"]]
    return Panel(
        "time of a training step", bars, y="ms per step (median)", ticks=methods, notes=notes,
        is_log=max(everything) > 8 * min(everything),
    )  # fmt: skip


def _climbs(runs: list[shared.Row]) -> Panel:
    series = []
    for index, run in enumerate(runs):
        curve, look = run["validation_perplexity"], shared.distinct(index, len(runs))
        series.append(Series(curve, label=f"text of seed {run['seed']}", colour=index, marker=".", look=look))
        ring = {"markersize": 6 + look["linewidth"], "fillstyle": "none"}
        series.append(Series([curve[run["best_step"]]], [run["best_step"]], colour=index, line="", marker="o", look=ring))
    return Panel("GAP (circle: the state that was kept)", series, "steps uphill", "validation perplexity", steps=True)


def main(argv: Sequence[str]) -> int:
    """Runs the comparison; 0, 2 for what cannot be started, 130 when interrupted."""
    console = shared.console()
    began = time.perf_counter()
    try:
        arguments = parse(argv)
        backend = served_by(device_of(arguments.device))
        with console.status("reading data and models"):
            plan = prepare(arguments)
        about = {
            "arguments": Mask(os.environ).value(asdict(arguments)),
            "task": arguments.task,
            "model": plan.subject.name if plan.subject else "",
            "device": plan.device,
            "versions": {"fastpost": fastpost.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            "threads": torch.get_num_threads(),
            "cpu": fastpost.backends()["cpu"].reason,
            "backend": backend,
            "test_examples": len(plan.task.test) if plan.task else 0,
            "examples": {s: len(getattr(plan.task, s)) for s in ("train", "validation", "test")} if plan.task else {},
            "source": plan.task.source if plan.task else "",
        }
        results = Results(Path(arguments.output_dir), "compare", COLUMNS, about)
    except (ValueError, OSError) as error:
        complain(PROGRAM, error)
        return 2
    if plan.task:
        console.print(f"task {plan.task.name}: {plan.task.source}; {about['examples']}")
    if plan.subject:
        told = f"model {plan.subject.name}: {plan.subject.parameters / 1e6:.1f}M parameters on {plan.device}"
        console.print(f"{told}; {plan.steps} steps of {arguments.batch_size}", markup=False)
    if plan.corpus and arguments.task != "lm":
        sizes, others = plan.lm_options, ",".join(method for method in plan.methods if method != "gap")
        told = f"gap climbs in a language model of {sizes.layers} layers of width {sizes.width}, "
        told += f"trained here in {sizes.steps} steps"
        console.print(told + (f". Without it: --methods {others}" if others else ""), soft_wrap=True)
    status = 0
    try:
        with Bars(console, Session.units(plan)) as bars:
            Session(plan, results, bars).run()
    except KeyboardInterrupt:
        status = 130
        console.print("interrupted; what was finished is kept")
    finally:
        results.about["seconds"] = round(time.perf_counter() - began, 1)
        results.save()
        if results.rows:
            picture = plot(results)
            console.print(table(results))
            console.print(note(plan, results))
            console.print(f"written: {results.json}, {results.csv}, {picture}", markup=False)
        console.print(f"{results.about['seconds']:.0f} s in all")
    return status
