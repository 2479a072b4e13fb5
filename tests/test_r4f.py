"""R4F: singular values, gradients, one sigma for both passes, saving and merging."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastpost
from fastpost import R3F, R4F
from tests.conftest import same_bits
from tests.tiny import batch_for, build, gradients


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


def plain_like(head: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in head.named_parameters()}


class Head(nn.Module):
    """As in RoBERTa: two linear layers with a tanh between."""

    def __init__(self, width: int = 40, classes: int = 5) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out_proj(torch.tanh(self.dense(x)))
        return logits


# -- singular values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (2, 300), (300, 2), (64, 64), (5, 64), (130, 90), (150, 140)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_sigma_is_the_largest_singular_value(shape: tuple[int, int], scale: float) -> None:
    layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        layer.weight.normal_(0, scale)
    expected = norm(layer.weight)
    r4f = R4F(layer)
    assert float(r4f.sigmas()[""]) == pytest.approx(expected, rel=1e-6)
    assert norm(layer.weight) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (200, 190)])
@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e160, 1e300])
def test_float64_weights_of_any_size(shape: tuple[int, int], scale: float) -> None:
    layer = nn.Linear(shape[1], shape[0]).double()
    with torch.no_grad():
        layer.weight.normal_()
        expected = norm(layer.weight) * scale
        layer.weight.mul_(scale)
    r4f = R4F(layer)
    assert float(r4f.sigmas()[""]) == pytest.approx(expected, rel=1e-9, abs=0)
    assert norm(layer.weight) == pytest.approx(1, rel=1e-9)
    original = layer.parametrizations.weight.original.detach()  # type: ignore[union-attr, operator]
    mapped = torch.func.vmap(
        lambda w: torch.func.functional_call(layer, {"parametrizations.weight.original": w}, torch.ones(shape[1]).double())
    )(original.unsqueeze(0))
    torch.testing.assert_close(mapped[0], layer(torch.ones(shape[1]).double()), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_sigma_stays_exact_while_training(kind: str) -> None:
    """With updates large enough to exchange the leading directions; torch's fused optimizers bump no version counter."""
    layer = nn.Linear(140, 140)
    r4f = R4F(layer)
    original = layer.parametrizations.weight.original  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, foreach=kind == "foreach", fused=kind == "fused")
    for step in range(30):
        x = torch.randn(8, 140) * torch.linspace(0.1, 3, 140).roll(11 * step)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        assert float(r4f.sigmas()[""]) == pytest.approx(norm(original), rel=1e-6), step


