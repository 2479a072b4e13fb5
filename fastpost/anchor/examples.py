"""Examples with a context: one place that takes them as they are written, names what is wrong, and makes batches of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.anchor.context import (
    FIELDS,
    PREFIX,
    TOO_LONG,
    WHOLE,
    check_length,
    positions_of,
    refuse_both,
    vocabulary_of,
    with_teacher,
    without_context,
)
from fastpost.distributed import unwrap
from fastpost.r3f.conventions import shifts_labels

OF_MASKS = {PREFIX[1]: PREFIX[0], WHOLE[2]: WHOLE[0], WHOLE[1]: WHOLE[0]}  # what has an entry for each token of another


class ContextCollator:
    """A collator around another, for examples with a context of any length: pads contexts and makes the teacher's rows.

    Examples have `context_input_ids`, or `teacher_input_ids` and `teacher_labels`: ids as a list, an array or a tensor, of
    one dimension or of one row; an empty context is one. An example may have a `context_attention_mask` or
    `teacher_attention_mask` of its own, 0 where a token is padding. A field of None is none. The rest of an example goes to
    the other collator. `AnchorTrainer` puts it around its own where anchor="context".

    A label behind padding has nothing to be predicted from: in the batch it does not count.

    Args:
        collate: makes a batch with `input_ids` and `labels` of the other fields.
        ignore_index: of labels that do not count.
        model: the teacher's, whose vocabulary and positions rows are compared with. Only numbers are kept of it. None: the
            anchor compares them, when it gets the batch.
        shift_labels: whether the model compares row t with label t + 1; None: as the model's own loss, True without one.

    Raises:
        ValueError: an example without a context among others with one, with both kinds, with several rows, with ids outside
            of the vocabulary, or with labels that are not the ids; as `InContext`, for rows that do not fit.
        TypeError: an example's field that holds no token ids.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        ignore_index: int = -100,
        *,
        model: Any = None,
        shift_labels: bool | None = None,
    ) -> None:
        root = unwrap(model)
        self.collate, self.ignore_index = collate, ignore_index
        self.vocabulary, self.positions = vocabulary_of(root), positions_of(root)
        self.shift_labels = (model is None or shifts_labels(root)) if shift_labels is None else shift_labels

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The other collator's batch, with teacher_input_ids, teacher_labels and teacher_attention_mask."""
        form = _form(examples)
        fields = [_rows(example, form, k) for k, example in enumerate(examples)]
        batch = dict(self.collate([without_context(example) for example in examples]))
        if missing := [name for name in ("input_ids", "labels") if not isinstance(batch.get(name), Tensor)]:
            raise ValueError(f"InContext: the collator made a batch without {missing[0]}, so there is nothing to teach")
        if len(examples) != len(batch["input_ids"]):
            raise ValueError(
                f"InContext: the collator packs {len(examples)} examples into {len(batch['input_ids'])} rows, of which none "
                "has a context of its own; leave packing and padding_free off"
            )
        for name in fields[0]:
            fill = self.ignore_index if name == "teacher_labels" else 0
            rows = [example[name] for example in fields]
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
            batch[name] = padded.to(batch["input_ids"].device)
        batch = with_teacher(batch, self.ignore_index, self.shift_labels, self.vocabulary)
        check_length(batch["teacher_attention_mask"], self.positions)
        return batch


def check_examples(data: Any, collate: ContextCollator, columns: Container[str] | None = None) -> None:
    """Looks through a data set whose examples lie there, for contexts that are missing and rows that are too long.

    Only lengths are looked at. What makes its examples when they are drawn is left to the collator.

    Args:
        data: a list of mappings or a table of `datasets`; others are passed over.
        columns: those that reach the collator; None: all.

    Raises:
        ValueError: an example without a context; one that is longer than the model has positions, once it is collated.
    """
    if type(data) in (list, tuple):
        lengths: Iterable[dict[str, int | None]] = map(_lengths, data)
        if not all(isinstance(example, Mapping) for example in data):
            return
    else:
        found = _lengths_of_table(data)
        if found is None:
            return
        lengths = found
    longest, most = 0, 0
    for k, example in enumerate(lengths):
        refuse_both(example, f"example {k} of the data set")
        _refuse_lacking(example, form := _form_of(example), f"example {k} of the data set")
        length = sum(example.get(name) or 0 for name in (form[0], *(("input_ids",) if form == PREFIX[:1] else ())))
        longest, most = (k, length) if length > most else (longest, most)
    if collate.positions is None or most <= collate.positions:
        return
    example = {name: value for name, value in data[longest].items() if columns is None or name in columns}
    try:  # the collator may cut it
        collate([example])
    except Exception as error:  # what else it refuses it refuses when the example is drawn
        if str(error).startswith(TOO_LONG):
            raise ValueError(str(error).replace("example 0 of the batch", f"example {longest} of the data set")) from None


def collate_without_context(collate: Callable[[list[Any]], Any], examples: list[Any]) -> Any:
    """What another collator makes of examples without a teacher's fields."""
    return collate([without_context(example) if isinstance(example, Mapping) else example for example in examples])


