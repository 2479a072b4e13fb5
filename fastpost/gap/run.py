"""GAP: a few optimizer steps uphill on one text (Yoon et al., 2306.07052)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.errors import unknown
from fastpost.gap import checks
from fastpost.gap.ascent import Ascent
from fastpost.gap.delta import Delta
from fastpost.gap.guards import Probe, layer_drifts
from fastpost.gap.later import Later
from fastpost.gap.progress import Reporter
from fastpost.gap.text import prepare
from fastpost.gap.weights import Snapshot
from fastpost.modes import kept_modes

LOSSES = ("negative", "mle")  # as the authors name them
# Guards that take the state back which broke their bound; max_grad_norm stops ahead of it.
GUARDS = ("max_drift", "max_layer_drift", "max_loss", "max_kl")

Evaluate = Callable[[Any], Any]
Progress = bool | Callable[[int, int], object]


@dataclass
class GapResult:
    """What a run did. State k is the model after k steps; state 0 is the untouched one.

    Attributes:
        best_step: the state that the model holds now: the first with the highest score, or without `evaluate` the last
            (within all guards).
        scores: evaluate()'s result for every state; empty without `evaluate`.
        losses: the text's loss at every state, nats per token. It rises where the ascent works.
        drift: 2-norm of (weights - untouched weights) at every state.
        skipped_steps: steps that changed nothing, because a gradient was not finite.
        moved_fraction: share of the weights with a nonzero gradient whose stored value changed in the first step that was
            made; near 1 in float32, far less where the weights' dtype is too coarse for the learning rate (float32 masters
            then move all the same, and the weights follow where it adds up). 0.0 when no step was made.
        stop_reason: "n_steps", "patience", or the guard that fired: "max_drift", "max_layer_drift", "max_loss", "max_kl",
            "max_grad_norm". The model then holds the last state within all bounds (with `evaluate` the best of those).
        kl: KL(start || state) on the probe at every state, nats per token; empty without a probe.
        layer_drift: how far each layer has moved in the last state within the bounds, by name; empty unless
            `max_layer_drift` is given.
        test_scores: test() of the untouched model and of the state that the model holds; empty without `test`.
    """

    best_step: int
    scores: list[float]
    losses: list[float]
    drift: list[float]
    skipped_steps: int
    moved_fraction: float
    stop_reason: str
    _base: Snapshot = field(repr=False)
    kl: list[float] = field(default_factory=list)
    layer_drift: dict[str, float] = field(default_factory=dict)
    test_scores: list[float] = field(default_factory=list)

    def summary(self) -> str:
        """The last state in a few words."""
        score = f", score {self.scores[-1]:.4g} (best {max(self.scores):.4g})" if self.scores else ""
        return f"loss {self.losses[-1]:.4g}, drift {self.drift[-1]:.2g}{score}"

    def rollback(self) -> None:
        """Makes the model the untouched one again, bit for bit, in place; may be called at any time, repeatedly.

        Where other parameters have taken the place of those of the run (`load_state_dict(assign=True)`), these are written.

        Raises:
            ValueError: the model's weights have changed dtype, shape, device or sharding since the run, or it lacks some.
                Nothing is written.
        """
        self._base.restore()

    def delta(self, model: nn.Module) -> Delta:
        """What the run changed, to scale, negate or fade out with depth; reads the copy that `rollback` reads, and no other.

        Args:
            model: the one that the run was made on.

        Raises:
            ValueError: another model; as `rollback`.
        """
        return Delta(model, self._base.by_name(model))


class GAP:
    """Gradient ascent post-training: Adam uphill on a single text, no decay, no schedule, dropout off.

    theta <- Adam(theta, -grad CE(text; theta)), at most `n_steps` times; the defaults are the authors' recipe. The sign is
    flipped by Adam's one-kernel form, or by one fused pass over all gradients; both are torch's `maximize=True` bit for
    bit. A gradient that is not finite skips its step: nothing is written, `skipped_steps` counts it.

    No step waits for the device unless something has to be known before the next one: with `evaluate`, a guard or a bar.
    Losses and drifts are otherwise read when the last step was queued.

    The weights are copied once, before the first step. If anything is raised on the way (by `evaluate`, by a step, by
    Ctrl-C), they are put back bit for bit. Gradients, `requires_grad`, training modes and dropout are afterwards what they
    were before. While climbing and in `evaluate` the whole model is in eval mode, so that no dropout is left, inside
    attention functions neither.

    Published scores pick the best state on the very data they report; give `evaluate` data that you report nothing on.

    Args:
        n_steps: at most so many steps, >= 0.
        lr: Adam's learning rate, > 0; about how far each weight moves per step.
        betas: Adam's.
        eps: Adam's, > 0.
        min_steps, patience: with `evaluate`, stop when the score has been below the highest one so far `patience` times (not
            necessarily in a row) in states after `min_steps`, as the authors' code does. patience=None never stops.
        max_drift: stop before the weights are farther than this from the untouched ones (2-norm); the step that would
            cross it is taken back.
        max_norm: clip the global gradient norm to this; None does not clip, as in the recipe.
        max_layer_drift: the same bound for each layer of the model's stack, and for each weight outside of it.
        max_loss: stop before the text's loss exceeds this, nats per token; costs a forward pass per step.
        max_kl: stop before the predictions on `probe` are farther than this from the untouched model's, KL(start || now) in
            nats per token; costs a forward pass on the probe per step.
        max_grad_norm: stop, without a step, where the gradient's norm exceeds this.
        max_tokens: of a longer text the last so many are used, as in the recipe; None: as many as the model has positions.
        loss: "negative" goes uphill; "mle" downhill, on the same text by the same recipe: the control.
        master_weights: step 16-bit weights in float32 copies, so that steps below their resolution add up; the model
            computes with their casts. False steps them as they are, and loses such steps.
        fused: Adam's one-kernel form where torch has it for the model's devices; False takes torch's default form.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        n_steps: int = 15,
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.98),
        *,
        eps: float = 1e-8,
        min_steps: int = 5,
        patience: int | None = 2,
        max_drift: float | None = None,
        max_norm: float | None = None,
        max_layer_drift: float | None = None,
        max_loss: float | None = None,
        max_kl: float | None = None,
        max_grad_norm: float | None = None,
        max_tokens: int | None = 512,
        loss: str = "negative",
        master_weights: bool = True,
        fused: bool = True,
    ) -> None:
        if max_tokens is not None:
            checks.check_count("max_tokens", max_tokens, least=2)
        checks.check_count("n_steps", n_steps, least=0)
        checks.check_count("min_steps", min_steps, least=0)
        if patience is not None:
            checks.check_count("patience", patience, least=1)
        checks.check_adam(lr, betas, eps)
        if loss not in LOSSES:
            raise unknown("loss of GAP", loss, LOSSES)
        bounds = {"max_drift": max_drift, "max_layer_drift": max_layer_drift, "max_loss": max_loss, "max_kl": max_kl}
        checks.check_bounds({"max_norm": max_norm, **bounds, "max_grad_norm": max_grad_norm})
        self.n_steps = int(n_steps)
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.min_steps = int(min_steps)
        self.patience = patience
        self.max_drift = max_drift
        self.max_layer_drift, self.max_loss = max_layer_drift, max_loss
        self.max_kl, self.max_grad_norm = max_kl, max_grad_norm
        self.max_norm = max_norm
        self.max_tokens = max_tokens
        self.loss = loss
        self.master_weights = master_weights
        self.fused = fused

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        evaluate: Evaluate | None = None,
        progress: Progress = False,
        *,
        test: Evaluate | None = None,
        probe: Tensor | Mapping[str, Any] | None = None,
        allow_leak: bool = False,
        base: Snapshot | None = None,
    ) -> GapResult:
        """Climbs on one text; the model then holds the best state, without `evaluate` the last.

        Args:
            model: a causal language model (transformers, PEFT, or any module from ids (1, n) to logits (1, n, V)). Weights
                with `requires_grad` move. float32 is the precision to use; 16-bit weights work, but a step is often
                below their resolution (`moved_fraction`, and a warning).
            input_ids: token ids, integer, (T,) or (1, T).
            attention_mask: same shape, nonzero = text. None: runs of `model.config.pad_token_id` at either end are padding.
            evaluate: evaluate(model) -> a number, higher is better; called for state 0 and after each step, without
                gradients, in eval mode. Costs a second copy of the weights, for the best state.
            progress: True shows a bar (a line per step without `rich`); or a function of (step, n_steps).
            test: like evaluate, on data that has no part in choosing the state; called for the untouched model and for the
                state that is kept.
            probe: token ids (batch, time), or a mapping of the model's inputs, on which `max_kl` watches the predictions.
            base: a copy of the untouched weights that is there already (`fastpost.gap.sweep` takes one for all texts).
            allow_leak: let `test` be what `evaluate` is: one object, one method of it, or partials of equal parts. The score
                of the chosen state is then biased upward.

        Returns:
            GapResult, which holds the copy of the untouched weights for `rollback()`.

        Raises:
            TypeError, ValueError: a text that cannot be used (see `fastpost.gap.text.prepare`), a model without weights to
                train or one that is not causal (where transformers tells), an `evaluate` that returns NaN or no number, or
                replaces the model's parameters. The weights are as before.
        """
        checks.check_causal("GAP", model)
        weights = checks.movable_weights(model)
        checks.check_callables(evaluate, test, allow_leak)
        if (probe is None) != (self.max_kl is None):
            raise ValueError("GAP: max_kl and probe go together: a bound, and the batch on which it is watched")
        held: Snapshot | None = None  # the base, once it is known to be of this model
        try:
            with _as_before(model, weights):
                ids = prepare(model, input_ids, attention_mask, self.max_tokens)
                ids = ids.clone() if ids.is_inference() else ids
                if base is None:
                    base = Snapshot(weights, model)
                else:
                    base.follow()
                    if {id(p) for p in base.weights} != {id(p) for p in weights}:
                        raise ValueError(
                            "GAP: base is a copy of other weights than those of the model that have requires_grad"
                        )
                held = base
                model.eval()
                untouched = None if test is None else _score(test, model, base)
                watched = None if probe is None else Probe(model, probe)
                with Reporter(progress, self.n_steps) as report:
                    result = self._climb(model, weights, ids, base, evaluate, watched, report)
                if test is not None and untouched is not None:
                    result.test_scores = [untouched, _score(test, model, base)]
            return result
        except BaseException:
            if held is not None:
                held.restore()
            raise

    def _climb(
        self,
        model: nn.Module,
        weights: list[nn.Parameter],
        ids: Tensor,
        base: Snapshot,
        evaluate: Evaluate | None,
        probe: Probe | None,
        report: Reporter,
    ) -> GapResult:
        guarded = any(b is not None for b in (self.max_drift, self.max_layer_drift, self.max_loss, self.max_kl))
        # Whether a state has to be known before the next step; otherwise all of them are read at the end.
        waits = evaluate is not None or guarded or self.max_grad_norm is not None or report.shows
        ascent = Ascent(
            model,
            weights,
            ids,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=self.fused,
            loss=self.loss,
            master_weights=self.master_weights,
            max_norm=self.max_norm,
            max_grad_norm=self.max_grad_norm,
            waits=waits,
        )
        result = GapResult(0, [], [], [0.0], 0, 0.0, "n_steps", base)
        unread: list[_Step] = []
        first = _FirstMove(base)
        held: Snapshot | None = None  # a copy of state best_step, made where that may not be the last
        below = 0
        if probe is not None:
            result.kl.append(0.0)
        if evaluate is not None:
            result.scores.append(_score(evaluate, model, base))
        model.eval()
        for step in range(1, self.n_steps + 1):
            loss = ascent.differentiate()
            skipped = ascent.step()
            if skipped is None:  # nothing was written
                result.stop_reason = "max_grad_norm"
                break
            if not (waits and skipped.value()):
                first.see(ascent, skipped)
            ascent.let_go()
            made = _Step(loss, skipped, Later(base.squared_distance()))
            if not waits:
                unread.append(made)
                result.best_step = step
                report(step, result.summary)
                continue
            moved, drift = made.read(result)
            self._note(first, weights, result)
            fired = self._broken(model, ascent, base, probe, drift, result) if moved else None
            if fired is not None:
                result.stop_reason = fired
                break
            if not moved and probe is not None:
                result.kl.append(result.kl[-1])
            result.drift.append(drift)
            if evaluate is None:
                result.best_step = step
                if guarded:
                    held = _keep(held, weights, model)
            elif not moved:
                result.scores.append(result.scores[-1])  # the same weights have the same score
            else:
                score, highest = _score(evaluate, model, base), max(result.scores)
                model.eval()  # evaluate() may have left another mode
                result.scores.append(score)
                if score > highest:
                    result.best_step = step
                    held = _keep(held, weights, model)
                elif score < highest and step > self.min_steps:
                    below += 1
            report(step, result.summary)
            if self.patience is not None and below >= self.patience:
                result.stop_reason = "patience"
                break
        taken_back = result.stop_reason in GUARDS
        # Unless a state was taken back the model is in the last one, whose loss no step has measured.
        last = None if taken_back else ascent.loss()
        for made in unread:
            result.drift.append(made.read(result)[1])
        self._note(first, weights, result)
        if last is not None:
            result.losses.append(last.value())
        if taken_back or result.best_step != len(result.drift) - 1:
            (held or base).restore()
        return result

    def _broken(
        self,
        model: nn.Module,
        ascent: Ascent,
        base: Snapshot,
        probe: Probe | None,
        drift: float,
        result: GapResult,
    ) -> str | None:
        """The first bound that the state just reached breaks; what is within the bounds is noted in the result."""
        if self.max_drift is not None and not drift <= self.max_drift:
            return "max_drift"
        layers = {} if self.max_layer_drift is None else layer_drifts(model, base)
        if self.max_layer_drift is not None and not all(d <= self.max_layer_drift for d in layers.values()):
            return "max_layer_drift"
        model.eval()
        if self.max_loss is not None and not ascent.loss().value() <= self.max_loss:
            return "max_loss"
        if self.max_kl is not None and probe is not None:
            kl = probe.kl(model)
            if not kl <= self.max_kl:
                return "max_kl"
            result.kl.append(kl)
        result.layer_drift = layers
        return None

    def _note(self, first: _FirstMove, weights: list[nn.Parameter], result: GapResult) -> None:
        """What the first step that was made has moved, once that is known; says so where it is little."""
        fraction = first.fraction()
        if fraction is None:
            return
        result.moved_fraction = fraction
        if fraction < 0.9 and not self.master_weights and any(p.dtype.itemsize == 2 for p in weights):
            warnings.warn(
                f"GAP: only {fraction:.0%} of the weights moved in the first step; for the other 16-bit "
                f"weights lr={self.lr:g} is lost in rounding. master_weights=True steps them in float32.",
                stacklevel=4,
            )


