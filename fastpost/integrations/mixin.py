"""What the mixins over transformers' Trainer have in common: options, refusals, a record in checkpoints."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpost.distributed import gradient_sync
from fastpost.integrations.options import METHODS, PostTrainingOptions
from fastpost.sam import PassInfo

Base: Any = object


class PostTrainingMixin(Base):  # type: ignore[misc]
    """Base of the mixins; put them before the trainer: `class MyTrainer(SAMTrainerMixin, Trainer)`.

    Args:
        post_training: PostTrainingOptions, for trainers whose `args` are not `PostTrainingArguments`.

    Raises:
        TypeError: a trainer that generates its batches while it trains (GRPO, RLOO, ...).
        ValueError: a method that this class does not do, or options given twice.
    """

    _method = ""
    _pass_info: PassInfo | None = None  # None where no SAM window is open

    def __init__(self, *args: Any, post_training: PostTrainingOptions | None = None, **kwargs: Any) -> None:
        refuse_stateful(type(self))
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, PostTrainingOptions)), None)
        if post_training is not None and given is not None:
            raise ValueError(f"{type(self).__name__}: args has options of SAM and R3F already; leave post_training out")
        if post_training is None:
            post_training = given or PostTrainingOptions()
        self.post_training = post_training
        brought: set[str] = {vars(c).get("_method", "") for c in type(self).__mro__} - {""}
        wanted = brought if post_training.method is None else METHODS[post_training.method]
        if not wanted <= brought:
            raise ValueError(
                f"{type(self).__name__} does {' and '.join(sorted(brought))}, not method={post_training.method!r}; use "
                "fastpost.integrations.transformers.PostTrainer, or the class of that method"
            )
        self._methods = frozenset(wanted)
        super().__init__(*args, **kwargs)
        self.add_callback(PostTrainingRecord(**self._record()))
        self.add_callback(_Housekeeping(self))

    def _record(self) -> dict[str, Any]:
        options = self.post_training
        shown: dict[str, Any] = {}
        if "sam" in self._methods:
            shown |= {name: getattr(options, name) for name in ("sam_rho", "sam_adaptive", "sam_eta", "sam_ascent_fraction")}
        if "r3f" in self._methods:
            shown |= {name: getattr(options, name) for name in ("r3f_lambda", "r3f_eps", "noise_type")}
        return {"methods": sorted(self._methods), "world_size": self.args.world_size, "options": shown}

    def _on_train_begin(self) -> None:
        """Before the first step of a run, when the optimizer is the one that will be stepped."""

    def _on_step_begin(self) -> None:
        """Before the first micro-batch of an accumulation window."""

    def _on_epoch_end(self) -> None:
        """Also where an epoch was left in the middle of a window."""


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
        self._trainer._on_train_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_step_begin()

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
