"""SAM over an optimizer that its owner steps: what trainers build on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastpost.sam.hooks import is_on_cpu
from fastpost.sam.optimizer import SAM
from fastpost.sam.step import SAMStep


class ExternalSAM(SAM):
    """SAM over the groups of an optimizer that stays what it is and is stepped by its owner.

    Both passes go through this object (a `SAMWindow` drives it); then `finish_step()`, and the owner clips and steps. rho,
    adaptive, eta and the number of steps lie in the optimizer's own groups, so they are per group and are saved with it.

    Steps with a gradient that is not finite are skipped. A GradScaler finds NaN in the gradients and skips them. Without one
    the gradients are dropped, so that the owner's step has nothing to do; for that, one flag is read per step. A fused
    optimizer of weights on an accelerator gets `found_inf` instead, which avoids a device synchronization.

    Args:
        base_optimizer: an instance; over the masters, where `master_params` are given.
        params: the weights of the masters, in their order; None without masters.
        **options: as for SAM.
    """

    def __init__(self, base_optimizer: Optimizer, params: Iterable[Tensor] | None = None, **options: Any) -> None:
        super().__init__(params, base_optimizer, **options)
        base: Any = self.base_optimizer
        if not hasattr(base, "_skipped_by_sam"):
            base.register_step_pre_hook(_before_step)
            base.register_step_post_hook(_after_step)
        self._stepping = contextlib.ExitStack()
        base._skipped_by_sam = False
        base._external_sam = weakref.ref(self)

    def finish_step(self, scaled: bool) -> SAMStep:
        """Ends SAM's part in a step whose gradients are the second pass's; w is back.

        Args:
            scaled: a GradScaler will look at the gradients and skip the step itself.

        Returns:
            The step that is over: whether it `ascended`, and the `sums` of its perturbation.
        """
        step = self._step
        try:
            self._perturbation.take_gradients(scaled)
            found_inf = self._judge_step(None)
        finally:
            self._close_step()
        if found_inf is None:
            return step
        self._count_skipped(found_inf.sum())
        if scaled:
            return step
        base: Any = self.base_optimizer
        if not is_on_cpu(found_inf) and getattr(base, "_step_supports_amp_scaling", False):
            base.grad_scale, base.found_inf, base._skipped_by_sam = None, found_inf, True
        elif bool(found_inf):
            self.zero_grad()
        return step

    def _before_the_owner_steps(self) -> None:
        self._perturbation.take_gradients(scaled=False)  # masters get the gradients as the owner has clipped them
        self._stepping = contextlib.ExitStack()  # a step that was interrupted has left one open
        self._stepping.enter_context(self._perturbation.stepping())

    def _after_the_owner_stepped(self) -> None:
        self._stepping.close()
        self._note_step()


def _before_step(optimizer: Any, *_: Any) -> None:
    sam = optimizer._external_sam()
    if sam is not None:
        sam._before_the_owner_steps()


def _after_step(optimizer: Any, *_: Any) -> None:
    sam = optimizer._external_sam()
    if sam is not None:
        sam._after_the_owner_stepped()
    if optimizer._skipped_by_sam:  # and not by a GradScaler, which clears its own
        del optimizer.grad_scale, optimizer.found_inf
        optimizer._skipped_by_sam = False
