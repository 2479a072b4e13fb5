"""`fastpost train`: every method against the Trainer and against loops by hand, Ctrl-C and resuming, the report."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastpost
import fastpost.published
from fastpost.cli import main, train_checkpoints, train_data, train_options, train_report, train_run
from fastpost.cli import models as lm
from fastpost.integrations.transformers import PostTrainer, PostTrainingArguments

from .by_hand import distance, largest_difference, sam_by_hand
from .conftest import same_bits
from .train_cli import (
    COMMON,
    LENGTH,
    METHOD_OPTIONS,
    WORDS,
    Page,
    assert_same,
    saved,
    table,
    words_of,
)
from .trainers import BATCH, CLIP, RHO

# -- methods ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_each_method_trains_as_the_trainer_does(models, files, tmp_path, method) -> None:
    words = words_of(method, models, files, tmp_path / "out")
    assert main(words) == 0
    options = train_options.parse(words[1:])
    given = {f: getattr(options.arguments, f) for f in ("learning_rate", "weight_decay", "max_grad_norm", "max_steps")}
    given |= {
        f: getattr(options.arguments, f) for f in ("gradient_accumulation_steps", "r3f_eps", "r3f_seed", "logging_steps")
    }
    given |= {f: getattr(options.arguments, f) for f in ("anchor", "anchor_kl", "anchor_ema_decay")}
    if method not in ("sam_lm", "asam"):
        given["sam_rho"] = options.arguments.sam_rho
    given |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": BATCH, "optim": "adamw_torch"}
    by = method.replace("r4f", "r3f")
    arguments = PostTrainingArguments(str(tmp_path / "hand"), use_cpu=True, method=by, save_strategy="no", **given)
    if method == "asam":
        assert (arguments.sam_adaptive, arguments.sam_rho) == (True, 0.5)
    transformers.set_seed(arguments.seed)
    data = train_data.read(options.data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.data.model)
    if method == "sam_lm":
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.data.model)
        stream = tokenizer(data.train[0].text)["input_ids"]
        rows = [stream[k : k + LENGTH] for k in range(0, len(stream) - LENGTH + 1, LENGTH)]
        train = [{"input_ids": row, "labels": row} for row in rows]
        collate: Any = transformers.default_data_collator
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(options.data.model, num_labels=2)
        train = [
            {**tokenizer(row.text, truncation=True, max_length=LENGTH), "labels": int(row.label == "prose")}
            for row in data.train
        ]
        collate = transformers.DataCollatorWithPadding(tokenizer)
    head = fastpost.R4F(model.classifier) if "r4f" in method else None
    trainer = PostTrainer(model, arguments, train_dataset=train, data_collator=collate)
    trainer.train()
    if head is not None:
        head.merge()
        assert float(torch.linalg.matrix_norm(model.classifier.weight.detach(), 2)) == pytest.approx(1, abs=1e-5)
    result = saved(tmp_path / "out")
    assert_same(result, {k: v for k, v in model.state_dict().items() if k in result})
    assert not same_bits(saved(options.data.model)[min(saved(options.data.model))], result[min(result)])
    rows_there = table(tmp_path / "out")
    assert [int(row["step"]) for row in rows_there] == [1, 2, 3, 4]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [float(row["loss"]) for row in rows_there] == losses
    metric = "eval_perplexity" if method == "sam_lm" else "eval_accuracy"
    assert float(rows_there[-1][metric]) > 0
    if "sam" in method or method == "tram":
        assert float(rows_there[-1]["sam/seen_over_intended"]) == pytest.approx(1, abs=1e-4)
    if by.endswith("r3f"):
        assert float(rows_there[-1]["r3f/symm_kl"]) > 0
    labels = transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label
    assert method == "sam_lm" or labels == {0: "code", 1: "prose"}
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_sam_on_text_is_the_step_of_its_equations(models, files, tmp_path) -> None:
    """Windows of three micro-batches, in the order of the text, from the file to the saved weights."""
    words = ["train", "--method", "sam", "--model", models["still"], "--train_file", files["text.txt"], *COMMON]
    words += ["--output_dir", str(tmp_path), "--sam_rho", str(RHO), "--max_steps", "4"]
    words += ["--optim", "sgd", "--weight_decay", "0", "--learning_rate", "0.3", "--gradient_accumulation_steps", "3"]
    assert main([*words, "--train_sampling_strategy", "sequential"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["still"])
    stream = tokenizer(Path(files["text.txt"]).read_text(encoding="utf-8"))["input_ids"]
    stream = stream[: len(stream) - len(stream) // 10]  # the last tenth is held out
    blocks = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
    batches = [blocks[k : k + BATCH] for k in range(0, 12 * BATCH, BATCH)]
    start, model = (transformers.AutoModelForCausalLM.from_pretrained(models["still"]) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    sam_by_hand(model, [batches[k : k + 3] for k in range(0, 12, 3)], optimizer, RHO, clip=CLIP)
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert distance(model, trained) < 1e-6
    assert distance(start, trained) > 1e-2


@pytest.mark.parametrize("method", ["none", "sam", "sam+r3f", "anchor"])
def test_a_classifier_s_loss_is_the_same_however_a_batch_is_cut(models, files, tmp_path, method) -> None:
    """The mean of its micro-batches, under any method; the Trainer by itself adds the losses of classifiers up."""
    found = []
    for size, cuts in ((8, 1), (2, 4)):
        out = tmp_path / str(cuts)
        extra = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(cuts), "--max_steps", "1"]
        still = ["--learning_rate", "0", "--max_grad_norm", "100", "--train_sampling_strategy", "sequential"]
        zero = ["--r3f_lambda", "0"] if "r3f" in method else ["--anchor_kl", "1e-9"] if method == "anchor" else []
        words = words_of(method, {**models, "encoder": models["plain"]}, files, out, *extra, *still, *zero)
        assert main(words) == 0
        found.append(next((float(row["loss"]), float(row["grad_norm"])) for row in table(out) if row["loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("scored", ["windows", "tasks"])
def test_gap_is_the_library_s_with_halves_that_choose_and_report(models, files, tmp_path, scored) -> None:
    words = ["train", "--method", "gap", "--model", models["causal"], "--train_file", files["texts.jsonl"], "--use_cpu"]
    words += ["--output_dir", str(tmp_path / "out"), "--text_index", "5", "--gap_steps", "4", "--gap_lr", "1e-2"]
    words += ["--gap_max_drift", "100", "--gap_patience", "0", "--max_length", str(LENGTH)]
    loaded = lm.load_lm(models["causal"])
    if scored == "windows":
        words += ["--validation_file", files["held.txt"]]
        text = Path(files["held.txt"]).read_text(encoding="utf-8")
        halves = lm.windows_of(loaded.encode(text), LENGTH + 1)
        choose, report = (lambda m, ids=ids: -float(lm.negative_log_likelihoods(m, ids).mean()) for ids in halves)
    else:
        questions = [
            {"context": f"{a} {b}", "choices": [f" {a}", f" {b}"], "answer": k % 2}
            for k, (a, b) in enumerate(zip(WORDS[:60], WORDS[9:69], strict=True))
        ]
        (tmp_path / "words.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
        words += ["--tasks", str(tmp_path / "words.jsonl")]
        tasks = [fastpost.gap.tasks.read_task(tmp_path / "words.jsonl")]
        choose, report = fastpost.gap.tasks.Suite(tasks, loaded.encode, loaded.decode).halves()
    assert main(words) == 0
    texts = [json.loads(line)["text"] for line in Path(files["texts.jsonl"]).read_text(encoding="utf-8").splitlines()]
    ids = torch.tensor(loaded.encode(texts[5]))
    recipe = fastpost.GAP(4, 1e-2, patience=None, max_drift=100.0)
    result = recipe(loaded.model, ids, evaluate=choose, test=report)
    rows = table(tmp_path / "out")
    for name, values in (("score", result.scores), ("drift", result.drift), ("loss", result.losses)):
        assert [float(row[name]) for row in rows] == values
    kept = rows[result.best_step]
    assert [row["kept"] for row in rows].index("1") == result.best_step
    assert [float(kept["test_untouched"]), float(kept["test_kept"])] == result.test_scores
    there = saved(tmp_path / "out")
    assert_same(there, {name: value for name, value in loaded.model.state_dict().items() if name in there})
    assert {"state that was kept", "time of a step"} <= set(Page.of(tmp_path / "out").seen)


# -- interrupted ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ctrl_c_in(step: int) -> Iterator[None]:
    told = train_run.Watch.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        told(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_run.Watch, "on_step_end", interrupted)
        yield


@pytest.mark.parametrize("method", ["sam", "sam+r3f", "anchor"])
def test_ctrl_c_leaves_a_checkpoint_and_the_command_that_goes_on_as_if_nothing_had_been(
    models, files, tmp_path, capsys, method
) -> None:
    """In the middle of an epoch, with dropout, a schedule and R3F's noise from torch's generator."""
    extra = ["--lr_scheduler_type", "linear", "--max_steps", "7", "--gradient_accumulation_steps", "2"]
    assert main(words_of(method, models, files, tmp_path / "whole", *extra)) == 0
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c_in(step=3):
        assert main(words_of(method, models, files, tmp_path / "cut", *extra)) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert [row["step"] for row in table(tmp_path / "cut")] == ["1", "2", "3"]
    said = capsys.readouterr().out
    assert "checkpoint-3, run this:" in said
    command = next(line for line in said.splitlines() if line.startswith("fastpost train"))
    fresh = [word for word in shlex.split(command)[1:] if word not in ("--resume_from_checkpoint", "True")]
    assert main(fresh) == 2  # nobody mixes two runs by accident
    assert "holds checkpoint-3 of an earlier run" in capsys.readouterr().err
    assert main(shlex.split(command)[1:]) == 0
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))
    assert table(tmp_path / "whole") == table(tmp_path / "cut")


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize(
    ("evaluates", "saves"),
    [("epoch", "no"), ("epoch", "epoch"), ("epoch", "best"), ("steps", "no"), ("steps", "steps"), ("steps", "best")],
)
def test_ctrl_c_in_a_step_that_is_evaluated_loses_nothing(models, files, tmp_path, step, evaluates, saves) -> None:
    a_step = ["--per_device_train_batch_size", "5", "--max_steps", "10"]  # of 20 rows: an epoch ends after steps 4 and 8
    extra = [*a_step, "--eval_strategy", evaluates, "--eval_steps", "2", "--save_strategy", saves, "--save_steps", "2"]
    extra += ["--metric_for_best_model", "loss", "--learning_rate", "1"]  # so large that the first is the best
    assert main(words_of("none", models, files, tmp_path / "whole", *extra)) == 0
    with ctrl_c_in(step):
        assert main(words_of("none", models, files, tmp_path / "cut", *extra)) == 130
    assert train_checkpoints.checkpoints_of(tmp_path / "cut")[0].name == f"checkpoint-{step}"
    assert bool(table(tmp_path / "cut")[-1].get("eval_loss")) == (evaluates == "steps" or step == 4)
    assert main(words_of("none", models, files, tmp_path / "cut", *extra, "--resume_from_checkpoint", "True")) == 0
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))
    assert table(tmp_path / "whole") == table(tmp_path / "cut")


def test_a_second_ctrl_c_stops_at_once(models, files, tmp_path, capsys, monkeypatch) -> None:
    def twice(*_: Any, **kwargs: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train_run.Watch, "on_step_begin", twice, raising=False)
    assert main(words_of("sam", models, files, tmp_path)) == 130
    assert "interrupted before the first whole checkpoint" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


# -- the report -------------------------------------------------------------------------------------------------------------


def test_the_report_of_a_run_with_everything(models, files, tmp_path, capsys) -> None:
    """One page that needs nothing beside itself, with the numbers of metrics.csv; TensorBoard has SAM's."""
    extra = ["--report_to", "tensorboard", "--eval_strategy", "steps", "--eval_steps", "2"]
    extra += ["--gradient_accumulation_steps", "2", "--run_name", "<b>&"]
    out = tmp_path / "out"
    assert main(words_of("sam+r3f", models, files, out, *extra)) == 0
    page, rows = Page.of(out), table(out)
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not {"script", "iframe", "object", "embed", "b" * 99} & set(page.tags)
    text = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", text)
    pictures = [base64.b64decode(a.partition("base64,")[2]) for a in page.addresses if a.startswith("data:image")]
    assert pictures == [(out / "report.png").read_bytes()]
    assert pictures[0].startswith(b"\x89PNG")
    # numbers
    heads = page.heads["metrics"]
    assert {"step", "loss", "eval_accuracy", "sam/seen_over_intended", "sam/seen_cosine", "r3f/symm_kl"} <= set(heads)
    shown = {cells[0]: dict(zip(heads, cells, strict=True)) for cells in page.tables["metrics"]}
    assert list(shown) == ["2", "4"]
    for row in rows:
        if row["step"] in shown:
            for name in heads:
                value = row[name]
                assert shown[row["step"]][name] == (
                    value if name in ("step", "sam/skipped_steps") else train_report.shown(float(value))
                )
    assert "time of a step" in page.seen
    listed = dict(page.tables["options"])
    assert (listed["--method"], listed["--sam_rho"], listed["--run_name"]) == ("sam+r3f", str(RHO), "<b>&")
    assert "--adam_beta1" not in listed
    assert "2 x 2 x 1 examples" in dict(page.tables["facts"])["a step"]
    assert f"best {train_report.shown(max(float(r['eval_accuracy']) for r in rows if r['eval_accuracy']))}" in " ".join(
        page.seen
    )
    # TensorBoard
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (out / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    (name,) = [tag for tag in events.Tags()["scalars"] if tag.endswith("sam/seen_cosine")]
    cosines = [(event.step, event.value) for event in events.Scalars(name)]
    assert cosines == [(int(r["step"]), pytest.approx(float(r["sam/seen_cosine"]))) for r in rows]
    if browser := next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None):
        check_in_a_browser(browser, out, tmp_path)