@pytest.mark.parametrize("n", [40, 160])
def test_equal_and_crossing_singular_values(n: int) -> None:
    """An iteration that went on from its last vector might not see another direction overtake it."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    layer = nn.Linear(n, n)
    values = torch.linspace(1, 2, n, dtype=torch.float64)
    values[-2:] = 2.0
    with torch.no_grad():
        layer.weight.copy_(q * values @ q.mT)
    r4f = R4F(layer)
    assert float(r4f.sigmas()[""]) == pytest.approx(2, rel=1e-6)
    original: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
    for leading in (0, 39, 17):  # each far below the leader before
        values[leading] = 3.0
        with torch.no_grad():
            original.copy_(q * values @ q.mT)
        assert float(r4f.sigmas()[""]) == pytest.approx(3, rel=1e-6), leading
        values[leading] = 1.0


def test_orthogonal_zero_and_low_rank_weights() -> None:
    layer = nn.Linear(16, 16)
    nn.init.orthogonal_(layer.weight)
    before = layer.weight.detach().clone()
    R4F(layer)
    torch.testing.assert_close(layer.weight, before)  # sigma is 1 already
    zero = nn.Linear(16, 3)
    nn.init.zeros_(zero.weight)
    R4F(zero)
    assert torch.equal(zero.weight, torch.zeros(3, 16))
    zero(torch.randn(2, 16)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in zero.parameters() if p.grad is not None)
    low = nn.Linear(16, 16)
    with torch.no_grad():
        low.weight.copy_(torch.outer(torch.randn(16), torch.randn(16)))
    R4F(low)
    assert norm(low.weight) == pytest.approx(1, rel=1e-6)


def test_a_weight_that_diverged_shows_instead_of_raising() -> None:
    layer = nn.Linear(6, 3)
    R4F(layer)
    original: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
    before = original.detach().clone()
    with torch.no_grad():
        original[1, 1] = math.nan
    assert bool(layer(torch.ones(1, 6)).isnan().any())
    with torch.no_grad():
        original.copy_(before)
    assert norm(layer.weight) == pytest.approx(1, rel=1e-6)


def test_lipschitz_ratio_of_a_layer_and_of_a_head() -> None:
    head = Head()
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(5)
    x, y = torch.randn(2, 2000, 40).unbind()
    ratio = (head(x) - head(y)).norm(dim=-1) / (x - y).norm(dim=-1)
    assert float(ratio.detach().max()) > 1
    R4F(head, layers="all")  # tanh is 1-Lipschitz, so the whole head is
    ratio = (head(x) - head(y)).norm(dim=-1) / (x - y).norm(dim=-1)
    assert float(ratio.detach().max()) <= 1 + 1e-6
    _, _, v = torch.linalg.svd(head.dense.weight)
    step = head.dense(v[0]) - head.dense(torch.zeros(40))
    assert float(step.detach().norm()) == pytest.approx(1, rel=1e-5)  # and the bound is reached


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_at_most_leaves_small_matrices_alone(scale: float) -> None:
    layer = nn.Linear(20, 4)
    with torch.no_grad():
        layer.weight.mul_(scale / norm(layer.weight))
    before = layer.weight.detach().clone()
    R4F(layer, mode="at_most")
    if scale < 1:
        assert same_bits(layer.weight, before)
    else:
        assert norm(layer.weight) == pytest.approx(1, rel=1e-6)


def test_layers() -> None:
    for layers, expected in (("last", ("out_proj",)), ("all", ("dense", "out_proj"))):
        head = Head()
        before = plain_like(head)
        assert R4F(head, layers).layers == expected
        assert norm(head.out_proj.weight) == pytest.approx(1, rel=1e-6)
        assert same_bits(head.dense.weight, before["dense.weight"]) is (layers == "last")


# -- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "at_most"])
def test_gradient_is_that_of_the_normalised_weight(mode: str) -> None:
    """Against autograd through a full singular value decomposition, in float64."""
    layer = nn.Linear(12, 6).double()
    weight = layer.weight.detach().clone().requires_grad_()
    up = torch.randn(6, 12, dtype=torch.float64)
    sigma = torch.linalg.svdvals(weight)[0]
    divisor = sigma if mode == "exact" else sigma.clamp(min=1)
    (expected,) = torch.autograd.grad((weight / divisor * up).sum(), weight)
    R4F(layer, mode=mode)
    (found,) = torch.autograd.grad((layer.weight * up).sum(), layer.parametrizations.weight.original)  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_an_optimizer_made_before_goes_on_training_the_weight() -> None:
    layer = nn.Linear(12, 3)
    weight = layer.weight
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    r4f = R4F(layer)
    before = weight.detach().clone()
    layer(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert norm(layer.weight) == pytest.approx(1, rel=1e-6)
    r4f.merge()
    assert layer.weight is weight


# -- one sigma for both passes --------------------------------------------------------------------------------------------


def test_sigma_is_found_once_for_each_change_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpost.r3f.spectral import SpectralNorm

    found = []
    real = SpectralNorm._refresh
    monkeypatch.setattr(SpectralNorm, "_refresh", lambda self, weight: found.append(1) or real(self, weight))
    layer = nn.Linear(12, 3)
    R4F(layer)
    x = torch.randn(4, 12)
    first = layer(x)
    assert same_bits(layer(x), first)
    with torch.no_grad():
        assert same_bits(layer.eval()(x), first)
    assert len(found) == 1
    for changes, change in enumerate(
        (
            lambda w: w.mul_(2),
            lambda w: fastpost.ops.params.negate_([w]),  # by a kernel, behind autograd's back
            lambda w: w.copy_(torch.randn_like(w)),
            lambda w: setattr(w, "data", torch.randn_like(w)),
        ),
        start=2,
    ):
        with torch.no_grad():
            change(layer.parametrizations.weight.original)  # type: ignore[operator, union-attr]
        layer(x)
        layer(x)
        assert len(found) == changes
        assert norm(layer.weight) == pytest.approx(1, rel=1e-6)


ORIGINAL = "parametrizations.weight.original"


def normalised(weight: Tensor) -> Tensor:
    """W / sigma in float64, with the gradient of sigma that its singular vectors give."""
    w = weight.double()
    u, _, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    return w / (u[:, 0] @ w @ vh[0])


@pytest.mark.parametrize("shape", [(8, 64), (160, 150)])
@pytest.mark.parametrize("how", ["functional_call", "data"])
def test_weights_that_come_and_go_at_one_address_have_their_own_sigma(how: str, shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    R4F(layer)
    x = torch.eye(shape[1])
    original: Any = layer.get_parameter(ORIGINAL)
    addresses = set()
    for _ in range(20):
        weight = torch.randn(shape)
        addresses.add(weight.data_ptr())
        with torch.no_grad():
            if how == "data":
                original.data = torch.empty(0)
                original.data = weight
                found = layer(x)
            else:
                found = torch.func.functional_call(layer, {ORIGINAL: weight}, (x,))
            torch.testing.assert_close(found.mT.double(), normalised(weight), rtol=1e-5, atol=1e-6)
        del weight
    assert len(addresses) < 20  # else nothing was shown


@pytest.mark.parametrize("shape", [(5, 12), (150, 140)])
def test_transforms_of_functions_of_the_weight(shape: tuple[int, int]) -> None:
    """grad, jvp, vmap and vmap of grad; afterwards the layer's own weight is as it was."""
    layer = nn.Linear(shape[1], shape[0], bias=False)
    R4F(layer)
    x, weights, tangent = torch.randn(3, shape[1]), torch.randn(2, *shape), torch.randn(shape)
    before = layer(x)

    def ours(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {ORIGINAL: weight}, (x,)).square().sum()

    def truth(weight: Tensor) -> Tensor:
        return (x.double() @ normalised(weight).mT).square().sum()

    def slope(weight: Tensor) -> Tensor:
        leaf = weight.double().requires_grad_()
        (gradient,) = torch.autograd.grad(truth(leaf), leaf)
        return gradient

    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    close(torch.func.grad(ours)(weights[0]), slope(weights[0]))
    close(torch.func.jvp(ours, (weights[0],), (tangent,))[1], (slope(weights[0]) * tangent).sum())
    close(torch.func.vmap(ours)(weights), torch.stack([truth(w) for w in weights]))
    close(torch.func.vmap(torch.func.grad(ours))(weights), torch.stack([slope(w) for w in weights]))
    per_row = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)  # of the inputs, beside the layer's weight
    torch.testing.assert_close(per_row, layer.weight.sum(0).expand_as(x))
    assert same_bits(layer(x), before)
    broken = torch.func.vmap(ours)(torch.stack((weights[0], weights[1].clone().fill_(math.inf))))
    assert broken.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(5, 12), (150, 140)])
