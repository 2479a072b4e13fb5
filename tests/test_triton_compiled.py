"""Triton kernels compiled ahead of time, without a GPU: wide accesses, no stack, no local memory.

The interpreter shows that the kernels are right (run the operation tests with TRITON_INTERPRET=1); this shows what a GPU
would execute, read from its machine code.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed here")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no compiled kernels", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastpost.triton_kernels import divergence, noise, numerics, params  # noqa: E402

# What differs between versions of the compiler shows on one architecture.
ARCHS = (90,) if triton.__version__.startswith("3.6.") else (80, 90, 100)
TYPES = {"float32": ("*fp32", tl.float32, 4), "bfloat16": ("*bf16", tl.bfloat16, 8)}
TOOLS = Path(triton.__file__).parent


def tool(name: str) -> Path:
    return next(path for path in TOOLS.rglob(name) if path.is_file())


def compiled(
    kernel, types: dict, constants: dict, aligned: tuple, warps: int, arch: int, tmp_path: Path, stage: str = "", **options
):
    """(resource line, machine code) of a kernel for one architecture; or what it is after a stage of the compiler."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True, **options}
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm
    if stage:
        return code[stage]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(code["cubin"])
    run = {"capture_output": True, "text": True, "check": True}
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", binary], **run)
    (line,) = [x for x in (usage.stdout + usage.stderr).splitlines() if "REG:" in x]
    return line, subprocess.run([tool("nvdisasm"), binary], **run).stdout


def complaints(line: str, code: str, registers: int, width: str = "128", accesses: str = "LDG STG") -> list[str]:
    """What is wrong with a kernel: stack or local memory (LOCAL:0 is printed even then), registers, narrow accesses."""
    found = []
    if "STACK:0 " not in line:
        found.append(f"uses the stack: {line}")
    if re.search(r"\b(LDL|STL)\b", code):
        found.append("reads or writes local memory")
    used = int(re.search(r"REG:(\d+)", line)[1])
    if used > registers:
        found.append(f"{used} registers, budget {registers}")
    for access in accesses.split():
        if not re.search(rf"\b{access}\.[\w.]*\b{width}\b", code):
            found.append(f"no {width}-bit {access}")
    return found


def divergence_kernel(
    dtype: str, arch: int, tmp_path: Path, warps: int = 16, logits: str | None = None, **changed
) -> tuple[str, str]:
    pointer, element, head = TYPES[dtype]
    blocks = ("clean", "noised", "grad_clean", "grad_noised")
    types = dict.fromkeys(blocks, pointer) | dict.fromkeys(blocks[:2], logits or pointer) | {"labels": "*i64", "cols": "i32"}
    types |= dict.fromkeys(("kl_weights", "ce_weights", "kl_out", "ce_out"), "*fp64")
    types |= {f"{b}_stride": "i64" for b in blocks}
    types |= dict.fromkeys(("smoothing", "slope", "teaches", "noised_classifies"), "fp32")
    constants = {
        "dtype": element, "vector": True, "has_labels": True, "want_clean": True, "want_noised": True, "wide": False,
        "operand": False, "HEAD": head, "BLOCK": 4096, **changed,
    }  # fmt: skip
    return compiled(divergence._divergence_kernel, types, constants, blocks, warps, arch, tmp_path, enable_fp_fusion=False)


def operand_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    """The logits are float32, their gradients of this dtype."""
    return divergence_kernel(dtype, arch, tmp_path, logits="*fp32", operand=True, HEAD=4)


def perturb_kernel(dtype: str, arch: int, tmp_path: Path, stage: str = "", **changed):
    constants = {
        "dtype": TYPES[dtype][1], "seen": tl.bfloat16, "adaptive": False, "kept": "copy", "stochastic": False,
        "aligned": True, "BLOCK": 2048, **changed,
    }  # fmt: skip
    types = {"table": "*i64", "partial": "*fp64", "scale": "*fp32", "seed": "*i64", "words": "*i64", "capacity": "i32"}
    types |= {"eta": "fp32"}
    return compiled(
        params._sam_perturb_kernel, types, constants, ("table",), 8, arch, tmp_path, stage, enable_fp_fusion=False
    )


