"""What tests of `fastpost train` share: tiny models with a tokenizer, real text in files, command lines, results."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastpost.bench.studies import stdlib

from .conftest import same_bits
from .trainers import BATCH, CLIP, DECAY, LR, RHO

LENGTH = 12
COMMON = (
    f"--learning_rate {LR} --weight_decay {DECAY} --max_grad_norm {CLIP} --lr_scheduler_type constant --optim adamw_torch "
    f"--per_device_train_batch_size {BATCH} --logging_steps 1 --use_cpu --disable_tqdm true --max_length {LENGTH} "
    "--save_strategy no"
).split()
METHOD_OPTIONS = {
    "anchor": ["--anchor_kl", "0.3", "--anchor", "ema", "--anchor_ema_decay", "0.5"],
    "none": [],
    "sam": ["--sam_rho", str(RHO)],
    "sam_lm": ["--gradient_accumulation_steps", "4"],
    "r3f": ["--r3f_eps", "0.3", "--r3f_seed", "3"],
    "asam": [],
    "r4f": ["--r3f_eps", "0.3", "--r3f_seed", "3"],
    "sam+r3f": ["--sam_rho", str(RHO), "--r3f_eps", "0.3"],
    "sam+r4f": ["--sam_rho", str(RHO), "--r3f_eps", "0.3"],
    "tram": ["--sam_rho", str(RHO), "--r3f_eps", "0.3"],
}
WORDS = list(dict.fromkeys(re.findall(r"[a-z]+", (stdlib.root() / "argparse.py").read_text(encoding="utf-8"))))[:80]


def build_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny encoder and a tiny language model, each with dropout and without, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = {}
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=32
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(vocabulary)}
    bert = transformers.BertConfig(
        **sizes, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, initializer_range=0.2
    )
    gpt2 = transformers.GPT2Config(
        **sizes, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.2, bos_token_id=0, eos_token_id=3
    )
    plain = transformers.BertConfig(**{**bert.to_dict(), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    still = transformers.GPT2Config(**{**gpt2.to_dict(), "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    for name, model in (
        ("encoder", transformers.BertModel(bert)),
        ("plain", transformers.BertModel(plain)),
        ("causal", transformers.GPT2LMHeadModel(gpt2)),
        ("still", transformers.GPT2LMHeadModel(still)),
    ):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


def write_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Real text in the forms that the command reads."""
    folder = tmp_path_factory.mktemp("data")
    text = (stdlib.root() / "argparse.py").read_text(encoding="utf-8").lower()
    lines = [line.strip() for line in text.splitlines() if len(re.findall(r"[a-z]+", line)) > 3]
    (folder / "text.txt").write_text("\n".join(lines[:240]), encoding="utf-8")
    (folder / "held.txt").write_text("\n".join(lines[240:320]), encoding="utf-8")
    labelled = [{"text": line, "label": ("code", "prose")[" the " in line]} for line in lines]
    part = [row for label in ("code", "prose") for row in [r for r in labelled if r["label"] == label][:14]]
    part = [part[k // 2 + 14 * (k % 2)] for k in range(28)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part[:20]), encoding="utf-8")
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part[20:]), encoding="utf-8")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines[:40]), encoding="utf-8")
    return {path.name: str(path) for path in folder.iterdir()}


def words_of(method: str, models: dict[str, str], files: dict[str, str], out: Path, *extra: str) -> list[str]:
    """A run of four steps: text for sam_lm, sentences with labels otherwise."""
    kind = ("causal", "text.txt", "held.txt") if method == "sam_lm" else ("encoder", "rows.jsonl", "held.jsonl")
    model, train, held = models[kind[0]], files[kind[1]], files[kind[2]]
    words = ["train", "--method", method, "--model", model, "--train_file", train, "--validation_file", held]
    return [
        *words,
        "--output_dir",
        str(out),
        *COMMON,
        "--max_steps",
        "4",
        *METHOD_OPTIONS[method],
        *extra,
    ]


def saved(folder: Path | str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(Path(folder) / "model.safetensors"))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(same_bits(a[name], b[name]) for name in a)


class Page(HTMLParser):
    """What a page holds: addresses it refers to, tables by id, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.heads: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.seen: list[str] = []
        self._open: list[str] = []
        self._table = ""
        self.feed(text)
        self.close()
        assert self._open == []

    @classmethod
    def of(cls, folder: Path) -> Page:
        return cls((folder / "report.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action", "poster")
        ]
        if tag not in ("meta", "link", "img", "source", "wbr"):
            self._open.append(tag)
        if tag == "table":
            self._table = dict(attrs)["id"] or ""
            self.tables[self._table], self.heads[self._table] = [], []
        elif tag == "tr" and "tbody" in self._open:
            self.tables[self._table].append([])
        elif tag == "td":
            self.tables[self._table][-1].append("")
        elif tag == "th":
            self.heads[self._table].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.seen.append(data)
        if "td" in self._open:
            self.tables[self._table][-1][-1] += data
        elif "th" in self._open:
            self.heads[self._table][-1] += data