def test_sigma_of_a_plain_weight_is_found_once_under_transforms(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the inputs after the weight has changed: the first call finds its vectors, for the others too."""
    from fastpost.r3f import spectral

    sought = []
    refresh, leading = spectral.SpectralNorm._refresh, spectral._leading
    monkeypatch.setattr(spectral.SpectralNorm, "_refresh", lambda self, weight: sought.append(1) or refresh(self, weight))
    monkeypatch.setattr(spectral, "_leading", lambda matrix: sought.append(1) or leading(matrix))
    layer = nn.Linear(shape[1], shape[0], bias=False)
    R4F(layer)
    x = torch.randn(3, shape[1])

    def score(row: Tensor) -> Tensor:
        return layer(row).sum()

    for transform in (
        torch.func.vmap(torch.func.grad(score)),
        torch.func.vmap(torch.func.jacfwd(score)),
        torch.func.functionalize(lambda rows: torch.func.vmap(torch.func.grad(score))(rows)),
    ):
        original = layer.get_parameter(ORIGINAL)
        with torch.no_grad():
            original.copy_(torch.randn(shape))
        sought.clear()
        first = transform(x)
        truth = normalised(original.detach()).sum(0).expand_as(x)
        torch.testing.assert_close(first.double(), truth, rtol=1e-5, atol=1e-6)
        found = len(sought)
        assert found
        assert same_bits(transform(x), first)
        (plain,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
        torch.testing.assert_close(plain.double(), truth, rtol=1e-5, atol=1e-6)
        assert len(sought) == found
        x = x.detach()


def test_copies_find_the_same_sigma_in_memory_of_their_own() -> None:
    layer = nn.Linear(12, 3)
    R4F(layer)
    x = torch.randn(4, 12)
    expected = layer(x)
    made = copy.deepcopy(layer)
    assert same_bits(made(x), expected)
    with torch.no_grad():
        made.get_parameter(ORIGINAL).mul_(3)
    assert same_bits(layer(x), expected)
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_no_noise_gives_exactly_zero_kl_at_every_step(layers: str) -> None:
    model, batch = build("roberta", dropout=0.1), batch_for("roberta")
    r4f = R4F(model.classifier, layers)  # type: ignore[arg-type]
    assert r4f.layers == (("out_proj",) if layers == "last" else ("dense", "out_proj"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    r3f, weighty = R3F(0.0, dropout="shared"), R3F(0.0, 1e6, dropout="shared")
    for step in range(4):
        torch.manual_seed(step)
        out = r3f(model, **batch)
        assert float(out.symm_kl) == 0
        grads = gradients(model, out.loss)
        torch.manual_seed(step)
        again = gradients(model, weighty(model, **batch).loss)
        assert all(torch.equal(grads[name], again[name]) for name in grads)
        optimizer.zero_grad()
        r3f(model, **batch).loss.backward()
        optimizer.step()
    assert float(R3F(0.05, seed=1)(model.eval().train(), **batch).symm_kl) > 0


def test_sam_and_sigma_agree() -> None:
    """A perturbation changes the weight, so it changes sigma; its restore brings the old one back."""
    layer = nn.Linear(12, 3)
    R4F(layer)
    sam = fastpost.SAM(layer.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    x = torch.randn(4, 12)
    before = layer(x)
    before.square().sum().backward()
    sam.first_step(zero_grad=True)
    assert not torch.equal(layer(x), before)
    assert norm(layer.weight) == pytest.approx(1, rel=1e-6)
    layer(x).square().sum().backward()
    sam.second_step(zero_grad=True)
    assert norm(layer.weight) == pytest.approx(1, rel=1e-6)


# -- saving, merging, precision -------------------------------------------------------------------------------------------


def test_state_dict_round_trip(tmp_path: Path) -> None:
    head, other = Head(150), Head(150)
    for each in (head, other):
        R4F(each, layers="all")
    x = torch.randn(3, 150)
    assert not torch.equal(head(x), other(x))
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert same_bits(other(x), head(x))
    assert sorted(name for name in head.state_dict() if "dense" in name) == [
        "dense.bias",
        "dense.parametrizations.weight.original",
        "dense.weight",  # for whoever has no fastpost
    ]
    twin = copy.deepcopy(head)
    assert same_bits(twin(x), head(x))
    with torch.no_grad():
        twin.dense.parametrizations.weight.original.mul_(3)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(twin(x), head(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("mode", ["exact", "at_most"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_without_fastpost(tmp_path: Path, layers: str, mode: str, dtype: torch.dtype) -> None:
    """By save_pretrained, whatever wraps the head, and by a state dict; with the same logits to the last bit."""
    model, batch = build("roberta").to(dtype).eval(), batch_for("roberta")
    plain_names = set(model.state_dict())
    r4f = R4F(model.classifier, layers, mode)  # type: ignore[arg-type]
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    read = type(model).from_pretrained(tmp_path, dtype=dtype).eval()  # type: ignore[attr-defined]
    assert same_bits(read(**batch).logits, expected)
    fresh = build("roberta").to(dtype).eval()
    assert set(r4f.plain_state_dict(model)) == plain_names
    fresh.load_state_dict(r4f.plain_state_dict(model), strict=True)
    assert same_bits(fresh(**batch).logits, expected)
    # And into a head that is normalised: W comes back bit for bit, from the file as from the state dict.
    again, other = build("roberta").to(dtype).eval(), build("roberta").to(dtype).eval()
    for each in (again, other):
        R4F(each.classifier, layers, mode)  # type: ignore[arg-type]
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    twin = copy.deepcopy(again)
    for each in (again, twin):
        assert same_bits(each(**batch).logits, expected)
        for (name, p), q in zip(model.named_parameters(), each.parameters(), strict=True):
            assert same_bits(p, q), name
    # A state dict of a plain model is taken too; its norm is 1 but for rounding.
    other.load_state_dict(read.state_dict(), strict=True)
    torch.testing.assert_close(other(**batch).logits, expected)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_merged_model_is_pickled_without_fastpost(tmp_path: Path) -> None:
    head = Head()
    r4f = R4F(head, "all")
    r4f.merge()
    torch.save(head.dense, tmp_path / "dense.pt")
    assert b"fastpost" not in (tmp_path / "dense.pt").read_bytes()
    with pytest.raises(ValueError, match="does not hold the head that is normalised; give the whole model"):
        R4F(head).plain_state_dict(nn.Linear(3, 3))


def test_a_trainer_s_checkpoint(tmp_path: Path) -> None:
    """Its folder loads without fastpost; training that goes on from it ends with the same bits as without a break."""
    from transformers import Trainer, TrainingArguments

    data = [{k: v[i] for k, v in batch_for("roberta").items()} for _ in range(4) for i in range(4)]

    def trained(folder: Path, resume: Path | None = None) -> nn.Module:
        torch.manual_seed(1)
        model = build("roberta")
        R4F(model.classifier)  # type: ignore[arg-type]
        args = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], seed=3
        )
        Trainer(model, args, train_dataset=data).train(resume_from_checkpoint=None if resume is None else str(resume))
        return model.eval()

    whole, batch = trained(tmp_path / "a"), batch_for("roberta")
    resumed = trained(tmp_path / "b", tmp_path / "a" / "checkpoint-2")
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert same_bits(p, q), name
    read = type(whole).from_pretrained(tmp_path / "a" / "checkpoint-4").eval()  # type: ignore[attr-defined]
    assert same_bits(read(**batch).logits, whole(**batch).logits)
    middle = type(whole).from_pretrained(tmp_path / "a" / "checkpoint-2").eval()  # type: ignore[attr-defined]
    assert not torch.equal(middle(**batch).logits, whole(**batch).logits)


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("mode", ["exact", "at_most"])
def test_merge_leaves_plain_layers_with_the_same_outputs(layers: str, mode: str) -> None:
    model, batch = build("roberta").eval(), batch_for("roberta")
    names = list(model.state_dict())
    r4f = R4F(model.classifier, layers, mode)  # type: ignore[arg-type]
    expected = model(**batch).logits
    r4f.merge()
    assert list(model.state_dict()) == names or sorted(model.state_dict()) == sorted(names)
    assert same_bits(model(**batch).logits, expected)
    assert all(type(m).__module__.startswith(("torch.nn.modules", "transformers")) for m in model.modules())
    r4f.merge()  # nothing left to do
    fresh = build("roberta").eval()
    fresh.load_state_dict(model.state_dict())
    assert same_bits(fresh(**batch).logits, expected)
    assert R4F(model.classifier).layers == ("out_proj",)  # type: ignore[arg-type]  # and it may be normalised anew


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_normalised_in_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 8).to(dtype)
    weight = layer.weight.detach().float()
    r4f = R4F(layer)
    assert layer.weight.dtype == dtype
    assert float(r4f.sigmas()[""]) == pytest.approx(norm(weight), rel=1e-6)
    assert same_bits(layer.weight, (weight / r4f.sigmas()[""]).to(dtype))


def test_autocast_does_not_touch_sigma() -> None:
    layer = nn.Linear(64, 8)
    r4f = R4F(layer)
    expected = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(1)  # type: ignore[union-attr, operator]
    with torch.autocast("cpu", torch.bfloat16):
        assert float(r4f.sigmas()[""]) == pytest.approx(norm(layer.parametrizations.weight.original), rel=1e-6)  # type: ignore[arg-type, union-attr]
        torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-8)


# -- bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"head must be a torch\.nn\.Module, not str"):
        R4F("classifier")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown layers 'lst'\. Did you mean 'last'\?"):
        R4F(nn.Linear(2, 2), layers="lst")
    with pytest.raises(ValueError, match=r"unknown mode 'atmost'\. Did you mean 'at_most'\?"):
        R4F(nn.Linear(2, 2), mode="atmost")
    with pytest.raises(ValueError, match=r"Sequential holds no nn\.Linear"):
        R4F(nn.Sequential(nn.ReLU()))
    layer = nn.Linear(2, 2)
    R4F(layer)
    with pytest.raises(ValueError, match="the weight of the head is parametrised already"):
        R4F(layer)
    with pytest.raises(ValueError, match=r"weight of the head has shape \(0, 3\), nothing to normalise"):
        R4F(nn.Linear(3, 0))
    with pytest.raises(ValueError, match="weight of out has shape"):
        R4F(nn.ModuleDict({"out": nn.Linear(0, 3)}))
    with pytest.raises(ValueError, match="weight of the head is on the meta device; load or initialise"):
        R4F(nn.Linear(3, 2, device="meta"))
    head = Head()
    with torch.no_grad():
        head.out_proj.weight[0, 0] = math.nan
    before = plain_like(head)
    with pytest.raises(ValueError, match="the weight of out_proj is not finite"):
        R4F(head, layers="all")
    assert all(same_bits(p, before[name]) for name, p in head.named_parameters())
    assert type(head.dense) is nn.Linear  # nothing was changed before the error
