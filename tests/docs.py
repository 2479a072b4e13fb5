"""The pages of this project: README.md and everything under docs, their Python blocks run, their shell blocks read.

The blocks of a page run one after the other in one namespace, in an empty folder. Tracebacks show lines of the page. A block
that cannot run in one process says so in a comment right before it, `<!-- not run: the reason -->`.

`python -m tests.docs docs/tutorial.md` runs all blocks of a page, these too, and puts what they print into the `text` blocks
that follow them.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]*) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)

LONGEST_SENTENCE = 35  # words
SENTENCE_END = re.compile(r"(?<![.][.])(?<!\b(?:cf|eq|vs))(?<!\b(?:e\.g|i\.e))[.!?][)\"*_]*\s+")


class Block(NamedTuple):
    """A fenced block: its language ("" where none is named), text, first line in the page, and why it is not run."""

    language: str
    code: str
    line: int
    reason: str | None


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    content = text(page)
    return [
        Block(match["language"], match["code"], content.count("\n", 0, match.start("code")) + 1, match["reason"])
        for match in FENCE.finditer(content)
    ]


def prose(page: str) -> str:
    """The page without its blocks."""
    return FENCE.sub("", text(page))


def sentences(content: str) -> list[str]:
    """The sentences of a page, each in one line, with one word for each span of code.

    Fenced blocks, comments, tables and the targets of links hold none. Headings and items of lists end where their lines do.
    """
    content = FENCE.sub("\n\n", content)
    content = re.sub(r"<!--.*?-->", "", content, flags=re.S)
    content = re.sub(r"^\|.*$", "\n", content, flags=re.M)
    content = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", content, flags=re.S)
    content = re.sub(r"\]\([^)]*\)", "]", content)
    content = re.sub(r"^(#.*)$", r"\n\1\n", content, flags=re.M)
    content = re.sub(r"^\s*(?:[-*+]|\d+\.)\s", "\n", content, flags=re.M)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", content))
    return [sentence for paragraph in paragraphs for sentence in SENTENCE_END.split(paragraph) if sentence]


def long_sentences(content: str) -> list[str]:
    """The sentences of more than LONGEST_SENTENCE words. Words stand between spaces and have a letter or a digit."""
    return [s for s in sentences(content) if sum(bool(re.search(r"\w", word)) for word in s.split()) > LONGEST_SENTENCE]


def medians(csv_name: str, case: str) -> dict[str, float]:
    """Milliseconds of each contender of a case in bench/data."""
    with (ROOT / "bench" / "data" / csv_name).open() as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == case and row["median_ms"]]
    return {row["contender"]: float(row["median_ms"]) for row in rows}


def ratios(csv_name: str, case: str) -> dict[str, float]:
    """What each goal of a case in bench/data measured."""
    return {name: float(row["ratio"]) for name, row in goals(csv_name, case).items()}


def goals(csv_name: str, case: str) -> dict[str, dict[str, str]]:
    """The rows of a case's goals in one of bench/data's files."""
    with (ROOT / "bench" / "data" / csv_name).open() as file:
        return {row["goal"]: row for row in csv.DictReader(file) if row["goal"] and row["case"] == case}


@functools.cache
def run(page: str) -> dict[str, Any]:
    """Runs the page's Python blocks, once per process; what they leave behind."""
    module = ModuleType("page_" + re.sub(r"\W", "_", page))
    sys.modules[module.__name__] = module  # dataclasses and pickles of classes look there
    torch.manual_seed(0)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks(page):
                if block.language == "python" and block.reason is None:
                    lines = "\n" * (block.line - 1) + block.code
                    exec(compile(lines, str(ROOT / page), "exec"), module.__dict__)
        finally:
            os.chdir(here)
    return module.__dict__


class _Shown(io.StringIO):
    """Keeps what is printed, and shows it."""

    def write(self, content: str) -> int:
        print(content, end="", file=sys.stderr, flush=True)
        return super().write(content)


def quote(page: str) -> None:
    """Runs all Python blocks of a page in one namespace; the text blocks right after them become what they print."""
    lines = text(page).splitlines(keepends=True)
    found, namespace, written = blocks(page), {"__name__": "page"}, 0
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        with contextlib.redirect_stdout(_Shown()) as printed:
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
        if after is not None and after.language == "text":
            old = after.code.count("\n")
            new = printed.getvalue().splitlines(keepends=True)
            start = after.line - 1 + written
            lines[start : start + old] = new
            written += len(new) - old
    (ROOT / page).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    for page in sys.argv[1:]:
        quote(page)
