"""docs/sam.md: what its code leaves behind; every test that it names exists."""

from __future__ import annotations

import re

from . import docs

TEXT = docs.text("docs/sam.md")


def test_python_blocks_leave_nothing_perturbed() -> None:
    assert not docs.run("docs/sam.md")["opt"].is_perturbed


def test_every_test_that_proves_a_property_exists() -> None:
    named = re.findall(r"\[(\w+)\]\(\.\./(tests/test_\w+\.py)\)", TEXT)
    assert len(named) > 30
    for name, path in named:
        assert f"def test_{name}(" in docs.text(path), (name, path)


def test_every_variant_has_a_line() -> None:
    from fastpost.sam import variants

    table = TEXT[TEXT.index("## Variants") : TEXT.index("## What 16 bits")]
    for name, value in vars(variants).items():
        if isinstance(value, type) and issubclass(value, variants.Variant) and value is not variants.Variant:
            assert name in table


def test_what_a_step_costs_is_what_was_measured() -> None:
    ms = docs.medians("cpu-avx512-kept.csv", "a step of GPT-2")
    assert f"| SAM | 2 | {ms['SAM'] / ms['AdamW']:.2f} |" in TEXT
    assert f"| SAM, `ascent_fraction=0.25` | 1.25 | {ms['SAM, ascent on a quarter'] / ms['AdamW']:.2f} |" in TEXT


def test_the_page_on_precision_has_the_same_rows() -> None:
    rows = re.findall(r"^\| (?:bfloat16|float16|float32) weights, [^|]*\| (\d.*)$", docs.text("docs/precision.md"), re.M)
    assert len(rows) == 6
    assert all(f"| {row}" in TEXT for row in rows)
