"""Is it SAM: the size and direction of the perturbation, and what the step is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure, NotApplicable, conformance
from fastpost.conformance.subject import (
    Seen,
    Subject,
    Twin,
    differentiate,
    differing,
    expect_bits,
    expect_close,
    loss_of,
    network,
    randomise,
)
from fastpost.conformance.subject import batch as batch_of


def expect_perturbation(subject: Subject, seen: Seen, radii: Mapping[str, float] | None = None) -> None:
    """Compares the weights of the second pass with w + e in float64.

    One unit in the last place of w + e is allowed for storing it, and 1e-5 of |e| for float32 norms and products.

    Args:
        radii: of every parameter, by name; None: the subject's rho for all.
    """
    names = list(seen.before)
    weights = [seen.before[n].double() for n in names]
    grads = [None if (g := seen.first_grads[n]) is None else g.double() for n in names]
    radii = dict.fromkeys(names, subject.rho) if radii is None else radii
    at = {rho: subject.adapter.perturbation(weights, grads, rho) for rho in radii.values()}
    wanted = [e[k] for k, name in enumerate(names) if (e := at[radii[name]]) is not None]
    if not wanted:
        for name, g in zip(names, grads, strict=True):
            if g is None and differing({name: seen.before[name]}, {name: seen.perturbed[name]}):
                raise Failure(f"{name} has no gradient and was perturbed")
        return
    asked = torch.cat([e.flatten() for e in wanted])
    done = torch.cat([(seen.perturbed[n].double() - w).flatten() for n, w in zip(names, weights, strict=True)])
    where = torch.cat([(w + e).flatten() for w, e in zip(weights, wanted, strict=True)])
    ulp = torch.finfo(seen.before[names[0]].dtype).eps * where.abs()
    if bool(((done - asked).abs() <= ulp + 1e-5 * asked.abs().max()).all()):
        return
    cosine = float(torch.nn.functional.cosine_similarity(done, asked, dim=0))
    raise Failure(f"|e| is {float(done.norm()):.4g} where {float(asked.norm()):.4g} was asked for, at cosine {cosine:.3f}")


def _formula(subject: Subject) -> None:
    if subject.adapter.perturbation([torch.ones(1)], [torch.ones(1)], 1.0) is None:
        raise NotApplicable("it documents no radius to compare with")


@conformance("perturbation")
def perturbation(adapter: Adapter) -> None:
    """The second pass runs at w + rho g/|g|, one norm over all tensors and groups, compared in float64."""
    for rho in (0.3, 1e-3):
        model = network()
        groups = [{"params": list(model.inner.parameters())}, {"params": [*model.outer.parameters()]}]
        groups.append({"params": [*model.left.parameters(), *model.right.parameters()]})
        subject = Subject(adapter, rho=rho, model=model, params=groups)
        _formula(subject)
        for _ in range(3):
            expect_perturbation(subject, subject.step())


@conformance("group options")
def group_options(adapter: Adapter) -> None:
    """Every group is stepped with its own learning rate and perturbed with its own rho, under one norm."""
    usual = getattr(Subject(adapter).opt, "param_groups", ())
    if not usual or any(key not in group for group in usual for key in ("lr", "rho")):
        raise NotApplicable("its groups hold no lr and rho of their own")
    own = {"inner": {"lr": 0.1, "rho": 0.3}, "outer": {"lr": 0.02, "rho": 0.05}, "left": {"lr": 0.3}, "right": {"rho": 0.9}}

    def groups(model: nn.Module, *keys: str) -> list[dict[str, Any]]:
        given = {part: {key: value for key, value in own[part].items() if key in keys} for part in own}
        return [{"params": list(model.get_submodule(part).parameters()), **given[part]} for part in own]

    model = network()
    subject = Subject(adapter, model=model, params=groups(model, "lr", "rho"))
    twin = Twin(subject, lambda model: groups(model, "lr"))
    radii = {name: own[name.partition(".")[0]].get("rho", subject.rho) for name, _ in model.named_parameters()}
    for _ in range(3):
        seen = subject.step()
        expect_perturbation(subject, seen, radii)
        expect_close(seen.after, twin.step(seen.second_grads), "another step than with the learning rate of each group")


@conformance("second gradient")
def second_gradient(adapter: Adapter) -> None:
    """The step is the base optimizer's from w with the gradient at w + e, within 1e-6."""
    subject = Subject(adapter, torch.optim.AdamW)
    twin = Twin(subject)
    for _ in range(3):
        seen = subject.step()
        if not differing(seen.perturbed, seen.before):
            raise Failure("the second pass ran at unperturbed weights")
        expect_close(seen.after, twin.step(seen.second_grads), "another step than the base optimizer's from w")


