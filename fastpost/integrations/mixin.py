"""What the mixins over transformers' Trainer have in common: options, refusals, a record in checkpoints."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpost.distributed import gradient_sync
from fastpost.integrations.options import METHODS, PostTrainingOptions
from fastpost.integrations.sharpness import SharpnessCallback
from fastpost.sam import PassInfo

Base: Any = object
# Options that a checkpoint is told to have been made with.
_OF_SAM = (
    "sam_rho",
    "sam_adaptive",
    "sam_eta",
    "sam_ascent_fraction",
    "sam_interval",
    "sam_variant",
    "sam_perturb",
    "sam_masters",
    "sam_scope",
    "sam_rounding",
    "sam_per_micro_batch",
)
_OF_ANCHOR = ("anchor", "anchor_teacher", "anchor_divergence", "anchor_ema_decay", "sft_weighting")
_OF_R3F = ("r3f_lambda", "r3f_eps", "noise_type", "r3f_relative", "r3f_spectral")


class PostTrainingMixin(Base):  # type: ignore[misc]
    """Base of the mixins; put them before the trainer: `class MyTrainer(SAMTrainerMixin, Trainer)`.

    Args:
        post_training: PostTrainingOptions, for trainers whose `args` are not `PostTrainingArguments`.

    Raises:
        TypeError: a trainer that generates its batches while it trains (GRPO, RLOO, ...).
        ValueError: a method that this class does not do, or options given twice.
    """

    _method = ""
    _goes_by_method = False  # whether `method` has to be given
    _computes_plain_loss: tuple[type, ...] = (Trainer,)  # classes whose compute_loss is the plain cross-entropy
    _pass_info: PassInfo | None = None  # None where no SAM window is open

    def __init__(self, *args: Any, post_training: PostTrainingOptions | None = None, **kwargs: Any) -> None:
        refuse_stateful(type(self))
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, PostTrainingOptions)), None)
        if post_training is not None and given is not None:
            raise ValueError(f"{type(self).__name__}: args has these options already; leave post_training out")
        if post_training is None:
            post_training = given or PostTrainingOptions()
        self.post_training = post_training
        self._options_in_args = given
        self._taken: dict[str, Any] | None = None  # the options of which the trainer has made something
        self._prepared: Any = None  # the model that was prepared for them
        self._methods = self._wanted()  # asked for while the trainer below is built
        super().__init__(*args, **kwargs)
        self._take_options()
        self.add_callback(PostTrainingRecord(**self._record()))
        self.add_callback(_Housekeeping(self))

    def _wanted(self) -> frozenset[str]:
        """The parts that the options ask for, of those that this class does."""
        method = self.post_training.method
        brought = frozenset(vars(c).get("_method", "") for c in type(self).__mro__) - {""}
        if method is None and self._goes_by_method:
            raise ValueError(f"{type(self).__name__} goes by args.method, which is None; say {_or(METHODS)}")
        wanted = brought if method is None else METHODS[method]
        if not wanted <= brought:
            raise ValueError(
                f"{type(self).__name__} does {' and '.join(sorted(brought))}, not method={method!r}; use "
                "fastpost.integrations.transformers.PostTrainer, or the class of that method"
            )
        return wanted

    def _take_options(self) -> None:
        """Takes the options as they are now, of `post_training` or of `args` where others were put in their place.

        Called at construction and as each run begins. Does nothing where nothing has changed since.
        """
        if isinstance(self.args, PostTrainingOptions) and self.args is not self._options_in_args:
            self.post_training = self._options_in_args = self.args
        options = self.post_training
        now = options.values()
        if now != self._taken:
            options.check()
            self._methods = self._wanted()
            options.refuse_unused(self._methods, type(self).__name__)
            self._use_options()
        if self.model is not None and (now != self._taken or self.model is not self._prepared):  # model_init makes it later
            self._prepare_model()
            self._prepared = self.model
        self._taken = now

    def _use_options(self) -> None:
        """Refuses options that the trainer cannot serve, and makes of the others what is made once."""

    def _prepare_model(self) -> None:
        """The same for what depends on the model."""

    def _hp_search_setup(self, trial: Any) -> None:
        """As the trainer's own; what a trial says of the options holds for its run."""
        super()._hp_search_setup(trial)
        if trial is not None:
            self._take_options()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own, with the options as they are now.

        Raises:
            ValueError: several devices in this process (DataParallel), and a method with a loss of its own.
        """
        self._take_options()
        if self.args.n_gpu > 1 and self._methods & {"r3f", "anchor"}:
            raise ValueError(
                f"{type(self).__name__}: DataParallel cuts each batch among the {self.args.n_gpu} GPUs of this process, "
                "which this loss does not serve; start a process for each GPU (torchrun, accelerate launch), or show it one "
                "GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        return super()._inner_training_loop(*args, **kwargs)

    def _record(self) -> dict[str, Any]:
        options = self.post_training
        shown: dict[str, Any] = {}
        if "sam" in self._methods:
            shown |= {name: getattr(options, name) for name in _OF_SAM}
        if "r3f" in self._methods:
            shown |= {name: getattr(options, name) for name in _OF_R3F}
        if "anchor" in self._methods:
            shown |= {name: getattr(options, name) for name in _OF_ANCHOR}
            shown |= {"anchor_kl": options.anchor_weight, "anchor_ce": options.ce_weight}
        return {"methods": sorted(self._methods), "world_size": self.args.world_size, "options": shown}

    def _on_train_begin(self) -> None:
        """Before the first step of a run, when the optimizer is the one that will be stepped."""

    def _on_step_begin(self) -> None:
        """Before the first micro-batch of an accumulation window."""

    def _on_step_end(self) -> None:
        """After the optimizer's step, before a checkpoint is saved."""

    def _on_epoch_end(self) -> None:
        """Also where an epoch was left in the middle of a window."""

    # -- for methods with a loss ----------------------------------------------------------------------------------------

    def _loss_owner(self) -> type:
        """The class whose `compute_loss` the trainer would use without the mixins."""
        return next(c for c in type(self).__mro__ if "compute_loss" in vars(c) and not issubclass(c, PostTrainingMixin))

    def _own_inputs(self, inputs: Any) -> dict[str, Any]:
        """A batch as the model takes it; a method that reads more of it takes that out here."""
        return dict(inputs)

    def _factor(self, items: Any) -> int:
        """What undoes the mean over processes, where the divisor counts the labels of all."""
        if items is None or not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes // self.get_tp_size())


