"""R3F in several processes: DDP, FSDP2 and data split over ranks give one process's loss and gradients; a vocabulary cut
across ranks gives the whole one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastpost
from fastpost import R3F
from fastpost.distributed import sum_before

from . import distributed as d
from .tiny import Batch, batch_for, build

EPS, SEED = 0.1, 3


def tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def llama() -> nn.Module:
    return build("llama")


def alone(fused: bool, forward: str, make: Callable[[], nn.Module]) -> tuple[float, dict[str, Tensor]]:
    """The whole batch in this process."""
    model, batch = make(), batch_for("causal")
    out = R3F(EPS, seed=SEED, fused_linear=fused, forward=forward)(model, num_items=tokens(batch), **batch)
    out.loss.backward()
    return float(out.loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def check(model: nn.Module, fused: bool, forward: str, make: Callable[[], nn.Module] = llama) -> None:
    """This rank's rows, in two micro-batches, against the whole batch at once; gradients are averaged over the ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = batch_for("causal")
    rows = torch.arange(len(whole["labels"])).chunk(size)[rank]
    mine = {name: value[rows] for name, value in whole.items()}
    r3f = R3F(EPS, seed=SEED, fused_linear=fused, forward=forward)
    total = torch.zeros((), dtype=torch.float64)
    with r3f.window(token_offset=sum_before(int(mine["attention_mask"].sum()))):
        for row in range(len(rows)):
            micro = {name: value[row : row + 1] for name, value in mine.items()}
            # num_items of all ranks; times the ranks, because their gradients are averaged (as transformers' Trainer does)
            loss = r3f(model, num_items=tokens(whole), **micro).loss * size
            loss.backward()
            total += loss.detach().double() / size
    dist.all_reduce(total)
    expected, gradients = alone(fused, forward, make)
    assert abs(float(total) / expected - 1) < 1e-6
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        reference = gradients[name.removeprefix("module.")]
        assert float((grad - reference).norm()) <= 1e-5 * float(reference.norm()) + 1e-6, name


def ddp() -> None:
    check(DistributedDataParallel(build("llama")), False, "two_pass")


def ddp_double_batch() -> None:
    check(DistributedDataParallel(build("llama")), False, "double_batch")


def ddp_fused() -> None:
    check(DistributedDataParallel(build("llama")), True, "two_pass")


def sharded(**options: Any) -> nn.Module:
    model = build("llama")
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2() -> None:
    check(sharded(), False, "two_pass")


def fsdp2_double_batch() -> None:
    check(sharded(), False, "double_batch")


def fsdp2_fused() -> None:
    check(sharded(), True, "two_pass")


def softcapped() -> nn.Module:
    """A model that changes its logits after the head, so that not its output but the head's input goes into the loss."""
    return build("gemma2")


def fsdp2_fused_softcap() -> None:
    model = softcapped()
    for layer in model.model.layers:
        fully_shard(layer)
    check(fully_shard(model), True, "two_pass", softcapped)


def ddp_fused_softcap() -> None:
    check(DistributedDataParallel(softcapped()), True, "two_pass", softcapped)


def ddp_fused_looking_for_unused_parameters() -> None:
    with pytest.raises(ValueError, match="find_unused_parameters=True; leave that off"):
        check(DistributedDataParallel(build("llama"), find_unused_parameters=True), True, "two_pass")


def fsdp2_head_resharded() -> None:
    """A head that is sharded again after its forward pass cannot be read afterwards: an error that says so."""
    model = build("llama")
    fully_shard(model.lm_head, reshard_after_forward=True)
    fully_shard(model)
    with pytest.raises(TypeError, match="weight is a DTensor"):
        R3F(EPS, fused_linear=True)(model, **batch_for("causal"))


def tensor_parallel(checkpointed: bool = False) -> None:
    """A model cut as transformers cuts it, whose embedding's output went through DTensor; all ranks have the whole batch."""
    model, size = build("llama"), dist.get_world_size()
    inner = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    inner |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    inner |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan: dict[str, Any] = {f"model.layers.*.{name}": style for name, style in inner.items()}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, d.mesh_of(size), plan)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    batch = batch_for("causal")
    for forward in ("two_pass", "double_batch"):
        model.zero_grad()
        loss = R3F(EPS, seed=SEED, forward=forward)(model, **batch).loss
        loss.backward()
        expected, gradients = alone(False, forward, llama)
        assert abs(float(loss.detach()) / expected - 1) < 1e-6
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert float((grad - gradients[name]).norm()) <= 1e-5 * float(gradients[name].norm()) + 1e-6, name


def tensor_parallel_checkpointed() -> None:
    tensor_parallel(checkpointed=True)


# -- a vocabulary cut across ranks ----------------------------------------------------------------------------------------

WIDTH, VOCAB, ROWS = 16, 129, 130


class Problem:
    def __init__(self, apart: float, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(4)
        hidden = torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
        self.tensors = [
            hidden,
            hidden + apart * torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64),
            torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64),
            torch.randn(VOCAB, generator=g, dtype=torch.float64),
        ]
        self.tensors = [t.to(dtype) for t in self.tensors]
        self.labels = torch.randint(0, VOCAB, (ROWS,), generator=g)
        self.labels[::7] = -100


