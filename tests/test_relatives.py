"""The methods near R3F, each against float64 written from its equation, and what must be exactly zero or equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import R3FOutput
from fastpost.ops.noise import add_noise
from fastpost.r3f.relatives import SMART, FreeLB, HyPe, NEFTune, NoisedStudent, RDrop, SymNoise
from fastpost.r3f.relatives.base import Method
from tests.conftest import same_bits
from tests.tiny import Batch, batch_for, build, gradients, pad

KINDS = ("sequence", "tokens", "causal", "seq2seq")
ALL_KINDS = (*KINDS, "roberta", "masked_lm", "llama", "t5", "decoder", "seq2seq_sequence")
SEED = 77
# Strong enough to be seen, with numbers of their own.
METHODS: dict[str, Callable[[], Method]] = {
    "rdrop": lambda: RDrop(0.7),
    "rdrop double": lambda: RDrop(0.7, forward="double_batch"),
    "neftune": lambda: NEFTune(5, seed=SEED),
    "symnoise": lambda: SymNoise(5, 0.7, seed=SEED),
    "smart": lambda: SMART(0.7, eps=0.05, step_size=0.1, sigma=0.02, steps=2, seed=SEED),
    "freelb": lambda: FreeLB(3, 0.3, 0.5, 0.4, seed=SEED),
    "hype": lambda: HyPe(0.05, seed=SEED),
    "student": lambda: NoisedStudent(0.05, 0.7, seed=SEED),
}
NOISY = [name for name in METHODS if not name.startswith("rdrop")]


def of(name: str) -> Method:
    return METHODS[name]()


def trained_as_here(kind: str) -> Batch:
    """T5 fills its cache for generation even while it trains, which rounds otherwise; the methods do not."""
    return {**batch_for(kind), **({"use_cache": False} if kind == "t5" else {})}


def step(method: Method, model: nn.Module, batch: Batch, **options: Any) -> tuple[R3FOutput, dict[str, Tensor]]:
    """The output and the gradients, however the method makes them."""
    model.zero_grad()
    out = method(model, **batch, **options)
    if not isinstance(method, FreeLB):
        return out, gradients(model, out.loss)
    assert not out.loss.requires_grad
    return out, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-6, atol: float = 1e-10) -> None:
    assert any(bool(g.any()) for g in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# -- the equations --------------------------------------------------------------------------------------------------------


class Oracle:
    """A model as a function of its embedded input, with the two terms of every loss."""

    def __init__(self, kind: str) -> None:
        self.model, self.batch = build(kind, dtype=torch.float64), batch_for(kind)
        self.mask = self.batch["attention_mask"].bool()
        labels = self.batch["labels"]
        self.labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if kind == "causal" else labels
        self.counts = self.labels != -100
        self.extra: dict[str, Any] = {}
        if kind == "seq2seq":
            self.extra["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
            self.x = self.model.get_encoder().get_input_embeddings()(self.batch["input_ids"])
        else:
            self.x = self.model.get_input_embeddings()(self.batch["input_ids"])

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=x, attention_mask=self.batch["attention_mask"], **self.extra).logits
        return logits - logits.exp().sum(-1, keepdim=True).log()

    def ce(self, log_p: Tensor) -> Tensor:
        rows = log_p[self.counts]
        return -rows[torch.arange(len(rows)), self.labels[self.counts]].sum() / len(rows)

    def kl(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """KL(p||q) + KL(q||p), averaged over the rows that count."""
        p, q = log_p[self.counts], log_q[self.counts]
        return ((p.exp() - q.exp()) * (p - q)).sum() / len(p)

    def drawn(self, noise_type: str, seed: int, eps: float = 1.0) -> Tensor:
        """Numbers from the reference's sequence for the tokens, 0 at padding."""
        z = torch.zeros_like(self.x)
        flat = add_noise(torch.zeros(z[self.mask].numel(), dtype=torch.float64), eps, noise_type, seed=seed)
        z[self.mask] = flat.view(-1, z.shape[-1])
        return z.detach()

    def by_length(self, eps: float) -> Tensor:
        lengths = self.mask.sum(1).double()
        return self.drawn("uniform", SEED) * (eps / (lengths * self.x.shape[-1]).sqrt())[:, None, None]


