"""Fine-tunes a causal language model on dialogues with R3F, logits never held whole (`linear_r3f_loss`).

    python -m fastpost.bench.studies.causal_lm_r3f dialogues.json                      # a small model, made on the spot
    python -m fastpost.bench.studies.causal_lm_r3f dialogues.json --model path/to/model --device cuda --bf16

`dialogues.json` is {"text": {"0": [turn, turn, ...], ...}}, as the authors of GAP publish their validation sets. The model
learns the last turn of each dialogue given those before it: only its tokens carry labels. Every tenth dialogue is held out.
Both methods start from the same weights; printed are the held-out perplexity of answers, with its standard error over
dialogues, and how far predictions move when the embeddings are nudged.

Without --model a GPT-2 of about two million parameters is trained from scratch on the first turns of the same dialogues
(byte-level BPE, the held-out ones left out): enough to see the code run, not to say which method is better.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fastpost

Example = tuple[list[int], list[int]]  # tokens of what came before, tokens of the answer


def read(path: Path, limit: int | None) -> list[list[str]]:
    dialogues = [turns for turns in json.loads(path.read_text(encoding="utf-8"))["text"].values() if len(turns) >= 2]
    if len(dialogues) < 20:
        raise SystemExit(f"{path} holds {len(dialogues)} dialogues of two turns or more; 20 are needed")
    return dialogues[:limit]


def small_model(texts: list[str], options: argparse.Namespace) -> tuple[Any, Any]:
    """A GPT-2 from scratch and its tokenizer: a function from text to ids."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=8192, special_tokens=["<end>"], show_progress=False)
    vocabulary = tokenizer.get_vocab_size()
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=options.context, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model: Any = GPT2LMHeadModel(config).to(options.device)
    stream = torch.tensor([i for e in tokenizer.encode_batch(texts) for i in (*e.ids, 0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    window = min(options.context, len(stream) - 1)
    for step in track(range(options.pretraining_steps), description="a model from scratch"):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / options.pretraining_steps)
        starts = torch.randint(len(stream) - window, (8, 1))
        ids = stream[starts + torch.arange(window)].to(options.device)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model, lambda text: tokenizer.encode(text).ids


def loaded_model(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return AutoModelForCausalLM.from_pretrained(options.model).to(options.device), lambda text: tokenizer(text)["input_ids"]


def example(turns: list[str], encode: Any, context: int) -> Example:
    """Cut on the left, where a dialogue began longest ago."""
    before = [i for turn in turns[:-1] for i in encode(turn.strip() + "\n")]
    answer = encode(turns[-1].strip() + "\n")[: context // 2]
    return before[-(context - len(answer)) :] or answer[:1], answer


def batch_of(examples: list[Example], device: str) -> dict[str, Tensor]:
    width = max(len(before) + len(answer) for before, answer in examples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for before, answer in examples:
        padding = width - len(before) - len(answer)
        rows["input_ids"].append([*before, *answer, *[0] * padding])
        rows["attention_mask"].append([1] * (width - padding) + [0] * padding)
        rows["labels"].append([-100] * len(before) + answer + [-100] * padding)
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}


def labelled(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def fine_tune(model: nn.Module, examples: list[Example], weight: float, options: argparse.Namespace, name: str) -> float:
    """One pass over the examples; returns the mean divergence of the last tenth of the steps."""
    r3f = fastpost.R3F(
        options.eps, weight, noise_scale="neftune", seed=options.seed, fused_linear=True, memory_budget=options.memory_budget
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    model.train()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed)).tolist()
    size, micro = options.batch_size, options.micro_batch_size
    steps = [order[at : at + size] for at in range(0, len(order), size)]
    moved = []
    for step in track(steps, description=name):
        batches = [
            batch_of([examples[i] for i in step[at : at + micro]], options.device) for at in range(0, len(step), micro)
        ]
        tokens = sum(labelled(b) for b in batches)  # one mean over all answers' tokens, however they are cut
        optimizer.zero_grad()
        total = 0.0
        with r3f.window(), torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            for batch in batches:
                out = r3f(model, num_items=tokens, **batch)
                out.loss.backward()
                total += float(out.symm_kl)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        moved.append(total)
    tail = moved[-max(len(moved) // 10, 1) :]
    return sum(tail) / len(tail)


@torch.no_grad()
def perplexity(model: nn.Module, examples: list[Example], options: argparse.Namespace) -> tuple[float, float]:
    """Of the answers' tokens, and its standard error over dialogues."""
    model.eval()
    nats, counts = [], []
    for one in examples:
        batch = batch_of([one], options.device)
        nats.append(float(model(**batch).loss) * labelled(batch))
        counts.append(labelled(batch))
    mean = sum(nats) / sum(counts)
    residuals = [n - mean * c for n, c in zip(nats, counts, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals)) / sum(counts)
    return math.exp(mean), math.exp(mean) * error


def moved_by_noise(model: nn.Module, examples: list[Example], options: argparse.Namespace) -> float:
    """The divergence per token under the noise of training, dropout off."""
    model.eval()
    model.training = True  # alone, this turns the noised pass on and no dropout
    r3f = fastpost.R3F(options.eps, noise_scale="neftune", seed=options.seed, fused_linear=True)
    with torch.no_grad():
        batches = [batch_of(examples[at : at + 8], options.device) for at in range(0, len(examples), 8)]
        found = [(float(r3f(model, **b).symm_kl), labelled(b)) for b in batches]
    return sum(kl * n for kl, n in found) / sum(n for _, n in found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model with R3F")
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("--model", help="a transformers model with its tokenizer; default: a small one, made here")
    parser.add_argument("--eps", type=float, default=5.0, help="NEFTune's alpha: noise is eps / sqrt(length * width)")
    parser.add_argument("--r3f-lambda", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=16, help="dialogues per optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--limit", type=int, help="dialogues read")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--memory-budget", type=int, default=1 << 28, help="bytes for logits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    dialogues = read(options.dialogues, options.limit)
    held, kept = dialogues[::10], [d for k, d in enumerate(dialogues) if k % 10]
    start, encode = loaded_model(options) if options.model else small_model(["\n".join(d[:-1]) for d in kept], options)
    train, test = ([example(d, encode, options.context) for d in part] for part in (kept, held))

    table = Table("method", "held-out perplexity of answers", "KL under noise, dropout off", "KL in training")
    console = Console()
    for name, weight in (("start", None), ("plain", 0.0), (f"R3F, lambda {options.r3f_lambda:g}", options.r3f_lambda)):
        model = copy.deepcopy(start)
        torch.manual_seed(options.seed)
        kl = None if weight is None else fine_tune(model, train, weight, options, name)
        value, error = perplexity(model, test, options)
        moved = moved_by_noise(model, test, options)
        table.add_row(name, f"{value:.2f} ± {error:.2f}", f"{moved:.4g}", f"{kl:.4g}" if kl else "-")
    parameters = sum(p.numel() for p in start.parameters())
    console.print(f"{parameters:,} parameters, {len(train)} dialogues to learn from, {len(test)} held out")
    console.print(table)


if __name__ == "__main__":
    main()
