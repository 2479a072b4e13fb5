"""R3F: fine-tuning that keeps a model's outputs from moving when its input embeddings are nudged (2008.03156)."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.errors import unknown
from fastpost.ops.divergence import r3f_loss, symmetric_kl
from fastpost.ops.noise import check_noise, fresh_seed
from fastpost.ops.params import seed_tensor
from fastpost.r3f.conventions import (
    accelerators,
    check_range,
    class_labels,
    device_of,
    give_decoder_inputs,
    logits_of,
    shifts_labels,
)
from fastpost.r3f.halves import writable_halves
from fastpost.r3f.noise import Noise, NoisyEmbedding, find_embedding, is_encoder_decoder, unwrap

OPTIONS = {
    "grad": ("both", "noised", "clean"),
    "dropout": ("independent", "shared"),
    "forward": ("two_pass", "double_batch"),
    "reduction": ("token", "sentence", "fairseq", "sum"),
}


@dataclass
class R3FOutput:
    """What one call of R3F gives back.

    Attributes:
        loss: scalar to call backward() on: task_loss + r3f_lambda * symm_kl.
        task_loss: cross-entropy on the clean logits, a detached scalar.
        symm_kl: the regulariser before its weight, a detached scalar; 0 where no noised pass ran.
        logits: the clean pass's, as the model returned them, with their graph; None after `inplace=True`, which turned them
            into gradients.
    """

    loss: Tensor
    task_loss: Tensor
    symm_kl: Tensor
    logits: Tensor | None

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)


class R3F:
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
        grad: which branch the KL sends gradients into. "both" is R3F. "noised" (clean outputs as fixed teacher, like VAT)
            and "clean" (noised outputs fixed; their pass runs without a graph, which saves a third of the step) are other
            methods: their gradient falls as eps where that of R3F falls as eps^2.
        dropout: "independent" masks in the two passes, as released, or "shared": both passes draw the same (the generators
            of the CPU and of the model's devices are replayed).
        forward: "two_pass", or "double_batch": one pass over the batch twice, each embedding row read once. Equal up to
            rounding with dropout off. Tensors whose first dimension is the batch size are doubled.
        detach_noised_embedding: the noised branch sends no gradient into the embedding table, as in fairseq's classifier
            (its sequence-to-sequence criterion lets it flow).
        reduction: "token", "sentence", "fairseq" or "sum", as in `r3f_loss`; None: "sentence" for two-dimensional logits,
            else "token".
        embedding: where noise enters, a module or its dotted name; None: `model.get_input_embeddings()`, of an
            encoder-decoder its encoder's. A batch with `inputs_embeds` gets its noise right there.
        shift_labels: whether row t predicts label t + 1. None: as the model's own loss does, which is told by transformers'
            `model.loss_function` where its forward uses that (GPT-2, Llama, ...: yes; BartForCausalLM, XLNet: no), else by
            whether its forward shifts by hand; no for models that tell neither, two-dimensional logits and encoder-decoders.
        seed: None draws a seed per call from torch's generator (repeatable under torch.manual_seed); an integer gives the
            n-th training call the seed `seed + n`, n in `self.step`.
        ignore_index: label that does not count.
        inplace: let the gradients overwrite the logits (no logit-sized allocation); then `out.logits` is None.

    Raises:
        ValueError, TypeError: an option that does not exist or is out of range.
    """

    def __init__(
        self,
        eps: float = 1e-5,
        r3f_lambda: float = 1.0,
        noise_type: str = "uniform",
        *,
        grad: str = "both",
        dropout: str = "independent",
        forward: str = "two_pass",
        detach_noised_embedding: bool = True,
        reduction: str | None = None,
        embedding: nn.Module | str | None = None,
        shift_labels: bool | None = None,
        seed: int | None = None,
        ignore_index: int = -100,
        inplace: bool = False,
    ) -> None:
        self.eps, self.r3f_lambda, self.noise_type = eps, r3f_lambda, noise_type
        self.grad, self.dropout, self.forward, self.reduction = grad, dropout, forward, reduction
        self.detach_noised_embedding = detach_noised_embedding
        self.embedding = embedding
        self.shift_labels = shift_labels
        self.seed, self.step = seed, 0
        self.ignore_index = ignore_index
        self.inplace = inplace
        self._measured: set[torch.dtype] = set()
        self._check()
        if embedding is not None and not isinstance(embedding, nn.Module | str):
            raise TypeError(f"R3F: embedding must be a module, a module's name or None, not {type(embedding).__name__}")
        if seed is not None:
            seed_tensor(seed, torch.device("cpu"))

    def __repr__(self) -> str:
        shown = ("eps", "r3f_lambda", "noise_type", *OPTIONS)
        return f"R3F({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def _check(self) -> None:
        """Attributes may be changed between steps (schedules), so they are checked at every one."""
        check_noise("R3F", self.eps, self.noise_type)
        if not (math.isfinite(self.r3f_lambda) and self.r3f_lambda >= 0):
            raise ValueError(f"R3F: r3f_lambda must be finite and >= 0, not {self.r3f_lambda}")
        for name, valid in OPTIONS.items():
            given = getattr(self, name)
            if given not in valid and not (name == "reduction" and given is None):
                raise unknown(name, given, valid)
        if self.dropout == "shared" and self.forward == "double_batch":
            raise ValueError("R3F: dropout='shared' needs forward='two_pass': a double batch draws all its masks in one go")

    # -- one step -----------------------------------------------------------------------------------------------------

    def __call__(self, model: Any, /, *, num_items: int | Tensor | None = None, **batch: Any) -> R3FOutput:
        """Runs the model on the batch, clean and noised.

        Args:
            model: called as `model(**batch)` without the labels.
            num_items: what "token" and "sentence" divide by, instead of the labels of this batch that count (gradient
                accumulation; transformers' `num_items_in_batch`, which is also taken from the batch).
            batch: the model's inputs and `labels`: integers of shape (batch,) or (batch, time).

        Raises:
            ValueError: no labels; labels of the wrong shape, out of range or not integers (regression has no KL); a
                model without input embeddings; num_items not positive or with another reduction.
            RuntimeError: the embedding was not called in the forward pass.
        """
        self._check()
        root = unwrap(model)
        labels = class_labels(root, batch, self.ignore_index)
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")}
        if num_items is None:
            num_items = batch.get("num_items_in_batch")
        if num_items is not None and self.reduction in ("fairseq", "sum"):
            raise ValueError(f"R3F: num_items goes with reduction 'token' or 'sentence', not {self.reduction!r}")
        if isinstance(num_items, int) and num_items <= 0:
            raise ValueError(f"R3F: num_items must be > 0, not {num_items}")
        give_decoder_inputs(root, inputs, labels)

        if self.r3f_lambda == 0 or not getattr(model, "training", True):
            clean = logits_of(model(**inputs))
            targets = self._targets(root, clean, labels)
            task = self._task_loss(clean, targets, num_items)
            return R3FOutput(task, task.detach(), torch.zeros_like(task), clean)

        clean, noised = self._both(model, root, inputs, labels)
        targets = self._targets(root, clean, labels)
        loss, task, kl = self._loss(clean, noised, targets, num_items)
        return R3FOutput(loss, task.detach(), kl.detach(), None if self.inplace else clean)

    def _both(self, model: Any, root: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        embeds = inputs.get("inputs_embeds") if self.embedding is None else None
        name, module = ("inputs_embeds", None) if embeds is not None else find_embedding(root, self.embedding)
        device = embeds.device if embeds is not None else device_of(module, root, labels)
        noise = Noise(self.eps, self.noise_type, self._seed(device), self.detach_noised_embedding, self._measured)
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None

        if self.forward == "double_batch":
            rows = labels.shape[0]
            inputs = {
                key: torch.cat((value, value)) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
                for key, value in inputs.items()
            }
            both = logits_of(self._noised(model, root, inputs, name, module, noise, inputs.get("attention_mask"), rows))
            if both.shape[0] != 2 * rows:
                raise ValueError(
                    f"R3F: a double batch of {2 * rows} rows gave {both.shape[0]} rows of logits; use forward='two_pass'"
                )
            if self.inplace:
                return writable_halves(both)
            clean, noised = both.chunk(2)  # gradients of two slices would each be padded to full size
            return clean, noised

        # What the clean pass draws is drawn again by the noised one.
        shared = torch.random.fork_rng(accelerators(root)) if self.dropout == "shared" else contextlib.nullcontext()
        with shared:
            clean = logits_of(model(**inputs))
        self._targets(root, clean, labels)  # what does not fit says so before the second pass
        # grad="clean" has no use for the noised pass's graph. The clean pass ran first, so that weights which autocast
        # cached have theirs.
        with torch.no_grad() if self.grad == "clean" else contextlib.nullcontext():
            noised = logits_of(self._noised(model, root, inputs, name, module, noise, mask, None))
        return clean, noised

    def _noised(
        self,
        model: Any,
        root: Any,
        inputs: dict[str, Any],
        name: str,
        module: nn.Module | None,
        noise: Noise,
        mask: Any,
        rows: int | None,
    ) -> Any:
        """One forward pass with noise on all rows, or on those from `rows` on."""
        mask = mask if isinstance(mask, Tensor) else None
        if module is None:
            embeds = inputs["inputs_embeds"]
            first = rows or 0
            keep = None
            if mask is not None and mask.shape == embeds.shape[:-1]:
                keep = mask[first:] != 0
            noised = noise.add(embeds[first:], keep)
            return model(**{**inputs, "inputs_embeds": torch.cat((embeds[:first], noised)) if first else noised})
        with NoisyEmbedding(module, noise, mask, halves=rows is not None, first_only=is_encoder_decoder(root)) as embedding:
            output = model(**inputs)
        if embedding.calls == 0:
            raise RuntimeError(
                f"R3F: the embedding module {name!r} ({type(module).__name__}) was not called in the forward pass, so no "
                "noise entered. Pass the module that embeds the input as embedding=. (A model compiled before its first R3F "
                "step may ignore hooks; torch._dynamo.config.skip_nnmodule_hook_guards = False makes it look.)"
            )
        return output

    def _seed(self, device: torch.device) -> Tensor:
        if self.seed is None:
            return fresh_seed(device)
        self.step += 1
        return seed_tensor((self.seed + self.step - 1) % 2**64, device)

    # -- losses ---------------------------------------------------------------------------------------------------------

    def _targets(self, root: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels in step with the rows of the logits."""
        if logits.shape[-1] == 1:
            raise ValueError("R3F: the model has one output (regression); a KL divergence needs classes")
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"R3F: labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}; "
                f"expected labels of shape {tuple(logits.shape[:-1])}"
            )
        check_range(labels, logits.shape[-1], self.ignore_index)
        labels = labels.to(logits.device)
        shift = self.shift_labels
        if shift is None:
            shift = logits.ndim > 2 and not is_encoder_decoder(root) and shifts_labels(root)
        if not shift:
            return labels
        # The labels move rather than the logits: no copy of the logits, and the last row just does not count.
        return nn.functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)

    def _reduction(self, logits: Tensor) -> str:
        return self.reduction or ("sentence" if logits.ndim == 2 else "token")

    def _task_loss(self, logits: Tensor, targets: Tensor, num_items: int | Tensor | None) -> Tensor:
        """Cross-entropy as torch computes it, reduced as `r3f_loss` reduces its own."""
        flat = logits.reshape(-1, logits.shape[-1])
        if flat.dtype.itemsize < 4:
            flat = flat.float()
        total = nn.functional.cross_entropy(flat, targets.reshape(-1), ignore_index=self.ignore_index, reduction="sum")
        if self._reduction(logits) == "sum":
            return total
        if num_items is None:
            num_items = (targets != self.ignore_index).sum().clamp(min=1)  # all ignored: 0, not NaN
        return total / num_items

    def _loss(
        self, clean: Tensor, noised: Tensor, targets: Tensor, num_items: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        reduction = self._reduction(clean)
        if self.grad == "noised":
            task = self._task_loss(clean, targets, num_items)
            kl = self._teacher_kl(clean.detach(), noised, targets, num_items)
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
            inplace=self.inplace,
        )
        return out.loss, out.task_loss, out.symm_kl

    def _teacher_kl(self, clean: Tensor, noised: Tensor, targets: Tensor, num_items: int | Tensor | None) -> Tensor:
        """The KL alone, reduced as `r3f_loss` reduces it."""
        reduction = self._reduction(clean)
        if reduction == "fairseq":
            return symmetric_kl(clean, noised, reduction="batchmean")
        mask = targets != self.ignore_index
        if reduction == "sum":
            return symmetric_kl(clean, noised, mask=mask, reduction="sum")
        if num_items is None:
            return symmetric_kl(clean, noised, mask=mask, reduction="mean")
        return symmetric_kl(clean, noised, mask=mask, reduction="sum") / num_items
