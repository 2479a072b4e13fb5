"""Distillation of whole models: LoRA on the body and on the head, and activation checkpointing, beside logits held whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastpost

from .tiny import VOCABULARY, build

peft = pytest.importorskip("peft")

IDS = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def student() -> nn.Module:
    return build("llama").double().train()


def adapted(*modules: str) -> nn.Module:
    """A student with adapters in these modules that are not at their start, where B is 0."""
    torch.manual_seed(5)
    model: nn.Module = peft.get_peft_model(student(), peft.LoraConfig(r=2, target_modules=list(modules), lora_dropout=0.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model


def hidden_of(model: nn.Module) -> Tensor:
    """What reaches the head, at the rows that have a next token."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden: Tensor = base.model(IDS).last_hidden_state[:, :-1]
    return hidden


def teacher_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The model without its adapters."""
    with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
        return hidden_of(model), model.get_base_model().lm_head.weight.clone()  # type: ignore[operator, union-attr]


def check(model: nn.Module, weight: Tensor, teacher: tuple[Tensor, Tensor]) -> None:
    """Loss and gradients of everything that is trained, against cross-entropy and KL of logits held whole."""
    trained = [p for p in model.parameters() if p.requires_grad]
    labels = IDS[:, 1:]
    hidden = hidden_of(model)
    fused = fastpost.linear_distillation_loss(hidden, weight, *teacher, labels, ce_weight=0.5, temperature=2.0).loss
    found = torch.autograd.grad(fused, trained, retain_graph=True)
    z, t = F.linear(hidden, weight).flatten(0, 1), F.linear(*teacher).flatten(0, 1)
    kl = F.kl_div((z / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    whole = kl + 0.5 * F.cross_entropy(z, labels.flatten())
    torch.testing.assert_close(fused, whole, rtol=1e-9, atol=0)
    for a, b in zip(found, torch.autograd.grad(whole, trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_lora_on_the_body() -> None:
    """The head is frozen: no gradient of its size is made."""
    model = adapted("q_proj", "down_proj")
    head: Any = model.get_base_model().lm_head  # type: ignore[operator]
    assert not head.weight.requires_grad
    check(model, head.weight, teacher_of(model))


def test_lora_on_the_head() -> None:
    """The head's weight is W + B A, and its gradient reaches both adapters."""
    model = adapted("q_proj", "lm_head")
    head: Any = model.get_base_model().lm_head  # type: ignore[operator]
    teacher = hidden_of(model).detach() + 0.1, head.base_layer.weight.clone()
    check(model, head.base_layer.weight + head.get_delta_weight("default"), teacher)


def test_activation_checkpointing() -> None:
    """The body is computed again in the backward pass; the same gradients."""
    found = []
    for again in (False, True):
        model: Any = student()
        if again:
            model.gradient_checkpointing_enable()
        teacher = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1)).double()
        head = torch.randn(VOCABULARY, 40, generator=torch.Generator().manual_seed(2)).double()
        loss = fastpost.linear_distillation_loss(hidden_of(model), model.lm_head.weight, teacher, head).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)
