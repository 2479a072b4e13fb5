"""The CUDA core as it was built, read from its machine code: architectures, registers and access widths need no GPU."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastpost.backends import native

pytest.importorskip("triton", reason="cuobjdump comes with Triton's package, which is not installed here")

from .machine_code import Loops, count, functions
from .test_triton_compiled import complaints, tool

MODULE = native.core().__file__
# Kernel: its budget of registers, and the accesses that have to be wide. 64 lets two blocks of 512 threads share a
# multiprocessor, 84 three of 256, 128 two of 256 or one of 512. Folding a few sums, and a number for each row, are not
# worth a wide load; narrow rows wait for double arithmetic.
HOT = {
    "sam_perturb_kernel": (64, "LDG STG"),
    "sam_perturb_masters_kernel": (64, "LDG STG"),
    "perturb_pending_kernel": (64, ""),
    "decode_kernel": (64, "LDG STG"),
    "put_listed_kernel": (64, ""),
    "cast_kernel": (64, "LDG STG"),
    "sum_kernel": (64, "LDG"),
    "restore_kernel": (64, "LDG STG"),
    "restore_adamw_kernel": (128, "LDG STG"),
    "negate_kernel": (64, "LDG STG"),
    "negate_clip_kernel": (64, "LDG STG"),
    "flip_signs_kernel": (64, "LDG STG"),
    "fold_kernel": (64, ""),
    "add_noise_kernel": (64, "LDG STG"),
    "noise_rows_kernel": (128, "LDG STG"),
    "wide_rows_kernel": (84, "LDG STG"),
    "narrow_rows_kernel": (128, ""),
    "wide_operands_kernel": (84, "LDG"),
    "narrow_operands_kernel": (128, ""),
    "wide_distillation_kernel": (84, "LDG"),
    "narrow_distillation_kernel": (128, ""),
    "top_k_kernel": (128, "LDG"),
    "shard_sums_kernel": (84, "LDG"),
    "shard_operands_kernel": (84, "LDG"),
    "scale_rows_kernel": (128, "LDG STG"),
    "scale_gradients_kernel": (128, "LDG STG"),
    "weigh_rows_kernel": (64, ""),
    "sum_rows_kernel": (64, ""),
}

needs_cuda = pytest.mark.skipif(not hasattr(native.core(), "cuda"), reason="this build holds no CUDA core (no nvcc)")


@functools.cache
def dump(*arguments: object) -> str:
    run = subprocess.run([tool("cuobjdump"), *map(str, arguments)], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def kernels(usage: str) -> dict[str, str]:
    """Mangled name -> resource line."""
    return {m[1]: m[2] for m in re.finditer(r"Function (\S+):\s*\n\s*(REG:.*)", usage)}


@needs_cuda
def test_cubins_for_four_architectures_and_ptx_of_the_newest() -> None:
    assert set(re.findall(r"\.(sm_\d+)\.cubin", dump("-lelf", MODULE))) == {"sm_100", "sm_120", "sm_80", "sm_90"}
    assert set(re.findall(r"\.(sm_\d+)\.ptx", dump("-lptx", MODULE))) == {"sm_120"}


@needs_cuda
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_kernel_keeps_its_budget_and_its_wide_accesses(arch: str) -> None:
    usage = kernels(dump("-res-usage", "-arch", arch, MODULE))
    code = dump("-sass", "-arch", arch, MODULE)
    bodies = {m[1]: m[2] for m in re.finditer(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", code, re.S)}
    assert usage.keys() == bodies.keys()
    seen = set()
    for name, line in usage.items():
        (kind,) = [k for k in HOT if k in name]
        seen.add(kind)
        registers, accesses = HOT[kind]
        if "Lb1ENS1_5Codes" in name:  # random bits and codes in one kernel, which shares its multiprocessor with none
            registers = 128
        if kind == "wide_distillation_kernel" and arch in ("sm_80", "sm_120"):  # two blocks share a multiprocessor
            registers = 128
        found = complaints(line, bodies[name], registers, accesses=accesses)
        if (arch, kind) == ("sm_80", "wide_rows_kernel") and "bf16" in name and "STACK:8 " in line:
            found = [what for what in found if "stack" not in what and "local memory" not in what]  # two words of a thread
        assert found == [], name
    assert seen == set(HOT)


@pytest.fixture(scope="module")
def hopper() -> dict[str, Loops]:
    """Mangled name -> control flow, of all kernels for sm_90."""
    return {name: Loops(code) for name, code in functions(dump("-sass", "-arch", "sm_90", MODULE)).items()}


def kernel(hopper: dict[str, Loops], *parts: str) -> Loops:
    (name,) = [name for name in hopper if all(part in name for part in parts)]
    return hopper[name]


# Memory brings a pair of float32 logits in about 66 instructions' time, a pair of 16-bit logits in 33 (an H200, all
# schedulers busy). The near way's budget leaves room for everything else. A round asks for a later tile as well.
@needs_cuda
@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [("kernelIf", 27, 31), ("4bf16E", 26, 30), ("3f16E", 26, 30)],
    ids=["f32", "bf16", "f16"],
)
def test_instructions_per_pair_of_logits(hopper: dict[str, Loops], dtype: str, forward: int, backward: int) -> None:
    pairs = 8 if dtype == "kernelIf" else 16
    loops = kernel(hopper, "wide_rows_kernel", dtype)

    def near(core: str, least: int, stores: int) -> int:
        """Instructions of a round of the near way, the cheapest one through a block with what is asked for."""
        return min(
            r.total()
            for r in loops.rounds(core, least)
            if (count(r, "MUFU", "EX2"), count(r, "LDS", "128"), count(r, "STG", "128")) == (pairs, 4, stores)
        )

    sums, gradients = near("LDGSTS", 4, 0), near("STG", 2, 4)
    asking = sums - near("MUFU.EX2", 4, 0)  # for a later tile, which cheaper rounds leave out
    assert sums / pairs <= forward
    assert (gradients + asking) / pairs <= backward


# Of a teacher and a student, with a temperature: the sums near each other, and exactly where a constant lies between them;
# a KL's gradient to the student, which is a pack of four pairs with what the walk costs. Memory's time for the latter, which
# writes too, is 82 instructions in bfloat16.
@needs_cuda
@pytest.mark.parametrize(("dtype", "forward", "backward"), [("kernelIf", 28, 68), ("4bf16E", 28, 68)], ids=["f32", "bf16"])
def test_instructions_per_pair_of_distillation(hopper: dict[str, Loops], dtype: str, forward: int, backward: int) -> None:
    loops = kernel(hopper, "wide_distillation_kernel", dtype)
    sums = [r.total() for r in loops.rounds("LDGSTS", 4) if (count(r, "MUFU", "EX2"), count(r, "LDS", "128")) == (8, 4)]
    assert min(sums) / 8 <= forward
    gradients = [r for r in loops.rounds("STG", 1) if count(r, "MUFU", "EX2") == 12 and not count(r, "DADD")]
    assert min(r.total() for r in gradients) / 4 <= backward


# The hardware rounds pairs, so a round's elements are twice its conversions. work: what each element needs at least once, so
# that no round is counted that leaves elements out.
@needs_cuda
@pytest.mark.parametrize(
    ("parts", "work", "budget"),
    [
        (("sam_perturb_kernel", "4bf16ES4_Lb0ELb0E", "6Copies", "Li64E"), "FFMA", 16),
        (("add_noise_kernel", "4bf16ES4_Lb0E"), "I2FP", 17),
        (("noise_rows_kernel", "4bf16ES4_Lb0E"), "I2FP", 17),
    ],
    ids=["sam_perturb_", "add_noise uniform", "noise of rows, uniform"],
)
def test_instructions_per_16_bit_element(hopper: dict[str, Loops], parts: tuple[str, ...], work: str, budget: int) -> None:
    rounds = [r for r in kernel(hopper, *parts).rounds("F2FP", 8) if count(r, "LDG", "128") == 4]
    assert rounds
    for r in rounds:
        elements = 2 * count(r, "F2FP")
        assert count(r, work) >= elements
        assert r.total() / elements <= budget


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_checks_see_planted_defects(tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text(
        "__global__ void negate_kernel(float* x, const int* at) {\n"
        "  float local[64] = {};\n"
        "  for (int i = 0; i < 64; ++i) local[at[i] & 63] += x[i];\n"
        "  x[threadIdx.x] = local[at[threadIdx.x] & 63];\n"
        "}\n"
    )
    cubin = tmp_path / "bad.cubin"
    subprocess.run(["nvcc", "-arch=sm_90", "-cubin", "-o", cubin, tmp_path / "bad.cu"], check=True, capture_output=True)
    ((_, line),) = kernels(dump("-res-usage", cubin)).items()
    found = complaints(line, dump("-sass", cubin), 8)
    assert [c for c in found if "stack" in c]
    assert [c for c in found if "local memory" in c]
    assert [c for c in found if "registers" in c]
    assert [c for c in found if "128-bit STG" in c]
