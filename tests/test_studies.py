"""The studies: kills, choosing apart from reporting, tables; long, as all run on one set of tiny data and models."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fastpost import add_noise
from fastpost.bench.studies import __main__ as command
from fastpost.bench.studies import (
    analysis,
    figures,
    forgetting,
    gap,
    glue,
    jobs,
    language,
    methods,
    precision,
    records,
    study,
    verdicts,
)
from fastpost.bench.studies.choosing import Comparison, add_options
from fastpost.bench.studies.records import COLUMNS, Records

from . import oracles

AROUND = {"machine": "m", "device": "cpu", "threads": 1, "commit": "c", "versions": {"torch": "2"}, "date": "2026-01-01"}

# -- rows -------------------------------------------------------------------------------------------------------------

COUNTING = """
import argparse, sys
from pathlib import Path
from fastpost.bench.studies.study import Block, Study, run

def blocks(records):
    for b in range(3):
        def make(b=b):
            for k in range(4):
                records.add(f"b{b}", "m", k, {"k": k}, {"value": b * 10 + k}, examples="x" * 20_000)
                print(b, k, flush=True)
                sys.stdin.readline()
        yield Block(f"b{b}", lambda b=b: all(records.has(f"b{b}", "m", k, {"k": k}) for k in range(4)), make)

study = Study("counting", "", lambda parser: None, lambda options: ({"size": 1}, blocks))
made = run(study, argparse.Namespace(output=Path(sys.argv[1]), device="cpu", threads=1, jobs=1))
print("made", made, flush=True)
"""


def test_a_study_that_is_killed_goes_on_without_a_row_lost_or_made_twice(tmp_path: Path) -> None:
    """SIGKILL in the middle of blocks, with half a line behind them, as a kill during a write leaves it."""
    path = tmp_path / "counting.csv"
    finished: list[tuple[str, int]] = []
    for told in (2, 3, None):  # rows that are reported as finished before the kill
        process = subprocess.Popen(
            [sys.executable, "-c", COUNTING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        heard = 0
        for line in process.stdout:
            if line.startswith(("made", "counting:")):
                continue
            b, k = line.split()
            heard += 1
            if (f"b{b}", int(k)) not in finished:
                finished.append((f"b{b}", int(k)))
            if heard == told:
                os.kill(process.pid, signal.SIGKILL)
                break
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait() == (0 if told is None else -signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()
        rows = [(row["block"], row["seed"]) for row in records.read(path)]
        assert rows == finished[: len(rows)]
        assert len(rows) >= len(finished)
        if told is not None:
            with path.open("ab") as file:
                file.write(b'counting,b9,m,0,"{""k"":')
    assert rows == [(f"b{b}", k) for b in range(3) for k in range(4)]


def test_a_last_line_cut_anywhere_is_dropped_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"

    def two() -> bytes:
        opened = Records(path, "s", {"a": 1}, AROUND)
        for seed in (0, 1):
            opened.add("b", "m", seed, {"text": 'quotes " and , commas'}, {"x": 0.1 + seed, "bad": math.nan}, examples=[1.5])
        opened.close()
        return path.read_bytes()

    whole = two()
    assert two() == whole  # nothing was missing
    ends = [k + 1 for k, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 3
    for cut in sorted({*range(0, len(whole), 9), *(end + by for end in ends for by in (-2, -1, 0)), *range(5)}):
        path.write_bytes(whole[:cut])
        assert two() == whole, cut


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    opened = Records(tmp_path / "new" / "rows.csv", "s", {"a": 1}, AROUND)
    opened.add("b", "m", 3, {"lr": 1e-4}, {"x": 1 / 3}, steps=7, seconds=1.234, cpu_seconds=2.0, examples={"y": [0.5]})
    opened.add("b", "m", 4, {}, {}, examples="1" * 200_000)
    opened.close()
    row, large = records.read(tmp_path / "new" / "rows.csv")
    assert large["examples"] == "1" * 200_000
    assert row == {
        "study": "s", "block": "b", "method": "m", "seed": 3, "hyper": {"lr": 1e-4}, "scores": {"x": 1 / 3}, "steps": 7,
        "seconds": 1.234, "cpu_seconds": 2.0, **AROUND, "setup": {"a": 1}, "examples": {"y": [0.5]},
    }  # fmt: skip


def test_files_that_are_not_this_studys_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    first = Records(path, "s", {"epochs": 1}, AROUND)
    with pytest.raises(ValueError, match="written by another process with another set-up"):
        Records(path, "s", {"epochs": 2}, AROUND)  # before there is a row that would say so
    first.add("b", "m", 0, {}, {})
    first.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another set-up \(epochs\)"):
        Records(path, "s", {"epochs": 2}, AROUND)
    with pytest.raises(ValueError, match="of the study s"):
        Records(path, "t", {"epochs": 1}, AROUND)
    assert path.read_bytes() == before
    path.write_bytes(before + before.splitlines(keepends=True)[-1])
    with pytest.raises(ValueError, match="line 3: the same run is there twice"):
        records.read(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a study's table"):
        Records(path, "s", {}, AROUND)
    assert path.read_text() == "a,b\n1,2\n"


# -- several processes ------------------------------------------------------------------------------------------------

SHARED = """
import argparse, sys
from pathlib import Path
from fastpost.bench.studies.study import Block, Study, run

def hear(*words):
    print(*words, flush=True)
    return sys.stdin.readline()

def blocks(records):
    hear("open")
    def block(name, needs):
        def make():
            for k in range(2):
                if not records.has(name, "m", k, {}):
                    hear("at", name, k)
                    records.add(name, "m", k, {}, {"value": k}, examples="x" * 20_000)
        def is_there(name):
            return all(records.has(name, "m", k, {}) for k in range(2))
        return Block(name, lambda: is_there(name), make, lambda: all(map(is_there, needs)))
    chosen = [f"choose{k}" for k in range(4)]
    return [*(block(name, []) for name in chosen), *(block(f"report{k}", chosen) for k in range(4))]

