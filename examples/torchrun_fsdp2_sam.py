"""Trains a small language model with SAM, sharded over processes with FSDP2, on the sources of Python's library.

    torchrun --nproc-per-node 2 examples/torchrun_fsdp2_sam.py                    # on CPUs, through gloo
    torchrun --nproc-per-node 8 examples/torchrun_fsdp2_sam.py --device cuda      # on GPUs, through NCCL
    python examples/torchrun_fsdp2_sam.py                                         # one process, nothing sharded

All of them make the same steps: a step is SAM's over `--accumulation` micro-batches of `--batch-size` texts, which the
processes share out. Over several machines see docs/multi-node.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

from fastpost import SAM, SAMWindow
from fastpost.cli.stdlib import sources
from fastpost.distributed import no_sync


def rows_of_text(length: int, rows: int) -> Tensor:
    """Sources, byte by byte, cut into rows: int64 (rows, length)."""
    text = bytearray()
    for path in sources():
        text += path.read_bytes()
        if len(text) >= rows * length:
            return torch.tensor(list(text[: rows * length])).view(rows, length)
    raise SystemExit(f"{rows * length} bytes of text are wanted, Python's library has {len(text)}")


def build(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    width = options.width
    config = GPT2Config(
        vocab_size=256,
        n_positions=options.length,
        n_embd=width,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = GPT2LMHeadModel(config).to(options.device, getattr(torch, options.dtype)).train()
    return model


def shard(model: nn.Module, device: str) -> None:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(model: nn.Module, options: argparse.Namespace, rank: int, world: int) -> None:
    # After sharding, which replaces the parameters.
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=options.rho, lr=options.lr)
    text = rows_of_text(options.length, options.steps * options.accumulation * options.batch_size)
    mine = options.batch_size // world

    def forward_backward(rows: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=rows, labels=rows).loss / options.accumulation
        loss.backward()
        return loss.detach()

    sharded = isinstance(model, FSDPModule)
    window = SAMWindow(opt, forward_backward, no_sync=(lambda: no_sync(model)) if sharded else None)
    for step, rows in enumerate(text.to(options.device).split(options.accumulation * options.batch_size)):
        batches = [micro.split(mine)[rank] for micro in rows.split(options.batch_size)]
        loss = torch.stack(window.run(batches)).sum()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if world > 1:
            dist.all_reduce(loss)
        report = opt.report
        if rank == 0 and report is not None:
            print(f"step {step + 1}: loss {float(loss) / world:.4f}, {report.line()}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SAM with FSDP2 under torchrun")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="texts per micro-batch, over all processes")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--length", type=int, default=64, help="bytes per text")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rho", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="file for the trained weights, written by the first process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % world:
        parser.error(f"--batch-size {options.batch_size} cannot be shared out among {world} processes")

    rank = 0
    launched = "LOCAL_RANK" in os.environ  # by torchrun
    if launched:
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        rank = dist.get_rank()
    model = build(options)
    if launched:
        shard(model, options.device)
    train(model, options, rank, world)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if options.output is not None and rank == 0:
        torch.save(weights, options.output)
    if launched:
        dist.barrier()  # nobody leaves while another one still exchanges tensors
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