@pytest.mark.parametrize("kind", ["sequence", "causal", "seq2seq"])
def test_neftune(kind: str) -> None:
    oracle = Oracle(kind)
    loss = oracle.ce(oracle(oracle.x + oracle.by_length(5.0)))
    expected = gradients(oracle.model, loss)
    out, found = step(NEFTune(5, seed=SEED), oracle.model, oracle.batch)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-7, atol=0)  # lengths go through float32
    assert_same(found, expected, rtol=1e-5, atol=1e-8)
    assert float(out.symm_kl) == 0
    assert same_bits(out.task_loss, out.loss.detach())


@pytest.mark.parametrize("noise_type", ["sign", "uniform", "normal"])
@pytest.mark.parametrize(("kind", "weight"), [("sequence", 0.0), ("causal", 0.7), ("seq2seq", 0.0)])
def test_symnoise(kind: str, weight: float, noise_type: str) -> None:
    oracle = Oracle(kind)
    z = oracle.drawn("uniform" if noise_type == "sign" else noise_type, SEED)
    z = torch.where(z > 0, 1.0, torch.where(z < 0, -1.0, 0.0)) if noise_type == "sign" else z
    assert noise_type != "sign" or bool((z[oracle.mask].abs() == 1).all())
    d = z * (5.0 / (oracle.mask.sum(1).double() * oracle.x.shape[-1]).sqrt())[:, None, None]
    plus, minus = oracle(oracle.x + d), oracle(oracle.x - d)
    kl = oracle.kl(plus, minus)
    loss = (oracle.ce(plus) + oracle.ce(minus)) / 2 + weight * kl
    expected = gradients(oracle.model, loss)
    out, found = step(SymNoise(5, weight, noise_type, seed=SEED), oracle.model, oracle.batch)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-7, atol=0)  # lengths go through float32
    assert_same(found, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(out.symm_kl, kl.detach() if weight else torch.zeros_like(kl), rtol=1e-5, atol=0)


def test_neftune_with_the_padded_length() -> None:
    oracle = Oracle("sequence")
    batch = pad(oracle.batch, 7)
    z = oracle.drawn("uniform", SEED) * 5 / math.sqrt(16 * oracle.x.shape[-1])
    loss = oracle.ce(oracle(oracle.x + z))
    out = NEFTune(5, length="padded", seed=SEED)(oracle.model, **batch)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-9, atol=0)


def test_neftune_takes_each_packed_sequence_at_its_length() -> None:
    model, batch = build("llama", dtype=torch.float64), batch_for("llama", rows=1)
    del batch["attention_mask"]
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]])
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out))
    NEFTune(5, seed=SEED)(model, **batch)  # our hook ran first, without the noise
    clean = seen.pop()
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    NEFTune(5, seed=SEED)(model, **batch)
    handle.remove()
    moved = (seen[-1] - clean)[0].detach()
    z = add_noise(torch.zeros(9, 24, dtype=torch.float64), 1.0, seed=SEED)
    scale = torch.tensor([6.0] * 6 + [3.0] * 3, dtype=torch.float64).mul(24).rsqrt()[:, None]
    torch.testing.assert_close(moved, 5 * z * scale, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["sequence", "causal", "seq2seq"])
