"""What losses of distillation from hidden states serve: each is run on a small problem and compared with float64."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpost
from fastpost.bench.features import Finding

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 24, 8, 12, 61
TOLERANCE = 1e-4  # of a value in float32, relative


class Unserved(Exception):
    """The library has no argument or function for it; the message says which was looked for."""


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @classmethod
    def make(cls, rows: int = ROWS, vocab: int = VOCAB, apart: float | None = None) -> Problem:
        """apart: the teacher is the student's head on hidden states so far away."""
        g = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(rows, WIDTH, generator=g), torch.randn(vocab, WIDTH, generator=g) / 2
        teacher = torch.randn(rows, TEACHER_WIDTH, generator=g), torch.randn(vocab, TEACHER_WIDTH, generator=g) / 2
        if apart is not None:
            teacher = hidden + apart * torch.randn(rows, WIDTH, generator=g), weight.clone()
        return cls(hidden, weight, *teacher, torch.randint(0, vocab, (rows,), generator=g))

    def leaves(self) -> Problem:
        return Problem(*(t.clone().requires_grad_() for t in self[:4]), self.labels)


# What is asked of a loss beside the problem: divergence, beta, temperature, ce_weight, label_smoothing, softcap, ...
Loss = Callable[..., Tensor]


def truth(
    problem: Problem,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    top_k: int = 0,
    group: Any = None,
) -> Tensor:
    """From the equations, in float64; the mean over the rows whose label counts."""
    hidden, weight, teacher_hidden, teacher_weight = (t.double() for t in problem[:4])
    counts = problem.labels != -100
    z, t = (hidden @ weight.T)[counts], (teacher_hidden @ teacher_weight.T)[counts]
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    p, q = ((x / temperature).softmax(-1) for x in (t, z))
    if top_k:
        ids = p.topk(top_k, -1).indices
        p, q = (torch.cat((x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)), -1) for x in (p, q))
    m = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    rows = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "symmetric_kl": lambda: kl(p, q) + kl(q, p),
        "js": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[divergence]()
    ce = F.cross_entropy(z, problem.labels[counts], label_smoothing=label_smoothing) if ce_weight else z.new_zeros(())
    return rows.mean() + ce_weight * ce


def needs(function: Any, wanted: dict[str, Any]) -> None:
    """Raises where something is wanted for which a function has no argument of any name that it might have."""
    names = set(inspect.signature(function).parameters)
    for what, value in wanted.items():
        choices = ARGUMENTS[what]
        if value and not names & set(choices):
            raise Unserved(f"no argument {' or '.join(choices)}")


ARGUMENTS = {
    "ce_weight": ("ce_weight", "weight_hard_loss", "ce_coef", "sft_coef"),
    "label_smoothing": ("label_smoothing",),
    "softcap": ("softcap", "logit_softcapping", "student_final_logit_softcapping"),
    "top_k": ("top_k", "teacher_ids"),
    "group": ("group", "tp_group", "vocab_group", "process_group"),
}


def gkd_beta(divergence: str, beta: float) -> float:
    """The beta of a generalised Jensen-Shannon divergence, whose ends are both KLs."""
    if divergence not in ("forward_kl", "reverse_kl", "js"):
        raise Unserved("its beta goes from forward KL over Jensen-Shannon to reverse KL")
    return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(divergence, beta)


def of_fastpost(problem: Problem, **options: Any) -> Tensor:
    """`linear_distillation_loss`, and `linear_top_k_distillation_loss` where asked for the most probable classes."""
    hidden, weight, teacher_hidden, teacher_weight, labels = problem
    top_k, group = options.pop("top_k", 0), options.pop("group", None)
    if options.pop("teaches", False):
        options["grad"] = "both"
    if top_k:
        *known, rest = fastpost.linear_top_log_probs(teacher_hidden, teacher_weight, top_k)
        return fastpost.linear_top_k_distillation_loss(hidden, weight, *known, labels, teacher_rest=rest, **options).loss
    return fastpost.linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, labels, vocab_group=group, **options
    ).loss