def stochastic_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return perturb_kernel("bfloat16", arch, tmp_path, stochastic=True)


def masters_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return perturb_kernel("bfloat16", arch, tmp_path, kept="masters")


def codes_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return perturb_kernel(dtype, arch, tmp_path, kept="codes", BLOCK=params.CODED_BLOCK)


def decode_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    narrow = dtype != "float32"
    constants = {"bits": tl.int16 if narrow else tl.int32, "narrow": narrow, "aligned": True}
    constants["BLOCK"] = params.copy_block(2 if narrow else 4)
    types = {"table": "*i64", "waits": "*i32"}
    return compiled(params._decode_kernel, types, constants, ("table",), 8, arch, tmp_path)


def cast_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    constants = {"dtype": tl.bfloat16, "aligned": True, "BLOCK": 2048}
    return compiled(params._cast_kernel, {"table": "*i64"}, constants, ("table",), 8, arch, tmp_path)


def norm_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return sum_kernel("squares", dtype, arch, tmp_path)


def distance_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return sum_kernel("differences", dtype, arch, tmp_path)


def dot_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return sum_kernel("products", dtype, arch, tmp_path)


def sum_kernel(terms: str, dtype: str, arch: int, tmp_path: Path, stage: str = "", aligned: bool = True):
    constants = {"dtype": TYPES[dtype][1], "terms": terms, "aligned": aligned, "BLOCK": 2048}
    types = {"table": "*i64", "partial": "*fp64", "eta": "fp32", "eta_rest": "fp32"}
    return compiled(params._sum_kernel, types, constants, ("table",), 8, arch, tmp_path, stage, enable_fp_fusion=False)


def restore_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    bits = tl.int32 if dtype == "float32" else tl.int16
    constants = {"bits": bits, "aligned": True, "BLOCK": params.copy_block(4 if dtype == "float32" else 2)}
    return compiled(params._restore_kernel, {"table": "*i64"}, constants, ("table",), 8, arch, tmp_path)


def adamw_kernel(dtype: str, arch: int, tmp_path: Path, coded: bool = False) -> tuple[str, str]:
    constants = {"dtype": TYPES[dtype][1], "coded": coded, "aligned": True}
    constants["BLOCK"] = params.copy_block(4 if dtype == "float32" else 2)
    types = {"table": "*i64", "factors": "*fp32", "waits": "*i32"}
    return compiled(params._restore_adamw_kernel, types, constants, ("table",), 8, arch, tmp_path, enable_fp_fusion=False)


def adamw_codes_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return adamw_kernel(dtype, arch, tmp_path, coded=True)


def scale_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    constants = {"dtype": TYPES[dtype][1], "aligned": True, "BLOCK": 2048}
    return compiled(params._scale_kernel, {"table": "*i64", "factor": "*fp64"}, constants, ("table",), 8, arch, tmp_path)


def scale_rows_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    pointer, element, head = TYPES[dtype]
    constants = {"dtype": element, "vector": True, "HEAD": head, "BLOCK": 2048}
    types = {"block": pointer, "factors": "*fp64", "cols": "i32", "stride": "i64", "factor_stride": "i32"}
    return compiled(divergence._scale_rows_kernel, types, constants, ("block",), 8, arch, tmp_path)


def flip_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    bits, sign = (tl.int32, -(1 << 31)) if dtype == "float32" else (tl.int16, -(1 << 15))
    constants = {"bits": bits, "sign": sign, "random": True, "aligned": True, "BLOCK": 2048}
    types = {"table": "*i64", "seed": "*i64"}
    return compiled(params._flip_kernel, types, constants, ("table",), 8, arch, tmp_path)


