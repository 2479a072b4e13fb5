"""What a model is held to: a model that stays as it is, an average of the weights, the model without its adapters."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.distributed import is_sharded, unwrap
from fastpost.modes import evaluating
from fastpost.ops.scalars import check_real


class Reference:
    """Base of the references."""

    def opened(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """While open, the module that it hands out gives the reference's outputs: in eval mode, without gradients.

        Args:
            model: the one that is trained, without its wrappers.
        """
        raise NotImplementedError

    def update(self, model: Any) -> None:
        """After a step of the optimizer; only an average has something to do."""


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Anchor: a reference is made of a module, not of {type(model).__name__}")
    return model


class Frozen(Reference):
    """Another model that is not trained: the start of this one, or any over the same vocabulary.

    Args:
        model: the reference. It is called in eval mode, and its modes are put back.

    Attributes:
        model: see above.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = _module(model)

    @classmethod
    def copy_of(cls, model: nn.Module) -> Frozen:
        """The model as it is now. Only weights that are trained are copied; frozen ones (LoRA's base) are shared.

        Raises:
            ValueError: a sharded model, or a forward that was replaced by one which calls the original model.
        """
        return _Copy(model)

    @contextlib.contextmanager
    def opened(self, model: Any) -> Iterator[Any]:
        """As the base says."""
        device = _device(model)
        if device is not None and _device(self.model) != device:
            self.model.to(device)
        with torch.no_grad(), evaluating(self.model):
            yield self.model


class _Copy(Frozen):
    def __init__(self, model: nn.Module) -> None:
        root = unwrap(_module(model))
        self._shared = [p for p in root.parameters() if not p.requires_grad]
        super().__init__(_copied(root, self._shared))

    @contextlib.contextmanager
    def opened(self, model: Any) -> Iterator[Any]:
        if any(p.requires_grad for p in self._shared):
            raise RuntimeError(
                "Anchor: a weight that was frozen when the reference was taken is trained now, and the reference shares it; "
                "take the reference after all weights to be trained require gradients, or pass a model of its own"
            )
        _follow(self.model, model)
        with torch.no_grad(), evaluating(self.model):
            yield self.model


