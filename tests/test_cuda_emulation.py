"""The CUDA core's source, run on the CPU (see emulation.py): what the emulation itself sees, and long lists.

`CUDA_EMULATION=1 pytest -k cuda` runs the operation tests on it; the tests here that need that mode say so.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import SAM
from fastpost.backends import cuda, native
from fastpost.ops import params as ops

from . import emulation, gpu_sanitize
from .conftest import same_bits

HERE = Path(__file__).parent / "cuda_emulation"
needs_emulation = pytest.mark.skipif(not emulation.enabled(), reason="needs CUDA_EMULATION=1, as in `make test-kernels`")


# -- the emulation sees defects -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulation") / "defects"
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    command = [
        compiler, "-std=c++17", "-O1", "-fsanitize=alignment", "-fno-sanitize-recover=all", f"-I{HERE}",
        f"-I{emulation.ROOT / 'csrc'}", "-o", program, HERE / "defects.cpp", HERE / "fibers.cpp",
        emulation.ROOT / "csrc" / "core" / "plan.cpp",
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return program


@pytest.mark.parametrize(
    ("defect", "shows"),
    [
        ("none", "right"),
        ("race", "wrong"),
        ("barrier", "wait at a barrier that others never reach"),
        ("warp", "wait at a barrier that others never reach"),
        ("waits", "right"),
        ("does not wait", "wrong"),
        ("aligned", "right"),
        ("misaligned", "misaligned address"),
        ("ragged block", "a block of whole warps is needed"),
    ],
)
def test_planted_defects_show(defects: Path, defect: str, shows: str) -> None:
    run = subprocess.run([str(defects), defect], capture_output=True, text=True)
    assert shows in run.stdout + run.stderr
    assert (run.returncode == 0) == (shows in ("right", "wrong"))


# -- lists that take several launches, and what a launch refuses -----------------------------------------------------------


def short_table() -> int:
    (capacity,) = re.findall(r"kShortTable = (\d+);", (emulation.ROOT / "csrc" / "cuda" / "launch.cuh").read_text())
    return int(capacity)


@needs_emulation
@pytest.mark.parametrize("tensors", [short_table(), short_table() + 1, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_that_fill_their_table(dtype: torch.dtype, tensors: int) -> None:
    """The short table full; the long one with one more; the long one, of some 1,000, cut. Results must not show which."""
    numels = [(7 * i) % 53 + 1 for i in range(tensors)]
    numels[tensors // 2] = 70_001  # two chunks in the midst of it
    numels[tensors - 1] = 16_385  # two pieces at the end
    if tensors > 100:
        numels[::53] = [0] * len(numels[::53])
    weights = [torch.randn(n).to(dtype) for n in numels]
    grads = [torch.randn(n).to(dtype) for n in numels]
    results = {}
    for backend in ("cpu", "cuda"):
        with fastpost.use_backend(backend):
            w, g = [t.clone() for t in weights], [t.clone() for t in grads]
            stash = [torch.full_like(t, float("nan")) for t in w]
            squared = ops.squared_norm(g)
            sums = ops.sam_perturb_(w, g, stash, squared, rho=0.3)
            perturbed = [t.clone() for t in w]
            ops.sam_restore_(w, stash)
            ops.flip_signs_(g, 11)
            results[backend] = (squared, sums, perturbed, w, [t.clone() for t in g])
            ops.negate_(g)
            ops.negate_clip_(g, 0.5)
    for mine, theirs in zip(results["cuda"][3], weights, strict=True):
        assert same_bits(mine, theirs)
    for mine, theirs in zip(results["cuda"][4], results["cpu"][4], strict=True):
        assert same_bits(mine, theirs)
    for k in (0, 1):
        torch.testing.assert_close(results["cuda"][k], results["cpu"][k], rtol=1e-6, atol=0)
    tolerance = {torch.float32: 2e-7, torch.bfloat16: 8e-3}[dtype]  # one unit in the last place: CPU loops fuse
    for mine, theirs in zip(results["cuda"][2], results["cpu"][2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-8)


@needs_emulation
@pytest.mark.parametrize(("tensors", "there"), [(290, 2), (1000, 2), (1100, 4), (2500, 7)])
def test_launches_of_a_step_of_sam(tensors: int, there: int) -> None:
    """Norm, perturb, restore: one each. A list of more than some 1,000 is cut, and then another launch adds up each sum."""
    weights = [nn.Parameter(torch.randn(5)) for _ in range(tensors)]
    opt = SAM(weights, torch.optim.SGD, rho=0.1, lr=0.1)
    for w in weights:
        w.grad = torch.randn_like(w)
    launched = [launches_of(work) for work in (opt.first_step, opt.restore_, opt.first_step, opt.restore_)]
    assert launched == [there, -(-tensors // 1300), there, -(-tensors // 1300)]


def launches_of(work: Callable[[], object]) -> int:
    count = ctypes.CDLL(native.core().__file__).emulated_launches
    before = count()
    work()
    return int(count() - before)


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_block_adds_up_as_a_second_kernel_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, and the counter is 0 again; over one chunk, many, and more than a block has threads."""
    for numels in ([3], [70_001, 5, 129], [1] * 700):
        grads = [torch.randn(n).to(dtype) for n in numels]

        def sums(grads: list[Tensor] = grads) -> list[Tensor]:
            w = [g.clone() for g in grads]
            squared = ops.squared_norm(grads)
            moved = ops.sam_perturb_(w, grads, [torch.empty_like(t) for t in w], squared, rho=0.3)
            return [squared, moved, ops.squared_distance(w, grads), ops.dot(w, grads), *w]

        with fastpost.use_backend("cuda"):
            alone = sums()
            counters = cuda._tickets[0]._memory
            assert not counters.any()
            with monkeypatch.context() as none_left:
                none_left.setattr(cuda, "_ticket", lambda *where: 0)
                assert launches_of(sums) == launches_of(lambda: None) + 8
                again = sums()
        assert all(same_bits(a, b) for a, b in zip(alone, again, strict=True))


