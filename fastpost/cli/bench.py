"""`fastpost bench`: the operations beside their floors and beside the published formulas, with hit or miss."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benches named (all by default). Returns 1 with --strict when a goal was missed, else 0."""
    parser = argparse.ArgumentParser(prog="fastpost bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases to run; --list shows them")
    parser.add_argument("--list", action="store_true", help="print the names of all cases and stop")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; each runs every contender once (default 9)")
    parser.add_argument("--output", type=Path, help="write a CSV here, after every case")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a goal is missed")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    from fastpost.bench import run

    try:
        cases = run.load(options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(cases))
        return 0
    reached = run.run(options.names, options.repeats, options.output)
    return 1 if options.strict and not reached else 0
