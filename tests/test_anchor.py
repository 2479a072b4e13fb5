"""Anchor against its equations in float64, its references, what is refused."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from fastpost.anchor import AdaptersOff, Anchor, Frozen, MovingAverage
from fastpost.r3f.conventions import shifts_labels

from . import tiny
from .conftest import same_bits

KINDS = ("sequence", "tokens", "masked_lm", "causal", "llama", "gemma2", "granite", "seq2seq")
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")


def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    """The model with its trained weights somewhere else."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    return model


def with_lora(kind: str = "llama", dtype: torch.dtype = torch.float64, dropout: float = 0.0, **options: Any) -> Any:
    targets = {"llama": ["q_proj", "v_proj"], "causal": ["c_attn"]}[kind]
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, lora_dropout=dropout, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(tiny.build(kind, 0.0, dtype), config).to(dtype).train()


def truth(model: Any, reference: Any, batch: dict[str, Any], weight: float, divergence: str, dft: bool, items: Any) -> Any:
    """(loss, task, divergence) from the equations, by torch's autograd on whole logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    z = model(**inputs).logits
    with torch.no_grad():
        t = reference(**inputs).logits
    if labels.ndim > 1 and shifts_labels(model):
        z, t, labels = z[:, :-1], t[:, :-1], labels[:, 1:]
    counts = labels != -100
    z, t, labels = z[counts], t[counts], labels[counts]
    log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    log_m = ((p + q) / 2).log()
    rows = {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "symmetric_kl": forward + reverse,
        "js": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "total_variation": (p - q).abs().sum(-1) / 2,
    }[divergence]
    ce = F.cross_entropy(z, labels, reduction="none")
    if dft:
        ce = ce * q.gather(-1, labels.unsqueeze(-1)).squeeze(-1).detach()
    n = counts.sum() if items is None else items
    return (ce.sum() + weight * rows.sum()) / n, ce.sum() / n, rows.sum() / n


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]


def agree(ours: Any, theirs: Any, got: Any, want: Any) -> None:
    torch.testing.assert_close([got.loss, got.task_loss, got.divergence], list(want), rtol=1e-9, atol=1e-12)
    got.loss.backward()
    want[0].backward()
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [None, False])
def test_every_model(kind: str, fused: bool | None) -> None:
    """Classifiers have no head to take out, soft-caps and scales come after one."""
    start = tiny.build(kind, 0.0, torch.float64)
    ours, theirs = (moved(tiny.build(kind, 0.0, torch.float64)) for _ in range(2))
    anchor = Anchor(start, 0.3, fused_linear=fused)
    batch = tiny.batch_for(kind)
    got = anchor(ours, **batch)
    assert (got.logits is None) == (fused is None and kind not in ("sequence", "tokens"))
    agree(ours, theirs, got, truth(theirs, start, batch, 0.3, "forward_kl", False, None))
    assert float(got.divergence) > 1e-3
    assert start.training


def test_logits_that_the_head_does_not_explain_are_held_whole() -> None:
    """A padded head: by default from logits, as if one had asked for them; asked to fuse, an error."""
    ids = torch.randint(0, tiny.VOCABULARY, (3, 5))
    start = tiny.AfterHead(lambda z: z[..., : tiny.VOCABULARY], 64).double()
    found = []
    for fused in (None, False):
        model = moved(tiny.AfterHead(start.change, 64).double())
        torch.manual_seed(4)
        got = Anchor(start, 0.3, fused_linear=fused)(model, input_ids=ids, labels=ids)
        got.loss.backward()
        assert got.logits is not None
        found.append([got.loss, got.task_loss, got.divergence, *gradients(model)])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(ValueError, match=r"^Anchor: AfterHead changes its logits .* \(of its head's 64 classes it makes 61"):
        Anchor(start, 0.3, fused_linear=True)(model, input_ids=ids, labels=ids)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dft", [False, True])
def test_every_divergence_and_dft(divergence: str, dft: bool) -> None:
    start = tiny.build("llama", 0.0, torch.float64)
    ours, theirs = (moved(tiny.build("llama", 0.0, torch.float64)) for _ in range(2))
    anchor = Anchor(start, 0.3, divergence=divergence, weighting="dft" if dft else "none")
    batch = tiny.batch_for("llama")
    got = anchor(ours, num_items=11, **batch)
    agree(ours, theirs, got, truth(theirs, start, batch, 0.3, divergence, dft, 11))


@pytest.mark.parametrize("fused", [None, False])
def test_dft_alone_needs_no_reference(fused: bool | None) -> None:
    ours, theirs = (tiny.build("llama", 0.0, torch.float64) for _ in range(2))
    batch = tiny.batch_for("llama")
    got = Anchor(None, 0.0, weighting="dft", fused_linear=fused)(ours, **batch)
    agree(ours, theirs, got, truth(theirs, theirs, batch, 0.0, "forward_kl", True, None))


def test_a_reference_of_another_width_and_without_a_plain_head() -> None:
    """GPT-2 held to a Llama whose head is a function, and which knows of no cache: its logits against hidden states."""

    class Function(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    start = Function(tiny.build("llama", 0.0, torch.float64))
    ours, theirs = (tiny.build("causal", 0.0, torch.float64) for _ in range(2))
    batch = tiny.batch_for("causal")
    got = Anchor(start, 0.3)(ours, **batch)
    assert got.logits is None
    agree(ours, theirs, got, truth(theirs, start, batch, 0.3, "forward_kl", False, None))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_off(checkpointing: bool) -> None:
    """The same model is its own reference; afterwards adapters, modes and gradients' flags are as they were."""
    ours, theirs = with_lora(), with_lora()
    base = tiny.build("llama", 0.0, torch.float64)
    frozen = [name for name, p in ours.named_parameters() if "lora_A" in name and "q_proj" in name]
    for model in (ours, theirs):  # an adapter whose first matrix is not trained, which PEFT would unfreeze
        for name, p in model.named_parameters():
            if name in frozen:
                p.requires_grad_(False)
    if checkpointing:
        ours.enable_input_require_grads()
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours.base_model.model.model.norm.eval()
    modes = [module.training for module in ours.modules()]
    batch = tiny.batch_for("llama")
    got = Anchor(AdaptersOff(), 0.3, divergence="reverse_kl")(ours, **batch)
    assert [module.training for module in ours.modules()] == modes
    agree(ours, theirs, got, truth(theirs, base, batch, 0.3, "reverse_kl", False, None))
    assert float(got.divergence) > 1e-3
    assert not any(p.requires_grad for name, p in ours.named_parameters() if name in frozen)
    assert sum(p.requires_grad for p in ours.parameters()) == 3


