"""R3F: fine-tuning that keeps a model's outputs from moving when its input embeddings are nudged (2008.03156)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.distributed import unwrap
from fastpost.errors import unknown
from fastpost.ops.divergence import r3f_loss, symmetric_kl
from fastpost.ops.jensen_shannon import js_divergence
from fastpost.ops.linear_divergence import linear_r3f_loss
from fastpost.ops.noise import check_noise
from fastpost.ops.params import seed_tensor
from fastpost.ops.reductions import R3F_REDUCTIONS
from fastpost.ops.scalars import POSITIVE, check_number, check_real, check_whole
from fastpost.r3f.conventions import (
    per_item,
    summed_cross_entropy,
    take_batch,
    take_labels,
)
from fastpost.r3f.head import Head, fused_head
from fastpost.r3f.noise import SCALES
from fastpost.r3f.passes import Passes, Step, Windowed

OPTIONS = {
    "grad": ("both", "noised", "clean"),
    "dropout": ("independent", "shared"),
    "forward": ("two_pass", "double_batch"),
    "reduction": R3F_REDUCTIONS,
    "noise_scale": SCALES,
    "where": ("encoder", "decoder", "both"),
    "divergence": ("symmetric_kl", "js"),
}


@dataclass
class R3FOutput:
    """What one call of R3F gives back.

    Attributes:
        loss: scalar to call backward() on: task_loss + r3f_lambda * symm_kl.
        task_loss: cross-entropy on the clean logits, a detached scalar.
        symm_kl: the regulariser before its weight, a detached scalar; 0 where no noised pass ran.
        logits: the clean pass's, as the model returned them, with their graph; None after `inplace=True`, which turned them
            into gradients, and under `fused_linear=True`, which never made them.
    """

    loss: Tensor
    task_loss: Tensor
    symm_kl: Tensor
    logits: Tensor | None

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)


class R3F(Windowed):
    """Task loss plus r3f_lambda times the symmetric KL between the outputs on clean and on noised embeddings.

    L = CE(clean) + r3f_lambda * (KL(p || q) + KL(q || p)), p and q the predictions without and with noise on the input
    embeddings (Aghajanyan et al. 2008.03156, eqs. 3-5; names and defaults as in fairseq's sentence_prediction_r3f).

        r3f = R3F()
        out = r3f(model, **batch)        # a model in training mode, a batch with labels
        out.loss.backward()

    Serves sequence classification (logits (batch, classes)), token classification (batch, time, classes), causal and
    masked language models (batch, time, vocabulary) and encoder-decoders, in transformers' calling convention
    `model(**batch)` with a result that has `.logits`; also any module or callable that returns logits itself. The model is
    called without labels: cross-entropy and KL come out of one pass over both logits. In eval mode, and with
    r3f_lambda = 0, there is no second pass, no noise and no random number drawn: the loss is plain cross-entropy, bit for
    bit.

    What moves the outputs: with dropout on and dropout="independent", the masks of the two passes differ, and at eps =
    1e-5 that difference is all there is (R3F then acts like R-Drop); with dropout off or shared, the KL and its gradient
    fall as eps^2. (But for the embedding table's gradient under detach_noised_embedding, which falls as eps: there the
    noised branch is frozen.)

    Args:
        eps: scale of the noise in the units of the embeddings, >= 0.
        r3f_lambda: weight of the KL, >= 0.
        noise_type: "uniform" on (-eps, eps), or "normal" with standard deviation eps.
        noise_scale: what eps is measured in: "absolute"; "relative", the root mean square of the embedding row; "neftune",
            1 / sqrt(L * d) for a sequence of L tokens and embeddings of width d (2310.05914, whose alpha eps then is).
            Sequences packed into one row are told apart by `position_ids`, `sequence_ids`, `seq_idx` or a mask that numbers
            them.
        grad: which branch the KL sends gradients into. "both" is R3F. "noised" (clean outputs as fixed teacher, like VAT)
            and "clean" (noised outputs fixed; their pass runs without a graph, which saves a third of the step) are other
            methods: their gradient falls as eps where that of R3F falls as eps^2.
        dropout: "independent" masks in the two passes, as released, or "shared": both passes draw the same (the generators
            of the CPU and of the model's devices are replayed).
        forward: "two_pass", or "double_batch": one pass over the batch twice, each embedding row read once. Equal up to
            rounding with dropout off. Tensors whose first dimension is the batch size are doubled, and so is what says where
            packed sequences begin (`cu_seq_lens_q`, ...).
        detach_noised_embedding: the noised branch sends no gradient into the embedding table, as in fairseq's classifier
            (its sequence-to-sequence criterion lets it flow).
        reduction: "token", "sentence", "fairseq" or "sum", as in `r3f_loss`; None: "sentence" for two-dimensional logits,
            else "token".
        embedding: where noise enters, a module or its dotted name; None: `model.get_input_embeddings()`, of an
            encoder-decoder that of `where`. A batch with `inputs_embeds` gets its noise right there.
        where: side of an encoder-decoder that is noised: "encoder" (as released), "decoder" or "both".
        shift_labels: whether row t predicts label t + 1. None: as the model's own loss does, which is told by transformers'
            `model.loss_function` where its forward uses that (GPT-2, Llama, ...: yes; BartForCausalLM, XLNet: no), else by
            whether its forward shifts by hand; no for models that tell neither, two-dimensional logits and encoder-decoders.
            A batch's own `shift_labels` are compared as they stand.
        seed: None draws a seed per step from torch's generator (repeatable under torch.manual_seed); an integer gives the
            n-th step a seed of its own, n in `self.step`; step 0 has `seed`. A step is a call, or all the calls inside one
            `window()`. Noise depends on the seed, the token's number in the step and the channel only.
        ignore_index: label that does not count.
        label_smoothing: of the task loss, as in `r3f_loss`.
        divergence: "symmetric_kl", or "js", the Jensen-Shannon divergence (bounded; another method).
        inplace: let the gradients overwrite the logits (no logit-sized allocation); then `out.logits` is None.
        fused_linear: for models with a vocabulary: hidden states and the output head's weight go into `linear_r3f_loss`, and
            logits are never held whole. The head must be a plain nn.Linear, tied or not; `out.logits` is None in training.
            At the first step the model runs once more, without a graph, to see what it does to its logits: caps and scales
            that its config names are applied, anything else is an error.
        memory_budget: bytes for a chunk of logits under `fused_linear`.

    Raises:
        ValueError, TypeError: an option that does not exist or is out of range.
    """

    def __init__(
        self,
        eps: float = 1e-5,
        r3f_lambda: float = 1.0,
        noise_type: str = "uniform",
        *,
        noise_scale: str = "absolute",
        grad: str = "both",
        dropout: str = "independent",
        forward: str = "two_pass",
        detach_noised_embedding: bool = True,
        reduction: str | None = None,
        embedding: nn.Module | str | None = None,
        where: str = "encoder",
        shift_labels: bool | None = None,
        seed: int | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        divergence: str = "symmetric_kl",
        inplace: bool = False,
        fused_linear: bool = False,
        memory_budget: int = 1 << 30,
    ) -> None:
        self.eps, self.r3f_lambda, self.noise_type, self.noise_scale = eps, r3f_lambda, noise_type, noise_scale
        self.grad, self.dropout, self.forward, self.reduction = grad, dropout, forward, reduction
        self.detach_noised_embedding = detach_noised_embedding
        self.embedding, self.where = embedding, where
        self.shift_labels = shift_labels
        self.seed, self.step = seed, 0
        self.ignore_index = ignore_index
        self.label_smoothing, self.divergence = label_smoothing, divergence
        self.inplace, self.fused_linear, self.memory_budget = inplace, fused_linear, memory_budget
        self._measured: set[torch.dtype] = set()
        self._check()
        if embedding is not None and not isinstance(embedding, nn.Module | str):
            raise TypeError(f"R3F: embedding must be a module, a module's name or None, not {type(embedding).__name__}")
        if seed is not None:
            check_whole("R3F", "seed", seed)
            seed_tensor(seed, torch.device("cpu"))

    @classmethod
    def fairseq_classification(cls, **options: Any) -> R3F:
        """fairseq's `sentence_prediction_r3f`: uniform noise, embeddings detached, both terms averaged over the batch."""
        return cls(**{"noise_type": "uniform", "detach_noised_embedding": True, "reduction": "sentence", **options})

    @classmethod
    def fairseq_seq2seq(cls, **options: Any) -> R3F:
        """fairseq's `label_smoothed_cross_entropy_r3f`: normal noise that sends gradients into the encoder's embeddings.

        Its KL is summed over time and padding and divided by the batch size, so it grows with the sequence length; the
        cross-entropy is averaged over tokens. `label_smoothing` (0.1 in the paper's recipes) is fairseq's: the smoothed mass
        goes to the other classes.
        """
        return cls(**{"noise_type": "normal", "detach_noised_embedding": False, "reduction": "fairseq", **options})

    def __repr__(self) -> str:
        shown = ("eps", "r3f_lambda", "noise_type", *OPTIONS)
        return f"R3F({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def _check(self) -> None:
        """Attributes may be changed between steps (schedules), so they are checked at every one."""
        check_noise("R3F", self.eps, self.noise_type)
        check_real("R3F", "r3f_lambda", self.r3f_lambda)
        if not (math.isfinite(self.r3f_lambda) and self.r3f_lambda >= 0):
            raise ValueError(f"R3F: r3f_lambda must be finite and >= 0, not {self.r3f_lambda}")
        for name, valid in OPTIONS.items():
            given = getattr(self, name)
            if given not in valid and not (name == "reduction" and given is None):
                raise unknown(name, given, valid)
        check_number("R3F", "memory_budget", self.memory_budget, POSITIVE)
        check_whole("R3F", "ignore_index", self.ignore_index)
        check_real("R3F", "label_smoothing", self.label_smoothing)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"R3F: label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if self.divergence == "js" and self.grad != "both":
            raise ValueError(f"R3F: divergence='js' goes with grad='both', not {self.grad!r}")
        if self.dropout == "shared" and self.forward == "double_batch":
            raise ValueError("R3F: dropout='shared' needs forward='two_pass': a double batch draws all its masks in one go")

    # -- one step -----------------------------------------------------------------------------------------------------

    def __call__(self, model: Any, /, *, num_items: float | Tensor | None = None, **batch: Any) -> R3FOutput:
        """Runs the model on the batch, clean and noised.

        Args:
            model: called as `model(**batch)` without the labels.
            num_items: what "token" and "sentence" divide by, instead of the labels of this batch that count (gradient
                accumulation; transformers' `num_items_in_batch`, which is also taken from the batch): a number or a tensor
                with one. 0, a step without a label that counts, gives loss 0 with zero gradients.
            batch: the model's inputs and `labels`: integers of shape (batch,) or (batch, time). `shift_labels`, shifted
                already, stand in their place, as in transformers' losses. `sequence_ids` (batch, time) may tell packed
                sequences apart; the model is not given them.

        Raises:
            ValueError: no labels; labels of the wrong shape, out of range or not integers (regression has no KL); a
                model without input embeddings, or whose loss has a part for its router; num_items negative, not finite or
                with another reduction.
            RuntimeError: the embedding was not called in the forward pass.
        """
        self._check()
        root = unwrap(model)
        told = {name: batch.pop(name) for name in ("sequence_ids",) if name in batch}  # for us, not for the model
        labels, shift, inputs, num_items = take_batch(root, batch, self.shift_labels, self.ignore_index, num_items)
        if num_items is not None and self.reduction in ("fairseq", "sum"):
            raise ValueError(f"R3F: num_items goes with reduction 'token' or 'sentence', not {self.reduction!r}")

        training = bool(getattr(model, "training", True))
        head = fused_head(model, root, inputs) if self.fused_linear and training else None
        passes = Passes(self, model, root, inputs, told, labels, shift, head, self._window or Step())
        if self.r3f_lambda == 0 or not training:
            clean = passes.run()
            task = self._task_loss(clean, passes.targets(clean), num_items, head)
            return R3FOutput(task, task.detach(), torch.zeros_like(task), clean if head is None else None)

        clean, noised = passes.both()
        loss, task, kl = self._loss(clean, noised, passes.targets(clean), num_items, head)
        return R3FOutput(loss, task.detach(), kl.detach(), None if self.inplace or head is not None else clean)

    def noised_divergence(self, model: Any, clean: Tensor, batch: dict[str, Any], num_items: Any = None) -> Tensor:
        """The divergence of a noised pass from logits that somebody else's clean pass gave, before r3f_lambda.

        Args:
            model: called as `model(**batch)` without the labels.
            clean: (batch, classes) or (batch, time, classes), with their graph.
            batch: the model's inputs and `labels`.
            num_items: divisor; None: the labels of this batch that count.

        Returns:
            A scalar with its graph.

        Raises:
            ValueError, TypeError: as R3F's call.
        """
        root = unwrap(model)
        labels, shift, inputs = take_labels(root, batch, self.shift_labels, self.ignore_index)
        passes = Passes(self, model, root, inputs, {}, labels, shift, None, self._window or Step())
        targets = passes.targets(clean)
        noised = passes.noised()
        return self._divergence(clean.detach() if self.grad == "noised" else clean, noised, targets, num_items)

    # -- losses ---------------------------------------------------------------------------------------------------------

    def _reduction(self, logits: Tensor) -> str:
        return self.reduction or ("sentence" if logits.ndim == 2 else "token")

    def _task_loss(
        self, logits: Tensor, targets: Tensor, num_items: float | Tensor | None, head: Head | None = None
    ) -> Tensor:
        """Cross-entropy as torch computes it, reduced as `r3f_loss` reduces its own."""
        if head is not None:
            return self._fused(logits, logits, targets, num_items, head, 0.0)[0]
        smoothing, classes = self.label_smoothing, logits.shape[-1]
        if self._reduction(logits) == "fairseq" and classes > 1:  # there it goes to the other classes
            smoothing *= classes / (classes - 1)
        total = summed_cross_entropy(logits, targets, self.ignore_index, smoothing)
        if self._reduction(logits) == "sum":
            return total
        if num_items is None:
            num_items = (targets != self.ignore_index).sum().clamp(min=1)  # all ignored: 0, not NaN
        return per_item(total, num_items)

    def _fused(
        self,
        clean: Tensor,
        noised: Tensor,
        targets: Tensor,
        num_items: float | Tensor | None,
        head: Head,
        r3f_lambda: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return linear_r3f_loss(
            clean,
            noised,
            head.linear.weight,
            targets,
            bias=head.bias,
            r3f_lambda=r3f_lambda,
            reduction=self._reduction(clean),
            ignore_index=self.ignore_index,
            num_items=num_items,
            label_smoothing=self.label_smoothing,
            softcap=head.softcap,
            temperature=head.temperature,
            grad=self.grad,
            divergence=self.divergence,
            memory_budget=self.memory_budget,
        )

    def _loss(
        self, clean: Tensor, noised: Tensor, targets: Tensor, num_items: float | Tensor | None, head: Head | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        reduction = self._reduction(clean)
        if head is not None:
            return self._fused(clean, noised, targets, num_items, head, self.r3f_lambda)
        if self.grad == "noised" or self.divergence == "js":
            task = self._task_loss(clean, targets, num_items)
            kl = self._divergence(clean.detach() if self.grad == "noised" else clean, noised, targets, num_items)
            return task + self.r3f_lambda * kl, task, kl
        if self.grad == "clean":
            noised = noised.detach()
        if num_items is not None and reduction == "sentence":
            reduction = "token"  # the same over two-dimensional logits, with a divisor of choice
        out = r3f_loss(
            clean,
            noised,
            targets,
            r3f_lambda=self.r3f_lambda,
            reduction=reduction,
            ignore_index=self.ignore_index,
            num_items=num_items,
            label_smoothing=self.label_smoothing,
            inplace=self.inplace,
        )
        return out.loss, out.task_loss, out.symm_kl

    def _divergence(self, clean: Tensor, noised: Tensor, targets: Tensor, num_items: float | Tensor | None) -> Tensor:
        """The divergence alone, reduced as `r3f_loss` reduces it."""
        function = symmetric_kl if self.divergence == "symmetric_kl" else js_divergence
        reduction = self._reduction(clean)
        if reduction == "fairseq":
            return function(clean, noised, reduction="batchmean")
        mask = targets != self.ignore_index
        if reduction == "sum":
            return function(clean, noised, mask=mask, reduction="sum")
        if num_items is None:
            return function(clean, noised, mask=mask, reduction="mean")
        return per_item(function(clean, noised, mask=mask, reduction="sum"), num_items)
