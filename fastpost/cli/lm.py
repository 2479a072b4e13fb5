"""The small causal language model that `fastpost compare` trains on the standard library's sources and then sends uphill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpost.cli import stdlib
from fastpost.cli.models import loading
from fastpost.modes import evaluating

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class LmOptions:
    """Sizes of the model and of its training.

    Attributes:
        vocabulary: tokens of the byte-level BPE, trained on the training files.
        width, layers, heads, context: of the GPT-2 configuration.
        steps, batch_size, lr: AdamW on random windows of `context` tokens.
        files_bytes: how much source text is read at most, in characters; of one file a hundredth of it.
        eval_windows: windows of `context` tokens in the validation and in the test text each.
    """

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128
    steps: int = 300
    batch_size: int = 16
    lr: float = 2e-3
    files_bytes: int = 6_000_000
    eval_windows: int = 96


@dataclass
class Corpus:
    """Token ids of three disjoint sets of source files, and texts of a fourth to climb on.

    Attributes:
        train: int64 (n,).
        validation, test: int64 (windows, context + 1).
        climb: texts that none of the others holds, int64 (context,) each.
        vocabulary: number of tokens.
        encode, decode: text to token ids and back.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    climb: list[Tensor]
    vocabulary: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def build_corpus(options: LmOptions, folder: Path | None = None) -> Corpus:
    """Splits the library's files by name and tokenizes them by a byte-level BPE made from the training files.

    Raises:
        ValueError: too little text for the sizes asked for.
    """
    folder = folder or stdlib.root()
    files = sorted(stdlib.sources(folder), key=lambda path: stdlib.order(str(path.relative_to(folder))))
    texts: list[str] = []
    total = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")[: options.files_bytes // 100]
        texts.append(text)
        total += len(text)
        if total > options.files_bytes:
            break
    held = max(len(texts) // 10, 1)  # every tenth file each for validation, test and texts to climb on
    return split_corpus(
        texts[3 * held :], texts[:held], texts[held : 2 * held], texts[2 * held : 3 * held], options, str(folder)
    )


def split_corpus(
    train: list[str], validation: list[str], test: list[str], climb: list[str], options: LmOptions, where: str
) -> Corpus:
    """Tokenizes four sets of texts by a byte-level BPE made from the first.

    Raises:
        ValueError: too little text for the sizes asked for; `where` names its source.
    """
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size=options.vocabulary, show_progress=False)

    def ids(parts: list[str]) -> Tensor:
        return torch.tensor([i for encoded in tokenizer.encode_batch(parts) for i in encoded.ids], dtype=torch.int64)

    def windows(parts: list[str]) -> Tensor:
        size = options.context + 1
        stream = ids(parts)
        whole = stream[: len(stream) // size * size].view(-1, size)
        return whole[:: max(len(whole) // options.eval_windows, 1)][: options.eval_windows]  # from all over the files

    stream, to_choose, to_report = ids(train), windows(validation), windows(test)
    uphill = [row[: options.context] for row in windows(climb)]
    if len(stream) <= options.context + 1 or not len(to_choose) or not len(to_report) or not uphill:
        raise ValueError(f"{where} holds too little text for a language model with context {options.context}")
    vocabulary = tokenizer.get_vocab_size()

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    return Corpus(stream, to_choose, to_report, uphill, vocabulary, encode, tokenizer.decode)


def train_lm(corpus: Corpus, options: LmOptions, seed: int, progress: Progress) -> nn.Module:
    """A GPT-2 of the sizes given, trained from scratch on random windows of the training text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=corpus.vocabulary,
        n_positions=options.context,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    warmup = max(options.steps // 10, 1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(options.steps):
        for group in optimizer.param_groups:  # linear up, cosine down
            up, done = (step + 1) / warmup, step / max(options.steps, 1)
            group["lr"] = options.lr * min(up, 0.5 * (1 + math.cos(math.pi * done)) + 0.05)
        starts = torch.randint(len(corpus.train) - options.context, (options.batch_size, 1), generator=generator)
        batch = corpus.train[starts + torch.arange(options.context)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, options.steps)
    module: nn.Module = model
    return module


@dataclass
class Loaded:
    """A causal language model and how it reads: text to token ids, without special tokens, and back."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def load_lm(name: str) -> Loaded:
    """From a local folder or a hub, in float32.

    Raises:
        ValueError: nothing that can be loaded, or no trained causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained
    with loading(name):
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model, info = load(name, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        lacking = ", ".join(sorted(info["missing_keys"])[:5])
        raise ValueError(f"--model {name} is no trained causal language model: it has no weights for {lacking}")
    check_causal(model)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Loaded(model, encode, tokenizer.decode)


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


def perplexity(nats: Tensor) -> tuple[float, float]:
    """Perplexity and its standard error over windows, from `negative_log_likelihoods`."""
    value = math.exp(float(nats.mean()))
    return value, value * float(nats.std()) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
