"""Variants of SAM: what each changes in a step, through the same few hooks.

SAM itself is `Variant()`. ASAM is SAM's own `adaptive=True`, m-SAM is `SAMWindow(per_micro_batch=True)`, SAM every k-th
step is `interval=k`, SAM on norm layers only is `scope=norm_layers(model)`. Two more act on the logits of a language model,
outside of the optimizer: `logits_sam` and `FunctionalSAM`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpost import distributed
from fastpost.ops import params as ops
from fastpost.sam.buckets import ShardReducer, total_dot
from fastpost.sam.step import Gradients, ratio

if TYPE_CHECKING:
    from fastpost.sam.optimizer import SAM

LossOfLogits = Callable[[Tensor], Tensor]


class VariantContext:
    """Given to the hooks of a variant.

    Args:
        reducer: how ranks add up.
        groups: returns the optimizer's parameter groups.
        state: returns the base optimizer's state, where kept tensors live.
        names: what a variant keeps per parameter.

    Attributes:
        ascent_factor: what brings the gradients at w to the scale of the whole window's, in `direction` as far as that is
            known; in `descend`, `clean` has it already.
        is_stateless: the base optimizer has stepped, and left nothing in the state of a whole group's parameters.
    """

    def __init__(
        self,
        reducer: ShardReducer,
        groups: Callable[[], list[dict[str, Any]]],
        state: Callable[[], MutableMapping[Tensor, Any]],
        names: tuple[str, ...],
    ) -> None:
        self._reducer = reducer
        self._groups = groups
        self._state = state
        self._names = names
        self._pending: dict[Tensor, dict[str, Tensor]] = {}
        self.ascent_factor: float | Tensor = 1.0
        self.is_stateless = False

    def tensors(self) -> list[Tensor]:
        """All parameters."""
        return [p for group in self._groups() for p in group["params"]]

    def maximized(self) -> set[int]:
        """Ids of the parameters whose loss the base optimizer maximises."""
        return {id(p) for group in self._groups() if group.get("maximize", False) for p in group["params"]}

    def settings(self) -> dict[Tensor, dict[str, Any]]:
        """The group of each parameter."""
        return {p: group for group in self._groups() for p in group["params"]}

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        """The base optimizer's state."""
        return self._state()

    def dot(self, a: Gradients, b: Gradients) -> Tensor:
        """Sum of a * b over all parameters that both hold, and over all ranks: a float64 scalar."""
        return total_dot(a, b, self._reducer)

    def total(self, numbers: Mapping[Tensor, Tensor]) -> Tensor:
        """Sum of one float64 scalar for each parameter, over all of them and over all ranks."""
        return self._reducer.total((self._reducer.key(p), number) for p, number in numbers.items())

    def mean(self, total: Tensor | None, items: float | Tensor) -> Tensor | None:
        """The mean of what all ranks that share parameters have observed, from this rank's sum and the items that it is
        over: a float64 scalar, 0 where there are none; None where no rank has observed any. Every rank has to call it."""
        mine = torch.zeros((), dtype=torch.float64) if total is None else total.double()
        over = items.to(mine) if isinstance(items, Tensor) else torch.full_like(mine, items)
        if not distributed.active():
            return None if total is None else ratio(mine, over)
        mine, over = self._reducer.pool(torch.stack([mine, over])).unbind()
        return None if total is None and not bool(over) else ratio(mine, over)

    def kept(self, p: Tensor, name: str) -> Tensor:
        """What was kept for a parameter; zeros before."""
        value = self._pending.get(p, {}).get(name)
        if value is None and p in self.state:
            value = self.state[p].get(name)
        return torch.zeros_like(distributed.local(p)) if value is None else distributed.local(value)

    def keep(self, p: Tensor, name: str, value: Tensor) -> None:
        """Keeps a tensor for a parameter; it enters `state[p]` once the base optimizer has made its own entries there."""
        self._pending.setdefault(p, {})[name] = value

    def forget(self) -> None:
        """What was to be kept belonged to a step that is not made."""
        self._pending.clear()

    def store(self, gradients: Gradients) -> None:
        """After a step with these gradients: every name is in the state of their parameters."""
        for p in gradients if self._names else ():
            values = {name: self.kept(p, name) for name in self._names}
            self._pending.pop(p, None)
            state = self.state.setdefault(p, {})
            for name, value in values.items():
                if name in state:
                    distributed.local(state[name]).copy_(value)
                else:
                    state[name] = distributed.like(p, value.detach().clone())

    def look_for_state(self, gradients: Gradients) -> None:
        """After a step with these gradients: finds out whether it `is_stateless`. A parameter alone may have nothing, and so
        may a group none of which had a gradient."""
        found: dict[int, bool] = {}
        settings = self.settings()
        for p in gradients:
            group = id(settings[p])
            found[group] = found.get(group, False) or bool(self.state.get(p))
        self.is_stateless = not all(found.values())


