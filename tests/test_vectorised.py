"""GCC's own report on the CPU loops: each `#pragma omp simd` loop is vectorised, at the width of its instruction set.

The report has one line per instance of a template. A loop that one element type leaves scalar is a failure too: it is right,
and several times slower.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from .conftest import DTYPES

ROOT = Path(__file__).parent.parent
WIDTHS = {"sse": 16, "avx2": 32, "avx512": 64}  # bytes
SOURCES = ("params", "noise", "divergence", "distillation", "top_k")

# The loops that carry an operation, and how many each function has: a loop that loses its mark is not passed over.
HOT = {
    "params": {
        "perturb_block": 1,
        "encode_block": 1,
        "decode_of": 1,
        "negate_of": 1,
        "scale_of": 1,
        "flip_signs_of": 2,
        "restore_adamw_of": 1,
    },
    "noise": {"draw": 4, "add_noise_to": 2},  # words, uniform, normal, interleaved; conversion, sum
    "divergence": {
        "extent_of": 1,
        "sums_of": 1,
        "finish_row": 1,
        "cross_entropy_row": 3,
        "fill": 1,
        "mixture_sums": 1,
        "mixture_gradient": 1,
    },
    "distillation": {"extent_of": 1, "sums_of": 1, "terms_of": 1, "gradient_of": 1, "fill": 1, "softmax_of": 3},
    "top_k": {"top_of": 1, "exponentials_of": 1, "gradient_of": 1, "fill": 1},
}
SCALAR = {("flip_signs_of", 1, "sse"): "x86-64-v2 has no shift by an amount of each lane's own"}
NARROW = {"load_lanes": 16}  # eight 16-bit elements, whatever the registers


class Loop(NamedTuple):
    function: str
    index: int  # among the function's marked loops
    first: int  # lines that its statements lie on
    last: int


def marked_loops(text: str) -> list[Loop]:
    """Every `#pragma omp simd` with the function around it and the extent of its loop."""
    lines = text.splitlines()
    loops: list[Loop] = []
    function = ""
    for number, line in enumerate(lines, 1):
        if opening := re.match(r"(?!template|extern|typedef)[A-Za-z].*?(\w+)\(", line):
            function = opening[1]
        if not line.startswith("#pragma omp simd"):
            continue
        last, depth = number, 0
        while True:  # to the end of the statement: its semicolon, or the brace that closes it
            last += 1
            code = lines[last - 1].split("//")[0]
            depth += sum(code.count(c) for c in "{(") - sum(code.count(c) for c in "})")
            if depth == 0 and code.rstrip().endswith((";", "}")):
                break
        # A reduction's mark is also where its lanes are set up and folded, in loops of their own.
        first = number + 1 if "reduction" in line else number
        loops.append(Loop(function, sum(other.function == function for other in loops), first, last))
    return loops


def complaints(text: str, report: str, source: str, isa: str) -> list[str]:
    """What is wrong with the marked loops of a source text, going by the compiler's report on it."""
    found = []
    loops = marked_loops(text)
    for function, count in HOT[source].items():
        have = sum(loop.function == function for loop in loops)
        if have < count:
            found.append(f"{function}: {have} marked loops, expected {count}")
    pattern = (
        rf"{source}_loops\.cpp:(\d+):\d+: (?:missed: (couldn't) vectorize loop|optimized: loop vectorized using (\d+) byte)"
    )
    notes = [(int(line), bool(missed), int(width or 0)) for line, missed, width in re.findall(pattern, report)]
    for loop in loops:
        if (loop.function, loop.index, isa) in SCALAR:
            continue
        name = f"{loop.function}, loop {loop.index}"
        full = NARROW.get(loop.function, WIDTHS[isa])
        here = [(missed, width) for line, missed, width in notes if loop.first <= line <= loop.last]
        scalar = sum(missed for missed, _ in here)
        whole = sum(width == full for _, width in here)
        narrower = sum(0 < width < full for _, width in here)  # the rest of a loop, one for each at most
        if scalar:
            found.append(f"{name}: {scalar} instances are scalar")
        if not whole or narrower > whole:
            found.append(f"{name}: {whole} instances of {full} bytes, {narrower} narrower")
    return found


