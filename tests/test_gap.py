"""GAP against torch's maximize=True, its roll-back, what must not change, skipped steps, padding."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import fastpost

from .conftest import same_bits

VOCABULARY = 53


def tiny_model(**config) -> nn.Module:
    torch.manual_seed(0)
    defaults = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**defaults, "eos_token_id": 0, **config})).train()


def a_text(n: int = 12) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(1))


def bits(model: nn.Module) -> list[torch.Tensor]:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [p.detach().clone().view(integers[p.dtype.itemsize]) for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def torch_ascent(model: nn.Module, ids: torch.Tensor, n_steps: int, **options) -> list[float]:
    """The oracle: torch's own Adam with maximize=True on a model without dropout."""
    model.eval()
    adam = torch.optim.Adam(model.parameters(), lr=5e-5, betas=(0.9, 0.98), maximize=True, **options)
    losses = []
    for _ in range(n_steps):
        adam.zero_grad()
        loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:])
        loss.backward()
        losses.append(loss.item())
        adam.step()
    return losses


# -- the ascent --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_equals_maximize_bit_for_bit(fused):
    model = tiny_model()
    oracle = copy.deepcopy(model)
    losses = torch_ascent(oracle, a_text(), 4, fused=fused or None)
    result = fastpost.GAP(n_steps=4, fused=fused)(model, a_text())
    assert same(bits(model), bits(oracle))
    assert result.losses[:4] == losses
    assert len(result.losses) == len(result.drift) == 5
    assert result.best_step == 4


def test_equals_descent_on_the_negated_loss_bit_for_bit():
    model, ids = tiny_model(), a_text()
    oracle = copy.deepcopy(model).eval()
    adam = torch.optim.Adam(oracle.parameters(), lr=5e-5, betas=(0.9, 0.98), fused=True)
    for _ in range(3):
        adam.zero_grad()
        (F.cross_entropy(oracle(input_ids=ids).logits[0, :-1], ids[0, 1:]) * -1).backward()
        adam.step()
    fastpost.GAP(n_steps=3)(model, ids)
    assert same(bits(model), bits(oracle))


def test_flattened_model_takes_the_same_steps_and_keeps_its_gradients():
    model, ids = tiny_model(), a_text()
    oracle = copy.deepcopy(model)
    torch_ascent(oracle, ids, 2, fused=True)
    flat = fastpost.flatten_parameters(model)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [g.clone() for g in flat.gradients.values()]
    fastpost.GAP(n_steps=2)(model, ids)
    assert same(bits(model), bits(oracle))
    assert flat.intact
    assert same(gradients, list(flat.gradients.values()))


def test_the_loss_is_the_models_own_and_rises():
    model, ids = tiny_model(), a_text()
    expected = model.eval()(input_ids=ids, labels=ids).loss.item()
    result = fastpost.GAP(n_steps=5)(model.train(), ids)
    assert result.losses[0] == pytest.approx(expected, rel=1e-6)
    assert all(later > earlier for earlier, later in zip(result.losses, result.losses[1:], strict=False))


def test_first_step_moves_every_weight_with_a_clear_gradient_by_lr():
    model, ids = tiny_model(), a_text()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    result = fastpost.GAP(n_steps=1)(model, ids)
    counted = 0
    for name, p in model.named_parameters():
        step, gradient = (p - start[name]).double(), gradients[name]
        clear = gradient.abs() > 1e-6  # Adam's eps is 1e-8: the step is within a per cent of lr
        counted += int(clear.sum())
        assert torch.allclose(step[clear], 5e-5 * gradient[clear].sign().double(), atol=1e-6)
        assert not step[gradient == 0].any()
    assert counted > 1000
    assert result.moved_fraction > 0.97
    total = math.sqrt(sum((p - start[n]).double().square().sum().item() for n, p in model.named_parameters()))
    assert result.drift == [0.0, pytest.approx(total, rel=1e-6)]


def test_max_norm_clips():
    model = tiny_model()
    oracle, ids = copy.deepcopy(model).eval(), a_text()
    # Adam forgets the gradient's size except beside eps, so a large eps makes clipping visible.
    adam = torch.optim.Adam(oracle.parameters(), lr=0.1, betas=(0.9, 0.98), eps=1.0, maximize=True)
    oracle(input_ids=ids, labels=ids).loss.backward()
    assert nn.utils.clip_grad_norm_(oracle.parameters(), 0.01) > 0.02
    adam.step()
    fastpost.GAP(n_steps=1, lr=0.1, eps=1.0, max_norm=0.01)(model, ids)
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)


