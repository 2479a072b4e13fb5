"""LoRA held to its base model: fine-tunes a causal language model on one text, and shows what it forgets of another.

    python examples/lora_anchor.py --model MODEL --train_file NEW.txt --kept_file OLD.txt --anchor_kl 0.1 --max_steps 60

Trains twice from one start, without and with an anchor: the model's own predictions with its adapters switched off. Every
option of TrainingArguments works, and so do the anchor's (--anchor_divergence reverse_kl, --sft_weighting asft, ...).
It needs: pip install ".[peft]"
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from fastpost.integrations.transformers import AnchorTrainer, parse_arguments  # instead of Trainer, HfArgumentParser

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
parser.add_argument("--train_file", required=True, help="plain text; a tenth of it is held out")
parser.add_argument("--kept_file", required=True, help="plain text that the model is not to forget")
parser.add_argument("--block", type=int, default=64, help="tokens of an example")
parser.add_argument("--rank", type=int, default=8, help="of LoRA")
options, rest = parser.parse_known_args()
arguments = parse_arguments(argv=["--output_dir", "out", "--anchor", "lora_off", "--learning_rate", "5e-4", *rest])
tokenizer = AutoTokenizer.from_pretrained(options.model)


def blocks(file):
    ids = tokenizer(Path(file).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // options.block * options.block]).view(-1, options.block)


def nats(model, rows):  # per token, of each block
    model.eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=row[None], labels=row[None]).loss.cpu() for row in rows.to(model.device)])


new, old = blocks(options.train_file), blocks(options.kept_file)
held, train = new[::10], torch.cat([new[k::10] for k in range(1, 10)])
lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
asked, before = arguments.anchor_weight, None
for arguments.anchor_kl in (0.0, asked):
    set_seed(arguments.seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), lora)
    trainer = AnchorTrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in train])
    before = [nats(model, rows) for rows in (held, old)] if before is None else before
    trainer.train()
    for name, rows, start in zip(("new text", "old text"), (held, old), before, strict=True):
        change = nats(model, rows) - start  # of the same blocks
        error = change.std().item() / len(change) ** 0.5
        print(f"anchor_kl {arguments.anchor_kl:g}, {name}: {start.mean():.3f} nats {change.mean():+.3f} (error {error:.3f})")
