"""Self-distillation from a context: the teacher reads a context in front of the tokens, the model learns without it."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpost.anchor.references import Frozen, Reference
from fastpost.ops.autograd import checks_values, waits
from fastpost.r3f.conventions import shifts_labels
from fastpost.r3f.noise import is_encoder_decoder

PREFIX = ("context_input_ids", "context_attention_mask")
WHOLE = ("teacher_input_ids", "teacher_labels", "teacher_attention_mask")
FIELDS = (*PREFIX, *WHOLE)
TOO_LONG = "InContext: a teacher's row has"


class InContext(Reference):
    """A reference that reads a context (a demonstration, a document, a system prompt) in front of the same tokens.

    For self-distillation where the texts are given. (SDFT, 2601.19897, samples the texts from the model as it trains, takes
    the reverse KL and an average of the weights; here are its loss and its teacher, over texts of the data.) With the
    weights of

        InContext(MovingAverage(model, 0.99))       # the paper's
        InContext(Frozen.copy_of(model))            # the start
        InContext(AdaptersOff())                    # the base of LoRA
        InContext(Live())                           # the model as it is now

    A batch has, beside `input_ids` (batch, time), `labels` and perhaps `attention_mask`, either

    - `context_input_ids` (batch, length) and, where rows are padded, `context_attention_mask`, padded on either side: the
      context, in front of the row's own tokens; or
    - `teacher_input_ids`, `teacher_labels` (both (batch, length)) and perhaps `teacher_attention_mask`: the teacher's whole
      rows, for a context inside of a chat's turns. The tokens that count are the same ones, in the same order, as in
      `labels`, and labels that count are the ids themselves.

    `ContextCollator` makes such batches of examples. Where the model shifts labels, one behind a masked position (the first
    of a row that is padded on the left) does not count, as one at the row's beginning: nothing stands before it.

    Other tokens are an error where the batch is on the CPU, as in `ContextCollator`. On other devices looking waits for the
    device, and only FASTPOST_CHECKS=1 asks for it; without it the model is taught from the wrong rows.

    The teacher's rows are packed to the left, so that positions run on from the context and padding is never seen.

    Args:
        weights: a reference, or a module, which is taken for `Frozen(module)`.

    Raises:
        TypeError: weights that are neither.
    """

    def __init__(self, weights: Reference | nn.Module) -> None:
        if isinstance(weights, nn.Module):
            weights = Frozen(weights)
        if not isinstance(weights, Reference) or isinstance(weights, InContext):
            raise TypeError(f"InContext: weights must be a reference or a module, not {type(weights).__name__}")
        self.weights = weights

    def opened(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """As that of the weights."""
        return self.weights.opened(model)

    def update(self, model: Any) -> None:
        """As that of the weights."""
        self.weights.update(model)


class Teaching(NamedTuple):
    """What a teacher reads, and where in it the student's tokens are.

    Attributes:
        inputs: of the teacher's pass.
        place: (batch, time), the teacher's position of the student's tokens whose labels count; elsewhere anything.
        labels: (batch, time), of the student, those that count.
    """

    inputs: dict[str, Any]
    place: Tensor
    labels: Tensor

    def rows_for(self, stream: Tensor, student: Tensor, shifted: bool) -> Tensor:
        """The rows of the teacher's stream that stand beside those of the student's.

        Args:
            stream: (batch, length, width) of the teacher. student: (batch, rows, width). Either may begin with the rows of
                virtual tokens.
            shifted: whether row t predicts the label of t + 1.

        Returns:
            (batch, rows, width).
        """
        time = self.place.shape[1]
        place = self.place + (stream.shape[1] - self.inputs["input_ids"].shape[1])
        if shifted:
            place = nn.functional.pad(place[:, 1:] - 1, (0, 1))
        place = nn.functional.pad(place, (student.shape[1] - time, 0)).clamp(0, stream.shape[1] - 1)
        return stream.take_along_dim(place.unsqueeze(-1), 1)


def without_context(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the model itself takes it, without a teacher's fields."""
    return {name: value for name, value in batch.items() if name not in FIELDS}