study = Study("shared", "", lambda parser: None, lambda options: ({"size": 1}, blocks))
made = run(study, argparse.Namespace(output=Path(sys.argv[1]), device="cpu", threads=1, jobs=1))
print("made", made, flush=True)
"""
SHARED_ROWS = sorted((f"{kind}{b}", k) for kind in ("choose", "report") for b in range(4) for k in range(2))


class Worker:
    """A process of SHARED, which waits at every line it prints until it is told to go on."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHARED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def heard(self) -> list[str]:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()).startswith("shared:"):
            pass
        return line.split()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, int]:
        """Lets it run to its end; rows made and exit status."""
        while (words := self.heard())[0] != "made":
            self.go()
        return int(words[1]), self.close()

    def close(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def test_processes_share_a_study_and_finish_what_a_killed_one_had_claimed(tmp_path: Path) -> None:
    path = tmp_path / "shared.csv"
    workers = [Worker(path) for _ in range(3)]
    for worker in workers:
        assert worker.heard() == ["open"]
    at = []
    for worker in workers:
        worker.go()
        at.append(worker.heard())
    assert at == [["at", f"choose{k}", "0"] for k in range(3)]  # a block each, the first that is free
    killed, *others = workers
    killed.go()
    assert killed.heard() == ["at", "choose0", "1"]  # its first row is written
    killed.process.kill()
    assert killed.close() == -signal.SIGKILL
    with path.open("ab") as file:
        file.write(b'shared,choose0,m,1,"{""k"":')
    at = []
    for worker in others:
        worker.go()
        assert worker.heard()[2] == "1"
        worker.go()
        at.append(worker.heard())
    # The block of the killed one, and in it only what is missing; then the next.
    assert at == [["at", "choose0", "1"], ["at", "choose3", "0"]]
    second, third = others
    third.go()
    assert third.heard() == ["at", "choose3", "1"]
    third.go()
    assert third.process.stdout is not None
    assert third.process.stdout.readline().startswith("shared: choose3: 2 row(s)")
    # Now it waits: what reports is not ready as long as the second process chooses.
    assert select.select([third.process.stdout], [], [], 1.0)[0] == []
    second.go()
    with ThreadPoolExecutor(2) as pool:
        made, statuses = zip(*pool.map(Worker.end, others), strict=True)
    assert statuses == (0, 0)
    rows = records.read(path)
    assert sum(made) == len(rows) - 1
    assert sorted((row["block"], row["seed"]) for row in rows) == SHARED_ROWS
    assert all(row["block"].startswith("choose") for row in rows[:8])
    assert path.read_bytes().endswith(b"\n")
    assert {records.jobs_of(row) for row in rows[:6]} == {2}  # at the least: they were started by hand


def test_rows_of_others_are_read_and_none_is_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    alone = Records(path, "s", {}, AROUND)
    alone.add("b", "m", 0, {}, {"x": 0.0})
    one, other = alone, Records(path, "s", {}, AROUND)
    with one.claimed("b") as by_one, other.claimed("b") as by_other, other.claimed("c") as free:
        assert (by_one, by_other, free) == (True, False, True)
    with other.claimed("b") as by_other:
        assert by_other
    one.add("b", "m", 1, {}, {"x": 1.0})
    assert not other.has("b", "m", 1, {})
    with path.open("ab") as file:
        file.write(b"s,b,m,2,")  # somebody was killed
    other.add("b", "m", 1, {}, {"x": 99.0})
    assert (one.made, other.made) == (2, 0)
    assert other.has("b", "m", 1, {})
    other.add("b", "m", 3, {}, {"x": 3.0})
    one.refresh()
    assert one.has("b", "m", 3, {})
    other.close()
    one.add("b", "m", 4, {}, {"x": 4.0})  # it had company while it worked
    with one.claimed("d"):
        one.add("b", "m", 5, {}, {"x": 5.0})
    one.close()
    rows = records.read(path)
    assert [(row["seed"], row["scores"]["x"]) for row in rows] == [(k, float(k)) for k in (0, 1, 3, 4, 5)]
    assert [records.jobs_of(row) for row in rows] == [1, 2, 2, 2, 1]


def test_a_study_whose_blocks_wait_for_nothing_does_not_wait_for_ever(tmp_path: Path) -> None:
    def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
        return {}, lambda opened: [study.Block("stuck", lambda: False, lambda: None, lambda: False)]

    options = argparse.Namespace(output=tmp_path / "rows.csv", device="cpu", threads=1, jobs=1)
    with pytest.raises(RuntimeError, match="stuck waits for rows that no block makes"):
        study.run(study.Study("s", "", lambda parser: None, prepare), options)


class Chosen(Comparison):
    """Scores by a formula; notes what ran."""

    def __init__(self, more: tuple[str, ...] = ()) -> None:
        parser = argparse.ArgumentParser()
        add_options(parser, methods.STRENGTHS, rates="1e-4,2e-4,4e-4", seeds="0,1")
        given = parser.parse_args(["--methods", "sam,r3f", "--choosing-seeds", "2", *more])
        super().__init__(given, methods.STRENGTHS, ["p/5", "q/5"])

    def train(self, where: str, place: str, method: str, seed: int, hyper: dict[str, Any], reports: bool) -> None:
        score = -abs(hyper["lr"] - 2e-4) - abs(hyper.get("rho", 0.15) - 0.15)
        self.records.add(where, method, seed, hyper, {"score": score})


def test_blocks_are_ready_once_what_they_need_is_there(tmp_path: Path) -> None:
    """Whatever is ready may run, in any order, and the choice is the same."""
    orders = {}
    for order in ("first", "last", "random"):
        made, draw = Chosen(), np.random.default_rng(0)
        opened = Records(tmp_path / f"{order}.csv", "s", {}, AROUND)
        left = list(made.blocks(opened))
        assert len({block.name for block in left}) == len(left) == 2 * 2 * (3 + 2 * 3) + 2 * 2 * 2
        while left:
            ready = [block for block in left if block.ready()]
            plain = [row for row in opened.rows if row["method"] == "adamw"]
            for place in ("p/5", "q/5"):
                counts = {
                    method: sum(r["block"] == f"choose/{place}" and r["method"] == method for r in opened.rows)
                    for method in ("adamw", "sam", "r3f")
                }
                for block in ready:
                    if place in block.name and "/adamw/" not in block.name:
                        assert counts["adamw"] == 6, block.name
                        if block.name.startswith("report/"):
                            assert counts[block.name.split("/")[3]] == 6, block.name
            if len(plain) < 12:
                assert any("/adamw/" in block.name for block in ready)  # all candidates at once
            block = ready[{"first": 0, "last": -1, "random": int(draw.integers(len(ready)))}[order]]
            assert not block.done()
            block.run()
            assert block.done()
            left.remove(block)
        opened.close()
        orders[order] = {records.key_of(row) for row in records.read(opened.path)}
    assert orders["first"] == orders["last"] == orders["random"]
    reported = [json.loads(key[4]) for key in orders["first"] if key[1].startswith("report/") and key[2] == "sam"]
    assert reported == [{"lr": 2e-4, "rho": 0.15}] * 4


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_jobs_end_with_what_their_processes_say(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    once = f"import os, sys; fd = os.open({str(tmp_path / 'once')!r}, os.O_CREAT | os.O_EXCL)"
    assert jobs.run(python("print('here')"), 3) == 0
    assert capfd.readouterr().out == "here\n" * 3
    assert jobs.run(python("raise SystemExit(3)"), 2) == 3
    assert jobs.run(python(f"try:\n    {once}\nexcept FileExistsError:\n    sys.exit(7)"), 3) == 7
    assert "2 of 3 processes failed" in capfd.readouterr().err
    assert jobs.run(python("import os; os.kill(os.getpid(), 9)"), 2) == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_who_waits_ends_all(number: signal.Signals) -> None:
    child = (
        "import os, time; from fastpost.bench.studies import jobs; jobs.end_with({}); os.write(1, b'up\\n'); time.sleep(99)"
    )
    parent = (  # a shell's background jobs, which these tests may be one of, begin with SIGINT ignored
        "import os, signal, sys; from fastpost.bench.studies import jobs; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.exit(jobs.run([sys.executable, '-c', {child!r}.format(os.getpid())], 2))"
    )
    process = subprocess.Popen(python(parent), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
    process.send_signal(number)
    assert process.stdout.read() == b""  # comes to its end once none of the three has it open
    process.stdout.close()
    ends = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}
    assert process.wait() == ends[number]


# -- tiny models and data ---------------------------------------------------------------------------------------------

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "river",
    "runs",
    "sees",
    "small",
    "green",
    "was",
    "not",
    "never",
    "under",
    "over",
    "with",
    "and",
    "yes",
    "maybe",
    "no",
]


def _text(generator: np.random.Generator, words: int = 6) -> str:
    return " ".join(generator.choice(WORDS, words))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of --data."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, rows in (("train", 60), ("dev", 24)):
        for task in ("RTE", "CoLA", "MRPC"):
            (folder / "glue" / task).mkdir(parents=True, exist_ok=True)
        pairs = [(_text(draw), _text(draw)) for _ in range(rows)]
        rte = ["index\tsentence1\tsentence2\tlabel"]
        rte += [f"{k}\t{a}\t{b}\t{('entailment', 'not_entailment')[k % 2]}" for k, (a, b) in enumerate(pairs)]
        (folder / "glue" / "RTE" / f"{name}.tsv").write_text("\n".join(rte) + "\n")
        cola = [f"x\t{k % 2}\t\t{a} {b}" for k, (a, b) in enumerate(pairs)]
        (folder / "glue" / "CoLA" / f"{name}.tsv").write_text("\n".join(cola) + "\n")
        mrpc = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        mrpc += [f"{k % 2}\t1\t2\t{a}\t{b}" for k, (a, b) in enumerate(pairs)]
        (folder / "glue" / "MRPC" / f"{name}.tsv").write_text("\n".join(mrpc) + "\n")
    (folder / "gap").mkdir()
    for name in gap.CORPORA:
        with (folder / "gap" / f"train_data_{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["doc_id", "text"], *([k, _text(draw, 12)] for k in range(5))])
    for name in language.DIALOGUES:
        talks = {str(k): [_text(draw) for _ in range(3)] for k in range(8)}
        (folder / "gap" / f"validation_data_{name}.json").write_text(json.dumps({"text": talks}))
    with (folder / "gap" / "validation_data_pubmed_qa.csv").open("w", newline="") as file:
        lines = [[_text(draw, 9), _text(draw), ("yes", "maybe", "no")[k % 3]] for k in range(12)]
        csv.writer(file).writerows([["abstract", "question", "final_decision"], *lines])
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=40, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("causal")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=400, eos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(name: str, *options: object) -> int:
    return command.main([name, *map(str, options)])


def glue_options(data: Path, encoder: Path, output: Path, *more: object) -> tuple[object, ...]:
    sizes = ("--validation", 12, "--shares", 50, "--epochs", 1, "--batch-size", 8, "--max-length", 32)
    return "--data", data, "--model", encoder, "--output", output, *sizes, *more


def gap_options(data: Path, causal: Path, output: Path, *more: object) -> tuple[object, ...]:
    sizes = ("--texts", 2, "--steps", 2, "--control-states", "1,2", "--choose-dialogues", 2, "--choose-questions", 4)
    report = ("--report-dialogues", 2, "--report-questions", 4, "--answers", 1)
    return "--data", data, "--model", causal, "--output", output, *sizes, *report, *more


# -- glue -------------------------------------------------------------------------------------------------------------


def test_glue_runs_every_method_and_goes_on(
    data: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "studies-glue.csv"
    options = glue_options(data, encoder, output, "--tasks", "rte,cola", "--strengths", 2, "--seeds", "0,1")
    assert run("glue", *options) == 0
    rows = records.read(output)
    chosen = [row for row in rows if row["block"].startswith("choose/")]
    reported = [row for row in rows if row["block"].startswith("report/")]
    assert len(chosen) == 2 * (3 + 7 * 2)
    assert len(reported) == 2 * 8 * 2
    assert {row["seed"] for row in chosen}.isdisjoint({row["seed"] for row in reported})
    for row in reported:
        candidates = [c for c in chosen if c["block"][7:] == row["block"][7:] and c["method"] == row["method"]]
        best = max(c["scores"]["score"] for c in candidates)
        assert row["hyper"] == next(c["hyper"] for c in candidates if c["scores"]["score"] == best)
        assert len(row["examples"]["labels"]) == len(row["examples"]["predictions"]) == 24
        right = sum(a == b for a, b in zip(row["examples"]["labels"], row["examples"]["predictions"], strict=True))
        assert row["scores"]["accuracy"] == right / 24
        assert row["steps"] == 3  # half of the 48 training examples, 8 at a time
        assert math.isfinite(row["scores"]["train_loss"])
    assert "0 row(s)" not in capsys.readouterr().out
    before = output.read_bytes()
    assert run("glue", *options) == 0
    assert output.read_bytes() == before
    lines = before.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:-2]))
    assert run("glue", *options) == 0
    again = records.read(output)
    assert [records.key_of(row) for row in again] == [records.key_of(row) for row in rows]
    assert [row["scores"] for row in again] == [row["scores"] for row in rows]  # a run is repeatable
    assert analysis.places(rows) == ["cola/50", "rte/50"]
    table = verdicts.glue_scores(tmp_path)
    assert [cells[0] for cells in table[1:-1]] == list(verdicts.NAMES.values())
    assert table[-1] == ("always the most frequent label", "0.00", "50.00", "")
    assert [path.name for path in figures.draw(tmp_path, tmp_path)] == ["studies-glue.png"]


