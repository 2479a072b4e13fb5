"""Random sequences of calls, compared bit by bit with a plain model of what the weights must be.

`python -m tests.sanitized tests/test_sam_fuzz.py` runs 2,000 sequences with the core under AddressSanitizer;
FASTPOST_SEQUENCES sets another number (of all forms), --hypothesis-seed another choice.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.sam import GSAM

from .conftest import same_bits

SEQUENCES = int(os.environ.get("FASTPOST_SEQUENCES", "100"))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DTYPES = {
    "stored": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    "GSAM": [torch.float32, torch.float64],
    "fused_restore": [torch.float32, torch.float64],
    "functional": [torch.float32, torch.float64],
    "stochastic": [torch.bfloat16, torch.float16],
    "masters": [torch.bfloat16, torch.float32],  # in float32 no step can be made
    "codes": [torch.float32],  # w is told from w + e, so nobody may write or convert weights between the passes
    "codes in 16 bits": [torch.bfloat16],
    "fused_restore from codes": [torch.float32],
}


SPOILT = st.sampled_from([None, None, None, None, float("nan"), float("inf")])


class Boom(Exception):
    """The user's own."""


class Filters(nn.Module):
    """A linear layer whose weight has four dimensions, so that it can be channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.reshape(3, 8).t()


class Net(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        first = nn.Linear(8, 3, bias=False) if form == "functional" else Filters()
        self.layers = nn.ModuleList([first, nn.Linear(3, 2), nn.Linear(2, 2)])
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.to(DTYPES[form][0])

    def forward(self, depth: int) -> Tensor:
        x = X
        for layer in self.layers[:depth]:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x.double().square().sum()


def alike(t: Tensor, like: Tensor) -> Tensor:
    """A copy of `t` in memory of its own with the strides of `like`."""
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype).copy_(t)


def everything(params: list[nn.Parameter]) -> list[object]:
    """All bytes of weights and gradients, and how they lie."""
    tensors = [t for p in params for t in (p, p.grad) if t is not None]
    return [(t.dtype, t.shape, t.stride(), bytes(t.untyped_storage())) for t in tensors]


# What the running sequence has done so far, for whoever finds the process dead: an invalid write ends it on the spot.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "trace")
TRACE = (Path(os.environ["FASTPOST_TRACE"]) / f"{WORKER}.txt").open("w") if "FASTPOST_TRACE" in os.environ else None


COUNT = itertools.count(1)


def trace(name: str, *args: object) -> None:
    if TRACE is not None:
        TRACE.write(f"{name}{args}\n")
        TRACE.flush()


class Steps(RuleBasedStateMachine):
    """SAM of one form around a small model, and a twin: a plain optimizer whose parameters are what w must be."""

    form: str

    @initialize(reference=st.sampled_from([False, False, False, True]), starts=st.sampled_from([2, 3, 1, 0]))
    def build(self, reference: bool, starts: int) -> None:
        if TRACE is not None:
            TRACE.seek(0)
            TRACE.truncate()
        form = self.form
        self.fused = form.startswith("fused_restore")
        trace(f"sequence {next(COUNT)}: build", form, reference, starts)
        self.backend = fastpost.use_backend("reference" if reference else None)
        self.backend.__enter__()
        self.model = Net(form)
        self.params = list(self.model.parameters())
        known = self.params[:3]  # the last layer comes later
        self.masters = [p.detach().float() for p in known] if form == "masters" else []
        options: dict[str, dict[str, Any]] = {
            "stochastic": {"rounding": "stochastic"},
            "masters": {"master_params": self.masters},
            "functional": {"perturb": "functional", "model": self.model},
            "fused_restore": {"fused_restore": True},
            "codes": {"stash": "ulp"},
            "codes in 16 bits": {"stash": "ulp"},
            "fused_restore from codes": {"stash": "ulp", "fused_restore": True},
            "GSAM": {"variant": GSAM(0.5)},
        }
        base: Any = torch.optim.AdamW if self.fused else torch.optim.SGD
        more = {"lr": 0.05} if self.fused else {"lr": 0.05, "momentum": 0.9}
        # Radii are shares of this one. A float32 code reaches weights above 256 |e|: some here, and some are listed.
        self.rho = 0.02 if "codes" in form and DTYPES[form] == [torch.float32] else 0.5
        self.opt = SAM(known, base, rho=self.rho, **more, **options.get(form, {}))
        self.twins = [t.detach().clone() for t in (self.masters or self.params)]
        self.plain: torch.optim.Optimizer = base(self.twins[:3], **more)
        self.casts = [p.detach().clone() for p in known] if self.masters else []
        self.known = 3
        self.open = self.armed = self.bad = False
        self.perturbed: dict[int, torch.dtype] = {}  # with the dtype that each was perturbed in
        self.saved: tuple[Any, Any, int] | None = None
        if starts:  # most of what can go wrong begins here
            self.backward(starts)
            self.first(zero_grad=starts != 1, spoil=None)

    def teardown(self) -> None:
        if hasattr(self, "backend"):
            self.backend.__exit__(None, None, None)

    # -- what must be ------------------------------------------------------------------------------------------------------

    def expected(self, i: int) -> Tensor:
        """What the i-th weight must be where it is not perturbed."""
        return self.casts[i] if self.masters else self.twins[i]

    @invariant()
    def w_is_what_it_must_be(self) -> None:
        assert self.opt.is_perturbed == self.open
        for i, p in enumerate(self.params[: self.known]):
            if i not in self.perturbed:
                assert same_bits(p, self.expected(i)), (self.form, i)

    def changed(self) -> bool:
        """Whether a weight has become what w does not fit into."""
        return any(self.params[i].dtype != dtype for i, dtype in self.perturbed.items())

    def closed(self) -> None:
        """w is back."""
        self.open = False
        self.perturbed = {}

    def given_up(self) -> None:
        self.armed = self.bad = False

    def convert(self, i: int) -> None:
        """The twin of a weight that is not perturbed follows its dtype and strides."""
        kept = self.casts if self.masters else self.twins
        if i < len(kept) and i not in self.perturbed:
            kept[i].data = alike(kept[i].to(self.params[i].dtype), self.params[i])

    def relay(self, i: int) -> None:
        """The twin lies as its weight does, so that the plain optimizer adds up in the same order."""
        if not self.masters and self.twins[i].stride() != self.params[i].stride():
            self.twins[i].data = alike(self.twins[i], self.params[i])

    def reload(self) -> None:
        """AdamW cannot step with moments of another dtype than the weights'; this is how users convert them."""
        if self.fused and not self.open:
            self.opt.load_state_dict(self.opt.state_dict())
            self.plain.load_state_dict(self.plain.state_dict())

    def step_twin(self) -> None:
        """What the plain optimizer makes of the gradients that SAM's base optimizer has used."""
        grads = [p.grad for p in self.params[: self.known]]
        finite = all(bool(torch.isfinite(g).all()) for g in grads if g is not None)
        skipped = self.armed and (self.bad or not finite)
        for twin, g in zip(self.twins, grads, strict=False):
            twin.grad = None if g is None else alike(g.to(twin.dtype) if self.masters else g, g)
        if not skipped:
            self.plain.step()
        self.closed()
        self.given_up()
        if self.fused:
            self.compare_adamw()
        for i, (m, twin) in enumerate(zip(self.masters, self.twins, strict=False)):
            assert same_bits(m, twin)
            self.casts[i] = twin.to(self.params[i].dtype, copy=True)

    def compare_adamw(self) -> None:
        """fused_restore is AdamW's step within rounding; then the twin takes its bits, so that nothing adds up."""
        for p, twin in zip(self.params[: self.known], self.twins, strict=False):
            mine, theirs = self.opt.state.get(p, {}), self.plain.state.get(twin, {})
            assert mine.keys() == theirs.keys()
            for a, b in ((p.detach(), twin), *((mine[key], theirs[key]) for key in mine)):
                rtol, atol = (1e-12, 1e-13) if a.dtype == torch.float64 else (1e-5, 1e-6)
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
                b.copy_(a)

    # -- passes ------------------------------------------------------------------------------------------------------------

    def grads(self) -> list[int]:
        return [i for i, p in enumerate(self.params[: self.known]) if p.grad is not None]

    def usable(self, depth: int) -> int:
        """How deep the model is run, so that something has a gradient."""
        return depth if depth == 2 or any(p.requires_grad for p in self.model.layers[:depth].parameters()) else 2

    def backward(self, depth: int) -> Tensor:
        loss = self.model(self.usable(depth))
        loss.backward()
        return loss.detach()

    @rule(depth=st.sampled_from([2, 2, 1, 3]), fresh=st.booleans())
    def a_pass(self, depth: int, fresh: bool) -> None:
        trace("a_pass", depth, fresh)
        if fresh or self.form == "functional":  # which wants to see every layer called that has a gradient
            self.zero(set_to_none=True)
        self.backward(depth)

    def zero(self, set_to_none: bool) -> None:
        self.opt.zero_grad(set_to_none=set_to_none)
        if not self.open:
            self.given_up()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        trace("zero_grad", set_to_none)
        self.zero(set_to_none)

    @rule(i=st.integers(0, 4))
    def delete_gradient(self, i: int) -> None:
        trace("delete_gradient", i)
        self.params[i].grad = None

    @rule(i=st.integers(0, 2), value=st.sampled_from([float("nan"), float("inf")]))
    @precondition(lambda self: self.armed and self.grads())
    def spoil_second_gradient(self, i: int, value: float) -> None:
        trace("spoil_second_gradient", i, value)
        grad = self.params[self.grads()[i % len(self.grads())]].grad
        assert grad is not None
        grad[(0,) * grad.ndim] = value

    @rule(depth=st.sampled_from([2, 3, 1]), zero_grad=st.booleans(), spoil=SPOILT)
    @precondition(lambda self: not self.open)
    def ascend(self, depth: int, zero_grad: bool, spoil: float | None) -> None:
        trace("ascend", depth, zero_grad, spoil)
        if self.form == "functional":
            self.zero(set_to_none=True)
        self.backward(depth)
        self.first(zero_grad, spoil)

    @rule(zero_grad=st.booleans(), spoil=SPOILT)
    def first_step(self, zero_grad: bool, spoil: float | None) -> None:
        trace("first_step", zero_grad, spoil)
        self.first(zero_grad, spoil)

    def first(self, zero_grad: bool, spoil: float | None) -> None:
        if self.open:
            self.refused(RuntimeError, "twice", lambda: self.opt.first_step(zero_grad))
            return
        grads = self.grads()
        if spoil is not None and grads:
            grad = self.params[grads[0]].grad
            assert grad is not None
            grad[(0,) * grad.ndim] = spoil
        if not grads:
            self.refused(RuntimeError, "has a gradient", lambda: self.opt.first_step(zero_grad))
            self.given_up()
        elif self.cannot_ascend():
            self.refused(ValueError, "a master has dtype", lambda: self.opt.first_step(zero_grad))
            self.given_up()
        else:
            ascent = {i: self.params[i].grad.double() for i in grads}  # type: ignore[union-attr]
            self.opt.first_step(zero_grad)
            self.ascended(ascent)

    def cannot_ascend(self) -> bool:
        """Whether a weight and its master are no pair any more."""
        return bool(self.masters) and any(p.dtype != torch.bfloat16 for p in self.params[: self.known])

    def ascended(self, ascent: dict[int, Tensor]) -> None:
        """The weights are w + e, within the rounding of their dtype."""
        squared = sum(float(g.square().sum()) for g in ascent.values())
        self.bad |= not (squared < float("inf"))
        self.open = self.armed = True
        if self.form == "functional":
            return
        self.perturbed = {i: self.params[i].dtype for i in ascent}
        group_of = {id(p): group for group in self.opt.base_optimizer.param_groups for p in group["params"]}
        for i, g in ascent.items():
            p, twin = self.params[i].detach(), self.twins[i].double()
            group = group_of[id(self.masters[i] if self.masters else self.params[i])]
            sign = -1.0 if group["maximize"] else 1.0
            e = sign * group["rho"] * g / squared**0.5 if 0 < squared < float("inf") else torch.zeros_like(g)
            unit = {torch.float64: 2.0**-50, torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[
                p.dtype
            ]
            assert ((p.double() - (twin + e)).abs() <= unit * (twin.abs() + e.abs()) + 1e-6 * (unit > 1e-9)).all()

    # -- ways to end a step ------------------------------------------------------------------------------------------------

    def refused(self, error: type[Exception], words: str, call: Callable[[], object]) -> None:
        """The call raises and changes no bit."""
        before = everything(self.params)
        with pytest.raises(error, match=words):
            call()
        assert everything(self.params) == before

    def ended(self, call: Callable[[], object]) -> bool:
        """Ends the perturbation, or sees it refused; says which."""
        if self.changed():
            self.refused(RuntimeError, r"cannot be put back into it bit for bit. opt.abandon\(\)", call)
            return False
        call()
        return True

    def cannot_step(self) -> bool:
        """Plain steps with gradients that are not finite would make the rest of the sequence NaN."""
        grads = [self.params[i].grad for i in self.grads()]
        return not self.armed and not all(bool(torch.isfinite(g).all()) for g in grads if g is not None)

    @rule(second=st.booleans())
    def step(self, second: bool) -> None:
        trace("step", second)
        if second and not self.open:
            self.refused(RuntimeError, "without first_step", self.opt.second_step)
            return
        if self.cannot_step():
            self.zero(set_to_none=True)
        if self.ended(self.opt.second_step if second else self.opt.step):
            self.step_twin()

    @rule()
    @precondition(lambda self: self.open)
    def restore(self) -> None:
        trace("restore")
        if self.ended(self.opt.restore_):
            self.closed()

    @rule()
    @precondition(lambda self: self.open)
    def end_ascent(self) -> None:
        trace("end_ascent")
        if self.ended(self.opt.end_ascent):
            self.closed()

    @rule(depth=st.sampled_from([2, 3, 1]), second=st.booleans())
    @precondition(lambda self: self.open)
    def descend(self, depth: int, second: bool) -> None:
        trace("descend", depth, second)
        self.zero(set_to_none=True)
        self.backward(depth)
        if self.ended(self.opt.second_step if second else self.opt.step):
            self.step_twin()

    @rule()
    @precondition(lambda self: self.open or self.armed)
    def abandon(self) -> None:
        trace("abandon")
        self.opt.abandon()
        self.abandoned()

    def abandoned(self) -> None:
        self.given_up()
        perturbed = list(self.perturbed)
        self.closed()
        for i in perturbed:
            self.convert(i)
        assert all(p.grad is None for p in self.params[: self.known])
        self.w_is_what_it_must_be()
        self.reload()

    @rule(depth=st.sampled_from([2, 1, 3]), fails=st.sampled_from([0, 0, 0, 1, 2]))
    def step_with_a_closure(self, depth: int, fails: int) -> None:
        trace("step_with_a_closure", depth, fails)
        passes = 0

        def closure() -> Tensor:
            nonlocal passes
            passes += 1
            loss = self.backward(depth)
            if passes == fails:
                raise Boom
            return loss

        if self.open:
            self.refused(RuntimeError, "while perturbed", lambda: self.opt.step(closure))
            return
        self.given_up()
        if self.cannot_ascend():
            with pytest.raises(Boom if fails == 1 else ValueError, match=None if fails == 1 else "a master has dtype"):
                self.opt.step(closure)
            return
        if fails:
            with pytest.raises(Boom):
                self.opt.step(closure)
            return
        self.opt.step(closure)
        self.armed = True
        self.step_twin()

    @rule(depth=st.sampled_from([2, 1, 3]), ends=st.sampled_from(["", "", "step", "raise", "raise before"]))
    def a_context(self, depth: int, ends: str) -> None:
        trace("a_context", depth, ends)
        if self.open:
            self.refused(RuntimeError, "twice", lambda: self.opt.perturbed().__enter__())
            return
        self.zero(set_to_none=True)
        self.backward(depth)
        if self.cannot_ascend():
            self.refused(ValueError, "a master has dtype", lambda: self.opt.perturbed().__enter__())
            return
        try:
            with self.opt.perturbed():
                if ends == "raise before":
                    raise Boom
                self.backward(depth)
                if ends == "raise":
                    raise Boom
                if ends == "step":
                    self.opt.step()
        except Boom:
            self.given_up()
            return
        self.armed = True
        if ends == "step":
            self.step_twin()

    # -- models that change ------------------------------------------------------------------------------------------------

    @rule(layer=st.integers(0, 2), choice=st.integers(0, 3))
    def to_dtype(self, layer: int, choice: int) -> None:
        trace("to_dtype", layer, choice)
        dtype = DTYPES[self.form][choice % len(DTYPES[self.form])]
        chosen = self.model.layers[layer]
        before = {id(p) for p in chosen.parameters() if p.dtype != dtype}
        chosen.to(dtype)
        for i, p in enumerate(self.params):
            if id(p) in before:
                self.convert(i)
        if before and self.fused and self.open:
            if self.changed():
                self.refused(RuntimeError, "abandon", self.opt.second_step)
            self.opt.abandon()
            self.abandoned()
        elif before:
            self.reload()

    @rule(kind=st.sampled_from(["channels_last", "contiguous", "transposed", "clone", "gaps"]), i=st.integers(0, 4))
    def to_layout(self, kind: str, i: int) -> None:
        trace("to_layout", kind, i)
        p = self.params[i]
        if kind == "channels_last":
            self.model.to(memory_format=torch.channels_last)
        elif kind == "contiguous":
            self.model.to(memory_format=torch.contiguous_format)
        elif kind == "clone":
            old, p.data = p.data, p.data.clone()
            old.fill_(7)  # nothing more may be read from there
        elif kind == "transposed":
            reverse = list(range(p.ndim))[::-1]
            p.data = p.data.permute(reverse).contiguous().permute(reverse)
        else:
            room = torch.full((*p.shape, 2), 7.0, dtype=p.dtype)
            p.data = room[..., 0].copy_(p.data)
        for k in range(len(self.twins)):
            self.relay(k)

    @rule(kind=st.sampled_from(["freed", "tied", "expanded", "shorter", "empty"]), which=st.integers(0, 4))
    @precondition(lambda self: self.perturbed and "codes" not in self.form)
    def spoil_a_weight(self, kind: str, which: int) -> None:
        trace("spoil_a_weight", kind, which)
        rows = [i for i in self.perturbed if self.params[i].numel() > 1]
        p = self.params[rows[which % len(rows)]]
        others = [q for i in rows if (q := self.params[i]) is not p and q.dtype == p.dtype and q.numel() >= p.numel()]
        if kind == "freed":
            p.untyped_storage().resize_(0)
        elif kind == "tied" and others and all(q.is_contiguous() for q in others):
            p.data = others[0].data.view(-1)[: p.numel()].view(p.shape)
        elif kind == "expanded":
            p.data = p.data[:1].clone().expand(p.shape)
        elif kind == "empty":
            p.data = p.data.new_empty(0)
        else:
            p.data = p.data.reshape(-1)[:1].clone()
        self.refused(RuntimeError, "abandon", self.opt.second_step)
        self.opt.abandon()
        self.abandoned()
        for k in range(len(self.twins)):
            self.relay(k)

    @rule(i=st.integers(0, 2))
    def freeze(self, i: int) -> None:
        trace("freeze", i)
        p = self.params[i]
        p.requires_grad_(not p.requires_grad)
        if not any(q.requires_grad for q in self.params[:3]):
            p.requires_grad_(True)

    # -- groups and states -------------------------------------------------------------------------------------------------

    @rule(through_base=st.booleans(), maximize=st.booleans())
    @precondition(lambda self: self.known == 3)
    def add_param_group(self, through_base: bool, maximize: bool) -> None:
        trace("add_param_group", through_base, maximize)
        new = {"params": self.params[3:], "maximize": maximize}
        if self.masters:
            return
        if self.open and not through_base:
            self.refused(RuntimeError, "while the weights are perturbed", lambda: self.opt.add_param_group(new))
            return
        for p in self.params[3:]:
            p.grad = None
        (self.opt.base_optimizer if through_base else self.opt).add_param_group(new)
        for p, twin in zip(self.params[3:], self.twins[3:], strict=True):
            twin.data = alike(p.detach(), p)
        self.plain.add_param_group({"params": self.twins[3:], "maximize": maximize})
        self.known = 5
        self.reload()

    @rule(group=st.integers(0, 1), rho=st.sampled_from([0.0, 0.2, 1.0]), maximize=st.booleans())
    def set_values(self, group: int, rho: float, maximize: bool) -> None:
        trace("set_values", group, rho, maximize)
        group %= len(self.opt.param_groups)
        self.opt.param_groups[group].update(rho=rho * self.rho, maximize=maximize)
        self.plain.param_groups[group]["maximize"] = maximize

    @rule(value=st.sampled_from([-0.1, float("nan"), float("inf"), "0.1", None]))
    @precondition(lambda self: not self.open)
    def nonsense(self, value: Any) -> None:
        trace("nonsense", value)
        group = self.opt.param_groups[0]
        before, group["rho"] = group["rho"], value
        self.refused((ValueError, TypeError), "rho", self.opt.first_step)  # type: ignore[arg-type]
        self.given_up()
        group["rho"] = before

    @rule(duplicate=st.booleans())
    def save(self, duplicate: bool) -> None:
        trace("save", duplicate)
        if self.open:
            call = self.opt.state_dict if not duplicate else lambda: copy.deepcopy(self.opt)
            self.refused(RuntimeError, "while the weights are perturbed", call)
            return
        if duplicate and self.form not in ("functional", "masters"):
            copy.deepcopy(self.opt)
        self.saved = copy.deepcopy(self.opt.state_dict()), copy.deepcopy(self.plain.state_dict()), self.known

    @rule()
    @precondition(lambda self: self.saved is not None)
    def load(self) -> None:
        trace("load")
        mine, theirs, known = self.saved
        if self.open:
            self.refused(RuntimeError, "while the weights are perturbed", lambda: self.opt.load_state_dict(mine))
        elif known != self.known:
            self.refused(ValueError, "parameter groups", lambda: self.opt.load_state_dict(mine))
        else:
            self.opt.load_state_dict(copy.deepcopy(mine))
            self.plain.load_state_dict(copy.deepcopy(theirs))


@pytest.mark.filterwarnings("ignore:SAM. fused_restore=True cannot serve")
@pytest.mark.filterwarnings("ignore:SAM. 10 steps in a row were the base optimizer's alone")
@pytest.mark.parametrize("form", DTYPES)
def test_random_sequences(form: str) -> None:
    run_state_machine_as_test(
        type("Steps", (Steps,), {"form": form}),
        settings=settings(
            max_examples=max(1, SEQUENCES // len(DTYPES)), stateful_step_count=25, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("form", [form for form in DTYPES if "codes" in form])
def test_sequences_have_weights_with_a_code_and_weights_in_the_list(form: str) -> None:
    steps = type("Steps", (Steps,), {"form": form})()
    steps.build(reference=False, starts=2)
    (bucket,) = steps.opt._ascent_buckets._buckets
    listed, weights = int(bucket.bucket.codes.words[0]), sum(steps.params[i].numel() for i in steps.perturbed)
    assert 0 < listed < weights
    steps.teardown()