@pytest.mark.parametrize("steps", [1, 3])
def test_smart(kind: str, steps: int) -> None:
    weight, eps, rate, sigma = 0.7, 0.05, 0.1, 0.02
    oracle = Oracle(kind)
    clean = oracle(oracle.x)
    delta = oracle.drawn("normal", SEED, sigma)
    for _ in range(steps):
        delta.requires_grad_()
        (g,) = torch.autograd.grad(oracle.kl(clean.detach(), oracle(oracle.x + delta)), delta)
        g = g * oracle.mask[..., None]
        delta = (delta.detach() + rate * g / g.abs().amax((1, 2), keepdim=True)).clamp(-eps, eps)
    kl = oracle.kl(clean, oracle(oracle.x + delta))
    loss = oracle.ce(clean) + weight * kl
    expected = gradients(oracle.model, loss)
    method = SMART(weight, eps, step_size=rate, sigma=sigma, steps=steps, seed=SEED)
    out, found = step(method, oracle.model, oracle.batch)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.symm_kl, kl.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(out.task_loss, oracle.ce(clean).detach(), rtol=1e-9, atol=0)
    assert_same(found, expected)


def test_smart_goes_uphill() -> None:
    """The adversarial KL is larger than that of most random perturbations of the same size."""
    oracle = Oracle("sequence")
    out = SMART(1.0, 0.05, step_size=10.0, sigma=1e-3, seed=SEED)(oracle.model, **oracle.batch)
    clean = oracle(oracle.x).detach()
    random = [
        float(oracle.kl(clean, oracle(oracle.x + 0.05 * oracle.drawn("uniform", s).sign())).detach()) for s in range(20)
    ]
    assert float(out.symm_kl) > torch.tensor(random).max()


@pytest.mark.parametrize("kind", ["sequence", "causal", "seq2seq"])
@pytest.mark.parametrize("radius", [0.4, 0.0])
def test_freelb(kind: str, radius: float) -> None:
    steps, rate, start = 3, 0.3, 0.5
    oracle = Oracle(kind)
    delta = oracle.by_length(start)
    expected = {name: torch.zeros_like(p) for name, p in oracle.model.named_parameters()}
    losses = []
    for _ in range(steps):
        delta.requires_grad_()
        loss = oracle.ce(oracle(oracle.x + delta))
        (g,) = torch.autograd.grad(loss, delta, retain_graph=True)
        for name, grad in gradients(oracle.model, loss).items():
            expected[name] += grad / steps
        oracle = Oracle(kind)  # the graph of x has been used up
        losses.append(float(loss.detach()))
        g = g * oracle.mask[..., None]
        delta = delta.detach() + rate * g / g.square().sum((1, 2), keepdim=True).sqrt()
        norm = delta.square().sum((1, 2), keepdim=True).sqrt()
        delta = delta * (radius / norm).clamp(max=1) if radius else delta
    out, found = step(FreeLB(steps, rate, start, radius, seed=SEED), oracle.model, oracle.batch)
    assert float(out.loss) == pytest.approx(sum(losses) / steps, rel=1e-7)
    assert losses[2] > losses[0]
    assert_same(found, expected, rtol=1e-5, atol=1e-8)  # lengths go through float32
    assert out.logits is not None
    assert not out.logits.requires_grad


@pytest.mark.parametrize("noise_type", ["normal", "uniform"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hype(noise_type: str, dropout: float) -> None:
    """Layer by layer, with `dropout=False` where the model has any."""
    model, batch = build("sequence", dropout, torch.float64), batch_for("sequence")
    bert, mask = model.bert, batch["attention_mask"].bool()  # type: ignore[union-attr]
    model.eval()
    hidden = bert.embeddings(input_ids=batch["input_ids"])
    away = torch.where(mask, 0.0, -math.inf).double()[:, None, None, :]
    for i, layer in enumerate(bert.encoder.layer):
        z = torch.zeros_like(hidden)
        z[mask] = add_noise(torch.zeros(int(mask.sum()), 24, dtype=torch.float64), 0.05, noise_type, seed=SEED + i * 2**40)
        hidden = layer(hidden + z, attention_mask=away)
        hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
    logits = model.classifier(bert.pooler(hidden))  # type: ignore[operator]
    loss = nn.functional.cross_entropy(logits, batch["labels"])
    expected = gradients(model, loss)
    model.train()
    out, found = step(HyPe(0.05, noise_type, dropout=dropout == 0, seed=SEED), model, batch)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-9, atol=0)
    assert_same(found, expected)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", ["sequence", "causal", "seq2seq"])
@pytest.mark.parametrize("noise_type", ["uniform", "normal"])
def test_noised_student(kind: str, noise_type: str) -> None:
    oracle = Oracle(kind)
    clean = oracle(oracle.x).detach()
    noised = oracle(oracle.x + oracle.drawn(noise_type, SEED, 0.05))
    kl = oracle.kl(clean, noised)
    loss = oracle.ce(noised) + 0.7 * kl
    expected = gradients(oracle.model, loss)
    out, found = step(NoisedStudent(0.05, 0.7, noise_type, seed=SEED), oracle.model, oracle.batch)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.symm_kl, kl.detach(), rtol=1e-7, atol=0)
    assert_same(found, expected)
    assert out.logits is not None
    assert not out.logits.requires_grad