@pytest.mark.parametrize("reference", ["copy", "off"])
def test_the_reference_pass_draws_no_random_numbers(reference: str) -> None:
    """So dropout is that of a plain step, and off in the reference."""
    model = with_lora("causal", dropout=0.5)
    chosen = Frozen.copy_of(model) if reference == "copy" else AdaptersOff()
    losses = []
    for anchor_kl in (0.0, 0.3):
        torch.manual_seed(1)
        out = Anchor(chosen, anchor_kl)(model, **tiny.batch_for("causal"))
        losses.append((out.task_loss, torch.get_rng_state()))
    assert same_bits(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])
    assert float(out.divergence) > 0
    model.eval()
    with torch.no_grad():
        out = Anchor(chosen, 0.3, weighting="dft")(model, **tiny.batch_for("causal"))
    assert float(out.divergence) == 0
    torch.testing.assert_close(out.loss, out.task_loss)


def test_a_copy_shares_what_is_frozen_and_stays() -> None:
    model = with_lora()
    copy = Frozen.copy_of(model)
    before = {name: p.clone() for name, p in copy.model.named_parameters()}
    for name, p in model.named_parameters():
        assert (dict(copy.model.named_parameters())[name] is p) == (not p.requires_grad), name
    moved(model)
    assert all(same_bits(p, before[name]) for name, p in copy.model.named_parameters())
    assert not any(p.requires_grad for p in copy.model.parameters())
    for p in model.parameters():
        p.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen when the reference was taken is trained now"):
        Anchor(copy)(model, **tiny.batch_for("llama"))
    tied = Frozen.copy_of(tiny.build("causal")).model
    assert tied.lm_head.weight is tied.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_average_of_the_weights(dtype: torch.dtype) -> None:
    model = tiny.build("llama", 0.0, dtype)
    average = MovingAverage(model, 0.9)
    want = [p.detach().clone().double() for p in model.parameters()]
    for step in range(3):
        moved(model, 0.01 * (step + 1))
        average.update(model)
        want = [0.9 * a + 0.1 * p.detach().double() for a, p in zip(want, model.parameters(), strict=True)]
    state = average.state_dict()
    for a, b in zip(state.values(), want, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    again = MovingAverage(tiny.build("llama", 0.0, dtype), 0.9)
    again.load_state_dict(state)
    for a, b in zip(again.model.parameters(), average.model.parameters(), strict=True):
        assert same_bits(a, b)
    with pytest.raises(ValueError, match=r"of other weights: 'model\.embed"):
        again.load_state_dict({name: t for name, t in state.items() if "embed" not in name})


def test_what_is_refused() -> None:
    llama, batch = tiny.build("llama"), tiny.batch_for("llama")
    for options, message in (
        ({"anchor_kl": -1.0}, "anchor_kl must be finite and >= 0"),
        ({"divergence": "forwad_kl"}, "Did you mean 'forward_kl'"),
        ({"weighting": "asft"}, "unknown weighting 'asft'"),
        ({"divergence": "js", "beta": 1.0}, "beta must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            Anchor(llama, **options)
    for name, value in (("anchor_kl", "0.1"), ("beta", None), ("label_smoothing", "0.1"), ("ignore_index", None)):
        with pytest.raises(TypeError, match=f"Anchor: {name} must be a (whole )?number, not {value!r}"):
            Anchor(llama, **{name: value})
    with pytest.raises(ValueError, match="needs a reference"):
        Anchor(None)
    with pytest.raises(TypeError, match="must be a Reference, a module or None, not str"):
        Anchor("reference")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay must lie in"):
        MovingAverage(llama, 1.0)
    with pytest.raises(TypeError, match="decay must be a number, not 'fast'"):
        MovingAverage(llama, "fast")  # type: ignore[arg-type]
    for reference in (Frozen, Frozen.copy_of, MovingAverage):
        with pytest.raises(TypeError, match="a reference is made of a module, not of int"):
            reference(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'lora_off' switches the adapters of a PEFT model off"):
        Anchor(AdaptersOff())(llama, **batch)
    with pytest.raises(ValueError, match="Anchor: the batch has no 'labels'"):
        Anchor(llama)(llama, input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="Anchor: fused_linear needs a model whose"):
        Anchor(tiny.build("sequence"), fused_linear=True)(tiny.build("sequence"), **tiny.batch_for("sequence"))
    larger = tiny.build("llama")
    larger.resize_token_embeddings(80)
    with pytest.raises(ValueError, match=r"student's vocabulary has 61 classes, the teacher's 80"):
        Anchor(larger)(llama, **batch)
    biased = with_lora("causal", bias="all")
    with pytest.raises(ValueError, match=r"bias is trained and stays on with the adapters switched off"):
        Anchor(AdaptersOff())(biased, **tiny.batch_for("causal"))
    assert any("bias" in name for name, p in biased.named_parameters() if p.requires_grad)
    replaced = tiny.build("llama")
    plain = replaced.forward
    replaced.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(ValueError, match="would call the original model"):
        Frozen.copy_of(replaced)


@pytest.mark.parametrize("fused", [None, False])
def test_a_forward_put_on_the_model_is_not_copied_along(fused: bool | None) -> None:
    """A closure over the original, as TRL's fused head is, would make the model its own reference."""
    model = tiny.build("llama", 0.0, torch.float64)
    plain = model.forward

    @functools.wraps(type(model).forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    model.forward = types.MethodType(wrapped, model)
    copy = Frozen.copy_of(model)
    assert float(Anchor(copy, fused_linear=fused)(moved(model), **tiny.batch_for("llama")).divergence) > 1e-3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["llama", "seq2seq"])
def test_shift_labels_are_the_targets_as_they_stand(kind: str, fused: bool) -> None:
    model, reference = tiny.build(kind, 0.0, torch.float64), moved(tiny.build(kind, 0.0, torch.float64))
    batch = tiny.batch_for(kind)
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].clone()
    targets[:, 2] = -100
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    counts = targets != -100
    with torch.no_grad():
        log_q, log_p = (m(**inputs).logits[counts].log_softmax(-1) for m in (model, reference.eval()))
    task = F.nll_loss(log_q, targets[counts])
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    for asked in (None, True):
        out = Anchor(reference, 0.3, fused_linear=fused, shift_labels=asked)(model, **batch, shift_labels=targets)
        torch.testing.assert_close(out.task_loss.double(), task, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.divergence.double(), divergence, rtol=1e-6, atol=0)
