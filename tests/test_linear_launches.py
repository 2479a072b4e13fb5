"""The fused head as a GPU runs it, on the CPU: products of 16-bit operands with float32 results; how much is launched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastpost
from fastpost.ops import chunks, head, linear_divergence, linear_rows, reductions

from .conftest import same_bits
from .test_linear_divergence import LEAST, Problem, relative, truth

ROWS, WIDTH, VOCAB = 512, 16, 300


# Memory without contents, questions of types, and the look at a number that only a CPU's scaling takes.
NOT_LAUNCHED = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::promote_types", "aten::_local_scalar_dense")


class Counted(TorchDispatchMode):
    """Counts what would be launched on a GPU: operations of torch that compute or move something, and row kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.fastpost.linear_divergence.default:
            with self:  # what it does inside counts, itself not
                return linear_rows._linear_divergence(*args, **kwargs)
        found = func(*args, **kwargs)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        moves = not isinstance(found, Tensor) or found.numel() > 0
        if moves and not is_view and func.name().split(".")[0] not in NOT_LAUNCHED:
            self.names.append(func.name())
        return found


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """The head takes the ways that it takes on a GPU."""
    counted = Counted()
    select = linear_rows.select

    def kernel(*args: Any) -> Any:
        function = select(*args)

        def launched(*args: Any) -> Any:
            counted.names.append("a row kernel")
            return function(*args)

        return launched

    monkeypatch.setattr(linear_rows, "select", kernel)
    monkeypatch.setattr(linear_rows, "skips_rows", lambda device: False)
    monkeypatch.setattr(head, "_multiplies_16_bits", lambda device: True)
    monkeypatch.setattr(head, "_adds_up", functools.cache(head._adds_up.__wrapped__))  # asked anew
    monkeypatch.setattr(linear_divergence, "operand_dtype", lambda weight, *hidden: weight.dtype)
    monkeypatch.setattr(chunks, "_MOST_ROWS", {})
    monkeypatch.setattr(reductions, "checks_values", lambda device: False)  # a look at values would wait
    monkeypatch.setattr(linear_divergence, "check_bounded", lambda op, kl: None)
    with torch.library._scoped_library("aten", "IMPL") as library:

        def mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
            return out.copy_(a.float() @ b.float())

        def addmm(
            total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: Any = 1, alpha: Any = 1, out: Tensor
        ) -> Tensor:
            assert beta == alpha == 1
            return out.copy_(total + a.float() @ b.float())

        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("mm.dtype", lambda a, b, dtype: a.float() @ b.float(), "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        yield counted


def loss_of(leaves: list[Tensor], labels: Tensor, **options: Any) -> Tensor:
    hidden, noised, weight, *bias = leaves
    return fastpost.linear_r3f_loss(hidden, noised, weight, labels, bias=bias[0] if bias else None, **options).loss


# -- the same results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_up", [True, False])  # the second for versions of torch whose addmm takes no float32
@pytest.mark.parametrize("hidden", ["16 bits", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"softcap": 3.0, "temperature": 1.7},
        {"grad": "noised", "label_smoothing": 0.1},
        {"grad": "clean"},
        {"r3f_lambda": 0.0},
    ],
    ids=str,
)
def test_gradients_are_as_right_as_those_of_float32_logits(
    case: dict[str, Any],
    dtype: torch.dtype,
    hidden: str,
    adds_up: bool,
    as_on_a_gpu: Counted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "_adds_up", lambda device, dtype: adds_up)
    problem = Problem(3e-2, dtype)
    wide = hidden == "float32"
    tensors = [t.float() if wide and k != 2 else t for k, t in enumerate(problem.tensors)]
    ours, reference = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    exact = [t.double().requires_grad_() for t in tensors]
    value = loss_of(ours, problem.labels, memory_budget=LEAST // 4, **case)
    value.backward()
    want = truth(exact, problem.labels, **case)[0]
    want.backward()
    # The same, held in float32 from the product on; its gradients are rounded once, to the operands' dtype.
    rounded = [t.to(dtype).float() if k < 3 else t.float() for k, t in enumerate(reference)]
    truth(rounded, problem.labels, **case)[0].backward()
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-5 if not wide else 2e-3)
    for a, b, x in zip(ours, reference, exact, strict=True):
        if a.grad is None:  # nothing is sent into the noised stream
            assert a is ours[1]
            assert not case.get("r3f_lambda", 1.0)
            continue
        assert a.grad.dtype == a.dtype
        if x.grad is None:
            assert case["grad"] == "clean"
            assert not a.grad.any()
            continue
        assert b.grad is not None
        assert relative(a.grad, x.grad) <= 2 * relative(b.grad.to(dtype), x.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_change_nothing_but_rounding(dtype: torch.dtype, as_on_a_gpu: Counted) -> None:
    problem = Problem(1e-2, dtype, rows=(400,))
    found = []
    for budget in (LEAST // 2, 1 << 30, 1 << 30):
        leaves = problem.leaves()
        value = loss_of(leaves, problem.labels, memory_budget=budget)
        value.backward()
        found.append([value.detach(), *(t.grad for t in leaves)])
    assert all(same_bits(a, b) for a, b in zip(*found[1:], strict=True))
    # One operand is the sum of two gradients, so a last digit of float32 may decide how it is rounded.
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for a, b in zip(*found[:2], strict=True):
        assert relative(a, b) < tolerance


# -- launches -------------------------------------------------------------------------------------------------------------


def launches(counted: Counted, dtype: torch.dtype, of: int, hidden: torch.dtype | None = None, **options: Any) -> list[str]:
    """Of forward and backward of the loss in so many chunks."""
    problem = [torch.randn(ROWS, WIDTH, dtype=torch.float32).to(hidden or dtype) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (*problem, torch.randn(VOCAB, WIDTH).to(dtype))]
    labels = torch.randint(0, VOCAB, (ROWS,))
    per_row = chunks.row_bytes(VOCAB, WIDTH, dtype)
    head._adds_up(labels.device, dtype)  # asked once in a process
    counted.names.clear()
    with counted:
        loss = loss_of(leaves, labels, memory_budget=per_row * ROWS // of, **options)
        loss.backward(torch.full_like(loss, 2.0))  # that it is 1 is for nothing on a CPU alone
    return list(counted.names)


@pytest.mark.parametrize(
    ("dtype", "hidden", "options", "per_chunk", "outside"),
    [
        (torch.bfloat16, None, {}, 8, 21),
        (torch.bfloat16, torch.float32, {}, 10, 21),  # autocast: a copy to the operand, the difference added in the logits
        (torch.float32, None, {}, 9, 21),  # the difference added
        (torch.bfloat16, None, {"grad": "noised", "r3f_lambda": 0.5}, 8, 24),
        (torch.bfloat16, None, {"softcap": 30.0, "temperature": 2.0}, 12, 22),
    ],
)
def test_launches_in_a_chunk_and_outside(
    dtype: torch.dtype,
    hidden: torch.dtype | None,
    options: dict[str, Any],
    per_chunk: int,
    outside: int,
    as_on_a_gpu: Counted,
) -> None:
    one, two, four = (launches(as_on_a_gpu, dtype, of, hidden, **options) for of in (1, 2, 4))
    assert [names.count("a row kernel") for names in (one, two, four)] == [1, 2, 4]
    assert len(four) - len(two) == 2 * (len(two) - len(one))
    assert len(two) - len(one) <= per_chunk, two
    assert len(one) - (len(two) - len(one)) <= outside, one


@pytest.mark.parametrize(
    ("rows", "width", "vocab", "of", "in_all"),
    [(4096, 4096, 128_256, 7, 78), (4096, 768, 50_257, 3, 46), (1024, 768, 50_257, 1, 29)],
)
def test_launches_of_a_language_model(rows: int, width: int, vocab: int, of: int, in_all: int, as_on_a_gpu: Counted) -> None:
    """A GPU's default budget of 1 GiB; it was 2,515 launches."""
    most = chunks.chunk_rows("op", rows, vocab, width, torch.bfloat16, torch.device("cuda"), 1 << 30)
    size = chunks.even_chunk(rows, most)
    assert size == rows or size % 128 == 0
    assert -(-rows // size) == of
    one, two = (len(launches(as_on_a_gpu, torch.bfloat16, k)) for k in (1, 2))
    # A last chunk that is smaller has room of its own for what it carries back.
    total = one + (of - 1) * (two - one) + (1 if rows % size else 0)
    assert total == in_all
