"""README.md and docs: every Python block runs; commands, options, files and links that the pages name exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from functools import cache

import pytest

from fastpost import cli

from . import docs

NAMED = r"(?<![\w./-])(?:\.\./)?((?:bench|csrc|docs|examples|fastpost|requirements|tests|triton_kernels)/[\w./-]+\.\w+)"
LINK = re.compile(r"\]\((?![a-z]+:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


@pytest.mark.parametrize("page", [page for page in docs.PAGES if any(b.language == "python" for b in docs.blocks(page))])
def test_python_blocks_run(page: str) -> None:
    docs.run(page)


def test_blocks_that_are_not_run_here_are_few_and_run_elsewhere() -> None:
    left_out = [(page, block) for page in docs.PAGES for block in docs.blocks(page) if block.reason is not None]
    assert len(left_out) <= 8
    for page, block in left_out:
        assert block.reason is not None
        assert block.language == "python", (page, block.line)
        test = re.search(r"tests/test_\w+\.py", block.reason)
        assert test, f"{page}, line {block.line}: name the test that runs this block"
        assert page.rpartition("/")[2] in docs.text(test[0]), f"{test[0]} does not read {page}"


def test_every_fence_is_one_that_is_read() -> None:
    """Indented or unclosed fences would be shown by the site and never run."""
    for page in docs.PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", docs.text(page), re.M)
        assert len(fences) == 2 * len(docs.blocks(page)), page


def test_the_readme_has_a_block_for_each_method() -> None:
    joined = "\n".join(block.code for block in docs.blocks("README.md") if block.language == "python")
    assert all(name in joined for name in ("fastpost.SAM(", "fastpost.R3F(", "fastpost.R4F(", "fastpost.GAP("))


@pytest.mark.parametrize("page", docs.PAGES)
def test_commands_exist(page: str) -> None:
    for command in commands(page):
        check_command(page, command)


@pytest.mark.parametrize("page", docs.PAGES)
def test_files_exist(page: str) -> None:
    for path in re.findall(NAMED, docs.text(page)):
        assert (docs.ROOT / path).exists(), path


@pytest.mark.parametrize("page", [*docs.PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere_in_the_repository(page: str) -> None:
    """The built site's links are checked by test_docs_site.py, these as they are in the files."""
    for match in LINK.finditer(docs.prose(page)):
        target = (docs.ROOT / page).parent / match["path"] if match["path"] else docs.ROOT / page
        if target.name in ("changelog.md", "contributing.md"):  # made by docs/_site/hooks.py
            target = docs.ROOT / target.name.replace(".md", "").upper()
            target = target.with_suffix(".md")
        assert target.exists(), match[0]
        if match["anchor"] and target.suffix == ".md":
            content = docs.prose(str(target.resolve().relative_to(docs.ROOT)))
            headings = re.findall(r"^#+ (.+)$", content, re.M)
            assert match["anchor"] in {slug(heading) for heading in headings}, match[0]


