"""What SAM does not perturb it does not judge: the base optimizer steps it. What it is to perturb and cannot, it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import GSAM, FriendlySAM, LookSAM, MomentumSAM, SAMWindow, StableSAM

from .conftest import bits

IDS = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """A linear layer between parameters that operations cannot walk: a table with sparse gradients, a complex matrix, a
    sparse matrix."""

    def __init__(self, kinds: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4, dtype=dtype)
        self.head = nn.Linear(4, 3, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if "table" in kinds:
            self.table = nn.Embedding(9, 4, sparse=True, dtype=wide)
        if "complex" in kinds:
            self.turn = nn.Parameter(torch.randn(4, 4, dtype=wide.to_complex()))
        if "matrix" in kinds:
            self.matrix = nn.Parameter(torch.randn(4, 4, dtype=wide).relu().to_sparse())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).mean(1) if hasattr(self, "table") else ids.to(self.lin.weight.dtype) / 4
        x = torch.tanh(self.lin(x.to(self.lin.weight.dtype)))
        if hasattr(self, "turn"):
            x = (x.to(self.turn.dtype) @ self.turn).abs().to(x.dtype)
        if hasattr(self, "matrix"):
            x = torch.sparse.mm(self.matrix, x.to(self.matrix.dtype).t()).t().to(x.dtype)
        return self.head(x)

    def named(self, inside: bool) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are perturbed, or the others."""
        return [(n, p) for n, p in self.named_parameters() if n.startswith(("lin.", "head.")) == inside]


def backward(model: Mixed, ids: Tensor = IDS, factor: float = 1.0) -> Tensor:
    loss = model(ids.to(model.head.weight.device)).double().square().mean()
    (loss * factor).backward()
    return loss.detach()


def raw(model: nn.Module) -> list[Tensor]:
    dense = (p.detach().to_dense() if p.layout != torch.strided else p.detach() for p in model.parameters())
    return [bits(torch.view_as_real(p) if p.is_complex() else p) for p in dense]


def same(a: nn.Module, b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(raw(a), b, strict=True))


KINDS = ["table", "complex", "matrix", "table complex matrix"]
SCALED = ["table", "matrix", "table matrix"]  # torch's GradScaler does not unscale complex gradients
SCOPE = ["lin.*", "head.*"]
OPTIONS: dict[str, dict[str, Any]] = {
    "stored": {},
    "ASAM": {"adaptive": True, "eta": 0.01},
    "stochastic": {"rounding": "stochastic", "dtype": torch.bfloat16},
    "functional": {"perturb": "functional"},
    "GSAM": {"variant": lambda: GSAM(0.4)},
    "LookSAM": {"variant": LookSAM, "interval": 2},
    "FriendlySAM": {"variant": lambda: FriendlySAM(0.8, 0.6)},
    "StableSAM": {"variant": StableSAM},
    "float64": {"dtype": torch.float64},
}


def pair(kinds: str, name: str) -> tuple[tuple[Mixed, SAM, None], tuple[Mixed, SAM, torch.optim.Optimizer]]:
    """The model under one SAM with a scope; and under a SAM that has never heard of the others, which SGD steps."""
    options = dict(OPTIONS[name])
    dtype = options.pop("dtype", torch.float32)
    models = Mixed(kinds, dtype), Mixed(kinds, dtype)
    built = []
    for model, all_of_it in zip(models, (True, False), strict=True):
        more = dict(options)
        if "variant" in more:
            more["variant"] = more["variant"]()
        if "perturb" in more:
            more["model"] = model
        named = model.named_parameters() if all_of_it else model.named(True)
        built.append(SAM(named, torch.optim.SGD, rho=0.3, lr=0.1, scope=SCOPE, **more))
    other = torch.optim.SGD([p for _, p in models[1].named(False)], lr=0.1)
    return (models[0], built[0], None), (models[1], built[1], other)


def two_calls(model: Mixed, opt: SAM) -> None:
    backward(model)
    opt.first_step()
    model.zero_grad()
    backward(model)
    opt.second_step()


def closure(model: Mixed, opt: SAM) -> None:
    def work() -> Tensor:
        model.zero_grad()
        return backward(model)

    opt.step(work)


def context(model: Mixed, opt: SAM) -> None:
    backward(model)
    with opt.perturbed():
        model.zero_grad()
        backward(model)
    opt.step()