class MovingAverage(_Copy):
    """An exponential average of the trained weights, a = decay * a + (1 - decay) * w once per step; it begins at the start.

    Costs a copy of the trained weights; those of 16 bits have a float32 average beside it. Buffers (running statistics) are
    taken over as they are at each update.

    Args:
        model: to be trained; not sharded.
        decay: in [0, 1).

    Raises:
        ValueError: decay out of range; as `Frozen.copy_of`.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        check_real("MovingAverage", "decay", decay)
        if not 0 <= decay < 1:
            raise ValueError(
                f"MovingAverage: decay must lie in [0, 1), not {decay}; 1, an average that never moves, is the frozen start"
            )
        super().__init__(model)
        self.decay = decay
        trained = [(name, p) for name, p in unwrap(model).named_parameters() if p.requires_grad]
        mine = dict(self.model.named_parameters())
        self._names = [name for name, _ in trained]
        self._copies = [mine[name] for name in self._names]
        self._averages = [p if p.dtype.itemsize >= 4 else p.detach().float() for p in self._copies]

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """Takes a step of the average towards the model's weights of now.

        Raises:
            RuntimeError: the model has no weight of a name that was trained at the start.
        """
        root = unwrap(model)
        _follow(self.model, root)
        now = dict(root.named_parameters())
        missing = [name for name in self._names if name not in now]
        if missing:
            raise RuntimeError(f"MovingAverage: the model has no weight {missing[0]!r} any more; make a new average")
        for name, p, average in zip(self._names, self._copies, self._averages, strict=True):
            if average is p:
                p.lerp_(now[name].to(p.dtype), 1 - self.decay)
                continue
            if average.device != p.device:
                average.data = average.to(p.device)
            p.copy_(average.lerp_(now[name].float(), 1 - self.decay))
        buffers = dict(root.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the weights' names, float32 (float64 where a weight is)."""
        return {name: p.detach() for name, p in zip(self._names, self._averages, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up averages that `state_dict` gave, bit for bit.

        Raises:
            ValueError: other names or shapes than those of this model's trained weights.
        """
        mine = {name: tuple(p.shape) for name, p in self.state_dict().items()}
        given = {name: tuple(t.shape) for name, t in state.items()}
        if mine != given:
            wrong = sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name))[0]
            raise ValueError(
                f"MovingAverage: the saved average is of other weights: {wrong!r} is {given.get(wrong, 'missing')} there "
                f"and {mine.get(wrong, 'missing')} here"
            )
        for name, p, average in zip(self._names, self._copies, self._averages, strict=True):
            average.copy_(state[name])
            if average is not p:
                p.copy_(average)


class AdaptersOff(Reference):
    """The model itself with its PEFT adapters switched off: no second model.

    Nothing that is trained may stay on with the adapters off, so under SAM, too, which moves trained weights only, the
    reference is the unperturbed base model.
    """

    @staticmethod
    def check(model: Any) -> None:
        """Refuses models without adapters to switch off.

        Raises:
            ValueError: no PEFT model, or prompt learning.
        """
        if not callable(getattr(model, "disable_adapter", None)) or not isinstance(
            getattr(model, "peft_config", None), dict
        ):
            raise ValueError(
                f"Anchor: 'lora_off' switches the adapters of a PEFT model off, and {type(model).__name__} has none "
                "(get_peft_model makes one); 'reference' keeps a second copy instead"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "Anchor: 'lora_off' needs adapters inside the layers; virtual tokens (prompt or prefix tuning) change the "
                "rows of the outputs. Use 'reference'"
            )

    @contextlib.contextmanager
    def opened(self, model: Any) -> Iterator[Any]:
        """As the base says; afterwards modes, adapters and which weights want gradients are as they were.

        Raises:
            ValueError: as `check`; weights are trained that adapters off leave on.
        """
        self.check(model)
        off = model.disable_adapter
        wanted = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
        try:
            # PEFT takes gradients from what it switches off, and gives them to all of it afterwards.
            with torch.no_grad(), evaluating(model), off():
                left = [name for name, p, trained in wanted if trained and p.requires_grad]
                if left:
                    raise ValueError(
                        f"Anchor: {left[0]} is trained and stays on with the adapters switched off, so the reference would "
                        "move with it; freeze it (LoraConfig(bias='none'), modules_to_save), or use 'reference'"
                    )
                yield model
        finally:
            for _, p, trained in wanted:
                if p.requires_grad != trained:
                    p.requires_grad_(trained)


class Live(Reference):
    """The model itself as it is now, in eval mode: for a teacher that reads more than the model does (`InContext`).

    Between SAM's passes the model is w + e, and so is this. Without a context, and without dropout, its divergence is 0.
    """

    @contextlib.contextmanager
    def opened(self, model: Any) -> Iterator[Any]:
        """As the base says."""
        with torch.no_grad(), evaluating(model):
            yield model


def _copied(root: nn.Module, shared: list[nn.Parameter]) -> nn.Module:
    """The model, sharing these weights, without gradients and with none wanted."""
    if any(is_sharded(p) for p in root.parameters()) or len({p.device for p in root.parameters()}) > 1:
        raise ValueError(
            "Anchor: the model is sharded or lies on several devices; take the reference before, or pass a model of its own"
        )
    memo: dict[int, Any] = {id(p): p for p in shared}
    for p in root.parameters():
        if p.requires_grad:
            memo[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=False)  # deepcopy would take p.grad along
    made = copy.deepcopy(root, memo)
    for name, module in made.named_modules():
        _own_forward(name, module)
    return made


def _own_forward(name: str, module: nn.Module) -> None:
    """Sees to it that a copied module runs itself: a forward that a library put on the original may call that one."""
    forward = vars(module).get("forward")
    if forward is None:
        return
    function = getattr(forward, "__func__", None)
    if getattr(forward, "__self__", None) is module and getattr(function, "__closure__", None) is None:
        return
    if inspect.unwrap(forward if function is None else function) is not inspect.unwrap(type(module).forward):
        raise ValueError(
            f"Anchor: the forward of {name or type(module).__name__} has been replaced by one that would call the original "
            "model; take the reference before that, or pass a model of its own"
        )
    del module.__dict__["forward"]  # a wrapper around the class's own (TRL's fused head, Accelerate's autocast)


def _device(model: Any) -> torch.device | None:
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None


def _follow(mine: nn.Module, model: Any) -> None:
    """Moves a copy's tensors to where the model's own have gone."""
    if not isinstance(model, nn.Module) or _device(mine) == _device(model):
        return
    for copies, own in (
        (mine.named_parameters(), dict(model.named_parameters())),
        (mine.named_buffers(), dict(model.named_buffers())),
    ):
        for name, t in copies:
            if name in own and t.device != own[name].device:
                t.data = t.data.to(own[name].device)
