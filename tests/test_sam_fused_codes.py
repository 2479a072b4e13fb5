"""AdamW's step from codes, SAM(stash="ulp", fused_restore=True): the bits of the same step from a copy of w."""

from __future__ import annotations

import math
import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM, dispatch, use_backend
from fastpost.backends import cpu, native, reference, triton
from fastpost.backends.serving import refusal
from fastpost.ops import params as ops
from fastpost.plan import AdamWPart
from fastpost.sam import GSAM

from .conftest import CPU_BACKENDS, DTYPES, same_bits
from .interrupts import interrupted
from .small import X, all_bits, closure_of, loss_of, network, unchanged
from .test_sam_fused import saying
from .test_sam_stash import LAYOUTS, every_kind, heavy

STASHES = ("copy", "ulp")


def sam(params: Any, stash: str, base_optimizer: Any = torch.optim.AdamW, **options: Any) -> SAM:
    lr = {} if params is None else {"lr": 1e-2}
    return SAM(params, base_optimizer, **{**lr, "stash": stash, "fused_restore": True, **options})


def state_of(opt: SAM) -> list[Tensor]:
    """Weights, moments and step counts."""
    params = opt.tensors()
    moments = [value for p in params for value in opt.state.get(p, {}).values()]
    return [p.detach().clone() for p in params] + [m.clone() for m in moments]


def alike(columns: dict[str, list[Tensor]]) -> bool:
    copied, coded = (columns[stash] for stash in STASHES)
    return len(copied) == len(coded) and all(map(same_bits, copied, coded))


def keeps_codes(opt: SAM) -> bool:
    """Whether no list has become so long that a copy took its place."""
    return all(b.bucket.codes is not None for b in opt._ascent_buckets._buckets)


