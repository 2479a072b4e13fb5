"""Text of the standard library's sources as tokens, and a small causal language model that is trained on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.bench.studies import stdlib

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
        encode: text to token ids.
        vocabulary: number of tokens of a tokenizer made here. decode: token ids to text by it.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    climb: list[Tensor]
    vocabulary: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str] | None = None


def library_texts(most: int, folder: Path | None = None) -> tuple[list[str], list[str], list[str], list[str]]:
    """Source files of the standard library, by their names' order, `most` characters of all and of one a hundredth of that:
    to train, to validate, to test, and to climb on. The last three are a tenth of the files each."""
    folder = folder or stdlib.root()
    files = sorted(stdlib.sources(folder), key=lambda path: stdlib.order(str(path.relative_to(folder))))
    texts: list[str] = []
    total = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")[: most // 100]
        texts.append(text)
        total += len(text)
        if total > most:
            break
    held = max(len(texts) // 10, 1)
    return texts[3 * held :], texts[:held], texts[held : 2 * held], texts[2 * held : 3 * held]


def build_corpus(options: LmOptions, folder: Path | None = None) -> Corpus:
    """The library's files in tokens of a byte-level BPE made from the training files.

    Raises:
        ValueError: too little text for the sizes asked for.
    """
    return split_corpus(*library_texts(options.files_bytes, folder), options, str(folder or stdlib.root()))


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

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    corpus = encoded_corpus((train, validation, test, climb), encode, options.context, options.eval_windows, where)
    return replace(corpus, vocabulary=tokenizer.get_vocab_size(), decode=tokenizer.decode)


def encoded_corpus(
    parts: Sequence[list[str]], encode: Callable[[str], list[int]], context: int, windows: int, where: str
) -> Corpus:
    """Four sets of texts (to train, to validate, to test, to climb on) in token ids.

    Args:
        context: tokens of a window and of a text to climb on. windows: to validate and to test on, at most.
        where: names the texts in errors.

    Raises:
        ValueError: too little text.
    """

    def ids(texts: list[str]) -> Tensor:
        return torch.tensor([i for text in texts for i in encode(text)], dtype=torch.int64)

    def cut(texts: list[str]) -> Tensor:
        size = context + 1
        stream = ids(texts)
        whole = stream[: len(stream) // size * size].view(-1, size)
        return whole[:: max(len(whole) // windows, 1)][:windows]  # from all over the files

    stream, to_choose, to_report = ids(parts[0]), cut(parts[1]), cut(parts[2])
    uphill = [row[:context] for row in cut(parts[3])]
    if len(stream) <= context + 1 or not len(to_choose) or not len(to_report) or not uphill:
        raise ValueError(f"{where} holds too little text for a language model with context {context}")
    return Corpus(stream, to_choose, to_report, uphill, 0, encode)


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


def perplexity(nats: Tensor) -> tuple[float, float]:
    """Perplexity and its standard error over windows, from `negative_log_likelihoods`."""
    value = math.exp(float(nats.mean()))
    return value, value * float(nats.std()) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
