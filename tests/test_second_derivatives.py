"""Second derivatives and the transforms of torch.func: right to float64's digits, or an error; never silently left out.

The truth is written over softmax in plain torch, float64, and differentiated by torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastpost
from fastpost import SAM
from fastpost.ops.halves import writable_halves
from fastpost.ops.perturbed import noised_linear, product

from .conftest import DTYPES, same_bits

ROWS, CLASSES = 5, 7
LABELS = torch.tensor([1, -100, 3, 6, 0])
MASK = torch.tensor([True, False, True, True, True])
Loss = Callable[[Tensor, Tensor], Tensor]


def streams(difference: float = 0.8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    a = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    b = a + difference * torch.randn(ROWS, CLASSES, dtype=torch.float64)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


# -- the truth ------------------------------------------------------------------------------------------------------------


def kl_rows(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def js_rows(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


def r3f(a: Tensor, b: Tensor, smoothing: float = 0.0, r3f_lambda: float = 0.6) -> Tensor:
    counts = LABELS != -100
    p = a.double().log_softmax(-1)[counts]
    picked = -p.gather(-1, LABELS[counts].unsqueeze(-1)).squeeze(-1)
    ce = (1 - smoothing) * picked - smoothing * p.mean(-1)
    return (ce.sum() + r3f_lambda * kl_rows(a, b)[counts].sum()) / counts.sum()


CASES: dict[str, tuple[Loss, Loss]] = {
    "kl": (fastpost.symmetric_kl, lambda a, b: kl_rows(a, b).sum() / ROWS),
    "kl, rows": (
        lambda a, b: fastpost.symmetric_kl(a, b, mask=MASK, reduction="none").square().sum(),
        lambda a, b: kl_rows(a, b)[MASK].square().sum(),
    ),
    "r3f": (lambda a, b: fastpost.r3f_loss(a, b, LABELS, r3f_lambda=0.6).loss, r3f),
    "r3f, smoothed": (
        lambda a, b: fastpost.r3f_loss(a, b, LABELS, r3f_lambda=0.6, label_smoothing=0.2).loss.square(),
        lambda a, b: r3f(a, b, 0.2).square(),
    ),
    "r3f, lambda 0": (
        lambda a, b: fastpost.r3f_loss(a, b, LABELS, r3f_lambda=0.0).loss + 0 * b.sum(),
        lambda a, b: r3f(a, b, r3f_lambda=0.0) + 0 * b.sum(),
    ),
    "js": (lambda a, b: fastpost.js_divergence(a, b, mask=MASK), lambda a, b: js_rows(a, b)[MASK].sum() / ROWS),
    "js, rows": (
        lambda a, b: fastpost.js_divergence(a, b, reduction="none").square().sum(),
        lambda a, b: js_rows(a, b).square().sum(),
    ),
}


def penalty(loss: Loss, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the loss plus the squared norm of its gradients."""
    value = loss(a, b)
    first = torch.autograd.grad(value, (a, b), create_graph=True)
    return torch.autograd.grad(value + sum(g.double().square().sum() for g in first), (a, b))  # type: ignore[return-value]


# -- divergences ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("difference", [0.8, 1e-4])
def test_a_gradient_penalty(name: str, difference: float) -> None:
    ours, truth = CASES[name]
    a, b = streams(difference)
    for got, want in zip(penalty(ours, a, b), penalty(truth, a, b), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["kl", "r3f", "js"])