@pytest.mark.parametrize("form", [two_calls, closure, context])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kinds", KINDS)
def test_the_base_steps_what_is_out_of_scope(kinds: str, name: str, form: Callable[[Mixed, SAM], None]) -> None:
    (one, opt, _), (two, alone, other) = pair(kinds, name)
    start = raw(one)
    for _ in range(4):
        for model, sam in ((one, opt), (two, alone)):
            model.zero_grad()
            form(model, sam)
        other.step()
        assert same(one, raw(two))
    assert not any(torch.equal(a, b) for a, b in zip(raw(one), start, strict=True))
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("per_micro_batch", [False, True])
@pytest.mark.parametrize("kinds", KINDS)
def test_a_window(kinds: str, per_micro_batch: bool) -> None:
    (one, opt, _), (two, alone, other) = pair(kinds, "stored")
    for _ in range(3):
        for model, sam in ((one, opt), (two, alone)):
            model.zero_grad()
            if model is two:  # whose SAM does not drop the others' gradients
                by_hand(two, alone, per_micro_batch)
            else:
                work = SAMWindow(sam, lambda ids: backward(one, ids), per_micro_batch=per_micro_batch)
                work.run(list(IDS.split(2)))
            sam.step()
        other.step()
        assert same(one, raw(two))


def by_hand(model: Mixed, opt: SAM, per_micro_batch: bool) -> None:
    """A window: gradients of all micro-batches at w + e, those of the others too."""
    parts = list(IDS.split(2))
    totals: dict[str, Tensor] = {}
    for ascent in [[ids] for ids in parts] if per_micro_batch else [parts]:
        model.zero_grad()
        for ids in ascent:
            backward(model, ids)
        with opt.perturbed():
            model.zero_grad()
            for n, p in model.named_parameters():
                p.grad = totals.get(n)
            for ids in ascent:
                backward(model, ids)
        totals = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("where", ["lin", "others"])
def test_an_overflow_in_any_second_gradient_skips_the_whole_step(kinds: str, where: str) -> None:
    (model, opt, _), _ = pair(kinds, "stored")
    backward(model)
    before = raw(model)
    opt.first_step(zero_grad=True)
    backward(model)
    chosen = model.lin.weight if where == "lin" else next(p for _, p in model.named(False))
    values = chosen.grad._values() if chosen.grad.layout != torch.strided else chosen.grad
    values.view(-1)[0] = float("inf")
    opt.second_step()
    assert same(model, before)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("kinds", SCALED)
def test_grad_scaler(kinds: str, unscaled: bool) -> None:
    """A scale of a power of two comes off without a trace; an overflow of the ascent reaches the scaler."""
    (one, opt, _), (two, alone, other) = pair(kinds, "stored")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for _ in range(2):
        opt.zero_grad()
        backward(one, factor=scaler.get_scale())
        opt.first_step(zero_grad=True)
        backward(one, factor=scaler.get_scale())
        if unscaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        two.zero_grad()
        two_calls(two, alone)
        other.step()
        assert same(one, raw(two))
    before = raw(one)
    opt.zero_grad()
    backward(one)
    one.lin.weight.grad[0, 0] = float("inf")
    opt.first_step(zero_grad=True)
    backward(one, factor=scaler.get_scale())
    scaler.step(opt)
    scaler.update()
    assert same(one, before)
    assert opt.skipped_steps == 1
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("kinds", SCALED)
def test_an_overflow_is_shown_where_the_others_alone_have_a_second_gradient(kinds: str) -> None:
    (model, opt, _), _ = pair(kinds, "stored")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    backward(model)
    model.lin.weight.grad[0, 0] = float("nan")
    opt.first_step(zero_grad=True)
    before = raw(model)
    for _, p in model.named(True):
        p.requires_grad_(False)
    backward(model)
    scaler.step(opt)
    scaler.update()
    assert same(model, before)
    assert (opt.skipped_steps, scaler.get_scale()) == (1, 2.0)


def test_the_step_is_the_equations_to_1e_12() -> None:
    model = Mixed("table complex", torch.float64)
    named = list(model.named_parameters())
    opt = SAM(named, torch.optim.SGD, rho=0.3, lr=0.1, scope=SCOPE)
    w = [p.detach().clone() for _, p in named]

    def gradient(weights: list[Tensor]) -> list[Tensor]:
        live = {n: p.clone().requires_grad_() for (n, _), p in zip(named, weights, strict=True)}
        loss = torch.func.functional_call(model, live, (IDS,)).square().mean()
        return [g.to_dense() for g in torch.autograd.grad(loss, list(live.values()))]

    inside = [n.startswith(("lin.", "head.")) for n, _ in named]
    g = gradient(w)
    norm = torch.sqrt(sum((x * x).sum() for x, chosen in zip(g, inside, strict=True) if chosen))
    h = gradient([p + 0.3 * x / norm if chosen else p for p, x, chosen in zip(w, g, inside, strict=True)])
    two_calls(model, opt)
    for (_, p), start, x in zip(named, w, h, strict=True):
        assert (p.detach() - (start - 0.1 * x)).abs().max() <= 1e-12


