"""An interrupt before a line of a step leaves w where it was or recoverable, bit for bit, and training goes on."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.ops import params as ops
from fastpost.plan import Bucket
from fastpost.sam import GSAM, SAMWindow

from .conftest import CPU_BACKENDS, same_bits
from .interrupts import interrupted, lines
from .small import all_bits, unchanged

ROOT = Path(__file__).resolve().parents[1]
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Case:
    """A small model under one form of SAM, and all that a step of it can leave behind."""

    def __init__(self, form: str) -> None:
        torch.manual_seed(5)
        narrow = form in ("stochastic", "masters")
        self.model = nn.Sequential(nn.Linear(6, 2))
        self.model.to(torch.bfloat16 if narrow else torch.float32)
        if form not in ("functional", "masters") and "cpu" in CPU_BACKENDS:
            # A second bucket, which the reference backend serves where it can.
            self.model.append(nn.Linear(2, 1, dtype=torch.bfloat16 if form.endswith("ulp") else torch.float64))
        named = list(self.model.named_parameters())
        self.masters = [p.detach().float() for _, p in named] if form == "masters" else None
        options: dict[str, dict[str, Any]] = {
            "stochastic": {"rounding": "stochastic"},
            "masters": {"master_params": self.masters},
            "functional": {"perturb": "functional", "model": self.model},
            "fused_restore": {"fused_restore": True},
            "GSAM": {"variant": GSAM(0.5)},
            "ulp": {"stash": "ulp"},
            "fused_ulp": {"stash": "ulp", "fused_restore": True},
        }
        base = torch.optim.AdamW if form.startswith("fused") else torch.optim.SGD
        self.opt = SAM(named, base, rho=0.5, lr=0.1, **options.get(form, {}))

    def backward(self, x: Tensor = X) -> Tensor:
        for module in self.model:
            x = module(x.to(module.weight.dtype))
        loss = x.double().square().mean()
        loss.backward()
        return loss.detach()

    def two_calls(self) -> None:
        self.opt.zero_grad()
        self.backward()
        self.opt.first_step(zero_grad=True)
        self.backward()
        self.opt.second_step(zero_grad=True)

    def closure(self) -> None:
        self.opt.step(self.backward)

    def context(self) -> None:
        self.opt.zero_grad()
        self.backward()
        with self.opt.perturbed():
            self.backward()
        self.opt.step()

    def window(self) -> None:
        SAMWindow(self.opt, self.backward).run([X[:4], X[4:]])
        self.opt.step()

    def there_and_back(self) -> None:
        self.opt.zero_grad()
        self.backward()
        self.opt.first_step()
        self.opt.restore_()
        self.opt.step()

    def step(self, calls: str) -> None:
        work: Callable[[], None] = getattr(self, calls)
        work()


def recovered(case: Case, before: list[Tensor], after: list[Tensor]) -> bool:
    """Restores what an interrupt has left, and says whether w is that before the step; otherwise it is that after it."""
    case.opt.restore_()
    assert not case.opt.is_perturbed
    if case.masters is not None:
        assert unchanged(case.model, [m.to(torch.bfloat16).view(torch.int16) for m in case.masters])
    if unchanged(case.model, before):
        return True
    assert unchanged(case.model, after)
    return False


FORMS = ["stored", "stochastic", "masters", "functional", "fused_restore", "GSAM", "ulp", "fused_ulp"]


CALLS = ["closure", "context", "window", "there_and_back"]


# Of each case one of so many shares of its lines: the commonest case takes all. Of another way to make the calls each form
# takes a share, so that a line that all forms execute is interrupted in one of them, and a line of one form in several ways
# to make the calls. FASTPOST_EVERY_LINE=1 in the environment takes all lines in all cases.
EVERY_LINE = os.environ.get("FASTPOST_EVERY_LINE") == "1"


@pytest.mark.parametrize(
    ("form", "calls", "served", "shares", "share"),
    [
        ("stored", "two_calls", "cpu", 1, 0),
        *((form, "two_calls", "cpu", 3, i % 3) for i, form in enumerate(FORMS[1:])),
        *((form, calls, "cpu", 7, (i + 2 * j) % 7) for i, form in enumerate(FORMS) for j, calls in enumerate(CALLS)),
        ("stored", "two_calls", "reference", 2, 0),
        ("ulp", "two_calls", "reference", 2, 1),
        ("fused_ulp", "two_calls", "reference", 3, 2),
        *(("stored", "two_calls", served, 40, 0) for served in CPU_BACKENDS if served == "triton"),  # in a run of its own
    ],
)
def test_an_interrupt_at_the_lines_of_a_step(form: str, calls: str, served: str, shares: int, share: int) -> None:
    with fastpost.use_backend(None if served == "cpu" else served):
        for _ in range(2):  # what is asked once per process, or of the first two calls of a plan, is asked here
            Case(form).step(calls)
        whole = Case(form)
        before = all_bits(whole.model)
        classes = [type(module) for module in whole.model]
        places = lines(lambda: whole.step(calls))
        after = all_bits(whole.model)
        outcomes = set()
        for at in (at for at, line in places.items() if EVERY_LINE or line % shares == share):
            case = Case(form)
            assert interrupted(lambda case=case: case.step(calls), at)  # type: ignore[misc]
            held = case.opt.is_perturbed
            there = recovered(case, before, after)
            outcomes.add((held, there))
            case.opt.abandon()
            assert [type(module) for module in case.model] == classes
            assert all(p.grad is None for p in case.model.parameters())
            steps = case.opt.param_groups[0]["sam_steps"]
            case.step(calls)  # and training goes on as if nothing had been
            if there and not form.startswith("fused") and (form != "stochastic" or steps == 0):
                assert unchanged(case.model, after), at
    # before the perturbation, in it where nobody else restores, after the step
    expected = {(False, True), (False, False)}
    assert expected | {(True, True)} <= outcomes if calls == "two_calls" else expected <= outcomes


@pytest.mark.parametrize("form", FORMS)
def test_two_interrupts_the_second_while_the_first_is_handled(form: str) -> None:
    for _ in range(2):  # as above
        Case(form).two_calls()
    whole = Case(form)
    before = all_bits(whole.model)
    places = lines(whole.two_calls)
    after = all_bits(whole.model)
    generator = torch.Generator().manual_seed(3)
    for at in list(places)[::20]:
        case = Case(form)
        assert interrupted(case.two_calls, at)
        for second in torch.randint(0, 60, (3,), generator=generator).tolist():
            interrupted(case.opt.abandon, second)
        recovered(case, before, after)


@contextlib.contextmanager
def handled_by(number: signal.Signals, handler: Any) -> Iterator[None]:
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def test_a_launch_that_nobody_has_noted_shows_in_its_sums() -> None:
    """Between a launch from Python and the line that notes it: Triton's way, which the next test takes where it can run."""
    bucket = Bucket([0], weights=[torch.ones(3)], grads=[torch.ones(3)], stash=[torch.zeros(3)])
    bucket.launched = torch.full((2, 6), torch.nan, dtype=torch.float64)
    assert not bucket.stashed
    bucket.launched[:, -1] = 0
    assert bucket.stashed  # the other sums may be NaN
    bucket.stashed = False
    assert not bucket.stashed


