"""SAM in a plain PyTorch loop: fine-tunes a causal language model on a text file.

    python examples/sam_loop.py MODEL TEXT.txt [OUTPUT]

MODEL is a folder or a hub name. The lines that SAM changes in a plain loop have a comment.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpost

BLOCK, BATCH, STEPS, LR, RHO = 128, 8, 100, 2e-5, 0.05

name, file, *output = sys.argv[1:] if len(sys.argv) > 2 else sys.exit(__doc__)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).to(device).train()
block = min(BLOCK, model.config.max_position_embeddings)
ids = torch.tensor(tokenizer(Path(file).read_text(encoding="utf-8"), verbose=False)["input_ids"])
rows = ids[: len(ids) // block * block].view(-1, block).to(device)
if len(rows) < 2:
    sys.exit(f"{file} holds {len(ids)} tokens; two blocks of {block} are needed")
held_out, rows = rows[-1:], rows[:-1]

optimizer = fastpost.SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=LR)  # instead of AdamW(...)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)


def loss_of(batch):
    return model(input_ids=batch, labels=batch).loss


def evaluate():
    model.eval()
    with torch.no_grad():
        loss = loss_of(held_out).item()
    model.train()
    return loss


before = evaluate()
for step in range(1, STEPS + 1):
    batch = rows[torch.randint(len(rows), (BATCH,))]
    loss = loss_of(batch)
    loss.backward()
    optimizer.first_step(zero_grad=True)  # to w + e, uphill
    loss_of(batch).backward()  # the gradient there
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.second_step(zero_grad=True)  # back to w, and AdamW's step
    schedule.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.4f}; {optimizer.report.line()}")
print(f"held-out loss: {before:.4f} before, {evaluate():.4f} after")
if output:
    model.save_pretrained(output[0])