def test_frozen_weights_stay_and_keep_requires_grad():
    model = tiny_model()
    model.transformer.wpe.weight.requires_grad_(False)
    frozen, free = model.transformer.wpe.weight.clone(), model.transformer.h[0].mlp.c_fc.weight.clone()
    fastpost.GAP(n_steps=2)(model, a_text())
    assert torch.equal(frozen, model.transformer.wpe.weight)
    assert not model.transformer.wpe.weight.requires_grad
    assert not torch.equal(free, model.transformer.h[0].mlp.c_fc.weight)


def test_plain_module_with_shared_and_expanded_gradients():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 8)
            self.a, self.b = nn.Parameter(torch.zeros(VOCABULARY)), nn.Parameter(torch.zeros(VOCABULARY))
            self.transposed = nn.Parameter(torch.randn(VOCABULARY, 8).t())

        def forward(self, input_ids):
            return self.table(input_ids) @ self.transposed + (self.a + self.b)

    torch.manual_seed(0)
    model, ids = Plain(), a_text()
    oracle = copy.deepcopy(model)
    adam = torch.optim.Adam(oracle.parameters(), lr=5e-5, betas=(0.9, 0.98), maximize=True)
    for _ in range(2):
        adam.zero_grad()
        F.cross_entropy(oracle(ids)[0, :-1], ids[0, 1:]).backward()
        adam.step()
    fastpost.GAP(n_steps=2, fused=False)(model, ids)
    assert same(bits(model), bits(oracle))


# -- what must not change ----------------------------------------------------------------------------------------------


def test_no_steps_is_the_identical_model():
    model = tiny_model()
    before = bits(model)
    seen = []
    result = fastpost.GAP(n_steps=0)(model, a_text(), evaluate=lambda m: seen.append(m) or 3)
    assert same(before, bits(model))
    assert (result.best_step, result.scores, result.drift, result.stop_reason) == (0, [3.0], [0.0], "n_steps")
    assert seen == [model]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:GAP. only")
def test_rollback_is_bitwise_in_the_same_storage(dtype):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = -0.0
        model.transformer.wpe.weight[31] = float("nan")  # a position that no text here reaches
    before, addresses = bits(model), [p.data_ptr() for p in model.parameters()]
    result = fastpost.GAP(n_steps=3)(model, a_text())
    assert not same(before, bits(model))
    for _ in range(2):
        result.rollback()
        assert same(before, bits(model))
        with torch.no_grad():
            model.lm_head.weight.add_(1)
    result.rollback()
    assert addresses == [p.data_ptr() for p in model.parameters()]
    other = torch.float32 if dtype == torch.float64 else torch.float64
    model.to(other)
    now = bits(model)
    with pytest.raises(ValueError, match=r"a weight was .* when copied and is .* now.*convert the model back"):
        result.rollback()
    assert same(now, bits(model))
    model.to(dtype)
    result.rollback()
    assert same(before, bits(model))


def reassigned(model: nn.Module, change: float = 0.0) -> None:
    """Every parameter is another one in its place; tied ones are parameters of their own then."""
    state = {name: torch.add(tensor, change) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def test_rollback_reaches_the_parameters_that_the_model_has_now():
    model = tiny_model()
    before, old = {name: t.clone() for name, t in model.state_dict().items()}, list(model.parameters())
    result = fastpost.GAP(n_steps=3)(model, a_text())
    for change in (0.0, 1.0):
        reassigned(model, change)
        assert not {id(p) for p in old} & {id(p) for p in model.parameters()}
        now = {name: p.data_ptr() for name, p in model.named_parameters()}
        result.rollback()
        assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())
        assert now == {name: p.data_ptr() for name, p in model.named_parameters()}, "written in place"


def test_rollback_where_tied_weights_share_memory_but_no_parameter():
    model = tiny_model()
    before = bits(model)
    result = fastpost.GAP(n_steps=3)(model, a_text())
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.data)
    result.rollback()
    model.tie_weights()
    assert same(before, bits(model))


@pytest.mark.parametrize("gone", ["gone", "dtype", "shape"])
def test_rollback_that_cannot_reach_a_parameter_writes_nothing(gone: str):
    model = tiny_model()
    result = fastpost.GAP(n_steps=3)(model, a_text())
    norm = model.transformer.ln_f
    if gone == "gone":
        del norm.bias
        message = r"no parameter 'transformer\.ln_f\.bias' any more.*give the model the parameters back"
    else:
        norm.bias = nn.Parameter(norm.bias.detach().double() if gone == "dtype" else torch.ones(3))
        message = "convert the model back"
    now = bits(model)
    with pytest.raises(ValueError, match=message):
        result.rollback()
    assert same(now, bits(model))