@pytest.mark.skipif("triton" not in CPU_BACKENDS, reason="Triton's interpreter takes a run of its own")
@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize(("stash", "name"), [("copy", "sam_perturb_"), ("ulp", "sam_perturb_"), ("ulp", "sam_decode_")])
def test_an_interrupt_around_a_launch_of_triton(
    stash: str, name: str, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = importlib.import_module("fastpost.backends.triton")
    kernels = importlib.import_module("fastpost.triton_kernels.params")
    plain = getattr(kernels, name)

    def interrupted_launch(*args: Any, **kwargs: Any) -> None:
        if launched:
            plain(*args, **kwargs)
        raise KeyboardInterrupt

    with fastpost.use_backend("triton"):
        model = nn.Linear(6, 2)
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, stash=stash)
        model(X).square().mean().backward()
        before = all_bits(model)
        with opt.perturbed(zero_grad=False):
            pass  # what serves the operations is asked once
        monkeypatch.setattr(backend, "_interpreted", lambda: False)  # as on a device: the stash is the kernel's to write
        if name == "sam_decode_":
            opt.first_step()
        with monkeypatch.context() as patched:
            patched.setattr(kernels, name, interrupted_launch)
            with pytest.raises(KeyboardInterrupt):
                (opt.first_step if name == "sam_perturb_" else opt.restore_)()
        opt.restore_()
        assert unchanged(model, before)
        assert not opt.is_perturbed


