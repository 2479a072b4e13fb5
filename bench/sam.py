"""SAM around a whole step on the CPU: what it costs beyond its second forward and backward pass, its norm and its exit."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.bench.params import gpt2_shapes
from fastpost.bench.registry import Case, Contender, Goal, Result, Skipped, Work, case, peer
from fastpost.ops import params as ops
from fastpost.sam import SAMWindow

MICRO_BATCHES, TOKENS = 4, 256


@dataclass(frozen=True)
class Beyond(Goal):
    """What a contender takes beyond others that are its parts, over the baseline."""

    parts: tuple[str, ...] = ()

    def measured(self, results: Mapping[str, Result]) -> float:
        rounds = zip(*(results[name].seconds for name in (self.contender, self.baseline, *self.parts)), strict=True)
        return statistics.median((whole - sum(parts)) / base for whole, base, *parts in rounds)

    def describe(self) -> str:
        return f"{self.contender} beyond its parts, over {self.baseline}"


def smollm2_shapes() -> list[tuple[int, ...]]:
    """The 272 tensors of SmolLM2-135M."""
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
    return [(49152, 576), *layer * 30, (576,)]


@case
def sam_norm() -> Case:
    """The norm in the step or as gradients arrive: each of SmolLM2's is written, and its hooks are called as FSDP2 does."""
    shapes = smollm2_shapes()
    factors = [torch.randn(shape) * 1e-3 for shape in shapes]
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    weights = [p.detach() for p in params]
    stash = [torch.zeros_like(w) for w in weights]
    squared = ops.squared_norm(factors)
    for p in params:
        p.grad = torch.zeros_like(p)

    def backward() -> None:
        for p, x in zip(reversed(params), reversed(factors), strict=True):
            assert p.grad is not None
            p.grad.copy_(x)
            for hook in (p._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
                hook(p)

    def perturb() -> None:
        ops.sam_perturb_(weights, factors, stash, squared, rho=0.05)

    def ascent(opt: SAM) -> Work:
        def run() -> None:
            opt.await_ascent(True)
            backward()
            opt.first_step()
            opt.restore_()

        return run

    names = {norm: f'gradients, first_step and restore_, norm="{norm}"' for norm in ("step", "backward")}
    there = "sam_perturb_, sam_restore_"
    parts = ("gradients", there)
    return Case(
        "where SAM's norm is summed up",
        "SmolLM2, 272 tensors, 135M",
        "float32",
        [
            peer("gradients", backward),
            Contender("sam_perturb_", perturb),
            Contender(there, lambda: (perturb(), ops.sam_restore_(weights, stash))),
            *(Contender(names[norm], ascent(SAM(params, torch.optim.SGD, 0.05, norm=norm, lr=0.0))) for norm in names),
        ],
        [
            Beyond(names["backward"], "sam_perturb_", dict.fromkeys(("avx512", "avx2"), 0.02), parts=parts),
            Beyond(names["step"], "sam_perturb_", {}, parts=parts),
            Goal(names["backward"], names["step"], {}),
        ],
    )


def leaves(name: str, stash: str, fused_restore: bool) -> Contender:
    """The way out of a perturbation over GPT-2's tensors."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s) * 0.02) for s in gpt2_shapes()]
    for p in params:
        p.grad = torch.randn(p.shape) * 1e-3
    opt = SAM(params, torch.optim.AdamW, 0.05, lr=1e-4, fused=True, stash=stash, fused_restore=fused_restore)
    # Of 4 bytes: AdamW reads w, g and both moments and writes three of them; fused, a copy takes the place of w. Codes are
    # half as wide, but w + e is read as well.
    moved = {("copy", False): 9, ("copy", True): 7, ("ulp", False): 9.5, ("ulp", True): 7.5}[stash, fused_restore]
    return Contender(name, opt.second_step, int(moved * 4 * sum(p.numel() for p in params)), before=opt.first_step)


@case
def sam_exit() -> Case:
    """Restore and step, or both in one pass (7 bytes moved for 9)."""
    return Case(
        "SAM's restore + AdamW",
        "GPT-2, 148 tensors, 124M",
        "float32",
        [leaves("restore, then torch's fused AdamW", "copy", False), leaves("fused_restore", "copy", True)],
        [Goal("fused_restore", "restore, then torch's fused AdamW", {"avx512": 0.88, "avx2": 0.88})],
    )


@case
def sam_exit_ulp() -> Case:
    """The same with codes in the place of a copy (7.5 bytes moved for 9.5); 5 % of these weights are listed."""
    apart, fused, copied = "stash='ulp': restore, then torch's fused AdamW", "stash='ulp', fused_restore", "fused_restore"
    return Case(
        "SAM's restore + AdamW, what is stashed",
        "GPT-2, 148 tensors, 124M",
        "float32",
        [leaves(apart, "ulp", False), leaves(fused, "ulp", True), leaves(copied, "copy", True)],
        [Goal(fused, apart, {"avx512": 0.88, "avx2": 0.88}), Goal(fused, copied, {})],
    )


@case
def sam_step() -> Case:
    """A step of GPT-2 over four micro-batches, beside the same forward and backward passes without SAM."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise Skipped(f"needs transformers: {error}") from error
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()  # eval: no dropout to draw
    batches = [torch.randint(0, 50257, (1, TOKENS)) for _ in range(MICRO_BATCHES)]

    def forward_backward(ids: Tensor) -> None:
        (model(input_ids=ids, labels=ids).loss / MICRO_BATCHES).backward()

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def plain(passes: int) -> Work:
        opt = optimizer()

        def run() -> None:
            for _ in range(passes):
                opt.zero_grad()
                for ids in batches:
                    forward_backward(ids)
            opt.step()

        return run

    def sam(ascent_fraction: float) -> Work:
        opt = SAM(None, optimizer(), rho=0.05)
        window = SAMWindow(opt, forward_backward, ascent_fraction=ascent_fraction)

        def run() -> None:
            opt.zero_grad()
            window.run(batches)
            opt.step()

        return run

    return Case(
        "a step of GPT-2",
        f"124M, {MICRO_BATCHES} x {TOKENS} tokens",
        "float32",
        [
            peer("AdamW", plain(1), slow=True),
            peer("AdamW after two passes", plain(2), slow=True),
            Contender("SAM", sam(1.0), slow=True),
            Contender("SAM, ascent on a quarter", sam(0.25), slow=True),
        ],
        [
            Goal("SAM", "AdamW after two passes", dict.fromkeys(("avx512", "avx2"), 1.02)),
            Goal("SAM, ascent on a quarter", "AdamW", dict.fromkeys(("avx512", "avx2"), 1.30)),
        ],
    )