def of_liger(problem: Problem, **options: Any) -> Tensor:
    """`LigerFusedLinearJSDLoss` of its chunked losses: torch operations, on every device."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    ce_weight, temperature, beta, _ = taken(LigerFusedLinearJSDLoss.__init__, options)
    loss: Tensor = LigerFusedLinearJSDLoss(ce_weight, 1.0, beta, temperature=temperature, compiled=False)(*problem)
    return loss


def of_liger_kernel(problem: Problem, **options: Any) -> Tensor:
    """`LigerFusedLinearJSD`: a Triton kernel, in Triton's interpreter where there is no GPU."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    _, temperature, beta, _ = taken(LigerFusedLinearJSD.__init__, options)
    loss: Tensor = LigerFusedLinearJSD(beta, temperature=temperature)(*problem)
    return loss


def of_trl(problem: Problem, **options: Any) -> Tensor:
    """What `DistillationTrainer` computes from hidden states; of the most probable classes, `ServerDistillationTrainer`."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, weight, teacher_hidden, teacher_weight, labels = problem
    if k := options.pop("top_k", 0):
        from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer as Trainer

        log_probs, ids = (teacher_hidden @ teacher_weight.T).log_softmax(-1).topk(k, -1)
        trainer = types.SimpleNamespace(loss_add_tail=True, _reduce_divergence_loss=Trainer._reduce_divergence_loss)
        given = {"topk_logprobs": log_probs[None], "topk_token_ids": ids[None]}
        log_q = (hidden @ weight.T).log_softmax(-1)[None]
        loss: Tensor = Trainer._compute_server_forward_kl_loss(trainer, given, log_q, labels[None])
        return loss
    _, temperature, beta, softcap = taken(_chunked_divergence_loss, options)
    loss, *_ = _chunked_divergence_loss(
        hidden[None], teacher_hidden[None], weight, teacher_weight, (labels != -100)[None], beta, temperature=temperature,
        student_final_logit_softcapping=softcap,
    )  # fmt: skip
    return loss


def of_gkd(problem: Problem, **options: Any) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`, of logits."""
    from trl.experimental.gkd import GKDTrainer

    _, temperature, beta, _ = taken(GKDTrainer.generalized_jsd_loss, options)
    hidden, weight, teacher_hidden, teacher_weight, labels = problem
    logits, teacher = (hidden @ weight.T)[None], (teacher_hidden @ teacher_weight.T)[None]
    loss: Tensor = GKDTrainer.generalized_jsd_loss(logits, teacher, labels[None], beta, temperature)
    return loss