@pytest.mark.parametrize(
    "options", [{}, {"adaptive": True, "eta": 0.01, "maximize": True}, {"rounding": "stochastic"}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_have_the_bits_of_steps_from_a_copy(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Over every kind of number: steps beside lists that are short, long and made longer, from rho 1e-6 to 10."""
    if dtype == torch.float32 and "rounding" in options:
        options = {"weight_decay": 0.3, "betas": (0.8, 0.95)}
    kinds = every_kind(dtype)
    kinds = torch.where(kinds.abs() < 1e15, kinds, 0) if options.get("adaptive") else kinds  # or t |g| is not finite
    start = [kinds, kinds[:131].reshape(131, 1), torch.zeros(70, 3, dtype=dtype), kinds[5], kinds[:0]]
    cases = ((1e-6, 0.0), (10.0, 3.0), (0.05, 0.0), (0.05, 3.0))
    for rho, spread in cases[:2] if backend == "triton" else cases:  # whose interpreter is slow
        found: dict[str, list[Tensor]] = {}
        listed = 0
        for stash in STASHES:
            params = [nn.Parameter(torch.zeros_like(w)) for w in start]
            opt = sam(params, stash, rho=rho, compute_dtype=dtype, **options)
            torch.manual_seed(8)
            for ends in (opt.step, opt.first_step, opt.second_step):
                for p in params:
                    p.grad = heavy(p.shape, dtype, spread if ends == opt.first_step else 0.0)
                ends()
                if ends == opt.step:  # there are moments now
                    for p, w in zip(params, start, strict=True):
                        p.data.copy_(w)
            if stash == "ulp":
                assert keeps_codes(opt)
                (b,) = opt._ascent_buckets._buckets
                assert b.bucket.codes is not None
                listed = int(b.bucket.codes.words[0])
            assert not opt.is_perturbed
            found[stash] = state_of(opt)
        assert alike(found)
        assert listed or rho < 1e-3 or dtype == torch.float16  # which has few numbers for a distance to jump over
        assert all(map(same_bits, found["ulp"], start)) == (opt.skipped_steps == 1)  # float16's first gradient may overflow


def split(model: nn.Sequential) -> list[dict[str, Any]]:
    first, *others = model.named_parameters()
    return [{"params": [first], "lr": 1e-3}, {"params": others, "weight_decay": 0.3}]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": ["0.*", "3.bias"]},
        {"variant": "gsam"},
        {"interval": 2},
        {"adaptive": True, "fused": True},
        {"skips": True},
    ],
    ids=str,
)
def test_training_is_that_from_a_copy(backend: str, options: dict[str, Any]) -> None:
    """Groups, buckets of two dtypes, tensors out of scope, a tensor without a second gradient, steps that are skipped."""
    found = {}
    skips = options.pop("skips", False)
    for stash in STASHES:
        model = network()
        model[3].bfloat16()
        model[2] = nn.Sequential(nn.GELU(), nn.Identity())
        how = {**options, "variant": GSAM(0.5)} if "variant" in options else options
        opt = sam(split(model), stash, rho=0.01, **how)

        def loss(model: nn.Sequential = model) -> Tensor:
            hidden = model[2](model[0](X))
            value = nn.functional.cross_entropy(model[3](hidden.bfloat16()).float(), torch.arange(32) % 3)
            value.backward()
            return value

        with saying(None):
            for number in range(4):
                opt.step(loss)
                opt.zero_grad()
                loss()
                before = all_bits(model)
                opt.first_step(zero_grad=True)
                loss()
                model[0].bias.grad = None
                if skips and number == 2:
                    model[3].weight.grad[0, 0] = math.nan
                opt.second_step()
                assert opt.skipped_steps == int(skips and number >= 2)
                assert not (skips and number == 2) or unchanged(model, before)
                assert torch.equal(all_bits(model)[1], before[1])  # the tensor without a second gradient
        found[stash] = state_of(opt)
    assert alike(found)
    assert keeps_codes(opt)


def test_a_step_is_the_decoded_weights_step(backend: str) -> None:
    """The operation against the two that it stands for: one tensor is stepped, one decoded only, and a flag decodes all."""
    for flag in (0.0, 1.0):
        found = []
        for fused in (False, True):
            torch.manual_seed(3)
            params = [nn.Parameter(torch.randn(70_000)), nn.Parameter(torch.randn(40, 3) * 1e-7)]
            opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.0, stash="ulp")
            for p in params:
                p.grad = torch.randn_like(p)
            opt.first_step()
            bucket = opt._ascent_buckets._buckets[0].bucket
            moments = [[torch.rand_like(p) for p in params] for _ in range(2)]
            counts, how = [torch.tensor(3.0)], (0.1, (0.9, 0.99), 1e-8, 0.1, False, torch.tensor(8.0), torch.tensor(flag))
            if fused:
                bucket.grads = [p.grad for p in params]  # type: ignore[misc]
                bucket.first, bucket.second = moments
                bucket.stashed = True
                ops.run("sam_decode_adamw_", bucket, [AdamWPart(bucket, [*counts, None], *how)])
                assert not bucket.stashed
            else:
                ops.run("sam_decode_", bucket)
                step = [[column[0].detach()] for column in (params, [params[0].grad], params, *moments)]
                (alone,) = ops.make_buckets(**dict(zip(("weights", "grads", "stash", "first", "second"), step, strict=True)))
                ops.run("sam_restore_adamw_", alone, counts, *how)
            found.append([*params, *moments[0], *moments[1]])
        assert all(map(same_bits, *found))


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_list_that_grows_and_a_copy_that_takes_its_place(backend: str, share: float) -> None:
    found = {}
    for stash in STASHES:
        torch.manual_seed(2)
        w = torch.randn(100_000)
        w[: int(share * len(w))] *= 1e-6
        p = nn.Parameter(w)
        opt = sam([p], stash, rho=1e-3)
        for _ in range(3):
            for ends in (opt.first_step, opt.second_step):
                p.grad = torch.randn_like(p)
                ends()
        found[stash] = state_of(opt)
    assert alike(found)


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the CPU core serves no call in this run")
@pytest.mark.parametrize("served", [("cpu", "reference"), ("reference", "cpu")], ids=str)
def test_one_backend_steps_from_what_another_has_written(served: tuple[str, str]) -> None:
    found, w = {}, every_kind(torch.float32)
    for stash in STASHES:
        p = nn.Parameter(w.clone())
        opt = sam([p], stash, rho=0.5)
        torch.manual_seed(2)
        for ends, name in zip((opt.first_step, opt.second_step), served, strict=True):
            p.grad = heavy(p.shape, p.dtype, 3.0)
            with use_backend(name):
                ends()
        found[stash] = state_of(opt)
    assert alike(found)


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="every bucket has one backend in this run")
def test_what_two_backends_serve_is_restored_and_stepped() -> None:
    """The reference serves a weight whose first gradient lay in another order, the core all others: no call steps both."""
    found = {}
    for fused in (False, True):
        torch.manual_seed(4)
        params = [nn.Parameter(torch.randn(30, 20)) for _ in range(2)]
        opt = sam(params, "ulp", rho=0.01, fused_restore=fused)
        with saying("no one backend" if fused else None):
            for ends in (opt.first_step, opt.second_step, opt.first_step, opt.second_step):
                for p in params:
                    p.grad = torch.randn(30, 20)
                if ends == opt.first_step:
                    params[1].grad = torch.randn(20, 30).t()
                ends()
        assert keeps_codes(opt)
        found["ulp" if fused else "copy"] = state_of(opt)
    assert alike(found)


@pytest.mark.parametrize("name", ["channels_last", "transposed", "empty", "scalar", "long"])
def test_whatever_lies_in_another_order(backend: str, name: str) -> None:
    found = {}
    for stash in STASHES:
        torch.manual_seed(4)
        p = nn.Parameter(LAYOUTS[name]())
        others = nn.Parameter(torch.randn(9))
        opt = sam([p, others], stash, rho=0.5)
        with saying(None):
            for ends in (opt.first_step, opt.second_step):
                for q in (p, others):
                    q.grad = torch.randn_like(q)
                ends()
        found[stash] = state_of(opt)
    assert alike(found)


def test_a_second_gradient_of_its_own_layout_is_restored_and_stepped() -> None:
    found = {}
    for stash in STASHES:
        torch.manual_seed(4)
        p = nn.Parameter(torch.randn(40, 30))
        opt = sam([p], stash, rho=0.5)
        with saying("gradients of another memory format"):
            for ends in (opt.first_step, opt.second_step):
                p.grad = torch.randn_like(p) if ends == opt.first_step else torch.randn(30, 40).t()
                ends()
        found[stash] = state_of(opt)
    assert alike(found)


# -- between the passes, and around the step ------------------------------------------------------------------------------


def perturbed() -> tuple[nn.Sequential, SAM, list[Tensor]]:
    model = network()
    opt = sam(model.parameters(), "ulp", rho=0.01)
    opt.step(closure_of(model))
    before = all_bits(model)
    loss_of(model).backward()
    opt.first_step(zero_grad=True)
    loss_of(model).backward()
    assert keeps_codes(opt)
    return model, opt, before


def test_weights_that_were_written_are_refused() -> None:
    model, opt, _ = perturbed()
    with torch.no_grad():
        model[0].bias.mul_(2)
    now = all_bits(model)
    with pytest.raises(RuntimeError, match="was written between the passes"):
        opt.second_step()
    assert unchanged(model, now)


def test_a_hook_before_the_step_that_writes_weights_is_refused() -> None:
    model, opt, before = perturbed()

    def writes(*_: Any) -> None:
        with torch.no_grad():
            model[3].bias.zero_()

    opt.base_optimizer.register_step_pre_hook(writes)
    with pytest.raises(RuntimeError, match="was written between the passes"):
        opt.second_step()
    with pytest.raises(RuntimeError, match="1 weights were written"):
        opt.abandon()
    assert [torch.equal(a, b) for a, b in zip(all_bits(model), before, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize("first", [True, False], ids=["its own optimizer first", "last"])
def test_a_hook_of_another_optimizer_that_writes_weights_is_refused(backend: str, first: bool) -> None:
    """Codes that wait for the step of all are as exposed as those of optimizers to come."""
    torch.manual_seed(0)
    own, other = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    bases = [torch.optim.AdamW([p], lr=0.1) for p in (own, other)]
    opt = sam(None, "ulp", base_optimizer=bases if first else bases[::-1], rho=1e-4, scope=lambda _, p: p is own)
    for ends in (opt.first_step, opt.second_step):
        for p in (own, other):
            p.grad = torch.randn(5)
        if ends == opt.first_step:
            ends()

    def writes(*_: Any) -> None:
        with torch.no_grad():
            own.mul_(2)

    bases[1].register_step_pre_hook(writes)
    perturbed = own.detach().clone()
    with pytest.raises(RuntimeError, match="was written between the passes"):
        opt.second_step()
    assert same_bits(own, perturbed * 2)
    assert opt.is_perturbed


def test_an_error_in_the_second_part_leaves_no_weight_perturbed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say, when the weights of the first dtype are stepped and those of the second still wait."""
    model = network()
    model[3].bfloat16()
    opt = sam(model.parameters(), "ulp", rho=0.5, lr=0.1)

    def backward() -> None:
        model[3](model[2](model[1](model[0](X))).bfloat16()).float().square().mean().backward()

    backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.first_step(zero_grad=True)
    raised = [p.detach().clone() for p in model.parameters()]
    backward()
    with monkeypatch.context() as patched:
        if backend == "reference":  # which steps one part after the other
            step, calls = reference.sam_restore_adamw_, []

            def broken_step(*args: Any) -> None:
                calls.append(1)
                if len(calls) == 2:
                    raise MemoryError("planted")
                step(*args)

            patched.setattr(reference, "sam_restore_adamw_", broken_step)
        elif backend == "triton":
            steps_in_place(patched)
            Launches(patched, 2, MemoryError("planted"), before=True, always=True)
        else:
            core = getattr(native.core(), backend)
            plain = core.sam_decode_adamw

            def broken(parts: list[Any], where: Any) -> None:
                plain(parts[:1], where if backend == "cpu" else where[:1])
                raise MemoryError("planted")

            patched.setattr(core, "sam_decode_adamw", broken)
        with pytest.raises(MemoryError, match="planted"):
            opt.second_step()
    opt.abandon()
    now = list(model.parameters())
    assert not any(map(same_bits, now, raised))
    assert all(map(same_bits, now[2:], before[2:]))
    assert backend != "reference" or all(map(same_bits, now, before))


def steps_in_place(patched: pytest.MonkeyPatch) -> None:
    """As on a device, where a launch is whole: the interpreter's kernels work in the weights, not in copies."""
    from triton.runtime.interpreter import GridExecutor

    patched.setattr(triton, "refuses", lambda op, _, dtype, walkable: refusal(vars(triton), op, None, dtype, walkable))
    patched.setattr(triton, "_interpreted", lambda: False)
    plain = GridExecutor.__call__

    def launch(*arguments: Any, **named: Any) -> None:  # has no lines to interrupt
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            plain(*arguments, **named)
        finally:
            sys.settrace(trace)

    patched.setattr(GridExecutor, "__call__", launch)


class Launches:
    """Counts the launches of a step; raises before or after one of them, and `always` at all that follow."""

    def __init__(
        self, patched: pytest.MonkeyPatch, which: int, how: BaseException, before: bool, always: bool = False
    ) -> None:
        from triton.runtime.interpreter import GridExecutor

        self.count, plain = 0, GridExecutor.__call__

        def launch(executor: Any, *arguments: Any, **named: Any) -> Any:
            if executor.fn.__name__ not in ("_put_listed_kernel", "_restore_adamw_kernel"):
                return plain(executor, *arguments, **named)
            number, self.count = self.count, self.count + 1
            raises = number >= which if always else number == which
            if raises and before:
                raise how
            plain(executor, *arguments, **named)
            if raises:
                raise how

        patched.setattr(GridExecutor, "__call__", launch)


class BeforeAStep:
    """Two buckets of codes with listed weights, at w + e, with the gradient to step with but for one weight."""

    def __init__(self, elements: int = 100) -> None:
        torch.manual_seed(5)
        w = torch.randn(elements)
        w[::3] *= 1e-7
        self.params = [nn.Parameter(t) for t in (w.clone(), w[:100].bfloat16(), torch.randn(5), torch.randn(7))]
        self.opt = sam(self.params, "ulp", rho=0.01)
        self.w = [p.detach().clone() for p in self.params]
        for p in self.params:
            p.grad = torch.randn_like(p)
        self.opt.first_step()
        codes = [b.bucket.codes for b in self.opt._ascent_buckets._buckets]
        assert [c is not None and 0 < int(c.words[0]) <= c.capacity for c in codes] == [True, True]
        for p in self.params:
            p.grad = torch.randn_like(p)
        self.params[3].grad = None

    def moments(self) -> list[Tensor]:
        return [m for p in self.params for name, m in self.opt.state.get(p, {}).items() if name != "step"]


def stepped(elements: int = 100) -> BeforeAStep:
    case = BeforeAStep(elements)
    case.opt.second_step()
    return case


needs_triton = pytest.mark.skipif("triton" not in CPU_BACKENDS, reason="runs with TRITON_INTERPRET=1")


@needs_triton
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("which", range(4))  # lists and steps of two buckets
def test_an_interrupt_among_launches_leaves_every_weight_stepped(
    monkeypatch: pytest.MonkeyPatch, which: int, before: bool
) -> None:
    """No chunk is stepped twice, and no listed weight is put back after its step."""
    with use_backend("triton"):
        whole, case = stepped(70_000), BeforeAStep(70_000)
        steps_in_place(monkeypatch)
        with monkeypatch.context() as patched:
            launches = Launches(patched, which, KeyboardInterrupt(), before)
            with pytest.raises(KeyboardInterrupt):
                case.opt.second_step()
        assert launches.count == which + 1 + 4
        case.opt.abandon()
    assert all(map(same_bits, state_of(case.opt), state_of(whole.opt)))


@needs_triton
def test_an_interrupt_at_a_line_leaves_all_weights_at_w_or_all_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("triton"):
        whole = stepped()
        steps_in_place(monkeypatch)
        ends, at = set(), 0
        while True:
            case = BeforeAStep()
            if not interrupted(case.opt.second_step, at):
                break
            case.opt.abandon()
            if all(map(same_bits, case.params, case.w)):
                ends.add("w")
            else:
                assert all(map(same_bits, [*case.params, *case.moments()], [*whole.params, *whole.moments()])), at
                ends.add("stepped")
            at += 5
    assert at > 60
    assert ends == {"w", "stepped"}


@needs_triton
def test_after_an_interrupt_on_the_way_back_the_step_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("triton"):
        fused, plain = stepped(), BeforeAStep()
        plain.opt.restore_()
        plain.opt.step()
        steps_in_place(monkeypatch)
        at = 0
        while True:
            case = BeforeAStep()
            if not interrupted(case.opt.restore_, at):
                break
            case.opt.step()
            now = [*case.params, *case.moments()]
            assert any(all(map(same_bits, now, [*x.params, *x.moments()])) for x in (fused, plain)), at
            at += 3
    assert at > 20


@needs_triton
def test_weights_in_another_order_are_put_back_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """w is then decoded in copies: what is noted of them is not noted of the weights."""
    with use_backend("triton"):
        steps_in_place(monkeypatch)
        at = 0
        while True:
            torch.manual_seed(5)
            p = nn.Parameter(torch.randn(60, 40))
            w, opt = p.detach().clone(), sam([p], "ulp", rho=0.01)
            p.grad = torch.randn_like(p)
            opt.first_step()
            p.data = p.data.t().contiguous().t()
            if not interrupted(opt.abandon, at):
                break
            opt.abandon()
            assert torch.equal(p, w), at
            at += 3
    assert at > 20


@pytest.mark.parametrize("taken", [1, 2])
@pytest.mark.parametrize("stash", STASHES)
def test_a_parameter_that_left_its_group_is_restored(stash: str, taken: int) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    opt = sam([{"params": params}, {"params": [nn.Parameter(torch.zeros(1))]}], stash, rho=1e-3, lr=0.1)
    for ends in (opt.first_step, opt.second_step):
        for p in params:
            p.grad = torch.randn(5)
        if ends == opt.second_step:
            del opt.param_groups[0]["params"][-taken:]
        with saying("from group to group" if (stash, taken, ends) == ("ulp", 1, opt.second_step) else None):
            ends()
    assert [same_bits(p, w) for p, w in zip(params, before, strict=True)] == [taken == 2, True]


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the CPU core serves no call in this run")
def test_who_serves_is_asked_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one backend missing, and one that decodes but does not step: the reference is not used in its place."""
    monkeypatch.setitem(dispatch._DEFAULT_ORDER, "cpu", ("cuda", "cpu", "reference"))
    status = {**dispatch.backends(), "cuda": dispatch.BackendStatus(False, "no core.")}
    monkeypatch.setattr(dispatch, "backends", lambda: status)
    plain = cpu.refuses
    monkeypatch.setattr(cpu, "refuses", lambda op, *how: "planted" if op == "sam_decode_adamw_" else plain(op, *how))
    caches = (dispatch._select, dispatch._serving)
    for cache in caches:
        cache.cache_clear()
    try:
        p = nn.Parameter(torch.randn(64))
        opt = sam([p], "ulp", rho=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for ends in (opt.first_step, opt.second_step):
                p.grad = torch.randn(64)
                ends()
        (said,) = [str(w.message) for w in caught]
        assert "no one backend decodes and steps" in said
        device = p.device
        with pytest.warns(UserWarning, match="slow reference backend"):  # one that it does serve is still told of
            assert dispatch.select("sam_decode_adamw_", device, p.dtype) is reference.sam_decode_adamw_
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_hook_after_the_step_that_fails_leaves_the_step() -> None:
    model, opt, _ = perturbed()
    whole = perturbed()
    whole[1].second_step()

    def fails(*_: Any) -> None:
        raise RuntimeError("planted")

    handle = opt.base_optimizer.register_step_post_hook(fails)
    with pytest.raises(RuntimeError, match="planted"):
        opt.second_step()
    opt.abandon()
    assert not opt.is_perturbed
    assert unchanged(model, all_bits(whole[0]))
    handle.remove()
    for either in (model, whole[0]):
        opt_of = opt if either is model else whole[1]
        opt_of.step(closure_of(either))
    assert unchanged(model, all_bits(whole[0]))


def test_weights_that_move_are_followed() -> None:
    found = []
    for moves in (False, True):
        model, opt, _ = perturbed()
        if moves:
            for p in model.parameters():
                p.data = p.data.clone()
        opt.second_step()
        found.append(all_bits(model))
    assert all(map(torch.equal, *found))


def test_no_gradient_and_no_moment_outlives_the_step() -> None:
    _, opt, _ = perturbed()
    opt.second_step()
    for b in opt._ascent_buckets._buckets:
        assert [b.bucket.grads, b.bucket.first, b.bucket.second] == [[], [], []]
        held = [t for column in b.bucket._pointed.values() for t in column[0]]
        assert not {id(m) for state in opt.state.values() for m in state.values()} & set(map(id, held))
    pickle.loads(pickle.dumps(opt))


def test_grad_scaler_scales_and_shrinks() -> None:
    found = {}
    for stash in STASHES:
        model = network()
        opt = sam(model.parameters(), stash, rho=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        for i in range(4):
            scaler.scale(loss_of(model)).backward()
            opt.first_step(zero_grad=True)
            scaler.scale(loss_of(model)).backward()
            if i == 2:
                model[3].bias.grad[0] = math.inf
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert opt.skipped_steps == 1
        found[stash] = state_of(opt)
    assert alike(found)
