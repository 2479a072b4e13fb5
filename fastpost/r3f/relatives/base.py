"""What the methods near R3F share: how a batch is read, where noise enters, how rows are reduced."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.distributed import unwrap
from fastpost.errors import nearest, unknown
from fastpost.ops.divergence import r3f_loss
from fastpost.ops.noise import fresh_seed
from fastpost.ops.params import seed_tensor
from fastpost.ops.scalars import check_number, check_whole
from fastpost.r3f.conventions import (
    accelerators,
    align_labels,
    beside_virtual_tokens,
    check_rows,
    device_of,
    logits_of,
    named,
    per_item,
    summed_cross_entropy,
    take_batch,
)
from fastpost.r3f.model import OPTIONS, R3FOutput
from fastpost.r3f.noise import (
    Noise,
    NoisyEmbedding,
    find_embedding,
    is_encoder_decoder,
    refuse_neftune,
    sequence_numbers,
)
from fastpost.r3f.passes import Windowed
from fastpost.rng import seed_of

DROPOUTS = OPTIONS["dropout"]


@dataclass
class Call:
    """One batch, read and checked, on one model.

    Attributes:
        model: as it was given; called without labels. root: without its wrappers.
        inputs: the batch without labels, with a decoder's inputs where the model needs them.
        labels: int64. shift: whether row t predicts label t + 1; None: as the model's own loss.
        num_items: divisor in place of the labels that count, or None.
    """

    model: Any
    root: Any
    inputs: dict[str, Any]
    labels: Tensor
    shift: bool | None
    num_items: float | Tensor | None

    @property
    def attention_mask(self) -> Tensor | None:
        mask = self.inputs.get("attention_mask")
        return mask if isinstance(mask, Tensor) else None


class Method(Windowed):
    """A loss in R3F's calling convention; what a method does in training is its `_train`.

    Every method serves the models and batches that `fastpost.R3F` serves (classifiers, token classifiers, causal and masked
    language models, encoder-decoders; `inputs_embeds`), averages over the rows whose label counts, and in eval mode is the
    plain cross-entropy of one pass, without noise and without a random number drawn.

    Args:
        embedding: where noise enters, as in R3F.
        shift_labels: whether row t predicts label t + 1; None: as the model's own loss does.
        seed: None draws a seed per step from torch's generator; an integer makes steps repeatable (`self.step` counts them,
            each has numbers of its own). A step is a training call, or all the calls inside one `window()`.
        ignore_index: label that does not count.
    """

    def __init__(
        self,
        *,
        embedding: nn.Module | str | None = None,
        shift_labels: bool | None = None,
        seed: int | None = None,
        ignore_index: int = -100,
        **others: Any,
    ) -> None:
        for other in others:
            raise self._no_option(other)
        if embedding is not None and not isinstance(embedding, nn.Module | str):
            raise TypeError(
                f"{type(self).__name__}: embedding must be a module, a module's name or None, not {type(embedding).__name__}"
            )
        check_whole(type(self).__name__, "ignore_index", ignore_index)
        if seed is not None:
            check_whole(type(self).__name__, "seed", seed)
            seed_tensor(seed, torch.device("cpu"))
        self.embedding, self.shift_labels, self.ignore_index = embedding, shift_labels, ignore_index
        self.seed, self.step = seed, 0
        self._measured: set[torch.dtype] = set()
        self._check()

    def _check(self) -> None:
        """Attributes may be changed between steps (schedules), so they are checked at every one."""

    def _train(self, call: Call) -> R3FOutput:
        raise NotImplementedError

    def __call__(self, model: Any, /, *, num_items: float | Tensor | None = None, **batch: Any) -> R3FOutput:
        """Runs the method on one batch.

        Args:
            model: called as `model(**batch)` without the labels.
            num_items: what sums over rows are divided by, instead of the labels of this batch that count (gradient
                accumulation; transformers' `num_items_in_batch`, which is also taken from the batch).
            batch: the model's inputs and `labels`, integers of shape (batch,) or (batch, time). `shift_labels`, shifted
                already, stand in their place.

        Returns:
            R3FOutput; `loss` = `task_loss` + weight * `symm_kl`, where `symm_kl` is 0 for methods without a KL.

        Raises:
            ValueError: labels that are missing, out of range, of the wrong shape or not integers; num_items negative; a
                model without input embeddings, or whose loss has a part for its router.
            RuntimeError: the embedding was not called in the forward pass.
        """
        self._check()
        with self._named():
            root = unwrap(model)
            labels, shift, inputs, num_items = take_batch(root, batch, self.shift_labels, self.ignore_index, num_items)
        call = Call(model, root, inputs, labels, shift, num_items)
        if getattr(model, "training", True):
            with self._named():
                refuse_neftune(root)
            return self._train(call)
        logits = self._clean(call)
        return self._plain(call, logits)

    def _no_option(self, given: str) -> TypeError:
        signatures = (inspect.signature(cls.__init__) for cls in (type(self), Method))
        known = [p.name for s in signatures for p in list(s.parameters.values())[1:] if p.kind is not p.VAR_KEYWORD]
        names = list(dict.fromkeys(known))
        return TypeError(f"{type(self).__name__}: no option {given!r}.{nearest(given, names)} Valid: {', '.join(names)}.")

    # -- for methods ----------------------------------------------------------------------------------------------------

    def _named(self) -> contextlib.AbstractContextManager[None]:
        """What R3F's helpers refuse, they refuse in this method's name."""
        return named(type(self).__name__)

    def _at_least_zero(self, *names: str) -> None:
        for name in names:
            check_number(type(self).__name__, name, getattr(self, name))

    def _whole(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(self).__name__}: {name} must be a whole number >= 1, not {value!r}")

    def _one_of(self, name: str, valid: tuple[str, ...]) -> None:
        if getattr(self, name) not in valid:
            raise unknown(name, getattr(self, name), valid)

    def _seed(self, call: Call) -> Tensor:
        """An int64 scalar on the device where noise will be drawn."""
        embeds = call.inputs.get("inputs_embeds")
        if isinstance(embeds, Tensor) and self.embedding is None:
            device = embeds.device
        else:
            device = device_of(self._place(call)[1], call.root, call.labels)
        return self._seed_on(device)

    def _seed_on(self, device: torch.device) -> Tensor:
        seeds = {} if self._window is None else self._window.seeds
        if device not in seeds:
            seeds[device] = next(iter(seeds.values())).to(device) if seeds else self._fresh_seed(device)
        return seeds[device]

    def _fresh_seed(self, device: torch.device) -> Tensor:
        if self.seed is None:
            return fresh_seed(device)
        self.step += 1
        return seed_tensor(seed_of(self.seed, self.step - 1), device)

    @contextlib.contextmanager
    def _counted(self, noise: Noise, side: str = "encoder") -> Iterator[None]:
        """Around the first pass with this noise: its tokens are counted on from the window's earlier calls."""
        step, first = self._window, noise.counted is None
        if step is None or not first:
            yield
            return
        noise.offset = step.next(side, noise.seed.device)
        yield
        step.count(side, noise.counted)

    def _place(self, call: Call) -> tuple[str, nn.Module]:
        with self._named():
            return find_embedding(call.root, self.embedding)

    def _by_length(self, call: Call, eps: float) -> Noise:
        """NEFTune's noise: eps * U(-1, 1) / sqrt(L * d), L the tokens of each text, or of each sequence of a packed row."""
        place = call.inputs.get("inputs_embeds") if self.embedding is None else None
        ids = call.inputs.get("input_ids") if place is None else place[..., 0]
        with self._named():
            sequences = sequence_numbers(call.inputs, ids.shape) if isinstance(ids, Tensor) and ids.ndim == 2 else None
        return Noise(eps, "uniform", self._seed(call), False, self._measured, scale="neftune", sequences=sequences)

    def _clean(self, call: Call) -> Tensor:
        with self._named():
            return self._checked(call, call.model(**call.inputs))

    def _noised(self, call: Call, noise: Noise) -> Tensor:
        """Logits of one forward pass with noise on the input embeddings."""
        with self._counted(noise):
            return self._pass_with(call, noise)

    def _pass_with(self, call: Call, noise: Noise) -> Tensor:
        embeds = call.inputs.get("inputs_embeds") if self.embedding is None else None
        mask = call.attention_mask
        if isinstance(embeds, Tensor):
            keep = mask != 0 if mask is not None and mask.shape == embeds.shape[:-1] else None
            with self._named():
                return self._checked(call, call.model(**{**call.inputs, "inputs_embeds": noise.add(embeds, keep)}))
        name, module = self._place(call)
        with self._named():
            ids = call.inputs.get("input_ids")
            with NoisyEmbedding(module, noise, mask, ids, first_only=is_encoder_decoder(call.root)) as embedding:
                output = call.model(**call.inputs)
            embedding.require_called(name)
            return self._checked(call, output)

    def _checked(self, call: Call, output: Any) -> Tensor:
        """The logits in a model's output, once they are known to fit the labels."""
        logits = logits_of(output)
        self._fits(call, logits, logits.shape[-1])
        return logits

    def _fits(self, call: Call, stream: Tensor, classes: int) -> None:
        """Raises ValueError where labels do not go with logits, or with the hidden states before a head of `classes`."""
        check_rows(self._labels(call, stream), stream, classes, self.ignore_index)

    def _labels(self, call: Call, stream: Tensor) -> Tensor:
        return beside_virtual_tokens(call.root, call.labels, stream, self.ignore_index)

    def _targets(self, call: Call, logits: Tensor) -> Tensor:
        """Labels in step with the rows of the logits."""
        return align_labels(call.root, self._labels(call, logits), logits, call.shift, self.ignore_index)

    def _cross_entropy(self, call: Call, logits: Tensor) -> Tensor:
        """Averaged over the rows that count, or over num_items; 0 where none counts."""
        targets = self._targets(call, logits)
        total = summed_cross_entropy(logits, targets, self.ignore_index)
        count = (targets != self.ignore_index).sum().clamp(min=1) if call.num_items is None else call.num_items
        return per_item(total, count)

    def _with_kl(self, call: Call, logits: Tensor, other: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, task loss, KL): cross-entropy of `logits` plus weight times its symmetric KL with `other`, in one pass."""
        targets = self._targets(call, logits)
        out = r3f_loss(logits, other, targets, r3f_lambda=weight, ignore_index=self.ignore_index, num_items=call.num_items)
        return out.loss, out.task_loss, out.symm_kl

    def _plain(self, call: Call, logits: Tensor) -> R3FOutput:
        task = self._cross_entropy(call, logits)
        return R3FOutput(loss=task, task_loss=task.detach(), symm_kl=torch.zeros_like(task), logits=logits)


@contextlib.contextmanager
def replayed(call: Call, shared: bool) -> Iterator[None]:
    """Around a forward pass whose dropout masks the next pass is to draw again."""
    if not shared:
        yield
        return
    with torch.random.fork_rng(accelerators(call.root)):
        yield