def slug(heading: str) -> str:
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def commands(page: str) -> list[str]:
    """Lines of shell blocks, and code in the text, that call what this project provides."""
    lines = [
        line for b in docs.blocks(page) if b.language in ("", "bash") for line in b.code.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", docs.prose(page))
    return [
        line.partition("#")[0].strip() for line in lines if re.match(r"(?:fastpost|python -m|make|pip install) \S", line)
    ]


def check_command(page: str, command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "python":
        module = arguments[1]
        assert importlib.util.find_spec(module), f"{page}: {command}"
        program, arguments = (module, arguments[2:]) if module == "fastpost" else (module, [])
    if program == "fastpost" and arguments[0] not in ("--version", "COMMAND"):
        assert arguments[0] in cli.COMMANDS, f"{page}: {command}"
        for option in re.findall(r"(?<!\S)--[\w-]+", command):
            assert option in ("--help", *options(arguments[0])), f"{page}: {command} has no {option}"
    elif program == "make":
        for target in (a for a in arguments if "=" not in a):
            assert re.search(rf"^{target}:", docs.text("Makefile"), re.M), f"{page}: {command}"
    elif program == "pip":
        table = docs.text("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        for extras in re.findall(r"(?:fastpost|\.)\[([\w,]+)\]", command):
            assert set(extras.split(",")) <= set(re.findall(r"^(\w+) = ", table, re.M)), f"{page}: {command}"


@cache
def options(command: str) -> frozenset[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return frozenset(re.findall(r"(?<![\w-])--[\w-]+", printed.getvalue()))


KL, STEP, PERTURB = "symmetric_kl forward + backward, streams 1 apart", "a step of GPT-2", "SAM norm + perturb + restore"
LINEAR, WEIGHTS = "linear_r3f_loss, forward + backward", "scaling a delta in place"
UPHILL = "fastpost.GAP faster than loss * -1, Adam, deep-copied state"
# The rows of README's table of numbers, in order: the case in bench/data and its goals.
MEASURED = [
    (KL, ["fastpost, in place faster than fairseq formula"]),
    (KL, ["fastpost, fresh gradients faster than fairseq formula"]),
    (KL, ["fastpost, in place over copy of both inputs"]),
    (LINEAR, ["linear_r3f_loss over its three products alone"]),
    (LINEAR, ["linear_r3f_loss faster than fairseq formula on whole logits"]),
    ("linear_r3f_loss under 128 MB, forward + backward", ["peak memory of 4,096 rows"]),
    ("add_noise", [f"fastpost {kind} faster than torch.distributions {kind} + add" for kind in ("uniform", "normal")]),
    ("a step of R3F on an encoder", ["R3F, two_pass over plain fine-tuning"]),
    (PERTURB, ["fastpost, list over copy of the parameters"]),
    (PERTURB, ["fastpost, list over torch._foreach_ recipe"]),
    (PERTURB, ["fastpost, list over fastpost, flattened"]),
    (PERTURB, ["fastpost, list over popular wrapper's loop"]),
    ("SAM perturb + restore, small tensors", ["fastpost over popular wrapper's loop"]),
    (STEP, ["SAM over AdamW after two passes"]),
    (STEP, ["SAM, ascent on a quarter over AdamW"]),
    ("SAM's restore + AdamW", ["fused_restore over restore, then torch's fused AdamW"]),
    ("a step in the Trainer", ["SAMTrainer over Trainer, two passes"]),
    ("15 steps uphill on one text of 192 tokens, and back", [UPHILL]),
    ("15 steps uphill on one text of 64 tokens, and back", [UPHILL]),
    ("going back to the untouched weights", ["GapResult.rollback over copy"]),
    (WEIGHTS, [f"Delta.{name}_ over torch.add, two reads and one write" for name in ("scale", "lines")]),
]


def test_the_readmes_numbers_were_measured() -> None:
    """Each ratio in the table of numbers is its case's in its column's CSV, with its goal; bold where that is missed."""
    number = r"([<>]=) ([\d.]+)(?:x| MB)"
    table = re.findall(rf"^\|[^|]*\|[^|]*\| (?:{number})? ?\| (.*(?:x|MB).*) \|(.*)\|$", docs.text("README.md"), re.M)
    assert len(table) == len(MEASURED)
    for (sign, limit, *cells), (case, goals) in zip(table, MEASURED, strict=True):
        for cell, heap in zip(cells, ("", "-kept"), strict=True):
            shown = re.findall(r"(\*\*)?([\d.]+)(?:x| MB)", cell)
            assert len(shown) == len(goals) or (heap and not cell.strip()), cell
            for (bold, ratio), goal in zip(shown, goals, strict=False):
                found = docs.goals(f"cpu-avx512{heap}.csv", case)[goal]
                assert ratio == f"{float(found['ratio']):.{len(ratio.partition('.')[2])}f}", (case, goal, heap)
                if sign:
                    assert found["limit"].split()[0] == sign
                    digits = len(limit.partition(".")[2])
                    assert limit == f"{float(found['limit'].split()[1]):.{digits}f}", (case, goal)
                    missed = float(ratio) < float(limit) if sign == ">=" else float(ratio) > float(limit)
                    assert missed == bool(bold), (cell, heap)