def test_a_gradient_penalty_in_every_dtype(backend: str, name: str, dtype: torch.dtype) -> None:
    """Each gradient is rounded to the dtype, so the penalty's is right to a few of its last digits."""
    if name == "js" and backend == "cuda":
        pytest.skip("the CUDA core has no Jensen-Shannon divergence")
    ours, truth = CASES[name]
    a, b = streams(dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    for got, want in zip(penalty(ours, a, b), penalty(truth, *exact), strict=True):
        assert got.dtype == dtype
        assert float((got.double() - want).norm() / want.norm()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", CASES)
def test_every_derivative_is_its_numerical_one(name: str) -> None:
    """First and second, in reverse and forward mode, one at a time and in batches."""
    loss, inputs = CASES[name][0], streams()
    assert torch.autograd.gradcheck(
        loss, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(loss, inputs, check_batched_grad=True, check_fwd_over_rev=True)


def test_third_derivatives() -> None:
    a, b = streams()
    ours, truth = (lambda x, f=f: hessian(lambda t: f(t, b.detach()))(x).square().sum() for f in CASES["r3f"])
    torch.testing.assert_close(grad(ours)(a.detach()), grad(truth)(a.detach()), rtol=1e-9, atol=1e-12)


def test_the_first_gradient_is_the_same_bits_whether_it_may_be_differentiated_or_not(backend: str) -> None:
    for name in ("kl", "r3f", "js") if backend != "cuda" else ("kl", "r3f"):
        a, b = streams(dtype=torch.float32)
        plain = torch.autograd.grad(CASES[name][0](a, b), (a, b))
        again = torch.autograd.grad(CASES[name][0](a, b), (a, b), create_graph=True)
        assert all(torch.equal(p, g.detach()) for p, g in zip(plain, again, strict=True))
        assert all(g.requires_grad and not p.requires_grad for p, g in zip(plain, again, strict=True))


def test_missing_classes_and_rows_that_do_not_count_leave_no_trace() -> None:
    """-inf in both streams, and NaN where the mask or the label says so: as if neither class nor row were there."""
    for name in ("kl", "r3f", "js"):
        ours = {
            "kl": lambda x, y: fastpost.symmetric_kl(x, y, mask=LABELS != -100, reduction="mean"),
            "js": lambda x, y: fastpost.js_divergence(x, y, mask=LABELS != -100, reduction="mean"),
            "r3f": CASES["r3f"][0],
        }[name]
        a, b = streams()
        counts = LABELS != -100
        left = [t.detach()[counts].requires_grad_() for t in (a, b)]
        small = {
            "kl": lambda x, y: kl_rows(x, y).mean(),
            "js": lambda x, y: js_rows(x, y).mean(),
            "r3f": lambda x, y: F.cross_entropy(x, LABELS[LABELS != -100]) + 0.6 * kl_rows(x, y).mean(),
        }[name]
        wide = [torch.cat((t.detach(), torch.full((ROWS, 2), -torch.inf, dtype=t.dtype)), -1) for t in (a, b)]
        for t in wide:
            t[~counts] = torch.nan
        wide = [t.requires_grad_() for t in wide]
        for got, want in zip(penalty(ours, *wide), penalty(small, *left), strict=True):
            assert not got[~counts].any()
            assert not got[:, CLASSES:].any()
            torch.testing.assert_close(got[counts][:, :CLASSES], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    if reentrant:  # torch refuses torch.autograd.grad through it
        a, b = streams()
        expected = torch.autograd.grad(CASES["r3f"][0](a.exp(), b), (a, b))
        checkpoint(lambda x, y: CASES["r3f"][0](x.exp(), y), a, b, use_reentrant=True).backward()
        assert all(same_bits(t.grad, g) for t, g in zip((a, b), expected, strict=True))
        return
    ours, truth = CASES["r3f"]
    a, b = streams()
    got = penalty(lambda x, y: checkpoint(lambda s, t: ours(s.exp(), t), x, y, use_reentrant=False), a, b)
    for g, want in zip(got, penalty(lambda x, y: truth(x.exp(), y), a, b), strict=True):
        torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-12)


def test_compiled_there_is_an_error() -> None:
    """torch's own; it has no second derivatives of what it compiled."""
    torch.compiler.reset()
    a, b = streams()
    compiled = torch.compile(fastpost.symmetric_kl, backend="aot_eager", fullgraph=True)
    first = torch.autograd.grad(compiled(a, b), (a, b), create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first[0].square().sum().backward()
    torch.compiler.reset()


def test_inplace_is_refused() -> None:
    a, b = streams()
    with pytest.raises(RuntimeError, match=r"second derivative \(create_graph\) needs inplace=False"):
        torch.autograd.grad(fastpost.symmetric_kl(a * 2, b * 2, inplace=True), a, create_graph=True)
    with pytest.raises(ValueError, match=r"inplace=True does not go with the transforms of torch\.func"):
        grad(lambda x: fastpost.symmetric_kl(x * 2, b.detach(), inplace=True))(a.detach())


# -- per-sample gradients -------------------------------------------------------------------------------------------------


def per_sample(loss: Callable[..., Tensor], *samples: Tensor, dims: tuple[int | None, ...]) -> list[Tensor]:
    """Gradients of the first argument, by a backward pass for each sample."""
    found = []
    for k in range(next(t.shape[d] for t, d in zip(samples, dims, strict=True) if d is not None)):
        x, *rest = (t if d is None else t.select(d, k) for t, d in zip(samples, dims, strict=True))
        x = x.detach().clone().requires_grad_()
        found += torch.autograd.grad(loss(x, *rest), x)
    return found


MAPPED: dict[str, Callable[..., Tensor]] = {
    "kl": lambda x, z, y: fastpost.symmetric_kl(x, z, mask=y != -100),
    "r3f": lambda x, z, y: fastpost.r3f_loss(x, z, y, r3f_lambda=0.5, label_smoothing=0.1).loss,
    "js": lambda x, z, y: fastpost.js_divergence(x, z, reduction="none").square().sum(),
}
DIMS = [(0, 0, 0), (0, None, 0), (2, 1, None)]


def samples(dims: tuple[int | None, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = [s if d is None else (*s[:d], 4, *s[d:]) for s, d in zip([(3, CLASSES), (3, CLASSES), (3,)], dims, strict=True)]
    y = torch.randint(0, CLASSES, shapes[2])
    y.view(-1)[1] = -100
    return torch.randn(shapes[0]).to(dtype), torch.randn(shapes[1]).to(dtype), y


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", DIMS)
def test_per_sample_gradients_of_the_divergences(
    backend: str, name: str, dims: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    if name == "js" and backend == "cuda":
        pytest.skip("the CUDA core has no Jensen-Shannon divergence")
    given = samples(dims, dtype)
    got = vmap(grad(MAPPED[name]), in_dims=dims)(*given)
    want = torch.stack(per_sample(MAPPED[name], *given, dims=dims))
    if backend == "reference":  # plain torch, whose sums depend on the number of rows
        torch.testing.assert_close(got, want, rtol=0, atol=torch.finfo(dtype).eps)
    else:
        assert same_bits(got, want)


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("dims", DIMS)
def test_per_sample_gradients_in_float64(name: str, dims: tuple[int | None, ...]) -> None:
    given = samples(dims, torch.float64)
    got = vmap(grad(MAPPED[name]), in_dims=dims)(*given)
    torch.testing.assert_close(got, torch.stack(per_sample(MAPPED[name], *given, dims=dims)), rtol=1e-12, atol=1e-14)


def test_per_sample_gradients_of_a_model() -> None:
    """Of the weights, each sample's own; against a loop of backward passes."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(4, 2, 6, dtype=torch.float64), torch.randint(0, CLASSES, (4, 2))

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        noised = fastpost.add_noise(x, 0.3, seed=5)
        clean, other = (torch.func.functional_call(model, weights, (t,)) for t in (x, noised))
        return fastpost.r3f_loss(clean, other, y, r3f_lambda=0.7).loss

    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for k in range(4):
        model.zero_grad()
        loss(dict(model.named_parameters()), x[k], y[k]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name][k], p.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["kl", "js"])
def test_hessians_by_every_pair_of_modes(name: str) -> None:
    ours, truth = CASES[name]
    a, b = (t.detach() for t in streams())
    want = torch.autograd.functional.hessian(truth, (a, b))
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            if inner is outer is jacfwd:  # of which torch would make something wrong
                with pytest.raises(NotImplementedError, match="take reverse mode for one of the two"):
                    outer(inner(ours))(a, b)
                continue
            got = outer(inner(ours, argnums=(0, 1)), argnums=(0, 1))(a, b)
            for row, expected in zip(got, want, strict=True):
                for block, exact in zip(row, expected, strict=True):
                    torch.testing.assert_close(block, exact, rtol=1e-9, atol=1e-12)


# -- noise ----------------------------------------------------------------------------------------------------------------

KEEP = torch.tensor([[True, False, True], [True, True, False]])
NOISE: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"keep": KEEP, "noise_type": "normal"},
    "scaled": {"scale": torch.rand(2, 3)},
    "numbered": {"token_index": torch.tensor([[4, -1, 7], [0, 9, 2]])},
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_has_every_derivative(name: str) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def function(t: Tensor) -> Tensor:
        return fastpost.add_noise(t, 0.3, seed=3, **NOISE[name]).pow(3)

    assert torch.autograd.gradcheck(
        function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, x, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_noised_embeddings_have_every_derivative(detach: bool, padding_idx: int | None) -> None:
    table = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1, 3], [3, 6, 2]])

    def function(t: Tensor) -> Tensor:
        clean, noised = fastpost.embedding_noise(
            t, ids, 0.3, seed=3, keep=KEEP, detach_noised=detach, padding_idx=padding_idx
        )
        return clean.pow(3) if detach else clean.pow(3) * noised

    def first(t: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(function(t).sum(), t, create_graph=True)
        return g

    plain = table.detach().clone().requires_grad_()
    rows = F.embedding(ids, plain, padding_idx)
    noise = (fastpost.embedding_noise(plain.detach(), ids, 0.3, seed=3, keep=KEEP)[1] - rows).detach()
    truth = rows.pow(3) if detach else rows.pow(3) * (rows + noise)
    (want,) = torch.autograd.grad(truth.sum(), plain, create_graph=True)
    torch.testing.assert_close(first(table), want)
    (second,) = torch.autograd.grad(first(table).square().sum(), table)
    torch.testing.assert_close(second, *torch.autograd.grad(want.square().sum(), plain))
    if padding_idx is None:  # a padding row's gradient is left out on purpose
        assert torch.autograd.gradcheck(function, table, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3, 8)])
def test_mapped_noise_is_each_sample_s_own(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    kinds = [{}] if len(shape) < 4 else [{}, {"keep": KEEP}, {"scale": torch.rand(2, 3)}, NOISE["numbered"]]
    for more in kinds:

        def noised(t: Tensor, seed: Any = 3, more: dict[str, Any] = more) -> Tensor:
            return fastpost.add_noise(t, 0.3, seed=seed, out_dtype=torch.float32, **more)

        expected = torch.stack([noised(t) for t in x])
        assert same_bits(vmap(noised)(x), expected)
        last = x.movedim(0, -1).contiguous()
        assert same_bits(vmap(noised, in_dims=-1)(last), expected)
        seeds = torch.arange(4)
        assert same_bits(vmap(noised)(x, seeds), torch.stack([noised(t, s) for t, s in zip(x, seeds, strict=True)]))
    if len(shape) == 4:
        keeps = torch.rand(4, 2, 3) < 0.5
        got = vmap(lambda t, keep: fastpost.add_noise(t, 0.3, seed=3, keep=keep))(x, keeps)
        assert same_bits(
            got, torch.stack([fastpost.add_noise(t, 0.3, seed=3, keep=k) for t, k in zip(x, keeps, strict=True)])
        )


def test_mapped_noise_without_a_seed_asks_vmap() -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(fastpost.add_noise)(x)
    for randomness, distinct in (("same", 1), ("different", 4)):
        found = vmap(lambda t: fastpost.add_noise(t, 1.0), randomness=randomness)(x)
        assert len({tuple(row.tolist()) for row in found}) == distinct


@pytest.mark.parametrize("tables", [False, True])
def test_mapped_embeddings_are_each_sample_s_own(backend: str, tables: bool) -> None:
    table, ids = torch.randn(5, 7, 4) if tables else torch.randn(7, 4), torch.randint(0, 7, (5, 2, 3))

    def loss(t: Tensor, i: Tensor) -> Tensor:
        clean, noised = fastpost.embedding_noise(t, i, 0.3, seed=3, keep=KEEP, detach_noised=False)
        return (clean * noised).sum()

    dims = (0 if tables else None, 0)
    for got, want in zip(vmap(grad(loss), in_dims=dims)(table, ids), per_sample(loss, table, ids, dims=dims), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    both = vmap(lambda t, i: fastpost.embedding_noise(t, i, 0.3, seed=3), in_dims=dims)(table, ids)
    alone = [fastpost.embedding_noise(table[k] if tables else table, ids[k], 0.3, seed=3) for k in range(5)]
    assert all(same_bits(b, torch.stack(s)) for b, s in zip(both, zip(*alone, strict=True), strict=True))


@pytest.mark.parametrize("how", [vmap, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)])
@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_of_the_table_is_never_read(backend: str, how: Callable[..., Any], index: int) -> None:
    if backend == "cuda":
        pytest.skip("a GPU gives NaN rather than wait for its indices")
    torch.compiler.reset()
    table, ids = torch.randn(7, 4), torch.tensor([[0, 3], [index, 1]])
    with pytest.raises(IndexError, match=f"index {index} is outside a table of 7 rows"):
        how(lambda i: fastpost.embedding_noise(table, i, 0.3, seed=3))(ids)


# -- the fused head, functional SAM, halves -------------------------------------------------------------------------------

HEAD: dict[str, Callable[..., Tensor]] = {
    "kl": lambda h, n, w: fastpost.linear_symmetric_kl(h, n, w),
    "kl, rows": lambda h, n, w: fastpost.linear_symmetric_kl(h, n, w, reduction="none").square().sum(),
    "r3f": lambda h, n, w: fastpost.linear_r3f_loss(h, n, w, LABELS).loss,
    "r-drop": lambda h, n, w: fastpost.linear_r_drop_loss(h, n, w, LABELS).loss,
    "js, rows": lambda h, n, w: fastpost.linear_js_divergence(h, n, w, reduction="none").square().sum(),
}


@pytest.mark.parametrize("name", HEAD)
def test_the_fused_head_refuses_second_derivatives_and_serves_first_ones(name: str) -> None:
    loss = HEAD[name]
    tensors = [t.requires_grad_() for t in (torch.randn(ROWS, 4), torch.randn(ROWS, 4), torch.randn(CLASSES, 4))]
    plain = torch.autograd.grad(loss(*tensors), tensors)
    again = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    fixed = [t.detach() for t in tensors]
    for got in (again, grad(loss, argnums=(0, 1, 2))(*fixed)):
        assert all(torch.equal(p, g.detach()) for p, g in zip(plain, got, strict=True))
    for g in again:
        with pytest.raises(RuntimeError, match=r"no second derivative.*use symmetric_kl or r3f_loss on torch\.nn"):
            torch.autograd.grad(g.square().sum() + tensors[0].sum(), tensors[0], retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda h: grad(loss)(h, *fixed[1:]).square().sum())(fixed[0])
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*take reverse mode"):
        jvp(loss, tuple(fixed), tuple(fixed))
    hidden = torch.randn(3, ROWS, 4)
    dims = (0, None, None)
    got = vmap(grad(loss), in_dims=dims)(hidden, *fixed[1:])
    assert all(same_bits(g, w) for g, w in zip(got, per_sample(loss, hidden, *fixed[1:], dims=dims), strict=True))


def test_distillation_names_itself_where_it_refuses_second_derivatives() -> None:
    student, head, teacher = torch.randn(ROWS, 4), torch.randn(CLASSES, 4), torch.randn(ROWS, CLASSES)
    log_probs, ids = teacher.log_softmax(-1).topk(2)
    student.requires_grad_()
    for loss in (
        fastpost.distillation_loss(student @ head.T, teacher),
        fastpost.linear_distillation_loss(student, head, teacher @ head, head),
        fastpost.linear_top_k_distillation_loss(student, head, ids, log_probs),
    ):
        (g,) = torch.autograd.grad(loss.loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^distillation_loss, .* no second derivative.*kl_div\(student"):
            torch.autograd.grad(g.square().sum(), student)


def test_products_at_w_plus_e_have_second_derivatives() -> None:
    x, w, u = torch.randn(3, 4), torch.randn(4, 5), torch.randn(4, 5)
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: product(x, w, u.double(), 0.25).pow(3), (x, w))
    bias, scale = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.rand(5).double()
    weight = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x, b: noised_linear(x, weight, b, scale, 0.1, 7).pow(3), (x, bias))


def test_per_sample_gradients_of_products_at_w_plus_e() -> None:
    x, w, u = torch.randn(4, 3, 5).double(), torch.randn(5, 6).double(), torch.randn(5, 6).double()
    bias, scale = torch.randn(6).double(), torch.rand(6).double()
    cases: dict[str, Loss] = {
        "product": lambda x, w: product(x, w, u, 0.25).pow(3).sum(),
        "noised": lambda x, b: noised_linear(x, w.mT.contiguous(), b, scale, 0.1, 7).pow(3).sum(),
    }
    for name, other in (("product", w), ("noised", bias)):
        got = vmap(grad(cases[name], argnums=(0, 1)), in_dims=(0, None))(x, other)
        for k in range(len(x)):
            sample = [t.clone().requires_grad_() for t in (x[k], other)]
            for g, want in zip(got, torch.autograd.grad(cases[name](*sample), sample), strict=True):
                torch.testing.assert_close(g[k], want, rtol=1e-12, atol=1e-12)
        with pytest.raises(NotImplementedError, match="take reverse mode"):
            jvp(lambda t: cases[name](t, other), (x[0],), (x[0],))  # noqa: B023


def test_a_gradient_penalty_at_functional_sam_s_neighbour() -> None:
    """In its second pass, against a model whose weights really are w + e."""
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    moved = copy.deepcopy(model)
    x = torch.randn(ROWS, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 2, 3, 6, 0])

    def backward(net: nn.Module, penalised: bool) -> None:
        loss = F.cross_entropy(net(x), y)
        if penalised:
            loss = loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
        loss.backward()

    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.3, perturb="functional", model=model, lr=0.0)
    backward(model, False)
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p, q in zip(moved.parameters(), model.parameters(), strict=True):
            p.add_(0.3 * q.grad / norm)
    backward(moved, True)
    with opt.perturbed():
        backward(model, True)
    for got, want in zip(model.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12)


def test_the_halves_of_a_double_batch() -> None:
    both = torch.randn(2 * ROWS, CLASSES, dtype=torch.float64, requires_grad=True)

    def loss(t: Tensor, halves: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        return CASES["r3f"][1](*halves(t.tanh()))

    assert torch.autograd.gradgradcheck(lambda t: loss(t, writable_halves), both)
    (first,) = torch.autograd.grad(loss(both, writable_halves), both, create_graph=True)
    (plain,) = torch.autograd.grad(loss(both, lambda t: t.chunk(2)), both, create_graph=True)
    for got, want in zip(
        torch.autograd.grad(first.square().sum(), both), torch.autograd.grad(plain.square().sum(), both), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("checks", [False, True])
def test_checks_of_values_do_not_stand_in_the_way(checks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label out of range or an infinite divergence is found eagerly; mapped, where values cannot be read, it gives NaN."""
    if checks:
        monkeypatch.setenv("FASTPOST_CHECKS", "1")
    a = torch.randn(3, 2, CLASSES)
    wrong = torch.tensor([[0, 1], [2, CLASSES], [0, 0]])
    with pytest.raises(ValueError, match="outside"):
        fastpost.r3f_loss(a, a + 1, wrong)
    losses = vmap(lambda x, t: fastpost.r3f_loss(x, x + 1, t).loss)(a, wrong)
    assert losses.isnan().tolist() == [False, True, False]
    assert vmap(lambda x: fastpost.symmetric_kl(x, x + 1))(a.fill_(torch.nan)).isnan().all()
