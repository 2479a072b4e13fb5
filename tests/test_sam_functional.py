"""Functional perturbation: the same gradient as a stored one in float64, and no weight ever written."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastpost import R3F, SAM
from fastpost.backends import reference
from fastpost.ops import params as ops
from fastpost.sam import SAMWindow
from fastpost.sam.perturbation.functional import rule_for

from . import tiny
from .memory import cpu_peak_bytes
from .small import X, Y, all_bits, closure_of, loss_of, network, unchanged


def functional(model: nn.Module, rho: float = 0.1, base=torch.optim.SGD, **options) -> SAM:
    options.setdefault("lr", 0.0)
    return SAM(model.named_parameters(), base, rho=rho, perturb="functional", model=model, **options)


def second_gradient(model: nn.Module, opt: SAM, loss) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    with opt.perturbed():
        loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["sequence", "causal", "llama", "seq2seq", "t5", "roberta"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_second_gradient_is_that_of_a_stored_perturbation_in_float64(kind: str, adaptive: bool) -> None:
    """Tied embeddings and heads, Conv1D, scaled embeddings and three kinds of norm among these models."""
    model = tiny.build(kind, dtype=torch.float64)
    batch = tiny.batch_for(kind)

    def loss(model: nn.Module) -> Tensor:
        return model(**batch).loss

    rho = 0.5 if adaptive else 0.1
    stored = SAM(model.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.0)
    expected = second_gradient(model, stored, loss)
    opt = functional(model, rho, adaptive=adaptive)
    got = second_gradient(model, opt, loss)
    assert got.keys() == expected.keys()
    tolerance = 2e-7 if kind in ("llama", "t5") else 1e-12  # these two compute their norms in float32, whatever the weights
    for name, g in expected.items():
        assert (got[name] - g).abs().max() <= tolerance, name
    plain = {name: g.clone() for name, g in expected.items()}
    model.zero_grad()
    loss(model).backward()
    assert any((p.grad - plain[n]).abs().max() > 1e-4 for n, p in model.named_parameters())  # rho is felt at all
    assert opt.report.stored_norm.item() == pytest.approx(stored.report.stored_norm.item(), rel=1e-9)
    assert opt.report.seen_cosine.item() == pytest.approx(1.0, abs=1e-9)


def test_no_weight_is_written_and_nothing_is_stashed() -> None:
    model = network()
    opt = functional(model)
    before = all_bits(model)
    versions, addresses = [p._version for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    loss_of(model).backward()
    opt.first_step(zero_grad=True)
    assert unchanged(model, before)
    perturbed = loss_of(model)
    opt.restore_()
    assert perturbed > loss_of(model) + 0.01
    assert versions == [p._version for p in model.parameters()]
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert not any(b.bucket.stash for b in opt._ascent_buckets._buckets)


def test_training_agrees_with_the_stored_form_in_all_forms_of_a_step() -> None:
    def two_calls(model: nn.Module, opt: SAM) -> None:
        loss_of(model).backward()
        opt.first_step()  # the ascent gradient stays; it is the caller's to drop
        model.zero_grad(set_to_none=False)
        loss_of(model).backward()
        opt.second_step(zero_grad=True)

    def window(model: nn.Module, opt: SAM) -> None:
        def forward_backward(part: slice) -> None:
            (nn.functional.cross_entropy(model(X[part]), Y[part]) / 2).backward()

        SAMWindow(opt, forward_backward).run([slice(0, 16), slice(16, 32)])
        opt.step()
        opt.zero_grad()

    forms = (lambda model, opt: opt.step(closure_of(model)), two_calls, window)
    for form in forms:
        one, two = network(), network()
        stored = SAM(one.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
        opt = functional(two, base=torch.optim.AdamW, lr=1e-2)
        for _ in range(5):
            form(one, stored)
            form(two, opt)
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert (p - q).abs().max() <= 2e-5


def test_tied_weights_share_one_direction() -> None:
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head).double()
    ids = torch.arange(11)
    e, h = embedding.weight.detach(), embedding.weight.detach()
    w = e.clone().requires_grad_()
    g = torch.autograd.grad(nn.functional.cross_entropy(w[ids] @ w.T, ids), w)[0]
    at = (e + 0.3 * g / g.norm()).requires_grad_()
    expected = torch.autograd.grad(nn.functional.cross_entropy(at[ids] @ at.T, ids), at)[0]
    got = second_gradient(model, functional(model, 0.3), lambda m: nn.functional.cross_entropy(m(ids), ids))
    assert torch.equal(e, h)
    assert (got["0.weight"] - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients_at_the_ends_of_float32_perturb_as_others_do(size: float, adaptive: bool) -> None:
    """rho / |g| is then no float32 any more."""
    layer = nn.Linear(5, 3)
    x = torch.randn(4, 5)
    opt = functional(layer, 0.5, adaptive=adaptive)
    scaled = []
    for p in layer.parameters():
        p.grad = torch.rand(p.shape).sub(0.5).double().mul(size).float()
        t = p.detach().double().abs() if adaptive else torch.ones(p.shape, dtype=torch.float64)
        scaled.append((t, p.grad.double()))
    norm = math.sqrt(sum((t * g).square().sum().item() for t, g in scaled))
    w, b = (p.detach().double() + 0.5 * t**2 * (g / norm) for p, (t, g) in zip(layer.parameters(), scaled, strict=True))
    expected = x.double() @ w.t() + b
    opt.first_step()
    assert (layer(x).double() - expected).abs().max() <= 2e-6
    opt.restore_()
    assert (layer(x).double() - expected).abs().max() > 1e-2


def test_scope_and_groups_with_their_own_radius() -> None:
    model = network().double()
    weights, biases = ([n for n in dict(model.named_parameters()) if n.endswith(end)] for end in ("weight", "bias"))
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, named[n]) for n in weights], "rho": 0.3},
        {"params": [(n, named[n]) for n in biases], "rho": 0.01},
    ]
    gradients = []
    for options in ({}, {"perturb": "functional", "model": model}):
        for scope in (None, ["0.*"]):
            opt = SAM(copy.copy([dict(g) for g in groups]), torch.optim.SGD, lr=0.0, scope=scope, **options)
            gradients.append(second_gradient(model, opt, lambda m: loss_of(m, X.double())))
    for stored, got in zip(gradients[:2], gradients[2:], strict=True):
        assert all((got[n] - stored[n]).abs().max() <= 1e-7 for n in named)  # loss_of computes its loss in float32


def test_a_layer_outside_scope_may_be_anything() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(36, 3))
    x = X[:, None, :]
    opt = functional(model, scope=["2.*"])
    before = loss_of(model, x)
    before.backward()
    with opt.perturbed():
        assert loss_of(model, x) > before
    with pytest.raises(ValueError, match=r"not 0 \(Conv1d\)"):
        functional(model)


def test_a_fused_head_is_refused_where_it_is_tied_too() -> None:
    """It computes with the head's weight at w, whatever the embedding does."""
    model, batch = tiny.build("causal"), tiny.batch_for("causal")
    opt, before = functional(model, lr=0.1), all_bits(model)
    with torch.no_grad():
        model(input_ids=batch["input_ids"])  # an evaluation tells nothing of what training passes call
    R3F(fused_linear=True, seed=1)(model, **batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"the model was called and lm_head was not, which holds a tied weight"):
        opt.first_step()
    assert unchanged(model, before)
    opt.zero_grad()
    R3F(seed=1)(model, **batch).loss.backward()
    opt.first_step(zero_grad=True)
    R3F(seed=1)(model, **batch).loss.backward()
    opt.second_step()
    assert not unchanged(model, before)


