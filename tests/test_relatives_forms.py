"""R3F's relatives: padding, other ways in, accumulation, shards, HyPe, errors; long, as each rule is tried on all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from fastpost import R3F
from fastpost.anchor import Anchor
from fastpost.ops.noise import add_noise
from fastpost.r3f import layout as layouts
from fastpost.r3f.layout import Layout
from fastpost.r3f.relatives import SMART, FreeLB, HyPe, NEFTune, NoisedStudent, RDrop, SymNoise
from fastpost.r3f.relatives.base import Method
from fastpost.r3f.relatives.delta import Delta
from fastpost.r3f.relatives.hype import find_layers
from tests import distributed
from tests.conftest import same_bits
from tests.test_relatives import KINDS, METHODS, NOISY, SEED, assert_same, of, step
from tests.tiny import VOCABULARY, batch_for, build, pad

# -- padding, other ways in, accumulation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "roberta", "t5", "xlnet", "prompt"])
@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_nothing(name: str, kind: str) -> None:
    model, batch = build(kind, dtype=torch.float64), batch_for(kind)
    (short, expected), (long, found) = (step(of(name), model, pad(batch, pads)) for pads in (0, 5))
    torch.testing.assert_close(long.loss, short.loss, rtol=1e-9, atol=0)
    assert_same(found, expected, rtol=1e-5, atol=1e-9)


class Ordered(nn.Module):
    """A model whose embedding is given its batch in one of several orders."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.order, self.embedding = order, nn.Embedding(VOCABULARY, 4, padding_idx=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        given = input_ids.reshape(-1, 4) if "pieces" in self.order else input_ids
        given = given.t() if "turned" in self.order else given
        given = given.clone(memory_format=torch.contiguous_format) if "copy" in self.order else given
        if "features" in self.order:  # two of each token
            given = torch.stack((given, torch.where(given == 1, given, given % 7 + 2)), -1)
        x = self.embedding(given)
        x = x.mean(2) if "features" in self.order else x
        x = x.transpose(0, 1) if "behind" in self.order else x
        for block in self.blocks:
            x = block(x)
        x = x.transpose(0, 1) if {"turned", "behind"} & {*self.order.split()} else x.reshape(*input_ids.shape, -1)
        logits: Tensor = self.head(x)
        return logits


LIKE, UNLIKE, ONE_AFTER_ANOTHER = [(4, 8)], [(4, 9)], [(4, 9), (4, 4)]  # whether pieces of 4 have the shape of turned rows


@pytest.mark.parametrize(
    ("order", "sizes"),
    [(order, sizes) for order in ("pieces", "pieces copy") for sizes in (LIKE, [(4, 4)], [(2, 4)])]
    + [(order, sizes) for order in ("turned", "turned copy") for sizes in (LIKE, UNLIKE, [(4, 4)], [(2, 4)])]
    # A square batch alone does not show the order of features and of hidden states.
    + [(order, sizes) for order in ("turned features", "behind") for sizes in (UNLIKE, ONE_AFTER_ANOTHER)],
)
@pytest.mark.parametrize("method", ["two_pass", "double_batch", "hype"])
def test_an_embedding_may_be_given_its_batch_in_another_order(method: str, order: str, sizes: list[tuple[int, int]]) -> None:
    """A batch turned before the embedding or behind it, or cut into pieces of 4 tokens."""
    found = []
    for model in (Ordered(order).double(), Ordered("features" if "features" in order else "plain").double()):
        for rows, time in sizes:
            lengths = torch.tensor([time, 3, time - 1, 2])[:rows]
            mask = torch.arange(time) < lengths[:, None]
            ids = torch.randint(2, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(3)).where(mask, 1)
            of = HyPe(0.3, seed=4) if method == "hype" else R3F(0.3, seed=4, forward=method)
            out = of(model, input_ids=ids, attention_mask=mask.long(), labels=(ids % 3).where(mask, -100))
        found.append((out.loss, out.symm_kl))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_without_values_a_module_is_given_its_batch_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "traced", lambda: True)
    layout, square = Layout(), torch.randint(3, VOCABULARY, (4, 4))
    for ids, expected in ((square, False), (square[:3], True), (square, True)):
        assert layout.time_first(ids.t().contiguous(), ids) is expected