@needs_emulation
def test_empty_lists_have_sums_too() -> None:
    with fastpost.use_backend("cuda"):
        assert float(ops.squared_norm([torch.zeros(0)])) == 0.0


def test_streams_have_a_counter_each_and_captured_calls_one_that_is_never_used_again() -> None:
    tickets = cuda._Tickets(torch.device("cpu"))
    ours, others = tickets.of(7, False), tickets.of(8, False)
    assert tickets.of(7, False) == ours != others == tickets.of(8, False)
    captured = [tickets.of(7, True) for _ in range(cuda._Tickets.count)]
    assert len({ours, others, *captured} - {0}) == cuda._Tickets.count  # 4 bytes apart, and then none is left
    assert captured[-2:] == [0, 0]
    assert tickets.of(7, False) == ours
    assert tickets.of(9, False) == 0


def test_where_nothing_may_wait_a_first_call_takes_a_second_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters cannot be made during a capture, or where torch objects to waiting; a call elsewhere makes them."""
    captured, watched = True, False
    monkeypatch.setattr(cuda, "_tickets", {})
    monkeypatch.setattr(cuda, "_is_captured", lambda: captured)
    monkeypatch.setattr(cuda, "_is_watched", lambda: watched)
    assert cuda._ticket(torch.device("cpu"), 0, 1) == 0
    captured, watched = False, True
    assert cuda._ticket(torch.device("cpu"), 0, 1) == 0
    watched = False
    outside = cuda._ticket(torch.device("cpu"), 0, 1)
    captured, watched = False, True
    assert cuda._ticket(torch.device("cpu"), 0, 1) == outside
    captured = True
    assert 0 != cuda._ticket(torch.device("cpu"), 0, 1) != outside != 0

    with torch.device("meta"):  # a default that is no CPU
        assert cuda._Tickets(torch.device("cpu"))._memory.device.type == "cpu"


@needs_emulation
def test_results_do_not_depend_on_addresses_or_on_how_a_list_is_cut() -> None:
    """The same bits for misaligned copies, and for one tensor alone or among others."""
    numels = (70_001, 3, 129, 65_536)
    grads = [torch.randn(n) for n in numels]
    room = [torch.randn(n + 8) for n in numels]
    with fastpost.use_backend("cuda"):
        plain = ops.squared_norm(grads)
        for offset in (1, 2, 3):
            moved = [r[offset : offset + n].copy_(g) for r, g, n in zip(room, grads, numels, strict=True)]
            assert same_bits(ops.squared_norm(moved), plain)
        alone = ops.squared_norm(grads[:1])
        assert same_bits(ops.squared_norm([grads[0], torch.zeros(5), torch.zeros(0)]), alone)


@needs_emulation
def test_a_failed_launch_names_the_operation_and_the_device() -> None:
    core = native.core()
    plan = core.Plan(core.DType.f32, [4], [0])
    x = torch.ones(4)
    plan.point(core.Column.grad, [x.data_ptr()], False)
    with pytest.raises(RuntimeError, match=r"negate_ on cuda:3 failed: invalid device ordinal.*fastpost doctor"):
        core.cuda.negate(plan, 3, 0)
    assert bool((x == 1).all())


# -- what the sanitizers are shown ----------------------------------------------------------------------------------------


class Watched:
    """A module of the core that remembers what was asked of it."""

    def __init__(self, module: object) -> None:
        self.module, self.names = module, set[str]()

    def __getattr__(self, name: str) -> object:
        self.names.add(name)
        return getattr(self.module, name)


@needs_emulation
def test_the_sanitizers_first_inputs_call_every_operation_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time may be over after one of each family."""
    core, of_core = native.core(), Watched(native.core())
    of_core.cuda = watched = Watched(core.cuda)
    monkeypatch.setattr(native, "core", lambda: of_core)
    assert gpu_sanitize.main("cuda", "cpu", seconds=0) == 0
    operations = {name for name in dir(core.cuda) if not name.startswith("_")} - {"device_count", "supports"}
    assert operations - watched.names == set()
