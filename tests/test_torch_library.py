"""The operations as torch's compiler sees them: schemas, fake kernels, graphs without breaks, shapes that change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastpost.ops import (
    jensen_shannon,  # noqa: F401, registers its operation
    linear_divergence,  # noqa: F401, as well
    params,
)
from fastpost.ops.divergence import r3f_loss, symmetric_kl
from fastpost.ops.linear_distillation import DIVERGENCES
from fastpost.ops.noise import NOISE_TYPES, add_noise, embedding_noise
from fastpost.ops.reductions import KL_REDUCTIONS, R3F_REDUCTIONS

from .conftest import DTYPES, same_bits

EVERY_DTYPE = (*DTYPES, torch.float64)
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


# -- opcheck --------------------------------------------------------------------------------------------------------------


def tensors(*shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Tensor]:
    """One tensor of each shape and dtype."""
    return [torch.randn(shape).to(dtype) for shape in shapes for dtype in dtypes]


def lists(columns: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Lists that agree row by row: a matrix, a permuted one, nothing, and one of another dtype."""
    rows = [torch.randn(2, 3), torch.randn(4, 5).t(), torch.randn(0), torch.randn(7).bfloat16()]
    return [[torch.randn_like(t) for t in rows[:3]] + [torch.randn_like(rows[3])] for _ in range(columns)]


def perturb_samples() -> Iterator[tuple[Any, ...]]:
    norm = torch.ones((), dtype=torch.float64)
    yield *lists(3), norm, 0.1, True, 0.01, None
    yield *lists(3), norm, 0.1, False, 0.0, torch.bfloat16
    yield *lists(3), norm, 0.1, False, 0.0, None, torch.tensor(3)


def adamw_samples() -> Iterator[tuple[Any, ...]]:
    for flags in ((None, None), (torch.tensor(1024.0), torch.tensor(0.0)), (torch.tensor(2.0), torch.tensor(1.0))):
        weights, grads, stash, first, second = lists(5)
        steps = [torch.tensor(3.0) for _ in weights]
        second = [t.square() for t in second]
        yield weights, grads, stash, first, second, steps, 1e-3, 0.9, 0.999, 1e-8, 0.01, flags[0] is None, *flags


def noise_samples() -> Iterator[tuple[Any, ...]]:
    places = torch.arange(15).reshape(3, 5) - 4
    for dtype, noise_type, rows, scales in itertools.product(
        EVERY_DTYPE, NOISE_TYPES, (None, places), (None, torch.rand(3, 5))
    ):
        x = torch.randn(3, 5, 8).to(dtype)
        for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            yield given, 0.1, noise_type, torch.tensor(3), rows, scales, torch.float32


def embedding_samples() -> Iterator[tuple[Any, ...]]:
    ids, places = torch.randint(0, 11, (3, 5)), torch.arange(15).reshape(3, 5) - 4
    for dtype, noise_type, rows, scales in itertools.product(
        EVERY_DTYPE, NOISE_TYPES, (None, places), (None, torch.rand(3, 5))
    ):
        yield torch.randn(11, 8).to(dtype), ids, 0.1, noise_type, torch.tensor(3), rows, scales, dtype


def divergence_samples() -> Iterator[tuple[Any, ...]]:
    labels, weights = torch.tensor([1, -100, 3, 39]), torch.rand(4, dtype=torch.float64)
    for wanted in itertools.product([False, True], repeat=2):
        yield *tensors((4, 40), (4, 40)), labels, -100, None, weights, *wanted
    for dtype in EVERY_DTYPE:
        wide = torch.randn(2, 4, 64).to(dtype)[:, :, :40]  # a row stride of more than the classes
        yield wide[0], wide[1], None, -100, weights, None, True, True


def linear_samples() -> Iterator[tuple[Any, ...]]:
    labels, weights = torch.randint(0, 40, (70,)), torch.rand(70, dtype=torch.float64)
    how = (-100, 0.0, 0.0, 1.0, 64)
    for want, grad, counted in itertools.product(([True] * 4, [True, False, False, True]), ("both", "clean"), (True, False)):
        ce = (labels, torch.stack((weights, weights))) if counted else (None, weights[None])
        for divergence, both in (("symmetric_kl", False), ("symmetric_kl", True), ("js", False)):
            if grad == "both" or not both:
                yield *tensors((70, 8), (70, 8), (40, 8), (40,)), *ce, *how, grad, torch.float32, "", divergence, both, want


