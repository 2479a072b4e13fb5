"""Distillation in two processes: a vocabulary cut across ranks and FSDP2 give one process's loss and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import fastpost

from . import distributed as d

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 130, 12, 20, 129
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")


# -- a vocabulary cut across ranks ----------------------------------------------------------------------------------------


def tensors(dtype: torch.dtype, apart: float | None = None) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias of a student and of a teacher (another model, or one so far apart), and labels."""
    g = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    student = [normal(ROWS, WIDTH), normal(VOCAB, WIDTH), normal(VOCAB)]
    if apart is None:
        teacher = [normal(ROWS, TEACHER_WIDTH), normal(VOCAB, TEACHER_WIDTH), normal(VOCAB)]
    else:
        teacher = [student[0] + apart * normal(ROWS, WIDTH), student[1].clone(), student[2].clone()]
    labels = torch.randint(0, VOCAB, (ROWS,), generator=g)
    labels[::7] = -100
    return [t.to(dtype) for t in (*student, *teacher)], labels


def columns() -> Tensor:
    """This rank's, of 129 over 2: parts of different width, rows of which take different memory."""
    return torch.arange(VOCAB).tensor_split(dist.get_world_size())[dist.get_rank()]


def loss_of(leaves: list[Tensor], labels: Tensor, **options: Any) -> Any:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = leaves
    return fastpost.linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, labels, bias=bias, teacher_bias=teacher_bias, **options
    )


def cut(given: list[Tensor], labels: Tensor, tolerance: float, **options: Any) -> None:
    """The values and gradients of a cut vocabulary, in several chunks of rows, beside those of the whole one."""
    whole = [t.clone().requires_grad_() for t in given]
    mine = [(t if k % 3 == 0 else t[columns()]).clone().requires_grad_() for k, t in enumerate(given)]
    found = [
        loss_of(whole, labels, **options),
        loss_of(mine, labels, vocab_group=dist.group.WORLD, memory_budget=200_000, **options),
    ]
    factors = torch.linspace(0.5, 2, ROWS, dtype=torch.float64) if options.get("reduction") == "none" else 2
    for out in found:
        (factors * out.loss).sum().backward()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.detach().abs().max()))
    for k, (a, b) in enumerate(zip(whole, mine, strict=True)):
        assert (a.grad is None) == (b.grad is None), k
        if a.grad is not None and b.grad is not None:
            expected = a.grad if k % 3 == 0 else a.grad[columns()]
            assert float((b.grad - expected).norm()) <= 10 * tolerance * float(expected.norm()), k


VARIANTS: list[dict[str, Any]] = [
    {"grad": "both", "temperature": 2.0, "ce_weight": 0.5, "label_smoothing": 0.1},
    {"softcap": 4.0, "teacher_softcap": 6.0, "ce_weight": 1.0, "grad": "both"},
    {"reduction": "none", "ce_weight": 0.3, "ce_weighting": "probability", "temperature": 0.7},
]


def vocab_in_float64() -> None:
    given, labels = tensors(torch.float64)
    for divergence, options in itertools.product(DIVERGENCES, VARIANTS):
        cut(given, labels, 1e-10, divergence=divergence, beta=0.3, **options)
    cut(given, labels, 1e-10, mask=torch.arange(ROWS) % 3 > 0, num_items=50)


def vocab_in_float32() -> None:
    """Both models under one head, far apart and close; each row's sums are float64's on both ways."""
    for divergence, apart in itertools.product(DIVERGENCES, (1.0, 1e-2)):
        cut(*tensors(torch.float32, apart), 3e-6 if apart == 1 else 1e-4, divergence=divergence)


def vocab_of_identical_models() -> None:
    given, labels = tensors(torch.float32, 0.0)
    for divergence in DIVERGENCES:
        mine = [(t if k % 3 == 0 else t[columns()]).clone().requires_grad_() for k, t in enumerate(given)]
        out = loss_of(mine, labels, divergence=divergence, vocab_group=dist.group.WORLD)
        out.loss.backward()
        assert float(out.loss.detach()) == 0
        assert not any(bool(t.grad.any()) for t in mine if t.grad is not None)


