"""`fastpost train --method gap`: up one text, the state chosen on one half of the validation data, reported on the other."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpost.bench import step_times
from fastpost.cli import train_data, train_page, train_report
from fastpost.cli.files import check_folder
from fastpost.cli.models import load_lm, negative_log_likelihoods, windows_of
from fastpost.cli.train_checkpoints import checkpoints_of
from fastpost.cli.train_options import Run
from fastpost.cli.train_run import keep_options, machine
from fastpost.gap.many import rows_of
from fastpost.gap.run import GapResult
from fastpost.gap.tasks import Suite, read_task

PROBE = 8  # windows that --gap_max_kl watches


@dataclass
class Ascent:
    """All that is read before the first step.

    Attributes:
        ids: the text, (1, T) on the model's device.
        choose, report: score of a model on the two halves, higher is better.
        unit: what a score is.
    """

    model: Any
    tokenizer: Any
    ids: Tensor
    choose: Callable[[Any], float]
    report: Callable[[Any], float]
    unit: str
    probe: Tensor | None
    told: str


def prepare(run: Run) -> Ascent:
    """Reads model, text and what scores it.

    Raises:
        ValueError, FileNotFoundError: the first thing that is wrong.
    """
    from transformers import AutoTokenizer

    options, tasks = run.gap, run.gap.tasks
    if there := checkpoints_of(run.folder):
        raise ValueError(f"{run.folder} holds {there[0].name} of another run; give another --output_dir")
    check_folder(run.folder)
    texts, validation = train_data.read_texts(run.data)
    if options.text_index >= len(texts):
        raise ValueError(f"--text_index {options.text_index}: the training data hold {len(texts)} texts, from 0")
    suite = None if tasks is None else [read_task(part.strip()) for part in tasks.split(",") if part.strip()]
    name = str(run.data.model)
    loaded = load_lm(name)
    load: Any = AutoTokenizer.from_pretrained
    tokenizer = load(name)
    encode = train_data.encoder(tokenizer)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not run.use_cpu else None
    model = loaded.model.to(device or "cpu").eval()
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    size = min(run.data.max_length or 128, positions - 1) + 1
    encoded, held = _held_out(texts, validation, options.text_index, encode, 2 * size, tasks is None)
    ids = encoded[-min(options.gap_max_tokens or positions, positions) :]
    if len(ids) < 2:
        raise ValueError(f"text {options.text_index} has {len(ids)} tokens; GAP needs at least two")
    told = f"text {options.text_index} of {len(texts)}, its last {len(ids)} of {len(encoded)} tokens; "
    row = torch.tensor([ids], device=model.device)
    if suite is not None:
        choose, report = Suite(suite, encode, loaded.decode, options.task_limit).halves()
        told += f"scored on {len(suite)} tasks, half of their examples to choose and half to report"
        return Ascent(model, tokenizer, row, choose, report, "score", None, told)
    try:
        first, second = (part.to(model.device) for part in windows_of(held, size))
    except ValueError:
        raise ValueError(
            f"the validation data are less than two windows of {size} tokens; give more, or a smaller --max_length"
        ) from None
    told += f"scored on windows of {size} tokens, {len(first)} to choose and {len(second)} to report"
    probe = first[:PROBE, :-1] if options.gap_max_kl is not None else None
    return Ascent(model, tokenizer, row, _score_on(first), _score_on(second), "nats per token", probe, told)


def _held_out(
    texts: list[str], validation: list[str], index: int, encode: Callable[[str], list[int]], least: int, needed: bool
) -> tuple[list[int], list[int]]:
    """Token ids of the text to climb on, and of what scores it: as given, held out from the other texts, or its own end."""
    text = texts[index]
    if validation or not needed:
        return encode(text), encode("\n".join(validation))
    others = [train_data.Row(other) for k, other in enumerate(texts) if k != index]
    if others:
        held = train_data.hold_out(others)[1] if len(others) > 1 else others
        return encode(text), encode("\n".join(row.text for row in held))
    if parts := train_data.last_lines(text):
        return encode(parts[0]), encode(parts[1])
    return train_data.cut(encode(text), least)


def _score_on(windows: Tensor) -> Callable[[Any], float]:
    return lambda model: -float(negative_log_likelihoods(model, windows).mean())


def climb(run: Run, ascent: Ascent, told: Callable[[int, int], object]) -> tuple[GapResult, list[dict[str, Any]]]:
    """Runs the recipe; the model then holds the state that was kept. Returns the result and a row per state."""
    result = run.gap.recipe()(
        ascent.model, ascent.ids, evaluate=ascent.choose, test=ascent.report, probe=ascent.probe, progress=told
    )
    rows = [{k: v for k, v in row.items() if k not in ("text", "digest")} for row in rows_of("", ascent.ids, result)]
    return result, rows


def carry_out(run: Run, ascent: Ascent, console: Any) -> train_report.Results:
    """Climbs, saves the state that was kept, times, and writes the report.

    Raises:
        KeyboardInterrupt: Ctrl-C; nothing is written.
    """
    from rich.progress import Progress

    size = sum(p.numel() for p in ascent.model.parameters())
    facts = [
        ("model", f"{run.data.model}, {size / 1e6:.3g}M parameters in float32"),
        ("data", f"{run.data.train_file or run.data.dataset}: {ascent.told}"),
        *machine(str(ascent.ids.device)),
    ]
    for what, value in facts[:2]:
        console.print(f"{what}: {value}", highlight=False, markup=False, soft_wrap=True)
    began = time.perf_counter()
    results = train_report.Results(run.folder, run.method, run.command, run.shown, facts, "score", ascent.unit)
    start = copy.deepcopy(ascent.model) if run.data.timing_rounds else None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        climbing = progress.add_task("climbing", total=run.gap.gap_steps)
        _, results.rows = climb(run, ascent, lambda done, total: progress.update(climbing, completed=done, total=total))
        results.seconds, results.steps = time.perf_counter() - began, len(results.rows) - 1
        keep_options(run)
        ascent.model.save_pretrained(run.folder)
        ascent.tokenizer.save_pretrained(run.folder)
        results.write_csv()
        if start is not None:
            timing = progress.add_task("timing a step", total=None)
            try:
                results.costs = step_times.time_ascent(
                    start,
                    ascent.ids,
                    run.gap.recipe(),
                    run.data.timing_rounds,
                    lambda done, total: progress.update(timing, completed=done, total=total),
                )
            except KeyboardInterrupt:
                results.untimed = "not timed: interrupted"
    train_page.write(results)
    return results
