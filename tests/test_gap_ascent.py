"""One run's steps: the text's rows of the embedding, float32 masters of 16-bit weights, weights that cannot be moved."""

from __future__ import annotations

import collections
import copy
import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpost
from fastpost.gap import rows
from fastpost.gap.later import Later

from .test_gap import VOCABULARY, a_text, bits, same, tiny_model, torch_ascent
from .test_gap_edges import Plain

# -- the embedding's rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_are_the_same_bits_as_the_whole_table(tied: bool, fused: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    assert rows.plain_embedding(model) is not None
    text = torch.cat((a_text(), a_text()[:, 2:7], a_text()[:, :1]), dim=1)  # tokens that come more than once
    oracle = copy.deepcopy(model)
    torch_ascent(oracle, text, 4, fused=fused or None)
    result = fastpost.GAP(n_steps=4, fused=fused)(model, text)
    assert same(bits(model), bits(oracle))
    assert result.moved_fraction > 0.9
    result.rollback()
    assert same(bits(model), bits(tiny_model(tie_word_embeddings=tied)))


class Doubled(nn.Module):
    """Reads its embedding twice, writes into what it read, and has a padding row."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, 8, **options)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input=input_ids)
        x *= 2.0
        x = x + 0.5 * self.embedding(input_ids.roll(1, 1)).tanh()
        return self.head(torch.tanh(self.middle(x.cumsum(1))))


def ascent_by_torch(model: nn.Module, ids: Tensor, n_steps: int) -> None:
    adam = torch.optim.Adam(model.parameters(), lr=5e-5, betas=(0.9, 0.98), maximize=True, fused=True)
    for _ in range(n_steps):
        adam.zero_grad()
        F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        adam.step()


def test_an_embedding_read_twice_with_a_padding_row() -> None:
    model = Doubled(padding_idx=5).double()
    ids = torch.tensor([[3, 5, 9, 3, 3, 20, 5, 7]])
    oracle = copy.deepcopy(model)
    ascent_by_torch(oracle, ids, 3)
    fastpost.GAP(n_steps=3)(model, ids)
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert torch.equal(model.embedding.weight[5], torch.zeros(8).double())


def scaled(model: nn.Module) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3.0

    model.embedding.__class__ = Scaled


def hooked(model: nn.Module) -> None:
    model.embedding.register_forward_hook(lambda module, args, output: output * 3.0)


@pytest.mark.parametrize("change", [scaled, hooked, lambda m: m.embedding.weight.register_hook(lambda g: g * 2)])
def test_embeddings_that_are_not_plain_rows_take_the_whole_table(change) -> None:
    model = Doubled()
    oracle = Doubled()
    change(model)
    change(oracle)
    assert rows.plain_embedding(model) is None
    ascent_by_torch(oracle, a_text(), 3)
    fastpost.GAP(n_steps=3)(model, a_text())
    assert same(bits(model), bits(oracle))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_options_that_change_rows_or_gradients(options) -> None:
    assert rows.plain_embedding(Doubled(**options)) is None


def test_no_hook_is_left() -> None:
    model = Doubled()

    def fails(m: nn.Module) -> float:
        raise KeyError

    with pytest.raises(KeyError):
        fastpost.GAP(n_steps=3)(model, a_text(), evaluate=fails)
    fastpost.GAP(n_steps=1)(model, a_text())
    assert not model.embedding._forward_hooks


# -- the recipe ------------------------------------------------------------------------------------------------------------


def test_downhill_is_ordinary_adam_bit_for_bit() -> None:
    model = tiny_model()
    oracle = copy.deepcopy(model).eval()
    adam = torch.optim.Adam(oracle.parameters(), lr=5e-5, betas=(0.9, 0.98), fused=True)
    for _ in range(3):
        adam.zero_grad()
        F.cross_entropy(oracle(input_ids=a_text()).logits[0, :-1], a_text()[0, 1:]).backward()
        adam.step()
    result = fastpost.GAP(n_steps=3, loss="mle")(model, a_text())
    assert same(bits(model), bits(oracle))
    assert result.losses == sorted(result.losses, reverse=True)


# Of the model below in float64, by torch's Adam with maximize=True (torch 2.13).
LOSSES = [3.95911444766, 4.03977678438, 4.12651380842, 4.21100177706, 4.29681772089]
DRIFT = [0.0, 0.821613647, 1.22346931, 1.6433666, 2.0491792]


def by_formula() -> nn.Module:
    """A GPT-2 whose weights need no random numbers."""
    model = tiny_model().double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(-p + 0.2 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + k).view(p.shape))
    return model


def test_a_stored_trajectory_is_reproduced() -> None:
    """Adam's recipe, the loss, the order of steps: a change to any of them moves these numbers."""
    ids = torch.tensor([3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32])
    result = fastpost.GAP(n_steps=4, lr=1e-2)(by_formula(), ids)
    assert result.losses == pytest.approx(LOSSES, rel=1e-9)
    assert result.drift == pytest.approx(DRIFT, rel=1e-8)


