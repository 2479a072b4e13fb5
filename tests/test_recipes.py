"""The recipes of docs/recipes.md for other people's trainers, where those are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from . import docs
from .tiny import build, word_level_bert

PAGE = "docs/recipes.md"
SETTINGS = {
    "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "full", "dataset": "d",
    "dataset_dir": "data", "template": "alpaca", "cutoff_len": 64, "output_dir": "out", "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "use_cpu": True,
}  # fmt: skip


# SAM from its equations, with SGD and clipping at 1, over windows of two micro-batches.
BY_HAND = """
import copy, math, torch, transformers
torch.manual_seed(0)
sizes = dict(vocab_size=61, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2))
start, hand = copy.deepcopy(model), copy.deepcopy(model).train()
args = dict(output_dir="out", per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.05, max_steps=3,
            optim="sgd", lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True)
def in_order(self, *args, **kwargs):
    return torch.utils.data.SequentialSampler(self.train_dataset)
def check(data, loss):
    params = list(hand.parameters())
    for step in range(3):
        window = [data[i : i + 2] for i in ((0, 2), (4, 6))[step % 2]]
        kept = [p.detach().clone() for p in params]
        for uphill in (True, False):
            g = torch.autograd.grad(sum(loss(part) for part in window) / 2, params)
            norm = math.sqrt(sum(float(part.double().square().sum()) for part in g))
            with torch.no_grad():
                for p, w, part in zip(params, kept, g):
                    p.copy_(w + 0.05 / norm * part if uphill else w - 0.05 * min(1.0, 1 / norm) * part)
    def far(other):
        return max(float((p - q).detach().abs().max()) for p, q in zip(params, other.parameters()))
    assert far(model) < 1e-5 and far(start) > 5e-3, (far(model), far(start))
"""
# Up to train.main(), then what open-unlearning's train.py does with its registry.
UNLEARN = """
import importlib.machinery, sys, types
for name in ("deepspeed", "train"):          # rmu.py imports the one, and nothing here uses it; the other needs Hydra
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
sys.modules["train"].main = lambda: None
exec(open("recipe.py").read())
from omegaconf import OmegaConf
from trainer.utils import compute_dpo_loss
def row():
    ids = torch.randint(3, 61, (10,))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
data = [{"forget": row(), "retain": row()} for _ in range(8)]
collate = torch.utils.data.default_collate
args["remove_unused_columns"] = False
config = OmegaConf.create({"handler": "SAMNPO", "args": args, "method_args": {"beta": 0.1}})
NPO._get_train_sampler = in_order
trainer.load_trainer(config, model, data, data_collator=collate)[0].train()
def loss(part):
    batch = collate(part)
    return compute_dpo_loss(hand, start, None, batch["forget"], 0.1)[0] + hand(**batch["retain"]).loss
check(data, loss)
"""
# What Axolotl's builder does with a plugin's trainer class.
AXOLOTL = """
import datasets
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
plugins = PluginManager.get_instance()
plugins.register("recipe.SAMPlugin")
cls = plugins.get_trainer_cls(DictDefault({}))
cls._get_train_sampler = in_order
ids = torch.randint(3, 61, (8, 10))
columns = {"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
made = cls(model=model, args=AxolotlTrainingArguments(**args), train_dataset=datasets.Dataset.from_dict(columns),
           data_collator=transformers.default_data_collator)
made.axolotl_cfg = DictDefault({})
made.train()
check(ids, lambda part: hand(input_ids=part, labels=part).loss)
"""


def run(folder: Path, code: str, *paths: str) -> None:
    (folder / "run.py").write_text(BY_HAND + code)
    given = (os.environ.get("PYTHONPATH", ""), *paths, str(folder), str(docs.ROOT))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, given))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_recipes_are_short() -> None:
    recipes = [block for block in docs.blocks(PAGE) if block.reason is not None]
    assert len(recipes) == 4
    for block in recipes:
        assert sum(bool(line.strip()) for line in block.code.splitlines()) <= 15


@pytest.mark.skipif("OPEN_UNLEARNING" not in os.environ, reason="OPEN_UNLEARNING names no checkout of open-unlearning")
def test_open_unlearning(tmp_path: Path) -> None:
    """Its registry, load_trainer and NPO, by the recipe for the transformers that is installed."""
    (tmp_path / "recipe.py").write_text(docs.blocks(PAGE)[3 if transformers.__version__ >= "5" else 4].code)
    run(tmp_path, UNLEARN, str(Path(os.environ["OPEN_UNLEARNING"]) / "src"))


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="Axolotl is not installed")
def test_axolotl(tmp_path: Path) -> None:
    """Its trainer, made by its plugin manager."""
    (tmp_path / "recipe.py").write_text(docs.blocks(PAGE)[2].code)
    run(tmp_path, AXOLOTL)


@pytest.mark.skipif(importlib.util.find_spec("llamafactory") is None, reason="LLaMA-Factory is not installed")
@pytest.mark.parametrize("method", ["none", "sam", "sam+r3f"])
def test_llama_factory(tmp_path: Path, method: str) -> None:
    words = ["\n", *map(str, range(40)), "add", "Below", "is", "an", "instruction", "Response", "Instruction", ":", "###"]
    word_level_bert(tmp_path / "model", words)  # for its tokenizer
    model = build("llama")
    model.resize_token_embeddings(len(words) + 16)  # type: ignore[operator]
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"add {k}", "input": "", "output": str(k + 1)} for k in range(39)]
    (tmp_path / "data" / "d.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"}}))
    (tmp_path / "run.yaml").write_text(json.dumps(SETTINGS))  # which is YAML too
    code = docs.blocks(PAGE)[0].code
    assert 'method="sam", sam_rho=0.05' in code
    (tmp_path / "train.py").write_text(code.replace('method="sam", sam_rho=0.05', f"method={method!r}"))
    done = subprocess.run(
        [sys.executable, "train.py", "run.yaml"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(docs.ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logged = set().union(*history)
    assert ("sam/seen_cosine" in logged) == ("sam" in method)
    assert ("r3f/symm_kl" in logged) == ("r3f" in method)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in history if "loss" in line)