def noise_kernel(dtype: str, arch: int, tmp_path: Path, **changed) -> tuple[str, str]:
    pointer, element, _ = TYPES[dtype]
    types = dict.fromkeys(("source", "clean", "noised"), pointer) | dict.fromkeys(("ids", "rows", "seed"), "*i64")
    types |= {"scales": "*fp32", "lines": "i64", "width": "i64", "stride": "i64", "eps": "fp32"}
    types |= {"skipped": "i32", "parts": "i32"}
    constants = {
        "dtype": element, "normal": True, "has_ids": False, "has_rows": False, "has_scales": False, "QUADS": 256, **changed,
    }  # fmt: skip
    aligned = ("source", "clean", "noised", "width", "stride")
    return compiled(noise._noise_kernel, types, constants, aligned, 4, arch, tmp_path, enable_fp_fusion=False)


def scaled_noise_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    return noise_kernel(dtype, arch, tmp_path, has_ids=True, has_rows=True, has_scales=True)


def js_kernel(dtype: str, arch: int, tmp_path: Path) -> tuple[str, str]:
    pointer, element, _ = TYPES[dtype]
    blocks = ("clean", "noised", "grad_clean", "grad_noised")
    strides = tuple(f"{b}_stride" for b in blocks)
    types = dict.fromkeys(blocks, pointer) | dict.fromkeys(strides, "i64")
    types |= {"weights": "*fp64", "out": "*fp64", "cols": "i32"}
    constants = {
        "dtype": element,
        "want_clean": True,
        "want_noised": True,
        "wide": False,
        "BLOCK": divergence.js_block(16 // TYPES[dtype][2]),
    }
    aligned = (*blocks, *strides, "cols")
    options = {"enable_fp_fusion": False, "maxnreg": divergence.JS_REGISTERS}
    return compiled(divergence._js_kernel, types, constants, aligned, 8, arch, tmp_path, **options)


# Registers that still leave room for two blocks (of 512 threads), four (256) or eight (128) on a multiprocessor.
KERNELS = {
    "divergence": (divergence_kernel, 128),
    "operands": (operand_kernel, 128),
    "Jensen-Shannon": (js_kernel, 128),
    "perturb": (perturb_kernel, 128),
    "perturb, stochastic": (stochastic_kernel, 192),  # eight Philox calls at a time leave room for one block
    "perturb from masters": (masters_kernel, 128),
    "perturb, codes": (codes_kernel, 128),
    "decode": (decode_kernel, 64),
    "cast of masters": (cast_kernel, 64),
    "norm": (norm_kernel, 128),
    "distance": (distance_kernel, 128),
    "dot product": (dot_kernel, 128),
    "restore": (restore_kernel, 64),
    "restore and AdamW": (adamw_kernel, 128),
    "decode and AdamW": (adamw_codes_kernel, 128),
    "clip": (scale_kernel, 64),
    "scaled rows": (scale_rows_kernel, 64),
    "flip": (flip_kernel, 128),
    "noise": (noise_kernel, 64),
    "noise, scaled rows": (scaled_noise_kernel, 64),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_use_wide_accesses_and_no_local_memory(name: str, dtype: str, arch: int, tmp_path: Path) -> None:
    build, registers = KERNELS[name]
    # Four numbers of a Philox call lie side by side: 8 bytes of bfloat16, of which Triton 3.6 makes 16.
    # So do as many elements of 16 bits in a block of a perturbation that keeps codes.
    width = "(?:64|128)" if name.startswith(("noise", "perturb, codes")) and dtype == "bfloat16" else "128"
    accesses = "LDG" if name in ("norm", "distance", "dot product") else "LDG STG"  # these write one number per chunk
    assert complaints(*build(dtype, arch, tmp_path), registers, width, accesses) == []


def test_the_checks_see_planted_defects(tmp_path: Path) -> None:
    narrow = complaints(*divergence_kernel("float32", 90, tmp_path, vector=False), 128)
    assert [c for c in narrow if "128-bit" in c]
    spilling = complaints(*divergence_kernel("float32", 90, tmp_path, warps=4), 255)
    assert [c for c in spilling if "local memory" in c or "stack" in c]
    unaligned = complaints(*perturb_kernel("bfloat16", 90, tmp_path, aligned=False), 128)
    assert [c for c in unaligned if "128-bit" in c]
    assert complaints(*perturb_kernel("bfloat16", 90, tmp_path), 20)


# -- sums that do not depend on where the tensors lie ---------------------------------------------------------------------


def sums_by_layout(code: str) -> list[str]:
    """Sums of floats, in the compiler's form of a kernel, that add more than two numbers at a time: in what order follows
    from which thread holds which element, and that from how wide memory is read."""
    found = []
    for axis, body, operands in re.findall(
        r'"tt\.reduce"\([^)]*\) <\{axis = (\d+).*?\(\{(.*?)\}\) : \((.*?)\) ->', code, re.DOTALL
    ):
        shapes = [[int(n) for n in shape.split("x")] for shape in re.findall(r"tensor<([\dx]+)x[fi]\d+", operands)]
        if "arith.addf" in body and any(shape[int(axis)] > 2 for shape in shapes):
            found.append(operands)
    return found


def neighbours(code: str) -> set[str]:
    """How many neighbouring elements a thread loads, in the compiler's layouts."""
    layouts = dict(re.findall(r"(#blocked\d*) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", code))
    return {layouts[name] for name in re.findall(r"tt\.load .* : tensor<[\dx]+x!tt\.ptr<\w+>, (#blocked\d*)>", code)}


SUMS = {
    "norm": lambda *at, **how: sum_kernel("squares", *at, **how),
    "norm, scaled": lambda *at, **how: sum_kernel("scaled", *at, **how),
    "distance": lambda *at, **how: sum_kernel("differences", *at, **how),
    "dot product": lambda *at, **how: sum_kernel("products", *at, **how),
    "perturb": perturb_kernel,
    "perturb, adaptive": lambda *at, **how: perturb_kernel(*at, adaptive=True, **how),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SUMS)
def test_lists_are_summed_by_index_however_wide_they_are_read(name: str, dtype: str, tmp_path: Path) -> None:
    wide, narrow = (SUMS[name](dtype, 90, tmp_path, stage="ttgir", aligned=aligned) for aligned in (True, False))
    assert (neighbours(narrow), neighbours(wide)) == ({"1"}, {str(TYPES[dtype][2])})  # two layouts indeed
    assert sums_by_layout(wide) == sums_by_layout(narrow) == []


@triton.jit
def _summing_kernel(x, out, plain: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.load(x + tl.arange(0, BLOCK))
    tl.store(out, tl.sum(block, axis=0) if plain else numerics.ordered_sum(block))


def test_a_sum_in_the_layouts_order_is_seen(tmp_path: Path) -> None:
    for plain in (True, False):
        constants = {"plain": plain, "BLOCK": 1024}
        code = compiled(_summing_kernel, {"x": "*fp32", "out": "*fp32"}, constants, ("x",), 4, 90, tmp_path, "ttgir")
        assert bool(sums_by_layout(code)) == plain


# Kernels that add nothing, or one integer to another.
ADD_NOTHING = {
    "_restore_kernel",
    "_put_listed_kernel",
    "_decode_kernel",
    "_cast_kernel",
    "_flip_kernel",
    "_scale_kernel",
    "_scale_rows_kernel",
}


def test_what_adds_is_launched_without_the_compilers_fusing() -> None:
    seen = set()
    for module in (divergence, noise, params):
        for call in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                name = ast.unparse(call.func.value)
                options = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert name in ADD_NOTHING or options.get("enable_fp_fusion") == "False", name
                seen.add(name)
    assert seen > ADD_NOTHING
