"""SAM as a torch optimizer around any other (Foret et al. 2010.01412; Bahri et al. 2110.08529); long, as it is one class."""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpost import distributed
from fastpost.norm_stats import NormStats, check_norm_stats
from fastpost.ops import params as ops
from fastpost.ranks import NormGroup
from fastpost.rng import RandomState, accelerators
from fastpost.sam.backward_norm import BackwardNorm, Norms, refuse_groups, refuse_options
from fastpost.sam.buckets import (
    BucketCache,
    ParameterBucket,
    ShardReducer,
    WeightsChanged,
    check_sharding,
    total_squared_norm,
)
from fastpost.sam.frameworks import refuse_accumulating_closure
from fastpost.sam.hooks import EarlyRewriting, OverflowGuard
from fastpost.sam.options import check_group, check_options
from fastpost.sam.perturbation import (
    FusedRestore,
    MasterPerturbation,
    PerturbParams,
    build_fused_restore,
    build_perturbation,
)
from fastpost.sam.scopes import Scope, ScopeCache
from fastpost.sam.step import Gradients, PerturbationReport, PerturbationSums, Phase, SAMStep
from fastpost.sam.variants import Variant, VariantContext
from fastpost.sam.wrapper import Wrapper, build_bases, hooked, step_bases

Closure = Callable[[], Any]
PLAIN_STEPS = 10  # in a row, without an ascent where one was due


