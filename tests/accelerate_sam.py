"""SAM in an Accelerate loop, started by docs/multi-node.md's command: the model, text and steps of examples/fsdp2_sam.py.

Accelerate cuts each micro-batch (`split_batches`) and averages the gradients: any number of processes makes the same steps.
"""

from __future__ import annotations

import argparse
import inspect

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import fastpost
from fastpost.integrations.accelerate import AcceleratedWindow

STEPS, ACCUMULATION, ROWS, LENGTH = 6, 2, 8, 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", help="file for the weights")
    options = parser.parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATION, dataloader_config=DataLoaderConfiguration(split_batches=True)
    )
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 256}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).to(getattr(torch, options.dtype)).eval()  # no dropout
    opt = fastpost.SAM(model.parameters(), torch.optim.AdamW, rho=0.01, lr=3e-3)
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    rows = text[: STEPS * ACCUMULATION * ROWS * LENGTH].view(-1, LENGTH)
    model, opt, loader = accelerator.prepare(model, opt, DataLoader(rows, batch_size=ROWS))

    window = AcceleratedWindow(accelerator, model, opt, lambda model, rows: model(input_ids=rows, labels=rows).loss)
    total = 0.0
    for number, batch in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            total += float(accelerator.reduce(window(batch), "mean")) / ACCUMULATION
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            if accelerator.sync_gradients:
                report = opt.optimizer.report.line()  # `prepare` has wrapped SAM
                accelerator.print(f"step {number // ACCUMULATION}: loss {total:.4f}, {report}", flush=True)
                total = 0.0
    weights = accelerator.get_state_dict(model)
    if options.output and accelerator.is_main_process:
        torch.save(weights, options.output)
    accelerator.wait_for_everyone()  # nobody leaves while another one still exchanges tensors
    accelerator.end_training()


if __name__ == "__main__":
    main()