def vocab_from_logits() -> None:
    given, labels = tensors(torch.float64)
    logits = [F.linear(*given[k : k + 3]) for k in (0, 3)]
    whole = [t.clone().requires_grad_() for t in logits]
    mine = [t[:, columns()].clone().requires_grad_() for t in logits]
    options: dict[str, Any] = {"divergence": "js", "grad": "both", "ce_weight": 0.5}
    found = [
        fastpost.distillation_loss(*whole, labels, **options),
        fastpost.distillation_loss(*mine, labels, vocab_group=dist.group.WORLD, **options),
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=0)
    for out in found:
        out.loss.backward()
    for a, b in zip(whole, mine, strict=True):
        torch.testing.assert_close(b.grad, a.grad[:, columns()], rtol=1e-9, atol=1e-14)  # type: ignore[index]


def vocab_of_a_stored_teacher() -> None:
    """The teacher's most probable classes lie on either rank, or all on one."""
    given, labels = tensors(torch.float64)
    log_probs, ids = F.linear(*given[3:]).log_softmax(-1).topk(7, -1)
    ids[0, 4:], log_probs[0, 4:] = -1, -torch.inf
    ids[1] = torch.arange(7)
    variants: list[dict[str, Any]] = [
        {"temperature": 2.0, "ce_weight": 0.5, "label_smoothing": 0.1},
        {"rest": "dropped", "softcap": 4.0, "ce_weight": 0.5},
        {"reduction": "none"},
    ]
    for divergence, options in itertools.product(DIVERGENCES, variants):
        found = []
        for columns_, group in ((slice(None), None), (columns(), dist.group.WORLD)):
            hidden, weight, bias = (t.clone().requires_grad_() for t in (given[0], given[1][columns_], given[2][columns_]))
            out = fastpost.linear_top_k_distillation_loss(
                hidden, weight, ids, log_probs, labels, bias=bias, divergence=divergence, beta=0.3, vocab_group=group,
                memory_budget=520_000, **options,
            )  # fmt: skip
            (2 * out.loss).sum().backward()
            found.append([*out, hidden.grad, weight.grad, bias.grad])
        whole, mine = found
        whole[4:] = [t[columns()] for t in whole[4:]]  # type: ignore[index]
        for a, b in zip(whole, mine, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-13)
    ids[2, 0] = VOCAB + 1
    with pytest.raises(ValueError, match=rf"row 2 holds an id outside of \[0, {VOCAB}\)"):
        fastpost.linear_top_k_distillation_loss(
            given[0], given[1][columns()], ids, log_probs, labels, vocab_group=dist.group.WORLD
        )


def vocab_masked() -> None:
    """A class that is -inf in both models does not exist, whichever rank holds it; in the student only it is infinite."""
    given, labels = tensors(torch.float64)
    alive = torch.ones(VOCAB, dtype=torch.bool)
    alive[[5, 60]] = False
    for k in (2, 5):
        given[k] = given[k].masked_fill(~alive, -torch.inf)
    mine = [t if k % 3 == 0 else t[columns()] for k, t in enumerate(given)]
    rest = [t if k % 3 == 0 else t[alive] for k, t in enumerate(given)]
    for divergence in DIVERGENCES:
        ours = loss_of(mine, None, divergence=divergence, vocab_group=dist.group.WORLD).loss  # type: ignore[arg-type]
        whole = loss_of(rest, None, divergence=divergence).loss  # type: ignore[arg-type]
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=0)
    mine[5] = mine[5].nan_to_num(neginf=0.0)
    with pytest.raises(ValueError, match=r"in row 1 the student has no probability .* so forward_kl is infinite"):
        loss_of(mine, labels, vocab_group=dist.group.WORLD)


