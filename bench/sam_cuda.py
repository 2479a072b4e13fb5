"""SAM over whole lists on a GPU, beside torch's multi-tensor operations and the popular wrapper; what the host pays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpost import SAM, flatten_parameters, plan
from fastpost.bench.params_cuda import COPY, DTYPES, SHARES, also_triton, copy_of, name_of
from fastpost.bench.registry import Bandwidth, Case, Contender, Goal, HostTime, Launches, Target, Work, cuda_case, peer
from fastpost.ops import params as ops
from fastpost.published import PublishedSAM, foreach_sam_perturb, foreach_sam_restore
from fastpost.sam.perturbation.stash import Stash, UlpStash

Shapes = list[tuple[int, ...]]
RHO = 0.05


def llama_shapes(at: Target, width: int) -> Shapes:
    """290 tensors as in a Llama of 32 layers: embedding, four attention and three MLP matrices and two norms each, norm."""
    width = at.size(width, 8)
    wide = (width * 11 // 4 + 7) // 8 * 8
    square, up, down = (width, width), (wide, width), (width, wide)
    block: Shapes = [square, square, square, square, up, up, down, (width,), (width,)]
    return [(at.size(32000, 8), width), *(block * at.size(32)), (width,)]


def elements(shapes: Shapes) -> int:
    return sum(torch.Size(s).numel() for s in shapes)


def parameters(at: Target, shapes: Shapes, dtype: torch.dtype, grads: list[Tensor] | None = None) -> nn.ParameterList:
    """Weights of a trained model's size; gradients are given or drawn."""
    made = nn.ParameterList([nn.Parameter(at.randn(*s, dtype=dtype, std=0.02)) for s in shapes])
    for i, p in enumerate(made):
        p.grad = grads[i] if grads is not None else at.randn(*p.shape, dtype=dtype, std=1e-3)
    return made


def gradients(params: nn.ParameterList) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def rounds(params: nn.ParameterList) -> Work:
    """SAM's way to w + e and back."""
    opt = SAM(params.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)

    def run() -> None:
        opt.first_step()
        opt.restore_()

    return run


def bucket_of(params: nn.ParameterList) -> plan.Bucket:
    """A bucket with its stash, kept from call to call as SAM keeps it."""
    weights = [p.detach() for p in params]
    return ops.make_buckets(weights=weights, grads=gradients(params), stash=plan.flat_like(weights)[1])[0]


def passes(bucket: plan.Bucket) -> Work:
    """SAM's three passes by themselves: norm, perturb, restore."""

    def run() -> None:
        squared = ops.run("squared_norm", bucket, None)
        ops.run("sam_perturb_", bucket, squared, RHO, None, bucket.dtype)
        ops.run("sam_restore_", bucket)

    return run


def foreach(params: nn.ParameterList) -> Work:
    weights, grads = [p.detach() for p in params], gradients(params)
    stash = [torch.empty_like(w) for w in weights]

    def run() -> None:
        foreach_sam_perturb(weights, grads, stash, RHO)
        foreach_sam_restore(weights, stash)

    return run


def wrapper(params: nn.ParameterList) -> Work:
    popular = PublishedSAM(params.parameters(), None, RHO)

    def run() -> None:
        popular.first_step()
        popular.restore()

    return run


@cuda_case()
def host_time(at: Target) -> Case:
    """What a call costs the host: the plan of a flat buffer, and 600 tensors whose gradients are new each time."""
    shapes: Shapes = [(1024,)] * at.size(600, 30)

    def contenders() -> list[Contender]:
        many = parameters(at, shapes, torch.float32)
        flat, bucket = bucket_of(parameters(at, [(at.size(1 << 20),)], torch.float32)), bucket_of(many)
        norm = ops.squared_norm(flat.grads)
        fresh: list[list[Tensor]] = [gradients(many), [g.clone() for g in gradients(many)]]
        whole = SAM(parameters(at, shapes, torch.float32).parameters(), torch.optim.SGD, rho=RHO, lr=0.1)

        def perturb(kept: plan.Bucket) -> object:
            return ops.run("sam_perturb_", kept, norm, RHO, None, torch.float32)

        def repoint() -> object:
            fresh.reverse()
            bucket.grads = list(fresh[0])
            return perturb(bucket)

        def renew() -> None:
            whole.restore_()
            for group in whole.param_groups:
                for p in group["params"]:
                    p.grad = p.grad.clone()

        return [
            Contender("perturb, flat plan", lambda: perturb(flat)),
            Contender("perturb, 600 new gradients", repoint),
            Contender("SAM.first_step, 600 new gradients", whole.first_step, before=renew),
        ]

    goals: list[Goal] = [
        HostTime("perturb, flat plan", limit={"cuda": 15}),
        HostTime("perturb, 600 new gradients", limit={"cuda": 120}),
        HostTime("SAM.first_step, 600 new gradients"),
    ]
    return Case("host time of a perturbation", f"{len(shapes)} x 4 KB", "float32", contenders, goals, wall=True)