def teaching(
    root: Any,
    reference: Any,
    batch: Mapping[str, Any],
    inputs: Mapping[str, Any],
    labels: Tensor,
    ignore_index: int,
    shift_labels: bool | None,
) -> Teaching:
    """What the teacher reads of a batch.

    Args:
        root: the student. reference: the teacher's module. batch: with the teacher's fields. inputs, labels: the student's.
        shift_labels: as in `Anchor`.

    Raises:
        TypeError: a field of the teacher's that is no tensor of integers.
        ValueError: no context, other inputs than tokens and their mask, shapes that do not fit, a row longer than the model
            has positions; on the CPU, and under FASTPOST_CHECKS=1, tokens that count and differ, and ids that are none.
    """
    _check_model(root, batch, inputs, labels)
    labels = labels.to(inputs["input_ids"].device)
    shifted = shifts_labels(root) if shift_labels is None else shift_labels
    rows = with_teacher({**inputs, "labels": labels, **_fields(batch)}, ignore_index, shifted, vocabulary_of(reference))
    ids, mask, labels = rows["teacher_input_ids"], rows["teacher_attention_mask"], rows["labels"]
    place = _places(rows["teacher_labels"] != ignore_index, labels != ignore_index)
    if shifted:  # virtual tokens stand before the student's first token, and nothing before the teacher's
        labels = labels.masked_fill(place == 0, ignore_index)
    if (longest := check_length(mask, positions_of(reference))) is not None:
        ids, mask = ids[:, :longest], mask[:, :longest]
    further = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    return Teaching({**further, "input_ids": ids, "attention_mask": mask}, place, labels)


def with_teacher(
    batch: Mapping[str, Any], ignore_index: int = -100, shifted: bool = True, vocabulary: int | None = None
) -> dict[str, Any]:
    """A batch with the teacher's whole rows, `teacher_input_ids`, `teacher_labels` and `teacher_attention_mask`, packed to
    the left, in place of a context's fields. Labels behind padding do not count in it.

    Args:
        batch: as `InContext` has it. shifted: whether row t predicts the label of t + 1. vocabulary: ids that there are.

    Raises:
        TypeError: a field that is no tensor of integers.
        ValueError: shapes that do not fit; on the CPU, and under FASTPOST_CHECKS=1, tokens that count in one of both and not
            in the other, or differ; ids that are none; labels that are not the ids.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    fields = _fields(batch)
    refuse_both(fields, "the batch")
    looks = checks_values(ids.device)
    own_mask = _mask(batch.get("attention_mask"), ids, "", len(ids))
    if (context := fields.get("context_input_ids")) is not None:
        context = _whole_numbers(context, "context_input_ids")
        context_mask = _mask(fields.get("context_attention_mask"), context, "context", len(ids))
        if looks:
            _check_ids(context, context_mask, "context_input_ids", vocabulary)
        mask = torch.cat((context_mask, own_mask), 1)
        teacher_labels = torch.cat((torch.full_like(context, ignore_index), labels), 1)
        teacher_ids = torch.cat((context, ids), 1)
    else:
        teacher_ids, teacher_labels = (_whole_numbers(_present(fields, name), name) for name in WHOLE[:2])
        mask = _mask(fields.get("teacher_attention_mask"), teacher_ids, "teacher", len(ids))
        if teacher_labels.shape != teacher_ids.shape:
            raise ValueError(
                f"InContext: teacher_labels have shape {tuple(teacher_labels.shape)}, teacher_input_ids "
                f"{tuple(teacher_ids.shape)}; they must agree"
            )
        if looks:
            _check_ids(teacher_ids, mask, "teacher_input_ids", vocabulary)
            if shifted:
                _check_labels(teacher_labels, teacher_ids, mask & (teacher_labels != ignore_index))
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    if not waits(mask.device):  # elsewhere the longest row is not known without a wait
        order = order[:, : _longest(mask)]
    teacher_ids, teacher_labels, mask = (t.gather(1, order) for t in (teacher_ids, teacher_labels, mask))
    teacher_ids = teacher_ids.masked_fill(~mask, 0)
    teacher_labels = teacher_labels.masked_fill(~mask, ignore_index)
    if looks:
        _check_tokens(teacher_labels.cpu(), labels.cpu(), ignore_index)
    if shifted:
        labels, teacher_labels = _without_those_behind_padding(labels, teacher_labels, own_mask, ignore_index)
        if looks:
            _check_first(teacher_labels.cpu(), labels.cpu(), ignore_index)
    rest = {**without_context(batch), "labels": labels}
    return {**rest, **dict(zip(WHOLE, (teacher_ids, teacher_labels, mask.long()), strict=True))}


def refuse_both(names: Container[str], where: str) -> None:
    """Raises ValueError where fields of a context and of the teacher's whole rows are there."""
    both = [next((name for name in form if name in names), None) for form in (PREFIX, WHOLE)]
    if None not in both:
        raise ValueError(f"InContext: {where} has {both[0]} and {both[1]}; give one of the two")