def test_a_weight_used_outside_its_layer_is_refused_before_anything_happens() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight.t()

    model = Direct()
    opt = functional(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"inner\.weight got a gradient although the layer was not called"):
        opt.first_step()
    assert not opt.is_perturbed


@pytest.mark.parametrize("autocast_at_the_ascent", [False, True])
@pytest.mark.parametrize("kind", ["sequence", "causal", "llama", "t5"])
def test_under_autocast_the_loss_rises_as_in_float32(kind: str, autocast_at_the_ascent: bool) -> None:
    model = tiny.build(kind)
    batch = tiny.batch_for(kind)
    rises = []
    for dtype in (None, torch.bfloat16):
        opt = functional(model, 1.0)
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            clean = model(**batch).loss
        clean.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None and autocast_at_the_ascent):
            opt.first_step(zero_grad=True)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            perturbed = model(**batch).loss
        perturbed.backward()
        opt.restore_()
        rises.append((perturbed - clean).item())
        if autocast_at_the_ascent and dtype is not None:
            room = opt._perturbation._room.values()
            assert {u.dtype for u in room if u.ndim == 2} == {torch.bfloat16}
    assert rises[0] > 0.1
    assert rises[1] == pytest.approx(rises[0], rel=0.1)


def test_a_product_is_rounded_once() -> None:
    """Shifts below half a unit in the last place survive on average; added to a rounded output none would."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=False).bfloat16()
    x, direction = torch.randn(256, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    opt = functional(layer, 0.005)
    clean = layer(x)
    layer.weight.grad = direction.clone()
    with opt.perturbed():
        moved = layer(x).double() - clean.double()
    shift = x.double() @ (0.005 * direction.double() / direction.double().norm()).T
    assert ((moved * shift).sum() / shift.square().sum()).item() == pytest.approx(1.0, abs=0.1)
    late = (clean + shift.bfloat16()).double() - clean.double()
    assert ((late * shift).sum() / shift.square().sum()).item() < 0.5


@pytest.mark.parametrize(("dtype", "dy_size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 1e-4)])
def test_the_gradient_of_the_input_is_rounded_once_too(dtype: torch.dtype, dy_size: float) -> None:
    """With small gradients in float16 as well, where factor * dy would be nothing."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=False).to(dtype)
    x = torch.randn(256, 512).to(dtype).requires_grad_()
    dy, direction = (torch.randn(256, 512) * dy_size).to(dtype), torch.randn(512, 512).to(dtype)
    rho = 0.005 if dtype == torch.bfloat16 else 0.05
    opt = functional(layer, rho)
    (clean,) = torch.autograd.grad(layer(x), x, dy)
    layer.weight.grad = direction.clone()
    with opt.perturbed():
        (moved,) = torch.autograd.grad(layer(x), x, dy)
    shift = dy.double() @ (rho * direction.double() / direction.double().norm())
    gain = ((moved.double() - clean.double()) * shift).sum() / shift.square().sum()
    assert gain.item() == pytest.approx(1.0, abs=0.1)


