"""GAP where models, weights and texts are unlike the usual: gaps in memory, autocast around, tokens not in the text."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import fastpost
from fastpost.gap import Delta, sweep
from fastpost.gap.delta import stack_of
from fastpost.gap.guards import Probe
from fastpost.gap.tasks import read_task
from fastpost.gap.zero_shot import Choice, choice_accuracy

from .conftest import same_bits
from .test_gap import VOCABULARY, a_text, bits, same, tiny_model


class Plain(nn.Module):
    """Embedding, a layer and a head, whose logits are the output."""

    def __init__(self, first_token: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.first_token = first_token

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.first_token is not None:
            first = torch.full_like(input_ids[:, :1], self.first_token)
            x = self.embedding(torch.cat((first, input_ids), 1)).cumsum(1)[:, 1:]
        else:
            x = self.embedding(input_ids).cumsum(1)
        return self.head(torch.tanh(self.middle(x)))


def test_a_weight_with_gaps_moves_alone_and_comes_back() -> None:
    """It is a view of a larger matrix; fused optimizers walk memory, and would walk on over the neighbours."""
    dense, gapped = Plain(), Plain()
    whole = torch.zeros(8, 24)
    whole[:, 8:16] = gapped.middle.weight.detach()
    gapped.middle.weight = nn.Parameter(whole[:, 8:16])
    before = whole.clone()
    gap = fastpost.GAP(n_steps=3, fused=True)
    expected, result = gap(dense, a_text()), gap(gapped, a_text())
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    assert result.moved_fraction == expected.moved_fraction
    assert torch.equal(whole[:, :8], before[:, :8])
    assert torch.equal(whole[:, 16:], before[:, 16:])
    assert not torch.equal(whole, before)
    result.rollback()
    assert same_bits(whole, before)


def test_inside_an_autocast_region_every_state_is_seen() -> None:
    """Autocast keeps its casts of the weights until the region ends."""
    model = tiny_model().eval()

    def evaluate(m: nn.Module) -> float:
        return float(m(input_ids=a_text(), labels=a_text()).loss)

    gap = fastpost.GAP(n_steps=3, lr=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        untouched = evaluate(model)
        result = gap(model, a_text(), evaluate=evaluate)
        result.rollback()
        assert evaluate(model) == untouched
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = gap(model, a_text(), evaluate=evaluate)
    assert result.losses == expected.losses
    assert result.scores == expected.scores
    assert result.scores[1] > untouched + 0.1


@pytest.mark.parametrize("choose", [min, max])
def test_rows_that_only_the_model_reads_move_too(choose: Callable[[set[int]], int]) -> None:
    text = a_text()
    first_token = choose(set(range(VOCABULARY)) - set(text[0].tolist()))
    model, oracle = Plain(first_token), Plain(first_token)
    adam = torch.optim.Adam(oracle.parameters(), lr=5e-5, betas=(0.9, 0.98), maximize=True, fused=True)
    for _ in range(3):
        adam.zero_grad()
        nn.functional.cross_entropy(oracle(text)[0, :-1], text[0, 1:]).backward()
        adam.step()
    before = model.embedding.weight[first_token].detach().clone()
    fastpost.GAP(n_steps=3)(model, text)
    assert same(bits(model), bits(oracle))
    assert not torch.equal(model.embedding.weight[first_token], before)


def test_a_model_that_reads_other_rows_in_every_step_is_told_so() -> None:
    class Restless(Plain):
        def forward(self, input_ids: Tensor) -> Tensor:
            self.first_token = 0 if self.first_token else VOCABULARY - 1
            return super().forward(input_ids)

    model = Restless()
    before = bits(model)
    with pytest.raises(RuntimeError, match="same rows"):
        fastpost.GAP(n_steps=3)(model, a_text())
    assert same(bits(model), before)


def test_a_sweep_whose_rows_were_removed_begins_with_its_own_identity(tmp_path: Path) -> None:
    model, output = tiny_model(), tmp_path / "rows.csv"
    texts = {"a": a_text()}
    sweep(fastpost.GAP(n_steps=1, lr=1e-5), model, texts, output=output)
    other = fastpost.GAP(n_steps=1, lr=1e-2)
    with pytest.raises(ValueError, match="another sweep"):
        sweep(other, model, texts, output=output)
    output.unlink()
    rows = sweep(other, model, texts, output=output)
    assert json.loads(Path(f"{output}.json").read_text())["options"]["lr"] == 1e-2
    assert sweep(other, model, texts, output=output) == rows
    with pytest.raises(ValueError, match="another sweep"):  # its texts would lack the columns of test
        sweep(other, model, texts | {"b": a_text(9)}, output=output, test=lambda m: 0.0)


def test_the_stack_is_the_largest_whatever_its_layers_are() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.adapters = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), Adapted(), nn.Linear(4, 4)])
    assert stack_of(model) == ["layers.0", "layers.1", "layers.2"]


def test_the_kl_of_classes_that_do_not_exist_is_nothing() -> None:
    class Masked(Plain):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids).index_fill(-1, torch.tensor([1, 5]), -math.inf)

    model = Masked()
    probe = Probe(model, a_text())
    assert probe.kl(model) == pytest.approx(0.0, abs=1e-6)
    start = torch.log_softmax(model(a_text()).detach().double(), -1)
    with torch.no_grad():
        model.head.weight += 0.3 * torch.randn_like(model.head.weight)
    now = torch.log_softmax(model(a_text()).detach().double(), -1)
    keep = [k for k in range(VOCABULARY) if k not in (1, 5)]
    truth = (start.exp() * (start - now))[..., keep].sum(-1).mean()
    assert probe.kl(model) == pytest.approx(float(truth), rel=1e-5)
    assert fastpost.GAP(n_steps=2, max_kl=10.0)(model, a_text(), probe=a_text()).stop_reason == "n_steps"


def test_a_model_that_predicts_nan_answers_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    questions = [Choice("1 2 3", [" 4 5", " 6"], 0), Choice("1 2", [" 3", " 4"], 0)]
    assert choice_accuracy(model, lambda text: [int(word) for word in text.split()], questions).mean == 0.0


def test_a_delta_of_transposed_weights_is_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = Plain()
    model.middle.weight = nn.Parameter(model.middle.weight.detach().t())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.middle.weight.add_(1.0)
    Delta(model, base).save(tmp_path / "delta.safetensors")
    saved = load_file(tmp_path / "delta.safetensors")
    assert torch.equal(saved["middle.weight"], model.middle.weight.detach() - base["middle.weight"])


def test_only_newlines_end_a_line_of_a_task(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    row = {"context": "a\u2028b\u0085", "choices": ["x", "y"], "answer": 1}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert [q.context for q in read_task(path).questions] == [row["context"]] * 2


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = copy.deepcopy(Plain())
        mesh = init_device_mesh("cpu", (1,))
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh))
        with pytest.raises(ValueError, match="sharded"):
            fastpost.GAP(n_steps=1)(model, a_text())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_width_in_inference_mode(dtype: torch.dtype) -> None:
    expected = fastpost.GAP(n_steps=2)(tiny_model(), a_text())
    model = tiny_model()
    with torch.inference_mode():
        assert fastpost.GAP(n_steps=2)(model, a_text().to(dtype)).losses == expected.losses
