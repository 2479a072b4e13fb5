"""The face of an optimizer that wraps others: its groups, state and checkpoints are theirs."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastpost.ops import params as ops
from fastpost.sam.bases import RADIUS_KEYS, MergedState

# Beside the radius, each group counts the steps taken, so that `interval` and random rounding go on after a resume.
GROUP_KEYS = (*RADIUS_KEYS, "sam_steps")
_KEYS = frozenset(GROUP_KEYS)


class Wrapper(Optimizer):
    """A torch optimizer whose `param_groups` and `state` are those of the optimizers in `_bases`."""

    _bases: list[Optimizer]
    _group_defaults: dict[str, Any]

    def _adopt(self) -> None:
        """Gives every group the keys it lacks and prepares torch's hooks, without a second list of groups."""
        self.defaults = {**self.base_optimizer.defaults, **self._group_defaults}
        for group in self.param_groups:
            check_group(group)
        Optimizer.__setstate__(self, {})
        self._warned_capturable_if_run_uncaptured = True

    @property
    def is_perturbed(self) -> bool:
        raise NotImplementedError

    @property
    def base_optimizer(self) -> Optimizer:
        return self._bases[0]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own groups, so that schedulers act on both.

        Groups that others have added to it (callbacks that unfreeze layers) get rho, adaptive and eta from the constructor.
        """
        if len(self._bases) == 1:
            groups = self.base_optimizer.param_groups
        else:
            groups = [group for base in self._bases for group in base.param_groups]
        for group in groups:
            if not group.keys() >= _KEYS:
                steps = next((g["sam_steps"] for g in groups if "sam_steps" in g), 0)
                for key, value in {**self._group_defaults, "sam_steps": steps}.items():
                    group.setdefault(key, value)
        return groups

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base_optimizer.state if len(self._bases) == 1 else MergedState(self._bases)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the (last) base optimizer; see `Ascent`."""
        self._refuse_while_perturbed("add_param_group()")
        steps = self.param_groups[0]["sam_steps"]
        check_group({**self._group_defaults, **param_group})
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
        _ = self.param_groups  # whoever has added one, all have SAM's keys
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
        known = self.param_groups
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

    def _count_step(self, ascended: bool) -> None:
        # A checkpoint of a fresh optimizer is made after one step at a learning rate of 0: that one does not count.
        groups = self.param_groups
        rates = [group["lr"] for group in groups if "lr" in group]
        if not ascended and rates and all(map(_is_zero, rates)):
            return
        for group in groups:
            group["sam_steps"] += 1

    def _refuse_while_perturbed(self, what: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"SAM: {what} while the weights are perturbed; call second_step(), step() or restore_() first"
            )


def check_group(group: dict[str, Any]) -> None:
    """Raises TypeError or ValueError where a group holds nonsense under one of SAM's keys."""
    ops.check_radius("SAM", group["rho"], group["eta"])
    adaptive, steps = group["adaptive"], group["sam_steps"]
    try:
        known = adaptive in (True, False)
    except (RuntimeError, ValueError):  # a tensor or an array of several
        known = False
    if not known:
        raise TypeError(f"SAM: adaptive must be True or False, not {adaptive!r}")
    ops.check_number("SAM", "sam_steps", steps)
    if int(steps) != steps:
        raise ValueError(f"SAM: sam_steps counts steps, so it must be a whole number, not {steps}")


def _is_zero(rate: float | Tensor | None) -> bool:
    if rate is None:  # Adafactor's, which finds its own
        return False
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return False  # asking would wait for the device
    return float(rate) == 0
