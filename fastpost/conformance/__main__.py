"""The suite as a command: ``python -m fastpost.conformance module:make_optimizer``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import properties
from fastpost.conformance.results import print_table, to_json
from fastpost.conformance.runner import why_not_elsewhere
from fastpost.conformance.suite import chosen, sam_conformance


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if no property failed, else 1; wrong options end with status 2."""
    parser = argparse.ArgumentParser(prog="python -m fastpost.conformance", description=sam_conformance.__doc__)
    parser.description = "Checks what users rely on in a SAM-like optimizer."
    parser.add_argument("optimizer", nargs="?", help="module:name of make_optimizer, or of an Adapter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--no-distributed", action="store_true", help="leave out what takes several processes")
    parser.add_argument("--no-isolate", action="store_true", help="run the other properties in this process")
    parser.add_argument("--only", action="append", metavar="PROPERTY", help="may be repeated")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="per property")
    parser.add_argument("--list", action="store_true", help="list the properties")
    args = parser.parse_args(argv)
    if args.list:
        for prop in properties().values():
            print(f"{prop.name:24} {prop.promise}")
        return 0
    if args.optimizer is None or ":" not in args.optimizer:
        parser.error("name the optimizer as module:make_optimizer")
    module, _, name = args.optimizer.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        target = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises: status 1 is a property's
        if not isinstance(error, (ModuleNotFoundError, AttributeError)):
            traceback.print_exc()
        parser.error(f"{args.optimizer}: {type(error).__name__}: {error}")
    try:
        adapter = target if isinstance(target, Adapter) else Adapter(target)
        chosen(adapter, args.only, args.time_limit)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if not args.no_isolate and (reason := why_not_elsewhere(adapter)) is not None:
        parser.error(f"{args.optimizer}: {reason}, or add --no-isolate")
    results = sam_conformance(
        adapter,
        distributed=not args.no_distributed,
        isolate=not args.no_isolate,
        only=args.only,
        time_limit=args.time_limit,
        table=False,
    )
    if args.json:
        print(to_json(adapter.name, results))
    else:
        print_table(adapter.name, results)
    return int(any(r.status in ("fail", "error") for r in results))


if __name__ == "__main__":
    sys.exit(main())
