"""What SAM optimizers keep of what users rely on: the conformance suite, and what is held between the passes."""

from __future__ import annotations

import gc
import importlib
import inspect
import operator
from typing import Any

import torch
from torch import Tensor

from fastpost import SAM
from fastpost.bench.features import Finding
from fastpost.conformance import peers, sam_conformance
from fastpost.conformance.adapter import Adapter

ADAPTERS = {
    "fastpost": Adapter(SAM),
    "pytorch_optimizer": peers.pytorch_optimizer,
    "heavyball": peers.heavyball,
    "torchzero": peers.torchzero,
}
# What is asked, and the property of `fastpost.conformance` that answers it.
PROPERTIES = {
    "e = rho g / norm, one norm over all tensors": "perturbation",
    "weights return bit for bit, float32": "restore",
    "weights return bit for bit, bfloat16": "restore bfloat16",
    "weights return where the second pass raises": "exception",
    "GradScaler": "GradScaler",
    "GradScaler, overflow in the first pass: no step": "GradScaler, first pass",
    "GradScaler, overflow in the second pass: no step": "GradScaler, second pass",
    "saved and resumed bit for bit": "resume",
    "DDP: the steps of one process": "DDP",
    "FSDP2: the steps of one process": "FSDP2",
    "FSDP2: weights return bit for bit": "FSDP2 restore",
}
ANSWERS = {"pass": "yes", "fail": "no", "error": "error", "not applicable": "n/a"}
WHERE = {"fastpost": ("sam.variants", "sam"), "torchzero": ("m",)}  # within the library; of a second module subclasses alone


def findings(library: str) -> list[Finding]:
    if library not in ADAPTERS:
        return []
    adapter = ADAPTERS[library]
    results = {r.property: r for r in sam_conformance(adapter, only=list(PROPERTIES.values()), table=False)}
    found = [
        Finding("SAM", feature, ANSWERS[results[name].status], results[name].detail) for feature, name in PROPERTIES.items()
    ]
    found.append(attempt("how a step is made", lambda: ways(adapter)))
    found.append(attempt("m-SAM: an e for each micro-batch, one step", lambda: m_sam(library, adapter)))
    for dtype in (torch.float32, torch.bfloat16):
        name = f"bytes held per weight between the passes, {str(dtype).removeprefix('torch.')}"
        found.append(attempt(name, lambda d=dtype: (f"{held(adapter, d):.2f}", "")))
        frugal = Adapter(lambda *args, **kw: SAM(*args, stash="ulp", **kw)) if library == "fastpost" else adapter
        found.append(attempt(f"{name}, smallest setting", lambda d=dtype, a=frugal: (f"{held(a, d):.2f}", "")))
    found.append(attempt("variants, by their classes", lambda: variants(library)))
    return found


def attempt(feature: str, question: Any) -> Finding:
    try:
        result, detail = question()
    except Exception as error:  # the answer is that it raises
        return Finding("SAM", feature, "error", f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}")
    return Finding("SAM", feature, result, detail)


