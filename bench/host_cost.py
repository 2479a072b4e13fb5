"""What a call costs the host on the CPU beside torch's own calls: small tensors, one thread, ratios within one run."""

from __future__ import annotations

import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpost
from fastpost import SAM, SAMWindow
from fastpost.bench import gap
from fastpost.bench.params import Parameters, rounds, sam
from fastpost.bench.registry import Case, Contender, Goal, HostTime, Work, at_heap, case, peer
from fastpost.ops import params as ops
from fastpost.published import PublishedSAM, fairseq_symmetric_kl, foreach_sam_perturb, foreach_sam_restore

ISAS = ("avx512", "avx2", "sse", "portable")  # what a call costs has little to do with vectors
COPY = "torch copy_"
RHO = 0.05


def copy_of_one() -> Contender:
    """The unit of host time: one call of torch on one small tensor."""
    target, source = torch.zeros(64), torch.randn(64)
    return peer(COPY, lambda: target.copy_(source), calls=500)


def at_most(limit: float) -> dict[str, float]:
    return dict.fromkeys(ISAS, limit)


@case
def host_cost_params() -> Case:
    """Norm, perturb and restore of one small tensor, the same one at every call."""
    w, g = [torch.randn(64)], [torch.randn(64)]
    stash = [torch.zeros(64)]
    norm = ops.squared_norm(g)
    works: dict[str, tuple[Work, float]] = {
        "squared_norm": (lambda: ops.squared_norm(g), 3),
        "sam_perturb_": (lambda: ops.sam_perturb_(w, g, stash, norm, rho=RHO), 4),
        "sam_restore_": (lambda: ops.sam_restore_(w, stash), 3),
    }
    return Case(
        "host time of list operations",
        "1 x 256 B",
        "float32",
        [copy_of_one(), *(Contender(name, work, calls=100) for name, (work, _) in works.items())],
        [Goal(name, COPY, at_most(limit)) for name, (_, limit) in works.items()],
        threads=1,
    )


@case
def host_cost_kl() -> Case:
    """The symmetric KL of eight rows of 128 classes: the value alone, and with gradients to both streams."""
    clean = torch.randn(8, 128)
    noised = clean + 0.1 * torch.randn(8, 128)
    leaves = [t.clone().requires_grad_() for t in (clean, noised)]

    def one_sided(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True)

    value, ours, torchs, published = (
        "symmetric_kl, no gradient",
        "symmetric_kl",
        "F.kl_div, one direction",
        "fairseq formula",
    )
    trained = {ours: fastpost.symmetric_kl, torchs: one_sided, published: fairseq_symmetric_kl}

    def forward_backward(name: str) -> Work:
        return lambda: torch.autograd.grad(trained[name](*leaves), leaves)

    return Case(
        "host time of symmetric_kl",
        "8 x 128",
        "float32",
        [
            copy_of_one(),
            Contender(value, lambda: fastpost.symmetric_kl(clean, noised), calls=100),
            *(Contender(f"{name}, forward + backward", forward_backward(name), calls=30) for name in trained),
        ],
        [
            Goal(value, COPY, at_most(8)),
            Goal(f"{ours}, forward + backward", f"{torchs}, forward + backward", at_most(1.0)),
            Goal(f"{ours}, forward + backward", f"{published}, forward + backward", {}),
        ],
        threads=1,
    )