# -- what waits for the device ------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, comparing, and looking what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "_unique2", "nonzero", "is_nonzero"):
            self.seen[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_no_step_waits_unless_something_has_to_be_known(max_norm: float | None) -> None:
    def waits(n_steps: int, model: nn.Module, **how: object) -> int:
        gap = fastpost.GAP(n_steps=n_steps, max_norm=max_norm, **how)
        with Waits() as mode:
            gap(model, a_text())
        return mode.seen.total()

    assert waits(6, Plain()) == waits(2, Plain()) > 0
    # The counter counts: ids that a model makes anew in every step are looked at, and a guard asks for the norm.
    assert waits(6, Plain(first_token=0)) > waits(2, Plain(first_token=0))
    assert waits(6, Plain(), max_grad_norm=1e9) > waits(2, Plain(), max_grad_norm=1e9)


def test_numbers_are_read_a_step_late_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the first step was made is asked when the second is queued, all else after the last."""
    model, events, made = tiny_model(), [], []
    values, init = Later.values, Later.__init__

    def read(self: Later) -> list[float]:
        events.append(made.index(self))
        return values(self)

    monkeypatch.setattr(Later, "values", read)
    monkeypatch.setattr(Later, "__init__", lambda self, numbers: (made.append(self), init(self, numbers))[1])
    model.register_forward_pre_hook(lambda *a: events.append("forward") and None)
    fastpost.GAP(n_steps=4)(model, a_text())
    # Of the first step: loss 0, skipped 1, what it moved 2, drift 3; of each later one loss, skipped, drift; the last loss.
    forwards = ["forward"] * 2
    at_the_end = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 2, 13]
    assert events == [*forwards, 1, "forward", "forward", "forward", *at_the_end]


@pytest.mark.parametrize("how", [{}, {"loss": "mle"}, {"max_norm": 0.5}, {"max_norm": 0.5, "loss": "mle"}])
@pytest.mark.parametrize("poisoned", [(), (1, 3), (1, 2, 3, 4, 5)])
def test_a_run_that_waits_and_one_that_does_not_are_the_same(how: dict, poisoned: tuple[int, ...]) -> None:
    """Whether a step is skipped by the host or by Adam's kernel."""
    found = []
    for waits in ({"max_drift": 1e9}, {"max_grad_norm": 1e30}, {"fused": False, **how}, {}):
        model, passes = tiny_model(), itertools.count(1)
        weight = model.transformer.h[0].mlp.c_fc.weight
        weight.register_hook(lambda g, passes=passes: g * math.inf if next(passes) in poisoned else g)
        result = fastpost.GAP(n_steps=5, **waits, **{k: v for k, v in how.items() if k not in waits})(model, a_text())
        found.append((result.losses, result.drift, result.skipped_steps, result.moved_fraction, result.best_step))
        found[-1] += (b"".join(p.numpy().tobytes() for p in bits(model)),)
    assert found[0] == found[1] == found[3]
    assert found[2][2] == found[0][2] == len(poisoned)
    assert found[2][0] == pytest.approx(found[0][0], rel=1e-6)


# -- sixteen bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_masters_add_up_what_sixteen_bits_lose(dtype: torch.dtype, tied: bool) -> None:
    """Each state's gradients are those of the 16-bit model; Adam's sums are float32."""
    model = tiny_model(n_embd=64, initializer_range=0.02, tie_word_embeddings=tied).to(dtype)
    oracle = copy.deepcopy(model).eval()
    masters = [p.detach().float() for p in oracle.parameters()]
    adam = torch.optim.Adam(masters, lr=5e-5, betas=(0.9, 0.98), maximize=True, fused=True)
    for _ in range(4):
        loss = F.cross_entropy(oracle(input_ids=a_text()).logits[0, :-1].float(), a_text()[0, 1:])
        for m, g in zip(masters, torch.autograd.grad(loss, list(oracle.parameters())), strict=True):
            m.grad = g.float()
        adam.step()
        with torch.no_grad():
            for p, m in zip(oracle.parameters(), masters, strict=True):
                p.copy_(m)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fastpost.GAP(n_steps=4)(model, a_text())
    assert same(bits(model), bits(oracle))
    assert 0.3 < result.moved_fraction <= 1.0
    before = tiny_model(n_embd=64, initializer_range=0.02, tie_word_embeddings=tied).to(dtype)
    result.rollback()
    assert same(bits(model), bits(before))


def test_without_masters_it_says_how_much_moved() -> None:
    model = tiny_model(n_embd=64, initializer_range=0.02).to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"only \d+% of the weights moved") as caught:
        result = fastpost.GAP(n_steps=2, master_weights=False)(model, a_text())
    assert len(caught) == 1
    assert 0.3 < result.moved_fraction < 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coarse = fastpost.GAP(n_steps=2, lr=1e-2, master_weights=False)
        assert coarse(tiny_model().to(torch.bfloat16), a_text()).moved_fraction > 0.9


