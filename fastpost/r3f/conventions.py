"""What models and batches look like: labels, logits, and what transformers' classes do with them."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastpost.ops.reductions import item_divisor
from fastpost.r3f.noise import BOUNDARIES, is_encoder_decoder

DECODER_TOKENS = ("pad_token_id", "decoder_start_token_id")
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # flash attention needs all of them, or none


@contextlib.contextmanager
def named(method: str) -> Iterator[None]:
    """While open, what R3F's helpers refuse they refuse in this method's name."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if type(error) in (ValueError, TypeError, RuntimeError) and str(error).startswith("R3F: "):
            raise type(error)(f"{method}: {str(error).removeprefix('R3F: ')}") from None
        raise


def take_labels(
    root: Any, batch: Mapping[str, Any], shift: bool | None, ignore_index: int
) -> tuple[Tensor, bool | None, dict[str, Any]]:
    """What rows of logits are compared with, how to align it, and the model's inputs; checked before the model runs.

    A batch's `shift_labels` are in step with the logits already, as transformers' losses take them. They stand in the place
    of its `labels`, of which only a decoder's inputs are then made.

    Args:
        shift: whether row t predicts label t + 1; None: as the model's own loss does.

    Returns:
        int64 labels; `shift`, False for `shift_labels`; the batch without what is about its loss.

    Raises:
        ValueError, TypeError: labels that cannot serve, or two kinds of labels that differ in shape.
    """
    labels, aligned = batch.get("labels"), batch.get("shift_labels")
    name = "labels" if aligned is None else "shift_labels"
    taken = class_labels(root, batch, ignore_index, name)
    if aligned is not None and isinstance(labels, Tensor) and labels.shape != aligned.shape:
        raise ValueError(
            f"R3F: shift_labels have shape {tuple(aligned.shape)}, labels {tuple(labels.shape)}; shift_labels have a target "
            "for each row of logits, and ignore_index where there is none"
        )
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels", "num_items_in_batch")}
    of_decoder = labels.long() if aligned is not None and isinstance(labels, Tensor) else taken
    give_decoder_inputs(root, inputs, of_decoder, ignore_index)
    return taken, shift if aligned is None else False, inputs


