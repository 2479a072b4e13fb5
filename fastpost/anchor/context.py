"""Self-distillation from a context: the teacher reads a context in front of the tokens, the model learns without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpost.anchor.references import Frozen, Reference
from fastpost.ops.autograd import checks_values, waits
from fastpost.r3f.noise import is_encoder_decoder

PREFIX = ("context_input_ids", "context_attention_mask")
WHOLE = ("teacher_input_ids", "teacher_labels", "teacher_attention_mask")
FIELDS = (*PREFIX, *WHOLE)


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
      `labels`.

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
    """

    inputs: dict[str, Any]
    place: Tensor

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
    root: Any, reference: Any, batch: Mapping[str, Any], inputs: Mapping[str, Any], labels: Tensor, ignore_index: int
) -> Teaching:
    """What the teacher reads of a batch.

    Args:
        root: the student. reference: the teacher's module. batch: with the teacher's fields. inputs, labels: the student's.

    Raises:
        ValueError: no context, other inputs than tokens and their mask, shapes that do not fit, a row longer than the model
            has positions; on the CPU, and under FASTPOST_CHECKS=1, tokens that count and differ.
    """
    _check_model(root, inputs, labels)
    labels = labels.to(inputs["input_ids"].device)
    rows = with_teacher({**inputs, "labels": labels, **_fields(batch)}, ignore_index)
    ids, mask = rows["teacher_input_ids"], rows["teacher_attention_mask"]
    place = _places(rows["teacher_labels"] != ignore_index, labels != ignore_index)
    most = _positions(reference)
    if most is not None and ids.shape[1] > most:  # too wide, perhaps by padding alone
        longest = _longest(mask)
        if longest > most:
            raise ValueError(
                f"InContext: a teacher's row has {longest} tokens, and the model {most} positions; shorten the contexts or "
                "the texts, which have to fit together"
            )
        ids, mask = ids[:, :longest], mask[:, :longest]
    further = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    return Teaching({**further, "input_ids": ids, "attention_mask": mask}, place)


