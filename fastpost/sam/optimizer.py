"""SAM as a torch optimizer around any other (Foret et al. 2010.01412; for language models Bahri et al. 2110.08529)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastpost import plan
from fastpost.errors import unknown
from fastpost.ops import params as ops
from fastpost.sam.bases import MergedState, build_bases, step_bases
from fastpost.sam.buckets import BucketCache, ParameterBucket
from fastpost.sam.report import PerturbationReport
from fastpost.sam.scope import Scope, resolve_scope

Closure = Callable[[], Any]
_RADIUS_KEYS = ("rho", "adaptive", "eta")


class SAM(Optimizer):
    """Sharpness-aware minimization: the gradient is taken at w + e, the step from w.

    e = rho * g / |g| over all perturbed tensors together (2010.01412, eq. 2), or with `adaptive` ASAM's
    e = rho * t^2 * g / |t * g|, t = abs(w) + eta (2102.11600, eq. 7). Perturb and restore are one fused pass each; restore
    is bit-exact, into the same storage.

    Any of these makes a step::

        loss.backward(); opt.first_step(zero_grad=True); loss_fn().backward(); opt.second_step(zero_grad=True)
        opt.step(closure)                       # the closure runs twice; returns its first loss
        with opt.perturbed(): loss_fn().backward()
        opt.step()                              # restores if need be; without a perturbation the plain base step

    A non-finite gradient in either pass skips the step: weights, moments and step counts keep their bits, and
    `skipped_steps` counts it. Knowing that costs one flag read per step where the base optimizer takes no `found_inf`.

    Args:
        params: as for any optimizer (tensors, named tensors or groups; groups may set their own rho, adaptive, eta), or None
            when `base_optimizer` is an instance.
        base_optimizer: an optimizer class, built from `params` and `kwargs`; or an instance; or a list of instances, which
            then share one norm.
        rho: radius of the perturbation, >= 0, in the units of the weights' global 2-norm (for ASAM of e / t). 0 is the base
            optimizer, bit for bit.
        adaptive: ASAM.
        eta: ASAM's constant beside abs(w), >= 0; 0 is the popular PyTorch form, 0.01 the authors'.
        ascent_fraction: share of a window of micro-batches that the ascent uses, in (0, 1]; read by windows and trainers.
        scope: which tensors are perturbed: a predicate of (name, tensor), or patterns such as "*.lora_*"; None is all. Names
            are known when `params` are named (`model.named_parameters()`).
        compute_dtype: dtype that the forward pass computes in, for the report's "seen"; None takes autocast's where autocast
            is on, else the weights' own.
        dropout_rng: "same" gives both passes of `step(closure)` the same random numbers, as in the original; "independent"
            does not.
        interval: SAM on every interval-th step, the base optimizer on the others.
        **kwargs: passed to the base optimizer's class.

    Attributes:
        base_optimizer: the wrapped optimizer (the first, where a list was given).
        report: PerturbationReport of the last perturbation, or None.

    Raises:
        ValueError: rho or eta negative or not finite, a bad interval, fraction or scope.
        TypeError: `base_optimizer` is neither a class nor an instance, or keywords were given for an instance.
    """

    _step_supports_amp_scaling = True  # GradScaler then always calls step(), which has to restore even on overflow

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] | Optimizer | Sequence[Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        ascent_fraction: float = 1.0,
        scope: Scope = None,
        compute_dtype: torch.dtype | None = None,
        dropout_rng: str = "same",
        interval: int = 1,
        **kwargs: Any,
    ) -> None:
        ops.check_radius("SAM", rho, eta)
        if not 0 < ascent_fraction <= 1:
            raise ValueError(f"SAM: ascent_fraction must lie in (0, 1], not {ascent_fraction}")
        if dropout_rng not in ("same", "independent"):
            raise unknown("dropout_rng", dropout_rng, ("same", "independent"))
        if int(interval) != interval or interval < 1:
            raise ValueError(f"SAM: interval must be a whole number >= 1, not {interval}")
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise TypeError(f"SAM: compute_dtype must be a floating-point dtype, not {compute_dtype}")
        self._bases = build_bases(params, base_optimizer, kwargs)
        self.ascent_fraction = ascent_fraction
        self.compute_dtype = compute_dtype
        self.dropout_rng = dropout_rng
        self.interval = int(interval)
        self._scope = scope
        self._radius = {"rho": rho, "adaptive": adaptive, "eta": eta}
        self.defaults = {**self.base_optimizer.defaults, **self._radius}
        for group in self.param_groups:
            self._fill_group(group)
        self._in_scope = resolve_scope(self._scope, self.param_groups)
        self._ascent_buckets = BucketCache(stash=True)
        self._finite_buckets = BucketCache(stash=False)
        self._perturbed: list[plan.Bucket] = []
        self._awaits_second = False
        self._steps_taken = 0
        self._ascent_norm: Tensor | None = None
        self._sums: Tensor | None = None
        self._elements = 0
        self._skipped: int | Tensor = 0
        self._warned = False
        Optimizer.__setstate__(self, {})  # hooks and the profiled step, without a second list of groups
        self._warned_capturable_if_run_uncaptured = True

    @classmethod
    def lm(cls, params: Any, base_optimizer: Any, **kwargs: Any) -> SAM:
        """The language-model recipe of 2110.08529: rho 0.15, ascent on a quarter of the batch."""
        return cls(params, base_optimizer, **{"rho": 0.15, "ascent_fraction": 0.25, **kwargs})

    # -- the two passes -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights by the gradients present: w is kept aside, w + e takes its place.

        Args:
            zero_grad: drop the gradients afterwards, as the second pass wants it.

        Raises:
            RuntimeError: the weights are perturbed already, or no perturbed tensor has a gradient.
        """
        if self.is_perturbed:
            raise RuntimeError("SAM: first_step() was called twice; second_step() or step() comes in between")
        moves = self._steps_taken % self.interval == 0
        buckets = self._bucketed()
        if moves:
            self._perturb(buckets)
        self._awaits_second = True
        if zero_grad:
            self.zero_grad()
            self._carry_overflow()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights bit for bit and lets the base optimizer step with the gradients present.

        Raises:
            RuntimeError: there was no first_step.
        """
        if not self.is_perturbed:
            raise RuntimeError("SAM: second_step() without first_step()")
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Closure | None = None, *, reuse_grads: bool = False) -> Any:
        """One update.

        Args:
            closure: clears nothing, computes the loss, calls backward and returns the loss. It runs twice: at w, and at
                w + e. Without it, the update uses the gradients present, after restoring w where it is perturbed; if it is
                not, this is the plain base step.
            reuse_grads: the gradients present are the ascent gradient, and the closure runs once, at w + e.

        Returns:
            The closure's first loss (with `reuse_grads` its only one), or None.
        """
        if closure is None:
            self._finish()
            return None
        if self.is_perturbed:
            raise RuntimeError("SAM: step(closure) while perturbed; finish with second_step() or step() first")
        moves = self._steps_taken % self.interval == 0
        loss = None
        if not reuse_grads:
            self.zero_grad()
            # What the first pass draws is drawn again by the second.
            same = self.dropout_rng == "same" and moves
            with torch.enable_grad(), torch.random.fork_rng(self._cuda_devices() if same else (), enabled=same):
                loss = closure()
        if moves:
            with self.perturbed():
                with torch.enable_grad():
                    second = closure()
                loss = second if reuse_grads else loss
                self._finish()
        else:
            self._finish()
        return loss

    @contextlib.contextmanager
    def perturbed(self, zero_grad: bool = True) -> Iterator[SAM]:
        """Perturbs on entry by the gradients present and restores on exit, whatever happens inside.

        A step inside restores, once; the exit then finds nothing to do. A step after it uses the gradient made inside.

        Args:
            zero_grad: drop the ascent gradients on entry.
        """
        self.first_step(zero_grad=zero_grad)
        try:
            yield self
        except BaseException:
            self._ascent_norm = None  # of a step that will not be made
            raise
        finally:
            if self.is_perturbed:
                self.restore_()

    @torch.no_grad()
    def restore_(self) -> None:
        """Puts w back, bit for bit, into the same storage, and makes no step. Without a perturbation it does nothing."""
        for bucket in self._perturbed:
            ops.run("sam_restore_", bucket)
            ops.wrote(bucket.weights)
        self._perturbed = []
        self._awaits_second = False

    @property
    def is_perturbed(self) -> bool:
        """Whether a first step waits for its second."""
        return self._awaits_second

    # -- what was done ------------------------------------------------------------------------------------------------

    @property
    def report(self) -> PerturbationReport | None:
        """What the last perturbation was meant to be and what became of it; None before the first.

        On the CPU reading it warns, once per optimizer, when the forward pass sees something else than was meant; on other
        devices that would have to wait for them, so there `report.concern()` asks.
        """
        if self._sums is None:
            return None
        report = PerturbationReport(self._sums, self._elements)
        if self._sums.device.type == "cpu" and not self._warned:
            concern = report.concern()
            if concern is not None:
                self._warned = True
                warnings.warn(concern, stacklevel=2)
        return report

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite; waits for the device."""
        return int(self._skipped)

    # -- the optimizer's own face -------------------------------------------------------------------------------------

    @property
    def base_optimizer(self) -> Optimizer:
        return self._bases[0]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own groups, so that schedulers act on both."""
        if len(self._bases) == 1:
            return self.base_optimizer.param_groups
        return [group for base in self._bases for group in base.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base_optimizer.state if len(self._bases) == 1 else MergedState(self._bases)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the (last) base optimizer; rho, adaptive and eta default to the constructor's."""
        self._refuse_while_perturbed("add_param_group()")
        radius = {**self._radius, **{k: param_group[k] for k in _RADIUS_KEYS if k in param_group}}
        ops.check_radius("SAM", radius["rho"], radius["eta"])
        self._bases[-1].add_param_group(param_group)
        self._fill_group(self._bases[-1].param_groups[-1])
        self._in_scope = resolve_scope(self._scope, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's layout, with rho, adaptive and eta in its groups.

        Raises:
            RuntimeError: the weights are perturbed; a checkpoint taken now would hold the wrong ones.
        """
        self._refuse_while_perturbed("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of SAM or of the plain base optimizer; keys that are missing keep their values."""
        self._refuse_while_perturbed("load_state_dict()")
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.keys() != {"state", "param_groups"}:  # unpickling or copying
            super().__setstate__(state)
            return
        groups, moments = list(state["param_groups"]), state["state"]
        for base in self._bases:
            mine, groups = groups[: len(base.param_groups)], groups[len(base.param_groups) :]
            for group, old in zip(mine, base.param_groups, strict=True):
                for key in _RADIUS_KEYS:
                    group.setdefault(key, old[key])
            owned = {p for group in mine for p in group["params"]}
            kept = type(base.state)(dict) if hasattr(base.state, "default_factory") else type(base.state)()
            kept.update({k: v for k, v in moments.items() if k in owned or not isinstance(k, Tensor)})
            base.__setstate__({"state": kept, "param_groups": mine})

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("copying or pickling")
        fresh = {"_ascent_buckets": BucketCache(stash=True), "_finite_buckets": BucketCache(stash=False)}
        return {**self.__dict__, **fresh}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _fill_group(self, group: dict[str, Any]) -> None:
        for key, value in self._radius.items():
            group.setdefault(key, value)
        ops.check_radius("SAM", group["rho"], group["eta"])

    def _refuse_while_perturbed(self, what: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"SAM: {what} while the weights are perturbed; call second_step(), step() or restore_() first"
            )

    def _cuda_devices(self) -> list[torch.device]:
        """The CUDA devices in use, whose generators draw dropout masks."""
        return sorted({p.device for group in self.param_groups for p in group["params"] if p.is_cuda}, key=str)

    def _bucketed(self) -> list[ParameterBucket]:
        """Buckets of the tensors that are in scope and have a gradient, pointing at the gradients present."""
        buckets = self._ascent_buckets.of(self.param_groups, self._in_scope)
        if not buckets:
            raise RuntimeError("SAM: no parameter (in scope) has a gradient; call backward() before the ascent")
        return buckets

    def _perturb(self, buckets: list[ParameterBucket]) -> None:
        groups = self.param_groups
        etas = [groups[b.group]["eta"] if groups[b.group]["adaptive"] else None for b in buckets]
        squared = ops.total_squared_norm([b.bucket for b in buckets], etas)
        total = None
        try:
            for b, eta in zip(buckets, etas, strict=True):
                rho = float(groups[b.group]["rho"])
                part = ops.run("sam_perturb_", b.bucket, squared.to(b.bucket.device), rho, eta, self._seen(b.bucket))
                self._perturbed.append(b.bucket)
                ops.wrote(b.bucket.weights)
                total = part if total is None else total + part.to(total.device)
        except BaseException:  # a later bucket failed: the earlier ones must not stay perturbed
            self.restore_()
            raise
        self._sums = total
        self._elements = sum(b.elements for b in buckets)
        self._ascent_norm = squared

    def _seen(self, bucket: plan.Bucket) -> torch.dtype:
        if self.compute_dtype is not None:
            return self.compute_dtype
        if torch.is_autocast_enabled(bucket.device.type):
            return torch.get_autocast_dtype(bucket.device.type)
        return bucket.dtype

    def _carry_overflow(self) -> None:
        """Leaves a NaN behind as a gradient when the ascent overflowed, so that the second gradient shows it to everyone.

        GradScaler, fused base optimizers and our own test then all see it. On the CPU the norm is at hand; elsewhere the
        seed is 0 or NaN without asking the device.
        """
        norm = self._ascent_norm
        if norm is None or not self._perturbed or (norm.device.type == "cpu" and bool(torch.isfinite(norm))):
            return
        carrier = min((p for b in self._perturbed for p in b.weights if p.numel()), key=Tensor.numel)
        seed = torch.where(torch.isfinite(norm), torch.zeros_like(norm), torch.full_like(norm, math.nan))
        carrier.grad = torch.zeros_like(carrier)
        carrier.grad.view(-1)[:1].add_(seed.to(carrier.device, carrier.dtype))

    def _finish(self) -> None:
        """Restores if need be, then steps with every base optimizer unless a gradient is not finite."""
        ascent, self._ascent_norm = self._ascent_norm, None
        self.restore_()
        self._steps_taken += 1
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is None and ascent is not None:
            found_inf = self._overflowed(ascent)
        self._skipped = self._skipped + step_bases(self._bases, scale, found_inf)

    @torch.no_grad()
    def _overflowed(self, ascent: Tensor) -> Tensor:
        """1.0 where a gradient of either pass is not finite, else 0.0; a float32 scalar as GradScaler's found_inf."""
        buckets = self._finite_buckets.of(self.param_groups, None)
        finite = torch.isfinite(ascent)
        if buckets:
            norm = ops.total_squared_norm([b.bucket for b in buckets])
            finite = finite.to(norm.device) & torch.isfinite(norm)
        return (~finite).float()
