"""SAM and R3F in Hugging Face's Trainer: fine-tunes a classifier on a CSV file with the columns text and label.

    python examples/hf_trainer.py --model MODEL --train_file ROWS.csv --method sam+r3f --sam_rho 0.05 --r3f_lambda 1.0

Every option of TrainingArguments works, and so does torchrun. --method is none, sam, sam_lm, asam, r3f or sam+r3f.
It needs: pip install ".[cli]" datasets
"""

import argparse

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from fastpost.integrations.transformers import PostTrainer, parse_arguments  # instead of Trainer, HfArgumentParser

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or hub name of an encoder")
parser.add_argument("--train_file", required=True)
options, rest = parser.parse_known_args()
arguments = parse_arguments(argv=["--output_dir", "out", "--eval_strategy", "epoch", *rest])

tokenizer = AutoTokenizer.from_pretrained(options.model)
data = load_dataset("csv", data_files=options.train_file, split="train").class_encode_column("label")
labels = data.features["label"].names
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), batched=True)
data = data.train_test_split(0.1, seed=0, stratify_by_column="label")
model = AutoModelForSequenceClassification.from_pretrained(
    options.model, id2label=dict(enumerate(labels)), label2id={name: k for k, name in enumerate(labels)}
)


def accuracy(predicted):
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


trainer = PostTrainer(
    model,
    arguments,
    data_collator=DataCollatorWithPadding(tokenizer),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    compute_metrics=accuracy,
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
last = {key: value for line in trainer.state.log_history for key, value in line.items()}
# How much of SAM's perturbation the forward pass saw (1 is all of it), and R3F's divergence.
print({key: last[key] for key in ("sam/seen_over_intended", "r3f/symm_kl") if key in last})
