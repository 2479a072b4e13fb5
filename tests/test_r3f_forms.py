"""R3F's outputs, seeds and precision, models outside transformers' conventions, what is left behind, bad input."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpost import R3F, R3FOutput
from fastpost.r3f.noise import Noise
from tests.conftest import same_bits
from tests.test_r3f import FORWARDS, KINDS, Count, numbers, untouched
from tests.tiny import VOCABULARY, batch_for, build, gradients

# -- outputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", FORWARDS)
def test_logits_are_the_clean_ones_and_survive_backward(forward: str) -> None:
    model, batch = build("tokens"), batch_for("tokens")
    plain = model(**batch).logits
    out = R3F(0.05, forward=forward)(model, **batch)
    assert isinstance(out, R3FOutput)
    assert out["logits"] is out.logits
    with pytest.raises(KeyError):
        out["logit"]
    out.loss.backward()
    assert out.logits is not None
    torch.testing.assert_close(out.logits, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss.detach(), out.task_loss + out.symm_kl)
    assert not out.task_loss.requires_grad
    assert not out.symm_kl.requires_grad


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_in_place_gradients_are_the_same(kind: str, forward: str) -> None:
    model, batch = build(kind), batch_for(kind)
    outs = [R3F(0.05, seed=2, forward=forward, inplace=inplace)(model, **batch) for inplace in (False, True)]
    assert outs[1].logits is None
    grads = [gradients(model, out.loss) for out in outs]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
@pytest.mark.parametrize("grad", ["both", "noised"])
def test_num_items_divides_both_terms(kind: str, grad: str) -> None:
    """As transformers' Trainer hands it over for a window of micro-batches, explicitly or in the batch."""
    model, batch = build(kind, dtype=torch.float64), batch_for(kind)
    count = int((batch["labels"] != -100).sum())
    for r3f in (R3F(0.05, seed=3, grad=grad), R3F(r3f_lambda=0)):
        plain = r3f(model, **batch)
        for times, given in (
            (1, {"num_items": count}),
            (3, {"num_items": torch.tensor(3 * count)}),
            (4, {"num_items_in_batch": 4 * count}),
        ):
            r3f.step = 0  # the same noise again
            out = r3f(model, **given, **batch)
            torch.testing.assert_close(out.task_loss, plain.task_loss / times)
            torch.testing.assert_close(out.symm_kl, plain.symm_kl / times)
            torch.testing.assert_close(out.loss, out.task_loss + r3f.r3f_lambda * out.symm_kl)
    with pytest.raises(ValueError, match="num_items must be finite and >= 0, not -1"):
        R3F()(model, num_items=-1, **batch)
    with pytest.raises(ValueError, match="num_items goes with reduction 'token' or 'sentence', not 'sum'"):
        R3F(reduction="sum")(model, num_items=3, **batch)


FORMS: list[dict[str, Any]] = [
    {}, {"r3f_lambda": 0}, {"grad": "noised"}, {"grad": "clean"}, {"divergence": "js"}, {"forward": "double_batch"},
    {"inplace": True}, {"fused_linear": True}, {"fused_linear": True, "r3f_lambda": 0}, {"label_smoothing": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("given", [0, 0.0, torch.tensor(0)])
@pytest.mark.parametrize("how", FORMS)
def test_no_items_give_zero(how: dict[str, Any], given: Any) -> None:
    model, batch = build("causal"), batch_for("causal")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = R3F(0.05, **how)(model, num_items=given, **batch)
    assert (float(out.loss), float(out.task_loss), float(out.symm_kl)) == (0.0, 0.0, 0.0)
    assert not any(g.any() for g in gradients(model, out.loss).values())
    assert float(R3F(0.05)(model.eval(), num_items=given, **batch).loss) == 0


@pytest.mark.parametrize("how", [h for h in FORMS if not h.get("fused_linear")])
def test_nan_in_rows_that_do_not_count_sends_back_nothing(how: dict[str, Any]) -> None:
    """As if these rows were not there."""
    logits, labels = torch.randn(4, 6, 9, dtype=torch.float64), torch.randint(0, 9, (4, 6))
    labels[:, ::2] = -100
    bad = logits.clone()
    bad[:, ::2] = torch.nan

    class Model(nn.Module):
        def __init__(self, z: Tensor) -> None:
            super().__init__()
            self.table, self.z = nn.Embedding(3, 9, dtype=torch.float64), nn.Parameter(z.clone())

        def forward(self, input_ids: Tensor) -> Tensor:
            z = self.z if len(input_ids) == len(self.z) else torch.cat((self.z, self.z))
            return z * 1 + self.table(input_ids)

    found = []
    for z, y in ((bad, labels), (logits[:, 1::2], labels[:, 1::2])):
        torch.manual_seed(0)
        model = Model(z)
        r3f = R3F(0.0, embedding="table", shift_labels=False, seed=1, **how)
        out = r3f(model, input_ids=torch.zeros_like(y), labels=y)
        out.loss.backward()
        found.append((out.loss.detach(), model.z.grad))
    assert not found[0][1][:, ::2].any()
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1][:, 1::2], found[1][1])