class Variant:
    """SAM itself: every hook leaves the step as it is. One instance serves one SAM, as some keep what belongs to its step.

    Gradients are dictionaries from parameter to tensor (with shards: this rank's part) and hold what has a gradient. No hook
    may wait for a device.

    Attributes:
        ascent_pass: whether the direction comes from a gradient at w, that is from a pass of its own.
        keeps_gradient: whether the gradient at w is kept until the second one is there, at the price of a copy.
        scales_must_agree: whether `descend` mixes the two passes, so that a loss scale must be on both gradients or on none,
            and the gradient of some of a window's micro-batches is put on the scale of all.
        weighs_ascents: whether it goes by the scale of the ascent's gradient, or of what was observed there, so that a
            window has to know what share of it an ascent over some of its micro-batches is.
        rewrites: whether `descend` or `between`, where overridden, change gradients. They are then called at the end of the
            backward pass, so that the caller clips what they made; where further passes add to the gradients, again after
            each, with all that there is so far.
        state_names: tensors kept per parameter from step to step, in `state[p]`; each begins with "sam_".
        follows_state: whether the direction comes from the base optimizer's state, so that one without is looked for.
        serves_norm_group: whether it is right where ranks hold other parameters of the model.
        serves_fused_restore: whether it is right where w comes back in the base optimizer's step, and not before.
    """

    ascent_pass = True
    keeps_gradient = False
    scales_must_agree = False
    weighs_ascents = False
    rewrites = True
    state_names: tuple[str, ...] = ()
    follows_state = False
    serves_norm_group = True
    serves_fused_restore = True

    def direction(self, context: VariantContext, gradients: Gradients) -> Gradients:
        """What is followed uphill in place of the gradients at w, normalised and scaled like them."""
        return gradients

    def radius(self, context: VariantContext) -> Tensor | None:
        """A factor on rho for this step (scalar, any device); None for 1."""
        return None

    def descend(self, context: VariantContext, clean: Gradients, second: Gradients) -> None:
        """Rewrites the second gradients in place; `clean` is empty unless `keeps_gradient`."""

    def between(self, context: VariantContext, gradients: Gradients) -> None:
        """Rewrites, in place, the gradients of a step without an ascent (`interval`)."""

    def forget(self) -> None:
        """The step is over, made or given up: drops what belonged to it alone."""

    def overrides(self, *hooks: str) -> bool:
        """Whether it changes one of these hooks."""
        return _overrides(type(self), hooks)  # type: ignore[arg-type]  # a class is hashable

    @property
    def combines(self) -> bool:
        """Whether it combines the gradients of two whole passes over one batch. m-SAM's micro-batches do not have these, nor
        do ranks that ascend by their own gradients."""
        return self.keeps_gradient or (self.rewrites and self.overrides("descend"))


@functools.cache
def _overrides(cls: Any, hooks: tuple[str, ...]) -> bool:
    return any(getattr(cls, hook) is not getattr(Variant, hook) for hook in hooks)


class StableSAM(Variant):
    """Stable SAM (2401.07250): the second gradient, rescaled to the norm of the gradient at w.

    Use it when SAM diverges at a learning rate that is stable for the base optimizer.
    """

    scales_must_agree = True
    weighs_ascents = True

    def __init__(self) -> None:
        self._clean: Tensor | None = None

    def direction(self, context: VariantContext, gradients: Gradients) -> Gradients:
        self._clean = context.dot(gradients, gradients)
        return gradients

    def descend(self, context: VariantContext, clean: Gradients, second: Gradients) -> None:
        assert self._clean is not None
        longer = ratio(self._clean, context.dot(second, second)).sqrt()
        _scale_(second, longer * _beside(context.ascent_factor, longer))


