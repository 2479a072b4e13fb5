"""R3F on whole models: what must be exactly zero, what must be equal, and the published criteria as oracles."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpost import R3F
from fastpost.ops.noise import add_noise
from fastpost.r3f.noise import find_embedding
from tests.conftest import same_bits
from tests.tiny import Batch, batch_for, build, gradients, pad

KINDS = ("sequence", "tokens", "causal", "seq2seq")
ALL_KINDS = (*KINDS, "roberta", "masked_lm", "llama", "t5", "decoder", "seq2seq_sequence", "m2m")
FORWARDS = ("two_pass", "double_batch")


class Count:
    """Counts forward passes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def untouched(model: nn.Module) -> bool:
    return all(not m._forward_hooks and "forward" not in m.__dict__ for m in model.modules())


def trained_as_here(kind: str) -> Batch:
    """T5 and M2M100 fill a cache for generation even while they train, which rounds otherwise; R3F, like BART, does not."""
    return {**batch_for(kind), **({"use_cache": False} if kind in ("t5", "m2m") else {})}


# -- nothing added --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_lambda_zero_is_plain_fine_tuning_bit_for_bit(kind: str) -> None:
    trained = []
    for r3f in (None, R3F(r3f_lambda=0)):
        model, batch = build(kind, dropout=0.1), trained_as_here(kind)
        passes = Count(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch).loss if r3f is None else r3f(model, **batch).loss
            loss.backward()
            optimizer.step()
        assert passes.calls == 3
        trained.append(copy.deepcopy(model.state_dict()))
    assert all(same_bits(trained[0][name], trained[1][name]) for name in trained[0])
    start = build(kind, dropout=0.1).state_dict()
    assert any(not torch.equal(start[name], trained[0][name]) for name in start)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_eval_mode_is_the_plain_loss(kind: str) -> None:
    model, batch = build(kind, dropout=0.1).eval(), trained_as_here(kind)
    passes = Count(model)
    before = torch.get_rng_state()
    out = R3F(eps=0.1)(model, **batch)
    assert passes.calls == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(out.loss, model(**batch).loss)
    assert float(out.symm_kl) == 0
    assert out.logits is not None
    assert same_bits(out.logits, model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", ["both", "noised", "clean"])
def test_no_noise_and_shared_dropout_give_exactly_zero(kind: str, grad: str) -> None:
    model, batch = build(kind, dropout=0.2), batch_for(kind)
    found = []
    for weight in (1.0, 1e6):
        torch.manual_seed(8)
        out = R3F(eps=0.0, r3f_lambda=weight, dropout="shared", grad=grad)(model, **batch)
        assert float(out.symm_kl) == 0
        assert float(out.loss.detach()) == float(out.task_loss)
        found.append(gradients(model, out.loss))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    # and the masks do matter: drawn independently, the two passes differ
    assert float(R3F(eps=0.0)(model, **batch).symm_kl) > 1e-5


def test_shared_dropout_leaves_the_generator_after_one_pass() -> None:
    model, batch = build("sequence", dropout=0.2), batch_for("sequence")
    torch.manual_seed(8)
    R3F(eps=1e-3, dropout="shared", seed=1)(model, **batch)
    after = torch.get_rng_state()
    torch.manual_seed(8)
    model(**batch)
    assert torch.equal(torch.get_rng_state(), after)


# -- how large it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_kl_falls_as_the_square_of_eps(kind: str) -> None:
    model, batch = build(kind, dtype=torch.float64), batch_for(kind)
    kl = [float(R3F(eps=eps, seed=4)(model, **batch).symm_kl) for eps in (1e-2, 1e-3, 1e-4)]
    assert kl[2] > 0
    assert kl[0] / kl[1] == pytest.approx(100, rel=0.1)
    assert kl[1] / kl[2] == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("grad", "power"), [("both", 2), ("noised", 1), ("clean", 1)])
def test_gradient_of_the_kl_falls_as_eps_squared_only_with_both_branches(grad: str, power: int, detach: bool) -> None:
    model, batch = build("sequence", dtype=torch.float64), batch_for("sequence")
    plain = gradients(model, R3F(r3f_lambda=0)(model, **batch).loss)
    table, others = [], []
    for eps in (1e-2, 1e-3):
        r3f = R3F(eps, 1e4, grad=grad, seed=4, detach_noised_embedding=detach)
        with_kl = gradients(model, r3f(model, **batch).loss)
        squares = {n: float((with_kl[n] - plain[n]).square().sum()) for n in plain}
        table.append(math.sqrt(squares.pop("bert.embeddings.word_embeddings.weight")))
        others.append(math.sqrt(sum(squares.values())))
    assert others[0] / others[1] == pytest.approx(10**power, rel=0.1)
    if detach and grad == "noised":
        assert table[0] == 0  # frozen in the one branch, detached in the other
    else:  # the detached table sees one branch only, whatever `grad` says
        assert table[0] / table[1] == pytest.approx(10 if detach else 10**power, rel=0.1)


