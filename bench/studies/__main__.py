"""`python -m fastpost.bench.studies NAME`: runs a study, or what is missing of it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from fastpost.errors import nearest

# Programs with options, tables and pictures of their own.
PROGRAMS = {
    "demo": "what `make demo` shows: costs, what 16 bits do, fine-tuning, GAP",
    "compare": "every method beside the published formulas",
    "probe": "a chain of tasks, and linear probes after each",
    "gap-sweep": "GAP on many texts",
}
# Studies whose rows the pages are made of.
NAMES = ("gap", "glue", "precision", "lm", "collapse", "forgetting")


def main(argv: list[str] | None = None) -> int:
    """Runs the study named; 0, 2 for what cannot be started, 130 when interrupted. What was finished is in the CSV file.

    With `--jobs` above 1 this process only starts others and waits: it reads no data and touches no GPU.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ""
    if name in PROGRAMS:
        return _program(name, argv[1:])
    if name not in NAMES:
        valid = ", ".join((*NAMES, *PROGRAMS))
        if name in ("-h", "--help"):
            print(
                "usage: python -m fastpost.bench.studies NAME [options]\n\n"
                f"NAME is one of {valid}; NAME --help shows its options."
            )
            return 0
        told = f"no study is called {name!r}.{nearest(name, (*NAMES, *PROGRAMS))}" if name else "a study has to be named."
        print(f"studies: error: {told} There are {valid}", file=sys.stderr)
        return 2
    from fastpost.bench.studies import jobs
    from fastpost.bench.studies import study as shared
    from fastpost.cli.models import quietly

    study = importlib.import_module(f"fastpost.bench.studies.{name}").STUDY
    parser = argparse.ArgumentParser(prog=f"python -m fastpost.bench.studies {name}", description=study.about)
    parser.add_argument("--data", help="folder with glue/ and gap/ in it; docs/studies.md says where their files come from")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--output", type=Path, default=Path(f"studies-{name}.csv"), help="the table; the same command goes on from it"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1, which others can repeat)")
    parser.add_argument(
        "--jobs", type=int, default=1,
        help="processes that share the work (default 1), each with --threads threads; the times that they record are no "
        "measure of a step, and tables of times leave their rows out",
    )  # fmt: skip
    parser.add_argument("--started-by", type=int, help=argparse.SUPPRESS)  # the process that waits, in those it started
    study.options(parser)
    options = parser.parse_args(argv[1:])
    try:
        if options.jobs > 1 and options.started_by is None:
            again = [sys.executable, "-m", "fastpost.bench.studies", *argv, f"--started-by={os.getpid()}"]
            return jobs.run(again, options.jobs)
        if options.started_by is not None:
            jobs.end_with(options.started_by)
        with quietly():
            made = shared.run(study, options)
    except (ValueError, OSError) as error:
        print(f"studies {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if options.started_by is None:
            print(f"interrupted; the same command goes on from {options.output}", file=sys.stderr)
        return 130
    print(f"{made} row(s) made; {options.output}")
    return 0


def _program(name: str, argv: list[str]) -> int:
    from fastpost.cli import explain_missing

    try:
        from fastpost.cli.models import quietly

        with quietly():
            return int(importlib.import_module(f"fastpost.bench.studies.{name.replace('-', '_')}").main(argv))
    except ModuleNotFoundError as error:
        return explain_missing(f"studies {name}", error)


if __name__ == "__main__":
    sys.exit(main())
