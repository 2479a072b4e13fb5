"""How much of other tasks a fine-tuned encoder still holds: a linear probe on frozen features (2008.03156, section 4)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpost.distributed import unwrap
from fastpost.errors import unknown
from fastpost.modes import evaluating
from fastpost.r3f.noise import is_encoder_decoder

POOLINGS = ("first", "mean", "pooler")
_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of C, for standardised features; beyond, hundreds of features fit any labels
_FOLDS = 5


@dataclass(frozen=True)
class ProbeResult:
    """What a linear probe scored.

    Attributes:
        accuracy: share of the test rows that were named right.
        standard_error: sqrt(accuracy * (1 - accuracy) / test_size): of one accuracy on test rows drawn at random. It holds
            neither the draw of the training rows nor the fine-tuning seed.
        train_accuracy: the same share on the rows the probe was fitted to.
        majority: accuracy on the test rows of always giving their most frequent label.
        train_size, test_size: rows.
        C: inverse strength of the penalty that was used.
        converged: whether the solver came to its end within `max_iter`.
        correct: bool (test_size,), row by row, for paired comparisons of probes on the same rows.
    """

    accuracy: float
    standard_error: float
    train_accuracy: float
    majority: float
    train_size: int
    test_size: int
    C: float
    converged: bool
    correct: Tensor

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.standard_error * 100:.1f} (majority {self.majority:.1%})"


def encoder_of(model: Any) -> nn.Module:
    """The model without its head: of an encoder-decoder the encoder, else transformers' `base_model`, else the model.

    Wrappers (DDP, torch.compile) are looked through.

    Raises:
        TypeError: no module.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"probe: model must be a torch.nn.Module, not {type(model).__name__}")
    inner: Any = model
    encoder = inner.get_encoder() if is_encoder_decoder(inner) and hasattr(inner, "get_encoder") else None
    found = getattr(inner, "base_model", None) if encoder is None else encoder
    return found if isinstance(found, nn.Module) else model


@torch.no_grad()
def features(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    pooling: str = "first",
    encoder: nn.Module | None = None,
) -> Tensor:
    """One vector per text from an encoder that is only read: eval mode, no graph, no weight or buffer touched.

    Args:
        model: a transformers model, or any module `encoder(**batch)` that returns hidden states (batch, time, width) or an
            object with `.last_hidden_state`. Training modes are afterwards what they were.
        batches: inputs as the encoder takes them, (batch, time); `labels` are left out. With "mean", `attention_mask` says
            what counts; without one, every position does.
        pooling: "first": the hidden state of the first token, which BERT's and RoBERTa's classifiers read; "mean": averaged
            over the tokens that count; "pooler": `.pooler_output`, BERT's dense layer and tanh on top of "first".
        encoder: the part to run; None: `encoder_of(model)`.

    Returns:
        float32 (rows, width) on the CPU, rows in the order of the batches.

    Raises:
        ValueError: no batches; unknown pooling; "pooler" of an encoder without one. TypeError: no hidden states came back.
    """
    if pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    part = encoder_of(model) if encoder is None else encoder
    pooled = []
    with evaluating(part):
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            pooled.append(_pool(part(**inputs), inputs.get("attention_mask"), pooling).float().cpu())
    if not pooled:
        raise ValueError("probe: no batches to take features of")
    return torch.cat(pooled)


def _pool(output: Any, mask: Any, pooling: str) -> Tensor:
    if pooling == "pooler":
        vectors = getattr(output, "pooler_output", None)
        if not isinstance(vectors, Tensor):
            raise ValueError(f"probe: {type(output).__name__} has no pooler_output; take pooling='first' or 'mean'")
        return vectors
    hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.dtype.is_floating_point:
        raise TypeError(
            f"probe: the encoder returned {type(output).__name__}, in which no hidden states (batch, time, width) were found"
        )
    if pooling == "first":
        return hidden[:, 0]
    if not isinstance(mask, Tensor):
        return hidden.float().mean(1)
    weights = (mask != 0).to(torch.float32).unsqueeze(-1)
    # `where` rather than a product: what stands at padding may be anything, NaN included.
    summed = torch.where(weights != 0, hidden.float(), 0).sum(1)
    return summed / weights.sum(1).clamp(min=1)


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    C: float | None = None,
    max_iter: int = 1000,
) -> ProbeResult:
    """Fits scikit-learn's LogisticRegression to standardised features and scores it on other rows.

    The scaler's means and deviations come from the training rows. The solver (lbfgs) draws no random number: the same
    features give the same result.

    Args:
        train, test: (rows, width), floating point; as `features` returns them.
        train_labels, test_labels: (rows,), integers. A test label that never occurs in training counts as wrong.
        C: inverse strength of the L2 penalty, > 0. None chooses among 1e-4, 1e-3, ..., 1 by five-fold cross-validation on
            the training rows, the same folds every time (fewer where a class has fewer rows; with a single row, C is 1).
        max_iter: of the solver; stopping there shows in `converged`, without a warning.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, fewer than two classes to learn, C or max_iter out
            of range. TypeError: labels that are not integers. ImportError: no scikit-learn (`pip install 'fastpost[cli]'`).
    """
    for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if rows.ndim != 2 or not rows.dtype.is_floating_point or len(rows) == 0:
            raise ValueError(f"probe: {name} must be (rows, width) floating point, not {tuple(rows.shape)} {rows.dtype}")
        if labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise TypeError(f"probe: {name}_labels must be integers, not {labels.dtype}")
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"probe: {name}_labels have shape {tuple(labels.shape)}, expected {tuple(rows.shape[:1])}")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"probe: {name} features are not finite; the model has diverged")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"probe: train features are {train.shape[1]} wide, test features {test.shape[1]}")
    if bool((train_labels == train_labels[0]).all()):
        raise ValueError("probe: the training labels are all the same; there is nothing to tell apart")
    if not (C is None or (math.isfinite(C) and C > 0)) or max_iter < 1:
        raise ValueError(f"probe: C must be finite and > 0 and max_iter >= 1, not {C} and {max_iter}")

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, x_test = (t.detach().double().cpu().numpy() for t in (train, test))
    y, y_test = (t.detach().cpu().numpy() for t in (train_labels, test_labels))
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1.0 if C is None else C, max_iter=max_iter))
    folds = min(_FOLDS, int(np.unique(y, return_counts=True)[1].min()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if C is None and folds > 1:
            # Shuffled, as rows may lie sorted by length, and the same way every time.
            split = StratifiedKFold(folds, shuffle=True, random_state=0)
            search = GridSearchCV(pipeline, {"logisticregression__C": _GRID}, cv=split)
            pipeline = search.fit(x, y).best_estimator_
        else:
            pipeline.fit(x, y)
    correct = torch.from_numpy(pipeline.predict(x_test) == y_test)
    accuracy = float(correct.double().mean())
    return ProbeResult(
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(correct)),
        train_accuracy=float((pipeline.predict(x) == y).mean()),
        majority=float(np.unique(y_test, return_counts=True)[1].max()) / len(correct),
        train_size=len(x),
        test_size=len(correct),
        C=float(pipeline[-1].C),
        converged=int(pipeline[-1].n_iter_.max()) < max_iter,
        correct=correct,
    )