def with_teacher(batch: Mapping[str, Any], ignore_index: int = -100) -> dict[str, Any]:
    """A batch with the teacher's whole rows, `teacher_input_ids`, `teacher_labels` and `teacher_attention_mask`, packed to
    the left, in place of a context's fields.

    Args:
        batch: as `InContext` has it.

    Raises:
        ValueError: shapes that do not fit; on the CPU, and under FASTPOST_CHECKS=1, tokens that count in one of both and not
            in the other, or differ.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    fields = _fields(batch)
    if all(fields.get(name) is not None for name in ("context_input_ids", "teacher_input_ids")):
        raise ValueError("InContext: the batch has context_input_ids and teacher_input_ids; give one of the two")
    context = fields.get("context_input_ids")
    if context is not None:
        context_mask = _mask(fields.get("context_attention_mask"), context, "context", len(ids))
        mask = torch.cat((context_mask, _mask(batch.get("attention_mask"), ids, "", len(ids))), 1)
        teacher_labels = torch.cat((torch.full_like(context, ignore_index), labels), 1)
        teacher_ids = torch.cat((context, ids), 1)
    else:
        teacher_ids, teacher_labels = (_present(fields, name) for name in WHOLE[:2])
        mask = _mask(fields.get("teacher_attention_mask"), teacher_ids, "teacher", len(ids))
        if teacher_labels.shape != teacher_ids.shape:
            raise ValueError(
                f"InContext: teacher_labels have shape {tuple(teacher_labels.shape)}, teacher_input_ids "
                f"{tuple(teacher_ids.shape)}; they must agree"
            )
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    if not waits(mask.device):  # elsewhere the longest row is not known without a wait
        order = order[:, : _longest(mask)]
    teacher_ids, teacher_labels, mask = (t.gather(1, order) for t in (teacher_ids, teacher_labels, mask))
    teacher_ids = teacher_ids.masked_fill(~mask, 0)
    teacher_labels = teacher_labels.masked_fill(~mask, ignore_index)
    if checks_values(mask.device):
        _check_tokens(teacher_labels.cpu(), labels.cpu(), ignore_index)
    rest = without_context(batch)
    return {**rest, **dict(zip(WHOLE, (teacher_ids, teacher_labels, mask.long()), strict=True))}


class ContextCollator:
    """A collator around another, for examples with a context of any length: pads contexts and makes the teacher's rows.

    Examples have `context_input_ids`, or `teacher_input_ids` and `teacher_labels`, as lists or tensors of one dimension;
    an empty context is one. The rest of an example goes to the other collator. `AnchorTrainer` puts it around its own where
    anchor="context".

    Args:
        collate: makes a batch with `input_ids` and `labels` of the other fields.
        ignore_index: of labels that do not count.

    Raises:
        ValueError: an example without a context among others with one; as `InContext`, for rows that do not fit.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], ignore_index: int = -100) -> None:
        self.collate, self.ignore_index = collate, ignore_index

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The other collator's batch, with teacher_input_ids, teacher_labels and teacher_attention_mask."""
        batch = dict(self.collate([without_context(example) for example in examples]))
        if missing := [name for name in ("input_ids", "labels") if not isinstance(batch.get(name), Tensor)]:
            raise ValueError(f"InContext: the collator made a batch without {missing[0]}, so there is nothing to teach")
        form = WHOLE[:2] if any("teacher_input_ids" in example for example in examples) else PREFIX[:1]
        for name in form:
            lacking = [k for k, example in enumerate(examples) if example.get(name) is None]
            if lacking:
                raise ValueError(
                    f"InContext: example {lacking[0]} of the batch has no {name}; without a context it is an empty list"
                )
        if len(examples) != len(batch["input_ids"]):
            raise ValueError(
                f"InContext: the collator packs {len(examples)} examples into {len(batch['input_ids'])} rows, of which none "
                "has a context of its own; leave packing and padding_free off"
            )
        for name in form:
            fill = self.ignore_index if name == "teacher_labels" else 0
            rows = [torch.as_tensor(example[name], dtype=torch.long).reshape(-1) for example in examples]
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        lengths = torch.tensor([len(example[form[0]]) for example in examples])
        mask = torch.arange(batch[form[0]].shape[1]) < lengths[:, None]
        batch["context_attention_mask" if form == PREFIX[:1] else "teacher_attention_mask"] = mask
        return with_teacher(batch, self.ignore_index)


def _fields(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in FIELDS if batch.get(name) is not None}


def _present(fields: Mapping[str, Any], name: str) -> Tensor:
    if name not in fields:
        raise ValueError(
            f"InContext: the batch has no context: neither context_input_ids nor {name}. A ContextCollator makes them of "
            "examples that have a context"
        )
    found: Tensor = fields[name]
    return found


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


def _check_model(root: Any, inputs: Mapping[str, Any], labels: Tensor) -> None:
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


def _positions(model: Any) -> int | None:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _check_tokens(teacher: Tensor, student: Tensor, ignore_index: int) -> None:
    """Raises ValueError where the teacher's tokens that count are not the student's, or none stands before the first."""
    for row, (theirs, mine) in enumerate(zip(teacher, student, strict=True)):
        a, b = theirs[theirs != ignore_index], mine[mine != ignore_index]
        if theirs[0] != ignore_index and mine[0] == ignore_index:
            raise ValueError(
                f"InContext: in row {row} the teacher's first token counts, and nothing stands before it to predict it "
                "from; give the row a context, or set the label of its first token to ignore_index"
            )
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


def _places(theirs: Tensor, mine: Tensor) -> Tensor:
    """(batch, time): where the k-th token that counts for the student is among the teacher's."""
    there = theirs.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # those that count first, in their order
    number = (mine.cumsum(1) - 1).clamp(0, there.shape[1] - 1)
    return torch.gather(there, 1, number)