@dataclass
class _Step:
    """What a step measured: the loss before it, 1 if it was skipped, and the squared drift after it."""

    loss: Later
    skipped: Later
    squared_drift: Later

    def read(self, result: GapResult) -> tuple[bool, float]:
        """Whether it moved the weights, and the drift after it; loss and skipped steps are noted in the result."""
        result.losses.append(self.loss.value())
        if self.skipped.value():
            result.skipped_steps += 1
            return False, result.drift[-1]
        return True, math.sqrt(self.squared_drift.value())


class _FirstMove:
    """What share of the weights the first step that was made has moved. Every step is counted until one was made, and
    whether it was is asked a step later, when nobody has to wait for the answer."""

    def __init__(self, base: Snapshot) -> None:
        self._base = base
        self._skipped: Later | None = None  # of the step that was counted last
        self._counts: Later | None = None
        self._made = self._told = False

    def see(self, ascent: Ascent, skipped: Later) -> None:
        """After a step, which may have been skipped, and before its gradients go."""
        if not self._was_made():
            self._skipped, self._counts = skipped, Later(self._base.moved(ascent.gradients()))

    def fraction(self) -> float | None:
        """The share, once; None before a step was made, and after that."""
        if self._told or self._counts is None or not self._was_made():
            return None
        self._told = True
        moved, pushed = self._counts.values()
        return moved / pushed if pushed else 0.0

    def _was_made(self) -> bool:
        if not self._made and self._skipped is not None:
            self._made = not self._skipped.value()
        return self._made


