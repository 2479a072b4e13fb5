"""What examples and batches with a context may look like: forms that are the same, padding, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from fastpost.anchor import Anchor, ContextCollator, Frozen, InContext, Live
from fastpost.integrations.transformers import AnchorTrainer

from . import tiny
from .conftest import same_bits
from .test_anchor_context import KL, batch_of, collate, loop, model_of, options_of, padded, texts, truth
from .trainers import arguments, logged, trainer_of

Example = dict[str, Any]
ROWS = [row for row in texts() if row["context_input_ids"]]
CONTEXT = ROWS[0]["context_input_ids"]


def whole(row: Example) -> Example:
    """The same as the teacher's whole row."""
    context = row["context_input_ids"]
    return {
        **{name: row[name] for name in ("input_ids", "labels")},
        "teacher_input_ids": context + row["input_ids"],
        "teacher_labels": [-100] * len(context) + row["labels"],
    }


def changed(row: Example, **fields: Any) -> Example:
    return {name: value for name, value in {**row, **fields}.items() if value is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def left(examples: list[Example]) -> dict[str, Tensor]:
    made = batch_of([{**example, "context_input_ids": []} for example in examples], left=True)
    return {name: t for name, t in made.items() if "context" not in name}


# -- examples ---------------------------------------------------------------------------------------------------------------

FORMS = {
    "tensor": torch.tensor,
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "array": np.array,
    "of numbers": lambda ids: [torch.tensor(i) for i in ids],
    "tokenizer's tensor": lambda ids: torch.tensor([ids]),
    "row in a list": lambda ids: [ids],
    "tensor in a list": lambda ids: [torch.tensor(ids)],
    "row of an array": lambda ids: np.array([[ids]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_row(form: str) -> None:
    """One row of tokens is the same in every form, in each field."""
    for rows in (ROWS, [whole(row) for row in ROWS]):
        other = [{n: FORMS[form](v) if "context" in n or "teacher" in n else v for n, v in row.items()} for row in rows]
        same(ContextCollator(collate)(other), ContextCollator(collate)(rows))


@pytest.mark.parametrize("empty", [[], torch.tensor([]), torch.zeros(1, 0), np.array([]), [[]]])
def test_forms_of_no_context(empty: Any) -> None:
    want = ContextCollator(collate)([ROWS[0], changed(ROWS[1], context_input_ids=[])])
    same(ContextCollator(collate)([ROWS[0], changed(ROWS[1], context_input_ids=empty)]), want)


def test_masks_of_an_example() -> None:
    """What an example's own mask hides is as if it were not there; examples without a mask have no padding."""
    want = ContextCollator(collate)(ROWS)
    mask = torch.tensor([[False, False, *[True] * len(CONTEXT)]])
    hidden = changed(ROWS[0], context_input_ids=[-100, 5, *CONTEXT], context_attention_mask=mask)
    same(ContextCollator(collate)([hidden, *ROWS[1:]]), want)
    first = whole(ROWS[0])
    hidden = changed(
        first, teacher_input_ids=[*first["teacher_input_ids"], tiny.PAD], teacher_labels=[*first["teacher_labels"], -100],
        teacher_attention_mask=[1] * len(first["teacher_input_ids"]) + [0],
    )  # fmt: skip
    same(ContextCollator(collate)([hidden, *map(whole, ROWS[1:])]), want)
    same(ContextCollator(collate)([changed(row, teacher_input_ids=None) for row in ROWS]), want)


def test_a_field_of_none_is_none() -> None:
    """As a table has them of examples of two kinds."""
    rows = [{**row, "teacher_input_ids": None, "context_attention_mask": None} for row in ROWS]
    same(ContextCollator(collate)(rows), ContextCollator(collate)(ROWS))


IDS, LABELS = whole(ROWS[1])["teacher_input_ids"], whole(ROWS[1])["teacher_labels"]
C, M, T, L = "context_input_ids", "context_attention_mask", "teacher_input_ids", "teacher_labels"
AT, HAS = "of example 1 of the batch", "example 1 of the batch has"
# Of example 1, which has a context or is the teacher's whole row.
WRONG: list[tuple[type[Exception], str, Example]] = [
    (TypeError, f"{C} {AT} is a str; give token ids, a list of int as the tokenizer's input_ids", {C: "hello"}),
    (TypeError, f"{C} {AT} is a list of other things", {C: ["a", "b"]}),
    (TypeError, f"{C} {AT} is a list of other things", {C: [2**70]}),
    (TypeError, f"{C} {AT} is a dict; give", {C: {"input_ids": [3]}}),
    (TypeError, f"{C} {AT} is a single number", {C: 5}),
    (TypeError, f"{C} {AT} is a Tensor; give", {C: torch.tensor(5)}),
    (TypeError, f"{C} {AT} has torch.float32 numbers", {C: [1.5, 2.0]}),
    (TypeError, f"{C} {AT} has torch.bool numbers", {C: [True, False]}),
    (ValueError, rf"{C} {AT} has 2 rows \(shape \(2, 3\)\)", {C: [[3, 4, 5]] * 2}),
    (ValueError, rf"{C} {AT} has 2 rows \(shape \(2, 3\)\)", {C: torch.full((2, 3), 4)}),
    (ValueError, f"{C} {AT} has 2 rows; ", {C: [[3, 4, 5], [6]]}),
    (ValueError, rf"{C} {AT} has 3 rows \(shape \(3, 1\)\)", {C: [[3], [4], [5]]}),
    (ValueError, f"{HAS} the id -100 in {C}", {C: [-100, 3]}),
    (ValueError, f"{HAS} the id 999 in {C}; the model's vocabulary has 61 ids", {C: [4, 999]}),
    (ValueError, f"{HAS} {C} and {T}; give one of the two", {T: IDS, L: LABELS}),
    (ValueError, f"{HAS} {C} and {L}; give one of the two", {L: LABELS}),
    (ValueError, rf"{M} {AT} has 2 entries, {C} \d tokens", {M: [1, 1]}),
    (ValueError, f"{M} {AT} has the value 2", {M: [2] * len(ROWS[1][C])}),
    (TypeError, f"{M} {AT} is a str", {M: "left"}),
    (ValueError, r"row has 7\d tokens, and the model 64 positions; .* of example 1 of the batch", {C: [3] * 65}),
    (ValueError, f"{HAS} no {C}; without a context it is an empty list", {C: None}),
    (ValueError, f"{HAS} no {C}", {C: None, M: [1]}),
]
WRONG_WHOLE: list[tuple[type[Exception], str, Example]] = [
    (ValueError, rf"{L} {AT} has \d+ entries, {T} \d+ tokens", {L: LABELS[:-1]}),
    (ValueError, rf"{HAS} {L} of \d+ at place \d, where {T} have \d+", {L: LABELS[1:] + LABELS[:1]}),
    (ValueError, f"{HAS} the id 61 in {T}", {T: [61, *IDS[1:]]}),
    (ValueError, f"{HAS} no {L}", {L: None}),
    (ValueError, f"{HAS} no {T}", {T: None}),
    (TypeError, f"{L} {AT} is a str", {L: "yes"}),
    (ValueError, f"teacher_attention_mask {AT} has 1 entries", {"teacher_attention_mask": [1]}),
]


@pytest.mark.parametrize(("kind", "error", "message", "fields"), [
    *(("prefix", *case) for case in WRONG), *(("whole", *case) for case in WRONG_WHOLE),
])  # fmt: skip
def test_examples_that_are_refused(kind: str, error: type[Exception], message: str, fields: Example) -> None:
    rows = ROWS if kind == "prefix" else [whole(row) for row in ROWS]
    with pytest.raises(error, match=message):
        ContextCollator(collate, model=tiny.build("llama"))([rows[0], changed(rows[1], **fields), *rows[2:]])


# -- batches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["prefix", "whole"])
def test_a_label_behind_padding_does_not_count(by: str) -> None:
    """With labels = input_ids the first token of a row has nothing to be predicted from, on either side of padding."""
    rows = [{**row, "labels": row["input_ids"]} for row in texts()]  # one of them without a context
    model = model_of("live")
    start = tiny.build("llama", 0.0, torch.float64)
    anchor = Anchor(InContext(start), KL, ce_weight=0.5)
    want = torch.stack(truth(model, start, rows)).detach()
    examples = rows if by == "prefix" else [whole(row) for row in rows]
    for side in (collate, left):
        batch = ContextCollator(side)(examples)
        again = Anchor(InContext(start), KL, ce_weight=0.5)(model, **batch)
        torch.testing.assert_close(torch.stack((again.divergence, again.task_loss)), want, rtol=1e-6, atol=0)
        assert int((batch["labels"][:, 1:] != -100).sum()) == sum(len(row["labels"]) - 1 for row in rows)
    found = []
    for fill in (tiny.PAD, 7):  # what stands in the padding is nothing to the loss
        batch = batch_of(rows, left=True)
        batch["input_ids"] = padded([row["input_ids"] for row in rows], True, fill)
        found.append(anchor(model, **batch).loss.detach())
    assert same_bits(*found)
    torch.testing.assert_close(found[0], 0.5 * want[1] + KL * want[0], rtol=1e-6, atol=0)


def test_a_label_behind_a_hole_does_not_count() -> None:
    row = {**ROWS[0], "labels": ROWS[0]["input_ids"]}
    batch = batch_of([row])
    batch["attention_mask"][0, 2], batch["labels"][0, 2] = 0, -100
    model, found = model_of("live"), []
    for label in (int(batch["labels"][0, 3]), -100):
        batch["labels"][0, 3] = label
        found.append(Anchor(InContext(Live()), 1.0, ce_weight=0.0)(model, **batch).divergence)
    assert same_bits(*found)


def test_virtual_tokens_stand_before_no_token_of_the_teacher() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny.build("llama", 0.0, torch.float64), config).double().train()
    found = []
    for k in (0, 1):
        row = {**texts()[0], "labels": [-100] * k + texts()[0]["input_ids"][k:]}
        found.append(Anchor(InContext(tiny.build("llama", 0.0, torch.float64)), KL)(model, **batch_of([row])).loss.detach())
    assert same_bits(*found)


def test_labels_that_are_shifted_already() -> None:
    """Row t has label t, so a label behind padding has a row of its own, and labels are not the ids beside them."""
    rows = [{**row, "labels": [*row["input_ids"][1:], 5]} for row in texts()]  # one of them without a context
    model = model_of("live")
    found = []
    for side in (collate, left):
        for examples in (rows, [whole(row) for row in rows]):
            batch = ContextCollator(side, shift_labels=False)(examples)
            anchor = Anchor(InContext(Live()), 1.0, ce_weight=0.0, shift_labels=False)
            found.append(anchor(model, **batch).divergence)
    torch.testing.assert_close(torch.stack(found[1:]), found[0].expand(3), rtol=1e-6, atol=0)


def test_batches_that_are_refused() -> None:
    model, batch = tiny.build("llama"), batch_of(ROWS)
    anchor = Anchor(InContext(Live()), 1.0, ce_weight=0.0)
    teacher = ContextCollator(collate)(ROWS)

    def refused(error: type[Exception], message: str, of: dict[str, Any] = batch, **fields: Any) -> None:
        with pytest.raises(error, match=message):
            anchor(model, **changed(of, **fields))

    refused(TypeError, "context_input_ids is a list; .* integer tensors of shape .batch, length.",
            context_input_ids=batch["context_input_ids"].tolist())  # fmt: skip
    refused(TypeError, "context_input_ids has torch.float32 numbers", context_input_ids=batch["context_input_ids"].float())
    refused(TypeError, "teacher_labels is a list", of=teacher, teacher_labels=[[1]])
    refused(ValueError, "^InContext: the batch has shift_labels", shift_labels=batch["labels"])
    beyond = batch["context_input_ids"].clone()
    beyond[2, 1] = 61
    refused(
        ValueError, f"example 2 of the batch has the id 61 in {C}; the model's vocabulary has 61", context_input_ids=beyond
    )
    refused(ValueError, "context_input_ids and teacher_labels; give one", teacher_labels=batch["labels"])
    other = teacher["teacher_labels"].clone()
    other[1, -3:] = other[1, -3:].flip(0)
    refused(ValueError, "example 1 of the batch has teacher_labels of", of=teacher, teacher_labels=other)
    refused(ValueError, r"attention_mask has shape \(1, 2\)", of=teacher, attention_mask=torch.ones(1, 2))
    out = anchor(model, **changed(batch_of([texts()[0]]), context_input_ids=torch.zeros(1, 0), context_attention_mask=None))
    assert float(out.divergence) < 1e-6


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_context_for_a_reference_without_one(weight: float) -> None:
    """Models that take any argument would ignore it."""
    model = tiny.build("llama")
    for reference in (Frozen.copy_of(model), Live()):
        with pytest.raises(ValueError, match=r"Anchor: the batch has context_input_ids, .* wrap the reference in InContext"):
            Anchor(reference, weight)(model, **batch_of(ROWS))
    with pytest.raises(ValueError, match="the batch has teacher_input_ids"):
        Anchor(model, weight)(model.eval(), **ContextCollator(collate)(ROWS))

    class Takes(nn.Module):
        def forward(self, input_ids: Tensor, context_input_ids: Tensor) -> Any:
            return model(input_ids=input_ids)

    batch = {n: t for n, t in batch_of(ROWS).items() if n in ("input_ids", "labels", "context_input_ids")}
    assert float(Anchor(Takes(), weight)(Takes(), **batch).divergence) == 0


# -- trainers ---------------------------------------------------------------------------------------------------------------


def sloppy(examples: list[Example]) -> dict[str, Tensor]:
    """As tokenizers' collators: every field that there is has to go into the tensors."""
    assert all(set(example) == {"input_ids", "labels"} for example in examples)
    return collate(examples)


@pytest.mark.parametrize("table", [False, True])
def test_evaluation_gets_no_contexts(tmp_path: Path, table: bool) -> None:
    data: Any = Dataset.from_list(texts(12)) if table else texts(12)
    args = arguments(
        tmp_path, 2, **options_of("reference"), remove_unused_columns=False, eval_strategy="steps", eval_steps=1
    )
    trainer = trainer_of(
        AnchorTrainer, model_of("live"), args, data, data_collator=sloppy, eval_dataset={"a": data, "b": data}
    )
    trainer.train()
    assert trainer.evaluate()["eval_a_loss"] == trainer.predict(data).metrics["test_loss"]
    assert trainer.data_collator is sloppy


def test_training_padded_on_the_left(tmp_path: Path) -> None:
    """The number of labels of a step does not have those behind padding either."""
    rows = [{**row, "labels": row["input_ids"]} for row in texts(12)]
    mine, hand = model_of("reference"), model_of("reference")
    trainer = trainer_of(AnchorTrainer, mine, arguments(tmp_path, 2, **options_of("reference")), rows, data_collator=left)
    trainer.train()
    kls = loop(hand, "reference", rows, 2)
    first, second = logged(trainer, "anchor/kl")
    assert first == pytest.approx(kls[0], rel=1e-6)
    assert second == pytest.approx(
        kls[1], rel=1e-3
    )  # rotary angles are float32, and Adam divides small gradients by their size


LONG = r"a teacher's row has 6\d tokens, and the model 64 positions; .* of example 11 of the data set"


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({C: None}, "example 11 of the data set has no context_input_ids"),
        ({C: [3] * 60}, LONG),
        ({C: [3] * 65, "input_ids": [3, 4], "labels": [-100, 4]}, LONG),
    ],
)
def test_the_data_set_is_looked_through_before_the_first_step(
    tmp_path: Path, table: bool, fields: Example, message: str
) -> None:
    rows: list[Example] = [{**row, "text": "a"} for row in texts(12)]  # which no collator here could take
    rows[11] = {**rows[11], **fields}
    data: Any = Dataset.from_list([rows[11], *rows[:11]]).select([*range(1, 12), 0]) if table else rows
    model = model_of("live")
    trainer = trainer_of(AnchorTrainer, model, arguments(tmp_path, 2, **options_of("live")), data, data_collator=sloppy)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_the_collator_cuts_is_not_too_long(tmp_path: Path) -> None:
    rows = texts(4)
    rows[1] = {**rows[1], "input_ids": rows[1]["input_ids"] * 20, "labels": rows[1]["labels"] * 20}

    def cut(examples: list[Example]) -> dict[str, Tensor]:
        return collate([{name: ids[:20] for name, ids in example.items()} for example in examples])

    for data in (rows, Dataset.from_list(rows)):
        trainer = trainer_of(
            AnchorTrainer, model_of("live"), arguments(tmp_path, 2, **options_of("live")), data, data_collator=cut
        )
        trainer.train()
        assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", ["own", "on the fly"])
def test_data_that_are_made_when_they_are_drawn(tmp_path: Path, kind: str) -> None:
    """They are not made before; a fault is named when it comes."""
    rows, drawn = texts(4), []
    rows[3] = {**rows[3], "context_input_ids": "hello"}

    class Own(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, k: int) -> Example:
            drawn.append(k)
            return rows[k]

    data: Any = Own()
    if kind == "on the fly":
        data = Dataset.from_dict({"number": [0, 1, 2, 3]})
        data.set_transform(lambda batch: {n: [Own()[k][n] for k in batch["number"]] for n in rows[0]})
    options = {**options_of("live"), "gradient_accumulation_steps": 1, "remove_unused_columns": False}
    trainer = trainer_of(AnchorTrainer, model_of("live"), arguments(tmp_path, 2, **options), data, data_collator=collate)
    trainer.get_train_dataloader()
    assert not drawn
    with pytest.raises(TypeError, match="context_input_ids of example 1 of the batch is a str"):
        trainer.train()