@case
def host_cost_first_step() -> Case:
    """SAM's way to w + e and back over 150 tensors of 1 KB, beside the same from torch's multi-tensor operations."""
    shapes: list[tuple[int, ...]] = [(256,)] * 150
    opt = sam(Parameters(shapes).give_gradients())
    model = Parameters(shapes).give_gradients()
    weights = [p.detach() for p in model.parameters()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    stash = [torch.zeros_like(w) for w in weights]

    def foreach() -> None:
        foreach_sam_perturb(weights, grads, stash, RHO)
        foreach_sam_restore(weights, stash)

    ours, recipe = "SAM.first_step + restore_", "torch._foreach_ recipe"
    return Case(
        "host time of SAM's first step",
        "150 x 1 KB",
        "float32",
        [peer(recipe, foreach, calls=20), Contender(ours, rounds(opt), calls=20)],
        [Goal(ours, recipe, at_most(0.5))],
        threads=1,
    )


@case
def host_cost_small_tensors() -> Case:
    """Norm, perturb and restore over a thousand tensors of 256 bytes to 4 KB."""
    shapes: list[tuple[int, ...]] = [(64 * (1 + i % 16),) for i in range(1000)]
    popular = PublishedSAM(Parameters(shapes).give_gradients().parameters(), None)

    def wrapper() -> None:
        popular.first_step()
        popular.restore()

    ours, theirs = "SAM.first_step + restore_", "popular wrapper's loop"
    return Case(
        "host time of SAM on small tensors",
        "1,000 x 256 B to 4 KB",
        "float32",
        [peer(theirs, wrapper, calls=3), Contender(ours, rounds(sam(Parameters(shapes).give_gradients())), calls=3)],
        [Goal(ours, theirs, at_most(0.08))],
        threads=1,
    )


class HandWritten:
    """SAM as one writes it into a training loop: a pass over the parameters there, a pass back, no class around it."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        self.params, self.base = list(model.parameters()), base

    @torch.no_grad()
    def ascend(self) -> list[Tensor]:
        norm = torch.stack([p.grad.norm() for p in self.params if p.grad is not None]).norm()
        moves = [p.grad * (RHO / (norm + 1e-12)) for p in self.params if p.grad is not None]
        for p, move in zip(self.params, moves, strict=True):
            p.add_(move)
        return moves

    @torch.no_grad()
    def descend(self, moves: list[Tensor]) -> None:
        for p, move in zip(self.params, moves, strict=True):
            p.sub_(move)
        self.base.step()


@case
def host_cost_step() -> Case:
    """A whole step of a small network, beside a loop written by hand: two calls, a closure, a window."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 64), torch.randint(0, 64, (32,))

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def base(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def backward(model: nn.Module) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def hand_written() -> Work:
        model = network()
        loop = HandWritten(model, base(model))

        def run() -> None:
            backward(model)
            moves = loop.ascend()
            loop.base.zero_grad()
            backward(model)
            loop.descend(moves)
            loop.base.zero_grad()

        return run

    def copied() -> Work:
        model = network()
        popular = PublishedSAM(model.parameters(), base(model), RHO)

        def run() -> None:
            backward(model)
            popular.first_step()
            model.zero_grad()
            backward(model)
            popular.second_step()
            model.zero_grad()

        return run

    def two_calls() -> Work:
        model = network()
        opt = SAM(None, base(model), rho=RHO)

        def run() -> None:
            backward(model)
            opt.first_step(zero_grad=True)
            backward(model)
            opt.second_step(zero_grad=True)

        return run

    def closure() -> Work:
        model = network()
        opt = SAM(None, base(model), rho=RHO)

        def run() -> None:
            opt.step(lambda: backward(model))
            opt.zero_grad()

        return run

    def window() -> Work:
        model = network()
        opt = SAM(None, base(model), rho=RHO)
        one = SAMWindow(opt, lambda _: backward(model))

        def run() -> None:
            one.run([None])
            opt.step()
            opt.zero_grad()

        return run

    written, plain = "loop written by hand", "two passes and SGD"

    def two_passes() -> Work:
        model = network()
        opt = base(model)

        def run() -> None:
            for _ in range(2):
                backward(model)
                opt.zero_grad()
            opt.step()

        return run

    ours = {"two calls": (two_calls, 0.95), "closure": (closure, 1.0), "window": (window, 1.05)}
    return Case(
        "host time of a step of SAM",
        "MLP 3 x 64, batch 32",
        "float32",
        [
            peer(written, hand_written(), calls=20),
            peer("popular wrapper's loop", copied(), calls=20),
            peer(plain, two_passes(), calls=20),
            *(Contender(name, make(), calls=20) for name, (make, _) in ours.items()),
        ],
        [
            *(Goal(name, written, at_most(limit)) for name, (_, limit) in ours.items()),
            *(Goal(name, "popular wrapper's loop", {}) for name in ours),
        ],
        threads=1,
    )


def gap_case(pages: str, limit: float) -> Case:
    """Steps of GAP on a short text and the way back, beside the plain loop: what is left to gain lies around the passes."""
    plain, ours = gap.sides(64)
    return Case(
        f"host time of {gap.STEPS} steps of GAP, {pages}",
        f"64 tokens, {gap.SIZE}",
        "float32",
        [plain, ours],
        [Goal(ours.name, plain.name, at_most(limit))],
        threads=1,
    )


@case
@at_heap("returned")
def host_cost_gap_fresh() -> Case:
    """Memory that is freed goes back to the system."""
    return gap_case("fresh pages", 0.82)


@case
@at_heap("kept")
def host_cost_gap_kept() -> Case:
    """Memory that is freed stays with the process."""
    return gap_case("kept heap", 0.93)


# What runs in processes of their own that have imported torch: what is there before the clock starts, and what it times.
# Making any optimizer of torch's imports its compiler, which is torch's own second and hides what else imports that.
SOMETHING_TO_STEP = "p = torch.nn.Parameter(torch.ones(3))\np.grad = torch.ones(3)\n"
FIRST_USES = {
    "torch.optim.SGD made": (SOMETHING_TO_STEP, "torch.optim.SGD([p], lr=0.1)"),
    "fastpost.SAM imported": ("", "import fastpost; fastpost.SAM"),
    "first use of SAM around an SGD": (
        SOMETHING_TO_STEP + "base = torch.optim.SGD([p], lr=0.1)",
        """
import fastpost
opt = fastpost.SAM(None, base, rho=0.05)
opt.first_step()
opt.restore_()
""",
    ),
    "first use of R3F": (
        """
ids, labels = torch.arange(6).view(2, 3), torch.tensor([0, 2])
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3)
    def forward(self, input_ids=None, inputs_embeds=None):
        return self.head((self.embed(input_ids) if inputs_embeds is None else inputs_embeds).mean(1))
model = Model()
""",
        """
import fastpost
fastpost.R3F(eps=1e-5, embedding="embed")(model, input_ids=ids, labels=labels).loss.backward()
""",
    ),
    "first use of symmetric_kl": (
        "a, b = torch.ones(2, 8, requires_grad=True), torch.zeros(2, 8, requires_grad=True)",
        "import fastpost; fastpost.symmetric_kl(a, b).backward()",
    ),
}


def first_use(name: str) -> float:
    """Seconds that it takes in a new process."""
    before, use = FIRST_USES[name]
    code = f"import time, torch\n{before}\nstart = time.perf_counter()\n{use}\nprint(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


@case
def host_cost_import() -> Case:
    """What the first use of each method adds to a process that has imported torch."""
    ours = [name for name, (_, use) in FIRST_USES.items() if "fastpost" in use]

    def contender(name: str) -> Contender:
        return Contender(name, lambda: first_use(name), backend="" if name in ours else "torch", slow=True, reports=True)

    return Case(
        "time until a method has been used once",
        "after import torch",
        "float32",
        [contender(name) for name in FIRST_USES],
        [HostTime(name, limit=at_most(150_000)) for name in ours],
        threads=1,
    )
