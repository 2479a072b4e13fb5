"""GAP with selection: climbs on one text at a time, keeps the state that scores best, and reports it on other data.

    python examples/gap_select.py MODEL HELD_OUT.txt TEXT.txt [TEXT.txt ...]

HELD_OUT.txt is cut into blocks: every other one chooses the state, those between report it. Scored on the blocks that chose,
a text can only gain, whatever it is.
It needs: pip install ".[transformers]"
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpost

BLOCK, STEPS, LR = 128, 15, 5e-5

name, held_out, *texts = sys.argv[1:] if len(sys.argv) > 3 else sys.exit(__doc__)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()


def read(file):
    ids = tokenizer(Path(file).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, device=device)


block = min(BLOCK, model.config.max_position_embeddings)
ids = read(held_out)
blocks = ids[: len(ids) // block * block].view(-1, block)
if len(blocks) < 2:
    sys.exit(f"{held_out} holds {len(ids)} tokens; two blocks of {block} are needed")


def score_on(rows):  # minus nats per token: higher is better
    return lambda model: -sum(model(input_ids=r[None], labels=r[None]).loss.item() for r in rows) / len(rows)


gap = fastpost.GAP(n_steps=STEPS, lr=LR, max_tokens=min(512, model.config.max_position_embeddings))
for file in texts:
    result = gap(model, read(file)[None], evaluate=score_on(blocks[0::2]), test=score_on(blocks[1::2]))
    print(f"{file}: step {result.best_step} of {len(result.scores) - 1} kept ({result.stop_reason})")
    before, after = (-score for score in result.test_scores)
    print(f"  nats per token on other data: {before:.4f} before, {after:.4f} after")
    result.rollback()  # the next text begins from the same weights; leave this out to keep the state