# -- the published criteria -----------------------------------------------------------------------------------------------


def numbers(batch: Batch, width: int, eps: float, noise_type: str, seed: int) -> Tensor:
    """The noise of one step, from the reference's sequence; at padding something else, as fairseq does too."""
    mask = batch["attention_mask"].bool()
    z = torch.full((*mask.shape, width), 0.3, dtype=torch.float64)
    drawn = add_noise(torch.zeros(int(mask.sum()) * width, dtype=torch.float64), eps, noise_type, seed=seed)
    z[mask] = drawn.view(-1, width)
    return z


def log_probabilities(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(-1, keepdim=True).log()


def fairseq_kl(clean: Tensor, noised: Tensor) -> Tensor:
    """Sum over everything of p (log p - log q) + q (log q - log p)."""
    p, q = log_probabilities(clean), log_probabilities(noised)
    return (p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()


@pytest.mark.parametrize("noise_type", ["uniform", "normal"])
def test_sentence_prediction_r3f(noise_type: str) -> None:
    """fairseq's classifier: the noised embeddings are detached, both terms are per sentence."""
    model, batch = build("sequence", dtype=torch.float64), batch_for("sequence")
    eps, weight, seed = 0.05, 0.7, 77
    embedded = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    mask = batch["attention_mask"]
    clean = model(inputs_embeds=embedded, attention_mask=mask).logits
    z = numbers(batch, embedded.shape[-1], eps, noise_type, seed)
    noised = model(inputs_embeds=embedded.detach() + z, attention_mask=mask).logits
    rows = len(batch["labels"])
    task = -log_probabilities(clean)[torch.arange(rows), batch["labels"]].sum() / rows
    kl = fairseq_kl(clean, noised) / rows
    expected = gradients(model, task + weight * kl)

    out = R3F(eps, weight, noise_type, seed=seed)(model, **batch)
    torch.testing.assert_close(out.task_loss, task.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.symm_kl, kl.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.loss.detach(), (task + weight * kl).detach(), rtol=1e-12, atol=0)
    found = gradients(model, out.loss)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize("noise_type", ["uniform", "normal"])
def test_label_smoothed_cross_entropy_r3f(noise_type: str) -> None:
    """fairseq's sequence-to-sequence criterion (no smoothing): gradient through the noise, KL over every position."""
    model, batch = build("seq2seq", dtype=torch.float64), batch_for("seq2seq")
    eps, weight, seed = 0.05, 0.7, 78
    mask, labels = batch["attention_mask"], batch["labels"]
    decoder = model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
    embedded = find_embedding(model)[1](batch["input_ids"])
    clean = model(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=decoder).logits
    z = numbers(batch, embedded.shape[-1], eps, noise_type, seed)
    noised = model(inputs_embeds=embedded + z, attention_mask=mask, decoder_input_ids=decoder).logits
    counts = labels != -100
    task = -log_probabilities(clean)[counts].gather(-1, labels[counts].unsqueeze(-1)).sum() / counts.sum()
    kl = fairseq_kl(clean, noised) / labels.shape[0]
    expected = gradients(model, task + weight * kl)

    r3f = R3F(eps, weight, noise_type, seed=seed, reduction="fairseq", detach_noised_embedding=False)
    out = r3f(model, **batch)
    torch.testing.assert_close(out.loss.detach(), (task + weight * kl).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.symm_kl, kl.detach(), rtol=1e-9, atol=0)
    found = gradients(model, out.loss)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize(("reduction", "num_items"), [("token", None), ("token", 50), ("sum", None), ("fairseq", None)])
@pytest.mark.parametrize("grad", ["both", "noised", "clean"])
def test_every_gradient_mode_and_reduction_on_a_causal_model(grad: str, reduction: str, num_items: int | None) -> None:
    model, batch = build("causal", dtype=torch.float64), batch_for("causal")
    r3f = R3F(0.05, 0.7, seed=5, grad=grad, reduction=reduction)
    z = numbers(batch, 24, 0.05, "uniform", 5)
    embedded = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    clean = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    noised = model(inputs_embeds=embedded.detach() + z, attention_mask=batch["attention_mask"]).logits
    a = clean.detach() if grad == "noised" else clean
    b = noised.detach() if grad == "clean" else noised
    # Row t is compared with label t + 1; the last row has no label.
    counts = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
    items = num_items or int(counts.sum())
    task = F.cross_entropy(clean[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    if reduction == "fairseq":
        task, kl = task / items, fairseq_kl(a, b) / len(counts)
    else:
        kl = fairseq_kl(a[counts], b[counts])
        task, kl = (task / items, kl / items) if reduction == "token" else (task, kl)
    out = r3f(model, num_items=num_items, **batch)
    torch.testing.assert_close(out.loss.detach(), (task + 0.7 * kl).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.symm_kl, kl.detach(), rtol=1e-9, atol=0)
    expected, found = gradients(model, task + 0.7 * kl), gradients(model, out.loss)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-12, msg=name)


# -- padding, layouts, forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "roberta", "t5", "xlnet"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_padding_changes_nothing(kind: str, forward: str) -> None:
    model, batch = build(kind, dtype=torch.float64), batch_for(kind)
    outs = []
    for pads in (0, 5):
        out = R3F(0.05, seed=6, forward=forward)(model, **pad(batch, pads))
        outs.append((out, gradients(model, out.loss)))
    (short, short_grads), (long, long_grads) = outs
    assert float(short.symm_kl) > 1e-6
    torch.testing.assert_close(long.loss, short.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(long.symm_kl, short.symm_kl, rtol=1e-8, atol=0)
    for name in short_grads:
        torch.testing.assert_close(long_grads[name], short_grads[name], rtol=1e-6, atol=1e-12, msg=name)


def test_fairseq_reduction_does_count_padding() -> None:
    model, batch = build("seq2seq", dtype=torch.float64), batch_for("seq2seq")
    kl = [float(R3F(0.05, seed=6, reduction="fairseq")(model, **pad(batch, pads)).symm_kl) for pads in (0, 5)]
    assert kl[1] > kl[0] * 1.01


def test_noise_keeps_away_from_padding() -> None:
    model, batch = build("sequence"), batch_for("sequence")
    module = find_embedding(model)[1]
    seen: list[Tensor] = []
    for mask in (batch["attention_mask"], None):  # without a mask, the embedding's padding_idx tells
        given = {**batch, "attention_mask": mask}
        seen.clear()
        handle = model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
        R3F(0.05, seed=1)(model, **given)
        handle.remove()
        pads = batch["attention_mask"] == 0
        difference = (seen[1] - seen[0]).detach().abs().amax(-1)
        assert float(difference[pads].max()) == 0
        assert float(difference[~pads].min()) > 0.01
    assert isinstance(module, nn.Embedding)


@pytest.mark.parametrize("kind", [*KINDS, "t5", "llama", "seq2seq_sequence", "xlnet"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("grad", ["both", "noised", "clean"])
def test_double_batch_equals_two_passes(kind: str, detach: bool, grad: str) -> None:
    model, batch = build(kind, dtype=torch.float64), batch_for(kind)
    results = []
    for forward, expected_passes in (("two_pass", 2), ("double_batch", 1)):
        passes = Count(model)
        r3f = R3F(0.05, 0.7, seed=9, forward=forward, detach_noised_embedding=detach, grad=grad)
        out = r3f(model, **batch)
        assert passes.calls == expected_passes
        results.append((out, gradients(model, out.loss)))
    (two, two_grads), (double, double_grads) = results
    assert float(two.symm_kl) > 1e-6
    torch.testing.assert_close(double.loss, two.loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(double.symm_kl, two.symm_kl, rtol=1e-8, atol=0)
    torch.testing.assert_close(double.logits, two.logits, rtol=1e-10, atol=1e-12)
    for name in two_grads:
        torch.testing.assert_close(double_grads[name], two_grads[name], rtol=1e-7, atol=1e-12, msg=name)


def test_double_batch_in_float32_reads_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpost.r3f import noise as module

    looked_up = []
    real = module.embedding_noise
    monkeypatch.setattr(module, "embedding_noise", lambda *a, **k: looked_up.append(a[1].shape) or real(*a, **k))
    model, batch = build("sequence"), batch_for("sequence")
    gathers = []
    monkeypatch.setattr(F, "embedding", lambda *a, **k: gathers.append(a) or torch.embedding(a[1], a[0]))
    double = R3F(0.05, seed=9, forward="double_batch")(model, **batch)
    assert looked_up == [batch["input_ids"].shape]
    assert len(gathers) == 2  # positions and types; not the words
    two = R3F(0.05, seed=9)(model, **batch)
    torch.testing.assert_close(double.loss, two.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["absolute", "relative", "neftune"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize(("kind", "length"), [("sequence", 9), ("longformer", 9), ("xlnet", 9), ("xlnet", 4)])
def test_embeddings_given_directly_get_the_same_noise(kind: str, length: int, forward: str, scale: str) -> None:
    """Also where a model pads its tokens itself, or turns them, which a square batch does not show."""
    model = build(kind, dtype=torch.float64)
    batch = {name: t[:, :length] if t.ndim == 2 else t for name, t in batch_for(kind).items()}
    direct = {**batch, "inputs_embeds": find_embedding(model)[1](batch["input_ids"])}
    del direct["input_ids"]
    a, b = (R3F(0.5, seed=9, noise_scale=scale, forward=forward)(model, **given) for given in (batch, direct))
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.symm_kl, b.symm_kl, rtol=1e-9, atol=0)
    assert float(a.symm_kl) > 1e-6


def test_only_the_encoder_is_noised_even_where_the_decoder_shares_the_module() -> None:
    for kind in ("seq2seq", "t5"):
        model, batch = build(kind), batch_for(kind)
        if kind == "seq2seq":
            model.model.decoder.embed_tokens = model.model.encoder.embed_tokens  # type: ignore[union-attr]
            decoder: Any = model.model.decoder.layernorm_embedding  # type: ignore[union-attr]
            encoder: Any = model.model.encoder.layernorm_embedding  # type: ignore[union-attr]
        else:
            model.decoder.embed_tokens = model.encoder.embed_tokens  # type: ignore[union-attr]
            decoder, encoder = model.decoder.dropout, model.encoder.dropout  # type: ignore[union-attr]
        for forward in FORWARDS:
            seen: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
            handles = [
                module.register_forward_pre_hook(lambda _, args, given=seen[name]: given.append(args[0]))
                for name, module in (("encoder", encoder), ("decoder", decoder))
            ]
            R3F(0.05, seed=1, forward=forward)(model, **batch)
            for handle in handles:
                handle.remove()
            first = {name: given[0] for name, given in seen.items()}
            if forward == "double_batch":
                pairs = {name: given.chunk(2) for name, given in first.items()}
            else:
                pairs = {name: (given[0], given[len(given) // 2]) for name, given in seen.items()}
            assert not torch.equal(*pairs["encoder"])
            assert torch.equal(*pairs["decoder"])


def test_labels_are_shifted_as_asked() -> None:
    model, batch = build("causal").eval(), batch_for("causal")
    logits, labels = model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    straight = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for asked, expected in ((None, shifted), (True, shifted), (False, straight)):
        torch.testing.assert_close(R3F(shift_labels=asked)(model, **batch).loss, expected)


def with_shifted(kind: str) -> tuple[Batch, Tensor]:
    """A batch of two texts packed into each row, and its targets, which the end of the first text does not have."""
    batch = {name: value for name, value in batch_for(kind).items() if name != "attention_mask"}
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].clone()
    targets[:, 2] = -100
    return batch, targets


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", ["causal", "llama", "tokens", "seq2seq"])
def test_shift_labels_are_the_targets_as_they_stand(kind: str, forward: str) -> None:
    """As in transformers' losses, and whatever the labels beside them are."""
    model, (batch, targets) = build(kind, dtype=torch.float64), with_shifted(kind)
    decoder = (
        {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])} if kind == "seq2seq" else {}
    )
    inputs = {**{name: value for name, value in batch.items() if name != "labels"}, **decoder}
    logits = model(**inputs).logits
    task = F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def r3f(**how: Any) -> R3F:
        return R3F(0.5, 0.7, seed=3, forward=forward, **how)

    expected = r3f(shift_labels=False)(model, **inputs, labels=targets)
    torch.testing.assert_close(expected.task_loss, task.detach())
    for asked in (None, True, False):
        found = r3f(shift_labels=asked)(model, **batch, shift_labels=targets)
        assert same_bits(found.loss, expected.loss)
        divergence = r3f(shift_labels=asked).noised_divergence(model, logits, {**batch, "shift_labels": targets})
        torch.testing.assert_close(divergence, expected.symm_kl, rtol=1e-9, atol=0)
    torch.testing.assert_close(R3F(shift_labels=True)(model.eval(), **batch, shift_labels=targets).loss, task)
    if kind == "llama":  # as its own loss, in float32
        torch.testing.assert_close(model(**batch, shift_labels=targets).loss.double(), task, rtol=1e-6, atol=0)


def test_shift_labels_alone_and_what_does_not_go_with_them() -> None:
    model, (batch, targets) = build("llama"), with_shifted("llama")
    ids = batch["input_ids"]
    expected = R3F(seed=3)(model, **batch, shift_labels=targets).loss
    assert same_bits(R3F(seed=3)(model, input_ids=ids, shift_labels=targets).loss, expected)
    assert same_bits(R3F(seed=3)(model, **batch, shift_labels=None).loss, R3F(seed=3)(model, **batch).loss)
    with pytest.raises(ValueError, match=r"^R3F: shift_labels have shape \(\d+, \d+\), labels"):
        R3F()(model, **batch, shift_labels=targets[:, :-1])
    with pytest.raises(TypeError, match=r"^R3F: shift_labels must be a tensor, not bool$"):
        R3F()(model, **batch, shift_labels=True)
