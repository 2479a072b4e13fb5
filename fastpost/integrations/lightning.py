"""SAM in Lightning's automatic optimisation: one callback, the optimizer stays the module's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastpost.errors import unknown
from fastpost.integrations.options import METHODS, PostTrainingOptions
from fastpost.integrations.stand_ins import refuse_early
from fastpost.sam import SAM, BeforePass, ExternalSAM, PassInfo, SAMWindow, find_sam

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise ImportError("fastpost.integrations.lightning needs lightning: pip install 'fastpost[lightning]'") from error

# Keywords of SAM that say who owns what, which here is Lightning and the module.
NOT_SERVED = frozenset(
    {"params", "base_optimizer", "master_params", "model", "fused_restore", "norm_group", "sync_ascent", "kwargs"}
)
# Options about what Lightning does itself, with the value that asks for nothing, and what to do.
NOT_HERE = {
    "sam_masters": (
        False,
        (
            "Lightning fills the optimizer from a checkpoint before a callback can put masters into it; load float32 "
            "weights under precision='bf16-mixed', or return fastpost.SAM(..., master_params=...) from configure_optimizers"
        ),
    ),
    "sam_per_micro_batch": (
        False,
        (
            "Lightning adds up the gradients of a window itself, so that no micro-batch has its own; take "
            "accumulate_grad_batches=1, or a plain loop with SAMWindow"
        ),
    ),
    "sam_functional_path": (
        False,
        (
            "a callback does not know which layer of a module makes the logits; in a plain loop say "
            "fastpost.sam.FunctionalSAM(opt).watch(head)"
        ),
    ),
    "sam_sync_ascent": (
        None,
        (
            "the callback averages the ascent gradient over processes in any case; leave it out, or use a plain loop with "
            "SAMWindow"
        ),
    ),
}
COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class MicroBatch(NamedTuple):
    """What a second pass needs: the batch, and what `training_step` is given beside it."""

    batch: Any
    further: tuple[Any, ...]


class SAMCallback(Callback):
    """SAM for any LightningModule under automatic optimisation::

        trainer = Trainer(callbacks=[SAMCallback(rho=0.05)], accumulate_grad_batches=4, gradient_clip_val=1.0)

    A step is SAM's over the whole accumulation window, as in `fastpost.SAMWindow`: after the backward pass of the ascent's
    last micro-batch the weights become w + e and the ascent's micro-batches run again (`training_step` is called once more
    with the same batch); after the window's last one w is back, and Lightning unscales, clips and steps with the gradients
    of the second pass. The optimizer of `configure_optimizers` stays as it is, which clipping under fp16 insists on; its
    parameter groups hold rho, adaptive and eta, which are saved with it.

    Logged are `sam/seen_over_intended`, `sam/seen_cosine` (see PerturbationReport) and `sam/skipped_steps`. What
    `training_step` logs is kept from its first run; torchmetrics objects that it updates see the batches of the ascent
    twice. Of the module's hooks only `training_step` and `backward` run again: what `on_train_batch_start` does to a batch,
    there or in other callbacks, is in both passes. A `training_step` that changes its batch's tensors in place is an error.

    Under DDP the ascent uses the mean gradient of all ranks.

    Args:
        options: PostTrainingOptions, such as `PostTrainingOptions(sam_variant="gsam:alpha=0.2")`, for options of a command
            line or a file; or leave it out and give
        **keywords: as for `fastpost.SAM`: rho, adaptive, eta, ascent_fraction, interval, scope, dropout_rng, rounding,
            rounding_seed, compute_dtype, perturb, stash, norm, norm_stats, variant.

    Attributes:
        options: the PostTrainingOptions, or None; keywords: those of `fastpost.SAM`. What is put in their place, or changed
            in them, holds from the next `fit` on.
        sam: the SAM over the module's optimizer; None before the first batch.

    Raises:
        ValueError: options and keywords at once; options of R3F; manual optimisation, a strategy that shards (use FSDP2 in a
            plain loop), options of SAM out of range.
        RuntimeError: a `training_step` that returned None, or changed its batch in place; a checkpoint or a validation in
            the middle of a window, while the weights are w + e.
    """

    def __init__(self, options: PostTrainingOptions | None = None, **keywords: Any) -> None:
        if options is not None and not isinstance(options, PostTrainingOptions):
            raise TypeError(
                f"SAMCallback: options must be PostTrainingOptions, not {type(options).__name__}; the keywords of "
                "fastpost.SAM go by their names, as rho=0.05"
            )
        if options is not None and keywords:
            raise ValueError(
                f"SAMCallback: options say all of SAM already; leave {', '.join(keywords)} out, or give keywords alone"
            )
        served = inspect.signature(SAM.__init__).parameters
        for name in keywords:
            if name == "norm_group":
                raise ValueError(
                    "SAMCallback: norm_group is for parameters that other ranks do not have, and the callback shares all "
                    "gradients with all ranks; take a plain loop, or override SAMTrainer.sam_norm_group with transformers"
                )
            if name not in served or name in NOT_SERVED:
                raise unknown("option of SAMCallback", name, sorted(set(served) - NOT_SERVED - {"self"}))
        self.options, self.keywords = options, keywords
        self._judge()
        self.sam: ExternalSAM | None = None
        self._window: _Window | None = None
        self._current: BeforePass | None = None
        self._unwatch: Callable[[], None] | None = None  # until the batch's first pass begins

    def _judge(self) -> None:
        """Refuses what cannot be served, before there is a model."""
        options = self.options
        if options is not None:
            options.check()
            if options.method not in (None, "none") and METHODS[options.method] != {"sam"}:
                raise ValueError(
                    f"SAMCallback does SAM, not method={options.method!r}; a loss such as R3F's is the module's own: call "
                    "options.build_r3f() in its training_step"
                )
            options.refuse_unused(METHODS[options.method or "sam"], "SAMCallback")
            for name, (usual, why) in NOT_HERE.items():
                if getattr(options, name) != usual:
                    raise ValueError(f"SAMCallback: {name}={getattr(options, name)!r}: {why}")
        keywords = self._sam_keywords(None)
        refuse_early(keywords)
        variant = keywords.get("variant")
        if variant is not None and not variant.ascent_pass:
            raise ValueError(
                f"SAMCallback: {type(variant).__name__} perturbs before the first pass, which Lightning has made before a "
                "callback is asked; use it in a plain loop"
            )

    def _sam_keywords(self, module: LightningModule | None, scaler: Any = None) -> dict[str, Any]:
        if self.options is None:
            return dict(self.keywords)
        return self.options.sam_keywords(module, loss_scale=None if scaler is None else scaler.get_scale)

    @property
    def _is_off(self) -> bool:
        return self.options is not None and self.options.method == "none"

    # -- one micro-batch after another ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("SAMCallback: manual optimisation has no window to act on; call fastpost.SAM in training_step")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"SAMCallback: {type(trainer.strategy).__name__} is not served, only a single device and DDP; for sharded "
                "models use FSDP2 in a plain loop or in Accelerate (docs/distributed.md)"
            )
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError("SAMCallback: training_step takes the iterator of its loader; SAM has to run a batch twice")
        if not trainer.optimizers or not trainer.optimizers[0].param_groups:
            raise ValueError("SAMCallback: configure_optimizers gave no optimizer, and there is nothing to step from w")
        if find_sam(trainer.optimizers[0]) is not None:
            raise ValueError(
                "SAMCallback: configure_optimizers gave a fastpost.SAM, whose passes this callback makes; return the plain "
                "optimizer there, or leave the callback out"
            )
        if any(isinstance(c, SAMCallback) and c is not self for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("SAMCallback: two of them would make every pass twice; leave one out")
        self._forget()
        self.sam = self._window = None
        if self._is_off:
            return
        self._judge()  # the options may be others than at construction
        precision = trainer.precision_plugin
        keywords = self._sam_keywords(pl_module, getattr(precision, "scaler", None))
        if keywords.get("compute_dtype") is None:
            keywords["compute_dtype"] = COMPUTE_DTYPES.get(getattr(precision, "precision", ""))
        self.sam = ExternalSAM(trainer.optimizers[0], **{**keywords, "model": pl_module})
        self._window = _Window(self.sam, trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        window = self._window
        if self._is_off or trainer.fit_loop._skip_backward:  # as StochasticWeightAveraging's last epoch, for batch norms
            return
        assert window is not None
        if not window.is_open:
            window.open(trainer.accumulate_grad_batches)
        self._watch(trainer.strategy, window)

    def _watch(self, strategy: Any, window: SAMWindow) -> None:
        """Notes what the first pass begins with as it begins: the hooks of other callbacks and of the module, which may
        change the batch or draw random numbers, run before it and after this callback's own."""
        training_step, own = strategy.training_step, vars(strategy).get("training_step")

        def first_pass(batch: Any, *further: Any) -> Any:
            if self._unwatch is not unwatch:  # of a batch that is over
                return training_step(batch, *further)
            unwatch()
            kept = copy.copy(batch) if isinstance(batch, (Mapping, list)) else batch
            self._current = window.before(MicroBatch(kept, further))
            return training_step(batch, *further)

        def unwatch() -> None:
            self._unwatch = None
            if vars(strategy).get("training_step") is not first_pass:
                return  # somebody has put another around it, which is theirs
            del strategy.training_step
            if own is not None:  # somebody else's
                strategy.training_step = own

        strategy.training_step, self._unwatch = first_pass, unwatch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        window, before = self._window, self._current
        if self._is_off:
            return
        assert window is not None
        assert self.sam is not None
        if before is None:
            raise RuntimeError("SAMCallback: backward() outside of a training batch")
        self._current = None
        if not trainer.fit_loop._should_accumulate():  # the last one, maybe because the epoch ends
            window.shorten()
        window.feed(before.micro_batch, before)
        if window.is_open:
            return
        self.sam.finish_step(scaled=getattr(trainer.precision_plugin, "scaler", None) is not None)
        self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        assert self.sam is not None
        report = self.sam.report
        if report is None:
            return
        intended = report.intended_norm
        share = torch.where(intended > 0, report.seen_norm / intended, torch.zeros_like(intended))
        skipped = self.sam.skipped
        values = {"seen_over_intended": share, "seen_cosine": report.seen_cosine, "skipped_steps": skipped}
        for name, value in values.items():
            pl_module.log(f"sam/{name}", value.float(), on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._current is not None or self._unwatch is not None:  # no backward pass was made
            self._forget()
            raise RuntimeError(
                "SAMCallback: training_step returned None; a batch without a loss has no place in SAM's window"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()  # a module's on_train_batch_start may end an epoch anywhere

    # -- around it --------------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_while_perturbed("validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._refuse_while_perturbed("a checkpoint")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()

    def _refuse_while_perturbed(self, what: str) -> None:
        if self.sam is not None and self.sam.is_perturbed:
            self._forget()
            raise RuntimeError(
                f"SAMCallback: {what} in the middle of an accumulation window would take w + e for the model; let it come "
                "after a step (a multiple of accumulate_grad_batches), or leave ascent_fraction at 1"
            )

    def _forget(self) -> None:
        """Whatever happens, nobody sees w + e outside of a window."""
        self._current = None
        if self._unwatch is not None:
            self._unwatch()
        if self._window is not None and self._window.is_open:
            self._window.abort()


class _Window(SAMWindow):
    """A window whose first passes Lightning makes; only the second ones are made here."""

    optimizer: ExternalSAM

    def __init__(self, optimizer: ExternalSAM, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(optimizer, self._again)
        self.trainer, self.module = trainer, module

    def run_pass(self, micro_batch: Any, info: PassInfo) -> Any:
        strategy: Any = self.trainer.strategy
        if info.is_replay:
            with nullcontext() if info.sync or not isinstance(strategy, DDPStrategy) else strategy.block_backward_sync():
                return self.forward_backward(micro_batch)
        if info.sync and not info.is_last:  # Lightning synchronises after the window's last micro-batch only
            self._share_gradients()
        return None

    def _again(self, micro_batch: MicroBatch) -> torch.Tensor:
        trainer, module = self.trainer, self.module
        with unlogged(module):
            out: Any = trainer.strategy.training_step(micro_batch.batch, *micro_batch.further)
            loss: torch.Tensor = (out["loss"] if isinstance(out, Mapping) else out) / trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            module.backward(loss if scaler is None else scaler.scale(loss))
        return loss.detach()

    def _share_gradients(self) -> None:
        if not isinstance(self.trainer.strategy, DDPStrategy) or dist.get_world_size() == 1:
            return
        params = self.optimizer.tensors()
        # A rank whose texts did not reach a weight has no gradient of it, and would wait in another exchange than others.
        reached = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=params[0].device)
        dist.all_reduce(reached, dist.ReduceOp.MAX)
        for p, anywhere in zip(params, reached.tolist(), strict=True):
            if anywhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad.div_(dist.get_world_size())


@contextmanager
def unlogged(module: LightningModule) -> Iterator[None]:
    """Keeps what `training_step` logs from being logged twice."""

    def nothing(*_: Any, **__: Any) -> None: ...

    vars(module).update(log=nothing, log_dict=nothing)
    try:
        yield
    finally:
        del vars(module)["log"], vars(module)["log_dict"]