def distillation_samples() -> Iterator[tuple[Any, ...]]:
    labels, weights = torch.randint(0, 40, (70,)), torch.rand(70, dtype=torch.float64)
    how = (0.5, 2.0, 0.0, 0.0, False, 64, torch.float32, torch.float32, 0.1, "")
    for divergence, counted, both in itertools.product(DIVERGENCES, (True, False), (True, False)):
        ce = (labels, torch.stack((weights, weights))) if counted else (None, weights[None])
        heads = (*tensors((70, 8), (40, 8), (40,)), *tensors((70, 6), (40, 6), (40,)))
        yield *heads, *ce, -100, divergence, *how, [True] * 3 + [both] * 3
    weighed = (labels, torch.stack((torch.zeros_like(weights), weights)), -100, "js", *how[:4], True, *how[5:])
    yield *tensors((70, 8), (40, 8), (40,)), None, None, None, *weighed, [True] * 3 + [False] * 3
    logits = tensors((70, 40), (70, 40))
    yield logits[0], None, None, logits[1], None, None, *weighed, [True, False, False] * 2


def top_k_samples() -> Iterator[tuple[Any, ...]]:
    labels, weights = torch.randint(0, 40, (70,)), torch.rand(70, dtype=torch.float64)
    log_probs, ids = torch.randn(70, 40).log_softmax(-1).topk(3, -1)
    for divergence, counted, has_rest in itertools.product(DIVERGENCES, (True, False), (True, False)):
        ce = (labels, torch.stack((weights, weights))) if counted else (None, weights[None])
        how = (-100, divergence, 0.5, 2.0, has_rest, 0.0, 64, torch.float32, 0.1, "")
        yield *tensors((70, 8), (40, 8), (40,)), ids, log_probs, *ce, *how, [True, counted, True]


# Arguments of every operation; a new operation has to bring its own.
SAMPLES: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "squared_norm": lambda: iter([(lists(1)[0], None, 0.0), (*lists(2), 0.01)]),
    "chunk_squares": lambda: iter([tuple(lists(1))]),
    "squared_distance": lambda: iter([tuple(lists(2))]),
    "dot": lambda: iter([tuple(lists(2))]),
    "sam_perturb_": perturb_samples,
    "sam_restore_": lambda: iter([tuple(lists(2))]),
    "sam_restore_adamw_": adamw_samples,
    "negate_": lambda: iter([tuple(lists(1))]),
    "flip_signs_": lambda: iter([(*lists(1), torch.tensor(3))]),
    "negate_clip_": lambda: iter([(*lists(1), 1.0), (*lists(1), float("inf"))]),
    "add_noise": noise_samples,
    "embedding_noise": embedding_samples,
    "linear_divergence": linear_samples,
    "linear_distillation": distillation_samples,
    "linear_top_k_distillation": top_k_samples,
    "js_rows": lambda: iter(
        [(*tensors((4, 40), (4, 40)), w, x) for w in (None, torch.rand(4).double()) for x in (True, False)]
    ),
    "divergence_rows": divergence_samples,
    "divergence_rows_": divergence_samples,
    "scale_rows_": lambda: iter([(*tensors((4, 40)), torch.rand(n, dtype=torch.float64)) for n in (1, 4)]),
}


def registered(namespace: str = "fastpost") -> set[str]:
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {name.split("::")[1] for name in names if name.startswith(f"{namespace}::")}


def test_every_operation_has_samples() -> None:
    assert registered() == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_operations_pass_opcheck(name: str) -> None:
    """Writes what the schema declares and nothing else, shapes as the fake kernel says, traceable with dynamic shapes."""
    for sample in SAMPLES[name]():
        results = torch.library.opcheck(getattr(torch.ops.fastpost, name).default, sample, test_utils=UTILITIES)
        assert set(results.values()) == {"SUCCESS"}, results


