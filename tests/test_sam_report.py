"""The report: what was meant, stored and seen of a perturbation."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fastpost import SAM, PerturbationReport

from .small import loss_of, network


def test_a_lost_perturbation_is_told_once_with_remedies() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(100000).mul_(0.02).bfloat16())
    opt = SAM([w], torch.optim.SGD, rho=1e-4, lr=0.0)
    w.grad = torch.randn(100000).bfloat16()
    opt.first_step()
    with pytest.warns(UserWarning, match="Remedies") as caught:
        report = opt.report
    assert len(caught) == 1
    assert report.seen_cosine < 0.5
    assert report.changed_fraction < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opt.report is not None
    assert "intended_norm=0.0001" in repr(report)


def test_the_report_distinguishes_what_is_stored_from_what_is_seen() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1e-3, lr=0.0, compute_dtype=torch.bfloat16)
    loss_of(model).backward()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    e = 1e-3 * gradient / gradient.norm()
    before = torch.cat([p.detach().bfloat16().double().flatten() for p in model.parameters()])
    opt.first_step()
    seen = torch.cat([p.detach().bfloat16().double().flatten() for p in model.parameters()]) - before
    report = opt.report
    assert report.stored_cosine > 0.9999
    assert report.stored_gain.item() == pytest.approx(1.0, abs=1e-3)
    assert report.seen_norm.item() == pytest.approx(seen.norm().item(), rel=1e-5)
    assert report.seen_norm > 2 * report.intended_norm
    assert report.seen_gain.item() == pytest.approx((seen @ e / (e @ e)).item(), rel=1e-3)
    autocast = SAM(model.parameters(), torch.optim.SGD, rho=1e-3, lr=0.0)
    opt.restore_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast.first_step()
    assert autocast.report.seen_norm.item() == pytest.approx(report.seen_norm.item(), rel=1e-6)
    assert SAM(model.parameters(), torch.optim.SGD).report is None


@pytest.mark.parametrize("kind", ["fair noise", "lost", "enlarged", "nothing asked for"])
def test_noise_is_no_concern_but_loss_is(kind: str) -> None:
    """Large models with fp32 weights under bf16 autocast look like the first: ten times the norm at cosine 0.1."""
    sums = {
        "fair noise": [1.0, 1.0, 1.0, 100.0, 1.0, 50.0],
        "lost": [1.0, 0.04, 0.03, 0.04, 0.03, 1.0],
        "enlarged": [1.0, 4.0, 2.0, 4.0, 2.0, 50.0],
        "nothing asked for": [0.0] * 6,
    }[kind]
    report = PerturbationReport(torch.tensor(sums, dtype=torch.float64), 100)
    told = {"lost": "hardly survives rounding: 0.03 of it", "enlarged": "is enlarged by rounding: 2 of it"}
    assert told.get(kind, "") in (report.concern() or "")
    assert (report.concern() is not None) == (kind in told)
    assert set(report.as_dict()) >= {"seen_gain", "stored_gain", "seen_norm", "stored_cosine"}
    assert "gain" in report.line()
    assert "\n" not in report.line()


def test_the_loss_rises_by_the_gain() -> None:
    """A linear loss in pure bfloat16: what it rises by is exactly <stored, g>."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(10000).mul_(0.02).bfloat16())
    g = torch.randn(10000).bfloat16()
    for rounding in ("nearest", "stochastic"):
        opt = SAM([w], torch.optim.SGD, rho=0.005, lr=0.0, rounding=rounding)
        before = w.detach().double()
        w.grad = g.clone()
        opt.first_step()
        rise = (w.detach().double() - before) @ g.double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gain = opt.report.stored_gain.item()
        assert rise.item() == pytest.approx(gain * 0.005 * g.double().norm().item(), rel=1e-6)
        opt.restore_()
