"""Options of `fastpost compare`, from the command line and from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastpost.cli import tasks, tuning
from fastpost.cli.options import Range, check, names_of, option, parsed, seeds_of

DESCRIPTION = "Post-trains real models by every method, beside the published formulas in plain PyTorch."
METHODS = (*tuning.CLASSIFIERS, "gap")


@dataclass
class CompareArguments:
    """Options of `fastpost compare`; the same names serve as keys of a JSON or YAML file given as the first argument."""

    task: str = option("stdlib", f"classification task: {', '.join(tasks.TASKS)}")
    data_dir: str | None = option(None, "folder with train.tsv and dev.tsv, for rte, cola and mrpc")
    model: str | None = option(None, f"folder or hub name of an encoder; default: {tuning.PACKAGED_MODEL} from PyPI")
    methods: str = option(",".join(METHODS), "comma-separated; gap trains a small language model to climb in")
    seeds: str = option("0,1", "comma-separated; order of data, head, dropout and noise, and GAP's text")
    output_dir: str = option("fastpost-runs/compare", "where results.json, results.csv and report.png go")
    train_size: int = option(256, "examples to learn from (0: all)")
    validation_size: int = option(128, "examples to choose by (0: as many as the task gives)")
    test_size: int = option(480, "examples to report on (0: all)")
    epochs: float = option(2.5, "passes over the training examples")
    max_steps: int = option(-1, "steps of fine-tuning; -1: as epochs say")
    batch_size: int = option(16, "examples per step")
    max_length: int = option(0, "tokens per example; 0: 32 for stdlib, 128 otherwise")
    evaluations: int = option(2, "how often a run asks validation; the best state is reported")
    lr: float = option(2e-4, "AdamW's learning rate, for every classifier")
    weight_decay: float = option(0.01, "AdamW's, for every classifier")
    rho: float = option(0.05, "SAM's radius")
    asam_rho: float = option(0.5, "ASAM's radius, in its own scaled units")
    eps: float = option(1e-5, "R3F's and R4F's noise")
    r3f_lambda: float = option(1.0, "weight of R3F's KL")
    noise_type: str = option("uniform", "R3F's noise: uniform or normal")
    timing_rounds: int = option(5, "timed steps of each side; 0 leaves times and memory out")
    lm_steps: int = option(300, "steps that train the small language model before GAP")
    lm_width: int = option(128, "its width")
    lm_layers: int = option(4, "its layers")
    lm_context: int = option(128, "its context, in tokens; also the length of GAP's text")
    lm_bytes: int = option(6_000_000, "source text it learns from at most, in characters")
    gap_steps: int = option(15, "GAP's steps at most")
    gap_lr: float = option(5e-5, "GAP's learning rate")

    def __post_init__(self) -> None:
        check(self, _RANGES)

    def method_list(self) -> list[str]:
        return list(dict.fromkeys(names_of(self.methods, "methods", METHODS)))

    def seed_list(self) -> list[int]:
        return seeds_of(self.seeds)


_RANGES = {
    **dict.fromkeys(("train_size", "validation_size", "test_size", "max_length", "timing_rounds", "gap_steps"), Range(0)),
    **dict.fromkeys(("weight_decay", "rho", "asam_rho", "eps", "r3f_lambda", "lr"), Range(0)),
    **dict.fromkeys(("batch_size", "evaluations", "lm_steps", "lm_layers"), Range(1)),
    **dict.fromkeys(("epochs", "gap_lr"), Range(0, above=True)),
    "max_steps": Range(1, also=(-1,)),
    "lm_width": Range(4),
    "lm_context": Range(8),
    "lm_bytes": Range(10_000),
}


def parse(argv: Sequence[str]) -> CompareArguments:
    """Options from the command line or a file; raises as `parsed`."""
    return parsed(CompareArguments, "compare", DESCRIPTION, argv)