@pytest.mark.parametrize("kind", ["sequence", "causal"])
@pytest.mark.parametrize("forward", ["two_pass", "double_batch"])
def test_rdrop(kind: str, forward: str) -> None:
    """With the masks that the same seed draws."""
    model, batch = build(kind, 0.2, torch.float64), batch_for(kind)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    torch.manual_seed(3)
    if forward == "two_pass":
        a, b = (model(**inputs).logits for _ in range(2))
    else:
        a, b = model(**{name: torch.cat((v, v)) for name, v in inputs.items()}).logits.chunk(2)
    labels = batch["labels"] if kind == "sequence" else nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    p, q = (logits.log_softmax(-1)[labels != -100] for logits in (a, b))
    labels = labels[labels != -100]
    task = (nn.functional.nll_loss(p, labels) + nn.functional.nll_loss(q, labels)) / 2
    kl = ((p.exp() * (p - q)).sum(-1).mean() + (q.exp() * (q - p)).sum(-1).mean()) / 2
    expected = gradients(model, task + 0.7 * kl)
    torch.manual_seed(3)
    out, found = step(RDrop(0.7, forward=forward), model, batch)
    assert float(kl.detach()) > 1e-3
    torch.testing.assert_close(out.task_loss, task.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.symm_kl, kl.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(out.loss.detach(), (task + 0.7 * kl).detach(), rtol=1e-9, atol=0)
    assert_same(found, expected)


@pytest.mark.parametrize("alpha", [0.7, 0.0])
@pytest.mark.parametrize("forward", ["two_pass", "double_batch"])
@pytest.mark.parametrize("kind", ["causal", "llama", "masked_lm", "seq2seq", "t5"])
def test_rdrop_under_a_fused_head(kind: str, forward: str, alpha: float) -> None:
    """The same loss and gradients as from logits held whole."""
    model, batch = build(kind, 0.2, torch.float64), trained_as_here(kind)
    found = []
    for fused in (False, True):
        torch.manual_seed(3)
        method = RDrop(alpha, forward=forward, fused_linear=fused)
        out, grads = step(method, model, batch, num_items=5)
        assert (out.logits is None) == fused
        found.append(((out.loss.detach(), out.task_loss, alpha * out.symm_kl), grads))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=0)
    assert_same(found[1][1], found[0][1])


def test_rdrop_refuses_heads_that_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match=r"^RDrop: fused_linear needs a model whose get_output_embeddings\(\) is"):
        RDrop(fused_linear=True)(build("sequence"), **batch_for("sequence"))


# -- limits ---------------------------------------------------------------------------------------------------------------


NOTHING_ADDED: dict[str, Callable[[], Method]] = {
    "neftune": lambda: NEFTune(0.0),
    "symnoise": lambda: SymNoise(0.0),
    "smart": lambda: SMART(0.0),
    "freelb": lambda: FreeLB(1, adv_init_mag=0.0),
    "hype": lambda: HyPe(0.0),
    "student": lambda: NoisedStudent(0.0, 0.0),
}


