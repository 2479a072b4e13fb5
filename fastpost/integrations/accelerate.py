"""SAM in Hugging Face Accelerate's loop: a window of micro-batches inside `accelerator.accumulate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastpost.distributed import gradient_sync
from fastpost.integrations import COMPUTE_DTYPES, cuts_sequences, shares_each_batch
from fastpost.sam import PassInfo, SAMWindow

try:
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.utils import DistributedType  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError("fastpost.integrations.accelerate needs accelerate: pip install 'fastpost[accelerate]'") from error


class AcceleratedWindow(SAMWindow):
    """Both passes of a SAM step in an Accelerate loop, micro-batch by micro-batch.

    The loop stays the usual one; forward and backward become `window(batch)`::

        opt = fastpost.SAM(model.parameters(), torch.optim.AdamW, lr=2e-5)
        model, opt, loader = accelerator.prepare(model, opt, loader)
        window = AcceleratedWindow(accelerator, model, opt, lambda model, batch: model(**batch).loss)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = window(batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()

    As anywhere in Accelerate, `opt.step()` acts on the last micro-batch of a window only, and each loss counts
    1 / gradient_accumulation_steps, also in a shorter last window of an epoch. Ranks share gradients once per pass, at its
    last micro-batch, unless Accelerate is told `sync_each_batch`. `prepare` wraps the optimizer and hides what SAM adds to
    one; that is at `opt.optimizer` (its `report`, `skipped_steps`, `first_step`). A loop that is left in the middle of a
    window calls `abort()` before it evaluates or goes on. Running statistics of norm layers move in the first passes, unless
    the SAM was made with `norm_stats="both"`.

    Args:
        accelerator: the Accelerator that prepared the model and the optimizer.
        model: as prepared: plain, DistributedDataParallel or FSDP2.
        optimizer: the prepared SAM.
        loss_fn: takes the model and a micro-batch, returns the mean loss as a scalar with its graph.
        ascent_fraction, per_micro_batch, dropout_rng: as for SAMWindow.

    Raises:
        TypeError: `optimizer` is no SAM, or a strategy that SAM cannot serve (DeepSpeed, Megatron, FSDP1).
        ValueError: context parallelism; options that contradict each other.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        ascent_fraction: float | None = None,
        per_micro_batch: bool = False,
        dropout_rng: str | None = None,
    ) -> None:
        served = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
        if accelerator.distributed_type not in served and not accelerator.is_fsdp2:
            raise TypeError(
                f"AcceleratedWindow: {accelerator.distributed_type.value} keeps parameters, gradients or steps where SAM "
                "cannot reach them; use FSDP with fsdp_version=2, or plain data parallelism"
            )
        if cuts_sequences(accelerator):
            raise ValueError(
                "AcceleratedWindow: context parallelism (cp_size > 1) cuts a batch in place in maybe_context_parallel, "
                "where its second pass has to be made too; take SAMTrainer with transformers, or make both passes there "
                "yourself: accelerator.backward(loss); opt.optimizer.first_step(zero_grad=True); "
                "accelerator.backward(loss_again); opt.step()"
            )
        super().__init__(
            optimizer,
            self._loss_and_backward,
            ascent_fraction=ascent_fraction,
            per_micro_batch=per_micro_batch,
            dropout_rng=dropout_rng,
            no_sync=contextlib.nullcontext,  # decided per pass, below
            model=model,
        )
        if self.optimizer.compute_dtype is None and not accelerator.is_fsdp2:  # FSDP2 is asked for its own
            self.optimizer.compute_dtype = COMPUTE_DTYPES.get(accelerator.mixed_precision)
        self.sync_each = shares_each_batch(accelerator)
        self.accelerator, self.model, self._loss_fn = accelerator, model, loss_fn

    def __call__(self, micro_batch: Any) -> Tensor:
        """One micro-batch, inside `accelerator.accumulate(model)`; the window's last one leaves SAM's gradients, at w.

        Returns:
            Its loss, detached, the first time it ran.
        """
        if not self.is_open:
            self.open(self.accelerator.gradient_accumulation_steps)
        if self.accelerator.sync_gradients:  # the last one, maybe because the data ends
            self.shorten()
        elif self.fed + 1 == self.size:
            self.abort()
            raise RuntimeError(
                "AcceleratedWindow: the window is full but Accelerate goes on accumulating; call it once in each `with "
                "accelerator.accumulate(model)`"
            )
        loss: Tensor = self.feed(micro_batch)
        return loss

    def _loss_and_backward(self, micro_batch: Any) -> Tensor:
        loss = self._loss_fn(self.model, micro_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def run_pass(self, micro_batch: Any, info: PassInfo) -> Any:
        """As SAMWindow's; whether the model synchronises is said for each pass."""
        with gradient_sync(self.model, info.sync):
            return self.forward_backward(micro_batch)
