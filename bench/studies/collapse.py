"""Do representations collapse (2008.03156, section 4)? An encoder goes through a chain of tasks, with linear probes.

It is the chain of probe.py, with a row for every probe. Nothing is chosen: all methods have the settings given.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

from fastpost.bench.studies import probe
from fastpost.bench.studies.records import Records
from fastpost.bench.studies.study import Block, Study, data_folder, digest

_FIELDS = ("tasks", "methods", "seeds", "train_size", "probe_size", "test_size", "epochs", "batch_size", "max_length", "lr")


def options(parser: argparse.ArgumentParser) -> None:
    defaults = probe.ProbeArguments()
    for name in _FIELDS:
        value = getattr(defaults, name)
        told = f"as in probe (default {value})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=told)
    parser.add_argument("--model", help="folder or hub name of an encoder; default: all-MiniLM-L6-v2 from its package")


class _Rows:
    """Takes what the chain finds as rows of a study."""

    def __init__(self, records: Records, method: str, seed: int) -> None:
        self.records, self.method, self.seed = records, method, seed

    def add(self, correct: Any = None, **row: Any) -> None:
        scores = {name: row[name] for name in ("accuracy", "train_accuracy", "majority")}
        hyper = {name: row[name] for name in ("stage", "task", "kind")}
        examples = None if correct is None else "".join(map(str, correct))
        self.records.add(f"chain/{self.method}/{self.seed}", self.method, self.seed, hyper, scores, examples=examples)


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    if options.device != "cpu":
        raise ValueError(f"--device {options.device}: the chain of probes runs on the CPU")
    given = {name: getattr(options, name) for name in _FIELDS}
    arguments = probe.ProbeArguments(data_dir=str(data_folder(options, "glue")), model=options.model, **given)
    plan = probe.prepare(arguments)
    last = {"stage": len(plan.chain), "task": plan.probes[-1], "kind": "probe"}

    def run(records: Records, method: str, seed: int) -> None:
        plan.methods, plan.seeds = [method], [seed]
        results: Any = _Rows(records, method, seed)
        probe.Study(plan, results, lambda what, total: lambda done: None).run()

    def blocks(records: Records) -> Iterable[Block]:
        for seed in seeds:
            for method in methods:
                done = partial(records.has, f"chain/{method}/{seed}", method, seed, last)
                yield Block(f"chain/{method}/{seed}", done, partial(run, records, method, seed))

    seeds, methods = list(plan.seeds), list(plan.methods)
    texts = [f"{e.text}\t{e.pair}" for data in plan.data.values() for e in (*data.task.train, *data.task.test)]
    kept = {name: value for name, value in given.items() if name not in ("methods", "seeds")}
    return {"model": next(iter(plan.data.values())).classifier.name, **kept, "data": digest(texts)}, blocks


STUDY = Study("collapse", __doc__.splitlines()[0], options, prepare)
