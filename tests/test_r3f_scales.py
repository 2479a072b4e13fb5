"""Scales of noise: relative to a row, NEFTune's, packed sequences, choices."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastpost import R3F
from fastpost.ops.noise import add_noise
from fastpost.ops.params import seed_tensor
from fastpost.r3f.noise import sequence_numbers
from tests.tiny import VOCABULARY, batch_for, build

# -- scales of noise ------------------------------------------------------------------------------------------------------


class Seen:
    """What an embedding module handed on, with noise, pass by pass."""

    def __init__(self, module: nn.Module) -> None:
        self.outputs: list[Tensor] = []
        self.module = module

    def noise_of(self, r3f: R3F, model: nn.Module, **batch: Any) -> Tensor:
        first = next(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.Dropout) or "RMSNorm" in type(m).__name__)
        handle = first.register_forward_pre_hook(lambda m, args: self.outputs.append(args[0].detach().double()))
        try:
            r3f(model, **batch)
        finally:
            handle.remove()
        clean, noised = self.outputs[-2:]
        return noised - clean


def packed() -> tuple[dict[str, Tensor], list[int]]:
    """Sequences of 5, 3 and 7 tokens: one after the other in one row."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (1, 15), generator=g)
    position = torch.cat([torch.arange(n) for n in (5, 3, 7)])[None]
    return {"input_ids": ids, "position_ids": position, "labels": ids.clone()}, [5] * 5 + [3] * 3 + [7] * 7


def test_neftune_scale_is_each_sequences_own() -> None:
    model, (batch, lengths) = build("llama"), packed()
    alpha, width = 5.0, 24
    expected = torch.tensor([alpha / math.sqrt(n * width) for n in lengths])
    z = add_noise(torch.zeros(15, width), 1.0, "uniform", seed=seed_tensor(3, torch.device("cpu")))
    noise = Seen(model).noise_of(R3F(alpha, noise_scale="neftune", seed=3), model, **batch)
    torch.testing.assert_close(noise[0], (z * expected[:, None]).double(), rtol=1e-5, atol=1e-5)

    # the same sequences in rows of their own, padded: the same tokens get the same noise
    rows = [batch["input_ids"][0, a:b] for a, b in ((0, 5), (5, 8), (8, 15))]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    alone = Seen(model).noise_of(
        R3F(alpha, noise_scale="neftune", seed=3), model, input_ids=ids, attention_mask=mask, labels=ids
    )
    torch.testing.assert_close(alone[mask.bool()], noise[0], rtol=1e-5, atol=2e-6)
    assert not alone[~mask.bool()].any()


@pytest.mark.parametrize("told", ["sequence_ids", "seq_idx", "position_ids", "attention_mask"])
def test_packed_sequences_are_told_apart(told: str) -> None:
    numbers = torch.tensor([[1] * 5 + [2] * 3 + [3] * 7])
    if told == "position_ids":
        numbers = torch.cat([torch.arange(n) for n in (5, 3, 7)])[None]
    found = sequence_numbers({told: numbers}, torch.Size((1, 15)))
    assert found is not None
    assert found.tolist() == [[0] * 5 + [1] * 3 + [2] * 7]


def test_packed_rows_that_do_not_say_so() -> None:
    with pytest.raises(ValueError, match=r"this batch is packed \(cu_seq_lens_q\): add sequence_ids"):
        sequence_numbers(
            {"cu_seq_lens_q": torch.tensor([0, 5, 15]), "attention_mask": torch.ones(1, 15)}, torch.Size((1, 15))
        )
    with pytest.raises(ValueError, match="an attention mask of blocks"):
        sequence_numbers({"attention_mask": torch.ones(1, 1, 15, 15)}, torch.Size((1, 15)))
    assert sequence_numbers({}, torch.Size((1, 15))) is None


def test_sequence_ids_are_not_given_to_the_model() -> None:
    model, (batch, _) = build("llama"), packed()
    ids = torch.tensor([[1] * 5 + [2] * 3 + [3] * 7])
    with_ids = R3F(5.0, noise_scale="neftune", seed=3)(model, sequence_ids=ids, **batch)
    assert float(with_ids.symm_kl) == float(R3F(5.0, noise_scale="neftune", seed=3)(model, **batch).symm_kl)
    model.eval()
    R3F()(model, sequence_ids=ids, **batch)


def test_relative_scale_follows_the_row() -> None:
    model, batch = build("llama"), batch_for("causal")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(torch.rand(VOCABULARY, 1) * 4)
    noise = Seen(model).noise_of(R3F(0.01, noise_scale="relative", seed=3), model, **batch)
    rows = model.get_input_embeddings()(batch["input_ids"]).detach().double()
    z = noise / (0.01 * rows.square().mean(-1, keepdim=True).sqrt())
    kept = batch["attention_mask"].bool()
    assert float(z[kept].abs().max()) <= 1 + 1e-3
    assert float(z[kept].square().mean()) == pytest.approx(1 / 3, rel=0.1)


def test_relative_noise_names_its_remedy_in_bfloat16() -> None:
    model = build("llama", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="use eps of at least about 0.008"):
        R3F(1e-4, noise_scale="relative")(model, **batch_for("causal"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        R3F(0.05, noise_scale="relative")(model, **batch_for("causal"))


def test_choices_are_sequences_of_their_own() -> None:
    """(batch, choices, time), which models flatten: each choice is scaled by its own length."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).train()
    ids = torch.randint(1, VOCABULARY, (2, 3, 7))
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    noise = Seen(model).noise_of(R3F(5.0, noise_scale="neftune", seed=3), model, **batch)
    length = mask.flatten(0, 1).sum(1)
    largest = noise.abs().flatten(1).max(1).values * (length * 24).sqrt()
    assert float(largest.max()) <= 5 + 1e-4
    assert float(largest.min()) > 4
    assert float(noise[mask.flatten(0, 1) == 0].abs().max()) == 0