class GSAM(Variant):
    """GSAM (2203.08065): also narrows the gap between L(w + e) and L(w).

    The second gradient g' becomes g' - alpha (g - <g, g'> / |g'|^2 g'), g the gradient at w. Use it with a rho that follows
    the learning rate (set `rho` in the groups) when SAM at one radius is too strong late in training.

    Args:
        alpha: how much of the orthogonal part is taken away, >= 0.
    """

    keeps_gradient = True
    scales_must_agree = True
    weighs_ascents = True

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = _not_negative("GSAM", "alpha", alpha)

    def descend(self, context: VariantContext, clean: Gradients, second: Gradients) -> None:
        along = ratio(context.dot(clean, second), context.dot(second, second))
        _scale_(second, 1 + self.alpha * along)
        _add_(second, clean, -self.alpha)


class WSAM(Variant):
    """WSAM (2305.15817): sharpness as a term of the loss with a weight of its own, L + gamma / (1 - gamma) (L(w + e) - L).

    The second gradient g' becomes g + gamma / (1 - gamma) (g' - g), g the gradient at w. gamma = 0 is the base optimizer,
    1/2 is SAM, and above it flatness counts for more than the loss. Use it to set how much. This is the paper's coupled
    form, whose base optimizer sees the whole gradient. The decoupled form, which keeps the second term out of the moments,
    is `DecoupledWSAM`; for SGD without momentum both are the same.

    Args:
        gamma: in [0, 1); the authors' code takes 0.9.
    """

    keeps_gradient = True
    scales_must_agree = True
    weighs_ascents = True

    def __init__(self, gamma: float = 0.9) -> None:
        ops.check_real(type(self).__name__, "gamma", gamma)
        if not 0 <= gamma < 1:
            raise ValueError(f"WSAM: gamma must lie in [0, 1), not {gamma}")
        self.gamma = gamma

    def descend(self, context: VariantContext, clean: Gradients, second: Gradients) -> None:
        weight = self.gamma / (1 - self.gamma)
        for g in second.values():
            g.mul_(weight)
        _add_(second, clean, 1 - weight)


class LookSAM(Variant):
    """LookSAM (2203.02714): with `interval=k`, the steps in between reuse the part of the SAM gradient that was new.

    On a SAM step v = g' - <g', g> / |g|^2 g is kept; on the others the gradient g becomes g + alpha |g| / |v| v. Use it when
    SAM's second pass is too expensive on every step; `interval=5` is the authors'.

    Args:
        alpha: weight of the kept part, >= 0.
    """

    keeps_gradient = True
    state_names = ("sam_look",)

    def __init__(self, alpha: float = 0.7) -> None:
        self.alpha = _not_negative("LookSAM", "alpha", alpha)

    def descend(self, context: VariantContext, clean: Gradients, second: Gradients) -> None:
        along = ratio(context.dot(clean, second), context.dot(clean, clean))
        ok = torch.isfinite(along)
        for p, g in second.items():
            new = torch.addcmul(g, clean[p], -along.to(g)) if p in clean else g
            # An overflow skips the step; what was kept before stays.
            context.keep(p, "sam_look", torch.where(ok.to(g.device), new, context.kept(p, "sam_look")))

    def between(self, context: VariantContext, gradients: Gradients) -> None:
        look = {p: context.kept(p, "sam_look") for p in gradients}
        factor = ratio(context.dot(gradients, gradients), context.dot(look, look)).sqrt()
        _add_(gradients, look, self.alpha * factor)


class FriendlySAM(Variant):
    """Friendly-SAM (2403.12350): ascends along the noise of the gradient, g - sigma m, m its running mean.

    m_t = decay m_{t-1} + (1 - decay) g_t, from m_0 = 0, each g_t on the scale of its whole window. Use it with small
    batches, where SAM's ascent mostly follows the full gradient. With a GradScaler give `loss_scale`, because gradients of
    different scales do not add up.

    Args:
        sigma: how much of the mean is taken away.
        decay: lambda of the paper, in [0, 1).
        loss_scale: returns the current factor on the gradients, such as `scaler.get_scale`.
    """

    state_names = ("sam_mean",)
    weighs_ascents = True

    def __init__(
        self, sigma: float = 1.0, decay: float = 0.9, loss_scale: Callable[[], float | Tensor] | None = None
    ) -> None:
        self.sigma = _not_negative("FriendlySAM", "sigma", sigma)
        ops.check_real("FriendlySAM", "decay", decay)
        if not 0 <= decay < 1:
            raise ValueError(f"FriendlySAM: decay must lie in [0, 1), not {decay}")
        self.decay = decay
        self.loss_scale = loss_scale

    def direction(self, context: VariantContext, gradients: Gradients) -> Gradients:
        # Of these gradients, where those of whole windows that are not scaled have 1.
        scale = (1.0 if self.loss_scale is None else self.loss_scale()) / context.ascent_factor
        ok = torch.isfinite(context.dot(gradients, gradients))
        result = {}
        for p, g in gradients.items():
            before = context.kept(p, "sam_mean")
            unit = _beside(scale, g)
            mean = torch.add(before * self.decay, g / unit, alpha=1 - self.decay)
            mean = torch.where(ok.to(g.device), mean, before)
            context.keep(p, "sam_mean", mean)
            result[p] = torch.sub(g, mean * unit, alpha=self.sigma).to(g.dtype)  # a converted model keeps a wider mean
        return result


