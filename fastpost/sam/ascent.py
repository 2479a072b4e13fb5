"""The state of a SAM step between its two passes: what is perturbed, by what, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpost.rng import accelerators
from fastpost.sam.buckets import BucketCache, ParameterBucket, Reduction, WeightsChanged, total_squared_norm
from fastpost.sam.fused import FusedRestore
from fastpost.sam.hooks import EarlyRewriting, OverflowGuard
from fastpost.sam.masters import Masters
from fastpost.sam.norm_stats import NormStats
from fastpost.sam.options import ScopeCache
from fastpost.sam.perturbation import Perturbation, Term
from fastpost.sam.variants import Gradients, Memory, Variant
from fastpost.sam.wrapper import Wrapper, check_group


class Ascent(Wrapper):
    """A wrapped optimizer that can perturb its parameters by their gradients and restore them."""

    variant: Variant
    interval: int
    compute_dtype: torch.dtype | None
    cycle: int
    _scope: ScopeCache
    _masters: Masters | None
    _masters_fit: bool
    _reduction: Reduction
    _perturbation: Perturbation
    _fused: FusedRestore | None
    _clean: Gradients
    _combined: bool
    _norm_stats: NormStats | None
    in_window: bool
    _ascents: int
    _tensors_at_ascent: int
    _awaits_second: bool
    _sums: Tensor | None
    _elements: int

    def _empty_caches(self) -> None:
        self._ascent_buckets = BucketCache(self._perturbation.stash, self._reduction)
        self._finite_buckets = BucketCache(False, self._reduction, reads_only=True)
        self._guard = OverflowGuard(self._reduction)
        self._memory = Memory(
            self._reduction, lambda: self.state, self.tensors, lambda: maximized(self._groups()), self.variant.state_names
        )
        self._early = EarlyRewriting(self._rewrites_arrivals, self._gradients, self._combine)
        self._watch()

    @torch.no_grad()
    def end_ascent(self) -> None:
        """Ends the second pass: lets the variant rewrite its gradients, where the end of the backward pass has not, and
        restores w. Then a step may follow.

        `perturbed()` and windows call it; so does a step, where it has not been called. Gradients that were assigned by hand
        (`torch.autograd.grad`) are rewritten here only: with a variant, call it before you clip those.

        Raises:
            RuntimeError: weights are of another dtype, shape or device than those that were perturbed. Nothing was done;
                `abandon()` gives the step up.
        """
        if self._perturbation.active:
            self._check_perturbed()
        try:
            if not self._combined and not self._early.done:
                self._combine()
            self._combined = True
            self._clean = {}
        finally:
            if self.is_perturbed:
                self.restore_()

    def _check_perturbed(self) -> bool:
        """Whether the perturbed weights are laid out as they were.

        Raises:
            WeightsChanged: w does not fit into them exactly, or the groups hold others. Nothing was written.
        """
        tensors = self.tensors()
        here = set(map(id, tensors))
        if len(tensors) >= self._tensors_at_ascent and any(id(p) not in here for p in self._perturbation.params):
            raise WeightsChanged(
                "SAM: parameters in the optimizer's groups were exchanged between the two passes, and copies of them hold "
                "w + e. opt.abandon() puts w back into those that were perturbed and gives this step up; "
                "exchange parameters between steps, not between the two passes"
            )
        return self._perturbation.check_weights(self._reduction)

    def abandon(self) -> None:
        """Gives the step up: w is back and the gradients are dropped. After any error or interrupt training may go on.

        Weights that have changed their dtype or device since they were perturbed get w converted; where they have changed
        their shape, w in its own.
        """
        self._guard.forget()
        self._memory.forget()
        self._close_step()
        self._put_back(convert=True)
        self.zero_grad()

    def _close_step(self) -> None:
        """The step is over, made or given up; what is known of it does not concern the next one."""
        self._combined = False
        self._clean = {}
        self._early.forget()
        self._ascents = 0
        self.cycle += 1
        self.variant.forget()
        self._watch()

    def restore_(self) -> None:
        """Puts w back, bit for bit, into the same storage, and makes no step. Without a perturbation it does nothing.

        Weights that were moved in between are followed, also into another memory format.

        Raises:
            RuntimeError: as `end_ascent`.
        """
        self._put_back(convert=False)

    @torch.no_grad()
    def _put_back(self, convert: bool) -> None:
        try:
            self._perturbation.undo(self._reduction, convert)
            if self._masters is not None and self._masters.behind:
                self._masters.cast()
        finally:
            self._awaits_second = self._perturbation.active
            self.settle_norm_stats()

    def settle_norm_stats(self) -> None:
        """Second passes are over for now: running statistics are those of the first passes again, and may move on."""
        if self._norm_stats is not None:
            self._norm_stats.put_back()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients; between the two passes too, an ascent that overflowed stays known."""
        super().zero_grad(set_to_none)
        if self._masters is not None:
            self._masters.zero_grad(set_to_none)
        self._early.forget()
        if self.is_perturbed:
            self._guard.rearm(self.tensors)
        else:
            self.cycle += 1
            self._combined = False
            self._clean = {}
            self._guard.forget()  # what was known of a step that is not made
            self._memory.forget()

    @property
    def is_perturbed(self) -> bool:
        """Whether a first step waits for its second, or a step that was interrupted for `abandon()` or `restore_()`."""
        behind = self._masters is not None and self._masters.behind
        return self._awaits_second or self._perturbation.active or behind

    @property
    def ascends(self) -> bool:
        """Whether the coming step perturbs; with `interval` only some do."""
        return bool(self._groups()[0]["sam_steps"] % self.interval == 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the (last) base optimizer; rho, adaptive and eta default to the constructor's.

        Raises:
            ValueError, TypeError: rho or eta is no finite number >= 0, adaptive no truth value; with `master_params`, or
                where the parameters cannot be perturbed as this optimizer does it. The group is not added.
        """
        if self._masters is not None:
            raise ValueError("SAM: add_param_group() knows no masters; build SAM anew with the masters of all parameters")
        super().add_param_group(param_group)
        try:
            self._perturbation.check(self._in_scope())
        except BaseException:
            del self._bases[-1].param_groups[-1]
            raise
        self._watch()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of SAM or of the plain base optimizer; keys that are missing keep their values."""
        super().load_state_dict(state_dict)
        self._masters_fit = False

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("copying or pickling")
        # A scheduler or Accelerate may have put a `step` around ours, by which a copy would step this optimizer. The flag is
        # for GradScaler, and there where a wrapper steps it.
        wrapped = ("step", "_step_supports_amp_scaling")
        left_out = ("_ascent_buckets", "_finite_buckets", "_guard", "_memory", "_early", *wrapped)
        fused = None if self._fused is None else FusedRestore()  # its buckets point at these parameters
        return {**{key: value for key, value in self.__dict__.items() if key not in left_out}, "_fused": fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_perturbation" in state:
            self._empty_caches()

    def accelerators(self) -> list[torch.device]:
        """The devices, other than the CPU, whose generators the passes draw from."""
        return accelerators(self.tensors())

    def tensors(self) -> list[Tensor]:
        """All parameters that the model computes with, in or out of scope."""
        return [p for group in self._model_groups() for p in group["params"]]

    def _model_groups(self) -> list[dict[str, Any]]:
        """The groups with the tensors that the model computes with, which masters are not."""
        groups = self._groups()
        return groups if self._masters is None else self._masters.groups_of_weights(groups)

    def _in_scope(self) -> list[Tensor]:
        ids = self._scope.ids(self._model_groups())
        return [p for p in self.tensors() if ids is None or id(p) in ids]

    def _refuse_a_second_ascent(self) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                "SAM: first_step() was called twice; second_step() or step() comes in between, or abandon() after an "
                "interrupt. (Accelerate lets step() through only once while it accumulates: there use AcceleratedWindow, or "
                "SAMWindow)"
            )

    def _groups_are_read(self) -> None:
        # GradScaler asks for the groups and then looks at the gradients. Where the second gradient was assigned by hand no
        # hook of ours has run, so this is the last moment at which it can be marked; and the only one, because the scaler
        # decides by what it sees in gradients alone. Nothing happens unless an ascent awaits its second gradient and may
        # have overflowed.
        guard = self.__dict__.get("_guard")
        if guard is not None and guard.waits:
            guard.plant_in(self.tensors)

    def _watch(self) -> None:
        """Has the variant rewrite gradients as they come."""
        variant = type(self.variant)
        if self.variant.rewrites and (variant.descend, variant.between) != (Variant.descend, Variant.between):
            self._early.watch(self.tensors())

    def _rewrites_arrivals(self) -> bool:
        """Whether gradients that arrive now are this step's last and not a window's, which knows its end itself."""
        if self.in_window:
            return False
        if self.is_perturbed:
            return self._guard.armed and type(self.variant).descend is not Variant.descend
        return not self.ascends and type(self.variant).between is not Variant.between

    def _gradients(self) -> Gradients:
        """This rank's part of every gradient present that is dense and real; others a variant leaves as they are."""
        found = ((p, self._reduction.gradient(p)) for p in self.tensors())
        return {p: g for p, g in found if g is not None and g.layout == torch.strided and g.is_floating_point()}

    def _perturb(self) -> None:
        for group in self._groups():  # schedules and loaded states write there
            check_group(group)
        self._tensors_at_ascent = len(self.tensors())
        variant, gradient = self.variant, None
        if type(variant).direction is not Variant.direction:
            gradient = self._direction()
        groups = self._model_groups()
        with self._ascent_buckets.of(groups, self._scope.ids(groups), gradient) as buckets:
            if buckets:
                self._perturb_along(groups, buckets)
            elif variant.ascent_pass:
                raise RuntimeError("SAM: no parameter (in scope) has a gradient; call backward() before the ascent")

    def _direction(self) -> Callable[[Tensor], Tensor | None]:
        """What the variant follows for each tensor. Gradients that it does not see stand for themselves, to be refused."""
        seen = self._gradients()
        direction = self.variant.direction(self._memory, seen)
        return lambda p: direction.get(p) if p in direction or p in seen else self._reduction.gradient(p)

    def _perturb_along(self, groups: list[dict[str, Any]], buckets: list[ParameterBucket]) -> None:
        variant = self.variant
        terms = []
        for b in buckets:
            group = groups[b.group]
            rho = float(group["rho"])
            if group.get("maximize", False):  # the base optimizer minimises -L
                rho = -rho
            terms.append(Term(rho, float(group["eta"]) if group["adaptive"] else None, self._seen(b)))
        squared = norm = total_squared_norm(buckets, [term.eta for term in terms], self._reduction)
        radius = variant.radius()
        if radius is not None:  # rho d / |g| is rho / sqrt(|g|^2 / d^2); where d is 0 nothing moves
            radius = radius.to(squared.device, torch.float64)
            norm, squared = squared + 0 * radius, squared / radius.square()
        if variant.keeps_gradient:
            self._clean = {p: g.clone() for p, g in self._gradients().items()}
        if self._masters is not None and not self._masters_fit:
            self._masters.check()
            self._masters_fit = True
        self._perturbation.number = self._groups()[0]["sam_steps"] * 2**20 + self._ascents
        self._ascents += 1
        self._sums = self._perturbation.apply(buckets, terms, squared, self._reduction)
        self._elements = sum(b.elements_everywhere for b in buckets)
        self._guard.saw(norm, self.tensors)

    def _seen(self, b: ParameterBucket) -> torch.dtype:
        device = b.bucket.device.type
        if self.compute_dtype is not None:
            return self.compute_dtype
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self._reduction.computes_in(b.params) or b.bucket.dtype

    def _combine(self) -> None:
        """Lets the variant rewrite the gradients of this step."""
        variant, ascended = self.variant, self._guard.armed
        if ascended and type(variant).descend is not Variant.descend:
            if variant.scales_must_agree and hasattr(self, "found_inf") and getattr(self, "grad_scale", None) is None:
                raise RuntimeError(
                    f"SAM: {type(variant).__name__} combines the gradients of both passes, of which unscale_() has rescaled "
                    "one; call opt.end_ascent() after the second pass, and unscale after it"
                )
            variant.descend(self._memory, self._clean, self._gradients())
        elif not self.ascends and type(variant).between is not Variant.between:
            variant.between(self._memory, self._gradients())


def maximized(groups: list[dict[str, Any]]) -> set[int]:
    """Ids of the tensors whose loss the base optimizer maximises."""
    return {id(p) for group in groups if group.get("maximize", False) for p in group["params"]}
