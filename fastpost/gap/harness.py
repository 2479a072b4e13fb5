"""Scores by EleutherAI's lm-evaluation-harness, by its task names, example by example: `pip install 'fastpost[lm-eval]'`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpost.gap.zero_shot import LIMIT, Score
from fastpost.modes import evaluating

# The eight classification tasks of 2306.07052 by the harness's names. Its prompts are not everywhere the authors' own:
# it asks ARC and MathQA as "Question: ... Answer:", and scores Winogrande by the text after the blank.
PAPER_TASKS = (
    "piqa",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "copa",
    "winogrande",
    "mathqa",
    "pubmedqa",
)


def harness_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]] = PAPER_TASKS,
    *,
    metric: str = "acc",
    limit: int | None = LIMIT,
    batch_size: int = 8,
    task_manager: Any = None,
) -> dict[str, Score]:
    """Zero-shot scores of a model that is in memory, each with its examples, so that `bootstrap` can compare two models.

    Args:
        model: a transformers causal language model; its modes are put back afterwards.
        tokenizer: the model's.
        tasks: names that the harness knows, or its task configurations.
        metric: "acc" is the unnormalised summed log-probability, as in the paper.
        limit: examples per task, its first; None for all.
        batch_size: of the harness's model.
        task_manager: a `lm_eval.tasks.TaskManager`, for tasks of one's own (`include_path`).

    Raises:
        ModuleNotFoundError: the harness is not installed. ValueError: a task without this metric, whose metric is no
            number per example, or whose answers are read through several filters.
    """
    if isinstance(tasks, str):
        raise TypeError(f"harness_scores: tasks is a list of names, such as [{tasks!r}]")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"harness_scores needs {error.name}. Run: pip install 'fastpost[lm-eval]'", name=error.name
        ) from None
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=task_manager,
        )
    found: dict[str, Score] = {}
    for name, samples in results["samples"].items():
        in_order = sorted(samples, key=lambda sample: sample["doc_id"])
        filters = sorted({str(sample.get("filter")) for sample in samples})
        if len(filters) > 1:
            raise ValueError(f"harness_scores: {name} has several filters, each with a score: {', '.join(filters)}")
        if not in_order or not all(isinstance(sample.get(metric), bool | int | float) for sample in in_order):
            known = ", ".join(in_order[0]["metrics"]) if in_order else "none"
            raise ValueError(f"harness_scores: {name} has no {metric!r} per example, only {known}")
        found[name] = Score(tuple(float(sample[metric]) for sample in in_order))
    return found