@pytest.fixture(scope="module")
def compile_report(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """(source, isa, text) -> what GCC says about the loops of that text, and its assembly; flags as CMake has them."""
    if sys.platform != "linux":
        pytest.skip("reads GCC's report on x86-64")
    import pybind11

    build = tmp_path_factory.mktemp("configured")
    configure = [
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DFASTPOST_CUDA=0", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in configure], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        isa = next((word.split("=")[1] for word in words if word.startswith("-DFASTPOST_ISA=")), None)
        if isa:
            flags[Path(entry["file"]).stem, isa] = words[: words.index("-o")]
    if ("params_loops", "avx512") not in flags:
        pytest.skip("reads GCC's report on x86-64")
    compiler = flags["params_loops", "sse"][0]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip(f"reads GCC's report, and the compiler is {version.splitlines()[0]}")

    @functools.cache
    def report(source: str, isa: str, text: str) -> tuple[str, str]:
        # Beside the original's headers, under its own name.
        file = tmp_path_factory.mktemp("loops") / f"{source}_loops.cpp"
        file.write_text(text)
        assembly, notes = file.with_suffix(".s"), file.with_suffix(".txt")
        command = [
            *flags[f"{source}_loops", isa],
            "-w", "-S", "-o", assembly, f"-fopt-info-vec-optimized-missed={notes}", file,
        ]  # fmt: skip
        compiled = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stderr
        return notes.read_text(), assembly.read_text()

    return report


def text_of(source: str) -> str:
    return (ROOT / "csrc" / "cpu" / f"{source}_loops.cpp").read_text()


@pytest.mark.parametrize("isa", WIDTHS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_marked_loop_is_vectorised(compile_report: Callable[..., tuple[str, str]], source: str, isa: str) -> None:
    text = text_of(source)
    report, _ = compile_report(source, isa, text)
    assert complaints(text, report, source, isa) == []


@pytest.mark.parametrize(("isa", "register"), [("sse", "xmm"), ("avx2", "ymm"), ("avx512", "zmm")])
def test_the_norm_uses_whole_registers(compile_report: Callable[..., tuple[str, str]], isa: str, register: str) -> None:
    """It is written in vectors of eight float64, not as a loop to vectorise; so its products are looked for in its code."""
    _, assembly = compile_report("params", isa, text_of("params"))
    functions = re.findall(r"^(\w*sum_of\w*):\n(.*?)^\s*\.size\s+\1", assembly, re.MULTILINE | re.DOTALL)
    assert functions
    code = "".join(body for _, body in functions)
    # g^2, ((|w| + eta) g)^2, (w - stash)^2 and g * stash in three dtypes, four vectors at a time.
    assert len(re.findall(rf"\sv?mulpd\s.*%{register}", code)) >= 12 * 4


@pytest.mark.parametrize("isa", ["avx2", "avx512"])  # of SSE's sixteen registers the sums alone take as many
def test_sums_over_a_list_stay_in_registers(compile_report: Callable[..., tuple[str, str]], isa: str) -> None:
    """Vectors wider than a register, and conversions that GCC takes apart, go through the stack at each turn of the loop."""
    _, assembly = compile_report("params", isa, text_of("params"))
    loops = []
    for _, body in re.findall(r"^(\w*sum_of\w*):\n(.*?)^\s*\.size\s+\1", assembly, re.MULTILINE | re.DOTALL):
        loops += re.findall(r"^(\.L\d+):\n((?:(?!^\.L\d+:).)*?)^\s*j\w+\s+\1\b", body, re.MULTILINE | re.DOTALL)
    assert len(loops) == 4 * len(DTYPES)  # kinds of terms
    # ASAM's terms need two registers more than AVX2 has.
    assert all(len(re.findall(r"\(%r[sb]p\)", loop)) <= (2 if isa == "avx2" else 0) for _, loop in loops)


def test_exceptions_are_still_needed(compile_report: Callable[..., tuple[str, str]]) -> None:
    """What is listed as scalar is scalar."""
    for function, index, isa in SCALAR:
        (source,) = (s for s in SOURCES if function in HOT[s])
        text = text_of(source)
        (loop,) = (x for x in marked_loops(text) if (x.function, x.index) == (function, index))
        report, _ = compile_report(source, isa, text)
        lines = [int(n) for n in re.findall(rf"{source}_loops\.cpp:(\d+):\d+: missed: couldn't vectorize loop", report)]
        assert any(loop.first <= n <= loop.last for n in lines), (function, isa)


DEFECTS = {
    # A float chosen by a branch that the compiler cannot turn into a select.
    "float ternary": (
        "divergence",
        "        const float q = noised_exp[i] * fold.noised_scale;\n",
        "        const float q = r < 0 ? noised_exp[i] * fold.noised_scale : expf(noised_exp[i]);\n",
        "finish_row",
    ),
    "struct in a loop": (
        "params",
        "    w[i] = from_float<T>(value);\n",
        "    const T kept = from_float<T>(value);\n    w[i] = kept;\n",
        "restore_adamw_of",
    ),
    "mark taken off": (
        "noise",
        "#pragma omp simd\n  for (int k = 0; k < quads; ++k) {\n    const PhiloxWords",
        "  for (int k = 0; k < quads; ++k) {\n    const PhiloxWords",
        "draw",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_check_sees_planted_defects(compile_report: Callable[..., tuple[str, str]], defect: str) -> None:
    source, old, new, function = DEFECTS[defect]
    text = text_of(source)
    assert text.count(old) == 1, "the loop has changed; plant the defect anew"
    text = text.replace(old, new)
    report, _ = compile_report(source, "avx2", text)
    found = complaints(text, report, source, "avx2")
    assert found
    assert all(c.startswith(function) for c in found), found