def test_glue_by_several_jobs_finds_the_same(data: Path, encoder: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "studies-glue.csv", tmp_path / "shared" / "studies-glue.csv"
    more = ("--tasks", "rte", "--strengths", 2, "--seeds", "0,1", "--methods", "adamw,sam_lm")
    assert run("glue", *glue_options(data, encoder, alone, *more)) == 0
    assert run("glue", *glue_options(data, encoder, shared, *more), "--jobs", 2) == 0
    one, other = ({records.key_of(row): row for row in records.read(path)} for path in (alone, shared))
    assert one.keys() == other.keys()
    assert len(one) == 1 + 3 + 2 + 2 * 2
    for key, row in one.items():
        assert (row["scores"], row["examples"]) == (other[key]["scores"], other[key]["examples"])
    assert {records.jobs_of(row) for row in one.values()} == {1}
    assert {records.jobs_of(row) for row in other.values()} == {2}
    before = shared.read_bytes()
    assert run("glue", *glue_options(data, encoder, shared, *more)) == 0  # jobs are no part of the set-up
    assert shared.read_bytes() == before
    # Times of a step are those of single processes alone.
    prices = [{cells[0]: cells[-1] for cells in verdicts.glue_scores(path.parent)}["SAM-LM"] for path in (alone, shared)]
    assert prices[0] != ""
    assert prices[1] == ""


def test_glue_scores_are_those_of_the_benchmark() -> None:
    labels, predictions = [0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1]
    assert glue.score("rte", labels, predictions)["score"] == 4 / 6
    assert glue.score("mrpc", labels, predictions)["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    tp, tn, fp, fn = 3, 1, 1, 1
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue.score("cola", labels, predictions)["score"] == pytest.approx(matthews)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_padded_once_make_the_batches_that_the_tokenizer_makes(side: str, encoder: Path) -> None:
    from fastpost.bench.studies.tasks import Example
    from fastpost.bench.studies.tuning import Classifier, Padded, drawn

    made, draw = Classifier(str(encoder), 2), np.random.default_rng(3)
    made.tokenizer.padding_side = side
    pairs = [(_text(draw, int(draw.integers(1, 9))), _text(draw, int(draw.integers(1, 9)))) for _ in range(11)]
    rows = made.encode([Example(one, other, k % 2) for k, (one, other) in enumerate(pairs)], max_length=16)
    padded = Padded(made, rows, "cpu")
    for chosen in drawn(11, 4, 9, seed=5):
        expected, found = made.collate([rows[i] for i in chosen]), padded.batch(chosen)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value)
            assert found[name].is_contiguous()


def classifier(encoder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    from fastpost.bench.studies.tuning import Classifier

    made = Classifier(str(encoder), 2)
    model: Any = made.fresh(0).eval()  # without dropout, so that passes can be repeated
    ids = torch.randint(5, 5 + len(WORDS), (8, 7), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 2}


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(**batch).loss, list(model.parameters())))


