"""`fastpost train --method gap`: up one text, the state chosen on one half of the validation data, reported on the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fastpost.cli import train_data, train_report
from fastpost.cli.files import check_folder
from fastpost.cli.models import Loaded, load_lm, negative_log_likelihoods, windows_of
from fastpost.cli.train_checkpoints import checkpoints_of
from fastpost.cli.train_options import Run
from fastpost.cli.train_run import keep_options, results_of
from fastpost.gap.many import rows_of
from fastpost.gap.tasks import Suite, read_task

PROBE = 8  # windows that --gap_max_kl watches


@dataclass
class Ascent:
    """All that is read before the first step.

    Attributes:
        loaded: the model and its tokenizer.
        ids: the text, (1, T) on the model's device.
        choose, report: score of a model on the two halves, higher is better.
        unit: what a score is.
        summary: of text and scores, in words.
    """

    loaded: Loaded
    ids: Tensor
    choose: Callable[[Any], float]
    report: Callable[[Any], float]
    unit: str
    probe: Tensor | None
    summary: str


def prepare(run: Run) -> Ascent:
    """Reads model, text and what scores it.

    Raises:
        ValueError, FileNotFoundError: the first thing that is wrong.
    """
    options, tasks = run.gap, run.gap.tasks
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"--method gap climbs one text in one process, and {processes} were started, which would write the same folder; "
            "start it without torchrun, once for each text"
        )
    if there := checkpoints_of(run.folder):
        raise ValueError(f"{run.folder} holds {there[0].name} of another run; give another --output_dir")
    check_folder(run.folder)
    texts, validation = train_data.read_texts(run.data)
    if options.text_index >= len(texts):
        raise ValueError(f"--text_index {options.text_index}: the training data hold {len(texts)} texts, from 0")
    suite = None if tasks is None else [read_task(part.strip()) for part in tasks.split(",") if part.strip()]
    loaded = load_lm(str(run.data.model))
    encode = loaded.encode
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not run.use_cpu else None
    model = loaded.model.to(device or "cpu").eval()
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    size = min(run.data.max_length or 128, positions - 1) + 1
    encoded, held = encode(texts[options.text_index]), encode("\n".join(validation))
    if suite is None and not validation:  # held out from the other texts; of a single one its last tokens
        others = [train_data.Row(other) for k, other in enumerate(texts) if k != options.text_index]
        if others:
            held = encode("\n".join(row.text for row in (train_data.hold_out(others)[1] if len(others) > 1 else others)))
        else:
            encoded, held = train_data.cut(encoded, 2 * size)
    ids = encoded[-min(options.gap_max_tokens or positions, positions) :]
    if len(ids) < 2:
        raise ValueError(f"text {options.text_index} has {len(ids)} tokens; GAP needs at least two")
    summary = f"text {options.text_index} of {len(texts)}, its last {len(ids)} of {len(encoded)} tokens; "
    row = torch.tensor([ids], device=model.device)
    if suite is not None:
        halves = Suite(suite, encode, loaded.decode, options.task_limit).halves()
        summary += f"scored on {len(suite)} tasks, half of their examples to choose and half to report"
        return Ascent(loaded, row, *halves, "score", None, summary)
    try:
        first, second = (part.to(model.device) for part in windows_of(held, size))
    except ValueError:
        raise ValueError(
            f"the validation data are less than two windows of {size} tokens; give more, or a smaller --max_length"
        ) from None
    summary += f"scored on windows of {size} tokens, {len(first)} to choose and {len(second)} to report"
    probe = first[:PROBE, :-1] if options.gap_max_kl is not None else None

    def score_on(windows: Tensor) -> Callable[[Any], float]:
        return lambda model: -float(negative_log_likelihoods(model, windows).mean())

    return Ascent(loaded, row, score_on(first), score_on(second), "nats per token", probe, summary)


def carry_out(run: Run, ascent: Ascent) -> train_report.Results:
    """Climbs, saves the state that was kept, and writes the report.

    Raises:
        KeyboardInterrupt: Ctrl-C; nothing is written.
    """
    model = ascent.loaded.model
    results = results_of(run, model, ascent.summary, str(ascent.ids.device), "score", ascent.unit)
    for what, value in results.facts[:2]:
        print(f"{what}: {value}")
    began = time.perf_counter()
    with tqdm(total=run.gap.gap_steps, desc="climbing", leave=False, disable=None) as bar:
        result = run.gap.recipe()(
            model,
            ascent.ids,
            evaluate=ascent.choose,
            test=ascent.report,
            probe=ascent.probe,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    results.rows = [{k: v for k, v in row.items() if k not in ("text", "digest")} for row in rows_of("", ascent.ids, result)]
    results.seconds, results.steps = time.perf_counter() - began, len(results.rows) - 1
    keep_options(run)
    model.save_pretrained(run.folder)
    ascent.loaded.tokenizer.save_pretrained(run.folder)
    train_report.write(results)
    return results
