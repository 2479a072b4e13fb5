"""Options of `fastpost compare`, from the command line and from files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastpost.cli import tasks, tuning
from fastpost.errors import unknown

DESCRIPTION = "Post-trains real models by every method, beside the published formulas in plain PyTorch."
METHODS = (*tuning.CLASSIFIERS, "gap")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CompareArguments:
    """Options of `fastpost compare`; the same names serve as keys of a JSON or YAML file given as the first argument."""

    task: str = _option("stdlib", f"classification task: {', '.join(tasks.TASKS)}")
    data_dir: str | None = _option(None, "folder with train.tsv and dev.tsv, for rte, cola and mrpc")
    model: str | None = _option(None, f"folder or hub name of an encoder; default: {tuning.PACKAGED_MODEL} from PyPI")
    methods: str = _option(",".join(METHODS), "comma-separated")
    seeds: str = _option("0,1", "comma-separated; order of data, head, dropout and noise, and GAP's text")
    output_dir: str = _option("fastpost-runs/compare", "where results.json, results.csv and report.png go")
    train_size: int = _option(256, "examples to learn from (0: all)")
    validation_size: int = _option(128, "examples to choose by (0: as many as the task gives)")
    test_size: int = _option(480, "examples to report on (0: all)")
    epochs: float = _option(2.5, "passes over the training examples")
    max_steps: int = _option(-1, "steps of fine-tuning; -1: as epochs say")
    batch_size: int = _option(16, "examples per step")
    max_length: int = _option(0, "tokens per example; 0: 32 for stdlib, 128 otherwise")
    evaluations: int = _option(2, "how often a run asks validation; the best state is reported")
    lr: float = _option(2e-4, "AdamW's learning rate, for every classifier")
    weight_decay: float = _option(0.01, "AdamW's, for every classifier")
    rho: float = _option(0.05, "SAM's radius")
    asam_rho: float = _option(0.5, "ASAM's radius, in its own scaled units")
    eps: float = _option(1e-5, "R3F's and R4F's noise")
    r3f_lambda: float = _option(1.0, "weight of R3F's KL")
    noise_type: str = _option("uniform", "R3F's noise: uniform or normal")
    timing_rounds: int = _option(5, "timed steps of each side; 0 leaves times and memory out")
    lm_steps: int = _option(300, "steps that train the small language model before GAP")
    lm_width: int = _option(128, "its width")
    lm_layers: int = _option(4, "its layers")
    lm_context: int = _option(128, "its context, in tokens; also the length of GAP's text")
    lm_bytes: int = _option(6_000_000, "source text it learns from at most, in characters")
    gap_steps: int = _option(15, "GAP's steps at most")
    gap_lr: float = _option(5e-5, "GAP's learning rate")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"--max-steps must be positive, or -1 for what --epochs says, not {self.max_steps}")

    def method_list(self) -> list[str]:
        names = [name.strip().lower() for name in self.methods.split(",") if name.strip()]
        for name in names:
            if name not in METHODS:
                raise unknown("method", name, METHODS)
        if not names:
            raise ValueError(f"--methods names none; valid: {', '.join(METHODS)}")
        return list(dict.fromkeys(names))

    def seed_list(self) -> list[int]:
        try:
            seeds = [int(part) for part in self.seeds.split(",") if part.strip()]
        except ValueError:
            seeds = []
        if not seeds or min(seeds) < 0:
            raise ValueError(f"--seeds wants whole numbers >= 0 with commas between, not {self.seeds!r}")
        return list(dict.fromkeys(seeds))


_LEAST: dict[str, float] = {
    "train_size": 0, "validation_size": 0, "test_size": 0, "epochs": 0, "batch_size": 1, "max_length": 0, "evaluations": 1,
    "lr": 0, "weight_decay": 0, "rho": 0, "asam_rho": 0, "eps": 0, "r3f_lambda": 0, "timing_rounds": 0, "lm_steps": 1,
    "lm_width": 4, "lm_layers": 1, "lm_context": 8, "lm_bytes": 10_000, "gap_steps": 0, "gap_lr": 0,
}  # fmt: skip


def parse(argv: Sequence[str]) -> CompareArguments:
    """Options from the command line, over those of a JSON or YAML file where the first argument is one.

    Raises:
        ValueError: an option or key that does not exist, or a value out of range.
        FileNotFoundError: no such file.
    """
    from transformers import HfArgumentParser

    argv = list(argv)
    make: Any = HfArgumentParser
    parser = make(CompareArguments, prog="fastpost compare", description=DESCRIPTION)
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        given = _read_config(Path(argv.pop(0)))
        parser.set_defaults(**given)
    options, rest = parser.parse_known_args(argv)
    names = [f.name for f in fields(CompareArguments)]
    if rest:
        first = rest[0].split("=")[0]
        raise unknown("option", first, [f"--{name.replace('_', '-')}" for name in names])
    return CompareArguments(**vars(options))


def _read_config(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
        else:
            import yaml  # type: ignore[import-untyped]

            data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(data).__name__}")
    names = [f.name for f in fields(CompareArguments)]
    for key in data:
        if key not in names:
            raise unknown(f"config key in {path}", key, names)
    # As text, which argparse then reads as if it came from the command line.
    joined = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in data.items()}
    return {key: str(value) for key, value in joined.items() if value is not None}