class PostTrainingRecord(TrainerCallback, ExportableState):
    """Writes into `trainer_state.json` of each checkpoint which methods made it, with their options and the world size."""

    def __init__(self, methods: list[str], world_size: int, options: dict[str, Any]) -> None:
        self.record = {"methods": methods, "world_size": world_size, "options": options}

    def state(self) -> dict[str, Any]:
        return {"args": self.record, "attributes": {}}


class _Housekeeping(TrainerCallback):
    def __init__(self, trainer: PostTrainingMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name, record = PostTrainingRecord.__name__, self._trainer._record()
        if state.global_step:
            _tell_of_another_run(state.stateful_callbacks.get(name), record)
        state.stateful_callbacks[name] = PostTrainingRecord(**record).state()  # the Trainer saves none that it did not load
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, SharpnessCallback):
                callback.log = self._trainer.log
        self._trainer._on_train_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_step_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_step_end()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_epoch_end()


def _tell_of_another_run(saved: dict[str, Any] | None, mine: dict[str, Any]) -> None:
    """Warns where a checkpoint was made in another way than training goes on."""
    then: dict[str, Any] = {"methods": [], "world_size": mine["world_size"], "options": {}}
    if saved is not None:
        then = saved["args"]
    told = [
        f"{what}: {then[name] or 'no method of fastpost'} then, {mine[name]} now"
        for name, what in (("methods", "method"), ("world_size", "processes"))
        if then[name] != mine[name]
    ]
    told += [
        f"{name}: {then['options'][name]} then, {value} now"
        for name, value in mine["options"].items()
        if name in then["options"] and then["options"][name] != value
    ]
    if told:
        warnings.warn(
            f"resuming from a checkpoint that was made differently ({'; '.join(told)}). Weights, optimizer and "
            "schedule go on from it. rho, adaptive and eta saved in the optimizer's groups keep their saved values",
            stacklevel=2,
        )


def _or(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


def refuse_stateful(trainer: type) -> None:
    """Raises TypeError for a trainer whose batches cannot be run a second time, or have no labels to take a KL at."""
    own = [c for c in trainer.__mro__ if not issubclass(c, PostTrainingMixin) and c not in Trainer.__mro__]
    for c in own:
        generates = [name for name in vars(c) if name == "_prepare_inputs" or name.startswith("_generate")]
        if generates:
            raise TypeError(
                f"{c.__name__} makes its batches as it trains ({generates[0]}), from the policy of that moment: a "
                "micro-batch that is run again at w + e would be another one, or advance its buffers twice. SAM and "
                "R3F serve trainers with a fixed data set, such as Trainer, Seq2SeqTrainer, SFTTrainer and DPOTrainer"
            )


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's.

    Raises:
        TypeError: there is none.
    """
    found = optimizer
    while isinstance(getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = found.optimizer
    if not isinstance(found, torch.optim.Optimizer):
        raise TypeError(
            f"SAM: {type(optimizer).__name__} is no torch optimizer and has none as `.optimizer`; the "
            "perturbation needs its parameter groups"
        )
    return found


@contextlib.contextmanager
def accelerated_sync(model: Any, accelerator: Any, sync: bool) -> Iterator[None]:
    """`gradient_sync`, and Accelerate's own flag: what averages the gradients of parameters that FSDP2 does not manage asks
    for that."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(sync)
    try:
        with gradient_sync(model, sync):
            yield
    finally:
        state._set_sync_gradients(before)