class Scaled(nn.Embedding):
    """As in Gemma."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_look_up_in_16_bits_keeps_e_on_average(kind: type[nn.Embedding], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = kind(500, 64).to(dtype)
    ids = torch.arange(500)
    direction = torch.randn(500, 64).to(dtype)
    rho = 0.1 if dtype == torch.bfloat16 else 0.02
    opt = functional(table, rho)
    clean = table(ids)
    table.weight.grad = direction.clone()
    e = rho * direction.double() / direction.double().norm() * (3 if kind is Scaled else 1)
    with opt.perturbed():
        out = table(ids)
        again = table(ids.flip(0))
        out.float().sum().backward()
    moved = out.detach().double() - clean.detach().double()
    assert ((moved * e).sum() / (e * e).sum()).item() == pytest.approx(1.0, abs=0.15)
    stored = (clean.detach() + e.to(dtype)).double() - clean.detach().double()
    assert ((stored * e).sum() / (e * e).sum()).item() < 0.9
    if kind is nn.Embedding:
        assert torch.equal(again.flip(0), out)
    assert torch.equal(table.weight.grad, torch.full_like(direction, 3.0 if kind is Scaled else 1.0))


def test_an_optimizer_built_after_the_first_pass_is_no_misuse() -> None:
    model = network()
    clean = loss_of(model)
    clean.backward()
    with functional(model).perturbed():
        assert loss_of(model) > clean + 0.01


def test_its_price_in_floating_point_operations() -> None:
    """Of a linear layer's three products two are doubled: the second pass costs 5/3, the step 4/3 of a stored one."""
    model = tiny.build("sequence")
    batch = tiny.batch_for("sequence")

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        return counter.get_total_flops()

    opt = functional(model)
    plain = operations()
    with opt.perturbed():
        ratio = operations() / plain
    assert 1.55 < ratio <= 5 / 3


def test_an_overflow_leaves_the_second_pass_unperturbed_and_skips() -> None:
    model = network()
    opt = functional(model, base=torch.optim.AdamW, lr=1e-2)
    before = all_bits(model)
    clean = loss_of(model).item()
    (loss_of(model) * math.inf).backward()
    opt.first_step(zero_grad=True)
    assert loss_of(model).item() == clean
    loss_of(model).backward()
    opt.second_step()
    assert unchanged(model, before)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_zero_radius_and_zero_gradient_change_no_bit(rho: float) -> None:
    model = network()
    opt = functional(model, rho)
    clean = loss_of(model)
    (clean if rho == 0 else clean * 0).backward()
    with opt.perturbed():
        assert loss_of(model).item() == clean.item()


def test_checkpointed_layers_recompute_at_the_perturbed_point() -> None:
    model = network().double()
    expected = second_gradient(model, functional(model), lambda m: loss_of(m, X.double()))

    def checkpointed(m: nn.Module) -> Tensor:
        out = torch.utils.checkpoint.checkpoint(m, X.double(), use_reentrant=False)
        return nn.functional.cross_entropy(out.float(), Y)

    got = second_gradient(model, functional(model), checkpointed)
    assert all(torch.equal(got[n], g) for n, g in expected.items())


@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled_models_see_the_perturbation(compiled_before: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 11))
    ids = torch.arange(11)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if compiled_before:
        compiled(ids)
    opt = functional(model, 0.3)
    losses = []
    for forward in (model, compiled, compiled):
        model.zero_grad()
        loss = nn.functional.cross_entropy(forward(ids), ids)
        loss.backward()
        with opt.perturbed():
            losses.append((loss.item(), nn.functional.cross_entropy(forward(ids), ids).item()))
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][1] > losses[0][0] + 0.05