class MomentumSAM(Variant):
    """Momentum-SAM (2401.12033): the gradient at w - rho v / |v|, v the base optimizer's momentum. One pass a step.

    Use it when a second pass is out of the question; its rho is larger than SAM's (the authors: up to 3). The first step,
    which has no momentum yet, is the base optimizer's.

    Args:
        buffers: names under which base optimizers keep their momentum, tried in turn.
    """

    ascent_pass = False
    follows_state = True

    def __init__(self, buffers: Sequence[str] = ("momentum_buffer", "exp_avg")) -> None:
        self.buffers = tuple(buffers)

    def direction(self, context: VariantContext, gradients: Gradients) -> Gradients:
        result: Gradients = {}
        maximized = context.maximized()
        for p in context.tensors():
            state: Mapping[str, Any] = context.state.get(p, {})
            found = next((state[name] for name in self.buffers if state.get(name) is not None), None)
            if found is not None:
                # Momentum of an optimizer that maximises is that of -L already; a direction is in settings of L.
                part = distributed.local_as(p, found).to(p.dtype)
                result[p] = part if id(p) in maximized else -part
            elif (state or context.is_stateless) and p.requires_grad:
                raise RuntimeError(
                    f"SAM: MomentumSAM found none of {', '.join(self.buffers)} in the base optimizer's state "
                    f"({', '.join(state) or 'empty'}); give it momentum, or name its buffer"
                )
        return result