# -- weights that no step can be made in --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torchs_quantised_modules_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(Doubled(), {nn.Linear})
    with pytest.raises(ValueError, match=r"weights are quantised \(torch's quantised Linear\).*Load the model unquantised"):
        fastpost.GAP()(model, a_text())


@pytest.mark.parametrize(
    ("trainable", "adapters", "refused"),
    [(False, False, "gptq, for evaluation only"), (True, False, "gptq, without adapters"), (True, True, None)],
)
def test_quantised_checkpoints_are_refused_but_under_adapters(trainable: bool, adapters: bool, refused: str | None) -> None:
    """The marks that transformers leaves on a model that it has loaded quantised."""
    model = tiny_model()
    model.hf_quantizer = SimpleNamespace(
        is_trainable=trainable, quantization_config=SimpleNamespace(quant_method=SimpleNamespace(value="gptq"))
    )
    model._hf_peft_config_loaded = adapters
    if refused is None:
        assert fastpost.GAP(n_steps=1)(model, a_text()).drift[1] > 0
    else:
        with pytest.raises(ValueError, match=refused):
            fastpost.GAP(n_steps=1)(model, a_text())


def test_adapters_on_a_quantised_model_are_found_inside_of_a_wrapper() -> None:
    """DDP has no `peft_config`; what it wraps has."""
    inner = tiny_model()
    inner.hf_quantizer = SimpleNamespace(
        is_trainable=True, quantization_config=SimpleNamespace(quant_method=SimpleNamespace(value="gptq"))
    )
    adapted = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False))
    assert fastpost.GAP(n_steps=1)(Wrapper(adapted), a_text()).drift[1] > 0


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
