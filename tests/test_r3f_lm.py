"""R3F on language models: the fused head, one step over many micro-batches, sides of an encoder-decoder."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpost import R3F
from fastpost.anchor import Anchor
from fastpost.r3f.conventions import VARLEN, doubled
from fastpost.r3f.head import find_head
from fastpost.r3f.relatives import RDrop
from tests.conftest import same_bits
from tests.tiny import VOCABULARY, AfterHead, batch_for, build, gradients

WITH_HEAD = ("causal", "llama", "masked_lm", "seq2seq", "t5", "decoder")
FORWARDS = ("two_pass", "double_batch")


def agree(model: nn.Module, batch: dict[str, Any], tolerance: float = 1e-5, **options: Any) -> None:
    """The fused head gives the same loss and gradients as logits held whole."""
    found = []
    for fused in (False, True):
        torch.manual_seed(5)
        out = R3F(eps=1e-2, seed=7, fused_linear=fused, **options)(model, **batch)
        assert (out.logits is None) == fused
        found.append((out, gradients(model, out.loss)))
    (whole, expected), (ours, got) = found
    assert float(ours.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=tolerance)
    assert float(ours.symm_kl) == pytest.approx(float(whole.symm_kl), rel=1e-3, abs=1e-12)
    for name, gradient in expected.items():
        # beside the largest gradient: a bias under softmax may have a gradient of exactly nothing
        size = max(float(g.norm()) for g in expected.values())
        assert float((got[name] - gradient).norm()) <= 10 * tolerance * max(float(gradient.norm()), 1e-3 * size), name


# -- the fused head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITH_HEAD)
@pytest.mark.parametrize("forward", FORWARDS)
def test_fused_head_equals_whole_logits(kind: str, forward: str) -> None:
    agree(build(kind), batch_for(kind), forward=forward)


@pytest.mark.parametrize("name", ["gemma2", "granite", "recurrent_gemma", "t5gemma"])
def test_what_a_model_does_after_its_head(name: str) -> None:
    """Caps and scales of configs, of a decoder's own too, show in the loss."""
    model, batch = build(name), batch_for("t5" if name == "t5gemma" else "causal")
    agree(model, batch)
    assert not torch.allclose(model(**batch).logits, _uncapped(model, batch), rtol=0.05)


def _uncapped(model: Any, batch: dict[str, Any]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, a, out: found.append(out))
    model(**batch)
    handle.remove()
    return found[0]


def _masked(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., -2:] = -1e4
    return logits