def test_an_optimizer_of_its_own_for_sparse_gradients() -> None:
    """AdamW and SparseAdam under one SAM, which perturbs what AdamW steps."""
    results = []
    for together in (True, False):
        model = Mixed("table")
        dense = torch.optim.AdamW([p for _, p in model.named(True)], lr=0.01)
        sparse = torch.optim.SparseAdam(list(model.table.parameters()), lr=0.01)
        bases = [dense, sparse] if together else [dense]
        opt = SAM(None, bases, rho=0.3, scope=lambda name, p, model=model: p is not model.table.weight)
        for _ in range(4):
            model.zero_grad()
            two_calls(model, opt)
            if not together:
                sparse.step()
        results.append(model)
    assert same(results[0], raw(results[1]))


def test_fused_restore_steps_a_complex_weight_from_where_it_is() -> None:
    results = []
    for fused in (True, False):
        model = Mixed("complex")
        opt = SAM(model.named_parameters(), torch.optim.AdamW, rho=0.3, lr=0.1, scope=SCOPE, fused_restore=fused)
        for _ in range(3):
            model.zero_grad()
            if fused and not opt.state:
                with pytest.warns(UserWarning, match="complex"):
                    two_calls(model, opt)
            else:
                two_calls(model, opt)
        results.append(model)
    assert same(results[0], raw(results[1]))


def test_momentum_sam_leaves_the_momentum_of_others_alone() -> None:
    results = []
    for scoped in (True, False):
        model = Mixed("table complex")
        named = model.named_parameters() if scoped else model.named(True)
        opt = SAM(named, torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.5, variant=MomentumSAM(), scope=SCOPE)
        other = torch.optim.SGD([p for _, p in model.named(False)], lr=0.1, momentum=0.5)
        for _ in range(3):
            model.zero_grad()
            opt.first_step()
            backward(model)
            opt.second_step()
            if not scoped:
                other.step()
        results.append(model)
    assert same(results[0], raw(results[1]))


# -- in scope ---------------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, Callable[[], Any]] = {
    "SAM": lambda: None, "GSAM": GSAM, "LookSAM": LookSAM, "FriendlySAM": FriendlySAM, "StableSAM": StableSAM,
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("kinds", "words"), [("table", "sparse"), ("complex", "complex64"), ("matrix", "sparse")])
def test_what_is_in_scope_is_refused_before_anything_is_written(kinds: str, words: str, variant: str) -> None:
    model = Mixed(kinds)
    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.3, lr=0.1, variant=VARIANTS[variant]())
    backward(model)
    before = raw(model)
    with pytest.raises((TypeError, ValueError), match=rf"{words}.*left out with scope="):
        opt.first_step()
    assert same(model, before)
    assert not opt.is_perturbed
    opt.zero_grad()
    with pytest.raises((TypeError, ValueError), match=words):
        closure(model, opt)
    assert same(model, before)


# -- meta tensors -----------------------------------------------------------------------------------------------------------

META: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "stored": lambda m: {},
    "stochastic": lambda m: {"rounding": "stochastic"},
    "functional": lambda m: {"perturb": "functional", "model": m},
    "fused_restore": lambda m: {"fused_restore": True, "base": torch.optim.AdamW, "fused": True},
    **{name: lambda m, name=name: {"variant": VARIANTS[name]()} for name in VARIANTS if name != "SAM"},
}


@pytest.mark.parametrize("form", [two_calls, closure, context])
@pytest.mark.parametrize("name", META)
def test_a_model_of_meta_tensors_is_one_clear_error(name: str, form: Callable[[Mixed, SAM], None]) -> None:
    """As where the weights have not been loaded yet."""
    dtype = torch.bfloat16 if name == "stochastic" else torch.float32
    with torch.device("meta"):
        model = Mixed("", dtype)
    options = META[name](model)
    opt = SAM(model.named_parameters(), options.pop("base", torch.optim.SGD), rho=0.3, lr=0.1, **options)
    with pytest.raises(ValueError, match=r"is a meta tensor.*to_empty\(\) and load_state_dict\(\)"):
        form(model, opt)
    assert not opt.is_perturbed
    model.to_empty(device="cpu")
    model.load_state_dict(Mixed("", dtype).state_dict())
    twin = Mixed("", dtype)
    options = META[name](twin)
    other = SAM(twin.named_parameters(), options.pop("base", torch.optim.SGD), rho=0.3, lr=0.1, **options)
    new = list(model.parameters())
    for sam, net in ((opt, model), (other, twin)):
        for group in sam.param_groups:
            group["params"] = new if net is model else group["params"]
        net.zero_grad()
        two_calls(net, sam)
    assert same(model, raw(twin))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_masters_of_meta_tensors_are_refused(device: str) -> None:
    model = Mixed("", torch.bfloat16).to("meta")
    masters = [torch.zeros(p.shape, device=device) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"is a meta tensor.*to_empty\(\) and load_state_dict\(\)"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, master_params=masters)