def cut(apart: float, dtype: torch.dtype, tolerance: float, **options: Any) -> None:
    problem = Problem(apart, dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    columns = torch.arange(VOCAB).tensor_split(size)[rank]  # 129 over 2 or 4: parts of different width
    whole = [t.clone().requires_grad_() for t in problem.tensors]
    mine = [t.clone() for t in problem.tensors[:2]] + [t[columns].clone() for t in problem.tensors[2:]]
    for t in mine:
        t.requires_grad_()
    # where each lies in 64-row chunks, so that there are several
    found = []
    for (hidden, noised, weight, bias), group, budget in ((whole, None, 1 << 30), (mine, dist.group.WORLD, 200_000)):
        out = fastpost.linear_r3f_loss(
            hidden, noised, weight, problem.labels, bias=bias, vocab_group=group, memory_budget=budget, **options
        )
        (2 * out.loss).backward()
        found.append(out)
    for a, b in zip(*found, strict=True):
        assert abs(float(b.detach()) - float(a.detach())) <= tolerance * abs(float(a.detach()))
    for k, (a, b) in enumerate(zip(whole, mine, strict=True)):
        expected = a.grad if k < 2 else a.grad[columns]
        assert b.grad is not None
        assert float((b.grad - expected).norm()) <= 10 * tolerance * float(expected.norm()), k


def vocab_in_float64() -> None:
    for options in (
        {}, {"r3f_lambda": 0.3}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "fairseq"}, {"softcap": 4.0},
        {"temperature": 2.0}, {"grad": "noised"}, {"grad": "clean"},
    ):  # fmt: skip
        cut(0.3, torch.float64, 1e-12, **options)
    for apart in (10.0, 1e-3, 1e-6):
        cut(apart, torch.float64, 1e-7 if apart < 1e-4 else 1e-10)


def vocab_in_float32() -> None:
    for apart in (10.0, 0.3, 1e-2):
        cut(apart, torch.float32, 3e-6)


def vocab_errors() -> None:
    problem = Problem(0.1, torch.float32)
    labels = problem.labels.clone()
    labels[1] = VOCAB + 3
    columns = torch.arange(VOCAB).tensor_split(dist.get_world_size())[dist.get_rank()]
    hidden, noised, weight, bias = problem.tensors
    with pytest.raises(ValueError, match=f"label {VOCAB + 3} is outside a vocabulary of {VOCAB}"):
        fastpost.linear_r3f_loss(hidden, noised, weight[columns], labels, bias=bias[columns], vocab_group=dist.group.WORLD)


def vocab_masked() -> None:
    """Classes that are -inf in both streams do not exist, whichever rank holds them; in one stream the KL is infinite."""
    problem = Problem(0.1, torch.float64)
    columns = torch.arange(VOCAB).tensor_split(dist.get_world_size())[dist.get_rank()]
    bias = problem.tensors[3].clone()
    bias[5] = bias[60] = -torch.inf
    hidden, noised, weight, _ = problem.tensors
    ours = fastpost.linear_symmetric_kl(
        hidden, noised, weight[columns], bias=bias[columns], vocab_group=dist.group.WORLD, reduction="none"
    )
    alive = bias.isfinite()
    whole = fastpost.linear_symmetric_kl(hidden, noised, weight[alive], bias=bias[alive], reduction="none")
    torch.testing.assert_close(ours, whole, rtol=1e-10, atol=0)


def fsdp2_r4f() -> None:
    """A head that is normalised and sharded: what is saved has the weight that the layer computes with."""
    model, batch = build("roberta").eval(), batch_for("roberta")
    fastpost.R4F(model.classifier, "all")  # type: ignore[arg-type]
    expected = model(**batch).logits
    fully_shard(model)
    torch.testing.assert_close(model(**batch).logits, expected)
    for whole in (get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), model.state_dict()):
        saved = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in whole.items()}
        plain = build("roberta").eval()
        plain.load_state_dict({name: t for name, t in saved.items() if "parametrizations" not in name}, strict=True)
        assert torch.equal(plain(**batch).logits, expected)
    set_model_state_dict(model, model.state_dict())
    torch.testing.assert_close(model(**batch).logits, expected)


TWO = {
    case.__name__: case
    for case in (
        ddp, ddp_double_batch, ddp_fused, ddp_fused_softcap, fsdp2, fsdp2_double_batch, fsdp2_fused, fsdp2_fused_softcap,
        fsdp2_head_resharded, vocab_in_float64, vocab_in_float32, vocab_errors, vocab_masked,
        fsdp2_r4f, ddp_fused_looking_for_unused_parameters, tensor_parallel, tensor_parallel_checkpointed,
    )
}  # fmt: skip
FOUR = {case.__name__: case for case in (vocab_in_float64, fsdp2)}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, d.Outcome]:
    return {2: d.run(2, TWO), 4: d.run(4, FOUR)}


@pytest.mark.parametrize("name", TWO)
def test_two_processes(outcomes: dict[int, d.Outcome], name: str) -> None:
    outcomes[2].of(name)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(outcomes: dict[int, d.Outcome], name: str) -> None:
    outcomes[4].of(name)


def test_one_process_stands_first() -> None:
    assert sum_before(7) == 0
