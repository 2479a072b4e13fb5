"""Triton chosen by the environment alone: FASTPOST_BACKEND=triton, with the interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

ROOT = Path(__file__).parent.parent

SETUP = """
import math, numpy as np, torch, fastpost
from fastpost import dispatch
from fastpost.ops import params
from tests import oracles
from tests.conftest import same_bits
torch.manual_seed(0)
served = set()
inner = dispatch._select.__wrapped__
def watched(op, *rest):
    function = inner(op, *rest)
    served.add((op, function.__module__))
    return function
dispatch._select = watched
"""
CASES = {
    "divergence": """
a = torch.randn(3, 7).requires_grad_()
b = (a.detach() + 0.1 * torch.randn(3, 7)).requires_grad_()
value, grad_a, grad_b = oracles.divergence(a, b)
got = fastpost.symmetric_kl(a, b, reduction="sum")
np.testing.assert_allclose(got.item(), value.sum(), rtol=1e-6)
(got * 3).backward()
np.testing.assert_allclose(a.grad, 3 * grad_a, rtol=1e-5, atol=1e-8)
np.testing.assert_allclose(b.grad, 3 * grad_b, rtol=1e-5, atol=1e-8)
labels = torch.tensor([1, 6, 0])
loss = fastpost.r3f_loss(a, b, labels, r3f_lambda=0.5)
np.testing.assert_allclose(loss.loss.item(), (oracles.cross_entropy(a, labels)[0] + 0.5 * value).mean(), rtol=1e-6)
""",
    "noise": """
x = torch.randn(3, 5).bfloat16()
noised = fastpost.add_noise(x, 0.1, seed=3)
table, ids = torch.randn(11, 5), torch.tensor([[1, 10], [0, 4]])
clean, streams = fastpost.embedding_noise(table, ids, 0.1, seed=3)
assert same_bits(clean, table[ids])
with fastpost.use_backend("reference"):
    assert same_bits(noised, fastpost.add_noise(x, 0.1, seed=3))
    assert same_bits(streams, fastpost.embedding_noise(table, ids, 0.1, seed=3)[1])
served = {pair for pair in served if not pair[1].endswith("reference")}
""",
    "params": """
w, g = [torch.randn(33), torch.randn(0)], [torch.randn(33), torch.randn(0)]
before = w[0].clone()
stash = [torch.empty_like(t) for t in w]
norm = params.squared_norm(g)
assert params.squared_distance(g, g) == 0
np.testing.assert_allclose(norm.item(), (g[0].double() ** 2).sum().item(), rtol=1e-13)
params.sam_perturb_(w, g, stash, norm, rho=0.5)
moved = before.double() + 0.5 * g[0].double() / g[0].double().norm()
np.testing.assert_allclose(w[0], moved, rtol=1e-6, atol=1e-7)
params.sam_restore_(w, stash)
assert same_bits(w[0], before)
first, second, steps = [torch.zeros(33), torch.zeros(0)], [torch.zeros(33), torch.zeros(0)], [torch.ones(()) for _ in w]
params.sam_restore_adamw_(w, g, stash, first, second, steps, lr=0.1, weight_decay=0.0, eps=0.0)
np.testing.assert_allclose(w[0], before.double() - 0.1 * g[0].double().sign(), rtol=1e-5, atol=1e-6)
kept = g[0].clone()
fastpost.flip_signs_(g, 5)
assert not same_bits(g[0], kept)
fastpost.flip_signs_(g, 5)
assert same_bits(g[0], kept)
params.negate_(g)
assert same_bits(g[0], -kept)
params.negate_clip_(g, 1.0)
np.testing.assert_allclose(g[0], kept.double() / kept.double().norm(), rtol=1e-6)
""",
}
SERVED = {
    "divergence": {"divergence_rows", "gradient_like", "scale_rows_"},
    "noise": {"add_noise", "embedding_noise"},
    "params": {
        "squared_norm", "squared_distance", "sam_perturb_", "sam_restore_", "sam_restore_adamw_", "flip_signs_", "negate_",
        "negate_clip_",
    },
}  # fmt: skip


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    without = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_EMULATION")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**without, "FASTPOST_BACKEND": "triton", **env}, capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_the_environment_alone_chooses_triton(family: str) -> None:
    done = run(SETUP + CASES[family] + "\nprint(*sorted(served), sep='\\n')", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split("\n")[:-1]) == {str((op, "fastpost.backends.triton")) for op in SERVED[family]}


def test_without_a_device_or_the_interpreter_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has what the test finds missing")
    done = run("import torch, fastpost; fastpost.add_noise(torch.ones(3), 0.1)")
    assert done.returncode != 0
    assert "BackendUnavailable" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
