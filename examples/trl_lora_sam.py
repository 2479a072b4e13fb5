"""LoRA and SAM with TRL's supervised fine-tuning: adapters of a causal language model, from a JSON lines file.

    python examples/trl_lora_sam.py --model MODEL --train_file ROWS.jsonl --sam_rho 0.05 --learning_rate 2e-4

Each line of ROWS.jsonl holds "text", or "prompt" and "completion", or "messages". Every option of SFTConfig works, and so
does torchrun. The adapters stay in float32, so that SAM's perturbation is not lost where the base is in bfloat16.
It needs: pip install ".[trl,peft]"
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from fastpost.integrations.trl import PostSFTConfig, SAMSFTTrainer  # instead of SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
parser.add_argument("--train_file", required=True)
parser.add_argument("--rank", type=int, default=16, help="of LoRA")
options, rest = parser.parse_known_args()
(arguments,) = HfArgumentParser(PostSFTConfig).parse_args_into_dataclasses(
    ["--output_dir", "out", "--max_length", "512", "--logging_steps", "5", *rest]
)

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
trainer = SAMSFTTrainer(
    AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype),
    arguments,
    train_dataset=load_dataset("json", data_files=options.train_file, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
for line in trainer.state.log_history:
    if "sam/seen_over_intended" in line:
        print(f"step {line['step']}: loss {line['loss']}, e seen / intended {line['sam/seen_over_intended']:.3f}")