TRAINING = """
import signal, sys
import torch
from tests.test_sam_interrupts import Case

def stop(*_):
    raise SystemExit(0)

case = Case(sys.argv[1])
case.two_calls()
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
try:
    while True:
        case.two_calls()
finally:
    torch.set_grad_enabled(True)
    case.opt.abandon()
    torch.save((case.opt.param_groups[0]["sam_steps"], case.model.state_dict()), sys.argv[2])
"""


@pytest.mark.parametrize("form", ["stored", "masters", "fused_restore", "fused_ulp"])
def test_a_process_that_is_told_to_end_saves_w(form: str, tmp_path: Path) -> None:
    """SIGTERM as a scheduler sends it, somewhere in a step; the handler raises, and the weights are saved on the way out."""
    saved = tmp_path / "model.pt"
    command = [sys.executable, "-c", TRAINING, form, str(saved)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    steps, weights = torch.load(saved)
    case, possible = Case(form), []
    for _ in range(steps):
        possible = [{name: w.clone() for name, w in case.model.state_dict().items()}]  # a step is counted before it is made
        case.two_calls()
    possible.append(case.model.state_dict())
    assert any(all(same_bits(w[k], weights[k]) for k in weights) for w in possible)


def stop(*_: object) -> None:
    raise SystemExit("stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGALRM])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "functional"])  # which runs no kernel
@pytest.mark.parametrize("passes", ["perturb", "restore"])
def test_a_signal_with_a_handler_as_a_kernel_returns(
    monkeypatch: pytest.MonkeyPatch, form: str, number: signal.Signals, passes: str
) -> None:
    """Python delivers it before the next line can note anything; the handlers of schedulers raise, or save and raise."""
    names = {
        "perturb": ("sam_perturb_", "sam_perturb_masters_", "sam_perturb_coded_"),
        "restore": ("sam_restore_", "sam_cast_", "sam_restore_adamw_", "sam_decode_", "sam_decode_adamw_"),
    }[passes]
    case, plain, calls = Case(form), ops.run, []
    before, whole = all_bits(case.model), Case(form)
    whole.two_calls()

    def run(name: str, bucket: Any, *args: Any) -> Any:
        result = plain(name, bucket, *args)
        if name in names and not calls:
            calls.append(name)
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(ops, "run", run)
    with handled_by(number, stop), pytest.raises(SystemExit, match="stopped"):
        case.two_calls()
    assert calls
    assert not case.opt.is_perturbed or passes == "restore"
    case.opt.abandon()
    stepped = calls == ["sam_decode_adamw_"]  # all weights, and w + e is gone with that
    assert unchanged(case.model, all_bits(whole.model) if stepped else before)


@pytest.mark.parametrize("form", FORMS)
def test_a_timer_that_strikes_anywhere(form: str) -> None:
    """Real signals, wherever they come: in torch's own code, in a kernel, in a handler's way out."""
    whole = Case(form)
    before = all_bits(whole.model)
    whole.two_calls()
    after = all_bits(whole.model)
    struck, armed = 0, False

    def strike(*_: object) -> None:
        if armed:
            raise SystemExit("struck")

    with handled_by(signal.SIGALRM, strike):
        for trial in range(60):
            case = Case(form)
            gc.disable()  # an exception in the finalizer of something else would be lost
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, 2e-5 * (1 + trial))
                case.opt.zero_grad()
                case.backward()
                case.opt.first_step(zero_grad=True)
                case.backward()
                armed = False
            except SystemExit:
                armed = False
                struck += 1
                torch.set_grad_enabled(True)  # torch's no_grad may have been left by halves
                case.opt.abandon()
                assert unchanged(case.model, before)
            else:
                case.opt.second_step()
                assert unchanged(case.model, after)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                gc.enable()
    assert struck
