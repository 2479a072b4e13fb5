"""The seam for shards: sums over gradients and verdicts go through one object; only local parts are touched."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import GSAM, SAMWindow
from fastpost.sam import optimizer as module
from fastpost.sam.buckets import ShardReducer

from .small import X, Y, all_bits, closure_of, loss_of, network, unchanged


class OtherRank(ShardReducer):
    """As if another rank held as much again of every sum, and had a verdict of its own."""

    verdict = 0.0

    def __init__(self, norm_group: None = None) -> None:
        super().__init__(norm_group)
        self.written: list[int] = []

    def key(self, p: Tensor) -> Hashable:
        return p.ndim  # two kinds of sharding in one optimizer

    def total(self, parts: Iterable[tuple[Hashable, Tensor]], shape: tuple[int, ...] = ()) -> Tensor:
        return 2 * super().total(parts, shape)

    def agree(self, flag: Tensor) -> Tensor:
        return torch.maximum(flag, torch.full_like(flag, self.verdict))

    def mark_modified(self, params) -> None:
        self.written.append(len(list(params)))


@pytest.fixture
def other_rank(monkeypatch: pytest.MonkeyPatch) -> type[OtherRank]:
    monkeypatch.setattr(OtherRank, "verdict", 0.0)
    monkeypatch.setattr(module, "ShardReducer", OtherRank)
    return OtherRank


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_is_that_of_all_ranks(other_rank: type[OtherRank], adaptive: bool) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.1)
    loss_of(model).backward()
    before = {p: p.detach().double() for p in model.parameters()}
    t = {p: w.abs() if adaptive else torch.ones_like(w) for p, w in before.items()}
    norm = (2 * sum((t[p] * p.grad.double()).square().sum() for p in before)).sqrt()
    opt.first_step()
    for p, w in before.items():
        assert (p.detach().double() - w - 0.3 * t[p] ** 2 * p.grad.double() / norm).abs().max() <= 1e-7
    assert opt.report.stored_gain.item() == pytest.approx(1.0, rel=1e-5)
    opt.restore_()
    assert opt._reducer.written == [4, 4]  # after perturbing and after restoring: time to reshard


def test_one_ranks_overflow_is_everyones(other_rank: type[OtherRank]) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    before = all_bits(model)
    other_rank.verdict = 1.0
    opt.step(closure_of(model))
    assert opt.skipped_steps == 1
    assert unchanged(model, before)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt.zero_grad()
    for _ in range(2):
        scaler.scale(loss_of(model)).backward()
        if not opt.is_perturbed:
            opt.first_step(zero_grad=True)
    scaler.step(opt)
    assert opt.skipped_steps == 2
    assert unchanged(model, before)


def test_variants_sum_over_all_ranks_too(other_rank: type[OtherRank]) -> None:
    """GSAM's projection is a ratio of sums: both double, and the step is that of one process at the radius of two."""
    one, two = network(), network()
    opt = SAM(one.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, variant=GSAM(0.4))
    opt.step(closure_of(one))
    plain = SAM(two.parameters(), torch.optim.SGD, rho=0.2 / 2**0.5, lr=0.1, variant=GSAM(0.4))
    plain._reducer = plain._perturbation._reducer = ShardReducer()
    plain._build_caches()
    SAMWindow(plain, lambda x: nn.functional.cross_entropy(two(x), Y).backward()).run([X])
    plain.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6
