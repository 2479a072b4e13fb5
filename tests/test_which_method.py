"""docs/which-method.md: what its table says to try exists, under these names and with these values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpost
import fastpost.gap
import fastpost.integrations.peft
import fastpost.r3f.relatives
import fastpost.sam
from fastpost.integrations.anchor_options import AnchorOptions

from . import docs, tiny

PAGE = "docs/which-method.md"


def sam(model: Any, **options: Any) -> object:
    """Of 16-bit weights, which alone are rounded, and not of the host's where they are to be moved there."""
    model = model.to("meta" if options.get("stash") == "cpu" else "cpu", torch.bfloat16)
    return fastpost.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, **options)


def bi_lora(model: Any, **options: Any) -> object:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return fastpost.integrations.peft.BiLoRA(adapted, **options)


def distilled(model: Any, **options: Any) -> object:
    return fastpost.linear_distillation_loss(*(torch.ones(2, 2) for _ in range(4)), **options)


def without_model(cls: type) -> Callable[..., object]:
    return lambda model, **options: cls(**options)


# What takes a model and the settings of a row, by what the row links to; rows without a link are SAM's.
TAKES: dict[str, Callable[..., object]] = {
    "": sam,
    "sam.md": sam,
    "sam.md#variants": sam,
    "peft.md": bi_lora,
    "r3f.md": without_model(fastpost.R3F),
    "r3f.md#r4f": lambda model, **options: fastpost.R4F(model.lm_head, **options),
    "anchor.md": without_model(AnchorOptions),
    "anchor.md#a-teacher-that-reads-a-context": without_model(AnchorOptions),
    "distillation.md": distilled,
    "gap.md": without_model(fastpost.GAP),
}
NAMES: dict[str, Any] = {
    **{name: value for home in (fastpost.r3f.relatives, fastpost.integrations.peft, fastpost.gap, fastpost.sam, fastpost)
       for name, value in vars(home).items() if not name.startswith("_")},
    "fastpost": fastpost, "gamma": 0.9, "alpha": 0.1, "SurgeryWindow": fastpost.gap.SurgeryWindow,
}  # fmt: skip


def settings() -> list[tuple[str, str]]:
    """(what the row links to, code) of everything in code in the columns "try" and "first setting"."""
    rows = [line.strip("|").split(" | ") for line in docs.text(PAGE).splitlines() if line.startswith("| ")]
    found = []
    for _, tried, first, *_ in rows[2:]:
        link = re.search(r"\]\(([^)]*)\)", tried)
        found += [("" if link is None else link[1], code) for code in re.findall("`([^`]*)`", f"{tried} {first}")]
    return found


@pytest.mark.parametrize(("link", "code"), settings())
def test_what_the_table_says_to_try_exists(link: str, code: str) -> None:
    model = tiny.build("llama")
    if re.match(r"\w+=", code):
        options = eval(f"dict({code})", {**NAMES, "model": model})
        for name, value in options.items():  # values are looked at
            if isinstance(value, str):
                with pytest.raises(ValueError, match=f"{value}x"):
                    TAKES[link](model, **{**options, name: f"{value}x"})
        assert TAKES[link](model, **options) is not None
    elif code.startswith('"'):
        assert fastpost.gap.SurgeryWindow(model, code.strip('"')) is not None
    elif code not in inspect.signature(fastpost.SAM).parameters:
        assert eval(code, NAMES) is not None


def test_the_table_is_read_whole() -> None:
    found = settings()
    assert len(found) >= 38
    assert ("distillation.md", 'divergence="forward_kl"') in found
