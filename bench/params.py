"""Parameter lists: SAM's norm, perturb and restore; sign flips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpost import SAM, flatten_parameters
from fastpost.bench.registry import Case, Contender, Goal, Work, case, peer
from fastpost.ops import params as ops
from fastpost.published import PublishedSAM, foreach_sam_perturb, foreach_sam_restore
from fastpost.sam.perturbation.stash import Stash, UlpStash


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 (124M parameters, tied head)."""
    width, vocabulary, positions, layers = 768, 50257, 1024, 12
    block: list[tuple[int, ...]] = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (positions, width), *(block * layers), (width,), (width,)]


class Parameters(nn.Module):
    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.list = nn.ParameterList([nn.Parameter(torch.randn(s) * 0.02) for s in shapes])

    def give_gradients(self) -> Parameters:
        for p in self.list:
            gradient = torch.randn(p.shape) * 1e-3
            if p.grad is None:
                p.grad = gradient
            else:
                p.grad.copy_(gradient)
        return self


def sam(model: Parameters) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)


def rounds(opt: SAM) -> Work:
    """SAM's way to w + e and back."""

    def run() -> None:
        opt.first_step()
        opt.restore_()

    return run


@case
def sam_gpt2() -> Case:
    """Norm + perturb + restore over GPT-2's tensors: floor 7 bytes per byte of parameters, a copy moves 2."""
    shapes = gpt2_shapes()
    model = Parameters(shapes).give_gradients()
    listed = sam(model)
    flat_model = Parameters(shapes)
    flat_model.flat = flatten_parameters(flat_model)  # type: ignore[assignment]
    for p in flat_model.parameters():
        p.grad = None
    sum((p * 1e-3).sum() for p in flat_model.parameters()).backward()  # type: ignore[union-attr]
    flat_model.give_gradients()
    flattened = sam(flat_model)
    size = 4 * sum(p.numel() for p in model.parameters())
    source = torch.randn(size // 4)
    target = torch.zeros_like(source)

    params: list[Tensor] = [p.detach().clone() for p in model.parameters()]
    grads: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    stash = [torch.zeros_like(p) for p in params]

    def foreach() -> None:
        foreach_sam_perturb(params, grads, stash, 0.05)
        foreach_sam_restore(params, stash)

    popular_model = Parameters(shapes).give_gradients()
    popular = PublishedSAM(popular_model.parameters(), None)

    def wrapper() -> None:
        popular.first_step()
        popular.restore()

    return Case(
        "SAM norm + perturb + restore",
        "GPT-2, 148 tensors, 124M",
        "float32",
        [
            peer("copy of the parameters", lambda: target.copy_(source), 2 * size),
            Contender("fastpost, list", rounds(listed), 7 * size),
            Contender("fastpost, flattened", rounds(flattened), 7 * size),
            peer("torch._foreach_ recipe", foreach, 10 * size),
            peer("popular wrapper's loop", wrapper, 12 * size),
        ],
        [
            Goal("fastpost, list", "copy of the parameters", {"avx512": 3.0, "avx2": 3.0}),
            Goal("fastpost, list", "torch._foreach_ recipe", {"avx512": 0.60, "avx2": 0.60}),
            Goal("fastpost, list", "fastpost, flattened", {"avx512": 1.05, "avx2": 1.05}),
            Goal("fastpost, list", "popular wrapper's loop", {}),
        ],
    )


def there_and_back(stash: Stash, model: Parameters, dtype: torch.dtype, rho: float) -> Work:
    """To w + e and back, without the norm, which does not depend on how w is kept."""
    weights = [p.detach().to(dtype) for p in model.list]
    grads = [p.grad.to(dtype) for p in model.list if p.grad is not None]
    (bucket,) = ops.make_buckets(weights=weights, grads=grads)
    kept, squared = stash.room(bucket), ops.squared_norm(grads)
    perturb, restore = stash.operations(bucket)

    def run(_: object = kept) -> None:
        ops.run(perturb, bucket, squared, rho, None, dtype)
        ops.run(restore, bucket)

    return run


def stash_gpt2(dtype: torch.dtype, rho: float, listed: str) -> Case:
    """listed: the share of these weights that no code reaches at this rho, for the table."""
    model = Parameters(gpt2_shapes()).give_gradients()
    size = dtype.itemsize * sum(p.numel() for p in model.parameters())
    copied, coded = "stash='copy'", "stash='ulp'"
    return Case(
        "SAM perturb + restore, what is stashed",
        f"GPT-2, 148 tensors, 124M, {listed} listed",
        str(dtype).removeprefix("torch."),
        [
            Contender(copied, there_and_back(Stash(), model, dtype, rho), 6 * size),
            Contender(coded, there_and_back(UlpStash(), model, dtype, rho), 6 * size),
        ],
        [Goal(coded, copied, {"avx512": 1.0, "avx2": 1.0})],
    )


@case
def stash_gpt2_float32() -> Case:
    """A copy moves 4 and 2 times the parameters' bytes. Codes take half, and w + e is read to find w: 3.5 and 2.5.

    Normal gradients at this rho list as many weights as SmolLM2's own at rho 0.15 (bench/sam_stash.py).
    """
    return stash_gpt2(torch.float32, 0.004, "0.4 %")


@case
def stash_gpt2_float32_long() -> Case:
    """The same with twelve times as many listed."""
    return stash_gpt2(torch.float32, 0.05, "5 %")


@case
def stash_gpt2_bfloat16() -> Case:
    """The same in bfloat16, whose codes reach farther."""
    return stash_gpt2(torch.bfloat16, 0.05, "0.02 %")


@case
def distance_gpt2() -> Case:
    """GPT-2's tensors and a copy: their distance (GAP's drift) and dot product (SAM's variants). Floor two reads each, as
    much as a copy moves."""
    shapes = gpt2_shapes()
    now = [torch.randn(shape) * 0.02 for shape in shapes]
    then = [w + 1e-4 for w in now]
    size = 4 * sum(w.numel() for w in now)
    source = torch.randn(size // 4)
    target = torch.zeros_like(source)

    def foreach() -> None:
        torch.stack(torch._foreach_norm(torch._foreach_sub(now, then))).norm()

    ours, copied, composed = "fastpost squared_distance", "copy", "torch._foreach_sub + _foreach_norm"
    product = "fastpost dot"
    return Case(
        "distance between two lists",
        "GPT-2, 148 tensors, 124M",
        "float32",
        [
            peer(copied, lambda: target.copy_(source), 2 * size),
            Contender(ours, lambda: ops.squared_distance(now, then), 2 * size),
            Contender(product, lambda: ops.dot(now, then), 2 * size),
            peer(composed, foreach, 4 * size),
        ],
        [
            *(Goal(name, copied, dict.fromkeys(("avx512", "avx2"), 1.2)) for name in (ours, product)),
            Goal(ours, composed, {}),
        ],
    )


@case
def sam_tiny() -> Case:
    """Perturb + restore over a thousand tensors of 256 bytes to 4 KB: host time, not bandwidth."""
    shapes: list[tuple[int, ...]] = [(64 * (1 + i % 16),) for i in range(1000)]
    model = Parameters(shapes).give_gradients()
    opt = sam(model)
    popular = PublishedSAM(Parameters(shapes).give_gradients().parameters(), None)

    def wrapper() -> None:
        popular.first_step()
        popular.restore()

    return Case(
        "SAM perturb + restore, small tensors",
        "1,000 x 256 B to 4 KB",
        "float32",
        [Contender("fastpost", rounds(opt)), peer("popular wrapper's loop", wrapper)],
        [Goal("fastpost", "popular wrapper's loop", {"avx512": 0.20, "avx2": 0.20})],
    )


@case
def negate() -> Case:
    """Sign flips of 64M gradients: floor 2 bytes per byte, as a copy in place."""
    x = torch.randn(1 << 26)
    y = torch.zeros_like(x)
    size = 4 * x.numel()
    return Case(
        "negate + norm, random flips",
        "64M",
        "float32",
        [
            peer("copy", lambda: y.copy_(x), 2 * size),
            Contender("fastpost negate_", lambda: ops.negate_([x]), 2 * size),
            Contender("fastpost negate_clip_ (negate + norm)", lambda: ops.negate_clip_([x]), 2 * size),
            Contender("fastpost flip_signs_", lambda: ops.flip_signs_([x], 7), 2 * size),
            peer("torch neg_ + vector_norm", lambda: torch.linalg.vector_norm(x.neg_()), 3 * size),
        ],
    )