def check_length(mask: Tensor, positions: int | None) -> int | None:
    """The tokens of the longest row where rows are wider than the model has positions, perhaps by padding alone; else None.

    Args:
        mask: (batch, length), of rows that are packed to the left.

    Raises:
        ValueError: a row with more tokens than positions.
    """
    if positions is None or mask.shape[1] <= positions:
        return None
    longest = _longest(mask)
    if longest > positions:
        raise ValueError(
            f"{TOO_LONG} {longest} tokens, and the model {positions} positions; shorten the context or "
            f"the text of example {int(mask.sum(1).argmax())} of the batch, which have to fit together"
        )
    return longest


def positions_of(model: Any) -> int | None:
    """The positions that a model's configuration tells of."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def vocabulary_of(model: Any) -> int | None:
    """The rows of a model's input embedding, where it tells."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except NotImplementedError:  # transformers' answer where the attribute has an unusual name
        return None
    weight = getattr(embedding, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) else None


def _fields(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in FIELDS if batch.get(name) is not None}


def _present(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(
            f"InContext: the batch has no context: neither context_input_ids nor {name}. A ContextCollator makes them of "
            "examples that have a context"
        )
    return fields[name]


def _whole_numbers(value: Any, name: str) -> Tensor:
    """A field as int64; nothing at all may have any dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"InContext: {name} is a {type(value).__name__}; a batch has integer tensors of shape (batch, length), which a "
            "ContextCollator makes of examples"
        )
    if value.numel() and (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool):
        raise TypeError(f"InContext: {name} has {value.dtype} numbers; token ids are integers")
    return value.long()


def _mask(mask: Any, ids: Tensor, what: str, rows: int) -> Tensor:
    """Which tokens are none of padding, as bool."""
    name = f"{what}_" if what else ""
    if ids.ndim != 2 or len(ids) != rows:
        raise ValueError(f"InContext: {name}input_ids have shape {tuple(ids.shape)}; expected ({rows}, length)")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"InContext: {name}attention_mask has shape {given}; expected {tuple(ids.shape)}, as the tokens")
    return mask != 0


def _longest(mask: Tensor) -> int:
    """Tokens of the longest row, at least 1."""
    return max(int(mask.sum(1).max()), 1)


def _check_model(root: Any, batch: Mapping[str, Any], inputs: Mapping[str, Any], labels: Tensor) -> None:
    ids = inputs.get("input_ids")
    if is_encoder_decoder(root) or not isinstance(ids, Tensor) or labels.shape != ids.shape:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else "none"
        raise ValueError(
            "InContext: a context stands in front of the tokens of a language model, whose labels have the shape of its "
            f"input_ids; here labels have {tuple(labels.shape)}, input_ids {shape}, in {type(root).__name__}"
        )
    others = [name for name, t in inputs.items() if isinstance(t, Tensor) and name not in ("input_ids", "attention_mask")]
    if others:
        raise ValueError(
            f"InContext: the batch has {others[0]}, which says nothing of the context's tokens; leave it out (packed rows "
            "have no context of their own: packing and padding_free off)"
        )
    if batch.get("shift_labels") is not None:
        raise ValueError(
            "InContext: the batch has shift_labels, and the teacher's tokens are found by labels, the ids of the tokens "
            "beside them; leave shift_labels out"
        )


def _check_tokens(teacher: Tensor, student: Tensor, ignore_index: int) -> None:
    """Raises ValueError where the teacher's tokens that count are not the student's."""
    for row, (theirs, mine) in enumerate(zip(teacher, student, strict=True)):
        a, b = theirs[theirs != ignore_index], mine[mine != ignore_index]
        if len(a) != len(b):
            raise ValueError(
                f"InContext: in row {row} {len(a)} of the teacher's labels count and {len(b)} of the student's; both have "
                "the same answer. Was one of them cut (max_length)? Cut both alike, or shorten the context. Padding (where "
                "attention_mask is 0) never counts"
            )
        if not torch.equal(a, b):
            first = int((a != b).nonzero()[0])
            raise ValueError(
                f"InContext: in row {row} token {first} of those that count is {int(a[first])} for the teacher and "
                f"{int(b[first])} for the student; both have the same answer"
            )


def _check_first(teacher: Tensor, student: Tensor, ignore_index: int) -> None:
    """Raises ValueError where nothing stands before a token that counts in the teacher's rows."""
    wrong = (teacher[:, 0] != ignore_index) & (student[:, 0] == ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"InContext: in row {int(wrong.nonzero()[0])} the teacher's first token counts, and nothing stands before it to "
            "predict it from; give the row a context, or set the label of its first token to ignore_index"
        )


def _check_ids(ids: Tensor, mask: Tensor, name: str, vocabulary: int | None) -> None:
    """Raises ValueError for what is no token, where it is none of padding."""
    wrong = mask & ((ids < 0) | ((ids >= vocabulary) if vocabulary is not None else False))
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        known = "ids begin at 0" if vocabulary is None else f"the model's vocabulary has {vocabulary} ids, from 0"
        raise ValueError(
            f"InContext: example {row} of the batch has the id {int(ids[row, place])} in {name}; {known}. Take the model's "
            "own tokenizer, and 0 in an attention mask for padding"
        )


def _check_labels(labels: Tensor, ids: Tensor, counts: Tensor) -> None:
    """Raises ValueError where a label that counts is not the id beside it."""
    wrong = counts & (labels != ids)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"InContext: example {row} of the batch has teacher_labels of {int(labels[row, place])} at place {place}, where "
            f"teacher_input_ids have {int(ids[row, place])}; labels are the ids themselves, or ignore_index, and the model "
            "shifts them"
        )


def _without_those_behind_padding(labels: Tensor, teacher: Tensor, mask: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The student's labels and the teacher's without those whose predecessor is masked in the student's row.

    The first of a row stays, since shifting leaves it out and virtual tokens may stand before it.
    """
    counts = labels != ignore_index
    stays = nn.functional.pad(mask[:, :-1], (1, 0), value=True) & counts
    there = torch.zeros_like(teacher).scatter_reduce(1, _places(teacher != ignore_index, counts), stays.to(teacher), "amax")
    return labels.masked_fill(~stays, ignore_index), teacher.masked_fill(there == 0, ignore_index)


def _places(theirs: Tensor, mine: Tensor) -> Tensor:
    """(batch, time): where the k-th token that counts for the student is among the teacher's."""
    there = theirs.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # those that count first, in their order
    number = (mine.cumsum(1) - 1).clamp(0, there.shape[1] - 1)
    return torch.gather(there, 1, number)
