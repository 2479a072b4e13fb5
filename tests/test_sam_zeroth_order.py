"""SAM along a direction estimated from losses: against float64 written from the equations, with z as the loss saw it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM, distributed
from fastpost.sam import ZerothOrderSAM

from .small import Y, all_bits, closure_of, network, unchanged

X = torch.randn(32, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
RHO, LR, MU = 0.3, 0.2, 1e-3


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Watched:
    """A loss that notes where it was asked and what it said."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.at, self.values = model, [], []

    def __call__(self) -> Tensor:
        value = nn.functional.cross_entropy(self.model(X), Y)
        self.at.append(flat(self.model))
        self.values.append(float(value))
        return value


def direction(at: list[Tensor], values: list[float], w: Tensor, mu: float = MU) -> Tensor:
    """d of the equation, with z told from where the losses were asked."""
    slopes = [(plus - minus) / (2 * mu) for plus, minus in zip(values[::2], values[1::2], strict=True)]
    return sum(slope * (there - w) / mu for slope, there in zip(slopes, at[::2], strict=True)) / len(slopes)


@pytest.mark.parametrize("probes", [1, 4])
def test_the_step_follows_the_equations(probes: int) -> None:
    model = network().double()
    zeroth = ZerothOrderSAM(probes, MU)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=zeroth)
    drawn = []
    for _ in range(3):
        w, bits, watched = flat(model), all_bits(model), Watched(model)
        zeroth.estimate(opt, watched)
        assert unchanged(model, bits)
        assert len(watched.at) == 2 * probes
        for plus, minus in zip(watched.at[::2], watched.at[1::2], strict=True):
            torch.testing.assert_close(plus - w, w - minus, rtol=0, atol=1e-15)
            drawn.append((plus - w) / MU)
        d = direction(watched.at, watched.values, w)
        passed: list[Tensor] = []

        def closure(passed: list[Tensor] = passed) -> Tensor:
            passed.append(flat(model))
            loss = nn.functional.cross_entropy(model(X), Y)
            loss.backward()
            return loss

        opt.step(closure)
        assert len(passed) == 1
        torch.testing.assert_close(passed[0] - w, RHO * d / d.norm(), rtol=1e-9, atol=1e-12)
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(flat(model), w - LR * g, rtol=0, atol=1e-14)
    z = torch.stack(drawn)  # normal, and others for each probe and step
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / z.numel()) ** 0.5
    overlap = (z @ z.T / z.shape[1]).fill_diagonal_(0)
    assert float(overlap.abs().max()) < 5 / z.shape[1] ** 0.5


def test_both_sides_of_a_probe_and_the_pass_draw_the_same_masks() -> None:
    model = network(dropout=0.5).double()
    zeroth = ZerothOrderSAM(2, 1e-9)  # where nothing moves, all losses are the same but for the masks
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1e-9, lr=LR, variant=zeroth)
    watched = Watched(model)
    zeroth.estimate(opt, watched)
    loss = opt.step(closure_of(model, X))
    assert max(abs(v - float(loss.detach())) for v in watched.values) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_asam_and_scopes(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    zeroth = ZerothOrderSAM(2, 0.05)
    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.5, adaptive=True, lr=LR, variant=zeroth, scope=["*weight"])
    bits, before = all_bits(model), [p.detach().double() for p in model.parameters()]
    zeroth.estimate(opt, lambda: nn.functional.cross_entropy(model(X.to(dtype)).float(), Y))
    assert unchanged(model, bits)
    opt.first_step()
    assert [torch.equal(b, a) for b, a in zip(bits, all_bits(model), strict=True)] == [False, True, False, True]
    e = [(p.detach().double() - w) / w.abs() for p, w in zip(model.parameters(), before, strict=True)]
    assert abs(float(torch.cat([e[0].flatten(), e[2].flatten()]).norm()) / 0.5 - 1) < 100 * torch.finfo(dtype).eps
    opt.abandon()
    assert unchanged(model, bits)


def test_interval_faults_and_bad_input() -> None:
    for probes in (0, True, 1.5):
        with pytest.raises(ValueError, match="probes must be a whole number"):
            ZerothOrderSAM(probes)  # type: ignore[arg-type]
    for mu in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="mu must be finite and > 0"):
            ZerothOrderSAM(mu=mu)
    for wrong in ({"seed": "s"}, {"seed": True}, {"mu": "s"}):
        with pytest.raises(TypeError, match=f"ZerothOrderSAM: {next(iter(wrong))} must be a"):
            ZerothOrderSAM(**wrong)  # type: ignore[arg-type]
    model = network().double()
    zeroth = ZerothOrderSAM()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, interval=2, variant=zeroth)
    watched, bits = Watched(model), all_bits(model)
    with pytest.raises(RuntimeError, match="call estimate"):
        opt.step(closure_of(model, X))
    assert unchanged(model, bits)

    def breaks() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        zeroth.estimate(opt, breaks)
    assert unchanged(model, bits)
    with pytest.raises(TypeError, match="whose variant it is, not SGD"):
        zeroth.estimate(opt.base_optimizer, watched)  # type: ignore[arg-type]
    for variant in (None, ZerothOrderSAM()):
        with pytest.raises(ValueError, match="this is not the optimizer's variant"):
            zeroth.estimate(SAM(model.parameters(), torch.optim.SGD, lr=LR, variant=variant), watched)
    with pytest.raises(TypeError, match="must be a function"):
        zeroth.estimate(opt, 1.0)  # type: ignore[arg-type]
    assert not watched.at
    for returned, found in ((1.0, "float"), (None, "NoneType"), (torch.ones(2), r"shape \(2,\)")):
        with pytest.raises(TypeError, match=f"must return a scalar tensor, not .*{found}"):
            zeroth.estimate(opt, lambda returned=returned: returned)
        assert unchanged(model, bits)
    zeroth.estimate(opt, lambda: watched() * float("inf"))  # an overflow skips the step, as one of a first gradient does
    opt.step(closure_of(model, X))
    assert unchanged(model, bits)
    assert opt.skipped_steps == 1
    watched.at.clear()
    zeroth.estimate(opt, watched)  # of two steps the second has no ascent
    assert not watched.at
    opt.step(closure_of(model, X))
    zeroth.estimate(opt, watched)
    opt.first_step()
    with pytest.raises(RuntimeError, match="while perturbed"):
        zeroth.estimate(opt, watched)
    opt.abandon()


def test_parts_of_a_tensor_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    p, zeroth, keys = nn.Parameter(torch.zeros(3)), ZerothOrderSAM(), set()
    for part in (0, 1):
        monkeypatch.setattr(distributed, "part_number", lambda _, part=part: part)
        keys |= {zeroth._key(p, index, probe) for index in (0, 1) for probe in (0, 1)}
    assert len(keys) == 8