@conformance("rho zero")
def rho_zero(adapter: Adapter) -> None:
    """With rho = 0 it is the base optimizer, bit for bit."""
    subject = Subject(adapter, torch.optim.AdamW, rho=0.0)
    twin = Twin(subject)
    for _ in range(5):
        seen = subject.step()
        expect_bits(seen.perturbed, seen.before, "rho = 0 moves the weights")
        expect_bits(seen.after, twin.step(seen.second_grads), "another step than the base optimizer's")


@conformance("zero gradient")
def zero_gradient(adapter: Adapter) -> None:
    """An all-zero first gradient perturbs nothing and gives no NaN."""
    subject = Subject(adapter)
    twin = Twin(subject)

    def nothing() -> Tensor:
        return differentiate(loss_of(subject.model, batch_of()) * 0)

    seen = subject.step(first=nothing)
    expect_bits(seen.perturbed, seen.before, "a zero gradient moves the weights")
    expect_close(seen.after, twin.step(seen.second_grads), "another step than the base optimizer's")


@conformance("accumulation")
def accumulation(adapter: Adapter) -> None:
    """Two micro-batches in each pass make the step of the whole batch."""
    micro, full = Subject(adapter), Subject(adapter)

    def both() -> Tensor:
        x, y = batch_of(micro.number)
        total = torch.zeros(())
        for part in (slice(0, 4), slice(4, 8)):
            total += differentiate(loss_of(micro.model, (x[part], y[part])) / 2)
        return total

    for _ in range(3):
        a, b = micro.step(first=both, second=both), full.step()
        expect_close(a.perturbed, b.perturbed, "perturbed weights differ from those of the whole batch")
        expect_close(a.after, b.after, "the step differs from that of the whole batch")


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 3)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.again(torch.tanh(self.inner(x)))))
        return y


@conformance("tied parameters")
def tied_parameters(adapter: Adapter) -> None:
    """A tensor used twice is perturbed once, by the sum of its gradients, and restored."""
    with torch.random.fork_rng(devices=[]):
        model = _Tied()
    randomise(model)
    subject = Subject(adapter, model=model, lr=0.0)
    for _ in range(3):
        seen = subject.step()
        expect_perturbation(subject, seen)
        expect_close(seen.after, seen.before, "not restored")
    if model.again.weight is not model.inner.weight:
        raise Failure("the tie is broken")


@conformance("added parameters")
def added_parameters(adapter: Adapter) -> None:
    """A group added between steps is perturbed under the same norm, and stepped."""
    subject = Subject(adapter)
    model = subject.model
    assert isinstance(model, type(network()))
    held = [p for n, p in model.named_parameters() if not n.startswith("right")]
    subject.opt = adapter.make(held, subject.base, rho=subject.rho, **subject.kwargs)
    for p in model.right.parameters():
        p.requires_grad_(False)
    subject.step()
    for p in model.right.parameters():
        p.requires_grad_(True)
    subject.opt.add_param_group({"params": list(model.right.parameters())})
    twin = Twin(subject)  # SGD: a fresh one knows as much
    seen = subject.step()
    if not differing({"w": seen.perturbed["right.weight"]}, {"w": seen.before["right.weight"]}):
        raise Failure("the added group is not perturbed")
    expect_perturbation(subject, seen)
    expect_close(seen.after, twin.step(seen.second_grads), "another step than the base optimizer's")


@conformance("frozen parameters")
def frozen_parameters(adapter: Adapter) -> None:
    """A parameter frozen between steps is left alone, and taken up again when thawed."""
    subject = Subject(adapter)
    model = subject.model
    assert isinstance(model, type(network()))
    twin = Twin(subject)
    for frozen in (False, True, False):
        for p in model.right.parameters():
            p.requires_grad_(not frozen)
        seen = subject.step()
        expect_perturbation(subject, seen)
        expect_close(seen.after, twin.step(seen.second_grads), "another step than the base optimizer's")
        if frozen and differing({"w": seen.perturbed["right.weight"]}, {"w": seen.before["right.weight"]}):
            raise Failure("a frozen parameter was perturbed")
