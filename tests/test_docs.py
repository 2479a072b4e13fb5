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
from fastpost.bench import pages

from . import docs

NAMED = r"(?<![\w./-])(?:\.\./)?((?:bench|csrc|docs|examples|fastpost|requirements|tests|triton_kernels)/[\w./-]+\.\w+)"
LINK = re.compile(r"\]\((?![a-z]+:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


@pytest.mark.parametrize("page", [page for page in docs.PAGES if any(b.language == "python" for b in docs.blocks(page))])
def test_python_blocks_run(page: str) -> None:
    docs.run(page)


def test_blocks_that_are_not_run_here_are_few_and_run_elsewhere() -> None:
    left_out = [(page, block) for page in docs.PAGES for block in docs.blocks(page) if block.reason is not None]
    assert len(left_out) <= 16
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


@pytest.mark.parametrize("page", docs.PAGES)
def test_no_sentence_is_long(page: str) -> None:
    assert docs.long_sentences(docs.text(page)) == []


def words(count: int) -> str:
    return " ".join(["word"] * count)


def test_the_finder_of_long_sentences_finds_them() -> None:
    most, long = words(docs.LONGEST_SENTENCE), words(docs.LONGEST_SENTENCE + 1)
    found = [
        f"{long}.",
        f"Short. {long}! Short.",
        long.replace(" ", "\n", 9),  # a paragraph over several lines, without a full stop
        f"- {long}\n- short",
        f"1. {long}",
        f"# {long}",
        f"Short:\n\n{long}.",
        f"[{long}](page.md)",
        f"{most} `some code`.",
        f"{words(20)}, e.g. {words(15)}.",
        f"{words(20)} ... {words(16)}.",
        f"{words(20)} 2.5 {words(15)}.",
        f"{words(20)}; {words(16)}: word.",
    ]
    for content in found:
        assert len(docs.long_sentences(content)) == 1, content


def test_the_finder_of_long_sentences_lets_the_rest_pass() -> None:
    most, half, long = (words(n) for n in (docs.LONGEST_SENTENCE, docs.LONGEST_SENTENCE // 2 + 1, docs.LONGEST_SENTENCE + 1))
    passed = [
        f"{most}. {most}? {most}!",
        f"({half}.) {half}. **{half}.** {half}.",
        f"{half}. lower case may begin a sentence, {half}.",
        f"- {half}\n- {half}",
        f"# {half}\n{half}",
        f"{half}\n\n{half}",
        f"```python\n{long}\n```",
        f"{half}:\n```\ncode\n```\n{half}",
        f"| {long} | cell |\n| --- | --- |",
        f"<!-- {long} -->",
        f"{words(docs.LONGEST_SENTENCE - 1)} `{long}`.",
        f"{words(docs.LONGEST_SENTENCE - 1)} [word]({long.replace(' ', '.')} 'title').",
        f"{most} - = ‖.",
    ]
    for content in passed:
        assert docs.long_sentences(content) == [], content


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
            assert option in ("--help", "--help-all", *options(arguments[0])), f"{page}: {command} has no {option}"
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
        cli.main([command, "--help-all" if command == "train" else "--help"])
    return frozenset(re.findall(r"(?<![\w-])--[\w-]+", printed.getvalue()))


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_tables_of_measurements_are_those_of_the_csv_files(page: str) -> None:
    assert docs.text(page) == pages.rebuilt(docs.text(page)), "run python -m fastpost.bench.pages"


def test_every_table_stands_on_a_page_and_no_cell_is_lost() -> None:
    named = [match["name"] for page in pages.PAGES for match in pages.TABLE.finditer(docs.text(page))]
    assert sorted(named) == sorted(pages.TABLES)
    for rows in (make() for make in pages.TABLES.values()):
        assert all(any(cells[2:]) for cells in rows), "a row that was measured nowhere"


def test_a_missed_goal_is_bold_and_never_rounded_into_a_hit() -> None:
    def cell(ratio: float, limit: str, result: str, goal: str = "a over b") -> str:
        return pages.shown({"ratio": str(ratio), "limit": limit, "result": result, "goal": goal})

    assert cell(1.1, "<= 1.15", "hit") == "1.10x"
    assert cell(1.0302, "<= 1.03", "MISS") == "**1.0302x**"
    assert cell(44.96, ">= 45", "MISS") == "**44.96x**"
    assert cell(290.66, "<= 371.57 MB", "hit") == "291 MB"
    assert cell(0.472, ">= 0.9", "MISS", "bandwidth of a, share of copy") == "**47.2%**"
