"""Why the cuda backend cannot be used, in words that name the remedy; and who serves its tensors then."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastpost
from fastpost import dispatch
from fastpost.backends import cuda, native


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU, a core for it and a driver, each of which a test can spoil."""
    core = SimpleNamespace(device_count=lambda: 1, supports=lambda device: True)
    monkeypatch.setattr(native, "failure", lambda: None)
    monkeypatch.setattr(native, "core", lambda: SimpleNamespace(cuda=core))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU X")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return core


def too_old() -> int:
    raise RuntimeError("fastpost: looking for devices on cuda:0 failed: CUDA driver version is insufficient")


def test_a_machine_that_has_everything(machine: SimpleNamespace) -> None:
    assert cuda.status() == (True, "GPU X")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda core, patch: patch.setattr(native, "core", lambda: SimpleNamespace()), "holds no CUDA core"),
        (lambda core, patch: patch.setattr(torch.cuda, "is_available", lambda: False), "torch sees no CUDA device"),
        (lambda core, patch: setattr(core, "device_count", too_old), "driver version is insufficient"),
        (lambda core, patch: patch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5)), "8.0 or newer"),
        (lambda core, patch: setattr(core, "supports", lambda device: False), "FASTPOST_CUDA_ARCHS=90-real"),
    ],
)
def test_what_is_missing_is_named(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, spoil: Any, words: str) -> None:
    spoil(machine, monkeypatch)
    available, reason = cuda.status()
    assert not available
    assert words in reason


def test_a_gpu_left_to_the_reference_is_warned_of_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {
        "reference": dispatch.BackendStatus(True, ""),
        "cuda": dispatch.BackendStatus(False, "no core."),
        "triton": dispatch.BackendStatus(False, "no Triton."),
    }
    monkeypatch.setattr(dispatch, "backends", lambda: status)
    dispatch._select.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"cuda tensors by its slow reference backend.*no core.*no Triton"):
            dispatch.select("negate_", torch.device("cuda"), torch.float32)
        status["triton"] = dispatch.BackendStatus(True, "")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch.select("squared_norm", torch.device("cuda"), torch.float32)
    finally:
        dispatch._select.cache_clear()


def test_a_forced_backend_that_is_missing_names_the_others() -> None:
    if fastpost.backends()["cuda"].available:
        pytest.skip("this machine has a GPU")
    with pytest.raises(fastpost.errors.BackendUnavailable, match=r"backend 'cuda' is not available.*Available: .*reference"):
        fastpost.use_backend("cuda")


# -- FASTPOST_CHECKS=1: what is otherwise not looked at, because looking waits for the device ------------------------------


def test_strict_checks_name_the_row_that_has_no_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(3, 9)
    one_sided, meaningless = a.clone(), a.clone()
    one_sided[1, 4] = -torch.inf
    meaningless[2, 0] = torch.nan
    assert fastpost.symmetric_kl(a, one_sided, reduction="none").tolist()[1] == torch.inf  # said, not raised
    monkeypatch.setenv("FASTPOST_CHECKS", "1")
    assert float(fastpost.symmetric_kl(a, a)) == 0
    with pytest.raises(ValueError, match=r"row 1 holds a class that is -inf in one stream only"):
        fastpost.symmetric_kl(a, one_sided)
    with pytest.raises(ValueError, match=r"r3f_loss: row 2 holds NaN or \+inf"):
        fastpost.r3f_loss(a, meaningless, torch.zeros(3, dtype=torch.long))
