"""Rows of logits through the row operations themselves on a GPU: the CPU tests' bodies there. Operands of the fused head's
products, distillation, top-k distillation, and every kind of row that leaves the near way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastpost

from . import test_cuda_distillation as wide_distillation
from . import test_cuda_rows as wide
from . import test_distillation_rows as distillation
from . import test_operand_rows as operands
from . import test_top_k_rows as top_k
from . import test_vocab_shards as shards
from .conftest import CPU_BACKENDS
from .gpu import BACKENDS, ON_GPU, borrow, every, needs_gpu
from .test_distillation_rows import (  # noqa: F401  (collected here once more, on the device)
    test_caps,
    test_gradients_in_the_logits_place,
    test_gradients_of_two_dtypes_are_refused_before_anything_is_written,
    test_identical_rows_are_exactly_nothing,
    test_labels_outside_have_no_cross_entropy,
    test_never_negative_and_bounded,
)
from .test_top_k_rows import (  # noqa: F401
    test_a_teacher_that_leaves_next_to_nothing_to_the_rest,
    test_a_teacher_who_knows_no_class_of_a_row,
    test_ids_and_labels_that_are_no_classes_show_in_the_values,
    test_places_that_are_not_used_may_hold_any_id,
    test_rows_without_a_weight_and_rows_that_mean_nothing,
)

pytestmark = needs_gpu
KERNELS = ("cuda",) if ON_GPU else tuple(name for name in CPU_BACKENDS if name != "reference")
DIVERGENCES = distillation.DIVERGENCES


@pytest.fixture(autouse=True)
def _borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (operands, distillation, top_k, shards, wide, wide_distillation):
        borrow(monkeypatch, module)


@pytest.fixture(params=KERNELS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastpost.use_backend(request.param):
        yield request.param


# -- operands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("rule", operands.RULES, ids=str)
def test_operands_against_the_equations(backend: str, rule: dict[str, Any]) -> None:
    every(operands.test_against_the_equations, backend=backend, rule=rule)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_operands_of_rows_without_a_weight_and_of_classes_that_do_not_exist(backend: str) -> None:
    every(operands.test_what_has_no_weight_is_not_looked_at, backend=backend)
    every(operands.test_classes_that_do_not_exist, backend=backend)
    every(operands.test_the_same_bits_every_time, backend=backend)


@pytest.mark.parametrize(
    ("backend", "op"),
    [*((name, "operand_rows") for name in BACKENDS), (KERNELS[0], "js_operand_rows")],
    indirect=["backend"],
)
@pytest.mark.parametrize("rule", operands.RULES, ids=str)
def test_operands_of_rows_that_are_no_numbers(backend: str, rule: dict[str, Any], op: str) -> None:
    every(operands.test_rows_that_are_no_numbers, backend=backend, rule=rule, op=op)


# -- operands of a vocabulary that is cut across ranks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        shards.test_against_the_equations,
        shards.test_difficult_rows,
        shards.test_what_has_no_value_and_what_has_no_weight,
        shards.test_a_group_of_one_process,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_shards(backend: str, body: Any) -> None:
    every(body, backend=backend)


# -- distillation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("cols", distillation.COLS)
def test_distillation(backend: str, divergence: str, cols: int) -> None:
    every(distillation.test_values_and_gradients, backend=backend, divergence=divergence, cols=cols)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "body",
    [
        distillation.test_temperature_leaves_the_cross_entropy_alone,
        distillation.test_narrow_gradients_are_rounded_once,
        distillation.test_what_has_no_weight_is_not_looked_at,
        distillation.test_classes_that_do_not_exist,
        distillation.test_rows_that_mean_nothing_stay_by_themselves,
        distillation.test_nan_is_heard_of_wherever_it_lies,
        distillation.test_classes_of_one_stream,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_distillation_where(backend: str, body: Any, divergence: str) -> None:
    every(body, backend=backend, divergence=divergence)


@pytest.mark.parametrize(
    "body",
    [
        distillation.test_streams_that_are_close_but_for_the_class_that_one_is_sure_of,
        distillation.test_close_streams_keep_their_digits,
        distillation.test_beta,
        distillation.test_masks_of_one_stream_that_are_finite,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_distillation_of(backend: str, body: Any) -> None:
    every(body, backend=backend)


@pytest.mark.parametrize("student_dtype", distillation.HEADS)
def test_distillation_from_operands_of_two_dtypes(
    backend: str, monkeypatch: pytest.MonkeyPatch, student_dtype: torch.dtype | None
) -> None:
    body = distillation.test_streams_that_both_learn_may_have_operands_of_two_dtypes
    every(body, backend=backend, monkeypatch=monkeypatch, student_dtype=student_dtype)


# -- the most probable classes of a teacher -------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "body",
    [
        top_k.test_values_and_gradients,
        top_k.test_everything_at_once,
        top_k.test_classes_that_do_not_exist,
        top_k.test_a_known_logit_that_is_nan,
        top_k.test_a_rest_that_is_dropped,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_top_k(backend: str, body: Any, divergence: str) -> None:
    every(body, backend=backend, divergence=divergence)


def test_top_k_of_huge_logits(backend: str) -> None:
    every(top_k.test_logits_that_are_huge_or_all_the_same, backend=backend)
    every(top_k.test_few_known_classes_and_huge_logits, backend=backend)


# -- wide rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [wide.test_float32, wide.test_16_bits], ids=["float32", "16_bits"])
def test_kinds_of_wide_rows(body: Any) -> None:
    every(body)


@pytest.mark.parametrize(
    "body",
    [
        wide.test_a_centre_that_turns_out_to_be_none,
        wide.test_widths_around_whole_rounds,
        wide.test_streams_that_start_off_each_others_boundary,
        wide.test_cross_entropy_in_the_same_pass,
        wide.test_cross_entropy_in_16_bits,
        wide.test_cross_entropy_where_there_is_no_divergence,
        wide.test_cross_entropy_where_all_classes_are_masked,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_wide(backend: str, body: Any) -> None:
    if backend != "cuda" and body is wide.test_cross_entropy_where_there_is_no_divergence:
        pytest.skip("it calls the CUDA core by itself")
    every(body)


@pytest.mark.parametrize(
    "body",
    [
        wide_distillation.test_kinds_of_rows,
        wide_distillation.test_logits_beyond_units,
        wide_distillation.test_everything_at_once,
        wide_distillation.test_a_row_is_the_same_bits_alone_and_wherever_it_lies,
        wide_distillation.test_classes_of_one_stream_in_wide_rows,
        wide_distillation.test_wide_rows_that_mean_nothing,
        wide_distillation.test_wide_rows_without_a_weight_are_not_looked_at,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_wide_distillation(body: Any) -> None:
    every(body)