def test_on_a_gpu_one_look_shows_how_a_module_is_given_its_batch() -> None:
    """A look at the values of meta tensors raises, where one at a GPU's waits."""
    ids = torch.randint(3, VOCABULARY, (4, 8))
    turned, padded = torch.empty(8, 4, device="meta"), torch.empty(4, 16, device="meta")
    for other in (ids.t().contiguous(), ids.reshape(8, 4).clone()):
        layout = Layout()
        with pytest.raises(RuntimeError):
            layout.time_first(turned, ids)
        expected = layout.time_first(other, ids)
        assert layout.time_first(turned, ids) == expected == (other[1, 0] == ids[0, 1]).item()
    assert Layout().time_first(torch.empty(9, 4, device="meta"), torch.zeros(4, 9)) is True
    layout = Layout()
    with pytest.raises(RuntimeError):
        layout.padded_by_model(padded, ids, 8)
    assert layout.padded_by_model(nn.functional.pad(ids, (0, 8)), ids, 8)
    assert layout.padded_by_model(padded, ids, 8)


@pytest.mark.parametrize("name", [n for n in NOISY if n != "hype"])
def test_embedded_input(name: str) -> None:
    model, batch = build("sequence", dtype=torch.float64), batch_for("sequence")
    plain = of(name)(model, **batch).loss
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))  # type: ignore[operator]
    torch.testing.assert_close(of(name)(model, inputs_embeds=embeds.detach(), **batch).loss, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_num_items(name: str) -> None:
    model, batch = build("causal", dtype=torch.float64), batch_for("causal")
    counted = int((batch["labels"][:, 1:] != -100).sum())
    whole = of(name)(model, **batch)
    for out in (of(name)(model, num_items=4 * counted, **batch), of(name)(model, num_items_in_batch=4 * counted, **batch)):
        torch.testing.assert_close(out.loss * 4, whole.loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(out.symm_kl * 4, whole.symm_kl, rtol=1e-10, atol=0)


@pytest.mark.parametrize("given", [0, 0.0, torch.tensor(0)])
@pytest.mark.parametrize("name", METHODS)
def test_no_items_give_zero(name: str, given: float | Tensor) -> None:
    model, batch = build("causal"), batch_for("causal")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out, grads = step(of(name), model, batch, num_items=given)
    assert (float(out.loss), float(out.task_loss), float(out.symm_kl)) == (0.0, 0.0, 0.0)
    assert not any(g.any() for g in grads.values())
    assert float(of(name)(model.eval(), num_items=given, **batch).loss) == 0


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "xlnet", "prompt"])
@pytest.mark.parametrize("name", NOISY)
def test_a_window_s_noise_does_not_depend_on_how_it_is_cut(name: str, kind: str) -> None:
    model, batch = build(kind, dtype=torch.float64), batch_for(kind)
    shifted = batch["labels"][:, 1:] if kind in ("causal", "prompt") else batch["labels"]
    items = int((shifted != -100).sum())
    _, expected = step(of(name), model, batch, num_items=items)
    rows = len(batch["labels"])
    for size in (1, 2):
        method, found = of(name), []
        with method.window():
            for i in range(0, rows, size):
                part = {key: value[i : i + size] for key, value in batch.items()}
                found.append(step(method, model, part, num_items=items)[1])
        assert method.step == 1
        assert_same({key: sum(g[key] for g in found) for key in found[0]}, expected, rtol=1e-6, atol=1e-9)
    if name == "hype" and kind == "seq2seq":
        return  # two sides: below
    first, last = ({key: value[part] for key, value in batch.items()} for part in (slice(rows // 2), slice(rows // 2, rows)))
    before, method = int(batch["attention_mask"][: rows // 2].sum()), of(name)
    for offset in (before, torch.tensor(before)):  # as on two ranks
        mine, other = of(name), of(name)
        with mine.window():
            parts = [step(mine, model, first, num_items=items)[1]]
        with other.window(offset):
            parts.append(step(other, model, last, num_items=items)[1])
        assert_same({key: sum(g[key] for g in parts) for key in parts[0]}, expected, rtol=1e-6, atol=1e-9)
    with method.window(), pytest.raises(RuntimeError, match=f"{type(method).__name__}: a window is open already"):
        method.window().__enter__()


@pytest.mark.parametrize("kind", ["seq2seq", "t5"])
@pytest.mark.parametrize("where", ["encoder", "decoder", "both", "hype"])
def test_sides_of_other_lengths_are_counted_apart(where: str, kind: str) -> None:
    """Texts of 9 tokens and answers of 6, as one batch, as micro-batches of other sizes, and on two ranks."""
    model, batch = build(kind, dtype=torch.float64), batch_for(kind)
    batch["labels"] = batch["labels"][:, :6].contiguous()
    inside = batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    items = int(inside.sum())
    counts = [int(batch["attention_mask"][:1].sum()), int(inside[:1].sum())]
    assert counts[0] != counts[1]

    def of() -> Any:
        return HyPe(0.05, seed=SEED) if where == "hype" else R3F(0.05, seed=SEED, where=where)

    def part(rows: slice) -> dict[str, Any]:
        return {name: value[rows] for name, value in batch.items()}

    expected = of()(model, num_items=items, **batch).loss
    assert abs(float(expected - of()(model, num_items=items, **part(slice(0, 1))).loss)) > 1e-3
    method, found = of(), []
    with method.window():
        for rows in (slice(0, 1), slice(1, 4)):
            found.append(method(model, num_items=items, **part(rows)).loss)
    torch.testing.assert_close(sum(found), expected, rtol=1e-9, atol=0)
    single = {"encoder": counts[0], "decoder": counts[1]}
    for make in (int, torch.tensor):
        for offset in (tuple(map(make, counts)), *([make(single[where])] if where in single else [])):
            method = of()
            with method.window(offset):
                last = method(model, num_items=items, **part(slice(1, 4))).loss
            torch.testing.assert_close(found[0] + last, expected, rtol=1e-9, atol=0)
        if where not in single:
            for number in (counts[0], 0) if make is torch.tensor else (counts[0],):  # the values of tensors are not read
                refused = pytest.raises(ValueError, match=r"both sides .*token_offset=\(the enco")
                with method.window(make(number)), refused:
                    method(model, num_items=items, **part(slice(1, 4)))
            method = of()
            with method.window(0):
                assert float(method(model, num_items=items, **part(slice(0, 1))).loss) == float(found[0])
    for wrong in ((1, 2, 3), 1.5, ("a", 1)):
        with pytest.raises(TypeError, match="token_offset must be an integer, a tensor with one, or a pair"):
            method.window(wrong).__enter__()


@pytest.mark.parametrize("name", METHODS)
def test_transformers_neftune_beside_another_method_is_refused(name: str) -> None:
    model, batch = build("causal"), batch_for("causal")
    hook = activate_neftune(model, 5.0)
    with pytest.raises(ValueError, match=f"{type(of(name)).__name__}: neftune_noise_alpha=5 adds NEFTune's noise"):
        of(name)(model, **batch)
    for r3f in (R3F(), R3F(forward="double_batch"), R3F(divergence="js")):
        with pytest.raises(ValueError, match="R3F: neftune_noise_alpha=5 adds NEFTune's noise to every pass"):
            r3f(model, **batch)
    R3F(r3f_lambda=0)(model, **batch)  # plain fine-tuning with NEFTune
    deactivate_neftune(model, hook)
    of(name)(model, **batch)


@pytest.mark.parametrize("name", [*METHODS, "r3f", "anchor"])
@pytest.mark.parametrize("how", ["config", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_a_router_s_loss_is_not_dropped(name: str, how: str, training: bool) -> None:
    """Mixtral's own loss has a part that the cross-entropy of its logits leaves out."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, output_router_logits=how == "config")).train(training)
    batch = {**batch_for("causal"), **({"output_router_logits": True} if how == "batch" else {})}
    assert model(**batch).aux_loss > 0
    method: Any = {"r3f": R3F, "anchor": lambda: Anchor(model)}.get(name, lambda: of(name))()
    who = type(method).__name__
    with pytest.raises(
        ValueError, match=rf"^{who}: the model adds a loss of its router .* set model.config.output_router_l"
    ):
        method(model, **batch)
    if how == "config":
        method(model, **{**batch, "output_router_logits": False})  # as the batch asks


@pytest.mark.parametrize("name", METHODS)
def test_labels_that_do_not_count(name: str) -> None:
    model, batch = build("tokens"), batch_for("tokens")
    other = dict(batch, labels=torch.where(batch["labels"] == -100, -1, batch["labels"]))
    method = of(name)
    method.ignore_index = -1
    torch.testing.assert_close(method(model, **other).loss, of(name)(model, **batch).loss)
    none = dict(batch, labels=torch.full_like(batch["labels"], -100))
    assert float(of(name)(model, **none).loss) == 0


@pytest.mark.parametrize("name", NOISY)
def test_seeds(name: str) -> None:
    model, batch = build("sequence"), batch_for("sequence")
    method, again = of(name), of(name)
    first, second = (float(method(model, **batch).loss) for _ in range(2))
    assert first != second
    assert [float(again(model, **batch).loss) for _ in range(2)] == [first, second]
    drawn = []
    for _ in range(2):
        free = of(name)
        free.seed = None
        torch.manual_seed(9)
        drawn.append(float(free(model, **batch).loss))
    assert drawn[0] == drawn[1] != first


def test_freelb_runs_the_backward_it_is_given() -> None:
    model, batch = build("sequence"), batch_for("sequence")
    plain, expected = step(of("freelb"), model, batch)
    scaled = of("freelb")
    scaled.backward = lambda loss: (loss * 1024).backward()  # type: ignore[attr-defined]
    out, found = step(scaled, model, batch)
    assert same_bits(out.loss, plain.loss)
    assert all(same_bits(found[name] / 1024, expected[name]) for name in expected)
    scaled.step, scaled.backward = 0, lambda loss: (loss * 1e38 * 1e38).backward()  # type: ignore[attr-defined]
    out, found = step(scaled, model, batch)
    assert math.isfinite(float(out.loss))  # the perturbation did not follow
    assert not all(bool(g.isfinite().all()) for g in found.values())
    # two calls add up
    model.zero_grad()
    for _ in range(2):
        of("freelb")(model, **batch)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * expected[name], rtol=1e-5, atol=1e-7)


def test_freelb_refuses_what_cannot_run_backward() -> None:
    model, batch = build("sequence"), batch_for("sequence")
    with pytest.raises(RuntimeError, match="left no gradient"):
        FreeLB(2, backward=lambda loss: None)(model, **batch)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        FreeLB()(model, **batch)


def test_under_autocast_no_weight_is_left_out() -> None:
    """A pass without a graph must not leave its cast weights to the pass that needs one."""
    for name in METHODS:
        model, batch = build("sequence"), batch_for("sequence")
        with torch.autocast("cpu", torch.bfloat16):
            out = of(name)(model, **batch)
        if out.loss.requires_grad:
            out.loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "query.weight" in n)
        assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_the_model_are_left_alone(name: str) -> None:
    """Only FreeLB runs backward; SMART's ascent leaves no trace in `.grad`."""
    model, batch = build("sequence"), batch_for("sequence")
    out = of(name)(model, **batch)
    assert all((p.grad is None) != (name == "freelb") for n, p in model.named_parameters() if "query" in n)
    assert bool(
        torch.isclose(
            out.loss.detach(),
            out.task_loss
            + {"rdrop": 0.7, "rdrop double": 0.7, "symnoise": 0.7, "smart": 0.7, "student": 0.7}.get(name, 0) * out.symm_kl,
        )
    )


def test_the_ascent_stays_off_padding_and_skips_what_overflowed() -> None:
    keep = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    for order, radius in ((2.0, 0.0), (2.0, 0.2), (math.inf, 0.2)):
        delta = Delta(0.1, "uniform", torch.tensor(3), value=None)
        delta.add(torch.zeros(3, 3, 4), keep)
        start = delta.value
        assert start is not None
        gradient = torch.randn(3, 3, 4)
        gradient[1] = 0
        gradient[2, 0, 0] = math.inf
        delta.ascend(gradient, 0.5, order, radius)
        moved = delta.value
        assert moved is not None
        assert moved.requires_grad
        assert not bool(moved[~keep].any())
        assert bool(moved.isfinite().all())
        assert not torch.equal(moved[0], start[0])
        for text in (1, 2):  # within the ball from the start, so the projection does not touch them
            if radius == 0 or float(start[text].detach().norm(p=order)) <= radius:
                assert torch.equal(moved[text], start[text])
        if radius:
            assert float(moved[0].detach().norm(p=order)) <= radius * (1 + 1e-6)


# -- data-parallel replicas and shards --------------------------------------------------------------------------------


def replicated(name: str, how: str) -> float:
    """The largest difference of a gradient from the mean of the ranks' own, relative to that gradient's largest element."""
    batch, rank = batch_for("sequence"), dist.get_rank()
    mine = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    plain, model = (build("sequence", dtype=torch.float64) for _ in range(2))
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
    for trained in (plain, model):
        out = of(name)(trained, **mine)
        if out.loss.requires_grad:
            out.loss.backward()
    apart = []
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert q.grad is not None
        mean = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(mean)
        found = q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad
        apart.append((mean / 2 - found).abs().max() / mean.abs().max().clamp(min=1e-6))
    return float(torch.stack(apart).max())


@pytest.fixture(scope="module")
def two_ranks() -> distributed.Outcome:
    ways = [(name, how) for name in METHODS for how in ("ddp", "fsdp2")]
    return distributed.run(2, {f"{name} {how}": functools.partial(replicated, name, how) for name, how in ways})


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_the_mean_of_the_ranks(two_ranks: distributed.Outcome, name: str, how: str) -> None:
    assert two_ranks.worst(f"{name} {how}") < 1e-9


# -- HyPe's layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("sequence", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("causal", ["transformer.h.0", "transformer.h.1"]),
        ("llama", ["model.layers.0"]),
        ("seq2seq", ["model.encoder.layers.0", "model.decoder.layers.0"]),
        ("t5", ["encoder.block.0", "decoder.block.0"]),
    ],
)
def test_layers_are_found(kind: str, names: list[str]) -> None:
    assert sorted(find_layers(build(kind))) == sorted(names)


class Layers(nn.Module):
    """Three blocks that hand on what they get, the last of them run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Identity()) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.seen = [self.embedding(input_ids)]
        for i in (0, 1, 2, 2):
            self.seen.append(self.blocks[i](self.seen[-1]))
        logits: Tensor = self.head(self.seen[-1])
        return logits


def test_every_layer_and_call_draws_its_own_numbers() -> None:
    model = Layers().double()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    labels = torch.tensor([[0, 1, 2], [1, -100, -100]])
    HyPe(0.3, "uniform", seed=4)(model, input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=mask, labels=labels)
    for i in range(4):
        moved = (model.seen[i + 1] - model.seen[i]).detach()
        assert not bool(moved[mask == 0].any())
        drawn = add_noise(torch.zeros(4, 4, dtype=torch.float64), 0.3, seed=4 + i * 2**40)
        torch.testing.assert_close(moved[mask == 1], drawn, rtol=0, atol=1e-12)


def test_layers_by_name_and_by_module() -> None:
    model, batch = build("sequence", dtype=torch.float64), batch_for("sequence")
    block = model.bert.encoder.layer[0]  # type: ignore[union-attr]
    losses = [
        float(HyPe(0.1, layers=layers, seed=1)(model, **batch).loss) for layers in (["bert.encoder.layer.0"], [block], None)
    ]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match=r"unknown layer 'bert\.encoder\.layer\.7'\. Did you mean"):
        HyPe(layers=["bert.encoder.layer.7"])(model, **batch)
    with pytest.raises(TypeError, match="modules of the model"):
        HyPe(layers=[nn.Linear(2, 2)])(model, **batch)
    with pytest.raises(ValueError, match="names none"):
        HyPe(layers=[])(model, **batch)
    with pytest.raises(TypeError, match="not given hidden states"):
        HyPe(layers=["bert.embeddings"])(model, **batch)
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_hype_refuses_what_would_go_wrong_silently() -> None:
    model, batch = build("sequence"), batch_for("sequence")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(ValueError, match="gradient checkpointing"):
        HyPe()(model, **batch)
    HyPe(dropout=False)(model, **batch)
    with pytest.raises(ValueError, match="no stack of layers"):
        find_layers(nn.Sequential(nn.Linear(2, 2)))


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RDrop(-1), "RDrop: alpha must be finite and >= 0, not -1"),
        (lambda: RDrop(forward="double"), "unknown forward 'double'. Did you mean 'double_batch'?"),
        (lambda: NEFTune(math.nan), "NEFTune: alpha must be finite"),
        (lambda: NEFTune(length="pad"), "unknown length 'pad'. Did you mean 'padded'?"),
        (lambda: SMART(eps=-1), "SMART: eps must be"),
        (lambda: SMART(steps=0), "SMART: steps must be a whole number >= 1, not 0"),
        (lambda: SMART(dropout="off"), "unknown dropout 'off'"),
        (lambda: FreeLB(1.5), "FreeLB: adv_steps must be a whole number"),
        (lambda: FreeLB(adv_lr=math.inf), "FreeLB: adv_lr must be finite"),
        (lambda: HyPe(noise_type="gauss"), "unknown noise_type 'gauss'"),
        (lambda: HyPe(eps=-1), "HyPe: eps must be finite"),
        (lambda: NoisedStudent(r3f_lambda=-1), "NoisedStudent: r3f_lambda must be"),
        (lambda: SymNoise(-1.0), "SymNoise: alpha must be finite and >= 0"),
        (lambda: SymNoise(r3f_lambda=math.inf), "SymNoise: r3f_lambda must be finite"),
        (lambda: SymNoise(noise_type="signs"), "unknown noise_type 'signs'. Did you mean 'sign'?"),
        (lambda: NEFTune(seed=2**64), "seed"),
    ],
)
def test_bad_options(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace(".", r"\.")):
        make()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="FreeLB: backward must be callable"):
        FreeLB(backward=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="NEFTune: embedding must be a module"):
        NEFTune(embedding=3)
    with pytest.raises(TypeError, match="SymNoise: alpha must be a number, not '5'"):
        SymNoise(alpha="5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SymNoise: seed must be a whole number, not 'a'"):
        SymNoise(seed="a")
    with pytest.raises(TypeError, match="SymNoise: ignore_index must be a whole number, not None"):
        SymNoise(ignore_index=None)
    with pytest.raises(TypeError, match=r"SymNoise: no option 'fused_linear'\. Valid: alpha, r3f_lambda, noise_type,"):
        SymNoise(fused_linear=True)
    with pytest.raises(TypeError, match=r"FreeLB: no option 'adv_stepps'. Did you mean 'adv_steps'\?"):
        FreeLB(adv_stepps=3)


@pytest.mark.parametrize("name", METHODS)
def test_bad_batches_are_refused_in_the_methods_name(name: str) -> None:
    model, batch = build("sequence"), batch_for("sequence")
    method = of(name)
    who = type(method).__name__
    state = torch.get_rng_state()
    for change, message in (
        ({"labels": None}, "has no 'labels'"),
        ({"labels": batch["labels"].float()}, "regression"),
        ({"labels": torch.full_like(batch["labels"], 7)}, "label 7 is out of range"),
        ({"num_items": -1}, "num_items must be finite and >= 0"),
    ):
        with pytest.raises(ValueError, match=f"^{who}: .*{message}"):
            method(model, **{**batch, **change})
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=f"^{who}: labels have shape"):
        method(model, **{**batch, "labels": batch["labels"][:, None]})
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in NOISY if n != "hype"])
def test_an_embedding_that_never_runs(name: str) -> None:
    model, batch = build("sequence"), batch_for("sequence")
    method = of(name)
    method.embedding = nn.Embedding(3, 3)
    with pytest.raises(RuntimeError, match=f"^{type(method).__name__}: the embedding module"):
        method(model, **batch)
    method.embedding = "bert.embeddings.word_embedding"
    with pytest.raises(ValueError, match=r"Did you mean 'bert\.embeddings\.word_embeddings'"):
        method(model, **batch)
