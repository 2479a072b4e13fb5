"""What fastpost and its peers can do, probed: nothing in the table is typed by hand.

    python -m fastpost.bench.features            # some minutes; then: python -m fastpost.bench.pages

Makes a virtual environment beside this one, which shares its torch and transformers, installs each peer into it by pip, and
asks each in a process of its own. A probe runs what it asks about and compares the result with float64, or says that it has
only looked for a name. bench/data/features.csv holds every answer with its reason; docs/features.md shows them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import signal
import site
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

DATA = Path(__file__).parent / "data" / "features.csv"
COLUMNS = ("family", "feature", "library", "subject", "version", "result", "detail", "date", "python", "torch")
SECONDS = 900  # for one library, installation aside
INSTALL_SECONDS = 300


class Finding(NamedTuple):
    """The answer to one question about one library.

    Attributes:
        family: the table that it stands in.
        feature: what was asked.
        result: "yes", "no", "error", "n/a", a number or names.
        detail: what was found, or why.
        subject: which of the library's functions was asked, where there are several.
    """

    family: str
    feature: str
    result: str
    detail: str = ""
    subject: str = ""


# What pip is asked for, without dependencies; nothing where the calling environment has it, as it has torch.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "fastpost": (),
    "pytorch_optimizer": ("pytorch_optimizer==4.1.0",),
    "heavyball": ("heavyball==3.2.1",),
    "torchzero": ("torchzero==0.4.4",),
    "liger_kernel": ("liger-kernel",),
    "trl": ("trl",),
    "transformers": (),
    "torch": (),
    "smart_pytorch": ("smart-pytorch",),
    "fairseq": ("fairseq",),
    "open_unlearning": ("open-unlearning",),
}
DISTRIBUTIONS = {"liger_kernel": "liger-kernel", "smart_pytorch": "smart-pytorch", "open_unlearning": "open-unlearning"}


def probe(library: str) -> list[Finding]:
    """Every family's answers about one library, in this process."""
    from fastpost.bench import features_distillation, features_names, features_sam

    return [
        *features_sam.findings(library),
        *features_distillation.findings(library),
        *features_names.findings(library),
    ]


# -- environments ---------------------------------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """A virtual environment with pip that also sees what the calling one has installed; its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (target,) = (folder / "lib").glob("python*/site-packages")
    shared = [p for p in dict.fromkeys([*sys.path, *site.getsitepackages()]) if p.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in shared]
    (target / "shared.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return python


def install(python: Path, wanted: Sequence[str]) -> str:
    """Why it cannot be installed, in pip's words; "" where it was."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *wanted]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **quiet) as pip:
        try:
            _, told = pip.communicate(timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(pip.pid, signal.SIGKILL)  # compilers that it has started, too
            return f"pip did not end within {INSTALL_SECONDS} seconds"
    if pip.returncode == 0:
        return ""
    errors = [line for line in told.splitlines() if "error" in line.lower()] or ["pip failed"]
    return f"pip: {without_places(errors[-1])}"


def without_places(text: str) -> str:
    """One line without addresses and paths, which are this machine's affair."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"\s+", " ", re.sub(r"\w+://\S+|(?<!\w)/[\w.+-]+(?:/[\w.+-]+)+", "...", first))[:200]


def asked(python: Path, library: str) -> tuple[list[Finding], str]:
    """What a library's own process answers, and its version."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if library == "liger_kernel" and not torch.cuda.is_available():
        given["TRITON_INTERPRET"] = "1"  # its kernels want a GPU
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [str(python), "-m", "fastpost.bench.features", "--probe", library, "--answer", answer.name]
        try:
            done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return [Finding("", "", "error", f"no answer within {SECONDS} seconds")], ""
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return [Finding("", "", "error", without_places(last))], ""
        found = json.loads(Path(answer.name).read_text(encoding="utf-8"))
    return [Finding(*row) for row in found["findings"]], found["version"]


def version_of(library: str) -> str:
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(library, library))
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastpost.bench.features", description=__doc__.partition("\n")[0])
    parser.add_argument("libraries", nargs="*", help="of these alone; the rows of others stay in the CSV as they are")
    parser.add_argument("--output", type=Path, default=DATA)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.probe:
        found = {"findings": probe(options.probe), "version": version_of(options.probe)}
        options.answer.write_text(json.dumps(found), encoding="utf-8")
        return 0
    chosen = options.libraries or list(LIBRARIES)
    if strange := sorted(set(chosen) - set(LIBRARIES)):
        parser.error(f"unknown {', '.join(strange)}; there are {', '.join(LIBRARIES)}")
    rows: list[dict[str, str]] = []
    if options.libraries and options.output.exists():
        rows = [row for row in read(options.output) if row["library"] not in chosen]
    common = {
        "date": datetime.date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder) / "peers")
        for library in chosen:
            why = install(python, LIBRARIES[library]) if LIBRARIES[library] else ""
            found, version = ([Finding("", "", "not installed", why)], "") if why else asked(python, library)
            print(f"{library} {version}: {why or f'{len(found)} answers'}", flush=True)
            rows += [{**finding._asdict(), "library": library, "version": version, **common} for finding in found]
    write(options.output, rows)
    return 0


# -- tables ---------------------------------------------------------------------------------------------------------------


def read(source: Path = DATA) -> list[dict[str, str]]:
    with source.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(target: Path, rows: list[dict[str, str]]) -> None:
    """In the libraries' order, and without what is this machine's alone."""
    rows = sorted(rows, key=lambda row: list(LIBRARIES).index(row["library"]))
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "detail": without_places(row["detail"])} for row in rows)


def table(family: str) -> list[tuple[str, ...]]:
    """A family's features by row and libraries by column. What could not be installed or asked is in `absent`."""
    rows = [row for row in read() if row["family"] == family]
    asked = dict.fromkeys((row["library"], row["version"], row["subject"]) for row in rows)
    head = ("feature", *(" ".join(filter(None, (library, version, subject))) for library, version, subject in asked))
    answers = {(row["feature"], row["library"], row["version"], row["subject"]): row["result"] for row in rows}
    features = dict.fromkeys(row["feature"] for row in rows)
    return [head, *((name, *(answers.get((name, *who), "") for who in asked)) for name in features)]


def absent() -> list[tuple[str, ...]]:
    """Peers that could not be installed or did not answer, with the reason."""
    rows = [row for row in read() if not row["family"]]
    return [("library", "what came", "reason"), *((row["library"], row["result"], row["detail"]) for row in rows)]


def provenance() -> list[tuple[str, ...]]:
    """When the libraries were asked, and beside which versions."""
    rows = {row["library"]: row for row in read()}
    head = ("library", "version", "asked on", "Python", "torch")
    cells = ("version", "date", "python", "torch")
    return [head, *((name, *(row[cell] or "none" for cell in cells)) for name, row in rows.items())]


TABLES = {
    "features-sam": lambda: table("SAM"),
    "features-distillation": lambda: table("distillation"),
    "features-regularisers": lambda: table("regularisers"),
    "features-unlearning": lambda: table("unlearning"),
    "features-surgery": lambda: table("gradient surgery"),
    "features-absent": absent,
    "features-provenance": provenance,
}


if __name__ == "__main__":
    sys.exit(main())
