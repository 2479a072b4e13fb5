"""What SAM(stash="ulp") keeps per weight, on SmolLM2-135M and its own gradients.

    python -m fastpost.bench.sam_stash --data DIR [--rho 0.05 0.15] [--steps 0 8]

For each dtype and radius: the share of weights whose distance from w + e does not fit into a code, over all weights and
in the worst tensor, as counted here, and the bytes that SAM keeps. With --steps the weights are first moved by that many
steps of AdamW, since those of the package are decoded from 4 bits. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpost import SAM
from fastpost.bench.studies import language
from fastpost.bench.studies.precision import loss_of
from fastpost.gap.zero_shot import dialogue_prompt

WIDTHS = {torch.bfloat16: (torch.int16, 8), torch.float16: (torch.int16, 8), torch.float32: (torch.int32, 16)}


def place(w: Tensor) -> Tensor:
    """Where a number stands in the order of all numbers of its dtype."""
    patterns = w.contiguous().view(WIDTHS[w.dtype][0]).long()
    return torch.where(patterns < 0, -(2 ** (8 * w.dtype.itemsize - 1)) - patterns - 1, patterns)


def share_without_code(w: Tensor, moved: Tensor) -> float:
    """Zeros, which have a code of their own, and three codes that are no distances are left out."""
    reach = 2 ** (WIDTHS[w.dtype][1] - 1) - 3
    far = (place(moved) - place(w)).abs() > reach
    return float((far & (w.contiguous().view(WIDTHS[w.dtype][0]) != 0)).double().mean())


def measure(model: Any, ids: Tensor, rho: float) -> tuple[float, float, float]:
    """Share without a code, the same in the worst tensor, bytes per weight."""
    params = list(model.parameters())
    opt = SAM(params, torch.optim.SGD, rho=rho, lr=0.0, stash="ulp")
    loss_of(model, ids).backward()
    before = [p.detach().clone() for p in params]
    opt.first_step(zero_grad=True)
    shares = [share_without_code(w, p.detach()) for w, p in zip(before, params, strict=True)]
    opt.restore_()
    assert all(
        torch.equal(p.view(WIDTHS[p.dtype][0]), w.view(WIDTHS[p.dtype][0])) for p, w in zip(params, before, strict=True)
    )
    total = sum(p.numel() for p in params)
    overall = sum(share * p.numel() for share, p in zip(shares, params, strict=True)) / total
    return overall, max(shares), opt.stash_bytes / total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of GAP's dialogues, as for the studies")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 8])
    language.model_options(parser)
    options = parser.parse_args(arguments)
    options.device = "cpu"
    loaded = language.load(options)
    dialogues, _ = language.tasks_of(options.data)
    texts = [dialogue_prompt(talk) for task in dialogues.values() for talk in list(task.dialogues)[:16]]
    rows = [ids[:65] for ids in map(loaded.encode, texts) if len(ids) > 64]
    batch = torch.tensor(rows[:: len(rows) // 4][:4])
    print("| weights | steps | rho | no code | worst tensor | bytes per weight |\n| --- | --- | --- | --- | --- | --- |")
    for steps in options.steps:
        model = copy.deepcopy(loaded.model)
        base = torch.optim.AdamW(model.parameters(), lr=2e-5)
        for number in range(steps):
            base.zero_grad()
            loss_of(model, batch[number % 2 :: 2]).backward()
            base.step()
        for dtype in WIDTHS:
            for rho in options.rho:
                overall, worst, size = measure(copy.deepcopy(model).to(dtype), batch, rho)
                name = str(dtype).removeprefix("torch.")
                print(f"| {name} | {steps} | {rho:g} | {overall:.4%} | {worst:.1%} | {size:.4f} |", flush=True)


if __name__ == "__main__":
    main()
