"""SAM, R3F and GAP on a GPU: whole steps against the CPU's, captured in a graph, under GradScaler, without waiting."""

from __future__ import annotations

import contextlib
import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import SAM

from . import docs
from .conftest import bits
from .gpu import BACKENDS, DEVICE, ON_GPU, Captured, needs_gpu, no_sync, peak_bytes

pytestmark = needs_gpu
KINDS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "fused_restore": {"fused": True, "fused_restore": True}}


def network(dtype: torch.dtype = torch.float32, flat: bool = False) -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(20, 70), nn.Tanh(), nn.LayerNorm(70), nn.Linear(70, 7)).to(DEVICE, dtype)
    if flat:
        model.flat = fastpost.flatten_parameters(model)
    return model


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(6)
    return [(torch.randn(32, 20).to(DEVICE), torch.randint(7, (32,)).to(DEVICE)) for _ in range(n)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def step(opt: SAM, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    loss_of(model, batch).backward()
    opt.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    opt.second_step(zero_grad=True)


def build(model: nn.Module, **options: Any) -> SAM:
    # A large eps, so that a gradient that is nothing but rounding does not become a step of full length.
    return SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, eps=1e-3, **options)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_agree_with_the_reference(kind: str, flat: bool) -> None:
    """Five steps through the kernels and through plain torch on the same device."""
    mine, theirs = network(flat=flat), network()
    opt, oracle = build(mine, **KINDS[kind]), build(theirs)
    for batch in batches(5):
        step(opt, mine, batch)
        with fastpost.use_backend("reference"):
            step(oracle, theirs, batch)
    assert opt.skipped_steps == 0
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_perturbation_comes_back_bit_for_bit(backend: str) -> None:
    with fastpost.use_backend(backend):
        model = network(torch.bfloat16)
        before = [bits(p) for p in model.parameters()]
        opt = SAM(model.parameters(), torch.optim.SGD, rho=2.0, lr=0.1)
        for x, y in batches(20):
            loss_of(model, (x.bfloat16(), y)).backward()
            with opt.perturbed():
                assert any(not torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
            assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
        report = opt.report
        assert report is not None
        assert report.intended_norm.item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("stash", "fused"), [("ulp", False), ("ulp", True), ("cpu", False)])
def test_other_stashes_take_the_steps_of_a_copy(stash: str, fused: bool, dtype: torch.dtype, backend: str) -> None:
    """Bit for bit, and w is back after each ascent. With this radius lists of codes are outgrown at first."""
    if stash == "cpu" and not ON_GPU:
        pytest.skip("the weights are in the host's memory here")
    with fastpost.use_backend(backend):
        check_other_stashes(stash, fused, dtype)


def check_other_stashes(stash: str, fused: bool, dtype: torch.dtype) -> None:
    models = []
    for kind in ("copy", stash):
        model = network(dtype)
        opt = build(model, stash=kind, **KINDS["fused_restore"] if fused else {})
        for x, y in batches(4):
            before = [bits(p) for p in model.parameters()]
            loss_of(model, (x.to(dtype), y)).backward()
            with opt.perturbed(zero_grad=False):
                assert not all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
            assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
            step(opt, model, (x.to(dtype), y))
        models.append([bits(p) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing(kind: str, flat: bool) -> None:
    model = network(flat=flat)
    opt = build(model, **KINDS[kind])
    for batch in batches(2):
        step(opt, model, batch)
    (batch,) = batches(1)
    with no_sync():
        step(opt, model, batch)
        report = opt.report
    assert report is not None
    assert report.intended_norm.item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_step_is_captured_and_replayed(kind: str) -> None:
    """Forward, backward, ascent, second pass, restore and AdamW in one graph: the same weights as the same steps run."""
    options = {**KINDS[kind], "capturable": True} if ON_GPU else KINDS[kind]
    mine, theirs = network(), network()
    opt, eager = build(mine, **options), build(theirs, **options)
    first, *others = batches(5)
    used = tuple(t.clone() for t in first)
    graph = Captured(lambda: step(opt, mine, used))
    for _ in range(3):
        step(eager, theirs, first)
    for batch in others:
        for new, old in zip(used, batch, strict=True):
            new.copy_(old)
        graph.replay()
        step(eager, theirs, batch)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(bits(p), bits(q))
    (state, *_) = opt.state.values()
    assert int(state["step"]) == 7
    assert opt.skipped_steps == 0
    before = [bits(p) for p in mine.parameters()]
    used[0].fill_(float("inf"))  # an overflow, seen on the device alone
    graph.replay()
    assert all(torch.equal(bits(p), b) for p, b in zip(mine.parameters(), before, strict=True))
    assert opt.skipped_steps == 1
    assert int(state["step"]) == 7


class Graphs:
    """torch.cuda's streams and graphs where there is no GPU: a capture runs what it records, and a replay runs it again."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = self.graph = contextlib.nullcontext
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: names["step"]())


def test_the_recipe_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/sam.md, run as it stands, against the same steps without a graph."""
    (recipe,) = [block.code for block in docs.blocks("docs/sam.md") if "CUDAGraph" in block.code]
    names: dict[str, Any] = {"device": DEVICE}
    if not ON_GPU:
        recipe = recipe.replace(", capturable=True", "")
        for name, value in vars(Graphs(names)).items():
            monkeypatch.setattr(torch.cuda, name, value)
    exec(recipe, names)
    replayed, before_replays = [bits(p) for p in names["model"].parameters()], 3 if ON_GPU else 4
    eager: dict[str, Any] = {"device": DEVICE}
    exec(recipe.partition("side = ")[0], eager)
    for inputs, labels in [*eager["batches"][:1] * before_replays, *eager["batches"]]:
        eager["x"].copy_(inputs)
        eager["y"].copy_(labels)
        eager["step"]()
    for p, w in zip(eager["model"].parameters(), replayed, strict=True):
        assert torch.equal(bits(p), w)
    assert names["opt"].skipped_steps == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["ascent", "second pass"])
def test_an_overflow_changes_nothing_and_is_counted(kind: str, when: str) -> None:
    model = network()
    opt = build(model, **KINDS[kind])
    for batch in batches(2):
        step(opt, model, batch)
    before = [bits(p) for p in model.parameters()]
    state = copy.deepcopy(opt.state_dict()["state"])
    (batch,) = batches(1)
    loss_of(model, batch).backward()
    spoilt = next(model.parameters())
    if when == "ascent":
        spoilt.grad[0, 0] = float("inf")
    opt.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    if when == "second pass":
        spoilt.grad[0, 0] = float("nan")
    opt.second_step(zero_grad=True)
    assert opt.skipped_steps == 1
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
    for old, new in zip(state.values(), opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_scaler(kind: str) -> None:
    """The whole recipe in float16 autocast, one overflow in the middle: the scale shrinks, the weights stay."""
    model = network()
    opt = build(model, **KINDS[kind])
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)
    losses = []
    for i, batch in enumerate(batches(1) * 12):
        before = [bits(p) for p in model.parameters()]
        for second in (False, True):
            with torch.autocast(DEVICE, torch.float16 if ON_GPU else torch.bfloat16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if not second:
                losses.append(loss.item())
                if i == 6:
                    next(model.parameters()).grad.fill_(float("inf"))
                opt.first_step(zero_grad=True)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        same = all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
        assert same == (i == 6)
    assert scaler.get_scale() == 2.0**9
    assert losses[-1] < losses[0]


# -- the other methods ----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Embeddings, a layer, classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 24)
        self.layer, self.head = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embed(input_ids))).mean(1))


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"reduction": "sum"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("forward", ["two_pass", "double_batch"])
def test_r3f_step_agrees_with_the_reference_and_waits_for_nothing(forward: str, options: dict[str, Any]) -> None:
    found = []
    ids, labels = (t.to(DEVICE) for t in (torch.randint(0, 61, (6, 9)), torch.randint(0, 3, (6,))))
    for backend in (None, "reference"):
        with fastpost.use_backend(backend):
            torch.manual_seed(4)
            model = Classifier().to(DEVICE)
            r3f = fastpost.R3F(eps=0.1, forward=forward, embedding="embed", seed=3, **options)
            out = r3f(model, input_ids=ids, labels=labels)
            out.loss.backward()
            found.append([out.loss.detach(), out.symm_kl, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert found[0][1].item() > 1e-5
    with no_sync():
        r3f(model, input_ids=ids, labels=labels).loss.backward()


@pytest.mark.parametrize("forward", ["two_pass", "double_batch"])
def test_an_r3f_step_in_place_holds_two_streams_of_logits(forward: str) -> None:
    """They become their gradients; beside them there are rows and weights alone."""
    vocabulary, rows = (50257, 64) if ON_GPU else (5000, 8)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(61, 16), nn.Linear(16, vocabulary)).to(DEVICE)
    ids, labels = torch.randint(0, 61, (rows, 8)).to(DEVICE), torch.randint(0, vocabulary, (rows, 8)).to(DEVICE)
    r3f = fastpost.R3F(eps=0.1, forward=forward, embedding="0", shift_labels=False, inplace=True)

    def run() -> None:
        r3f(model, input=ids, labels=labels).loss.backward()

    run()
    stream = 4 * rows * 8 * vocabulary
    weights = sum(p.nbytes for p in model.parameters())
    assert peak_bytes(run) <= 2.1 * stream + 4 * weights


class Predictor(nn.Module):
    """A causal model without positions: embedding, sums over the past, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(61, 16), nn.Linear(16, 16), nn.Linear(16, 61)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.middle(self.embed(input_ids).cumsum(1))))
        return logits


@pytest.mark.parametrize("skips", [False, True])
def test_gap_waits_for_nothing_from_the_second_step_on(skips: bool) -> None:
    """Without `evaluate`, guards and bar; and gives what a run gives that knows every state before the next step."""
    torch.manual_seed(4)
    model, ids = Predictor().to(DEVICE), torch.randint(0, 61, (1, 40)).to(DEVICE)
    before = [bits(p) for p in model.parameters()]
    passes = 0

    def poison(gradient: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return gradient * math.inf if skips and passes in (1, 3) else gradient

    def told(step: int, steps: int) -> None:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error" if step < steps else "default")

    model.head.weight.register_hook(poison)
    found = []
    for guard in (1e6, None):
        passes = 0
        try:
            result = fastpost.GAP(n_steps=6, lr=1e-3, max_drift=guard)(model, ids, progress=told if guard is None else False)
        finally:
            told(1, 1)
        found.append((result.losses, result.drift, result.skipped_steps, result.moved_fraction, result.best_step))
        found[-1] += (b"".join(bits(p).cpu().numpy().tobytes() for p in model.parameters()),)
        result.rollback()
        assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
    assert found[0] == found[1]
    assert found[0][2] == (2 if skips else 0)
    assert found[0][3] > 0.9


def test_gap_climbs_on_the_device() -> None:
    """Ten steps uphill: the loss rises, and the first weights come back bit for bit."""
    transformers = pytest.importorskip("transformers", reason="needs a language model")
    torch.manual_seed(4)
    config = transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=24, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).to(DEVICE)
    before = {name: bits(p) for name, p in model.named_parameters()}
    ids = torch.randint(0, 61, (1, 40)).to(DEVICE)
    result = fastpost.GAP(n_steps=10, lr=1e-3)(model, ids, evaluate=lambda m: 1.0, progress=False)
    assert result.losses[-1] > result.losses[0]
    assert result.best_step == 0
    assert all(torch.equal(bits(p), before[name]) for name, p in model.named_parameters())
