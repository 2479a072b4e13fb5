"""The optimizers that SAM wraps, and the wrapper whose groups, state and checkpoints are theirs."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled as profiler_enabled
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastpost.distributed import local
from fastpost.sam.frameworks import imitate, wrapper_among
from fastpost.sam.options import GROUP_KEYS, RADIUS_KEYS, STEPS_KEY, check_group, fill_groups, refuse_unused_eta
from fastpost.sam.perturbation import MasterPerturbation


def build_bases(
    params: Any, base_optimizer: Any, kwargs: dict[str, Any], masters: MasterPerturbation | None
) -> list[Optimizer]:
    """The wrapped optimizers.

    Raises:
        TypeError, ValueError: what was given is no optimizer, does not fit together, or cannot be wrapped.
    """
    if isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer):
        if params is None:
            raise TypeError("SAM: params are needed to build the base optimizer from its class")
        _check_servable([], base_optimizer)
        base = base_optimizer(params if masters is None else masters.for_base(), **kwargs)
        _check_servable([base], base_optimizer)
        return [base]
    bases = list(base_optimizer) if isinstance(base_optimizer, (list, tuple)) else [base_optimizer]
    if not bases or not all(isinstance(base, Optimizer) for base in bases):
        raise TypeError(
            f"SAM: base_optimizer must be an optimizer class, an instance or a list of instances, not {base_optimizer!r}"
        )
    if any(getattr(base, "is_perturbed", None) is not None for base in bases):
        raise TypeError("SAM: base_optimizer is a SAM itself; pass the optimizer that it wraps")
    if kwargs:
        raise TypeError(f"SAM: {', '.join(kwargs)} would configure a base optimizer that is built already")
    if masters is not None:
        masters.belong_to(bases)
    elif params is not None:
        raise TypeError("SAM: pass None for params when base_optimizer is an instance; it has its own")
    for base in bases:
        _check_servable([base], type(base))
    return bases


def _check_servable(bases: list[Optimizer], cls: type[Optimizer]) -> None:
    """Refuses what SAM cannot wrap, saying what to use instead."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"SAM: {cls.__name__} needs a closure for its own search, and SAM's two passes leave it none. Use an optimizer "
            "whose step() goes without one, such as SGD or AdamW"
        )
    if cls.__name__ == "ZeroRedundancyOptimizer" or cls.__module__.split(".")[0] == "deepspeed":
        raise TypeError(
            f"SAM: {cls.__name__} (ZeRO) keeps gradients or steps where SAM cannot reach them; shard with FSDP2 "
            "(fully_shard), or use DDP"
        )
    for base in bases:
        own = [key for key in RADIUS_KEYS if key in base.defaults]
        if own:
            raise TypeError(
                f"SAM: {cls.__name__} has an option {own[0]!r} of its own, which would be taken for SAM's in its "
                "groups; use another base optimizer, such as SGD or AdamW"
            )
        for p in (p for group in base.param_groups for p in group["params"]):
            if getattr(p, "_fsdp_flattened", False):
                raise TypeError("SAM: FSDP1 keeps parameters in flat buffers of its own; use FSDP2 (fully_shard) instead")
            if hasattr(p, "ds_id"):
                raise TypeError("SAM: DeepSpeed's ZeRO has partitioned these parameters; use FSDP2 (fully_shard) instead")