class SAM(Wrapper):
    """Sharpness-aware minimization: the gradient is taken at w + e, the step from w.

    e = rho * g / |g| over all perturbed tensors together (2010.01412, eq. 2), or with `adaptive` ASAM's
    e = rho * t^2 * g / |t * g|, t = abs(w) + eta (2102.11600, eq. 7). Perturb and restore are one fused pass each; restore
    is bit-exact, into the same storage.

    Any of these makes a step::

        loss.backward(); opt.first_step(zero_grad=True); loss_fn().backward(); opt.second_step(zero_grad=True)
        opt.step(closure)                       # the closure runs twice; returns its first loss
        with opt.perturbed(): loss_fn().backward()
        opt.step()                              # restores if need be; without a perturbation the plain base step

    A non-finite gradient in either pass, or in a step between two ascents (`interval`), skips the step: weights, moments and
    step counts keep their bits, and `skipped_steps` counts it. Knowing that costs one flag read per step where the base
    optimizer takes no `found_inf`; in a step between two ascents also a sum over all gradients, unless a GradScaler has
    looked at them, and a number from each rank where ranks have to agree.

    Args:
        params: as for any optimizer (tensors, named tensors or groups; groups may set their own rho, adaptive, eta), or None
            when `base_optimizer` is an instance.
        base_optimizer: an optimizer class, built from `params` and `kwargs`; or an instance; or a list of instances, which
            then share one norm.
        rho: radius of the perturbation, >= 0, in the units of the weights' global 2-norm (for ASAM of e / t). 0 is the base
            optimizer, bit for bit.
        adaptive: ASAM.
        eta: ASAM's constant, added to abs(w), >= 0; 0 is the popular PyTorch form, 0.01 the authors'.
        ascent_fraction: share of a window of micro-batches that the ascent uses, in (0, 1]; read by windows and trainers.
        scope: which tensors are perturbed: a predicate of (name, tensor), or patterns such as "*.lora_*"; None is all. Names
            are known when `params` are named (`model.named_parameters()`). A `StepScope` is asked anew at each step.
        compute_dtype: dtype that the forward pass computes in, for the report's "seen": float32, bfloat16 or float16, and
            float64 where all weights are; None takes autocast's where autocast is on, else the weights' own.
        dropout_rng: "same" gives both passes of `step(closure)` the same random numbers, as in the original; "independent"
            does not.
        interval: SAM on every interval-th step, the base optimizer on the others; `opt.ascends` says which one comes next.
        sync_ascent: whether ranks average the ascent gradient (True) or each perturbs by its own (False: m-sharpness, the
            original). Windows act on it, and average for None as well; by hand the gradients count as they are.
        rounding: how w + e is stored in 16-bit weights: to "nearest", or "stochastic", at random between neighbours, which
            keeps the mean of the step but not its direction.
        rounding_seed: key of those random numbers.
        master_params: float32 masters of the 16-bit `params`, in their order. The base optimizer steps the masters; w + e is
            cast(master + e), restoring is a cast, and nothing is stashed.
        perturb: "stored" writes w + e over w. "functional" never writes w: the layers of `model` add what e would add to
            their outputs, so no rounding to the grid of the weights loses e (`fastpost.sam.perturbation.functional`).
        stash: how w is kept while w + e stands in its place: as a "copy"; as its distance in "ulp", which takes half of that
            and gives it back bit for bit, if nobody writes the weights between the passes; or on the host, "cpu".
        model: the model; "functional" needs it. With it the second pass leaves the running statistics of norm layers alone,
            as `norm_stats` says.
        norm: when the ascent's norm is summed up: in the "step", from all gradients; or during "backward", from each as it
            arrives, which saves a pass over them. The same number, bit for bit on the CPU up to float32.
        norm_stats: which passes move the running statistics of batch and instance norms: the "first", as in the original, or
            "both". Without `model` SAM does not know the layers: see `frozen_norm_stats`.
        variant: one of `fastpost.sam.variants`, such as `LookSAM()`; None is SAM (or ASAM).
        fused_restore: make AdamW's step from the stash, "copy" or "ulp", in one pass with the restore; equal to restore and
            step within rounding. For torch.optim.AdamW, on GPUs with fused=True or capturable=True.
        norm_group: the ranks that hold other parameters of the same model, over which norms are summed: the process group or
            DeviceMesh of the pipeline's stages; or a function of (name, parameter) that returns the group of each, as where
            only experts lie apart. None where DTensors tell, and for replicas.
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
        sync_ascent: bool | None = None,
        rounding: str = "nearest",
        rounding_seed: int = 0,
        master_params: Iterable[Tensor] | None = None,
        perturb: str = "stored",
        stash: str = "copy",
        model: nn.Module | None = None,
        norm: str = "step",
        norm_stats: str = "first",
        variant: Variant | None = None,
        fused_restore: bool = False,
        norm_group: NormGroup = None,
        **kwargs: Any,
    ) -> None:
        ops.check_radius("SAM", rho, eta)
        check_options(ascent_fraction, dropout_rng, interval, compute_dtype, sync_ascent, norm)
        check_norm_stats("norm_stats", norm_stats)
        self._reducer = ShardReducer(norm_group)
        masters = None if master_params is None else MasterPerturbation(self._reducer, params, master_params)
        self._bases = build_bases(params, base_optimizer, kwargs, masters)
        self.ascent_fraction = ascent_fraction
        self.compute_dtype = compute_dtype
        self.dropout_rng = dropout_rng
        self.interval = int(interval)
        self.sync_ascent = sync_ascent
        self.variant = Variant() if variant is None else variant
        if not isinstance(self.variant, Variant):
            raise TypeError(f"SAM: variant must be an instance of fastpost.sam.Variant, not {variant!r}")
        if norm_group is not None and not self.variant.serves_norm_group:
            raise ValueError(f"SAM: {type(self.variant).__name__} does not serve norm_group; leave one of the two out")
        if fused_restore and not self.variant.serves_fused_restore:
            raise ValueError(f"SAM: {type(self.variant).__name__} does not serve fused_restore; leave one of the two out")
        if sync_ascent is False and self.variant.combines:
            raise ValueError(
                f"SAM: sync_ascent=False lets each rank ascend by its own gradient, and {type(self.variant).__name__} would "
                "mix it into the ranks' mean, so that their weights part; leave one of the two out"
            )
        if masters is not None and type(self.variant) is not Variant:
            raise ValueError(f"SAM: master_params do not serve {type(self.variant).__name__}; use it without masters")
        self._group_defaults = {"rho": rho, "adaptive": adaptive, "eta": eta, "sam_steps": 0}
        self._adopt()
        if eta and not any(group["adaptive"] for group in self._groups()):
            raise ValueError(f"SAM: eta={eta} is ASAM's constant; say adaptive=True, here or in a group, or leave eta out")
        self._scope = ScopeCache(scope)
        self._perturbation = build_perturbation(perturb, model, rounding, rounding_seed, masters, stash, self._reducer)
        if self._reducer.named:
            self._reducer.know(self._model_groups())
        self._perturbation.check(self._in_scope())
        check_sharding(self.tensors(), sync_ascent)
        self._fused = build_fused_restore(self._bases, self._perturbation, stash) if fused_restore else None
        self.norm = norm
        if norm == "backward":
            refuse_options(self.variant, scope)
            refuse_groups(self._model_groups())
        self._norm_stats: NormStats | None = None
        self.norm_stats = norm_stats
        if model is not None:
            self.set_model(model)
        self.in_window = False  # micro-batches of a window are coming, and the window says when the second pass is over
        self.cycle = 0  # goes up with every fresh start, so that what was kept from an older first pass is known to be stale
        self._step = SAMStep()
        self._last_sums: PerturbationSums | None = None
        self._skipped: int | Tensor = 0
        self._plain_steps = 0
        self._by_others = self._stepped = self._warned = False
        self._build_caches()

    def _build_caches(self) -> None:
        """What neither copies nor pickles take along."""
        stash = self._perturbation.stash
        self._ascent_buckets = BucketCache(stash.room if stash else None, self._reducer)
        self._guard = OverflowGuard(self._reducer)
        # A reference to itself would keep moments and the stash alive until a garbage collection.
        mine, groups = weakref.proxy(self), weakref.WeakMethod(self._groups)
        self._context = VariantContext(
            self._reducer,
            lambda: groups()(),  # type: ignore[misc]  # called while this object lives
            lambda: mine.state,
            self.variant.state_names,
        )
        self._early = EarlyRewriting(self._rewrites_arrivals, self._gradients, self._combine)
        self._backward_norm = BackwardNorm(self._reducer) if self.norm == "backward" else None
        self._watch()
        self.await_ascent(True)

    @classmethod
    def lm(cls, params: Any, base_optimizer: Any, **kwargs: Any) -> SAM:
        """The language-model recipe of 2110.08529: rho 0.15, ascent on a quarter of the batch."""
        return cls(params, base_optimizer, **{"rho": 0.15, "ascent_fraction": 0.25, **kwargs})

    # -- the two passes -----------------------------------------------------------------------------------------------

    @ops.without_grad
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights by the gradients present: w is kept aside, w + e takes its place.

        Args:
            zero_grad: drop the gradients afterwards, as the second pass wants it.

        Raises:
            RuntimeError: the weights are perturbed already, or no perturbed tensor has a gradient.
        """
        self._refuse_a_second_ascent()
        try:
            self._step.combined = False
            self._watch()
            if self.ascends:
                self._early.forget()
                self._perturb()
            self._step.phase = Phase.PERTURBED
            self.await_ascent(False)
            if self._norm_stats is not None and self.variant.ascent_pass:
                self._norm_stats.keep()
            if zero_grad:
                self.zero_grad()
        except BaseException:
            self._restart_step()
            self.restore_()
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights bit for bit and lets the base optimizer step with the gradients present.

        Raises:
            RuntimeError: there was no first_step.
        """
        if not self.is_perturbed:
            raise RuntimeError(
                "SAM: second_step() without first_step(); where end_ascent() has put w back already, step() ends the step"
            )
        self.step()
        if zero_grad:
            self.zero_grad()

    @hooked
    def step(self, closure: Closure | None = None, *, reuse_grads: bool = False) -> Any:
        """One update.

        Args:
            closure: computes the loss, calls backward and returns the loss; SAM clears the gradients before each call. It
                runs twice: at w, and at w + e. Without it, the update uses the gradients present, after restoring w where
                it is perturbed; if it is not, this is the plain base step.
            reuse_grads: the gradients present are the ascent gradient, and the closure runs once, at w + e.

        Returns:
            The closure's first loss (with `reuse_grads` its only one), or None.
        """
        if self.in_window:
            self._refuse_in_window()
        if self._by_others:  # what comes as a closure is theirs: the passes have been made
            self._stepped = True
            loss = None if closure is None else closure()
            self._finish()
            return loss
        if closure is None:
            self._finish()
            return None
        if "found_inf" in vars(self):
            # The scaler looked at older gradients than the closure makes, and whether that one scales its loss is unknown.
            _leave_scaler(self)
            raise RuntimeError(
                "SAM: a closure cannot go through GradScaler.step, nor through a wrapper that passes it on (Accelerate). "
                "Scale both losses yourself: backward, first_step(zero_grad=True), backward, then scaler.step(opt); in "
                "Accelerate use AcceleratedWindow, or opt.optimizer.first_step() between two accelerator.backward()"
            )
        refuse_accumulating_closure()
        return self.passes(closure, reuse_grads=reuse_grads, end=self._finish)

    def passes(
        self,
        closure: Closure,
        *,
        reuse_grads: bool = False,
        clear: bool = True,
        end: Callable[[], None] | None = None,
    ) -> Any:
        """Both passes of `step(closure)`, and no step: w is back, with the gradients to step with.

        Args:
            closure, reuse_grads: as for `step`.
            clear: drop the gradients before the first pass.
            end: called after the last pass, before w is put back, in place of `end_ascent`.

        Returns:
            The closure's first loss.
        """
        if self.is_perturbed:
            raise RuntimeError(
                "SAM: step(closure) while perturbed; finish with second_step() or step() first, or give that step up with "
                "abandon()"
            )
        end = self.end_ascent if end is None else end
        ascends = self.ascends
        loss = None
        if clear and not reuse_grads:
            self.zero_grad()
        if not reuse_grads and (self.variant.ascent_pass or not ascends):
            before = RandomState(self.accelerators())
            with torch.enable_grad():
                loss = closure()
            if self.dropout_rng == "same" and ascends:
                before.put()  # what the first pass drew is drawn again by the second
        if ascends:
            with self.perturbed(zero_grad=clear or self.variant.ascent_pass):
                with torch.enable_grad():
                    second = closure()
                loss = second if loss is None else loss
                end()
        else:
            end()
        return loss

    @contextlib.contextmanager
    def perturbed(self, zero_grad: bool = True) -> Iterator[SAM]:
        """Perturbs on entry by the gradients present and restores on exit, whatever happens inside.

        A step inside restores, once; the exit then finds nothing to do. A step after it uses the gradient made inside.

        Args:
            zero_grad: drop the ascent gradients on entry.
        """
        self._refuse_a_second_ascent()
        try:
            self.first_step(zero_grad=zero_grad)
            yield self
            if self.is_perturbed:  # unless a step was made inside
                self.end_ascent()
        except BaseException as error:
            waits = self.is_perturbed
            self._give_up_step()
            if waits and not isinstance(error, WeightsChanged):
                self.restore_()
            raise

    def end_ascent(self) -> None:
        """Ends the second pass: lets the variant rewrite its gradients, where the end of the backward pass has not, and
        restores w. Then a step may follow.

        `perturbed()` and windows call it; so does a step, where it has not been called. Gradients that were assigned by hand
        (`torch.autograd.grad`) are rewritten here only: with a variant, call it before you clip those.

        Raises:
            RuntimeError: weights are of another dtype, shape or device than those that were perturbed. Nothing was done;
                `abandon()` gives the step up.
        """
        combines = not self._step.combined and not self._early.done
        if self._perturbation.active:
            self._check_parameters()
            if combines and self.variant.overrides("descend"):  # or nothing is written before restoring looks itself
                self._perturbation.check_weights()
        try:
            if combines:
                self._combine()
            self._step.combined = True
            self._step.clean = {}
        finally:
            if self.is_perturbed:
                self.restore_()

    def restore_(self) -> None:
        """Puts w back, bit for bit, into the same storage, and makes no step. Without a perturbation it does nothing.

        Weights that were moved in between are followed, also into another memory format.

        Raises:
            RuntimeError: as `end_ascent`.
        """
        self._put_back(convert=False)

    def abandon(self) -> None:
        """Gives the step up: w is back and the gradients are dropped. After any error or interrupt training may go on.

        Weights that have changed their dtype or device since they were perturbed get w converted; where they have changed
        their shape, w in its own.
        """
        self.in_window = False
        self._give_up_step()
        self._put_back(convert=True)
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, also those that FSDP2 has not reduced yet; between the two passes too, an ascent that
        overflowed stays known."""
        for params in self._lists():
            for p in params:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad.detach_() if p.grad.grad_fn is not None else p.grad.requires_grad_(False)
                    p.grad.zero_()
        if distributed.active():
            distributed.drop_waiting_gradients(self.tensors())
        if self.is_perturbed:
            self._early.forget()
            self._guard.arm(self._step.squared_norm, self._lists)
        else:
            self._restart_step()

    @property
    def is_perturbed(self) -> bool:
        """Whether a first step waits for its second, or a step that was interrupted for `abandon()` or `restore_()`."""
        return self._step.phase is Phase.PERTURBED or self._perturbation.active

    @contextlib.contextmanager
    def stepped_by_others(self) -> Iterator[None]:
        """For wrappers: `step` inside uses the gradients present, and calls what it is given as a closure once before.

        A GradScaler inside that finds a gradient which is not finite may leave `step` out.
        """
        self._by_others, self._stepped = True, False
        try:
            yield
        finally:
            self._by_others = False
        if not self._stepped:
            self._skip()

    def await_ascent(self, comes: bool) -> None:
        """For windows: whether the backward pass that comes next is the last one before an ascent. With norm="backward"
        others need not be summed up; it changes nothing else."""
        if self._backward_norm is not None:
            self._backward_norm.begin(comes and self.ascends)

    def weigh_ascent(self, factor: float | Tensor) -> None:
        """For windows whose ascent is over some of the micro-batches: a factor on its gradients, by which they are on the
        scale of the whole window's. To be said before `first_step`, and before `end_ascent` where more is known then.

        It counts where the variant averages them, or mixes them with the second ones. SAM itself takes a direction alone.
        """
        self._step.ascent_factor = factor

    def set_model(self, model: nn.Module) -> None:
        """Gives SAM the model whose running statistics second passes leave alone; does nothing where it has one already."""
        if self._norm_stats is None and self.norm_stats == "first":
            self._norm_stats = NormStats(model)

    def settle_norm_stats(self) -> None:
        """Second passes are over for now: running statistics are those of the first passes again, and may move on."""
        if self._norm_stats is not None:
            self._norm_stats.put_back()

    @property
    def ascends(self) -> bool:
        """Whether the coming step perturbs; with `interval` only some do."""
        return bool(self._groups()[0]["sam_steps"] % self.interval == 0)

    @property
    def notes(self) -> dict[object, Any]:
        """What others keep of this step's first passes, each by a key of its own; gone with every fresh start."""
        return self._step.notes

    # -- what was done ------------------------------------------------------------------------------------------------

    @property
    def report(self) -> PerturbationReport | None:
        """What the last perturbation was meant to be and what became of it; None before the first.

        On the CPU reading it warns, once per optimizer, when the forward pass sees much less or much more of e than was
        meant; on other devices that would have to wait for them, so there `report.concern()` asks.
        """
        if self._last_sums is None:
            return None
        report = PerturbationReport(*self._last_sums)
        if self._last_sums.sums.is_cpu and not self._warned:
            concern = report.concern()
            if concern is not None:
                self._warned = True
                warnings.warn(concern, stacklevel=2)
        return report

    @property
    def stash_bytes(self) -> int:
        """What w takes while w + e stands in its place, on this rank; 0 before the first ascent and without a stash."""
        return self._ascent_buckets.stash_bytes

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite; waits for the device."""
        return int(self._skipped)

    @property
    def skipped(self) -> Tensor:
        """`skipped_steps` as a float32 scalar on the device that counts; does not wait for it."""
        return torch.as_tensor(self._skipped, dtype=torch.float32)

    # -- as any optimizer ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the (last) base optimizer; rho, adaptive and eta default to the constructor's.

        Raises:
            ValueError, TypeError: rho or eta is no finite number >= 0, adaptive no truth value; the parameters cannot be
                perturbed as this optimizer does it, as where they have no masters. The group is not added.
        """
        super().add_param_group(param_group)
        try:
            self._perturbation.check(self._in_scope())
            if self._backward_norm is not None:
                refuse_groups(self._model_groups())
        except BaseException:
            del self._bases[-1].param_groups[-1]
            raise
        self._watch()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of SAM or of the plain base optimizer; keys that are missing keep their values."""
        super().load_state_dict(state_dict)
        self._perturbation.state_loaded()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("copying or pickling")
        # A scheduler or Accelerate may have put a `step` around ours, by which a copy would step this optimizer. The flag is
        # for GradScaler, and there where a wrapper steps it.
        wrapped = ("step", "_step_supports_amp_scaling")
        left_out = ("_ascent_buckets", "_guard", "_context", "_early", "_backward_norm", *wrapped)
        fused = None if self._fused is None else FusedRestore()  # its buckets point at these parameters
        kept = {key: value for key, value in self.__dict__.items() if key not in left_out}
        step = replace(self._step, squared_norm=None, notes={})
        return {**kept, "_fused": fused, "in_window": False, "_step": step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_perturbation" in state:
            self._build_caches()

    def accelerators(self) -> list[torch.device]:
        """The devices, other than the CPU, whose generators the passes draw from."""
        return accelerators(self.tensors())

    def tensors(self) -> list[Tensor]:
        """All parameters that the model computes with, in or out of scope."""
        return list(itertools.chain.from_iterable(self._lists()))

    def _lists(self) -> list[list[Tensor]]:
        """The same, a list for each group."""
        return [group["params"] for group in self._perturbation.groups(self._groups())]

    def _model_groups(self) -> list[dict[str, Any]]:
        """The groups with the tensors that the model computes with, which masters are not."""
        return self._perturbation.groups(self._groups())

    def _in_scope(self) -> list[Tensor]:
        ids = self._scope.ids(self._model_groups())
        return [p for p in self.tensors() if ids is None or id(p) in ids]

    # -- the step's state ---------------------------------------------------------------------------------------------

    def _close_step(self) -> None:
        """The step is over, made or given up; what is known of it does not concern the next one."""
        self._begin_step(SAMStep())
        self.variant.forget()
        self._watch()

    def _give_up_step(self) -> None:
        """The step will not be made, so that the variant keeps nothing of it."""
        self._context.forget()
        self._close_step()

    def _restart_step(self) -> None:
        """The gradients were dropped at w. Ascents go on counting: another one draws random numbers of its own."""
        self._context.forget()
        self._begin_step(SAMStep(ascents=self._step.ascents))

    def _begin_step(self, step: SAMStep) -> None:
        self._step = step
        self._early.forget()
        self._guard.disarm()
        self.await_ascent(True)
        self.cycle += 1

    def _put_back(self, convert: bool) -> None:
        try:
            self._perturbation.undo(convert)
        finally:
            self._is_restored()

    def _is_restored(self) -> None:
        if self._step.phase is Phase.PERTURBED and not self._perturbation.active:
            self._step.phase = Phase.RESTORED
        self.settle_norm_stats()

    def _refuse_a_second_ascent(self) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                "SAM: first_step() was called twice; second_step() or step() comes in between, or abandon() after an "
                "interrupt. (Accelerate lets step() through only once while it accumulates: there use AcceleratedWindow, or "
                "SAMWindow)"
            )

    def _check_parameters(self) -> None:
        """Raises WeightsChanged where the groups hold other parameters than those that were perturbed."""
        if self._ascent_buckets.hold(self._model_groups()):
            return
        tensors = self.tensors()
        here = set(map(id, tensors))
        if len(tensors) >= self._step.tensors and not here.issuperset(map(id, self._perturbation.params)):
            raise WeightsChanged(
                "SAM: parameters in the optimizer's groups were exchanged between the two passes, and copies of them hold "
                "w + e. opt.abandon() puts w back into those that were perturbed and gives this step up; "
                "exchange parameters between steps, not between the two passes"
            )

    # -- the ascent ---------------------------------------------------------------------------------------------------

    def _perturb(self) -> None:
        owned = self._groups()
        for group in owned:  # schedules and loaded states write there
            check_group(group)
        variant, step, groups = self.variant, self._step, self._perturbation.groups(owned)
        number: int = owned[0]["sam_steps"]
        if self._backward_norm is not None:
            refuse_groups(groups)
        self._reducer.know(groups)
        step.tensors = sum(len(group["params"]) for group in groups)
        gradient = self._direction() if variant.overrides("direction") else None
        self._scope.begin(number)
        try:
            buckets = self._ascent_buckets.take(groups, self._scope.ids(groups), gradient)
            if not buckets and not self._reducer.others:
                self._refuse_no_gradient()
                return
            if self.compute_dtype is not None:
                ops.check_compute_dtype("SAM", self.compute_dtype, (b.bucket.dtype for b in buckets))
            settings = []
            for b in buckets:
                group = groups[b.group]
                rho = float(group["rho"])
                if group.get("maximize", False):  # the base optimizer minimises -L
                    rho = -rho
                eta = float(group["eta"]) if group["adaptive"] else None
                settings.append(PerturbParams(rho, eta, self.compute_dtype or b.compute_dtype()))
            self._reducer.refuse_copies(buckets)
            norms = self._norms(buckets, settings)
            if variant.keeps_gradient:
                step.clean = {p: g.clone() for p, g in self._gradients().items()}
            self._perturbation.number = number * 2**20 + step.ascents
            step.ascents += 1
            done = self._perturbation.apply(buckets, settings, norms.squared)
            if norms.are_stale(done.sums, self._reducer):
                self._perturbation.undo()
                norms = self._norms(buckets, settings, anew=True)
                done = self._perturbation.apply(buckets, settings, norms.squared)
            if not buckets and not done.elements:  # on no rank
                self._refuse_no_gradient()
                return
            step.sums = self._last_sums = done
            step.add_norm(norms.judged(done.sums))
            self._guard.arm(step.squared_norm, self._lists)
        finally:
            self._ascent_buckets.release()

    def _norms(self, buckets: Sequence[ParameterBucket], settings: Sequence[PerturbParams], anew: bool = False) -> Norms:
        """The norm of the ascent's gradients; `anew`: whatever backward has summed up."""
        found = None if self._backward_norm is None or anew else self._backward_norm.norms(buckets, settings)
        if found is None:
            total = total_squared_norm(buckets, [setting.eta for setting in settings], self._reducer)
            found = Norms(total, total)
        radius = self.variant.radius(self._context)
        return found if radius is None else found.within(radius)

    def _refuse_in_window(self) -> None:
        _leave_scaler(self)  # the window goes on, and a later step asks the scaler anew
        raise RuntimeError(
            "SAM: step() in an open window, whose gradients are not complete; nothing was changed. Feed it the "
            "micro-batches that were announced, or close() it to step with those that it had. abort() gives it up; where "
            "the window is gone, opt.abandon() does"
        )

    def _refuse_no_gradient(self) -> None:
        if not self.variant.ascent_pass:
            return
        if distributed.active() and distributed.waiting_gradients(self.tensors()):
            raise RuntimeError(
                "SAM: FSDP2 has not reduced the gradients of the ascent; let the last backward pass before it synchronise "
                "(outside no_sync). opt.zero_grad() drops those that wait"
            )
        raise RuntimeError("SAM: no parameter (in scope) has a gradient; call backward() before the ascent")

    def _direction(self) -> Callable[[Tensor], Tensor | None]:
        """What the variant follows for each tensor. Gradients that it does not see stand for themselves, to be refused."""
        seen = self._gradients()
        self._context.ascent_factor = self._step.ascent_factor
        direction = self.variant.direction(self._context, seen)
        return lambda p: direction.get(p) if p in direction or p in seen else distributed.local_gradient(p)

    def _combine(self) -> None:
        """Lets the variant rewrite the gradients of this step."""
        variant = self.variant
        if self._step.ascended and variant.overrides("descend"):
            if variant.scales_must_agree and "found_inf" in vars(self) and vars(self).get("grad_scale") is None:
                raise RuntimeError(
                    f"SAM: {type(variant).__name__} combines the gradients of both passes, of which unscale_() has rescaled "
                    "one; call opt.end_ascent() after the second pass, and unscale after it"
                )
            _without_grad(self._descend, self._gradients())
        elif variant.overrides("between") and not self.ascends:
            _without_grad(variant.between, self._context, self._gradients())

    def _descend(self, second: Gradients) -> None:
        factor = self._step.ascent_factor if self.variant.scales_must_agree else 1.0
        if isinstance(factor, Tensor) or factor != 1:
            for gradient in self._step.clean.values():
                gradient.mul_(factor.to(gradient) if isinstance(factor, Tensor) else factor)
        self._context.ascent_factor = factor
        self.variant.descend(self._context, self._step.clean, second)

    # -- the variant, and gradients as they arrive --------------------------------------------------------------------

    def _groups_are_read(self) -> None:
        # GradScaler asks for the groups and then looks at the gradients. Where the second gradient was assigned by hand no
        # hook of ours has run, so this is the last moment at which it can be marked; and the only one, because the scaler
        # decides by what it sees in gradients alone. Nothing happens unless an ascent awaits its second gradient and may
        # have overflowed.
        # It may write there what the norm has summed up, too, without a trace.
        backward_norm, guard = self.__dict__.get("_backward_norm"), self.__dict__.get("_guard")
        if backward_norm is not None:
            backward_norm.begin(backward_norm.listens)
        if guard is not None and guard.waits:
            guard.plant_in(self.tensors)

    def _watch(self) -> None:
        """Has the variant rewrite gradients as they come, and the norm sum them up."""
        if self._backward_norm is not None:
            ids = self._scope.ids(self._model_groups())
            self._backward_norm.watch([[p for p in part if ids is None or id(p) in ids] for part in self._lists()])
        if self.variant.rewrites and self.variant.overrides("descend", "between"):
            self._early.watch(self._lists())

    def _rewrites_arrivals(self) -> bool:
        """Whether gradients that arrive now are this step's last and not a window's, which knows its end itself."""
        if self.in_window or self._reducer.named:  # stages end their passes at different times, and rewriting sums over all
            return False
        if self._step.ascended:
            return self.is_perturbed and self.variant.overrides("descend")
        return not self.ascends and self.variant.overrides("between")  # also between first_step and second_step

    def _gradients(self) -> Gradients:
        """This rank's part of every gradient present that is dense and real; others a variant leaves as they are."""
        found = ((p, distributed.local_gradient(p)) for p in self.tensors())
        return {p: g for p, g in found if g is not None and g.layout == torch.strided and g.is_floating_point()}

    # -- the base optimizers' step ------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Restores if need be, then steps with every base optimizer unless a gradient is not finite."""
        try:
            fused = self._fused if self._perturbation.active else None
            if fused is not None:
                self._check_parameters()
                if not (self._perturbation.check_weights() and fused.serves(self._bases, self._perturbation)):
                    fused = None
            if fused is None:
                self.end_ascent()
            elif not self._step.combined and not self._early.done:
                self._combine()
            self._perturbation.take_gradients(scaled="found_inf" in vars(self))
            scale, found_inf = vars(self).get("grad_scale"), vars(self).get("found_inf")
            if not isinstance(found_inf, Tensor):  # the scaler says 0 where no gradient was there to look at
                found_inf = None
            skipped = self._step_bases(fused, scale, self._judge_step(found_inf))
        except WeightsChanged:  # nothing was done
            _leave_scaler(self)
            raise
        except BaseException:
            _leave_scaler(self)
            self._close_step()
            raise
        self._close_step()
        self._count_skipped(skipped)
        if not (isinstance(skipped, int) and skipped):
            self._note_step()

    def _step_bases(self, fused: FusedRestore | None, scale: Tensor | None, found_inf: Tensor | None) -> int | Tensor:
        """The base optimizers' step, in one with the restore where `fused` is given; returns how many were skipped."""
        if fused is not None:
            skipped = fused.step(self._bases, self._perturbation, scale, found_inf)
            self._is_restored()
            return skipped
        with self._perturbation.stepping():
            return step_bases(self._bases, scale, found_inf)

    def _note_step(self) -> None:
        """The base optimizers have stepped: what the variant keeps enters their state, and is saved with it."""
        if self.variant.state_names:
            self._context.store(self._gradients())
        if self.variant.follows_state:
            self._context.look_for_state(self._gradients())

    def _notice_plain_step(self, ascended: bool) -> None:
        """Warns, once, where step() is all that is ever called: trainers that know nothing of SAM do that."""
        if ascended:
            self._plain_steps = 0
        elif self.ascends and self.variant.ascent_pass:
            self._plain_steps += 1
            if self._plain_steps == PLAIN_STEPS:
                warnings.warn(
                    f"SAM: {PLAIN_STEPS} steps in a row were the base optimizer's alone: step() without first_step() or a "
                    "closure perturbs nothing. Use SAMTrainer in transformers, SAMCallback in Lightning, AcceleratedWindow "
                    "in Accelerate, first_step() or step(closure) in your own loop; for plain steps on purpose, interval=",
                    stacklevel=2,
                )

    def _skip(self) -> None:
        """Somebody else has looked at the gradients and left the step out."""
        if self._gradients():
            found_inf = self._judge_step(None, always=True)
            assert found_inf is not None
            self._count_skipped(found_inf.sum())
        self._close_step()

    def _judge_step(self, found_inf: Tensor | None, always: bool = False) -> Tensor | None:
        """Counts the step that is about to be made, and says whether it should be.

        Args:
            found_inf: what GradScaler has found in the second gradients.
            always: look at the gradients of a step without an ascent too, as with `interval`.

        Returns:
            1.0 where a gradient of either pass is not finite, else 0.0; `found_inf` where nobody has to look.
        """
        ascended, norm = self._step.ascended, self._step.squared_norm
        self._guard.disarm()
        self._reducer.know(self._model_groups())
        if ascended or always or (self.interval > 1 and self._counts(ascended)):
            found_inf = self._guard.check(norm, found_inf, [p for group in self._groups() for p in group["params"]])
        self._notice_plain_step(ascended)
        self._count_step(ascended)
        return found_inf

    def _count_skipped(self, skipped: int | Tensor) -> None:
        if isinstance(skipped, Tensor) and isinstance(self._skipped, Tensor):
            self._skipped.add_(skipped)  # in place, so that a captured graph goes on counting
        elif isinstance(skipped, Tensor):
            self._skipped = skipped.double() + self._skipped
        else:
            self._skipped = self._skipped + skipped


@ops.without_grad
def _without_grad(hook: Callable[..., None], *args: Any) -> None:
    hook(*args)


def _leave_scaler(opt: SAM) -> None:
    """Drops what GradScaler.step has set; it does so itself only where the step succeeds."""
    for name in ("grad_scale", "found_inf"):
        vars(opt).pop(name, None)