def of_torch(problem: Problem, **options: Any) -> Tensor:
    """`F.kl_div` as its documentation has it, of logits."""
    divergence, temperature = options.pop("divergence", "forward_kl"), options.pop("temperature", 1.0)
    if divergence != "forward_kl" or any(options.values()):
        raise Unserved("not by F.kl_div alone")
    hidden, weight, teacher_hidden, teacher_weight, labels = problem
    counts = labels != -100
    log_q, log_p = (
        ((x @ w.T)[counts] / temperature).log_softmax(-1) for x, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def taken(function: Any, options: dict[str, Any]) -> tuple[float, float, float, float | None]:
    """What a loss of the generalised Jensen-Shannon kind is given: cross-entropy's weight, temperature, beta, soft-cap."""
    needs(function, {name: options.get(name) for name in ARGUMENTS})
    beta = gkd_beta(options.get("divergence", "forward_kl"), options.get("beta", 0.5))
    return options.get("ce_weight", 0.0), options.get("temperature", 1.0), beta, options.get("softcap")


LOSSES: dict[str, dict[str, Loss]] = {
    "fastpost": {"": of_fastpost},
    "liger_kernel": {"LigerFusedLinearJSDLoss": of_liger, "LigerFusedLinearJSD": of_liger_kernel},
    "trl": {"DistillationTrainer": of_trl, "GKDTrainer, of logits": of_gkd},
    "torch": {"F.kl_div, of logits": of_torch},
}

QUESTIONS: dict[str, dict[str, Any]] = {
    "forward KL": {},
    "reverse KL": {"divergence": "reverse_kl"},
    "symmetric KL": {"divergence": "symmetric_kl"},
    "Jensen-Shannon with beta": {"divergence": "js", "beta": 0.3},
    "total variation": {"divergence": "total_variation"},
    "temperature": {"temperature": 2.0},
    "rows that do not count (-100)": {"ignored": True},
    "soft-cap of the student": {"softcap": 3.0},
    "cross-entropy in the same pass": {"ce_weight": 0.5},
    "cross-entropy with label smoothing": {"ce_weight": 0.5, "label_smoothing": 0.1},
    "the teacher's most probable classes, the rest as one class": {"top_k": 5},
    "a vocabulary cut across ranks": {"group": True},
}


def findings(library: str) -> list[Finding]:
    return [found._replace(subject=subject) for subject, loss in LOSSES.get(library, {}).items() for found in of(loss)]


def of(loss: Loss) -> list[Finding]:
    found = [attempt(feature, lambda o=options: right(loss, o)) for feature, options in QUESTIONS.items()]
    found.append(attempt("gradients of the teacher as well", lambda: teaches(loss)))
    for apart in (1e-1, 1e-2, 1e-3):
        name = f"relative error of the forward KL of float32 logits {apart:g} apart"
        found.append(attempt(name, lambda a=apart: (f"{error(loss, a):.0e}", "of the same logits in float64")))
    found.append(attempt("peak memory over the student's logits, 16,384 x 2,048, CPU", lambda: memory(loss)))
    return found


def attempt(feature: str, question: Callable[[], tuple[str, str]]) -> Finding:
    try:
        return Finding("distillation", feature, *question())
    except Unserved as missing:
        return Finding("distillation", feature, "no", str(missing))
    except Exception as error:  # the answer is that it raises
        told = str(error).partition("\n")[0][:150]
        return Finding("distillation", feature, "error", f"{type(error).__name__}: {told}")


def right(loss: Loss, options: dict[str, Any]) -> tuple[str, str]:
    """Whether value and the student's gradients are those of the equations."""
    problem, options = Problem.make(), dict(options)
    if options.pop("ignored", False):
        problem.labels[::3] = -100
    ours, exact = problem.leaves(), problem.leaves()
    with group() if options.pop("group", False) else contextlib.nullcontext() as ranks:
        if ranks is not None:
            options["group"] = ranks
        value, want = loss(ours, **options), truth(exact, **options)
        value.backward()  # type: ignore[no-untyped-call]
        want.backward()  # type: ignore[no-untyped-call]
    off = [abs(float(value.detach()) / float(want.detach()) - 1)]
    off += [float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in zip(ours[:2], exact[:2], strict=True)]  # type: ignore[operator, union-attr]
    return ("yes" if max(off) < TOLERANCE else "no"), f"value off by {off[0]:.0e}, gradients by {max(off[1:]):.0e}"


@contextlib.contextmanager
def group() -> Iterator[Any]:
    """A process group of this process alone: it shows that there is such an option, tests show that it is right."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def teaches(loss: Loss) -> tuple[str, str]:
    problem = Problem.make().leaves()
    exact = Problem(*(t.detach().clone().requires_grad_() for t in problem[:4]), problem.labels)
    loss(problem, **({"teaches": True} if loss is of_fastpost else {})).backward()  # type: ignore[no-untyped-call]
    truth(exact).backward()  # type: ignore[no-untyped-call]
    grad, want = problem.teacher_hidden.grad, exact.teacher_hidden.grad
    if grad is None or not bool(grad.any()):
        return "no", "the teacher's tensors require a gradient and get none"
    off = float((grad - want).norm() / want.norm())  # type: ignore[operator, union-attr]
    return ("yes" if off < TOLERANCE else "no"), f"off by {off:.0e}"


def error(loss: Loss, apart: float) -> float:
    """Of the value where both models have one head and hidden states are this far apart, as a share of the value.

    The products' own rounding is no part of it: the head is the identity, so that hidden states are the logits.
    """
    g = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(ROWS, VOCAB, generator=g)
    other = logits + apart * torch.randn(ROWS, VOCAB, generator=g)
    problem = Problem(logits, torch.eye(VOCAB), other, torch.eye(VOCAB), torch.zeros(ROWS, dtype=torch.long))
    want = float(truth(problem))
    return abs(float(loss(problem.leaves()).detach()) / want - 1)


def memory(loss: Loss) -> tuple[str, str]:
    """Bytes allocated at most for the loss and its gradients, beside what was there, over those of the student's logits."""
    if loss is of_liger_kernel and not torch.cuda.is_available():
        return "n/a", "Triton's interpreter copies what a kernel does not"
    problem = Problem.make(16384, 2048).leaves()
    problem = problem._replace(teacher_hidden=problem.teacher_hidden.detach())
    problem = problem._replace(teacher_weight=problem.teacher_weight.detach())
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss(problem).backward()  # type: ignore[no-untyped-call]
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    share = max(itertools.accumulate(changes, initial=0)) / (math.prod((16384, 2048)) * 4)
    return f"{share:.2f}", "torch's allocator, the library's defaults"
