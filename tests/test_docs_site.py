"""The documentation as a site: it builds without a warning, holds every public name, and fetches nothing."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import fastpost

from . import docs

WHOLE = (
    "fastpost", "fastpost.sam", "fastpost.r3f", "fastpost.r3f.relatives", "fastpost.gap", "fastpost.anchor",
    "fastpost.conformance",
)  # fmt: skip
MODULES = ("fastpost.gap.losses", "fastpost.gap.zero_shot", "fastpost.gap.tasks", "fastpost.gap.harness")
FETCHING = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href"), ("source", "src")}


class Names(HTMLParser):
    """What a page can be entered by, what it links to, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name"):
                self.ids.add(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")
            if (tag, name) in FETCHING:
                self.fetched.append(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Names]:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme
    built = subprocess.run(command, cwd=docs.ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return {path: Names(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_in_the_site(site: dict[Path, Names]) -> None:
    root = next(path for path in site if path.name == "index.html").parent
    for page in docs.PAGES:
        if page.startswith("docs/"):
            assert root / page.removeprefix("docs/").replace(".md", ".html") in site, page


def test_every_link_leads_somewhere(site: dict[Path, Names]) -> None:
    for path, page in site.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            place, anchor = urldefrag(unquote(link))
            target = (path.parent / place).resolve() if place else path
            assert target.is_file(), (path.name, link)
            if anchor and target in site:
                assert anchor in site[target].ids, (path.name, link)


def test_nothing_is_fetched_from_elsewhere(site: dict[Path, Names]) -> None:
    root = next(path for path in site if path.name == "index.html").parent
    for path, page in site.items():
        assert not [link for link in page.fetched if re.match(r"(?:\w+:)?//", link)], path.name
    for sheet in root.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_reference_holds_every_public_name(site: dict[Path, Names]) -> None:
    held = set().union(*(page.ids for path, page in site.items() if path.parent.name == "api"))
    values = public_values()
    assert len(values) > len(fastpost.__all__)
    named = {id(value) for name, value in values.items() if {name, defined_as(value)} & held}  # one may have several names
    assert not [name for name, value in values.items() if id(value) not in named]


def defined_as(value: object) -> str:
    return f"{value.__module__}.{getattr(value, '__qualname__', '')}"


def public_values() -> dict[str, object]:
    """What every public name stands for, by its full name."""
    found: dict[str, object] = {}
    integrations = (docs.ROOT / "fastpost" / "integrations").glob("[a-z]*.py")
    faces = [
        f"fastpost.integrations.{path.stem}" for path in integrations if "\n__all__ = " in path.read_text(encoding="utf-8")
    ]
    for module in (*WHOLE, *MODULES, *faces):
        home = importlib.import_module(module)
        own = [n for n, v in vars(home).items() if not n.startswith("_") and getattr(v, "__module__", "") == module]
        for name in getattr(home, "__all__", own):
            if name == "backends":  # the function, which the package of that name stands for when called
                found["fastpost.dispatch.backends"] = importlib.import_module("fastpost.dispatch").backends
            elif name != "__version__":
                found[f"{module}.{name}"] = getattr(home, name)
    return found
