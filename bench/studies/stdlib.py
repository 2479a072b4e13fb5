"""Real text that every machine with Python has: the standard library's sources and their docstrings.

Files are parsed, never imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# What each area of the library is made of: top-level modules and packages; those a Python version lacks are passed over.
AREAS = {
    "concurrency": "asyncio concurrent multiprocessing threading _threading_local queue sched subprocess selectors "
    "contextlib contextvars asynchat asyncore signal",
    "email": "email mailbox mimetypes quopri base64 mailcap smtplib imaplib poplib binhex uu",
    "files": "pathlib shutil tempfile zipfile tarfile gzip bz2 lzma glob fnmatch os posixpath ntpath genericpath filecmp "
    "fileinput _pyio stat _compression zipapp dbm shelve",
    "graphics": "tkinter turtle turtledemo idlelib curses",
    "introspection": "ast inspect dis symtable importlib lib2to3 pydoc typing types tokenize code codeop pkgutil compileall "
    "modulefinder zipimport pyclbr pickletools opcode runpy _ast_unparse annotationlib",
    "internet": "http urllib ftplib nntplib socket socketserver ssl xmlrpc telnetlib ipaddress wsgiref webbrowser cgi cgitb "
    "netrc uuid",
    "numbers and dates": "statistics fractions random _pydecimal numbers heapq bisect colorsys datetime _pydatetime "
    "calendar zoneinfo _strptime _pylong",
    "testing": "unittest doctest pdb bdb trace traceback timeit cProfile profile pstats tracemalloc warnings cmd _pyrepl",
}
_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "encodings",
    "pydoc_data",
}


def root() -> Path:
    """The folder of the standard library's Python sources."""
    return Path(sysconfig.get_path("stdlib"))


def sources(folder: Path | None = None) -> Iterator[Path]:
    """The library's Python files in a fixed order, without tests, generated tables and installed packages."""
    folder = folder or root()
    for path in sorted(folder.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(folder).parts[:-1]):
            yield path


@functools.cache
def docstrings(folder: Path | None = None) -> tuple[tuple[str, str, str], ...]:
    """(area, file, text) for each docstring worth classifying, in a fixed order; a text occurs once in all.

    The text is the docstring's prose without examples, and without the names of its own module and package, which would
    give the answer away.
    """
    return tuple(_docstrings(folder or root()))


def _docstrings(folder: Path) -> Iterator[tuple[str, str, str]]:
    area_of = {module: area for area, modules in AREAS.items() for module in modules.split()}
    seen: set[str] = set()
    for path in sources(folder):
        parts = path.relative_to(folder).with_suffix("").parts
        area = area_of.get(parts[0])
        if area is None:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates of 2to3 and the like are no modules
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = _prose(ast.get_docstring(node) or "", parts)
                key = re.sub(r"\W+", "", text.lower())[:60]
                if len(text.split()) >= 8 and key not in seen:
                    seen.add(key)
                    yield area, "/".join(parts), text


def _prose(docstring: str, names: tuple[str, ...]) -> str:
    lines = docstring.split(">>>")[0].split("\n")
    text = " ".join(" ".join(lines).split())[:400]
    for name in names:
        bare = re.escape(name.strip("_"))
        if bare:
            text = re.sub(rf"\b_*{bare}_*\b\.?", "", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def order(*words: str) -> str:
    """A sorting key that looks random and is the same everywhere."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