def _steps(count: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor | float:
    """The steps that an optimizer has counted: as a number where the CPU has them, so that no copy waits for a device."""
    if isinstance(count, Tensor) and not count.is_cpu:
        return count.to(dtype=dtype, device=device)
    return float(count)


class PreconditionedSAM(Variant):
    """Preconditioned SAM (after 2502.02407): e = rho d / |d| along d = g / (sqrt(v) + eps), as Adam scales its steps.

    v is the base optimizer's second moment as the last step left it, divided by Adam's 1 - beta2^t; eps is the base
    optimizer's. Large gradients of few weights then lead e no longer. It joins with `FunctionalSAM`, as in the paper, of
    which we could read the summary and no equation: that e has the length rho, as in SAM, is our choice. Thus a constant
    factor on v changes nothing but the weight of eps, and rho keeps its meaning. Where v is 0 or not there yet, as at the
    first step or in rows of an embedding that no text has had so far, nothing is perturbed.

    Args:
        buffers: names under which base optimizers keep second moments, tried in turn: Adam's and RMSprop's.
    """

    follows_state = True

    def __init__(self, buffers: Sequence[str] = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")) -> None:
        self.buffers = tuple(buffers)

    def direction(self, context: VariantContext, gradients: Gradients) -> Gradients:
        settings = context.settings()
        result: Gradients = {}
        for p, g in gradients.items():
            state: Mapping[str, Any] = context.state.get(p, {})
            found = next((state[name] for name in self.buffers if state.get(name) is not None), None)
            if found is not None and found.is_floating_point() and found.shape == p.shape:
                wide = torch.float64 if g.dtype == torch.float64 else torch.float32
                v = distributed.local_as(p, found).to(wide)
                group = settings[p]
                if "betas" in group and "step" in state:
                    v = v / (1 - group["betas"][1] ** _steps(state["step"], wide, v.device))
                d = g.to(wide) / (v.sqrt() + group.get("eps", 1e-8))
                result[p] = torch.where(v > 0, d, g * 0).to(g.dtype)  # inf * 0 is nan: an overflow is still seen
            elif state or context.is_stateless:
                raise RuntimeError(
                    f"SAM: PreconditionedSAM found none of {', '.join(self.buffers)}, in the shape of the weights and not "
                    f"quantised, in the base optimizer's state ({', '.join(state) or 'empty'}); take torch's AdamW, or name "
                    "its buffer"
                )
            else:
                result[p] = g * 0
        return result


class TRAM(Variant):
    """TRAM (2310.03646): the radius is how far the outputs move under noise, rather than a constant.

    e = rho d t^2 g / |t g| with t = abs(w) + eta (take `adaptive=True`, `rho=1.0`), d the divergence given to `observe()` in
    the first pass, such as R3F's symmetric KL. Use it to join SAM with R3F: their plain sum did worse than either (table 2
    there). From the equations: the released code leaves the gradient out.
    """

    rewrites = False
    weighs_ascents = True

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._items: float | Tensor = 0.0

    def observe(self, divergence: Tensor, items: float | Tensor = 1.0) -> None:
        """Takes the divergence of one (micro-)batch; the radius is the mean over the ascent's, and over ranks that share
        parameters. Pipeline stages that have none observe none.

        Args:
            divergence: a mean; or a sum, where micro-batches differ in size.
            items: over how many items that sum is, > 0 (such as tokens, or their share of a window's).
        """
        value = divergence.detach().double()
        self._sum = value if self._sum is None else self._sum + value
        self._items = self._items + items

    def radius(self, context: VariantContext) -> Tensor | None:
        mean = context.mean(self._sum, self._items)
        if mean is None:
            raise RuntimeError("SAM: TRAM has no radius: call observe(divergence) in the first pass of each step")
        return mean

    def descend(self, context: VariantContext, clean: Gradients, second: Gradients) -> None:
        self.forget()  # what the second pass observed does not count

    def forget(self) -> None:
        self._sum, self._items = None, 0.0


def _not_negative(who: str, name: str, value: float) -> float:
    ops.check_number(who, name, value)
    return value


def _beside(value: float | Tensor, other: Tensor) -> float | Tensor:
    """`value` on the device of another tensor."""
    return value.to(other.device) if isinstance(value, Tensor) else value


def _scale_(tensors: Gradients, factor: Tensor) -> None:
    for g in tensors.values():
        g.mul_(factor.to(g.device, g.dtype))


def _add_(tensors: Gradients, others: Gradients, factor: float | Tensor) -> None:
    for p, g in tensors.items():
        if p in others:
            if isinstance(factor, Tensor):
                g.addcmul_(others[p], factor.to(others[p]))
            else:
                g.add_(others[p], alpha=factor)


# -- on the logits of a language model ------------------------------------------------------------------------------------


def logits_sam(
    hidden: Tensor, weight: Tensor, loss: LossOfLogits, rho: float = 0.05, *, bias: Tensor | None = None
) -> Tensor:
    """The loss at a perturbed head, in one pass (logits-SAM, 2603.18258).

    Only the output matrix W moves, by e = rho G / |G| with G = dZ^T H the gradient of its own loss. Neither G nor W + e is
    formed where tokens are fewer than the head is wide: Z' = Z + rho / |G| (H H^T) dZ, and |G|^2 = <H H^T, dZ dZ^T>. Use it
    for preference tuning (the authors: DPO at rho = 1e-3), where the rest of the model needs no second pass; any optimizer
    will do, `fastpost.SAM` is not needed.

    Args:
        hidden: (..., width), the head's inputs.
        weight: (vocabulary, width).
        loss: from logits (..., vocabulary) to a scalar; called twice.
        rho: radius, >= 0.
        bias: (vocabulary,), not perturbed.

    Returns:
        The loss at w + e, with gradients to `hidden`, `weight` and `bias`; e counts as a constant, as in SAM. Where G is
        zero or not finite, the loss at w.

    Raises:
        TypeError: rho is no number. ValueError: it is negative or not finite.
    """
    ops.check_radius("logits_sam", rho, 0.0)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    with torch.enable_grad():
        at = logits.detach().requires_grad_()
        (dz,) = torch.autograd.grad(loss(at), at)
    d, h = dz.flatten(0, -2), hidden.flatten(0, -2)
    kept = h.detach()
    tokens, (vocabulary, width) = len(h), weight.shape
    gram = tokens * (width + vocabulary) < 2 * width * vocabulary  # which order of products is cheaper
    if gram:
        squared = ((kept @ kept.T).double() * (d @ d.T).double()).sum()
    else:
        g = d.T @ kept
        squared = g.double().square().sum()
    moves = torch.isfinite(squared) & (squared > 0)
    c = torch.where(moves, rho / squared.sqrt(), torch.zeros_like(squared)).to(logits.dtype)
    gain = (h @ kept.T) @ d if gram else h @ g.T
    gain = torch.where(moves, gain, torch.zeros_like(gain))  # 0 * inf is not 0
    return loss(logits + (c * gain).view_as(logits))


class FunctionalSAM:
    """Functional-SAM (2502.02407): the Jacobian at w + e, but the loss's derivative with respect to the logits from w.

    SAM in language models mostly acts through the logits' statistics; this takes that path away. Use it where plain SAM
    hurts perplexity. Call it with logits and a loss inside the closure (or a window's `forward_backward`) of any SAM::

        functional = FunctionalSAM(opt)
        def closure():
            loss = functional(model(x), lambda z: cross_entropy(z, y))
            loss.backward()
            return loss

    Where the model makes the loss itself, as those of transformers do with `labels`, say which layer makes the logits, and
    go on as with any SAM. Terms of the loss that do not go through the logits keep their gradient at w + e::

        FunctionalSAM(opt).watch(model.lm_head)

    The paper's preconditioned form is this with `variant=PreconditionedSAM()`. Micro-batches come in the same order in both
    passes, as windows run them; between them dL/dlogits is kept, one number per logit. In a window the ascent has to be over
    all micro-batches (`ascent_fraction=1.0`). Steps without an ascent (`interval`) are plain, and nothing is kept.

    Args:
        optimizer: the SAM whose passes these are.
    """

    def __init__(self, optimizer: SAM) -> None:
        self._optimizer = optimizer
        self._key = object()

    def __call__(self, logits: Tensor, loss: LossOfLogits) -> Tensor:
        """The loss; in the second pass with the gradient <dL/dlogits at w, logits at w + e> in place of its own."""
        if not self._optimizer.ascends:
            return loss(logits)
        if not self._optimizer.is_perturbed:
            value = loss(logits)
            with torch.enable_grad():
                at = logits.detach().requires_grad_()
                (dz,) = torch.autograd.grad(loss(at), at)
            self._note(logits).gradients.append(dz)
            return value
        dz = self._take(logits).gradients.popleft()
        surrogate = (logits * dz).sum()
        return loss(logits.detach()).detach() + surrogate - surrogate.detach()

    def watch(self, head: nn.Module) -> RemovableHandle:
        """Acts on the logits that a layer puts out, in every pass with gradients from now on.

        What a model does with the layer's output, such as a cap on logits, counts as part of the loss.

        Args:
            head: puts out logits as one tensor, through its own forward.

        Returns:
            A handle whose `remove()` ends it.
        """
        return head.register_forward_hook(self._on_logits)

    @property
    def waiting(self) -> int:
        """How many gradients by logits have come at w, for passes at w + e that are still to be made in this step."""
        return sum(len(kept.gradients) for kept in self._kept)

    @property
    def _kept(self) -> deque[_AtW]:
        """In the order of the passes; the step's own, so that nothing outlives it."""
        kept: deque[_AtW] = self._optimizer.notes.setdefault(self._key, deque())
        return kept

    def _on_logits(self, head: nn.Module, args: Any, logits: Any) -> None:
        if not (self._optimizer.ascends and isinstance(logits, Tensor) and logits.requires_grad):
            return
        if not self._optimizer.is_perturbed:
            logits.register_hook(self._note(logits).gradients.append)  # type: ignore[no-untyped-call]
            return
        gradients = self._take(logits).gradients

        def as_at_w(gradient: Tensor) -> Tensor:
            if not gradients:
                raise RuntimeError("FunctionalSAM: the loss at w did not use these logits; both passes have to be the same")
            return gradients.popleft()

        logits.register_hook(as_at_w)  # type: ignore[no-untyped-call]

    def _note(self, logits: Tensor) -> _AtW:
        kept = _AtW(logits.shape)
        self._kept.append(kept)
        return kept

    def _take(self, logits: Tensor) -> _AtW:
        waiting = self._kept
        if not waiting:
            raise RuntimeError(
                "FunctionalSAM: no first pass for these logits; each micro-batch has to pass at w before it passes at w + e "
                "(ascent_fraction=1.0, and a variant with an ascent pass)"
            )
        kept = waiting.popleft()
        if kept.shape != logits.shape:
            raise RuntimeError(
                f"FunctionalSAM: logits of shape {tuple(logits.shape)} meet those of {tuple(kept.shape)} at w"
            )
        return kept


class _AtW:
    """What is kept of a pass at w: the logits' shape, and the gradients that came to them, one for each backward pass."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.gradients: deque[Tensor] = deque()
