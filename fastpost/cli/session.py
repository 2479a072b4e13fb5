"""What `fastpost compare` does, step by step: everything is read and checked first, then timed and trained."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import fastpost
from fastpost import published
from fastpost.cli import lm, measure, report, tasks, tuning
from fastpost.cli.arguments import CompareArguments
from fastpost.errors import unknown

_GAP_TIMED_STEPS = 15  # the whole of a run: saving and going back belong to it


@dataclass
class Plan:
    """All that is read and checked before the first training step."""

    arguments: CompareArguments
    methods: list[str]
    seeds: list[int]
    task: tasks.Task | None
    classifier: tuning.Classifier | None
    corpus: lm.Corpus | None
    lm_options: lm.LmOptions
    hyper: tuning.Hyperparameters

    @property
    def steps(self) -> int:
        assert self.task is not None
        per_epoch = -(-len(self.task.train) // self.arguments.batch_size)
        return self.arguments.max_steps if self.arguments.max_steps > 0 else max(round(per_epoch * self.arguments.epochs), 1)

    @property
    def max_length(self) -> int:
        return self.arguments.max_length or (32 if self.arguments.task == "stdlib" else 128)


def prepare(arguments: CompareArguments) -> Plan:
    """Reads data and models, and refuses what cannot work, before anything is trained.

    Raises:
        ValueError, FileNotFoundError: the first thing that is wrong.
    """
    a = arguments
    methods, seeds = a.method_list(), a.seed_list()
    if a.noise_type not in ("uniform", "normal"):
        raise unknown("noise type", a.noise_type, ("uniform", "normal"))
    hyper = tuning.Hyperparameters(a.lr, a.weight_decay, a.rho, a.asam_rho, a.eps, a.r3f_lambda, a.noise_type)
    fastpost.GAP(n_steps=a.gap_steps, lr=a.gap_lr)  # checks its options
    if a.task not in tasks.TASKS:
        raise unknown("task", a.task, tasks.TASKS)
    task = classifier = None
    if any(method in tuning.CLASSIFIERS for method in methods):
        task = tasks.load(a.task, a.data_dir, (a.train_size, a.validation_size, a.test_size))
        classifier = tuning.Classifier(a.model, len(task.labels))
        if "r4f" in methods:
            tuning.find_head(classifier.fresh(0))
    heads = max(h for h in (1, 2, 4) if a.lm_width % h == 0)
    lm_options = lm.LmOptions(
        width=a.lm_width, layers=a.lm_layers, heads=heads, context=a.lm_context, steps=a.lm_steps, files_bytes=a.lm_bytes
    )
    corpus = lm.build_corpus(lm_options) if "gap" in methods else None
    return Plan(a, methods, seeds, task, classifier, corpus, lm_options, hyper)


class Session:
    """Runs a plan under progress bars, writing every result as soon as it is there."""

    def __init__(self, plan: Plan, results: report.Results, progress: Any) -> None:
        self.plan, self.results, self.progress = plan, results, progress
        self.current = progress.add_task("", total=1)

    def start(self, what: str, total: int) -> None:
        self.progress.reset(self.current, description=what, total=total)

    def advance(self, done: int, total: int) -> None:
        self.progress.update(self.current, completed=done, total=total)

    def say(self, text: str) -> None:
        self.progress.console.print(text)

    def run(self) -> None:
        classifiers = [method for method in self.plan.methods if method != "gap"]
        timed = 1 if self.plan.arguments.timing_rounds else 0
        units = len(classifiers) * (len(self.plan.seeds) + timed)
        if "gap" in self.plan.methods:
            units += len(self.plan.seeds) + timed + 1
        overall = self.progress.add_task("all", total=units)
        for method in classifiers if timed else []:
            self.time_classifier(method)
            self.progress.advance(overall)
        for seed in self.plan.seeds:
            for method in classifiers:
                self.finetune(method, seed)
                self.progress.advance(overall)
        if "gap" in self.plan.methods:
            model = self.train_lm()
            self.progress.advance(overall)
            if timed:
                self.time_gap(model)
                self.progress.advance(overall)
            for seed in self.plan.seeds:
                self.ascend(model, seed)
                self.progress.advance(overall)

    # -- classifiers ------------------------------------------------------------------------------------------------

    def time_classifier(self, method: str) -> None:
        plan = self.plan
        classifier, task = plan.classifier, plan.task
        assert classifier is not None
        assert task is not None
        rows = classifier.encode(task.train, plan.max_length)
        batch = next(classifier.batches(rows, plan.arguments.batch_size, 1, seed=0))

        def make(side: str) -> measure.Step:
            trainee = tuning.build(method, side, classifier.fresh(0), plan.hyper)
            return lambda: trainee.step(batch)

        sides = ("published",) if method == "adamw" else ("published", "fastpost")
        self._time(f"{method}: step time", method, {side: lambda side=side: make(side) for side in sides}, 1)

    def _time(self, what: str, method: str, sides: dict[str, Any], steps_per_call: int) -> None:
        rounds, warmup = self.plan.arguments.timing_rounds, 2
        total = len(sides) * (rounds + warmup)
        self.start(what, total)
        costs: dict[str, measure.Cost] = {}
        for done, (side, cost) in enumerate(measure.interleaved(sides, rounds, warmup), start=1):
            if cost is not None:
                costs[side] = cost
            self.advance(min(done, total), total)
        theirs, ours = costs["published"], costs.get("fastpost", costs["published"])
        self.results.add_cost(
            method,
            report.StepCost(theirs.seconds / steps_per_call, ours.seconds / steps_per_call, theirs.peak_mib, ours.peak_mib),
        )

    def finetune(self, method: str, seed: int) -> None:
        plan = self.plan
        assert plan.classifier is not None
        assert plan.task is not None
        self.start(f"{method}, seed {seed}: fine-tuning", plan.steps)
        began = time.perf_counter()
        outcome = tuning.finetune(
            method,
            seed,
            plan.classifier,
            plan.task,
            plan.hyper,
            steps=plan.steps,
            batch_size=plan.arguments.batch_size,
            max_length=plan.max_length,
            evaluations=plan.arguments.evaluations,
            progress=self.advance,
        )
        seconds = time.perf_counter() - began
        details = {"perturbation": outcome.perturbation} if outcome.perturbation else {}
        run = report.Run(
            method, seed, "accuracy", outcome.test, outcome.validation, outcome.best_step, seconds, details=details
        )
        self.results.add(run)
        self.say(
            f"{method:>6}, seed {seed}: test accuracy {outcome.test:.1%} (validation {outcome.validation:.1%}), "
            f"{plan.steps} steps in {seconds:.0f} s"
        )

    # -- GAP ----------------------------------------------------------------------------------------------------------

    def train_lm(self) -> Any:
        plan = self.plan
        assert plan.corpus is not None
        self.start("language model: training", plan.lm_options.steps)
        model: Any = lm.train_lm(plan.corpus, plan.lm_options, 0, self.advance)
        model.eval()
        size = sum(p.numel() for p in model.parameters())
        value, error = lm.perplexity(lm.negative_log_likelihoods(model, plan.corpus.test))
        self.say(f"language model of {size / 1e6:.1f}M parameters: test perplexity {value:.1f} ± {error:.1f}")
        self.results.about["language_model"] = {"parameters": size, "test_perplexity": value, "standard_error": error}
        return model

    def time_gap(self, model: Any) -> None:
        assert self.plan.corpus is not None
        ids = self.plan.corpus.climb[0].unsqueeze(0)
        lr = self.plan.arguments.gap_lr

        def theirs() -> None:
            start, _ = published.gap_ascent(model, ids, _GAP_TIMED_STEPS, lr)
            model.load_state_dict(start)

        def ours() -> None:
            fastpost.GAP(n_steps=_GAP_TIMED_STEPS, lr=lr)(model, ids).rollback()

        self._time("gap: step time", "gap", {"published": lambda: theirs, "fastpost": lambda: ours}, _GAP_TIMED_STEPS)

    def ascend(self, model: Any, seed: int) -> None:
        corpus, a = self.plan.corpus, self.plan.arguments
        assert corpus is not None
        ids = corpus.climb[seed * 7919 % len(corpus.climb)]
        before, _ = lm.perplexity(lm.negative_log_likelihoods(model, corpus.test))
        self.start(f"gap, text of seed {seed}", a.gap_steps)
        began = time.perf_counter()
        result = fastpost.GAP(n_steps=a.gap_steps, lr=a.gap_lr)(
            model,
            ids,
            evaluate=lambda m: -float(lm.negative_log_likelihoods(m, corpus.validation).mean()),
            progress=self.advance,
        )
        seconds = time.perf_counter() - began
        after, _ = lm.perplexity(lm.negative_log_likelihoods(model, corpus.test))
        curve = [math.exp(-score) for score in result.scores]
        details = {
            "validation_perplexity": curve,
            "text_loss": result.losses,
            "drift": result.drift,
            "skipped_steps": result.skipped_steps,
            "moved_fraction": result.moved_fraction,
            "stop_reason": result.stop_reason,
        }
        chosen = curve[result.best_step]
        self.results.add(
            report.Run(
                "gap", seed, "perplexity", after, chosen, result.best_step, seconds, untouched=before, details=details
            )
        )
        self.say(
            f"   gap, text of seed {seed}: test perplexity {before:.2f} → {after:.2f} (step {result.best_step} of "
            f"{len(curve) - 1}, chosen on validation: {curve[0]:.2f} → {chosen:.2f})"
        )
        result.rollback()
