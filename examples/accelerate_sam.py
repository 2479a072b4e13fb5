"""Trains a small language model with SAM in an Accelerate loop, on real text: the sources of Python's library.

    python examples/accelerate_sam.py                                                  # one process
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_sam.py     # two, through gloo
    accelerate launch --config_file cluster.yaml examples/accelerate_sam.py            # several machines: docs/multi-node.md

All of them make the same steps: Accelerate cuts each micro-batch (`split_batches`), and averages the gradients.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import fastpost
from fastpost.cli.stdlib import sources
from fastpost.integrations.accelerate import AcceleratedWindow


def rows_of_text(length: int, rows: int) -> Tensor:
    """Sources, byte by byte, cut into rows: int64 (rows, length)."""
    text = bytearray()
    for path in sources():
        text += path.read_bytes()
        if len(text) >= rows * length:
            return torch.tensor(list(text[: rows * length])).view(rows, length)
    raise SystemExit(f"{rows * length} bytes of text are wanted, Python's library has {len(text)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SAM in an Accelerate loop")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="texts per micro-batch, over all processes")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--length", type=int, default=64, help="bytes per text")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rho", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--output", type=Path, help="file for the trained weights")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulation, dataloader_config=DataLoaderConfiguration(split_batches=True)
    )
    torch.manual_seed(0)
    sizes = {"n_embd": options.width, "n_layer": 2, "n_head": 2, "n_positions": options.length, "vocab_size": 256}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    model = model.to(getattr(torch, options.dtype)).train()
    opt = fastpost.SAM(model.parameters(), torch.optim.AdamW, rho=options.rho, lr=options.lr)
    text = rows_of_text(options.length, options.steps * options.accumulation * options.batch_size)
    model, opt, loader = accelerator.prepare(model, opt, DataLoader(text, batch_size=options.batch_size))

    window = AcceleratedWindow(accelerator, model, opt, lambda model, rows: model(input_ids=rows, labels=rows).loss)
    total = 0.0
    for number, rows in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            total += float(accelerator.reduce(window(rows), "mean")) / options.accumulation
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            if accelerator.sync_gradients:
                report = opt.optimizer.report.line()  # `prepare` has wrapped SAM
                accelerator.print(f"step {number // options.accumulation}: loss {total:.4f}, {report}", flush=True)
                total = 0.0
    if options.output is not None:
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            torch.save(weights, options.output)
    accelerator.wait_for_everyone()  # nobody leaves while another one still exchanges tensors
    accelerator.end_training()


if __name__ == "__main__":
    main()
