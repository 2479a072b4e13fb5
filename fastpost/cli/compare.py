"""`fastpost compare`: post-trains real models by every method, beside the published formulas in plain PyTorch."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import fastpost
from fastpost.cli import report
from fastpost.cli.arguments import parse
from fastpost.cli.options import complain
from fastpost.cli.session import Plan, Session, prepare
from fastpost.errors import BackendUnavailable
from fastpost.integrations.masking import Mask


def note(plan: Plan, results: report.Results) -> str:
    """What the numbers can and cannot show, with the numbers that limit them."""
    parts = []
    accuracies = [run.value for run in results.runs if run.metric == "accuracy"]
    if accuracies and plan.task is not None:
        p = sum(accuracies) / len(accuracies)
        error = math.sqrt(p * (1 - p) / len(plan.task.test))
        sizes = (
            f"{len(plan.task.train)} training, {len(plan.task.validation)} validation, {len(plan.task.test)} test examples"
        )
        parts.append(
            f"{sizes}; {len(plan.seeds)} seed(s). The test set alone gives one accuracy a standard error of about "
            f"{error * 100:.1f} points, and the difference of two up to {error * math.sqrt(2) * 100:.1f}; seeds add to "
            "that. Differences of this size rank nothing. Always saying the most frequent label gives "
            f"{plan.task.majority():.1%}. Hyper-parameters are defaults, searched for no method."
        )
    if results.of("gap"):
        parts.append(
            "GAP's state is chosen on validation text and reported on other text; on a model this small a change below "
            "1 % says nothing about the published gains."
        )
    if results.costs:
        parts.append(
            f"Step times are medians of {plan.arguments.timing_rounds} steps, both sides in turns, on "
            f"{torch.get_num_threads()} threads of this machine. Forward, backward and AdamW (one fused kernel of torch's) "
            "are the same on both sides and dilute every ratio; `fastpost bench` times the operations themselves. Peak "
            "memory is resident memory above what the process held before, to some 20 MiB: weights, gradients, moments, "
            "activations; for gap without the weights, which were there already."
        )
    return "\n\n".join(parts)


def served_by() -> str:
    """The backend that will serve fastpost's side: the compiled core, or the one that FASTPOST_BACKEND names.

    Raises:
        ValueError: the core is missing and no other backend was named, so that the specification would be timed in its
            place; or FASTPOST_BACKEND names none.
    """
    named = os.environ.get("FASTPOST_BACKEND")
    try:
        with fastpost.use_backend(named or "cpu"):
            return named or "cpu"
    except BackendUnavailable as error:
        raise ValueError(f"{error} FASTPOST_BACKEND=reference compares with the reference implementation.") from error


def main(argv: Sequence[str]) -> int:
    """Runs the comparison; 0, 2 for what cannot be started, 130 when interrupted."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # in a file or a log, a table must not be squeezed
    began = time.perf_counter()
    try:
        arguments = parse(argv)
        backend = served_by()
        with console.status("reading data and models"):
            plan = prepare(arguments)
        about = {
            "arguments": Mask(os.environ).value(asdict(arguments)),
            "task": arguments.task,
            "model": plan.classifier.name if plan.classifier else "",
            "versions": {"fastpost": fastpost.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            "threads": torch.get_num_threads(),
            "cpu": fastpost.backends()["cpu"].reason,
            "backend": backend,
            "test_examples": len(plan.task.test) if plan.task else 0,
            "examples": {s: len(getattr(plan.task, s)) for s in ("train", "validation", "test")} if plan.task else {},
            "source": plan.task.source if plan.task else "",
        }
        results = report.Results(Path(arguments.output_dir), about)
    except (ValueError, OSError) as error:
        complain("compare", error)
        return 2
    if plan.task and plan.classifier:
        console.print(
            f"task {plan.task.name}: {plan.task.source}; {about['examples']}\nmodel {plan.classifier.name}: "
            f"{plan.classifier.parameters / 1e6:.1f}M parameters; {plan.steps} steps of {arguments.batch_size}"
        )
    if plan.corpus:
        lm, others = plan.lm_options, ",".join(method for method in plan.methods if method != "gap")
        told = f"gap climbs in a language model of {lm.layers} layers of width {lm.width}, trained here in {lm.steps} steps"
        console.print(told + (f". Without it: --methods {others}" if others else ""), soft_wrap=True)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    status = 0
    try:
        with Progress(*columns, console=console) as progress:
            Session(plan, results, progress).run()
    except KeyboardInterrupt:
        status = 130
        console.print("interrupted; what was finished is kept")
    finally:
        results.about["seconds"] = round(time.perf_counter() - began, 1)
        results.save()
        if results.runs or results.costs:
            picture = report.plot(results)
            console.print(report.table(results))
            console.print(note(plan, results))
            told = f"written: {results.folder / report.JSON_NAME}, {results.folder / report.CSV_NAME}, {picture}"
            console.print(told, markup=False)
        console.print(f"{results.about['seconds']:.0f} s in all")
    return status