def vocab_errors() -> None:
    given, labels = tensors(torch.float32)
    mine = [t if k % 3 == 0 else t[columns()] for k, t in enumerate(given)]
    labels[1] = VOCAB + 3
    with pytest.raises(ValueError, match=f"label {VOCAB + 3} is outside a vocabulary of {VOCAB}"):
        loss_of(mine, labels, ce_weight=1.0, vocab_group=dist.group.WORLD)
    shards = DTensor.from_local(mine[1], d.mesh_of(dist.get_world_size()), run_check=False)
    with pytest.raises(TypeError, match=r"weight is a DTensor.*\.to_local\(\), and vocab_group="):
        loss_of([mine[0], shards, *mine[2:]], labels)


# -- FSDP2 ----------------------------------------------------------------------------------------------------------------


class DistilledHead(nn.Linear):
    """A head whose forward pass is the loss: FSDP2 gathers its weight for that long."""

    def forward(self, hidden: Tensor, *teacher_and_labels: Tensor) -> Tensor:  # type: ignore[override]
        teacher_hidden, teacher_weight, labels = teacher_and_labels
        return fastpost.linear_distillation_loss(
            hidden, self.weight, teacher_hidden, teacher_weight, labels, bias=self.bias, ce_weight=0.5, reduction="sum"
        ).loss


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList(d.Block(WIDTH, 20) for _ in range(2))
        self.head = DistilledHead(WIDTH, VOCAB)
        self.to(torch.float64)

    def forward(self, x: Tensor, *teacher_and_labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x, *teacher_and_labels)
        return loss


def by_equations(model: Student, x: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    log_q, log_p = F.linear(x, model.head.weight, model.head.bias).log_softmax(-1), F.linear(teacher_hidden, teacher_weight)
    log_p = log_p.log_softmax(-1)
    counts = labels != -100
    rows = (log_p.exp() * (log_p - log_q)).sum(-1) - 0.5 * log_q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return rows[counts].sum()


def under_fsdp2(prepare: Callable[[Student], Any]) -> None:
    """Each rank has half of the rows; FSDP2 averages the gradients over the ranks."""
    given, labels = tensors(torch.float64)
    inputs = [given[0], given[3], given[4], labels]
    plain, model = Student(), Student()
    by_equations(plain, *inputs).backward()
    prepare(model)
    fully_shard(model)
    rank, size = dist.get_rank(), dist.get_world_size()
    x, teacher, weight, target = inputs
    mine = [t.chunk(size)[rank] for t in (x, teacher, target)]
    for _ in range(2):  # a second step finds everything in its place
        model.zero_grad()
        model(mine[0], mine[1], weight, mine[2]).backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert isinstance(b.grad, DTensor), name
        torch.testing.assert_close(size * b.grad.full_tensor(), a.grad, rtol=1e-9, atol=1e-12)


def fsdp2_head_in_its_own_group() -> None:
    under_fsdp2(lambda model: [fully_shard(part) for part in (*model.blocks, model.head)])


def fsdp2_head_in_the_root() -> None:
    under_fsdp2(lambda model: [fully_shard(block) for block in model.blocks])


def fsdp2_activation_checkpointing() -> None:
    """Of the blocks, and of the head with its loss."""

    def prepare(model: Student) -> None:
        model.blocks = nn.ModuleList(fully_shard(checkpoint_wrapper(block)) for block in model.blocks)
        fully_shard(model.head)

    under_fsdp2(prepare)


def fsdp2_sharded_weight() -> None:
    """A head's weight that is not gathered: an error that says what to do."""
    head = fully_shard(nn.Linear(WIDTH, VOCAB))
    given, labels = tensors(torch.float32)
    with pytest.raises(TypeError, match=r"weight is a DTensor\. Under FSDP call this where the head's weight is gathered"):
        loss_of([given[0], head.weight, *given[2:]], labels)


CASES = {
    case.__name__: case
    for case in (
        vocab_in_float64, vocab_in_float32, vocab_of_identical_models, vocab_from_logits, vocab_of_a_stored_teacher,
        vocab_masked, vocab_errors,
        fsdp2_head_in_its_own_group, fsdp2_head_in_the_root, fsdp2_activation_checkpointing, fsdp2_sharded_weight,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome() -> d.Outcome:
    return d.run(2, CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(outcome: d.Outcome, name: str) -> None:
    outcome.of(name)