@pytest.mark.parametrize("kind", [*ALL_KINDS, "prompt"])
@pytest.mark.parametrize("name", NOTHING_ADDED)
def test_nothing_added_is_plain_fine_tuning_bit_for_bit(name: str, kind: str) -> None:
    model, batch = build(kind, dropout=0.1), trained_as_here(kind)
    # A generator that a seed was drawn from would drop other units.
    method = NOTHING_ADDED[name]()
    method.seed = 0 if name in ("freelb", "student") else None
    torch.manual_seed(3)
    plain = model(**batch).loss
    expected = gradients(model, plain)
    torch.manual_seed(3)
    out, found = step(method, model, batch)
    assert same_bits(out.loss.detach(), plain.detach())
    assert all(same_bits(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_eval_mode_is_the_plain_loss(name: str, kind: str) -> None:
    model, batch = build(kind, dropout=0.1).eval(), trained_as_here(kind)
    before, passes = torch.get_rng_state(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    out = of(name)(model, **batch)
    assert len(passes) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(out.loss, model(**batch).loss)
    assert out.loss.requires_grad
    assert float(out.symm_kl) == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_model_trains(name: str) -> None:
    for kind in ALL_KINDS:
        model, batch = build(kind, dropout=0.1), batch_for(kind)
        out, found = step(of(name), model, batch)
        assert math.isfinite(float(out.loss.detach()))
        assert all(bool(g.isfinite().all()) for g in found.values())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", METHODS)
def test_shift_labels_are_the_targets_as_they_stand(name: str) -> None:
    model, batch = build("llama", dtype=torch.float64), batch_for("llama")
    targets = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].clone()
    targets[:, 2] = -100
    found = step(of(name), model, {**batch, "shift_labels": targets})[0]
    aligned = of(name)
    aligned.shift_labels = False
    expected = step(aligned, model, {**batch, "labels": targets})[0]
    assert same_bits(found.loss.detach(), expected.loss.detach())
    assert not same_bits(found.loss.detach(), step(of(name), model, batch)[0].loss.detach())


def test_freelb_of_one_step_is_neftune() -> None:
    model, batch = build("causal"), batch_for("causal")
    one, found = step(FreeLB(1, adv_init_mag=5.0, seed=3), model, batch)
    other, expected = step(NEFTune(5.0, seed=3), model, batch)
    assert same_bits(one.loss, other.loss.detach())
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_and_noise_every_kl_is_exactly_zero(kind: str) -> None:
    model, batch = build(kind), batch_for(kind)
    plain = model(**batch).loss
    for method in (RDrop(), SMART(eps=0.0), NoisedStudent(0.0)):
        out = method(model, **batch)
        assert float(out.symm_kl) == 0
        torch.testing.assert_close(out.loss, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [SMART(1e6, eps=0.0, dropout="shared"), NoisedStudent(0.0, 1e6, dropout="shared")])
def test_shared_dropout(method: Method) -> None:
    model, batch = build("sequence", dropout=0.3), batch_for("sequence")
    out = method(model, **batch)
    assert float(out.symm_kl) == 0
    method.dropout = "independent"  # type: ignore[attr-defined]
    assert float(method(model, **batch).symm_kl) > 1e-4


def test_freelb_keeps_its_masks() -> None:
    model, batch = build("sequence", dropout=0.3), batch_for("sequence")
    torch.manual_seed(5)
    plain = model(**batch).loss
    after, expected = torch.get_rng_state(), gradients(model, plain)
    torch.manual_seed(5)
    out, found = step(FreeLB(4, adv_lr=0.0, adv_init_mag=0.0, seed=1), model, batch)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(out.loss, plain.detach(), rtol=1e-6, atol=0)
    assert_same(found, expected, rtol=1e-4, atol=1e-6)
    torch.manual_seed(5)
    other, _ = step(FreeLB(4, adv_lr=0.0, adv_init_mag=0.0, dropout="independent", seed=1), model, batch)
    assert abs(float(other.loss - plain.detach())) > 1e-3
