"""The report: what was meant, stored and seen of a perturbation."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fastpost import SAM

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
    before = torch.cat([p.detach().bfloat16().double().flatten() for p in model.parameters()])
    opt.first_step()
    seen = torch.cat([p.detach().bfloat16().double().flatten() for p in model.parameters()]) - before
    with pytest.warns(UserWarning, match="Remedies"):
        report = opt.report
    assert report.stored_cosine > 0.9999
    assert report.seen_norm.item() == pytest.approx(seen.norm().item(), rel=1e-5)
    assert report.seen_norm > 2 * report.intended_norm
    autocast = SAM(model.parameters(), torch.optim.SGD, rho=1e-3, lr=0.0)
    opt.restore_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast.first_step()
    with pytest.warns(UserWarning, match="Remedies"):
        assert autocast.report.seen_norm.item() == pytest.approx(report.seen_norm.item(), rel=1e-6)
    assert SAM(model.parameters(), torch.optim.SGD).report is None
