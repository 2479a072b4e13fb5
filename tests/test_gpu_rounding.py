"""Rounding at random, and weights as casts of masters, on a GPU: the CPU tests' bodies there, bits against the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastpost
from fastpost.ops import params as ops

from . import test_rounding as bodies
from .conftest import DTYPES, same_bits
from .gpu import BACKENDS, borrow, needs_gpu, no_sync, there
from .test_rounding import (  # noqa: F401  (collected here once more, on the device)
    test_every_element_goes_to_the_neighbour_that_its_bits_choose,
    test_infinities_nans_and_numbers_at_the_edge,
    test_seed_tensor_and_place_choose_the_bits,
    test_the_mean_is_kept_where_rounding_to_nearest_loses_the_step,
    test_weights_become_the_casts_of_perturbed_masters,
    test_where_nothing_may_move_the_weights_are_the_masters_casts,
    test_wider_weights_ignore_the_seed,
)

pytestmark = needs_gpu


@pytest.fixture(autouse=True)
def _borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    borrow(monkeypatch, bodies)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastpost.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_random_rounding_takes_the_cpus_bits_and_waits_for_nothing(backend: str, dtype: torch.dtype) -> None:
    """A power of two as the scale, so that w + e is exact in float32 everywhere and only the rounding is left."""
    home = [torch.randn(n).to(dtype) for n in (1, 7, 1025, 70_001)]
    steps = [torch.randint(-64, 64, (len(w),)).to(dtype) for w in home]
    squared, seed = torch.full((), 4.0, dtype=torch.float64), torch.tensor(11)
    mine, grads, stash = there(*home), there(*steps), [torch.empty_like(w) for w in there(*home)]
    (norm, key) = there(squared, seed)
    with no_sync():
        ops.sam_perturb_(mine, grads, stash, norm, rho=2.0**-12, seed=key)
    with fastpost.use_backend("cpu"):
        ops.sam_perturb_(home, steps, [torch.empty_like(w) for w in home], squared, rho=2.0**-12, seed=seed)
    assert all(same_bits(m.cpu(), w) for m, w in zip(mine, home, strict=True))