def test_float16_products_stay_below_its_end() -> None:
    """A coherent input of width 4,096 meets a direction of ones: 4,096 times what one element gives."""
    model = nn.Linear(4096, 3, bias=False).half()
    x = torch.full((2, 4096), 30.0, dtype=torch.float16)
    opt = functional(model, 0.1)
    model(x)
    model.weight.grad = torch.ones_like(model.weight)
    with opt.perturbed(zero_grad=False):
        rise = model(x).float().sum() - nn.functional.linear(x, model.weight).float().sum()
    expected = 2 * 3 * 4096 * 30 * 0.1 / (3 * 4096) ** 0.5
    assert rise.item() == pytest.approx(expected, rel=0.02)


def test_copies_are_on_their_own_and_hooks_leave_with_the_optimizer() -> None:
    model = network()
    opt = functional(model, base=torch.optim.AdamW, lr=1e-2)
    opt.step(closure_of(model))
    for twin_model, twin in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        reference = all_bits(model)
        clean = loss_of(twin_model)
        clean.backward()
        with twin.perturbed():
            assert loss_of(twin_model) > clean + 0.01
            assert loss_of(model).item() == clean.item()
        assert unchanged(model, reference)
    lonely = copy.deepcopy(model)  # a model copied without its optimizer is a plain model
    clean = loss_of(model)
    model.zero_grad()
    clean.backward()
    with opt.perturbed():
        assert loss_of(lonely).item() == clean.item()
    del opt
    for _ in (hooks := model._forward_hooks):  # as torch walks through them; nothing may be taken off then
        gc.collect()
    assert hooks
    model.zero_grad()
    loss_of(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_which_layers_are_served() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert rule_for(Scaled(2, 2)) is None
    assert rule_for(nn.Embedding(3, 2, max_norm=1.0)) is None
    assert rule_for(nn.BatchNorm1d(2)) is None
    assert all(rule_for(m) is not None for m in (nn.Linear(2, 2), nn.Embedding(3, 2), nn.LayerNorm(2), nn.RMSNorm(2)))


def test_bad_input() -> None:
    model = network()
    with pytest.raises(ValueError, match="Did you mean 'functional'"):
        SAM(model.parameters(), torch.optim.SGD, perturb="function")
    with pytest.raises(TypeError, match="pass model="):
        SAM(model.parameters(), torch.optim.SGD, perturb="functional")
    with pytest.raises(TypeError, match="model must be"):
        SAM(model.parameters(), torch.optim.SGD, model="functional")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 parameters are not of the model"):
        SAM([*model.parameters(), nn.Parameter(torch.ones(2))], torch.optim.SGD, perturb="functional", model=model)


def test_a_forward_put_on_the_module_is_refused() -> None:
    """It hides the one of the class, by which the perturbation comes in: the second pass would compute at w."""
    model = network()
    opt = functional(model)
    hooked = next(m for m in model.modules() if isinstance(m, nn.Linear))
    add_hook_to_module(hooked, ModelHook())
    with pytest.raises(ValueError, match=r"the forward of \S+ has been replaced"):
        functional(model)
    closure_of(model)()
    with pytest.raises(ValueError, match="has been replaced"):
        opt.first_step()
    assert not opt.is_perturbed
    outside = functional(model, scope=lambda name, p: all(p is not mine for mine in hooked.parameters()))
    outside.step(closure_of(model))
    remove_hook_from_module(hooked)
    del hooked.forward
    opt.step(closure_of(model))


@pytest.mark.parametrize("eta", [None, 0.01])
def test_e_is_worked_out_a_block_at_a_time(eta: float | None) -> None:
    """Its float64 takes room for a block, however large the weight; a tensor with gaps is taken whole. Against float64."""
    torch.manual_seed(0)
    n = 16 * reference._block_elements(torch.zeros(1)) + 3
    w, g = torch.randn(n), torch.randn(n)
    exact = 0.3 * g.double() / g.double().norm() * (1.0 if eta is None else (w.double().abs() + eta).square())
    squared = g.double().square().sum()
    found = {}
    for name, columns in (("blocks", 1), ("gaps", 2)):
        out = torch.empty(n, columns)[:, 0]
        (bucket,) = ops.make_buckets(weights=[w], grads=[g])

        def direction(bucket=bucket, out=out, name=name) -> None:
            found[name] = out, reference.sam_direction_(bucket, [out], squared, 0.3, eta, 2.0)

        peak = cpu_peak_bytes(direction)
        assert (peak < 8 * n) == (name == "blocks"), peak  # one float64 of the weight is more
        got, sums = found[name]
        torch.testing.assert_close(got.double(), exact / 2, rtol=1e-7, atol=0)
        torch.testing.assert_close(sums[0], exact.square().sum(), rtol=1e-12, atol=0)
    assert torch.equal(*(got for got, _ in found.values()))
