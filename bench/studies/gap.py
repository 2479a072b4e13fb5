"""GAP on a pretrained model (2306.07052): do a few steps uphill on one text help, which text, and is it the ascent?

Every text is climbed on by the paper's recipe. Each state is scored twice: on examples to choose a state by, and on
others to report on. The controls ask what else would have done the same: steps downhill on the same text, and a random
direction of equal length.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpost import GAP
from fastpost.bench.studies import language
from fastpost.bench.studies.gap_sweep import drawn, read
from fastpost.bench.studies.records import Records
from fastpost.bench.studies.study import Block, Study, Timer, data_folder, digest
from fastpost.cli.models import Loaded

CORPORA = ("github", "pile-cc", "lm_extraction")
LR = 5e-5


def options(parser: argparse.ArgumentParser) -> None:
    language.model_options(parser)
    parser.add_argument("--corpora", default=",".join(CORPORA), help="comma-separated, files train_data_NAME.csv in gap/")
    parser.add_argument("--texts", type=int, default=10, help="of each corpus (default 10)")
    parser.add_argument("--steps", type=int, default=15, help="uphill on each (default 15, the paper's)")
    parser.add_argument("--text-tokens", type=int, default=512, help="of a text, its last (default 512, the paper's)")
    parser.add_argument("--control-states", default="5,10,15", help="states at which the controls are scored")
    parser.add_argument("--choose-dialogues", type=int, default=80, help="of each of four sets, to choose by")
    parser.add_argument("--choose-questions", type=int, default=160)
    parser.add_argument("--report-dialogues", type=int, default=80, help="of each of four sets, to report on")
    parser.add_argument("--report-questions", type=int, default=160)
    parser.add_argument("--dialogue-tokens", type=int, default=256, help="of a dialogue, its first")
    parser.add_argument("--question-tokens", type=int, default=512, help="of a question with its abstract, its last")
    parser.add_argument("--answers", type=int, default=80, help="dialogues of each set that are answered in words, for F1")
    parser.add_argument("--choose-on", choices=language.HALVES, default="even", help="which examples choose a state")
    parser.add_argument(
        "--report-on", choices=language.HALVES, default="odd", help="which examples are reported on; never the same"
    )


class Run:
    """One model, its texts and its scores."""

    def __init__(
        self,
        options: argparse.Namespace,
        loaded: Loaded,
        choose: language.Part,
        report: language.Part,
        texts: dict[str, torch.Tensor],
    ) -> None:
        self.options, self.model, self.choose, self.report, self.texts = options, loaded.model, choose, report, texts
        self.control_states = [int(part) for part in options.control_states.split(",")]
        self.records: Any = None

    def blocks(self, records: Records) -> Iterable[Block]:
        self.records = records
        untouched = partial(records.has, "untouched", "untouched", 0, {})
        yield Block("untouched", untouched, self.untouched)
        by_corpus: dict[str, list[str]] = {}
        for name in self.texts:
            by_corpus.setdefault(name.partition("/")[0], []).append(name)
        for k in range(self.options.texts):  # a text of each corpus after the other, so that half a study compares corpora
            for names in by_corpus.values():
                if k < len(names):
                    name = names[k]
                    climbed = partial(records.has, name, "negative", 0, {"last": True})
                    for method, run, ready in (
                        ("negative", self.climb, untouched),
                        ("random", self.wander, climbed),  # as far as the ascent went
                        ("mle", self.descend, untouched),
                    ):
                        done = partial(records.has, name, method, 0, {"last": True})
                        yield Block(f"{name}/{method}", done, partial(run, name), ready)

    def untouched(self) -> None:
        timer = Timer(device=self.options.device)
        with timer.running():
            scores, examples = self.scores()
            examples["f1"] = self.report.f1(self.model)
        scores["f1"] = sum(examples["f1"]) / len(examples["f1"])
        self.records.add("untouched", "untouched", 0, {}, scores, examples=examples, **timer.spent())

    def scores(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        chosen, _ = self.choose.scores(self.model)
        scores, examples = self.report.scores(self.model)
        return {**{f"choose_{name}": value for name, value in chosen.items()}, **scores}, examples

    def noted(self, name: str, method: str, state: int) -> float:
        """Scores a state, unless that was done before a kill; what it is chosen by."""
        hyper = {"state": state}
        if not self.records.has(name, method, 0, hyper):
            timer = Timer(device=self.options.device)
            with timer.running():
                scores, examples = self.scores()
            self.records.add(name, method, 0, hyper, scores, steps=state, examples=examples, **timer.spent())
        return self.found(name, method, hyper)["scores"]["choose_dialogue"]

    def found(self, block: str, method: str, hyper: dict[str, Any]) -> dict[str, Any]:
        return next(row for row in self.records.of(block) if row["method"] == method and row["hyper"] == hyper)

    def along(self, name: str, method: str, states: Iterable[int]) -> Any:
        """What GAP calls after each step: scores the states wanted, the others count as lost."""
        wanted, step = set(states), -1

        def evaluate(model: Any) -> float:
            nonlocal step
            step += 1
            if step == 0:
                return self.found("untouched", "untouched", {})["scores"]["choose_dialogue"]
            return self.noted(name, method, step) if step in wanted else -1e9

        return evaluate

    def climb(self, name: str) -> None:
        self.follow(name, "negative", range(1, self.options.steps + 1))

    def descend(self, name: str) -> None:
        self.follow(name, "mle", self.control_states)

    def follow(self, name: str, loss: str, states: Iterable[int]) -> None:
        recipe = GAP(self.options.steps, LR, loss=loss, patience=None, max_tokens=None)
        timer = Timer(device=self.options.device)
        with timer.running():
            result = recipe(self.model, self.texts[name].to(self.options.device), evaluate=self.along(name, loss, states))
        try:
            scores: dict[str, float] = {
                "best_state": result.best_step,
                "skipped": result.skipped_steps,
                "moved": result.moved_fraction,
            }
            examples: dict[str, list[float]] = {"loss": result.losses, "drift": result.drift}
            if loss == "negative":  # the model is in the state that the choosing dialogues like best
                examples["f1"] = self.report.f1(self.model)
                scores["f1"] = sum(examples["f1"]) / len(examples["f1"])
            self.records.add(
                name, loss, 0, {"last": True}, scores, steps=self.options.steps, examples=examples, **timer.spent()
            )
        finally:
            result.rollback()

    @torch.no_grad()
    def wander(self, name: str) -> None:
        """A random direction, as far as the ascent had gone by the same state."""
        drift = self.found(name, "negative", {"last": True})["examples"]["drift"]
        weights = list(self.model.parameters())
        kept = [w.clone() for w in weights]
        generator = torch.Generator().manual_seed(int(digest([name]), 16) % (1 << 32))
        direction = [torch.randn(w.shape, generator=generator).to(w.device) for w in weights]
        length = torch.stack([d.double().square().sum() for d in direction]).sum().sqrt().item()
        try:
            for state in self.control_states:
                if not self.records.has(name, "random", 0, {"state": state}):
                    for w, start, d in zip(weights, kept, direction, strict=True):
                        torch.add(start, d, alpha=drift[state] / length, out=w)
                    self.noted(name, "random", state)
        finally:
            for w, start in zip(weights, kept, strict=True):
                w.copy_(start)
        self.records.add(name, "random", 0, {"last": True}, {"drift": drift[-1]})


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    language.check_halves(options.choose_on, options.report_on)
    folder = data_folder(options, "gap")
    corpora = {folder / f"train_data_{name.strip()}.csv": name.strip() for name in options.corpora.split(",")}
    read_texts = {}
    for path in corpora:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; the corpora are {', '.join(CORPORA)}")
        read_texts[path] = read(path)
    control = [int(part) for part in options.control_states.split(",")]
    if not all(1 <= state <= options.steps for state in control):
        raise ValueError(f"--control-states {options.control_states}: states are 1 to {options.steps}, as --steps says")
    loaded = language.load(options)
    sizes = partial(language.Sizes, dialogue_tokens=options.dialogue_tokens, question_tokens=options.question_tokens)
    choose, report = language.parts(
        folder, loaded, options.choose_on, options.report_on,
        sizes(options.choose_dialogues, options.choose_questions, answers=0),
        sizes(options.report_dialogues, options.report_questions, answers=options.answers),
    )  # fmt: skip
    texts = {
        name.removeprefix("train_data_"): torch.tensor(loaded.encode(text), dtype=torch.int64)
        for name, text in drawn(read_texts, options.texts, 0).items()
    }
    texts = {name: ids[-options.text_tokens :] for name, ids in texts.items() if len(ids) > 1}
    setup = {
        "model": Path(loaded.model.config.name_or_path).name, "steps": options.steps, "lr": LR,
        "text_tokens": options.text_tokens, "control_states": options.control_states,
        "texts": digest(f"{name} {ids.tolist()}" for name, ids in texts.items()),
        "choose": f"{len(choose.dialogues)} dialogues, {len(choose.questions)} questions, {options.choose_on}",
        "report": f"{len(report.dialogues)} dialogues, {len(report.questions)} questions, {options.report_on}",
        "tokens": f"{options.dialogue_tokens} of a dialogue, {options.question_tokens} of a question",
        "data": digest([*choose.texts, *report.texts]),
    }  # fmt: skip
    return setup, Run(options, loaded, choose, report, texts).blocks


STUDY = Study("gap", __doc__.splitlines()[0], options, prepare)