def perturbed_by(model: Any, steps: list[torch.Tensor], batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        kept = [p.clone() for p in model.parameters()]
        for p, e in zip(model.parameters(), steps, strict=True):
            p.add_(e)
    found = gradients(model, batch)
    with torch.no_grad():
        for p, k in zip(model.parameters(), kept, strict=True):
            p.copy_(k)
    return found


@pytest.mark.parametrize("method", ["sam", "asam", "sam_lm", "tram"])
def test_the_second_gradient_is_the_methods_own(method: str, encoder: Path) -> None:
    """Against the equations, from plain gradients; AdamW's first step has the gradient's sign, so moments are compared."""
    model, batch = classifier(encoder)
    model = model.double()
    strength = methods.STRENGTHS[method][0]
    torch.manual_seed(7)
    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    stepper = methods.build(method, model, groups, strength, methods.autocast("cpu", "float32"))
    quarter = {name: value[:2] for name, value in batch.items()}
    first = gradients(model, quarter if method == "sam_lm" else batch)
    scale = [p.detach().abs() + 0.01 if method in ("asam", "tram") else torch.ones_like(p) for p in model.parameters()]
    length = torch.stack([(t * g).square().sum() for t, g in zip(scale, first, strict=True)]).sum().sqrt()
    torch.manual_seed(7)
    if method == "tram":
        clean = model(**batch).logits.detach()
        embedded = model.get_input_embeddings()(batch["input_ids"])
        noised = model(inputs_embeds=add_noise(embedded, strength["eps"]), attention_mask=batch["attention_mask"]).logits
        radius = oracles.divergence(clean.float(), noised.float())[0].mean()
    else:
        radius = strength["rho"]
    steps = [radius * t * t * g / length for t, g in zip(scale, first, strict=True)]
    expected = perturbed_by(model, steps, batch)
    torch.manual_seed(7)
    stepper.step(batch)
    state = stepper.sam.base_optimizer.state  # type: ignore[union-attr]
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(state[p]["exp_avg"], 0.1 * g, rtol=1e-6, atol=1e-9)


# -- gap --------------------------------------------------------------------------------------------------------------


def test_gap_scores_every_state_and_its_controls(
    data: Path, causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "studies-gap.csv"
    kept: list[nn.Module] = []
    load = language.load

    def loaded(options: argparse.Namespace) -> Any:
        made = load(options)
        kept.append(made.model)
        return made

    monkeypatch.setattr(language, "load", loaded)
    options = gap_options(data, causal, output)
    assert run("gap", *options) == 0
    rows = records.read(output)
    # The untouched model; of 3 corpora 2 texts each 2 states up, 2 + 2 of controls, and what became of three runs.
    assert len(rows) == 1 + 3 * 2 * (2 + 4 + 3)
    untouched = load(argparse.Namespace(model=str(causal), device="cpu", cache=None)).model
    for p, q in zip(kept[0].parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, q)  # rolled back bit for bit
    found = analysis.climbs(rows)
    assert len(found) == 6
    assert {climb.corpus for climb in found} == set(gap.CORPORA)
    for climb in found:
        assert sorted(climb.states) == [0, 1, 2]
        assert sorted(climb.controls) == ["mle", "random"]
        losses = climb.last["examples"]["loss"]
        assert losses[0] < losses[1] < losses[2]  # uphill
        assert climb.change("dialogue", 0) == [0.0] * 8
        assert climb.last["scores"]["best_state"] == climb.kept("dialogue")
    before = output.read_bytes()
    assert run("gap", *options) == 0
    assert output.read_bytes() == before
    assert len(verdicts.gap_states(tmp_path)) == 1 + 6
    assert all(cells[-1] != analysis.NOT_RUN for cells in verdicts.gap(tmp_path)[1:])
    assert [path.name for path in figures.draw(tmp_path, tmp_path)] == ["studies-gap.png"]


def test_a_random_direction_is_as_long_as_the_ascent(
    data: Path, causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, lengths = tmp_path / "rows.csv", {}
    noted = gap.Run.noted

    def measured(self: gap.Run, name: str, method: str, state: int) -> float:
        now = [p.detach().double().clone() for p in self.model.parameters()]
        start = load(argparse.Namespace(model=str(causal), device="cpu", cache=None)).model
        apart = [(p - q.double()).square().sum() for p, q in zip(now, start.parameters(), strict=True)]
        lengths[name, method, state] = torch.stack(apart).sum().sqrt().item()
        return noted(self, name, method, state)

    load = language.load
    monkeypatch.setattr(gap.Run, "noted", measured)
    assert run("gap", *gap_options(data, causal, output, "--texts", 1, "--corpora", "github")) == 0
    ups = {key: value for key, value in lengths.items() if key[1] == "random"}
    assert len(ups) == 2
    for (name, _, state), value in ups.items():
        assert value == pytest.approx(lengths[name, "negative", state], rel=1e-5)


# -- precision --------------------------------------------------------------------------------------------------------


def test_precision_measures_what_was_stored_and_what_it_does(data: Path, causal: Path, tmp_path: Path) -> None:
    """float32 loses nothing; bfloat16 to nearest does, and a functional perturbation does not."""
    output = tmp_path / "studies-precision.csv"
    sizes = ("--batches", 2, "--tokens", 12, "--rho", "0.001,0.1", "--eps", "1e-5,1e-1")
    options = ("--data", data, "--model", causal, "--output", output, *sizes)
    kinds = [kind for kind in precision.KINDS if not kind.startswith("float16")]
    assert run("precision", *options, "--kinds", ";".join(kinds)) == 0
    rows = records.read(output)
    assert len(rows) == 2 * (2 * len(kinds) + 2 * 3)
    for row in rows:
        if row["block"] != "sam":
            continue
        scores = row["scores"]
        assert scores["true_rise"] > 0
        if row["method"] in ("float32", "bfloat16, functional"):
            assert scores["gain"] == pytest.approx(1, abs=1e-3)
            assert scores["cosine"] == pytest.approx(1, abs=1e-3)
        if row["method"] == "float32":
            assert scores["second_cosine"] == pytest.approx(1, abs=1e-6)
            assert scores["rise"] == pytest.approx(scores["true_rise"], rel=1e-3)
            assert all(found["gain"] == pytest.approx(1, abs=1e-2) for found in row["examples"].values())
            assert set(row["examples"]) == {"embedding", "norm", "0", "1"}
        if row["method"] == "bfloat16, nearest" and row["hyper"]["rho"] == 0.001:
            assert scores["cosine"] < 0.9
    noise = {(row["method"], row["hyper"]["eps"]): row["scores"] for row in rows if row["block"] == "noise"}
    assert noise["bfloat16", 1e-5]["cosine"] < noise["float16", 1e-5]["cosine"] < 1
    assert noise["float32", 1e-1]["cosine"] == pytest.approx(1, abs=1e-6)
    table = verdicts.perturbations(tmp_path)
    assert len(table) == 1 + 2 * len(kinds)
    assert len(verdicts.noise(tmp_path)) == 1 + 2


# -- fine-tuned language models, and what is left of encoders ---------------------------------------------------------


def test_lm_fine_tunes_by_every_method(data: Path, causal: Path, tmp_path: Path) -> None:
    output = tmp_path / "studies-lm.csv"
    sizes = ("--steps", 2, "--batch-size", 2, "--tokens", 8, "--train-windows", 6, "--score-windows", 3)
    options = ("--data", data, "--model", causal, "--output", output, *sizes, "--seeds", "0,1", "--strengths", 1)
    assert run("lm", *options, "--learning-rates", "1e-3,1e-2") == 0
    rows = records.read(output)
    reported = [row for row in rows if row["block"] == "report/dialogues"]
    assert len(rows) == 2 + 9 + 2 * 10
    assert {row["method"] for row in reported} == set(methods.LANGUAGE)
    of = {(row["method"], row["seed"]): row for row in reported}
    for row in reported:
        for split in ("dialogues", "web", "code"):
            assert row["scores"][split] == pytest.approx(math.exp(np.mean(row["examples"][split])), rel=1e-4)
        assert "choose" not in row["scores"]
    fused, whole = of["r3f_fused", 0], of["r3f", 0]
    assert fused["scores"]["dialogues"] == pytest.approx(whole["scores"]["dialogues"], rel=1e-3)
    assert of["sam", 0]["scores"] != of["adamw", 0]["scores"]
    gained = analysis.lower_loss(rows, "web", "sam")
    assert gained is not None
    parts = [np.subtract(of["adamw", s]["examples"]["web"], of["sam", s]["examples"]["web"]) for s in (0, 1)]
    assert gained.mean == pytest.approx(float(np.mean(parts)))
    measured = [cells for cells in verdicts.sam(tmp_path) if cells[0].startswith("Language models")]
    assert len(measured) == 3
    assert all(cells[-1] != analysis.NOT_RUN for cells in measured)


def test_forgetting_scores_before_after_and_in_4_bits(data: Path, causal: Path, tmp_path: Path) -> None:
    output = tmp_path / "studies-forgetting.csv"
    sizes = ("--steps", 2, "--batch-size", 2, "--tokens", 8, "--train-windows", 5, "--report-dialogues", 2)
    more = ("--report-questions", 3, "--seeds", "0,1", "--lr", "1e-2")
    assert run("forgetting", "--data", data, "--model", causal, "--output", output, *sizes, *more) == 0
    rows = records.read(output)
    assert len(rows) == 2 + 2 * 2 * 2
    assert {row["hyper"]["bits"] for row in rows} == {4, 32}
    kept = analysis.retained(rows, "dialogue", 4)
    assert kept is not None
    assert kept.n == "2 x 8"
    measured = [cells for cells in verdicts.sam(tmp_path) if cells[0].startswith("Less is forgotten")]
    assert [cells[-1] == analysis.NOT_RUN for cells in measured] == [False] * 4


def test_rounding_to_4_bits_keeps_extremes_and_16_levels() -> None:
    torch.manual_seed(0)
    layer, narrow = nn.Linear(64, 8), nn.Linear(7, 3)
    before, untouched = layer.weight.detach().clone().view(-1, 32), narrow.weight.detach().clone()
    forgetting.rounded_to_4_bits_(nn.ModuleList([layer, narrow]))
    after = layer.weight.detach().view(-1, 32)
    step = (before.amax(1) - before.amin(1)) / 15
    assert all(len(group.unique()) <= 16 for group in after)
    assert ((after - before).abs() <= step[:, None] * 0.5001).all()
    torch.testing.assert_close(after.amax(1), before.amax(1))
    torch.testing.assert_close(after.amin(1), before.amin(1))
    assert torch.equal(narrow.weight, untouched)  # no whole group fits


def test_collapse_is_the_chain_of_probes(data: Path, encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "studies-collapse.csv"
    sizes = ("--train-size", 16, "--probe-size", 20, "--batch-size", 8, "--epochs", 1, "--max-length", 32)
    options = ("--data", data, "--model", encoder, "--output", output, *sizes, "--tasks", "cola,rte", "--seeds", "0,1")
    assert run("collapse", *options, "--methods", "adamw,r3f,r4f") == 0
    rows = records.read(output)
    # Before the chain both tasks are probed; after each stage too, and the stage's own head is scored.
    assert len(rows) == 3 * 2 * (2 + 2 * (2 + 1))
    assert analysis.probed_tasks(rows) == ["cola", "rte"]
    for task, method in itertools.product(analysis.probed_tasks(rows), ("r3f", "r4f")):
        found = analysis.probed(rows, task, method)
        assert found is not None
        assert found.n == "2 x 24"
        last = {"stage": 2, "task": task, "kind": "probe"}
        of = {m: {r["seed"]: r for r in rows if r["method"] == m and r["hyper"] == last} for m in (method, "adamw")}
        gains = [of[method][s]["scores"]["accuracy"] - of["adamw"][s]["scores"]["accuracy"] for s in (0, 1)]
        assert found.mean == pytest.approx(100 * np.mean(gains))
    before = output.read_bytes()
    assert run("collapse", *options, "--methods", "adamw,r3f,r4f") == 0
    assert output.read_bytes() == before


def test_a_probe_that_sees_nothing_in_the_untouched_encoder_gives_no_verdict(tmp_path: Path) -> None:
    def told(before: float) -> list[str]:
        def row(method: str, seed: int, stage: int, right: str) -> dict[str, Any]:
            hyper = {"stage": stage, "task": "cola", "kind": "probe"}
            scores = {"accuracy": before if stage == 0 else right.count("1") / 4, "majority": 0.5}
            return {
                "method": method,
                "seed": seed,
                "hyper": hyper,
                "scores": scores,
                "examples": right,
                "setup": {"tasks": "cola"},
            }

        rows = [
            row(method, seed, stage, "1111" if method == "r3f" and stage else "0101")
            for method in ("adamw", "r3f", "r4f")
            for seed in (0, 1, 2)
            for stage in (0, 1)
        ]
        return [cells[-1] for cells in verdicts._collapse(rows)]

    assert told(0.75)[1] == analysis.NOT_SEEN
    assert told(0.5) == [analysis.NO_SIGNAL] * 2


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("glue", ("--report-on", "validation"), "cannot be reported on them"),
        ("glue", ("--choose-on", "dev"), "cannot be reported on them"),
        ("gap", ("--report-on", "even"), "cannot be reported on them"),
        ("gap", ("--control-states", "3"), "states are 1 to 2"),
        ("gap", ("--corpora", "github,books"), "train_data_books.csv is missing"),
        ("glue", ("--seeds", "0,1000"), "seeds that choose do not report"),
        ("glue", ("--shares", "0"), "percents lie above 0"),
        ("glue", ("--strengths", "4"), "must be 1, 2 or 3"),
        ("glue", ("--device", "tpu"), "must be cpu, cuda or cuda:N"),
        ("gap", ("--threads", "0"), "must be at least 1"),
        ("gap", ("--jobs", "0"), "--jobs must be at least 1"),
    ],
)
def test_what_cannot_be_believed_is_refused(
    name: str, more: tuple[str, ...], message: str, data: Path, encoder: Path, causal: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "rows.csv"
    given = glue_options(data, encoder, output) if name == "glue" else gap_options(data, causal, output)
    assert run(name, *given, *more) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_dev_split_that_is_the_training_data_is_refused(
    data: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "glue" / "RTE"
    folder.mkdir(parents=True)
    text = (data / "glue" / "RTE" / "train.tsv").read_text()
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text(text)
    output = tmp_path / "rows.csv"
    assert run("glue", *glue_options(tmp_path / "data", encoder, output), "--tasks", "rte") == 2
    assert "also in what is to be reported on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 of the 2 examples to report on are among those"):
        study.check_apart(["a", "b"], ["b", "c"], "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a study has to be named"),
        (["glu"], "'glu'. Did you mean 'glue'?"),
        (["gap"], "--data is needed"),
    ],
)
def test_commands_that_cannot_start(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


# -- analysis ---------------------------------------------------------------------------------------------------------


def test_an_estimate_spans_runs_and_examples() -> None:
    draw = np.random.default_rng(1)
    table = 0.3 + draw.normal(size=(5, 200))
    found = analysis.estimate(table.tolist())
    assert found is not None
    runs = table.mean(1)
    half = stats.t.ppf(0.975, 4) * runs.std(ddof=1) / math.sqrt(5)
    examples = table.mean(0).std(ddof=1) / math.sqrt(200)
    assert found.mean == pytest.approx(table.mean())
    assert found.error == pytest.approx(max(runs.std(ddof=1) / math.sqrt(5), examples), rel=0.05)
    assert found.low <= runs.mean() - half + 1e-12
    assert found.high >= runs.mean() + half - 1e-12
    assert found.high - found.low >= 2 * 1.9 * examples
    assert found.n == "5 x 200"
    assert analysis.estimate([[1.0, 2.0]]) is None
    same = analysis.estimate([1.0, 1.0])
    assert same is not None
    assert (same.low, same.high, same.error) == (1.0, 1.0, 0.0)


def test_verdicts_follow_from_intervals() -> None:
    def verdict(values: list[float], **more: float) -> str:
        return verdicts.line("", "", analysis.estimate(values), **more)[-1]  # type: ignore[arg-type]

    assert verdict([1.0, 1.1, 0.9]) == analysis.CONFIRMED
    assert verdict([-1.0, -1.1, -0.9]) == analysis.OPPOSITE
    assert verdict([-1.0, 1.1, 0.1]) == analysis.NOT_SEEN
    assert verdict([1.2, 1.25, 1.3], zero=1.5, sign=-1) == analysis.CONFIRMED
    assert verdict([1.9, 2.0, 1.95], zero=1.5, sign=-1) == analysis.OPPOSITE
    assert verdict([1.0]) == analysis.NOT_RUN


def test_a_state_is_kept_by_what_chooses_and_reported_by_what_does_not() -> None:
    def row(choose: float, report: list[float]) -> dict[str, Any]:
        return {"scores": {"choose_dialogue": choose, "dialogue": 0.0}, "examples": {"dialogue": report}}

    states = {0: row(0.0, [0.0, 0.0]), 1: row(2.0, [-1.0, 0.5]), 2: row(1.0, [9.0, 9.0]), 3: row(2.0, [7.0, 7.0])}
    climb = analysis.Climb("github/1", states, {}, {})
    assert climb.kept("dialogue") == 1  # the first of the best, though state 2 would look better in the report
    assert climb.change("dialogue") == [-1.0, 0.5]


def test_corpora_are_compared_as_independent_samples() -> None:
    """Welch's test, from its formula."""

    def climb(corpus: str, value: float) -> analysis.Climb:
        states = {k: {"scores": {"choose_dialogue": 0.0}, "examples": {"dialogue": [k * value, k * value]}} for k in (0, 1)}
        return analysis.Climb(f"{corpus}/{value}", states, {}, {})

    a, b = np.array([0.1, 0.2, 0.4]), np.array([-0.3, 0.1])
    found = analysis.between([*(climb("x", v) for v in a), *(climb("y", v) for v in b)], "x", "y", "dialogue", 1)
    assert found is not None
    parts = np.array([a.var(ddof=1) / 3, b.var(ddof=1) / 2])
    freedom = parts.sum() ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(parts.sum())
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.error == pytest.approx(math.sqrt(parts.sum()))
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert found.n == "5"


def test_tables_are_rebuilt_from_rows(tmp_path: Path) -> None:
    """From a CSV file whose numbers are known: gains, verdicts, prices and their counts."""
    opened = Records(tmp_path / "studies-glue.csv", "glue", {"model": "m"}, AROUND)
    labels = "01" * 50
    for seed in range(3):
        for method, wrong, cpu in (("adamw", 20 + seed, 10.0), ("sam", 10 + seed, 20.0), ("sam_lm", 22 + 2 * seed, 12.5)):
            predictions = "".join("10"[int(c)] if k < wrong else c for k, c in enumerate(labels))
            right = {"accuracy": 1 - wrong / 100, "score": 1 - wrong / 100}
            examples = {"labels": labels, "predictions": predictions}
            opened.add("report/rte/10", method, seed, {"lr": 1e-4}, right, steps=10, cpu_seconds=cpu, examples=examples)
    opened.add("majority/rte", "majority", 0, {}, {"accuracy": 0.5, "score": 0.5})
    opened.close()
    table = {cells[1]: cells for cells in verdicts.sam(tmp_path)[1:]}
    beats = table["SAM less AdamW, RTE, 10 % of the data"]
    assert beats[2].startswith("+10.00 ± ")
    assert beats[3:] == ("3 x 100", analysis.CONFIRMED)
    quarter = table["SAM-LM less AdamW, RTE, 10 % of the data"]
    assert quarter[2].startswith("-3.00 ± ")
    cost = table["time of a step over AdamW's, less than 1.5"]
    assert cost[2:] == ("+1.25 ± 0.00 times", "3", analysis.CONFIRMED)
    scores = {cells[0]: cells for cells in verdicts.glue_scores(tmp_path)}
    assert scores["SAM"] == ("SAM", "89.00 ± 0.58", "2.00 ± 0.00")
    assert scores["AdamW"] == ("AdamW", "79.00 ± 0.58", "1")
    first = {cells[0]: cells for cells in verdicts.runs(tmp_path)}
    assert first["glue"][1] == "10"
    assert first["gap"][2] == analysis.NOT_RUN
    assert all(cells[-1] == analysis.NOT_RUN for cells in verdicts.gap(tmp_path)[1:])
    assert tuple(verdicts.sam(tmp_path)[0]) == verdicts.VERDICTS
    assert len(COLUMNS) == len(set(COLUMNS))


def test_tables_of_language_models_are_rebuilt_from_rows(tmp_path: Path) -> None:
    opened = Records(tmp_path / "studies-lm.csv", "lm", {"model": "m"}, AROUND)
    for seed in range(2):
        for method, more in (("adamw", 0.0), ("sam", -0.01), ("adamw_bf16", 0.3)):
            nats = [1.0 + more, 2.0 + more, 3.0 + more]
            examples = {split: [value + seed / 10 for value in nats] for split in ("dialogues", "web", "code")}
            scores = dict.fromkeys(examples, 10.0 + seed)
            opened.add("report/dialogues", method, seed, {"lr": 1e-4}, scores, steps=1, examples=examples)
    opened.close()
    of = {cells[0]: cells for cells in verdicts.language_models(tmp_path)}
    assert of["AdamW"] == ("AdamW", "lr 0.0001", "2", *["10.50 ± 0.50"] * 3, "", "", "")
    assert of["SAM"][6:] == ("-0.0100 ± 0.0000",) * 3
    assert of["AdamW, bfloat16 weights"][6:] == ("+0.30 ± 0.00",) * 3
    # The figure leaves out what keeps no float32 weights: its losses are off the others' scale.
    assert {method for by_method in figures.losses(tmp_path).values() for method in by_method} == {"sam"}


def test_the_table_of_what_is_left_is_rebuilt_from_rows(tmp_path: Path) -> None:
    opened = Records(tmp_path / "studies-forgetting.csv", "forgetting", {"model": "m"}, AROUND)
    for block, method, seed, level in (
        ("untouched", "untouched", 0, 3.0),
        ("tuned", "sam", 0, 1.0),
        ("tuned", "sam", 1, 2.0),
    ):
        for bits in (32, 4):
            scores = {"dialogue": -level, "pubmed": -2 * level, "pubmed_accuracy": level / 4}
            opened.add(block, method, seed, {"bits": bits}, scores, steps=0)
    opened.close()
    untouched, tuned, *in_4_bits = verdicts.zero_shot(tmp_path)[1:]
    assert untouched == ("untouched", "32 bits", "1", "-3.000", "-6.000", "0.750")
    assert tuned == (
        "fine-tuned on code with SAM", "32 bits", "2", "-1.500 ± 0.500", "-3.000 ± 1.000", "0.375 ± 0.125",
    )  # fmt: skip
    assert [cells[1] for cells in in_4_bits] == ["4 bits", "4 bits"]


def test_whether_the_gain_is_largest_where_data_are_few(tmp_path: Path) -> None:
    opened = Records(tmp_path / "studies-glue.csv", "glue", {"model": "m"}, AROUND)
    labels = "01" * 50
    for share, gained in ((5, 12), (100, 2)):
        for seed in range(3):
            for method, wrong in (("adamw", 30 + seed), ("sam", 30 + seed - gained)):
                predictions = "".join("10"[int(c)] if k < wrong else c for k, c in enumerate(labels))
                examples = {"labels": labels, "predictions": predictions}
                scores = {"accuracy": 1 - wrong / 100, "score": 1 - wrong / 100}
                opened.add(f"report/rte/{share}", method, seed, {}, scores, steps=10, cpu_seconds=1.0, examples=examples)
    opened.close()
    table = {cells[1]: cells for cells in verdicts.sam(tmp_path)[1:]}
    few = table["SAM's gain at 5 % less that at 100 % of the data, RTE"]
    assert few[2].startswith("+10.00 ± ")
    assert few[3:] == ("3 x 100", analysis.CONFIRMED)