def problem(adapter: Adapter, dtype: torch.dtype = torch.float32, rows: int = 4) -> tuple[Any, list[Tensor], Any]:
    """An optimizer over two matrices, and a function that makes a pass over some rows of a batch."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(rows, 500).to(dtype)) for _ in range(2)]
    data = torch.randn(4, rows, 500).to(dtype)
    opt = adapter.make(params, torch.optim.SGD, rho=0.05, lr=0.1)

    def passing(part: slice) -> Any:
        def run() -> Tensor:
            loss: Tensor = sum(((p * x).sum().square() + p.square().sum()) for p in params for x in data[part]) / 4  # type: ignore[assignment]
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return run

    return opt, list(params), passing


def ways(adapter: Adapter) -> tuple[str, str]:
    """In which styles a step moves the weights."""
    shown = {"two_step": "two calls", "closure": "step(closure)", "closure_after_gradient": "step(closure) after a gradient"}
    given, refused = [], []
    for style, name in shown.items():
        opt, params, passing = problem(adapter)
        before, kept = [p.detach().clone() for p in params], adapter.style
        adapter.style = style
        try:
            adapter.step(opt, passing(slice(None)), passing(slice(None)))
        except Exception as error:
            refused.append(f"{name}: {type(error).__name__}")
            continue
        finally:
            adapter.style = kept
        if any(not torch.equal(p, b) for p, b in zip(params, before, strict=True)):
            given.append(name)
    return " or ".join(given) or "no", "; ".join(refused)


def m_sam(library: str, adapter: Adapter) -> tuple[str, str]:
    """Whether the gradients of two micro-batches, each at a w + e of its own, make one step: a way back without one."""
    opt, params, passing = problem(adapter)
    back = [name for name in dir(opt) if "restore" in name.lower() and not name.startswith("_")]
    if library != "fastpost":
        return ("no", "no public method goes back to w without a step") if not back else ("n/a", f"not driven: {back}")
    start = [p.detach().clone() for p in params]
    expected = [torch.zeros_like(p) for p in params]
    parts = (slice(0, 2), slice(2, 4))
    for part in parts:  # by hand
        grads = gradient(params, passing(part))
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p.add_(g, alpha=0.05 / float(norm))
        for total, g in zip(expected, gradient(params, passing(part)), strict=True):
            total += g
        with torch.no_grad():
            for p, s in zip(params, start, strict=True):
                p.copy_(s)
    sums = [torch.zeros_like(p) for p in params]
    for part in parts:
        opt.zero_grad()
        passing(part)()
        opt.first_step(zero_grad=True)
        passing(part)()
        opt.restore_()
        for total, p in zip(sums, params, strict=True):
            total += p.grad  # type: ignore[arg-type]
    for p, total in zip(params, sums, strict=True):
        p.grad = total
    opt.step()
    off = max(float((p.detach() - s + 0.1 * e).abs().max()) for p, s, e in zip(params, start, expected, strict=True))
    scale = max(float((0.1 * e).abs().max()) for e in expected)
    return ("yes" if off < 1e-5 * scale else "no"), f"off by {off / scale:.1e} of the step"


def gradient(params: list[Tensor], run: Any) -> list[Tensor]:
    for p in params:
        p.grad = None
    run()
    found = [p.grad.clone() for p in params if p.grad is not None]
    for p in params:
        p.grad = None
    return found


def held(adapter: Adapter, dtype: torch.dtype) -> float:
    """Bytes per weight of all tensors that are there in the second pass of a step over SGD, less weights, gradients and what
    was there before the optimizer."""
    opt, params, passing = problem(adapter, dtype, rows=400)
    known = {t.untyped_storage().data_ptr() for t in tensors()}
    sizes: list[int] = []

    def second() -> Tensor:
        loss: Tensor = passing(slice(None))()
        gone = known | {p.grad.untyped_storage().data_ptr() for p in params if p.grad is not None}
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        sizes.append(sum(size for at, size in new.items() if at not in gone))
        return loss

    adapter.step(opt, passing(slice(None)), second)
    return sizes[-1] / sum(p.numel() for p in params)


def tensors() -> list[Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.numel()]


def variants(library: str) -> tuple[str, str]:
    """Public classes of the library that have SAM in their name or are a variant of it."""
    root = importlib.import_module(library)
    first, *others = [operator.attrgetter(name)(root) for name in WHERE[library]] if library in WHERE else [root]
    names = {
        name
        for module in (first, *others)
        for name, value in vars(module).items()
        if inspect.isclass(value) and not name.startswith("_")
        if _is_variant(value) or (module is first and "SAM" in name)
    }
    return ", ".join(sorted(names)) or "no", f"in {', '.join(module.__name__ for module in (first, *others))}"


def _is_variant(value: type) -> bool:
    return any(base.__name__ == "Variant" for base in value.__mro__[1:])