class _Learnt(nn.Module):
    """A scale that is 1 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.scale


CHANGES: dict[str, Any] = {
    "padded": lambda z: z[..., :VOCABULARY],
    "masked": _masked,
    "cap": lambda z: 30 * torch.tanh(z / 30),
    "scale": lambda z: 1.01 * z,
    "learnt": _Learnt(),
    "clamp": lambda z: z.clamp(-50, 50),
    "bias": lambda z: z + 1e-2 * torch.eye(z.shape[-1])[-1].to(z),
    "order": lambda z: z.flip(-1),
    "normalised": lambda z: z.log_softmax(-1),
    "rows": lambda z: z.view(3, 5, -1) + 0,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_logits_that_are_not_known_are_refused_at_every_step(change: str) -> None:
    model = AfterHead(CHANGES[change], 64 if change == "padded" else VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (3, 5))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for method in (R3F(fused_linear=True), RDrop(fused_linear=True)):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"changes its logits after the head in a way .* use fused_linear=False"):
                method(model, input_ids=ids, labels=ids)
    assert model.passes == (4 if change == "rows" else 1)  # an error is no comparison, so it is asked again
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())


def test_the_look_at_a_model_changes_nothing() -> None:
    """Random numbers and running means are those of a model that was looked at before; one pass, once."""
    ids, found = torch.randint(0, VOCABULARY, (3, 5)), []
    for looked_at in (False, True):
        model, r3f = AfterHead(lambda z: z), R3F(eps=1e-2, fused_linear=True)
        if looked_at:
            start = copy.deepcopy(model.state_dict())
            r3f(model, input_ids=ids, labels=ids)
            assert model.passes == 3
            model.load_state_dict(start)
        torch.manual_seed(8)
        out = r3f(model, input_ids=ids, labels=ids)
        found.append((out.loss, out.symm_kl, torch.rand(3), model.norm.running_mean))
        assert model.passes == (5 if looked_at else 3)
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


class _FailsOnce:
    """After the head, in its first pass."""

    def __init__(self, error: Exception) -> None:
        self.errors = [error]

    def __call__(self, logits: Tensor) -> Tensor:
        if self.errors:
            raise self.errors.pop()
        return logits


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), torch.distributed.DistBackendError("lost"), MemoryError("full")], ids=repr
)
def test_a_failure_of_the_machine_is_none_of_the_model(error: Exception) -> None:
    ids = torch.randint(0, VOCABULARY, (3, 5))
    for method in (R3F(fused_linear=True), Anchor(None, 0.0), Anchor(None, 0.0, fused_linear=True)):
        model = AfterHead(_FailsOnce(error))
        with pytest.raises(type(error), match=str(error)):
            method(model, input_ids=ids, labels=ids)
        assert method(model, input_ids=ids, labels=ids).logits is None


def test_an_error_after_the_head_holds_for_its_step_alone() -> None:
    ids = torch.randint(0, VOCABULARY, (3, 5))
    model, method = AfterHead(_FailsOnce(RuntimeError("now"))), R3F(fused_linear=True)
    with pytest.raises(ValueError, match=r"a few rows of logits end in RuntimeError\); use fused_linear=False"):
        method(model, input_ids=ids, labels=ids)
    assert method(model, input_ids=ids, labels=ids).logits is None
    model, anchor = AfterHead(_FailsOnce(RuntimeError("now"))), Anchor(None, 0.0)
    assert anchor(model, input_ids=ids, labels=ids).logits is not None  # whole, where they can be had
    assert anchor(model, input_ids=ids, labels=ids).logits is None


@pytest.mark.parametrize("graph", [False, True])
def test_the_look_at_a_model_leaves_a_cache_as_it_is(graph: bool) -> None:
    model = build("causal")
    ids = torch.randint(0, VOCABULARY, (2, 5))
    with torch.set_grad_enabled(graph):  # one with a graph cannot be copied
        cache = model(input_ids=ids, use_cache=True).past_key_values
    before = [(layer.keys, layer.values) for layer in cache.layers]
    inputs = {"input_ids": ids, "attention_mask": torch.ones(2, 10), "past_key_values": cache, "use_cache": True}
    head = find_head(model, inputs)
    assert head.linear is model.lm_head
    assert cache.get_seq_length() == 5
    assert all(layer.keys is k and layer.values is v for layer, (k, v) in zip(cache.layers, before, strict=True))


def test_the_look_at_a_model_reads_what_its_encoder_has_made() -> None:
    """Outputs of transformers are made of tensors, with or without a graph."""
    model, batch = build("t5"), batch_for("t5")
    made = model.get_encoder()(input_ids=batch.pop("input_ids"), attention_mask=batch["attention_mask"])
    assert made.last_hidden_state.requires_grad
    inputs = {"encoder_outputs": made, "decoder_input_ids": batch["labels"].clamp(min=0), **batch}
    inputs.pop("labels")
    assert find_head(model, inputs).linear is model.get_output_embeddings()


def test_another_cap_of_the_config_is_seen() -> None:
    model, batch = build("gemma2"), batch_for("causal")
    agree(model, batch)
    model.config.final_logit_softcapping = 1.0
    agree(model, batch)


@pytest.mark.parametrize("options", [
    {"grad": "noised"}, {"grad": "clean"}, {"reduction": "sum"}, {"reduction": "fairseq", "label_smoothing": 0.1},
    {"label_smoothing": 0.1}, {"r3f_lambda": 0.0}, {"dropout": "shared"}, {"memory_budget": 200_000},
    {"divergence": "js"},
], ids=str)  # fmt: skip
def test_fused_head_under_every_option(options: dict[str, Any]) -> None:
    agree(build("causal", dropout=0.1), batch_for("causal"), **options)


def test_a_bias_that_the_model_adds_itself() -> None:
    model = build("seq2seq")
    model.final_logits_bias = torch.randn(1, VOCABULARY)
    before = model.final_logits_bias
    agree(model, batch_for("seq2seq"))
    assert model.final_logits_bias is before


def test_eval_mode_gives_logits() -> None:
    model = build("causal").eval()
    out = R3F(fused_linear=True)(model, **batch_for("causal"))
    assert out.logits is not None
    assert same_bits(out.loss, model(**batch_for("causal")).loss)


def test_the_head_is_back_after_an_exception() -> None:
    model, batch = build("causal"), batch_for("causal")
    handle = model.transformer.ln_f.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        R3F(fused_linear=True)(model, **batch)
    handle.remove()
    assert "forward" not in model.lm_head.__dict__
    assert model(**batch).logits.shape[-1] == VOCABULARY


def test_heads_that_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match=r"plain nn\.Linear; in BertForSequenceClassification it is missing"):
        R3F(fused_linear=True)(build("sequence"), **batch_for("sequence"))
    model = build("causal")
    model.register_forward_hook(lambda m, a, out: setattr(out, "logits", out.logits * 1.5))
    with pytest.raises(ValueError, match="changes its logits after the head in a way that fused_linear does not know"):
        R3F(fused_linear=True)(model, **batch_for("causal"))


def test_a_budget_too_small() -> None:
    with pytest.raises(ValueError, match="memory_budget of 100 bytes"):
        R3F(fused_linear=True, memory_budget=100)(build("causal"), **batch_for("causal"))
    for method in (R3F, RDrop):
        with pytest.raises(ValueError, match="memory_budget must be finite and > 0, not 0"):
            method(fused_linear=True, memory_budget=0)


@pytest.mark.parametrize("forward", FORWARDS)
def test_fused_head_of_a_compiled_model(forward: str) -> None:
    model, batch = build("causal"), batch_for("causal")
    expected = R3F(eps=0.1, seed=3, fused_linear=True, forward=forward)(model, **batch)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(model, backend="eager")
        r3f = R3F(eps=0.1, seed=3, fused_linear=True, forward=forward)
        for _ in range(2):
            r3f.step = 0
            out = r3f(compiled, **batch)
            torch.testing.assert_close(out.loss, expected.loss)
            torch.testing.assert_close(out.symm_kl, expected.symm_kl, rtol=1e-4, atol=0)
        assert compiled(**batch).logits.shape[-1] == VOCABULARY  # the head is back
    torch.compiler.reset()


# -- one step, many micro-batches -----------------------------------------------------------------------------------------


def tokens(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", ["causal", "llama"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", ["absolute", "relative", "neftune"])
def test_a_step_is_the_same_however_it_is_cut(kind: str, forward: str, fused: bool, scale: str) -> None:
    model, batch = build(kind), batch_for(kind)
    everything = tokens(batch)
    found = []
    for cuts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)], [slice(0, 2), slice(2, 3), slice(3, 4)]):
        r3f = R3F(eps=0.1, seed=3, forward=forward, fused_linear=fused, noise_scale=scale)
        model.zero_grad()
        losses = []
        with r3f.window():
            for rows in cuts:
                micro = {name: value[rows] for name, value in batch.items()}
                out = r3f(model, num_items=everything, **micro)
                out.loss.backward()
                losses.append(out.loss.detach().double())
        assert r3f.step == 1
        found.append((float(sum(losses)), {n: p.grad.clone() for n, p in model.named_parameters()}))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-4, atol=1e-6)


def test_micro_batches_on_their_own_draw_other_numbers() -> None:
    model, batch = build("causal"), batch_for("causal")
    everything = tokens(batch)
    whole = R3F(eps=0.1, seed=3)(model, num_items=everything, **batch)
    r3f = R3F(eps=0.1, seed=3)
    parts = [r3f(model, num_items=everything, **{k: v[i : i + 2] for k, v in batch.items()}) for i in (0, 2)]
    assert abs(float(sum(p.symm_kl for p in parts)) / float(whole.symm_kl) - 1) > 1e-3
    assert r3f.step == 2


def test_a_rank_starts_where_the_others_end() -> None:
    model, batch = build("causal"), batch_for("causal")
    everything = tokens(batch)
    whole = R3F(eps=0.1, seed=3)(model, num_items=everything, **batch)
    parts = []
    for rows, before in ((slice(0, 2), 0), (slice(2, 4), torch.tensor(int(batch["attention_mask"][:2].sum())))):
        r3f = R3F(eps=0.1, seed=3)
        with r3f.window(token_offset=before):
            parts.append(r3f(model, num_items=everything, **{k: v[rows] for k, v in batch.items()}))
    assert float(sum(p.symm_kl for p in parts)) == pytest.approx(float(whole.symm_kl), rel=1e-5)


def test_windows_do_not_nest_and_close() -> None:
    r3f = R3F()
    with r3f.window(), pytest.raises(RuntimeError, match="open already"), r3f.window():
        pass
    with pytest.raises(ZeroDivisionError), r3f.window():
        raise ZeroDivisionError
    with r3f.window():
        pass


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", ["causal", "llama", "sequence"])
def test_gradient_checkpointing_changes_nothing(kind: str, forward: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(kind, dropout=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(4)
        R3F(eps=0.1, seed=3, forward=forward)(model, **batch_for(kind)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-6, name


def test_prompt_tuning_gives_labels_their_virtual_tokens() -> None:
    torch.manual_seed(2)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("causal", dropout=0.0), config).train()
    batch = batch_for("causal")
    for fused in (False, True):
        plain = R3F(r3f_lambda=0, fused_linear=fused)(model, **batch)
        assert float(plain.loss) == pytest.approx(float(model(**batch).loss), rel=1e-5)
        out = R3F(eps=0.1, seed=3, fused_linear=fused)(model, **batch)
        assert float(out.symm_kl) > 0
        out.loss.backward()
    with pytest.raises(ValueError, match="labels have shape"):
        R3F()(model, **{**batch, "labels": batch["labels"][:, 1:]})


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **told: Any
) -> Any:
    """As flash attention takes sequences that are packed into one row: by boundaries, all rows of the batch in line."""
    lines = [t.transpose(1, 2).flatten(0, 1).transpose(0, 1) for t in (query, key, value)]  # (heads, tokens, width)
    out = torch.zeros_like(lines[0])
    for begin, end in itertools.pairwise(told["cu_seq_lens_q"].tolist()):
        q, k, v = (t[:, begin:end] for t in lines)
        out[:, begin:end] = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out.transpose(0, 1).unflatten(0, (len(query), -1)), None


@pytest.mark.parametrize("method", [R3F, RDrop])
def test_a_double_batch_of_packed_sequences_has_twice_their_boundaries(method: Any) -> None:
    ALL_ATTENTION_FUNCTIONS.register("varlen", varlen_attention)
    model = build("llama")
    model.set_attn_implementation("varlen")  # type: ignore[operator]
    ids, position_ids = torch.randint(3, VOCABULARY, (1, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    begins, batch = torch.tensor([0, 4, 9], dtype=torch.int32), {"input_ids": ids, "position_ids": position_ids}
    told = {**dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), begins), "max_length_q": 5, "max_length_k": 5}
    results = []
    for forward in FORWARDS:
        out = method(forward=forward, **({"eps": 0.3, "seed": 1} if method is R3F else {}))(
            model, labels=ids, **batch, **told
        )
        results.append((out, gradients(model, out.loss)))
    (two, expected), (double, found) = results
    torch.testing.assert_close(double.loss, two.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(double.symm_kl, two.symm_kl, rtol=1e-4, atol=1e-9)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", [R3F, RDrop])
@pytest.mark.parametrize(
    ("positions", "more", "refused"),
    [
        ([[0, 1, 2, 3, 0, 1]], {}, True),
        ([[0, 1, 2, 3, 0, 1]], {"attention_mask": torch.ones(1, 6)}, True),  # which transformers leaves out
        ([[0, 1, 2, 3, 0, 1]], {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, False),
        ([[0, 1, 2, 3, 0, 1]], dict.fromkeys(VARLEN[:2], torch.tensor([0, 4, 6])), True),
        ([[0, 1, 2, 3, 0, 1]], {**dict.fromkeys(VARLEN[:2], torch.tensor([0, 4, 6])), "max_length_q": 4}, True),
        (
            [[0, 1, 2, 3, 0, 1]],
            {**dict.fromkeys(VARLEN[:2], torch.tensor([0, 4, 6])), **dict.fromkeys(VARLEN[2:], 4)},
            False,
        ),
        ([[0, 1, 2, 3, 4, 5]], {}, False),
        ([[2, 3, 4, 5, 6, 7]], {"attention_mask": torch.ones(1, 6)}, False),
        ([[0]], {}, False),
        ([[[0, 1, 2, 3, 0, 1]]] * 4, {}, True),  # of the text, and of an image in time, height and width
        ([[[0, 1, 2, 2, 2, 3]]] * 3, {}, False),  # without the text's, which flash attention is given alone
        ([[0, 1, 2, 0, 1, 2]] * 2, {}, False),  # in two rows transformers takes each for one sequence
    ],
)
def test_packed_positions_that_two_rows_would_lose_are_refused(
    method: Any, positions: list[Any], more: dict[str, Any], refused: bool
) -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    inputs = {"position_ids": torch.tensor(positions), **more}
    rows = inputs["position_ids"].shape[-2]
    if not refused:
        assert doubled(model, inputs, rows)
        return
    ids = torch.randint(3, VOCABULARY, (rows, 6))
    with pytest.raises(
        ValueError, match=f"{method.__name__}: flash attention tells packed sequences apart by position_ids in"
    ):
        method(forward="double_batch")(model, input_ids=ids, labels=ids, **inputs)


def test_boundaries_of_each_row_are_doubled_as_rows() -> None:
    begins = torch.tensor([[0, 4, 6], [0, 2, 6]])
    found = doubled(build("llama"), {"cu_seqlens": begins, "cu_seq_lens_q": begins[0]}, 2)
    assert found["cu_seqlens"].tolist() == 2 * begins.tolist()
    assert found["cu_seq_lens_q"].tolist() == [0, 4, 6, 10, 12]


# -- encoder-decoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seq2seq", "t5"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("where", ["encoder", "decoder", "both"])
def test_sides_of_an_encoder_decoder(kind: str, forward: str, where: str) -> None:
    model, batch = build(kind), batch_for(kind)
    noised: dict[str, bool] = {}
    handles = []
    for side in ("encoder", "decoder"):
        stack = getattr(model, f"get_{side}")()
        seen: list[Tensor] = []
        norm = next(m for m in stack.modules() if "Norm" in type(m).__name__)
        handles.append(norm.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].detach())))
        noised[side] = seen
    R3F(eps=0.1, seed=3, forward=forward, where=where)(model, **batch)
    for handle in handles:
        handle.remove()
    moved = {}
    for side, seen in noised.items():
        first, second = seen[0].chunk(2) if forward == "double_batch" else (seen[0], seen[len(seen) // 2])
        moved[side] = not torch.equal(first, second)
    if where == "decoder":
        assert moved == {"encoder": False, "decoder": True}
    else:  # T5's norms see the embeddings; a decoder norm may lie behind cross-attention
        assert moved["encoder"]
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in model.modules())


def test_both_sides_draw_numbers_of_their_own() -> None:
    model = build("t5")
    batch = batch_for("t5")
    batch["decoder_input_ids"] = batch["input_ids"].clone()
    found = []
    shared = model.get_encoder().get_input_embeddings()
    real = shared.forward
    r3f = R3F(eps=0.1, seed=3, where="both", detach_noised_embedding=False)
    handles = [
        getattr(model, f"get_{side}")().dropout.register_forward_pre_hook(lambda m, a: found.append(a[0].detach()))
        for side in ("encoder", "decoder")
    ]
    r3f(model, **batch)
    for handle in handles:
        handle.remove()
    clean = real(batch["input_ids"]).detach()
    moved = [x - clean for x in found if x.shape == clean.shape and not torch.equal(x, clean)]
    assert len(moved) >= 2
    assert not torch.equal(moved[0], moved[-1])


@pytest.mark.parametrize("kind", ["seq2seq", "t5"])
@pytest.mark.parametrize(
    "method",
    [R3F(eps=0.1, seed=3), RDrop(), R3F(eps=0.1, seed=3, fused_linear=True)],
    ids=["R3F", "R-Drop", "R3F, fused head"],
)
def test_another_label_that_does_not_count_is_no_token_of_the_decoder(kind: str, method: Any) -> None:
    model, batch = build(kind), batch_for(kind)
    found = []
    for ignored in (-100, -1):
        method.ignore_index, method.step = ignored, 0
        labels = batch["labels"].masked_fill(batch["labels"] == -100, ignored)
        found.append(method(model, **{**batch, "labels": labels}))
    assert same_bits(found[0].loss, found[1].loss)
    assert float(found[0].task_loss) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["seq2seq", "t5", "m2m"])
@pytest.mark.parametrize("missing", ["pad_token_id", "decoder_start_token_id"])
def test_without_tokens_for_a_decoder_s_inputs_the_config_is_named(kind: str, missing: str) -> None:
    model, batch = build(kind), batch_for(kind)
    setattr(model.config, missing, None)
    if (kind, missing) == ("t5", "decoder_start_token_id"):
        delattr(model.config, missing)  # as in a T5Config that nobody gave one
    with pytest.raises(ValueError, match=rf"^R3F: {type(model).__name__} needs config\.{missing} to make decoder inputs"):
        R3F()(model, **batch)


# -- presets --------------------------------------------------------------------------------------------------------------


def test_presets_are_fairseqs() -> None:
    classification, seq2seq = R3F.fairseq_classification(), R3F.fairseq_seq2seq(label_smoothing=0.1, eps=1e-3)
    shown = ("eps", "r3f_lambda", "noise_type", "detach_noised_embedding", "reduction", "label_smoothing")
    assert [getattr(classification, k) for k in shown] == [1e-5, 1.0, "uniform", True, "sentence", 0.0]
    assert [getattr(seq2seq, k) for k in shown] == [1e-3, 1.0, "normal", False, "fairseq", 0.1]


def test_fairseq_seq2seq_follows_the_formula() -> None:
    """Label smoothing over the other classes, per token; the KL over time and padding, per sentence."""
    model, batch = build("seq2seq"), batch_for("seq2seq", pads=3)
    epsilon, weight = 0.1, 0.7
    out = R3F.fairseq_seq2seq(eps=0.05, r3f_lambda=weight, label_smoothing=epsilon, seed=3)(model, **batch)
    logits = out.logits.double()
    noised = R3F.fairseq_seq2seq(eps=0.05, seed=3, grad="both")  # the same noise again, for its logits
    captured: list[Tensor] = []
    handle = model.register_forward_hook(lambda m, a, o: captured.append(o.logits.detach().double()))
    noised(model, **batch)
    handle.remove()
    other = captured[-1]
    labels, counts = batch["labels"], batch["labels"] != -100
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    each = epsilon / (VOCABULARY - 1)
    smoothed = (1 - epsilon - each) * nll - each * log_p.sum(-1)
    log_q = other.log_softmax(-1)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / len(labels)
    assert float(out.task_loss) == pytest.approx(float(smoothed[counts].mean().detach()), rel=1e-6)
    assert float(out.symm_kl) == pytest.approx(float(kl.detach()), rel=1e-4)
    assert float(out.loss.detach()) == pytest.approx(float(out.task_loss) + weight * float(out.symm_kl), rel=1e-6)


# -- the Jensen-Shannon divergence ----------------------------------------------------------------------------------------


def test_js_in_place_of_the_symmetric_kl() -> None:
    model, batch = build("causal"), batch_for("causal")
    found = {}
    for divergence in ("symmetric_kl", "js"):
        out = R3F(eps=0.02, seed=3, divergence=divergence)(model, **batch)
        found[divergence] = float(out.symm_kl)
        assert float(out.loss.detach()) == pytest.approx(float(out.task_loss) + found[divergence], rel=1e-6)
    assert found["js"] == pytest.approx(found["symmetric_kl"] / 8, rel=0.05)


# -- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"noise_scale": "neftun"}, "neftune"),
    ({"where": "middle"}, "encoder"),
    ({"divergence": "kl"}, "symmetric_kl"),
    ({"label_smoothing": 1.0}, "label_smoothing"),
    ({"divergence": "js", "grad": "clean"}, "divergence='js' goes with grad='both'"),
])  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        R3F(**options)


@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_label_smoothing_is_that_of_torch(kind: str) -> None:
    model, batch = build(kind), batch_for(kind)
    out = R3F(eps=1e-3, label_smoothing=0.1)(model, **batch)
    logits, labels = out.logits.detach(), batch["labels"]
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), label_smoothing=0.1)
    assert float(out.task_loss) == pytest.approx(float(expected), rel=1e-6)


# -- PEFT -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "llama"])
@pytest.mark.parametrize("fused", [False, True])
def test_lora(kind: str, fused: bool) -> None:
    base = build(kind)
    targets = ["c_attn"] if kind == "causal" else ["q_proj", "v_proj"]
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)).train()
    batch = batch_for("causal")
    out = R3F(eps=0.05, seed=3, fused_linear=fused)(model, **batch)
    plain = R3F(eps=0.05, seed=3)(base, **batch)  # adapters start at nothing
    assert float(out.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=1e-5)
    out.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(float(p.grad.norm()) > 0 for p in model.parameters() if p.grad is not None)
