"""Methods near R3F on R3F's machinery: called alike, `method(model, **batch) -> R3FOutput`.

| class | what moves | forward + backward passes per step | paper |
| --- | --- | --- | --- |
| RDrop | dropout masks | 2 + 2 | 2106.14448 |
| NEFTune | input embeddings, at random | 1 + 1 | 2310.05914 |
| SymNoise | input embeddings, both ways at random | 2 + 2 | 2605.23171 |
| SMART | input embeddings, uphill on the KL | (2 + steps) + (2 + steps) | 1911.03437 |
| FreeLB | input embeddings, uphill on the loss | adv_steps + adv_steps | ICLR 2020 (1909.11764) |
| HyPe | the input of every layer, at random | 1 + 1 | ACL 2023 (2212.08853) |
| NoisedStudent | input embeddings, at random; clean outputs teach | 2 + 1 | VAT-like (1704.03976) |
"""

from fastpost.r3f.relatives.freelb import FreeLB
from fastpost.r3f.relatives.hype import HyPe
from fastpost.r3f.relatives.neftune import NEFTune
from fastpost.r3f.relatives.rdrop import RDrop
from fastpost.r3f.relatives.smart import SMART
from fastpost.r3f.relatives.student import NoisedStudent
from fastpost.r3f.relatives.symnoise import SymNoise

__all__ = ["SMART", "FreeLB", "HyPe", "NEFTune", "NoisedStudent", "RDrop", "SymNoise"]