def test_every_label_ignored() -> None:
    model, batch = build("tokens"), batch_for("tokens")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for r3f in (R3F(0.05), R3F(0.05, r3f_lambda=0), R3F(0.05, grad="noised"), R3F(0.05, grad="clean")):
        out = r3f(model, **batch)
        assert float(out.loss.detach()) == 0
        assert all(float(g.abs().max()) == 0 for g in gradients(model, out.loss).values())


# -- seeds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("dropout", ["independent", "shared"])
def test_repeatable_under_manual_seed(forward: str, dropout: str) -> None:
    if forward == "double_batch" and dropout == "shared":
        with pytest.raises(ValueError, match="needs forward='two_pass'"):
            R3F(dropout=dropout, forward=forward)
        return
    model, batch = build("sequence", dropout=0.1), batch_for("sequence")
    r3f = R3F(0.05, dropout=dropout, forward=forward)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append([float(r3f(model, **batch).loss.detach()) for _ in range(2)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert losses[0][0] != losses[0][1]


def test_an_explicit_seed_advances_with_each_step() -> None:
    model, batch = build("sequence"), batch_for("sequence")
    r3f = R3F(0.05, seed=2**64 - 1)
    kls = [float(r3f(model, **batch).symm_kl) for _ in range(3)]
    assert len(set(kls)) == 3
    assert r3f.step == 3
    again = R3F(0.05, seed=2**64 - 1)
    again.step = 2
    assert float(again(model, **batch).symm_kl) == kls[2]
    assert float(R3F(0.05, seed=-1)(model, **batch).symm_kl) == kls[0]  # seeds wrap
    assert float(R3F(0.05, seed=0)(model, **batch).symm_kl) not in kls  # and are no step of another


def test_an_embedding_that_runs_twice_draws_no_numbers_of_the_next_step() -> None:
    noise = Noise(1.0, "uniform", torch.tensor(7))
    later = Noise(1.0, "uniform", torch.tensor(8))
    x = torch.zeros(4, 6)
    drawn = [noise.add(x, None, call=0), noise.add(x, None, call=1), later.add(x, None, call=0)]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(3) for j in range(i))


# -- precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", FORWARDS)
def test_one_warning_where_bfloat16_swallows_the_noise(forward: str) -> None:
    model, batch = build("sequence", dtype=torch.bfloat16), batch_for("sequence")
    r3f = R3F(1e-5, forward=forward)
    with pytest.warns(UserWarning, match=r"eps=1e-05 is below what bfloat16 resolves .* cosine 0\.[0-4]") as caught:
        r3f(model, **batch)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r3f(model, **batch)  # once is enough
        R3F(0.5, forward=forward)(model, **batch)
        R3F(0.0, forward=forward)(model, **batch)
        R3F(1e-5, forward=forward)(build("sequence"), **batch)  # float32 holds it


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_sum_stays_in_float32_under_autocast(forward: str) -> None:
    model, batch = build("sequence"), batch_for("sequence")
    seen: list[Tensor] = []
    model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        out = R3F(1e-5, seed=1, forward=forward)(model, **batch)
    clean, noised = seen if forward == "two_pass" else seen[0].chunk(2)
    assert noised.dtype == torch.float32
    kept = batch["attention_mask"].bool()
    z = numbers(batch, 24, 1e-5, "uniform", 1)[kept]
    stored = (noised - clean)[kept].detach().double()
    assert float((stored * z).sum() / stored.norm() / z.norm()) > 0.99
    gradients(model, out.loss)
    assert math.isfinite(float(out.loss.detach()))


# -- other models ---------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A classifier outside transformers' conventions."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.words = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, 3)
        self.fail = 0

    def forward(self, ids: Tensor) -> Any:
        embedded = self.words(ids)
        if self.fail:
            self.fail -= 1
            if not self.fail:
                raise KeyboardInterrupt
        logits = self.head(embedded.tanh().mean(1))
        return {"tensor": logits, "dict": {"logits": logits}, "tuple": (logits, None), "none": None}[self.form]


IDS, CLASSES = torch.tensor([[3, 5, 7], [8, 2, 9]]), torch.tensor([0, 2])


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("form", ["tensor", "dict", "tuple"])
def test_plain_modules(form: str, forward: str) -> None:
    model = Plain(form)
    by_name = R3F(0.05, embedding="words", seed=1, forward=forward)(model, ids=IDS, labels=CLASSES)
    by_module = R3F(0.05, embedding=model.words, seed=1, forward=forward)(model, ids=IDS, labels=CLASSES)
    assert float(by_name.symm_kl) == float(by_module.symm_kl) > 0
    wrapped = nn.Module()
    wrapped.module, wrapped.forward = model, model.forward  # type: ignore[method-assign, assignment]
    through = R3F(0.05, embedding="words", seed=1, forward=forward)(wrapped, ids=IDS, labels=CLASSES)
    assert float(through.symm_kl) == float(by_name.symm_kl)
    function = R3F(0.05, embedding=model.words, seed=1, forward=forward)(lambda ids: model(ids), ids=IDS, labels=CLASSES)
    assert float(function.symm_kl) == float(by_name.symm_kl)


@pytest.mark.parametrize("forward", FORWARDS)
def test_compiled_model(forward: str) -> None:
    model = Plain()
    r3f = R3F(0.05, seed=1, forward=forward, embedding="words")
    expected = [r3f(model, ids=IDS, labels=CLASSES) for _ in range(2)]
    r3f.step = 0
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(model, backend="eager")
        for out in expected:
            torch.testing.assert_close(r3f(compiled, ids=IDS, labels=CLASSES).symm_kl, out.symm_kl)
            torch.testing.assert_close(compiled(IDS), model(IDS))  # no noise stays behind
    torch.compiler.reset()


def test_a_compiled_model_that_ignores_hooks_is_an_error() -> None:
    compiled = torch.compile(Plain(), backend="eager")
    with pytest.raises(RuntimeError, match=r"'words' .* was not called .*skip_nnmodule_hook_guards = False"):
        R3F(0.05, embedding="words")(compiled, ids=IDS, labels=CLASSES)
    torch.compiler.reset()


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_model_may_change_its_embeddings_in_place(forward: str) -> None:
    """As CTRL does; and what comes after them may be checkpointed, reentrant or not."""

    class Scaled(Plain):
        checkpointed = False

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            x *= 2.0
            through = nn.Sequential(self.head, nn.Tanh())
            return (checkpoint(through, x, use_reentrant=True) if self.checkpointed else through(x)).mean(1)

    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Scaled().train()
        model.checkpointed = checkpointed
        R3F(0.3, seed=3, forward=forward, embedding="words")(model, ids=IDS, labels=CLASSES).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("forward", FORWARDS)
def test_embedding_with_hooks_and_unusual_options(forward: str) -> None:
    """Another hook on the embedding still runs; an embedding that is more than a look-up is run as it is."""
    for change in ("hook", "max_norm", "subclass"):
        model = Plain()
        expected = None
        if change == "hook":
            model.words.register_forward_hook(lambda *args: args[2] * 2)
        elif change == "max_norm":
            model.words.max_norm = 0.5
        else:
            model.words.__class__ = type("Scaled", (nn.Embedding,), {"forward": lambda s, i: nn.Embedding.forward(s, i) * 3})
        expected = model(IDS)
        hooks = dict(model.words._forward_hooks)
        out = R3F(0.05, embedding="words", forward=forward)(model, ids=IDS, labels=CLASSES)
        assert out.logits is not None
        torch.testing.assert_close(out.logits, expected)
        assert float(out.symm_kl) > 0
        assert dict(model.words._forward_hooks) == hooks


# -- nothing left behind --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("fails_in", [1, 2])
def test_hooks_are_gone_after_an_exception(forward: str, fails_in: int) -> None:
    model = Plain()
    r3f = R3F(0.05, embedding="words", forward=forward)
    model.fail = fails_in
    if forward == "two_pass" or fails_in == 1:
        with pytest.raises(KeyboardInterrupt):
            r3f(model, ids=IDS, labels=CLASSES)
    assert untouched(model)
    model.fail = 0
    expected = model(IDS)
    assert same_bits(model(IDS), expected)
    for kind in KINDS:
        other = build(kind)
        R3F(0.05, forward=forward)(other, **batch_for(kind))
        assert untouched(other)


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "eps must be finite and >= 0, not -1.0"),
        ({"eps": math.nan}, "eps must be finite and >= 0, not nan"),
        ({"r3f_lambda": -0.5}, "r3f_lambda must be finite and >= 0, not -0.5"),
        ({"r3f_lambda": math.nan}, "r3f_lambda must be finite"),
        ({"r3f_lambda": math.inf}, "r3f_lambda must be finite"),
        ({"noise_type": "gauss"}, "unknown noise_type 'gauss'"),
        ({"noise_type": "norma"}, "Did you mean 'normal'"),
        ({"grad": "noise"}, "unknown grad 'noise'. Did you mean 'noised'? Valid: both, noised, clean"),
        ({"dropout": "share"}, "Did you mean 'shared'"),
        ({"forward": "double"}, "Did you mean 'double_batch'"),
        ({"reduction": "tokens"}, "Did you mean 'token'"),
        ({"seed": 2**64}, "seed must lie in"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        R3F(**options)
    if "seed" not in options:  # and again when changed later, as a schedule does
        model, r3f = build("sequence"), R3F()
        passes = Count(model)
        for name, value in options.items():
            setattr(r3f, name, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            r3f(model, **batch_for("sequence"))
        assert passes.calls == 0


def test_bad_types() -> None:
    for name, value in (("label_smoothing", "0.1"), ("ignore_index", None)):
        with pytest.raises(TypeError, match=f"R3F: {name} must be a (whole )?number, not {value!r}"):
            R3F(**{name: value})


def test_bad_batches_fail_before_anything_runs() -> None:
    model, batch = build("sequence"), batch_for("sequence")
    passes, r3f = Count(model), R3F()

    def fails(message: str, model: Any = model, error: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            r3f(model, **{k: v for k, v in {**batch, **changes}.items() if v is not None})

    fails(r"no 'labels', only attention_mask, input_ids, label\. Rename 'label'\?", labels=None, label=batch["labels"])
    fails("labels must be a tensor, not list", error=TypeError, labels=[0, 1, 2, 0])
    fails("regression or multi-label", labels=torch.rand(4))
    fails("must be int64 or int32 class indices, not torch.bool", labels=torch.ones(4, dtype=torch.bool))
    fails("label 3 is out of range; valid are 0 to 2", labels=torch.tensor([0, 1, 3, 0]))
    fails("label -1 is out of range", labels=torch.tensor([0, 1, -1, 0]))
    fails(r"labels have shape \(0,\)", labels=torch.zeros(0, dtype=torch.int64))
    one = build("sequence")
    one.config.num_labels = 1  # type: ignore[union-attr]
    passes_of_one = Count(one)
    fails("regression or multi-label", model=one, labels=torch.zeros(4, dtype=torch.int64))
    plain = Plain()
    passes_of_plain = Count(plain)
    with pytest.raises(ValueError, match=r"Plain has no get_input_embeddings\(\).*nn\.Embedding modules .*: 'words'"):
        r3f(plain, ids=IDS, labels=CLASSES)
    with pytest.raises(ValueError, match=r"unknown embedding 'word'\. Did you mean 'words'\?"):
        R3F(embedding="word")(plain, ids=IDS, labels=CLASSES)
    for name, kind in (("seed", "whole number"), ("eps", "number"), ("r3f_lambda", "number")):
        with pytest.raises(TypeError, match=f"R3F: {name} must be a {kind}, not 'a'"):
            R3F(**{name: "a"})
    with pytest.raises(TypeError, match="embedding must be a module"):
        R3F(embedding=3)  # type: ignore[arg-type]
    assert passes.calls == passes_of_one.calls == passes_of_plain.calls == 0


def test_models_that_do_not_fit() -> None:
    r3f = R3F(embedding="words")
    with pytest.raises(ValueError, match=r"labels have shape \(3,\), logits \(2, 3\); expected labels of shape \(2,\)"):
        r3f(Plain(), ids=IDS, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="label 9 is out of range; valid are 0 to 2"):
        r3f(Plain(), ids=IDS, labels=torch.tensor([0, 9]))
    with pytest.raises(TypeError, match="the model returned NoneType, in which no logits were found"):
        r3f(Plain("none"), ids=IDS, labels=CLASSES)
    one = Plain()
    one.head = nn.Linear(8, 1)
    with pytest.raises(ValueError, match="one output"):
        r3f(one, ids=IDS, labels=torch.zeros(2, dtype=torch.int64))
    unused = Plain()
    unused.spare = nn.Embedding(3, 3)
    for forward in FORWARDS:
        with pytest.raises(RuntimeError, match=r"the embedding module 'spare' \(Embedding\) was not called"):
            R3F(embedding="spare", forward=forward)(unused, ids=IDS, labels=CLASSES)
        assert untouched(unused)
    seq2seq = build("seq2seq")
    assert "decoder_input_ids" not in batch_for("seq2seq")
    R3F()(seq2seq, **batch_for("seq2seq"))