@cuda_case()
def sam_small(at: Target) -> Case:
    """A thousand tensors of 1 to 64 KB: launches and host time, not bandwidth."""
    shapes: Shapes = [(256 * (1 + i % 64),) for i in range(at.size(1000, 70))]
    size = 4 * elements(shapes)

    def contenders() -> list[Contender]:
        return [
            Contender("list", rounds(parameters(at, shapes, torch.float32)), 7 * size, launches=True),
            peer("_foreach_ recipe", foreach(parameters(at, shapes, torch.float32)), launches=True),
            peer("popular wrapper", wrapper(parameters(at, shapes, torch.float32))),
        ]

    goals = [
        Goal("list", "_foreach_ recipe", {"cuda": 10.0}, faster=True),
        Goal("list", "popular wrapper", {"cuda": 30.0}, faster=True),
    ]
    return Case(
        "norm + perturb + restore, small tensors", f"{len(shapes):,} x 1 to 64 KB", "float32", contenders, goals,
        bytes=7 * size, work=9, wall=True, seconds=1,
    )  # fmt: skip


@cuda_case(**DTYPES)
def sam_llama(at: Target, dtype: torch.dtype) -> Case:
    """Norm + perturb + restore over a billion parameters in 290 tensors: floor 7 bytes per byte of parameters."""
    shapes = llama_shapes(at, 1536)
    size = elements(shapes) * dtype.itemsize

    def contenders() -> list[Contender]:
        listed = parameters(at, shapes, dtype)
        grads = gradients(listed)
        flat = parameters(at, shapes, dtype, grads)
        flatten_parameters(flat)
        work = rounds(listed)
        return [
            copy_of(at.randn(elements(shapes), dtype=dtype)),
            Contender("list", work, 7 * size, launches=True),
            Contender("list, the three passes alone", passes(bucket_of(listed)), 7 * size, launches=True),
            *also_triton(at, "list", rounds(parameters(at, shapes, dtype, grads)), 7 * size),
            Contender("flattened", rounds(flat), 7 * size, launches=True),
            peer("_foreach_ recipe", foreach(parameters(at, shapes, dtype, grads)), 10 * size, launches=True),
            peer("popular wrapper", wrapper(parameters(at, shapes, dtype, grads)), 12 * size),
        ]

    goals: list[Goal] = [
        Goal("list", "flattened", {"cuda": 1.08}),
        Goal("list", "_foreach_ recipe", {"cuda": 0.72}),
        Goal("list", "popular wrapper", {"cuda": 0.60}),
        Launches("list, the three passes alone", limit={"cuda": 3}),
        Bandwidth("list", COPY, {}),
    ]
    shape = f"{len(shapes)} tensors, {elements(shapes) / 1e6:,.0f}M"
    return Case(
        "norm + perturb + restore, Llama-like", shape, name_of(dtype), contenders, goals,
        bytes=7 * size, work=9, memory=21 * size, seconds=2,
    )  # fmt: skip


def kept(name: str, stash: Stash, params: nn.ParameterList, rho: float) -> Contender:
    """To w + e and back, without the norm, which does not depend on how w is kept."""
    weights, grads = [p.detach() for p in params], gradients(params)
    (bucket,) = ops.make_buckets(weights=weights, grads=grads)
    room, squared = stash.room(bucket), ops.squared_norm(grads)
    perturb, restore = stash.operations(bucket)

    def run(_: object = room) -> None:
        ops.run(perturb, bucket, squared, rho, None, bucket.dtype)
        ops.run(restore, bucket)

    return Contender(name, run, 6 * sum(w.nbytes for w in weights))


@cuda_case(**DTYPES)
def stash_ulp(at: Target, dtype: torch.dtype) -> Case:
    """Perturb and restore with codes and with a copy: both move 6 bytes per byte of parameters.

    0.4 % of the float32 weights are listed, as of SmolLM2 at rho 0.15. How many is read by the host at every ascent, so time
    is the host's.
    """
    shapes = llama_shapes(at, 768)
    size = elements(shapes) * dtype.itemsize
    copied, coded = "stash='copy'", "stash='ulp'"
    rho = 0.006 if dtype == torch.float32 else RHO

    def contenders() -> list[Contender]:
        params = parameters(at, shapes, dtype)
        return [kept(copied, Stash(), params, rho), kept(coded, UlpStash(), params, rho)]

    goals: list[Goal] = [Goal(coded, copied, {"cuda": 1.0})]
    shape = f"{len(shapes)} tensors, {elements(shapes) / 1e6:,.0f}M"
    return Case(
        "perturb + restore, what is stashed", shape, name_of(dtype), contenders, goals,
        bytes=6 * size, work=2, memory=6 * size, wall=True, seconds=1,
    )  # fmt: skip