DEFECTS = {
    "shape of the fake kernel": (
        "(Tensor x) -> Tensor", lambda x: x + 1, lambda x: x.new_empty(x.shape[0] + 1), "test_faketensor"
    ),
    "dtype of the fake kernel": (
        "(Tensor x) -> Tensor", lambda x: x + 1, lambda x: x.new_empty(x.shape, dtype=torch.float64), "test_faketensor"
    ),
    "undeclared mutation": ("(Tensor x) -> Tensor", lambda x: x.add_(1).clone(), torch.empty_like, "test_schema"),
    "aliased result": ("(Tensor(a!) x) -> Tensor", lambda x: x.add_(1), torch.empty_like, "test_schema"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_opcheck_sees_planted_defects(defect: str) -> None:
    signature, implementation, fake, utility = DEFECTS[defect]
    library = torch.library.Library("fastpost_defects", "DEF")
    try:
        library.define(f"planted{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("planted", implementation, "CompositeExplicitAutograd")
        torch.library.register_fake("fastpost_defects::planted", fake, lib=library)
        results = torch.library.opcheck(
            torch.ops.fastpost_defects.planted.default, (torch.randn(5),), test_utils=UTILITIES, raise_exception=False
        )
        assert results[utility] != "SUCCESS", results
    finally:
        library._destroy()


def test_a_new_operation_without_samples_is_seen() -> None:
    library = torch.library.Library("fastpost", "FRAGMENT")
    try:
        library.define("planted(Tensor x) -> Tensor")
        assert registered() - set(SAMPLES) == {"planted"}
    finally:
        library._destroy()
    assert registered() == set(SAMPLES)


# -- torch.compile --------------------------------------------------------------------------------------------------------

LENGTHS = (4, 7, 5, 9, 12, 3, 30, 17, 64, 2)
WIDTH = 40


def logits(n: int) -> tuple[Tensor, Tensor]:
    a = torch.randn(n, 3, WIDTH)
    return a, a + 0.1 * torch.randn(n, 3, WIDTH)


def labels(n: int) -> Tensor:
    return torch.where(torch.rand(n, 3) < 0.2, -100, torch.randint(WIDTH, (n, 3)))


def norm_of(*given: Tensor) -> Tensor:
    return params.squared_norm([t * 1 for t in given])


def adaptive_norm_of(g: Tensor, w: Tensor) -> Tensor:
    return params.squared_norm([g * 2], [w * 1], eta=0.01)


def r3f_case(reduction: str) -> tuple[Callable[..., Tensor], Callable[[int], tuple[Tensor, ...]]]:
    """Labels of shape (n, 3), or (n,) where the reduction is over sentences."""
    flat = reduction == "sentence"

    def inputs(n: int) -> tuple[Tensor, ...]:
        a, b = logits(n)
        return (a[:, 0], b[:, 0], labels(n)[:, 0]) if flat else (a, b, labels(n))

    return lambda a, b, y: r3f_loss(a * 2, b * 2, y, r3f_lambda=0.7, reduction=reduction).loss * 3, inputs


def noise_inputs(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 5, 8), torch.rand(n, 5) < 0.5


def embedding_inputs(n: int) -> tuple[Tensor, ...]:
    return torch.randn(11, 8), torch.randint(0, 11, (n, 5)), torch.rand(n, 5) < 0.5


def both_streams(table: Tensor, ids: Tensor, keep: Tensor, noise_type: str) -> Tensor:
    clean, noised = embedding_noise(table * 1, ids, 0.1, noise_type, seed=3, keep=keep)
    return clean.sin().sum() + noised.square().sum()


# Every functional public operation: what is compiled, and its inputs at a length.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[int], tuple[Tensor, ...]]]] = {
    **{
        f"symmetric_kl {r}": (lambda a, b, r=r: symmetric_kl(a * 2, b * 2, reduction=r).sin().sum(), logits)
        for r in KL_REDUCTIONS
    },
    **{
        f"symmetric_kl {r} masked": (
            lambda a, b, mask, r=r: symmetric_kl(a, b, mask=mask, reduction=r).sin().sum(),
            lambda n: (*logits(n), torch.rand(n, 3) < 0.7),
        )
        for r in KL_REDUCTIONS
    },
    **{f"r3f_loss {r}": r3f_case(r) for r in R3F_REDUCTIONS},
    **{
        f"add_noise {t}": (lambda x, keep, t=t: add_noise(x * 2, 0.1, t, seed=2, keep=keep).square().sum(), noise_inputs)
        for t in NOISE_TYPES
    },
    **{
        f"embedding_noise {t}": (lambda *given, t=t: both_streams(*given, noise_type=t), embedding_inputs)
        for t in NOISE_TYPES
    },
    "squared_norm": (norm_of, lambda n: (torch.randn(n, 3), torch.randn(2 * n))),
    "squared_norm adaptive": (adaptive_norm_of, lambda n: (torch.randn(n, 3), torch.randn(n, 3))),
}
WITHOUT_GRADIENT = ("squared_norm", "squared_norm adaptive")


def value_and_gradients(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() if backward and t.is_floating_point() else t for t in inputs]
    value = f(*leaves)
    return [value.detach(), *(torch.autograd.grad(value, [t for t in leaves if t.requires_grad]) if backward else ())]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_forward_and_backward_for_all_lengths(name: str) -> None:
    """No graph break; eager's numbers; one compilation for the first length and one for all that follow."""
    function, inputs = FUNCTIONS[name]
    backward = name not in WITHOUT_GRADIENT
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in LENGTHS:
        given = inputs(n)
        found = value_and_gradients(compiled, given, backward)
        for got, expected in zip(found, value_and_gradients(function, given, backward), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_noise_draws_a_seed_on_every_call() -> None:
    x = torch.zeros(6, 8)
    compiled = torch.compile(lambda t: add_noise(t, 0.1), fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert 0.05 < float(first.abs().max()) < 0.1
    assert not same_bits(first, second)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_check_sees_a_graph_break_and_a_compilation_per_length() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 2

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(breaks, fullgraph=True, backend="eager")(torch.ones(3))
    counter = CompileCounterWithBackend("aot_eager")
    constant = torch.compile(norm_of, backend=counter, fullgraph=True, dynamic=False)
    for n in LENGTHS[:4]:
        constant(torch.ones(n))
    assert counter.frame_count > 2