class MergedState(MutableMapping[Tensor, Any]):
    """The states of several base optimizers as one mapping; each entry lives in its owner's."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self._bases = bases
        self._owner = {id(p): base for base in bases for group in base.param_groups for p in group["params"]}

    def __getitem__(self, p: Tensor) -> Any:
        return self._owner[id(p)].state[p]

    def __contains__(self, p: object) -> bool:
        return id(p) in self._owner and p in self._owner[id(p)].state  # without making an entry, as reading would

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._owner[id(p)].state[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._owner[id(p)].state[p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for base in self._bases for p in base.state)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)


def _refused(self: list[Any], *args: Any, **kwargs: Any) -> Any:
    raise TypeError(
        "SAM: this list joins the groups of several base optimizers, and changing it would change none of them. Call "
        "add_param_group(group), or change param_groups of the base optimizer whose group it is; the groups themselves may "
        "be written to"
    )


class JoinedGroups(list[dict[str, Any]]):
    """The groups of several base optimizers, to read and to write into; the list itself cannot be changed. A copy of it is a
    plain list."""

    append = extend = insert = pop = remove = clear = sort = reverse = _refused
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refused

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)


def step_bases(bases: Sequence[Optimizer], scale: Tensor | None, found_inf: Tensor | None) -> int | Tensor:
    """Lets every base optimizer step, unless a gradient is not finite; returns how many steps were skipped.

    Args:
        bases: the wrapped optimizers.
        scale: GradScaler's factor, still on the gradients; None where there is none or it has come off.
        found_inf: 0 or 1, float32; None where nobody has looked. Base optimizers that take it decide on the device; for
            others it is read here.
    """
    if found_inf is None:
        for base in bases:
            step_alone(base)
        return 0
    if not found_inf.is_cpu and all(getattr(base, "_step_supports_amp_scaling", False) for base in bases):
        for base in cast("list[Any]", bases):
            base.grad_scale, base.found_inf = scale, found_inf
            try:
                step_alone(base)
            finally:
                del base.grad_scale, base.found_inf
        return found_inf.sum()
    if found_inf.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "SAM: in a CUDA graph nobody can read whether a gradient overflowed; use a base optimizer that decides on the "
            "device, such as AdamW(fused=True, capturable=True)"
        )
    if bool(found_inf):
        return 1
    for base in bases:
        if scale is not None:
            grads = [local(p.grad) for group in base.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(grads, scale)
        step_alone(base)
    return 0


# torch wraps the step of every class of optimizers, with hooks and a range for profilers, which takes as long as several
# small kernels. Where nobody listens the wrapped function is called at once.

Step = TypeVar("Step", bound=Callable[..., Any])
_WRAPPED_BY_TORCH = Optimizer.profile_hook_step(lambda: None).__code__


def listened(optimizer: Any) -> bool:
    """Whether somebody listens to this optimizer's steps: hooks of its own or of all optimizers, a profiler.

    Observers of the whole process (a standalone `torch.profiler.ExecutionTraceObserver`) do not show here: torch has no
    query for them. They see the step's operations without the range `Optimizer.step#...`.
    """
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or profiler_enabled())


def hooked(step: Step) -> Step:
    """`step` as torch wraps that of every optimizer."""
    through_torch = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (through_torch if listened(self) else step)(self, *args, **kwargs)

    called.hooked = True  # type: ignore[attr-defined]  # torch wraps it no more
    return cast("Step", called)


def step_alone(base: Optimizer) -> None:
    """`base.step()`; what others have put around it, on the object or in its class, is called as well."""
    step: Any = type(base).step
    if "step" in vars(base) or getattr(step, "__code__", None) is not _WRAPPED_BY_TORCH or listened(base):
        base.step()
    else:
        step.__wrapped__(base)


class Wrapper(Optimizer):
    """A torch optimizer whose `param_groups` and `state` are those of the optimizers in `_bases`."""

    _bases: list[Optimizer]
    _group_defaults: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Classes that Lightning and Fabric derive, to put a wrapper around an instance, pass on to the wrapped one."""
        super().__init_subclass__(**kwargs)
        wrapper = wrapper_among(cls.__bases__, Wrapper)
        if wrapper is not None:
            imitate(cls, wrapper)

    def _adopt(self) -> None:
        """Gives every group the keys it lacks and prepares torch's hooks, without a second list of groups."""
        self.defaults = {**self.base_optimizer.defaults, **self._group_defaults}
        for group in self._groups():
            check_group(group)
        Optimizer.__setstate__(self, {})
        self._warned_capturable_if_run_uncaptured = True

    @property
    def is_perturbed(self) -> bool:
        raise NotImplementedError

    def _groups_are_read(self) -> None:
        """Called whenever somebody asks for the groups, maybe to look at the gradients of their parameters."""

    @property
    def base_optimizer(self) -> Optimizer:
        return self._bases[0]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own groups, so that schedulers act on both.

        Groups that others have added to it (callbacks that unfreeze layers) get rho, adaptive and eta from the constructor.
        With several base optimizers the list joins theirs: groups may be written to, but none added or taken away.
        """
        self._groups_are_read()
        groups = self._groups()
        return groups if len(self._bases) == 1 else JoinedGroups(groups)

    @param_groups.setter
    def param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        self._refuse_while_perturbed("setting param_groups")
        parts = self._shared_groups(groups)
        self._admit(groups)
        for base, part in zip(self._bases, parts, strict=True):
            base.param_groups = part

    def _groups(self) -> list[dict[str, Any]]:
        """`param_groups` for our own use."""
        if len(self._bases) == 1:
            groups = self._bases[0].param_groups
        else:
            groups = [group for base in self._bases for group in base.param_groups]
        known = self._group_defaults.keys()
        for group in groups:
            if not group.keys() >= known:
                steps = next((group[STEPS_KEY] for group in groups if STEPS_KEY in group), 0)
                fill_groups(groups, **{**self._group_defaults, STEPS_KEY: steps})
        return groups

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Tensor, Any]:
        """The base optimizer's own state."""
        return self.base_optimizer.state if len(self._bases) == 1 else MergedState(self._bases)

    @state.setter
    def state(self, state: MutableMapping[Tensor, Any]) -> None:
        self._refuse_while_perturbed("setting state")
        for base, part in zip(self._bases, self._shared_state(state, self._groups()), strict=True):
            base.state = part

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any optimizer's; `state` and `param_groups` are handed to the base optimizers' own `__setstate__`."""
        own = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
        Optimizer.__setstate__(self, own)
        if len(own) == len(state):
            return
        self._refuse_while_perturbed("__setstate__()")
        parts: list[dict[str, Any]] = [{} for _ in self._bases]
        groups = state.get("param_groups", self._groups())
        if "param_groups" in state:
            for part, shared in zip(parts, self._shared_groups(groups), strict=True):
                part["param_groups"] = shared
        if "state" in state:
            for part, moments in zip(parts, self._shared_state(state["state"], groups), strict=True):
                part["state"] = moments
        if "param_groups" in state:
            self._admit(groups)
        for base, part in zip(self._bases, parts, strict=True):
            base.__setstate__(part)

    def _admit(self, groups: Sequence[dict[str, Any]]) -> None:
        """Checks groups that take the place of the present ones; they go on counting where these are."""
        for group in groups:
            check_group({**self._group_defaults, **group})
        fill_groups(groups, **{**self._group_defaults, STEPS_KEY: self._groups()[0][STEPS_KEY]})

    def _shared_groups(self, groups: Sequence[dict[str, Any]]) -> list[Any]:
        """The groups, for each base optimizer its own."""
        if len(self._bases) == 1:
            return [groups]
        if len(groups) != len(self._groups()):
            raise ValueError(
                f"SAM: {len(groups)} parameter groups for {len(self._bases)} base optimizers with {len(self._groups())} "
                "groups in all: which is whose? Set them at the base optimizers themselves, or use add_param_group()"
            )
        rest, parts = list(groups), []
        for base in self._bases:
            count = len(base.param_groups)
            parts.append(rest[:count])
            rest = rest[count:]
        return parts

    def _shared_state(self, state: Mapping[Tensor, Any], groups: Sequence[dict[str, Any]]) -> list[Any]:
        """The state, for each base optimizer that of the parameters in its groups."""
        if len(self._bases) == 1:
            return [state]
        owned = [{id(p) for group in part for p in group["params"]} for part in self._shared_groups(groups)]
        stray = [p for p in state if not any(id(p) in mine for mine in owned)]
        if stray:
            raise ValueError(
                f"SAM: the state has {len(stray)} entries of tensors that no base optimizer holds; leave them out"
            )
        return [defaultdict(dict, {p: v for p, v in state.items() if id(p) in mine}) for mine in owned]

    if not TYPE_CHECKING:  # or every name would be known of every wrapper

        def __getattr__(self, name: str) -> Any:
            """Public methods of the base optimizer that no torch optimizer has to have, such as `train` and `eval`.

            They may write weights, so they wait for the step to be over. Of several base optimizers all that have it are
            asked, and the results are a list.
            """
            bases = () if name.startswith("_") else self.__dict__.get("_bases", ())
            found = [method for base in bases if callable(method := getattr(base, name, None))]
            if not found:
                known = any(hasattr(base, name) for base in bases)
                hint = f"; the base optimizer's is at .base_optimizer.{name}" if known else ""
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

            @functools.wraps(found[0])
            def passed_on(*args: Any, **kwargs: Any) -> Any:
                self._refuse_while_perturbed(f"{name}()")
                results = [method(*args, **kwargs) for method in found]
                return results[0] if len(results) == 1 else results

            return passed_on

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the (last) base optimizer; see `SAM`."""
        self._refuse_while_perturbed("add_param_group()")
        steps = self._groups()[0]["sam_steps"]
        check_group({**self._group_defaults, **param_group})
        refuse_unused_eta(param_group, self._group_defaults["adaptive"])
        self._bases[-1].add_param_group(param_group)
        self._bases[-1].param_groups[-1].update(sam_steps=steps)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's layout, with rho, adaptive, eta and the number of steps in its groups.

        Raises:
            RuntimeError: the weights are perturbed; a checkpoint taken now would hold the wrong ones.
        """
        self._refuse_while_perturbed("state_dict()")
        if len(self._bases) > 1:
            return super().state_dict()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._groups()  # whoever has added one, all have SAM's keys
        state = self.base_optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of SAM or of the plain base optimizer; keys that are missing keep their values.

        The base optimizer loads it itself: 8-bit ones must not have their state cast as torch would.

        Raises:
            TypeError, ValueError: groups do not fit, or hold nonsense under one of SAM's keys. Nothing has been loaded.
        """
        self._refuse_while_perturbed("load_state_dict()")
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups, moments = list(state_dict["param_groups"]), state_dict["state"]
        known = self._groups()
        if len(groups) != len(known):
            raise ValueError(f"SAM: the state has {len(groups)} parameter groups, this optimizer {len(known)}")
        for i, (old, group) in enumerate(zip(known, groups, strict=True)):
            if len(old["params"]) != len(group["params"]):
                saved, own = len(group["params"]), len(old["params"])
                raise ValueError(f"SAM: group {i} of the state has {saved} parameters, this optimizer's {own}")
            check_group({**{key: old[key] for key in GROUP_KEYS}, **group})
        for base in self._bases:
            mine, groups = groups[: len(base.param_groups)], groups[len(base.param_groups) :]
            kept = [{key: old[key] for key in GROUP_KEYS} for old in base.param_groups]
            filled = [{**defaults, **group} for defaults, group in zip(kept, mine, strict=True)]
            owned = {p for group in mine for p in group["params"]}
            state = moments if len(self._bases) == 1 else {k: v for k, v in moments.items() if k in owned}
            base.load_state_dict({**state_dict, "state": state, "param_groups": filled})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _counts(self, ascended: bool) -> bool:
        """Whether a step counts, and is looked at: not a plain one at a learning rate of 0."""
        # To make a checkpoint torch.distributed steps an optimizer without state at a learning rate of 0, SGD each time.
        # Such a step does not count, nor does a plain one of the loop's own at 0: on a rank that holds no state they look
        # alike, and ranks have to count alike, or some would ascend alone.
        rates = [group["lr"] for group in self._groups() if "lr" in group]
        return ascended or not rates or not all(map(_is_zero, rates))

    def _count_step(self, ascended: bool) -> None:
        if self._counts(ascended):
            for group in self._groups():
                group["sam_steps"] += 1

    def _refuse_while_perturbed(self, what: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"SAM: {what} while the weights are perturbed; call second_step(), step() or restore_() first"
            )


def _is_zero(rate: float | Tensor | None) -> bool:
    if rate is None:  # Adafactor's, which finds its own
        return False
    if isinstance(rate, Tensor) and not rate.is_cpu:
        return False  # asking would wait for the device
    return float(rate) == 0