def test_evaluate_may_not_replace_parameters():
    model = tiny_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def score(model: nn.Module) -> float:
        reassigned(model)
        return 1.0

    for scored in ({"evaluate": score}, {"test": score}):
        with pytest.raises(ValueError, match="evaluate or test has replaced parameters of the model"):
            fastpost.GAP(n_steps=3)(model, a_text(), **scored)
        assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())


def test_modes_gradients_and_dropout_are_put_back():
    model = tiny_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i) if i % 2 else None
    gradients = [p.grad for p in model.parameters()]
    once = fastpost.GAP(n_steps=3)(model, a_text())
    assert [m.training for m in model.modules()] == modes
    for i, (g, p) in enumerate(zip(gradients, model.parameters(), strict=True)):
        assert p.grad is g
        assert g is None or bool((g == i).all())
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.5}
    once.rollback()
    assert fastpost.GAP(n_steps=3)(model, a_text()).losses == once.losses, "dropout was on"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["evaluate", "forward", "step", "end"])
def test_whatever_is_raised_leaves_the_untouched_weights(error, where, monkeypatch):
    model = tiny_model()
    before, modes = bits(model), [m.training for m in model.modules()]
    calls = 0

    def third_time(*_):
        nonlocal calls
        calls += 1
        if calls == 3:
            assert not same(before, bits(model)), "nothing to restore yet: the test tests nothing"
            raise error("stop")
        return 1.0

    if where == "forward":
        model.transformer.h[1].register_forward_pre_hook(lambda *a: third_time() and None)
    if where == "step":
        step = torch.optim.Adam.step
        monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: (step(self), third_time()))
    if where == "end":  # of the run, as modes are put back

        @contextlib.contextmanager
        def kept_modes(model):
            with fastpost.modes.kept_modes(model):
                yield
            raise error("stop")

        monkeypatch.setattr("fastpost.gap.run.kept_modes", kept_modes)
    with pytest.raises(error, match="stop"):
        fastpost.GAP(n_steps=6)(model, a_text(), evaluate=third_time if where == "evaluate" else None)
    assert same(before, bits(model))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_no_grad_and_inference_mode_around_do_not_matter():
    expected = fastpost.GAP(n_steps=2)(tiny_model(), a_text()).losses
    for context in (torch.no_grad, torch.inference_mode):
        model, ids = tiny_model(), a_text()
        with context():
            assert fastpost.GAP(n_steps=2)(model, ids).losses == expected


# -- skipped steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_its_step(poison):
    model = tiny_model()
    oracle = copy.deepcopy(model)
    torch_ascent(oracle, a_text(), 3, fused=True)
    backward_passes = 0

    def hook(gradient):
        nonlocal backward_passes
        backward_passes += 1
        if backward_passes in (1, 3):
            gradient = gradient.clone()
            gradient.view(-1)[5] = poison
        return gradient

    model.transformer.h[0].mlp.c_fc.weight.register_hook(hook)
    evaluations = []
    result = fastpost.GAP(n_steps=5)(model, a_text(), evaluate=lambda m: evaluations.append(0) or len(evaluations))
    assert result.skipped_steps == 2
    assert same(bits(model), bits(oracle)), "a skipped step touched weights or moments"
    assert result.drift[1] == 0.0
    assert result.drift[2] == result.drift[3] > 0
    assert result.scores == [1, 1, 2, 2, 3, 4]
    assert result.best_step == 5
    assert result.moved_fraction > 0.97


def test_every_step_skipped_is_the_untouched_model():
    model = tiny_model()
    before = bits(model)
    model.lm_head.weight.register_hook(lambda g: g * math.inf)
    result = fastpost.GAP(n_steps=3)(model, a_text())
    assert (result.skipped_steps, result.moved_fraction, result.drift) == (3, 0.0, [0.0] * 4)
    assert same(before, bits(model))


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 3, 9])
@pytest.mark.parametrize("right", [0, 1, 7])
def test_padding_changes_nothing(left, right):
    text = a_text(12)
    plain = tiny_model()
    expected = fastpost.GAP(n_steps=2)(plain, text[0])
    padded = F.pad(text, (left, right), value=7)
    mask = F.pad(torch.ones_like(text), (left, right), value=0)
    by_mask = tiny_model()
    assert fastpost.GAP(n_steps=2)(by_mask, padded, mask.bool()).losses == expected.losses
    assert same(bits(plain), bits(by_mask))
    by_pad_token = tiny_model(pad_token_id=51)
    padded = F.pad(text.clamp(max=50), (left, right), value=51)
    reference = fastpost.GAP(n_steps=2)(tiny_model(), text.clamp(max=50)).losses
    assert fastpost.GAP(n_steps=2)(by_pad_token, padded).losses == pytest.approx(reference, rel=1e-6)
