"""docs/r3f.md: what its code leaves behind; what it names exists."""

from __future__ import annotations

import csv

from fastpost.r3f import relatives

from . import docs

TEXT = docs.text("docs/r3f.md")


def test_python_blocks_make_gradients() -> None:
    namespace = docs.run("docs/r3f.md")
    assert namespace["weight"].grad is not None
    assert namespace["model"].lm_head.weight.grad is not None


def test_every_relative_has_a_line() -> None:
    table = TEXT[TEXT.index("## Relatives") :]
    assert {name for name in relatives.__all__ if f"| `{name}` |" in table} == set(relatives.__all__)


def test_numbers_in_the_text_are_those_of_the_csv() -> None:
    """Released R3F with dropout does not depend on eps; without, it falls as eps squared."""
    with (docs.ROOT / "bench" / "data" / "r3f-what-moves.csv").open() as file:
        rows = list(csv.DictReader(file))

    def kl(mode: str, eps: float) -> float:
        return next(float(r["symm_kl"]) for r in rows if mode in r["mode"] and abs(float(r["eps"]) / eps - 1) < 1e-6)

    assert abs(kl("independent", 1e-5) / kl("independent", 1e-7) - 1) < 1e-4
    assert abs(kl("independent", 1e-2) / kl("independent", 1e-7) - 1) < 0.05
    for mode in ("shared", "off"):
        assert 50 < kl(mode, 1e-3) / kl(mode, 1e-4) < 200
        assert kl(mode, 1e-5) < 1e-9


def test_what_a_step_costs_is_what_was_measured() -> None:
    runs = [docs.ratios(f"cpu-avx512{heap}.csv", "a step of R3F on an encoder") for heap in ("", "-kept")]

    def cost(goal: str) -> str:
        low, high = sorted(f"{run[goal]:.2f}" for run in runs)
        return low if low == high else f"{low} to {high}"

    assert f"| R3F | 2 | {cost('R3F, two_pass over plain fine-tuning')} |" in TEXT
    assert (
        f'| R3F, `forward="double_batch"` | 1 over the batch twice | {cost("R3F, double_batch over plain fine-tuning")} |'
        in TEXT
    )
    assert f"R3F takes {cost('R3F, two_pass over two plain passes, one backward')} of their time" in TEXT
