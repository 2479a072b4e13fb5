"""The command line: `fastpost train | bench | doctor`, also `python -m fastpost`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastpost.cli.methods import HELP
from fastpost.errors import unknown

COMMANDS = {
    "train": "train one model by one method on your data, with a report",
    "bench": "time the operations beside their floors and the published formulas",
    "doctor": "say what works on this machine, and what to do about what does not",
}
# Studies, which were commands once.
MOVED = ("compare", "probe", "gap-sweep")
# What the commands need beyond fastpost's own requirements.
_EXTRA = ("transformers", "rich", "jinja2", "matplotlib", "yaml", "tokenizers", "sklearn")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code. Only the module of that command is imported."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        print(f"usage: fastpost COMMAND [options]\n\n{listed}\n\n`fastpost COMMAND --help` shows a command's options.")
        return 0 if arguments else 2
    command = arguments.pop(0)
    if command == "--version":
        from fastpost import __version__

        print(__version__)
        return 0
    if command in MOVED:
        print(f"fastpost {command} is a study now: python -m fastpost.bench.studies {command}", file=sys.stderr)
        return 2
    if command not in COMMANDS:
        print(f"fastpost: error: {unknown('command', command, COMMANDS)}", file=sys.stderr)
        return 2
    if command == "train" and (not arguments or {"-h", "--help"} & set(arguments)):  # before anything slow is imported
        print(HELP, end="")
        return 0 if arguments else 2
    try:
        module = importlib.import_module(f"fastpost.cli.{command.replace('-', '_')}")
        return int(module.main(arguments))
    except ModuleNotFoundError as error:
        return explain_missing(f"fastpost {command}", error)


def explain_missing(program: str, error: ModuleNotFoundError) -> int:
    """Says what to install, and returns the exit code; raises the error again for a module that no extra brings."""
    if error.name is None or error.name.split(".")[0] not in _EXTRA:
        raise error
    print(f"{program} needs {error.name}. Run: pip install 'fastpost[cli]'", file=sys.stderr)
    return 2