def class_labels(root: Any, batch: Mapping[str, Any], ignore_index: int, name: str = "labels") -> Tensor:
    """The batch's labels as int64, or an error that says why they cannot serve; runs before the model does."""
    labels = batch.get(name)
    if labels is None:
        near = difflib.get_close_matches("labels", [k for k in batch if "label" in k], n=1, cutoff=0.4)
        hint = f" Rename {near[0]!r}?" if near else ""
        raise ValueError(f"R3F: the batch has no 'labels', only {', '.join(sorted(batch)) or 'nothing'}.{hint}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"R3F: {name} must be a tensor, not {type(labels).__name__}")
    config = getattr(root, "config", None)
    classifies = "Classification" in type(root).__name__
    if (
        labels.dtype.is_floating_point
        or getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
        or (classifies and getattr(config, "num_labels", None) == 1)
    ):
        raise ValueError(
            "R3F: this is regression or multi-label classification (float labels, or one output), where outputs form no "
            "distribution to take a KL of; labels must be class indices"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"R3F: labels must be int64 or int32 class indices, not {labels.dtype}")
    if labels.ndim == 0 or labels.numel() == 0:
        raise ValueError(f"R3F: labels have shape {tuple(labels.shape)}, so there is nothing to learn from")
    classes = getattr(config, "num_labels", None) if classifies else None
    check_range(labels, classes if isinstance(classes, int) else None, ignore_index)
    return labels.long()


def has_router_loss(model: Any, batch: Mapping[str, Any] | None = None) -> bool:
    """Whether a model adds a loss of its router to its own.

    Args:
        batch: the inputs of a call, which may ask for that, or for none, themselves.
    """
    asked = None if batch is None else batch.get("output_router_logits")
    if asked is None:
        asked = getattr(text_config(getattr(model, "config", None)), "output_router_logits", False)
    return bool(asked)


def text_config(config: Any) -> Any:
    """The part of a config that is about text, or the whole of it."""
    part = getattr(config, "get_text_config", None)
    try:
        return part() if callable(part) else config
    except ValueError:  # several parts are
        return config


def refuse_router_loss(root: Any, batch: Mapping[str, Any]) -> None:
    """Raises ValueError where the model's own loss has a part that a cross-entropy of its logits leaves out."""
    if has_router_loss(root, batch):
        raise ValueError(
            "R3F: the model adds a loss of its router (output_router_logits=True) to its own, which the cross-entropy of "
            "its logits would leave out; set model.config.output_router_logits=False"
        )


def check_range(labels: Tensor, classes: int | None, ignore_index: int) -> None:
    """Raises ValueError for a label that is no class (`classes`: their number, None where not known yet).

    Labels on an accelerator are left to the loss kernels: reading them here would wait for the device.
    """
    if labels.device.type != "cpu":
        return
    wrong = (labels != ignore_index) & ((labels < 0) | ((labels >= classes) if classes is not None else False))
    if bool(wrong.any()):
        raise ValueError(
            f"R3F: label {int(labels[wrong][0])} is out of range; valid are 0 to "
            f"{classes - 1 if classes is not None else 'the number of classes - 1'} and ignore_index={ignore_index}"
        )


def virtual_tokens(root: Any) -> int:
    """How many tokens PEFT's prompt learning puts before a text; prefix tuning puts them into the cache alone."""
    config: Any = getattr(root, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def beside_virtual_tokens(root: Any, labels: Tensor, stream: Tensor, ignore_index: int) -> Tensor:
    """Labels for logits that begin with those of PEFT's virtual tokens (prompt tuning), which do not count."""
    virtual = virtual_tokens(root)
    if not virtual or labels.ndim != 2 or stream.shape[1:-1] != (labels.shape[1] + virtual,):
        return labels
    return nn.functional.pad(labels, (virtual, 0), value=ignore_index)


def check_rows(labels: Tensor, stream: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError where labels do not go with logits, or with the hidden states before a head of `classes`."""
    if classes == 1:
        raise ValueError("R3F: the model has one output (regression); a KL divergence needs classes")
    if stream.shape[:-1] != labels.shape:
        raise ValueError(
            f"R3F: labels have shape {tuple(labels.shape)}, logits {tuple(stream.shape)}; "
            f"expected labels of shape {tuple(stream.shape[:-1])}"
        )
    check_range(labels, classes, ignore_index)


def align_labels(root: Any, labels: Tensor, stream: Tensor, shift: bool | None, ignore_index: int) -> Tensor:
    """Labels in step with the rows of logits: shifted where the model's own loss does so, or as told."""
    labels = labels.to(stream.device)
    if shift is None:
        shift = stream.ndim > 2 and not is_encoder_decoder(root) and shifts_labels(root)
    # The labels move rather than the logits: no copy of the logits, and the last row just does not count.
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift else labels


def summed_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float = 0.0) -> Tensor:
    """Over all rows that count, as torch computes it, in float32 or wider; no gradient reaches the others, even of NaN."""
    flat, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    flat = flat.masked_fill((targets == ignore_index).unsqueeze(-1), 0)
    if flat.dtype.itemsize < 4:
        flat = flat.float()
    return nn.functional.cross_entropy(
        flat, targets, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )


def per_item(total: Tensor, num_items: float | Tensor) -> Tensor:
    """total / num_items in total's dtype; 0, with zero gradients, for 0 items."""
    return (total.double() / item_divisor("R3F", num_items, total.device)).to(total.dtype)


class Batch(NamedTuple):
    """A batch that was read and checked: `take_labels`, and what sums are divided by (None: the labels that count)."""

    labels: Tensor
    shift: bool | None
    inputs: dict[str, Any]
    num_items: float | Tensor | None


def take_batch(
    root: Any, batch: Mapping[str, Any], shift: bool | None, ignore_index: int, num_items: float | Tensor | None
) -> Batch:
    """What a batch has, checked before a model runs.

    Args:
        shift: whether row t predicts label t + 1; None: as the model's own loss does.
        num_items: None: transformers' `num_items_in_batch`, where the batch has it.
    """
    refuse_router_loss(root, batch)
    labels, shift, inputs = take_labels(root, batch, shift, ignore_index)
    if num_items is None:
        num_items = batch.get("num_items_in_batch")
    if num_items is not None:
        item_divisor("R3F", num_items, labels.device)
    return Batch(labels, shift, inputs, num_items)


def give_decoder_inputs(root: Any, inputs: dict[str, Any], labels: Tensor, ignore_index: int) -> None:
    """An encoder-decoder makes its decoder's inputs from labels, which it is not given here.

    Nor, without labels, would it know that it need not fill a cache for generation.
    """
    if not is_encoder_decoder(root):
        return
    if "use_cache" in inspect.signature(root.forward).parameters:
        inputs.setdefault("use_cache", False)
    if labels.ndim != 2:
        return  # a classifier on an encoder-decoder, which makes its decoder's inputs from the encoder's
    if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
        return
    shift = _decoder_shift(root)
    if shift is None:
        raise ValueError(
            f"R3F: {type(root).__name__} is an encoder-decoder that cannot make decoder inputs from labels; add "
            "decoder_input_ids to the batch"
        )
    if ignore_index < 0:  # no token; models put padding in the place of -100
        labels = labels.masked_fill(labels == ignore_index, -100)
    try:
        inputs["decoder_input_ids"] = shift(labels)
    except (ValueError, TypeError, AttributeError) as error:
        missing = [name for name in DECODER_TOKENS if getattr(root.config, name, None) is None]
        if not missing:
            raise
        raise ValueError(
            f"R3F: {type(root).__name__} needs {' and '.join(f'config.{name}' for name in missing)} to make decoder inputs "
            "from labels; set that, or add decoder_input_ids to the batch"
        ) from error


def _decoder_shift(root: Any) -> Callable[[Tensor], Tensor] | None:
    """What makes a decoder's inputs of labels; None where the model has nothing that does."""
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        shift = getattr(root, name, None)
        if callable(shift):
            return cast("Callable[[Tensor], Tensor]", shift)
    # Some (NLLB, Blenderbot, Whisper) have no method, and call a function of their file in the forward pass.
    forward = _own_forward(root)
    shift = (
        getattr(forward, "__globals__", {}).get("shift_tokens_right") if "shift_tokens_right" in _names(forward) else None
    )
    tokens = [getattr(root.config, name, None) for name in DECODER_TOKENS]
    if not callable(shift) or len(inspect.signature(shift).parameters) != 3:
        return None
    return lambda labels: cast(Tensor, shift(labels, *tokens))


def _without_peft(root: Any) -> Any:
    return root.get_base_model() if callable(getattr(root, "get_base_model", None)) else root


def _own_forward(root: Any) -> Any:
    """The function behind a model's forward pass, without decorators and PEFT; None where there is none."""
    forward = getattr(type(_without_peft(root)), "forward", None)
    return None if forward is None else inspect.unwrap(forward)


def _names(function: Any) -> set[str]:
    """What a function's own code names."""
    code = getattr(function, "__code__", None)
    return set() if code is None else {*code.co_names, *code.co_varnames}


def shifts_labels(root: Any) -> bool:
    """Whether the model's own loss compares row t with label t + 1.

    Class names do not tell: BartForCausalLM, XLNetLMHeadModel and some forty others take labels that are shifted already.
    """
    names = _names(_own_forward(root))
    if "loss_function" in names:
        return getattr(_without_peft(root).loss_function, "__name__", "") == "ForCausalLMLoss"
    return bool(names & {"shift_logits", "shift_labels"})


def doubled(root: Any, inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The inputs of a batch that holds the batch twice: tensors whose first dimension is `rows`, and where packed sequences
    begin (a tensor of one dimension).

    Raises:
        ValueError: flash attention would take the packed sequences of each half for one.
    """
    if rows == 1 and _told_by_positions(root, inputs):
        raise ValueError(
            "R3F: flash attention tells packed sequences apart by position_ids in a batch of one row alone, and a double "
            f"batch has two; use forward='two_pass', or add all of {', '.join(VARLEN)}"
        )
    twice = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim == 1 and name.startswith(BOUNDARIES):
            value = torch.cat((value, value[1:] + value[-1]))
        elif isinstance(value, Tensor) and value.shape[:1] == (rows,):
            value = torch.cat((value, value))
        twice[name] = value
    return twice


def _told_by_positions(root: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether flash attention knows where the sequences of one row begin by its position_ids alone.

    So transformers has it where a boundary is missing and no token is masked. Reads the positions, and the mask, as
    transformers does in every layer.
    """
    if "flash" not in str(getattr(text_config(getattr(root, "config", None)), "_attn_implementation", "")):
        return False
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(positions, Tensor) or all(inputs.get(name) is not None for name in VARLEN):
        return False
    if positions.ndim == 3:  # (kinds, rows, time) of models for images, where the first of four is the text's
        if len(positions) != 4:
            return False
        positions = positions[0]
    if bool((positions.diff(dim=-1) == 1).all()):
        return False
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask != 0).all()))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, `.logits`, `["logits"]`, or the first of a tuple."""
    logits = output
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, dict):
            logits = output.get("logits")
        if logits is None and isinstance(output, tuple | list) and output:
            logits = output[0]
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point or logits.ndim < 2:
        raise TypeError(
            f"R3F: the model returned {type(output).__name__}, in which no logits were found (a tensor of at least two "
            "dimensions, or an object with .logits)"
        )
    return logits


def device_of(module: nn.Module | None, root: Any, labels: Tensor) -> torch.device:
    """Where noise will be drawn: the embedding's device, else the model's, else the labels'."""
    for owner in (module, root):
        if isinstance(owner, nn.Module):
            for parameter in owner.parameters():
                return parameter.device
    return labels.device


def accelerators(root: Any) -> list[torch.device]:
    """The CUDA devices that hold parameters, whose generators draw dropout masks."""
    if not isinstance(root, nn.Module):
        return []
    return sorted({p.device for p in root.parameters() if p.is_cuda}, key=str)