def _keep(held: Snapshot | None, weights: list[nn.Parameter], model: nn.Module) -> Snapshot:
    if held is None:
        return Snapshot(weights, model)
    held.save()
    return held


def _score(evaluate: Evaluate, model: nn.Module, base: Snapshot) -> float:
    model.eval()
    weights = base.weights
    with torch.no_grad():
        score = evaluate(model)
    base.follow()
    if [id(p) for p in base.weights] != [id(p) for p in weights]:
        raise ValueError(
            "GAP: evaluate or test has replaced parameters of the model (load_state_dict(assign=True)?), so that further "
            "steps would not reach it; let it write into the parameters in place, or score a copy of the model"
        )
    if isinstance(score, Tensor) and score.numel() == 1 and not score.is_complex():
        score = score.item()
    if not checks.real(score):
        raise TypeError(f"GAP: evaluate must return a number, higher is better, not {type(score).__name__}")
    if math.isnan(score):
        raise ValueError("GAP: evaluate returned NaN, which cannot be compared; the weights are the untouched ones again")
    return float(score)


@contextlib.contextmanager
def _as_before(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Takes the gradients out of the way, and puts them and every module's mode back, whatever happens inside."""
    gradients = [p.grad for p in weights]
    try:
        for p in weights:
            p.grad = None
        with kept_modes(model), torch.inference_mode(False):
            yield
    finally:
        for p, g in zip(weights, gradients, strict=True):
            p.grad = g
