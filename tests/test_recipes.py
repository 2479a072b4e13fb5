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


# Up to train.main(), then what open-unlearning's train.py does with its registry, beside NPO under SAM from the equations.
UNLEARN = """
import copy, importlib.machinery, math, sys, types
for name in ("deepspeed", "train"):          # rmu.py imports the one, and nothing here uses it; the other needs Hydra
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
sys.modules["train"].main = lambda: None
exec(open("recipe.py").read())
import torch, transformers
from omegaconf import OmegaConf
from trainer.utils import compute_dpo_loss
torch.manual_seed(0)
sizes = dict(vocab_size=61, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2))
start, hand = copy.deepcopy(model), copy.deepcopy(model).train()
def row():
    ids = torch.randint(3, 61, (10,))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
data = [{"forget": row(), "retain": row()} for _ in range(8)]
collate = torch.utils.data.default_collate
args = dict(output_dir="out", per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.05, max_steps=3,
            optim="sgd", lr_scheduler_type="constant", report_to="none", save_strategy="no", remove_unused_columns=False,
            use_cpu=True)
config = {"handler": "SAMNPO", "args": args, "method_args": {"beta": 0.1}}
NPO._get_train_sampler = lambda self, *a: torch.utils.data.SequentialSampler(self.train_dataset)
trainer.load_trainer(OmegaConf.create(config), model, data, data_collator=collate)[0].train()
params = list(hand.parameters())
def gradient(window):
    total = 0
    for batch in map(collate, window):
        total = total + compute_dpo_loss(hand, start, None, batch["forget"], 0.1)[0] + hand(**batch["retain"]).loss
    grads = torch.autograd.grad(total / 2, params)
    return grads, math.sqrt(sum(float(g.double().square().sum()) for g in grads))
for step in range(3):
    window = [data[i : i + 2] for i in ((0, 2), (4, 6))[step % 2]]
    kept = [p.detach().clone() for p in params]
    for scale in (None, 0.05):
        grads, norm = gradient(window)
        with torch.no_grad():
            for p, w, g in zip(params, kept, grads):
                p.copy_(w + 0.05 / norm * g if scale is None else w - scale * min(1.0, 1 / norm) * g)
def far(other):
    return max(float((p - q).abs().max()) for p, q in zip(hand.parameters(), other.parameters()))
moved, away = far(start), far(model)
assert away < 1e-5 and moved > 5e-3, (away, moved)
"""


def test_recipes_are_short() -> None:
    recipes = [block for block in docs.blocks(PAGE) if block.reason is not None]
    assert len(recipes) == 3
    for block in recipes:
        assert sum(bool(line.strip()) for line in block.code.splitlines()) <= 15


@pytest.mark.skipif("OPEN_UNLEARNING" not in os.environ, reason="OPEN_UNLEARNING names no checkout of open-unlearning")
def test_open_unlearning(tmp_path: Path) -> None:
    """Its registry, load_trainer and NPO, by the recipe for the transformers that is installed."""
    (tmp_path / "recipe.py").write_text(docs.blocks(PAGE)[2 if transformers.__version__ >= "5" else 3].code)
    (tmp_path / "run.py").write_text(UNLEARN)
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(os.environ["OPEN_UNLEARNING"]) / "src"), str(docs.ROOT)]
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


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