@cuda_case(**DTYPES)
def stash_ulp_adamw(at: Target, dtype: torch.dtype) -> Case:
    """The way back and AdamW's step from codes, in one pass and in two: 7.5 bytes moved for 9.5. From a copy: 7."""
    shapes = llama_shapes(at, 768)
    size = elements(shapes) * dtype.itemsize
    apart, fused, copied = "codes: restore, then torch's fused AdamW", "codes: fused restore + AdamW", "copy: the same"

    def leaves(name: str, stash: str, fused_restore: bool, moved: float) -> Contender:
        params = list(parameters(at, shapes, dtype))
        how = {"fused": True, "stash": stash, "fused_restore": fused_restore}
        opt = SAM(params, torch.optim.AdamW, rho=RHO, lr=1e-5, **how)  # type: ignore[arg-type]
        return Contender(name, opt.second_step, int(moved * size), before=opt.first_step)

    def contenders() -> list[Contender]:
        return [leaves(apart, "ulp", False, 9.5), leaves(fused, "ulp", True, 7.5), leaves(copied, "copy", True, 7)]

    goals: list[Goal] = [Goal(fused, apart, {"cuda": 0.88}), Goal(fused, copied, {})]
    shape = f"{len(shapes)} tensors, {elements(shapes) / 1e6:,.0f}M"
    return Case(
        "restore + AdamW, what is stashed", shape, name_of(dtype), contenders, goals,
        bytes=int(7.5 * size), work=4, memory=18 * size, seconds=1,
    )  # fmt: skip


@cuda_case()
def masters(at: Target) -> Case:
    """w + e as casts of float32 masters, and back: 8 and 6 bytes a weight. Torch's operations hold e and the sum beside."""
    shapes = llama_shapes(at, 768)
    count = elements(shapes)
    ours, foreach = "casts of masters + e, and of masters", "_foreach_ recipe"

    def contenders() -> list[Contender]:
        params = parameters(at, shapes, torch.bfloat16)
        weights, grads = [p.detach() for p in params], gradients(params)
        held = [w.float() for w in weights]
        (bucket,) = ops.make_buckets(weights=weights, grads=grads)
        bucket.stash = held
        squared = ops.squared_norm(grads)

        def work() -> None:
            ops.run("sam_perturb_masters_", bucket, squared, RHO, None, torch.bfloat16)
            ops.run("sam_cast_", bucket)

        def recipe() -> None:
            moved = torch._foreach_mul(grads, (RHO / squared.sqrt()).to(torch.bfloat16))
            torch._foreach_copy_(weights, torch._foreach_add(held, moved))
            torch._foreach_copy_(weights, held)

        return [
            copy_of(at.randn(count, dtype=torch.bfloat16)),
            Contender(ours, work, 14 * count, launches=True),
            peer(foreach, recipe),
        ]

    goals: list[Goal] = [Bandwidth(ours, COPY, SHARES["bfloat16"]), Goal(ours, foreach, {}, faster=True)]
    shape = f"{len(shapes)} tensors, {count / 1e6:,.0f}M"
    return Case(
        "perturb + restore over masters", shape, "bfloat16", contenders, goals, bytes=14 * count, work=4, memory=30 * count
    )


@cuda_case(**DTYPES)
def restore_adamw(at: Target, dtype: torch.dtype) -> Case:
    """The way back and AdamW's step, in one pass and in two: floor 4 reads and 3 writes."""
    shapes = llama_shapes(at, 768)
    size = elements(shapes) * dtype.itemsize

    def sam(grads: list[Tensor] | None = None, **options: object) -> SAM:
        made = parameters(at, shapes, dtype, grads)
        return SAM(list(made), torch.optim.AdamW, rho=RHO, lr=1e-5, **options)  # type: ignore[arg-type]

    def contenders() -> list[Contender]:
        fused = sam(fused=True, fused_restore=True)
        grads = [p.grad for group in fused.param_groups for p in group["params"]]
        apart = sam(grads, fused=True)
        plain = parameters(at, shapes, dtype, grads)
        weights, stash = [p.detach() for p in plain], [p.detach().clone() for p in plain]
        adamw = torch.optim.AdamW(plain.parameters(), lr=1e-5, fused=True)

        def torch_only() -> None:
            foreach_sam_restore(weights, stash)
            adamw.step()

        return [
            copy_of(at.randn(elements(shapes), dtype=dtype)),
            Contender("fused restore + AdamW", fused.second_step, 7 * size, before=fused.first_step, launches=True),
            Contender(
                "restore, then torch's fused AdamW", apart.second_step, 9 * size, before=apart.first_step, launches=True
            ),
            peer("torch alone: copy back, fused AdamW", torch_only, 9 * size),
        ]

    goals = [
        Goal("fused restore + AdamW", "restore, then torch's fused AdamW", {"cuda": 0.88}),
        Goal("fused restore + AdamW", "torch alone: copy back, fused AdamW", {}),
        Bandwidth("fused restore + AdamW", COPY, {}),
    ]
    shape = f"{len(shapes)} tensors, {elements(shapes) / 1e6:,.0f}M"
    return Case(
        "restore + AdamW", shape, name_of(dtype), contenders, goals, bytes=7 * size, work=6, memory=18 * size, seconds=1
    )