def _form(examples: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The fields that every example of a batch has to have."""
    present = [{name for name in FIELDS if example.get(name) is not None} for example in examples]
    for k, names in enumerate(present):
        refuse_both(names, f"example {k} of the batch")
    form = next((form for names in present if (form := _form_of(names)) != PREFIX[:1]), PREFIX[:1])
    for k, names in enumerate(present):
        _refuse_lacking(names, form, f"example {k} of the batch")
    return form


def _form_of(names: Container[str]) -> tuple[str, ...]:
    """The fields that an example has to have: those of a context, or of the teacher's whole row."""
    whole = WHOLE[0] in names or (WHOLE[1] in names and not any(name in names for name in PREFIX))
    return WHOLE[:2] if whole else PREFIX[:1]


def _refuse_lacking(names: Container[str], form: tuple[str, ...], where: str) -> None:
    if lacking := [name for name in form if name not in names]:
        what = "without a context it is an empty list"
        if lacking[0] in WHOLE:
            what = "a teacher's whole row is teacher_input_ids with teacher_labels, and a batch has one kind of examples"
        raise ValueError(f"InContext: {where} has no {lacking[0]}; {what}")


def _rows(example: Mapping[str, Any], form: tuple[str, ...], k: int) -> dict[str, Tensor]:
    """An example's fields as int64 tensors of one dimension, with a mask."""
    found = {name: _tokens(example[name], name, k) for name in form}
    name = PREFIX[1] if form == PREFIX[:1] else WHOLE[2]
    if example.get(name) is None:
        found[name] = torch.ones_like(found[form[0]])
    else:
        found[name] = mask = _row(example[name], name, k).long()
        if bool(wrong := mask[(mask != 0) & (mask != 1)].tolist()):
            raise ValueError(
                f"InContext: {name} of example {k} of the batch has the value {wrong[0]}; it is 1 at tokens and 0 at padding"
            )
    for other, tokens in OF_MASKS.items():
        if other in found and len(found[other]) != len(found[tokens]):
            raise ValueError(
                f"InContext: {other} of example {k} of the batch has {len(found[other])} entries, {tokens} "
                f"{len(found[tokens])} tokens; each token has one"
            )
    return found


def _tokens(value: Any, name: str, k: int) -> Tensor:
    row = _row(value, name, k)
    if row.numel() and (row.dtype.is_floating_point or row.dtype.is_complex or row.dtype == torch.bool):
        raise TypeError(f"InContext: {name} of example {k} of the batch has {row.dtype} numbers; {_GIVE}")
    return row.long()


_GIVE = "give token ids, a list of int as the tokenizer's input_ids"


def _row(value: Any, name: str, k: int) -> Tensor:
    """What has one row of numbers as a tensor of one dimension."""
    where = f"InContext: {name} of example {k} of the batch"
    while isinstance(value, list | tuple) and len(value) == 1 and _width(value[0]) is not None:
        value = value[0]
    if isinstance(value, list | tuple) and sum(_width(part) is not None for part in value) > 1:
        raise ValueError(f"{where} has {len(value)} rows{_shape(value)}; an example has one context: join them into one row")
    if isinstance(value, int | float):
        raise TypeError(f"{where} is a single number, {value}; {_GIVE}")
    if _width(value) is None:
        raise TypeError(f"{where} is a {type(value).__name__}; {_GIVE}")
    try:
        row = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{where} is a {type(value).__name__} of other things than numbers; {_GIVE}") from None
    if row.ndim > 1 and row.numel() and row.numel() != row.shape[-1]:
        raise ValueError(
            f"{where} has {row.numel() // row.shape[-1]} rows (shape {tuple(row.shape)}); an example has one context: join "
            "them into one row"
        )
    return row.reshape(-1)


def _shape(rows: Sequence[Any]) -> str:
    widths = {_width(row) for row in rows}
    return f" (shape ({len(rows)}, {widths.pop()}))" if len(widths) == 1 else ""


def _width(value: Any) -> int | None:
    """Entries of a list, an array or a tensor; None of anything else, a number in a tensor too."""
    if isinstance(value, list | tuple):
        return len(value)
    shape = getattr(value, "shape", None)
    return int(value.shape[-1]) if isinstance(shape, tuple) and shape else None


def _lengths(example: Any) -> dict[str, int | None]:
    """The lengths of the fields that there are, None where it is not known."""
    if not isinstance(example, Mapping):
        return {}
    return {name: _width(example[name]) for name in (*FIELDS, "input_ids") if example.get(name) is not None}


def _lengths_of_table(data: Any) -> Iterable[dict[str, int | None]] | None:
    """As `_lengths`, of the rows of a table of `datasets`, whose columns Arrow measures; None of other data."""
    names, known = getattr(data, "column_names", None), getattr(data, "format", None)
    if not isinstance(names, list) or not isinstance(known, dict) or not hasattr(data, "__len__"):
        return None
    if known.get("type") == "custom":  # a transform makes the columns when they are drawn
        return None
    names = [name for name in names if name in (*FIELDS, "input_ids")]
    if not names:
        return ({} for _ in range(min(len(data), 1)))
    return _lengths_of_columns(data.select_columns(names).with_format("arrow"), names)


def _lengths_of_columns(data: Any, names: list[str]) -> Iterable[dict[str, int | None]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import compute

    for part in data.iter(1000):
        columns = {}
        for name in names:
            column = part.column(name)
            kind = column.type
            listed = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
            flat = listed and not pyarrow.types.is_nested(kind.value_type)
            lengths = compute.list_value_length(column).to_pylist() if flat else [None] * len(column)
            columns[name] = zip(column.is_valid().to_pylist(), lengths, strict=True)
        for row in zip(*columns.values(), strict=True):
            yield {name: length for name, (there, length) in zip(columns, row, strict=True) if there}
