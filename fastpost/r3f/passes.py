"""R3F's forward passes: where noise enters a model, and what comes out of it clean and noised."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpost.ops.halves import writable_halves
from fastpost.ops.noise import fresh_seed
from fastpost.ops.params import seed_tensor
from fastpost.r3f.conventions import accelerators, align_labels, beside_virtual_tokens, check_rows, device_of, doubled
from fastpost.r3f.head import Head, last_stream
from fastpost.r3f.noise import Noise, NoisyEmbedding, find_embedding, is_encoder_decoder, refuse_neftune, sequence_numbers
from fastpost.rng import RandomState, seed_of

if TYPE_CHECKING:
    from fastpost.r3f.model import R3F

Number = int | Tensor
Offset = Number | tuple[Number, Number]

_SIDE = 1 << 32  # between the seeds of the two sides of an encoder-decoder


@dataclass
class Place:
    """Where noise enters in one call: side of the model, the module that embeds there (None: `inputs_embeds`), the noise."""

    side: str
    name: str
    module: nn.Module | None
    noise: Noise
    first_only: bool = False
    second_only: bool = False


@dataclass
class Step:
    """One optimizer step: its seed per device, and how many tokens have been seen on each side of the model.

    Attributes:
        offset: number of the first token, of one side or of (encoder, decoder).
    """

    offset: Offset = 0
    seeds: dict[torch.device, Tensor] = field(default_factory=dict)
    counted: dict[str, int | Tensor] = field(default_factory=dict)

    def next(self, side: str, device: torch.device) -> int | Tensor:
        """Number of the next token on a side of the model."""
        start = self.offset[side == "decoder"] if isinstance(self.offset, tuple) else self.offset
        number = start + self.counted.get(side, 0)
        return number.to(device) if isinstance(number, Tensor) else number

    def count(self, side: str, tokens: int | Tensor | None) -> None:
        """Tokens that have got noise there; None: nothing ran."""
        if tokens is not None:
            self.counted[side] = self.counted.get(side, 0) + tokens

    def starts_both_sides(self) -> None:
        """Raises ValueError where one number stands for two sides, which have other numbers of tokens.

        0 is right for both. A tensor is not read, since that waits for its device, so it is refused whatever it holds.
        """
        if isinstance(self.offset, Tensor) or (not isinstance(self.offset, tuple) and self.offset):
            raise ValueError(
                "R3F: noise enters both sides of this encoder-decoder, whose tokens are counted apart; give both numbers, "
                "window(token_offset=(the encoder's, the decoder's))"
            )


class Windowed:
    """A method whose noise belongs to the token of an optimizer step, however the step is cut into calls."""

    _window: Step | None = None

    @contextlib.contextmanager
    def window(self, token_offset: Offset = 0, *, step: Step | None = None) -> Iterator[None]:
        """The calls inside are micro-batches of one step: they share its seed, and their tokens are counted on.

            with r3f.window():
                for micro_batch in micro_batches:
                    r3f(model, num_items=tokens_in_all, **micro_batch).loss.backward()

        Each token then gets the same noise however the batch is cut. Spread over processes, give each the number of tokens
        that lie before its own (`fastpost.distributed.sum_before`) and the same integer `seed`. Padding is not counted.

        Args:
            token_offset: number of the first token: of those that noise can reach on the side that is noised. Where both
                sides of an encoder-decoder are (`where="both"`, `HyPe`), a pair, (the encoder's, the decoder's), or the
                integer 0.
            step: the step that the calls belong to, where its calls cannot stand in one block; None: a new one.

        Raises:
            TypeError: a token_offset that is neither a number nor a pair of them.
            RuntimeError: a window is open already.
        """
        given = token_offset if isinstance(token_offset, tuple) and len(token_offset) == 2 else (token_offset,)
        if not all(isinstance(n, Integral | Tensor) for n in given):
            raise TypeError(
                f"{type(self).__name__}: token_offset must be an integer, a tensor with one, or a pair of them (encoder, "
                f"decoder), not {token_offset!r}"
            )
        if self._window is not None:
            raise RuntimeError(f"{type(self).__name__}: a window is open already")
        self._window = Step(token_offset) if step is None else step
        try:
            yield
        finally:
            self._window = None


@dataclass
class Passes:
    """One batch on one model.

    Attributes:
        how: the options.
        model: as it was given; called without labels. root: without its wrappers.
        inputs: the batch without labels. told: what it says to us and not to the model.
        labels: int64, (batch,) or (batch, time). shift: whether row t predicts label t + 1; None: as the model's own loss.
        head: taken out of the model, so that passes end with hidden states; None: they end with logits.
        step: the optimizer step that the batch belongs to.
    """

    how: R3F
    model: Any
    root: Any
    inputs: dict[str, Any]
    told: dict[str, Any]
    labels: Tensor
    shift: bool | None
    head: Head | None
    step: Step

    def run(self, inputs: dict[str, Any] | None = None) -> Tensor:
        """One forward pass: logits, or the hidden states before the head where that is fused."""
        return last_stream(self.model, self.root, self.head, self.inputs if inputs is None else inputs)

    def both(self) -> tuple[Tensor, Tensor]:
        """Both streams, clean and noised."""
        how, inputs = self.how, self.inputs
        places = self._places()  # draws the seed, ahead of any dropout mask
        if how.forward == "double_batch":
            rows = self.labels.shape[0]
            both = self._noised(doubled(self.root, inputs, rows), places, rows)
            if both.shape[0] != 2 * rows:
                raise ValueError(
                    f"R3F: a double batch of {2 * rows} rows gave {both.shape[0]} rows of logits; use forward='two_pass'"
                )
            if how.inplace and self.head is None:
                return writable_halves(both)
            clean, noised = both.chunk(2)  # gradients of two slices would each be padded to full size
            return clean, noised

        before = RandomState(accelerators(self.root)) if how.dropout == "shared" else None
        clean = self.run()
        if before is not None:
            before.put()  # what the clean pass drew is drawn again by the noised one
        self.fits(clean)  # what does not fit says so before the second pass
        # grad="clean" has no use for the noised pass's graph. The clean pass ran first, so that weights which autocast
        # cached have theirs.
        with torch.no_grad() if how.grad == "clean" else contextlib.nullcontext():
            noised = self._noised(inputs, places, None)
        return clean, noised

    def noised(self) -> Tensor:
        """The noised stream alone, where somebody else makes the clean one."""
        places = self._places()
        with torch.no_grad() if self.how.grad == "clean" else contextlib.nullcontext():
            return self._noised(self.inputs, places, None)

    def _places(self) -> list[Place]:
        how, root, inputs = self.how, self.root, self.inputs
        refuse_neftune(root)
        given = inputs.get("inputs_embeds") if how.embedding is None else None
        sequences = None
        if how.noise_scale == "neftune":
            sequences = self._sequences(inputs.get("input_ids"), given)
        if not is_encoder_decoder(root):
            sides: tuple[str, ...] = ("encoder",)
        else:
            sides = ("encoder", "decoder") if how.where == "both" else (how.where,)
        if len(sides) == 2:
            self.step.starts_both_sides()
        places = []
        for side in sides:
            own = sequences if side == "encoder" else None
            if given is not None and side == "encoder":
                places.append(Place(side, "inputs_embeds", None, self._noise(given.device, side, own)))
                continue
            name, module = find_embedding(root, how.embedding, side)
            noise = self._noise(device_of(module, root, self.labels), side, own)
            place = Place(side, name, module, noise)
            if is_encoder_decoder(root):
                # Where one module embeds for both sides, the encoder's run comes first.
                place.first_only = side == "encoder"
                shared = how.embedding is None and given is None and find_embedding(root)[1] is module
                place.second_only = side == "decoder" and shared
            places.append(place)
        return places

    def _sequences(self, ids: Any, given: Any) -> Tensor | None:
        """`sequence_numbers` of the rows that are embedded; models flatten ids of more than two dimensions (choices)."""
        if not isinstance(ids, Tensor) and not isinstance(given, Tensor):
            return None
        shape = ids.shape if isinstance(ids, Tensor) else given.shape[:-1]
        told = {**self.inputs, **self.told}
        flat = {k: t.flatten(0, -2) for k, t in told.items() if isinstance(t, Tensor) and t.shape == shape and t.ndim > 2}
        return sequence_numbers({**told, **flat}, torch.Size((math.prod(shape[:-1]), shape[-1])))

    def _noised(self, inputs: dict[str, Any], places: list[Place], rows: int | None) -> Tensor:
        """One forward pass with noise on all rows, or on those from `rows` on."""
        hooks: list[tuple[Place, NoisyEmbedding]] = []
        for place in places:
            mask = inputs.get("attention_mask" if place.side == "encoder" else "decoder_attention_mask")
            mask = mask if isinstance(mask, Tensor) else None
            if place.module is not None:
                hook = NoisyEmbedding(
                    place.module,
                    place.noise,
                    mask,
                    inputs.get("input_ids" if place.side == "encoder" else "decoder_input_ids"),
                    halves=rows is not None,
                    first_only=place.first_only,
                    second_only=place.second_only,
                )
                hooks.append((place, hook))
                continue
            embeds, first = inputs["inputs_embeds"], rows or 0
            keep = mask[first:] != 0 if mask is not None and mask.shape == embeds.shape[:-1] else None
            noised = place.noise.add(embeds[first:], keep)
            inputs = {**inputs, "inputs_embeds": torch.cat((embeds[:first], noised)) if first else noised}
        with contextlib.ExitStack() as entered:
            for _, hook in hooks:
                entered.enter_context(hook)
            output = self.run(inputs)
        for place, hook in hooks:
            hook.require_called(place.name)
        for place in places:
            self.step.count(place.side, place.noise.counted)
        return output

    def _noise(self, device: torch.device, side: str, sequences: Tensor | None) -> Noise:
        how, step = self.how, self.step
        if device not in step.seeds:
            known = next(iter(step.seeds.values()), None)
            step.seeds[device] = self._seed(device) if known is None else known.to(device)
        seed = step.seeds[device] + (_SIDE if side == "decoder" else 0)
        return Noise(
            how.eps,
            how.noise_type,
            seed,
            how.detach_noised_embedding,
            how._measured,
            how.noise_scale,
            step.next(side, device),
            sequences,
        )

    def _seed(self, device: torch.device) -> Tensor:
        how = self.how
        if how.seed is None:
            return fresh_seed(device)
        how.step += 1
        return seed_tensor(seed_of(how.seed, how.step - 1), device)

    def fits(self, stream: Tensor) -> None:
        """Raises ValueError where labels do not go with the logits, or the hidden states before a head."""
        self.labels = beside_virtual_tokens(self.root, self.labels, stream, self.how.ignore_index)
        classes = stream.shape[-1] if self.head is None else self.head.linear.weight.shape[0]
        check_rows(self.labels, stream, classes, self.how.ignore_index)

    def targets(self, stream: Tensor) -> Tensor:
        """Labels in step with the rows of the logits, or of the hidden states before a head."""
        self.fits(stream)
        return align_labels(self.root, self.labels, stream, self.shift, self.how.ignore_index)
