"""SAM with FSDP2 under torchrun: a small GPT-2 on bytes of text, sharded over processes, with gradient accumulation.

    torchrun --nproc-per-node 2 examples/fsdp2_sam.py                     # on CPUs, through gloo
    torchrun --nproc-per-node 8 examples/fsdp2_sam.py --device cuda       # on GPUs, through NCCL

Any number of processes makes the same steps: they share out the rows. Several machines: docs/multi-node.md.
"""

import argparse
import inspect

import torch
import torch.distributed as dist
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

import fastpost
from fastpost.distributed import no_sync

parser = argparse.ArgumentParser()
for name, default in (("device", "cpu"), ("dtype", "float32"), ("output", None)):
    parser.add_argument(f"--{name}", default=default)
options = parser.parse_args()
STEPS, ACCUMULATION, ROWS, LENGTH = 6, 2, 8, 32  # micro-batches of a step, their rows over all processes, bytes of a row

dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if options.device == "cuda":
    torch.cuda.set_device(dist.get_node_local_rank())
torch.manual_seed(0)
sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 256}
model = GPT2LMHeadModel(GPT2Config(**sizes)).to(options.device, getattr(torch, options.dtype)).eval()  # no dropout
for module in (*model.transformer.h, model):
    fully_shard(module, mesh=init_device_mesh(options.device, (world,)))
optimizer = fastpost.SAM(model.parameters(), torch.optim.AdamW, rho=0.01, lr=3e-3)  # after sharding


def forward_backward(rows):
    loss = model(input_ids=rows, labels=rows).loss / ACCUMULATION
    loss.backward()
    return loss.detach()


window = fastpost.SAMWindow(optimizer, forward_backward, no_sync=lambda: no_sync(model))
text = torch.tensor(list(inspect.getsource(argparse).encode()), device=options.device)
for step, rows in enumerate(text.split(ROWS * LENGTH * ACCUMULATION)[:STEPS], start=1):
    loss = torch.stack(window.run(list(rows.view(ACCUMULATION, world, -1, LENGTH)[:, rank]))).sum() / world
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    dist.all_reduce(loss)
    if rank == 0:
        print(f"step {step}: loss {loss.item():.4f}, {optimizer.report.line()}", flush=True)
weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if options.output and rank == 0:
    torch.save(weights, options.output)
dist.barrier()  # nobody leaves while another still exchanges tensors
dist.destroy_process_group()
