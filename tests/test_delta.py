"""Deltas of a run: exact ends, float64 truth in between, LiNeS by its formula, nothing written on bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import fastpost
from fastpost.gap.delta import Delta, stack_of, stacks_of

from .conftest import bits, same_bits
from .tiny import build

TEXT = torch.arange(3, 40)


def run(kind: str = "causal", dtype: torch.dtype = torch.float32):
    model = build(kind, dtype=dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fastpost.GAP(n_steps=4, lr=1e-2)(model, TEXT)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, result, start, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_exact(dtype: torch.dtype) -> None:
    model, result, start, after = run(dtype=dtype)
    delta = result.delta(model)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    delta.scale_(1.0)
    assert all(same_bits(p, after[name]) for name, p in model.named_parameters())
    assert any(not torch.equal(start[name], after[name]) for name in start)
    delta.scale_(0.0)
    assert all(same_bits(p, start[name]) for name, p in model.named_parameters())
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert delta.norm() == 0


@pytest.mark.parametrize("factor", [0.3, -1.0, 1.7])
def test_scaled_and_negated(factor: float) -> None:
    model, result, start, after = run()
    result.delta(model).scale_(factor)
    for name, p in model.named_parameters():
        a, b = start[name].double(), after[name].double()
        torch.testing.assert_close(p.double(), a + factor * (b - a), rtol=1e-6, atol=1e-7)


def test_rollback_still_works_afterwards() -> None:
    model, result, start, _ = run()
    result.delta(model).scale_(-2.0)
    result.rollback()
    assert all(same_bits(p, start[name]) for name, p in model.named_parameters())


def test_it_follows_the_parameters_that_the_model_has_now() -> None:
    """After `load_state_dict(assign=True)`, which also makes two parameters of a tied weight, with one memory or two."""
    for copied in (False, True):
        model, result, start, after = run()
        delta = result.delta(model)
        state = {name: t.clone() if copied else t for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        for made in (delta, result.delta(model)):
            made.scale_(0.5)
            for name, p in model.named_parameters(remove_duplicate=False):
                known = name if name in start else "transformer.wte.weight"
                a, b = start[known].double(), after[known].double()
                torch.testing.assert_close(p.double(), (a + b) / 2, rtol=1e-6, atol=1e-7)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(after[name] if name in after else after["transformer.wte.weight"])
        delta.scale_(0.0)
        assert all(same_bits(p, start[name]) for name, p in model.named_parameters() if name in start)
        assert same_bits(model.lm_head.weight, model.transformer.wte.weight)
        model.double()
        with pytest.raises(ValueError, match=r"its copy .*convert the model back"):
            delta.norm()


@pytest.mark.parametrize(("alpha", "beta"), [(None, None), (0.2, None), (0.1, 0.5)])
def test_lines_scales_with_depth(alpha: float | None, beta: float | None) -> None:
    model, result, start, after = run()
    factors = result.delta(model).lines_(alpha, beta)
    a = 0.5 if alpha is None else alpha
    b = 1 - a if beta is None else beta
    for name, p in model.named_parameters():
        layer = {"transformer.h.0.": 0.0, "transformer.h.1.": 1.0}.get(name[:16])
        expected = a if layer is None else a + b * layer
        assert factors[name] == pytest.approx(expected)
        x, y = start[name].double(), after[name].double()
        torch.testing.assert_close(p.double(), x + expected * (y - x), rtol=1e-6, atol=1e-7)


def test_norms_are_the_runs_drift() -> None:
    model, result, _, _ = run()
    delta = result.delta(model)
    assert delta.norm() == pytest.approx(result.drift[-1], rel=1e-5)
    assert math.sqrt(sum(n * n for n in delta.norms().values())) == pytest.approx(delta.norm())


def test_the_stack_is_the_largest() -> None:
    assert stack_of(build("causal")) == ["transformer.h.0", "transformer.h.1"]
    with pytest.raises(ValueError, match="no stack of two layers"):
        stack_of(nn.Linear(2, 2))


def test_bad_input_writes_nothing() -> None:
    model, result, _, after = run()
    delta = result.delta(model)
    name = next(iter(after))
    for factor, message in (
        (math.nan, "finite"),
        ({name: 0.5, "nowhere": 0.1}, "'nowhere'"),
        ({name: 0.5, "lm_head": 1}, "lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            delta.scale_(factor)
    for wrong in ("0.5", {name: "0.5"}, {name: None}):
        with pytest.raises(TypeError, match="Delta: a factor must be a number, not"):
            delta.scale_(wrong)
    with pytest.raises(ValueError, match="alpha"):
        delta.lines_(-0.1)
    assert all(torch.equal(bits(p), bits(after[n])) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="no weight of the model has a copy"):
        result.delta(build("llama"))
    with pytest.raises(ValueError, match="its copy"):
        Delta(model, {name: torch.zeros(3)})


# -- merging ---------------------------------------------------------------------------------------------------------------


def test_deltas_of_two_runs_add_up(tmp_path):
    torch.manual_seed(5)
    base = {name: torch.randn(4, 3) for name in ("a", "b")}
    runs = [{name: t + 0.01 * torch.randn(4, 3) for name, t in base.items()} for _ in range(2)]

    def at(weights):
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(t.clone()) for name, t in weights.items()})
        return model, Delta(model, base)

    _, second = at(runs[1])
    second.save(tmp_path / "second.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["second.safetensors"]
    sparse = {name: t.to_sparse() for name, t in second.tensors().items()}
    for other in (second.tensors(), sparse, tmp_path / "second.safetensors"):
        model, first = at(runs[0])
        first.scale_(0.5)
        first.merge_(other, 0.25)
        for name, p in model.items():
            exact = base[name].double() + 0.5 * (runs[0][name] - base[name]).double()
            exact += 0.25 * (runs[1][name] - base[name]).double()
            torch.testing.assert_close(p.double(), exact, rtol=1e-6, atol=1e-7)
        first.scale_(0.0)
        assert all(torch.equal(p, base[name]) for name, p in model.items())


def test_sixteen_bit_deltas_are_float32():
    base = torch.ones(4, dtype=torch.bfloat16)
    model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.full((4,), 1.0078125, dtype=torch.bfloat16))})
    delta = Delta(model, {"a": base})
    assert torch.equal(delta.tensors()["a"], torch.full((4,), 0.0078125))
    delta.merge_(delta.tensors(), 3.0)
    assert torch.equal(model["a"].float(), torch.full((4,), 1.03125))


def test_merging_what_does_not_fit_writes_nothing(tmp_path):
    model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(2))})
    delta = Delta(model, {"a": torch.zeros(2)})
    both = Delta(model, {"a": torch.zeros(2), "b": torch.zeros(2)})
    for second, error, message in (  # the first one fits, and is not written either
        (torch.ones(2, dtype=torch.complex64), ValueError, r"b is torch\.float32, the other delta's torch\.complex64"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"the other delta's torch\.int64"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"the other delta's torch\.bool"),
        (torch.tensor([1.0, math.nan]), ValueError, "the other delta's b is not finite"),
        (torch.tensor([1.0, math.inf]), ValueError, "the other delta's b is not finite"),
        ([1.0, 1.0], TypeError, "the other delta's b is a list, not a tensor"),
    ):
        with pytest.raises(error, match=message):
            both.merge_({"a": torch.ones(2), "b": second})
    with pytest.raises(TypeError, match="a weight must be a number, not '1'"):
        both.merge_({"a": torch.ones(2)}, "1")
    for other, weight, message in (
        ({"a": torch.ones(2), "b": torch.ones(2)}, 1.0, "'b' is none"),
        ({"a": torch.ones(3)}, 1.0, r"a is \(2,\), the other delta's \(3,\)"),
        ({"a": torch.ones(2)}, math.inf, "a weight must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            delta.merge_(other, weight)
    with pytest.raises(FileNotFoundError):
        delta.merge_(tmp_path / "none.safetensors")
    assert all(torch.equal(p, torch.ones(2)) for p in model.values())


@pytest.mark.parametrize("kind", ["t5", "seq2seq"])
def test_lines_scales_both_stacks_of_an_encoder_decoder(kind: str) -> None:
    config = build(kind).config
    for name, layers in (("encoder_layers", 2), ("decoder_layers", 3), ("num_layers", 2), ("num_decoder_layers", 3)):
        if hasattr(config, name):
            setattr(config, name, layers)
    model = AutoModelForSeq2SeqLM.from_config(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    stacks = stacks_of(model)
    assert [len(stack) for stack in stacks] == [2, 3]
    assert all("encoder" in name for name in stacks[0])
    assert all("decoder" in name for name in stacks[1])
    factors = Delta(model, start).lines_(0.2, 0.6)
    for name, p in model.named_parameters():
        expected = 0.2
        for stack in stacks:
            for layer, block in enumerate(stack):
                if name.startswith(f"{block}."):
                    expected = 0.2 + 0.6 * layer / (len(stack) - 1)
        assert factors[name] == pytest.approx(expected)
        x, y = start[name].double(), moved[name].double()
        torch.testing.assert_close(p.double(), x + expected * (y - x), rtol=1e-5, atol=1e-6)
    for stack in stacks:
        assert factors[next(n for n in factors if n.startswith(f"{stack[-1]}."))] == pytest.approx(0.8)


def test_a_tied_weight_s_delta_moves_both_names(tmp_path: Path) -> None:
    """From a model whose head is its embedding, by tensors and by file, into one whose head is a weight of its own."""
    model, result, _, _ = run()
    delta = result.delta(model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert "lm_head.weight" in names
    assert "lm_head.weight" not in dict(model.named_parameters())
    tensors = delta.tensors()
    assert set(tensors) == names
    assert tensors["lm_head.weight"] is tensors["transformer.wte.weight"]
    delta.save(tmp_path / "delta.safetensors")
    for other in (tensors, tmp_path / "delta.safetensors"):
        tied = build("causal")
        before = {name: p.detach().clone() for name, p in tied.named_parameters()}
        Delta(tied, before).merge_(other, 0.5)
        for name, p in tied.named_parameters():  # once
            torch.testing.assert_close(p, before[name] + 0.5 * tensors[name])
        untied = build("causal")
        untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())  # type: ignore[union-attr, operator]
        before = {name: p.detach().clone() for name, p in untied.named_parameters()}
        Delta(untied, before).merge_(other, 0.5)
        for name, p in untied.named_parameters():
            torch.testing.assert_close(p, before[name] + 0.5 * tensors[name])
    apart = dict(tensors, **{"lm_head.weight": tensors["lm_head.weight"] + 1})
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to transformer\.wte\.weight in this model"):
        delta.merge_(apart)
    assert all(same_bits(p, after[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("tied_at", ["before", "after"])
def test_a_weight_that_is_tied_to_one_without_a_copy_keeps_its_own(tmp_path: Path, tied_at: str) -> None:
    """A frozen embedding has no copy; the head that it is tied to, before the delta is built or after, has one."""
    model = build("causal")
    emb, head = model.transformer.wte, model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    emb.weight.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in start
    assert "transformer.wte.weight" not in start
    with torch.no_grad():
        head.weight.add_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3)))
    moved = head.weight.detach().double() - start["lm_head.weight"].double()
    if tied_at == "before":
        emb.weight = head.weight
    delta = Delta(model, start)
    emb.weight = head.weight
    assert delta.norm() == pytest.approx(float(moved.norm()), rel=1e-6)
    known = "transformer.wte.weight" if tied_at == "before" else "lm_head.weight"
    assert delta.norms()[known] == pytest.approx(float(moved.norm()), rel=1e-6)
    found = delta.tensors()
    assert found["lm_head.weight"] is found["transformer.wte.weight"]
    torch.testing.assert_close(found["lm_head.weight"].double(), moved, rtol=1e-6, atol=1e-6)
    delta.save(tmp_path / "delta.safetensors")
    delta.scale_(0.0)
    assert same_bits(emb.weight, start["lm_head.weight"])
    delta.merge_(tmp_path / "delta.safetensors", 0.5)  # once, though under two names
    torch.testing.assert_close(head.weight.double(), start["lm_head.weight"].double() + moved / 2, rtol=1e-6, atol=1e-6)