def check_in_a_browser(browser: str, out: Path, tmp_path: Path) -> None:
    """Rendered without a network on a light and a dark ground: the grounds are what they should be."""
    from matplotlib.image import imread

    grounds = []
    for scheme in (1, 0):  # Blink's numbers for light and dark
        picture = tmp_path / f"{scheme}.png"
        options = (
            "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,900 --host-resolver-rules='MAP * ~'"
        )
        command = [browser, *shlex.split(options), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
        command += [f"--blink-settings=preferredColorScheme={scheme}", (out / "report.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = imread(picture)[..., :3]
        assert pixels.shape == (900, 1000, 3)
        assert pixels.std() > 0.05  # text and pictures
        grounds.append(float(pixels[2, 2].mean()))
    assert grounds[0] > 0.9 > 0.2 > grounds[1]


def test_a_page_of_two_processes(models, files, tmp_path) -> None:
    """torchrun: one result, and the weights that one process with the same batches has."""
    shared = [
        "--train_sampling_strategy",
        "sequential",
        "--optim",
        "sgd",
        "--model",
        models["still"],
        "--train_file",
        files["text.txt"],
    ]
    words = ["train", "--method", "sam", *COMMON, *shared, "--sam_rho", str(RHO), "--max_steps", "2"]
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "fastpost",
         *words, "--output_dir", str(tmp_path / "two"), "--save_strategy", "steps", "--save_steps", "1"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("see ") == 1
    one = [*words, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]
    assert main(one) == 0
    a, b = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert largest_difference((a[name], b[name]) for name in a) < 2e-6
    two = train_checkpoints.checkpoints_of(tmp_path / "two")
    assert [path.name for path in two] == ["checkpoint-2", "checkpoint-1"]
    for checkpoint in two:
        assert train_checkpoints.flaw_of(checkpoint) is None
        (checkpoint / "rng_state_1.pth").unlink()
        assert train_checkpoints.flaw_of(checkpoint) == "no rng_state_1.pth"
    facts = Page.of(tmp_path / "two")
    assert "2 x 1 x 2 examples" in dict(facts.tables["facts"])["a step"]
