"""`fastpost train`: no file, message or log holds a token, a key or a password."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastpost.cli import main, train_checkpoints, train_options, train_run

from .train_cli import COMMON, Page, words_of

TOKEN = "hf_QwErTyUiOpAsDfGhJkLzXc"
SECRETS = {
    "token": TOKEN,
    "nested key": "nested-sesame-77",
    "key in a word": "inword-sesame-88",
    "of the environment": "environ-sesame-99",
    "password in an address": "address-sesame-66",
}
EVERY = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2", "--report_to", "tensorboard"]
WITH_SECRETS = [
    "--hub_token", TOKEN,
    "--activation_checkpointing_kwargs", '{"use_reentrant": false, "api_key": "nested-sesame-77"}',
    "--optim_args", "foo=1,secret=inword-sesame-88",
    "--run_name", "see environ-sesame-99 and https://me:address-sesame-66@host.org",
]  # fmt: skip


def holders(folder: Path) -> list[tuple[str, str]]:
    """Which file holds which secret, as text or inside of a pickle."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [(what, path.name) for what, secret in SECRETS.items() if secret.encode() in content]
    return found


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", SECRETS["of the environment"])


def test_no_file_of_a_run_holds_a_secret(models, files, tmp_path, capfd) -> None:
    """run.yaml, report.html, metrics, trainer_state.json, training_args.bin of all checkpoints, TensorBoard's events."""
    out = tmp_path / "out"
    assert main(words_of("sam", models, files, out, *EVERY, *WITH_SECRETS)) == 0
    names = {path.name for path in out.rglob("*")}
    assert {"run.yaml", "report.html", "metrics.csv", "training_args.bin", "trainer_state.json", "checkpoint-2"} <= names
    assert any(name.startswith("events") for name in names)
    assert holders(out) == []
    said = "".join(capfd.readouterr())
    assert not [secret for secret in SECRETS.values() if secret in said]
    for path in (out / "training_args.bin", out / "checkpoint-1" / "training_args.bin"):
        kept = torch.load(path, weights_only=False)
        assert (kept.hub_token, kept.sam_rho) == (None, 0.2)
    page = Page.of(out)
    listed = dict(page.tables["options"])
    assert listed["--hub_token"] == "***"
    assert listed["--optim_args"] == "foo=1,secret=***"
    assert listed["--run_name"] == "see *** and https://***@host.org"
    assert "--hub_token '***'" in " ".join(page.seen)


def test_the_file_of_options_is_the_run_again_but_for_what_was_masked(models, files, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(words_of("sam", models, files, out, "--hub_token", TOKEN)) == 0
    text = (out / "run.yaml").read_text(encoding="utf-8")
    assert text.startswith("# hub_token is left out: secrets are not written\n")
    assert "hub_token" not in yaml.safe_load(text)
    assert main(["train", str(out / "run.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    nested = tmp_path / "nested"
    assert main(words_of("sam", models, files, nested, *WITH_SECRETS)) == 0
    capsys.readouterr()
    again = ["train", str(nested / "run.yaml"), "--output_dir", str(tmp_path / "more")]
    assert main(again) == 2
    assert "activation_checkpointing_kwargs in the file of options holds a secret that was masked" in capsys.readouterr().err
    assert main([*again, *WITH_SECRETS]) == 0


def test_secrets_of_a_file_of_options_are_known_too(models, files, tmp_path) -> None:
    path = tmp_path / "run.yaml"
    settings = {
        "hub_token": TOKEN,
        "run_name": f"about {TOKEN}",
        "activation_checkpointing_kwargs": {"api_key": "nested-sesame-77"},
    }
    path.write_text(yaml.safe_dump(settings))
    words = words_of("sam", models, files, tmp_path / "out", *EVERY)
    assert main(["train", str(path), *words[1:]]) == 0
    assert holders(tmp_path / "out") == []


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", TOKEN, "--train_file", f"nowhere/{TOKEN}.txt"],
        ["--hub_token", TOKEN, "--optim", TOKEN],
        ["--hub_token", TOKEN, "--max_steps", TOKEN],
        [f"--hub-token={TOKEN}", "--metric_for_best_model", TOKEN],
        ["--hub_tokn", TOKEN],
        [f"--wandb_api_key={TOKEN}"],
        ["--model", "https://me:address-sesame-66@nowhere.example/model"],
        ["--lr_scheduler_kwargs", '{"api_key": "nested-sesame-77"}', "--lr_scheduler_type", "nested-sesame-77"],
        ["--run_name", "x", "--dtype", "environ-sesame-99"],
    ],
)
def test_no_error_holds_one(models, files, tmp_path, capfd, words) -> None:
    assert main([*words_of("sam", models, files, tmp_path / "out"), *words]) == 2
    said = "".join(capfd.readouterr())
    assert "error" in said
    assert not [secret for secret in SECRETS.values() if secret in said], said
    assert not (tmp_path / "out").exists()


def test_a_broken_file_of_options_is_not_quoted(tmp_path, capfd) -> None:
    for name, text in (
        ("x.yaml", f"hub_token: [{TOKEN}\nmethod: sam\n"),
        ("x.json", f'{{"hub_token": "{TOKEN}" "method": 1}}'),
    ):
        (tmp_path / name).write_text(text)
        assert main(["train", str(tmp_path / name)]) == 2
        said = "".join(capfd.readouterr())
        assert name in said
        assert "line" in said
        assert TOKEN not in said


def test_a_traceback_holds_none(models, files, tmp_path, monkeypatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        try:
            raise KeyError(f"token {TOKEN}")
        except KeyError as error:
            raise RuntimeError(f"401 for {TOKEN} and environ-sesame-99") from error

    monkeypatch.setattr(train_checkpoints.RunTrainer, "training_step", fails)
    with pytest.raises(RuntimeError, match=r"401 for \*\*\* and \*\*\*") as raised:
        main(words_of("sam", models, files, tmp_path, "--hub_token", TOKEN))
    assert TOKEN not in "".join(traceback.format_exception(raised.value))


def test_the_command_to_go_on_with_shows_none(models, files, tmp_path, capsys, monkeypatch) -> None:
    told = train_run.Watch.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        told(self, args, state, control, **kwargs)

    monkeypatch.setattr(train_run.Watch, "on_step_end", interrupted)
    assert main(words_of("sam", models, files, tmp_path / "out", "--hub_token", TOKEN)) == 130
    said = capsys.readouterr().out
    assert "--hub_token '***'" in said
    assert TOKEN not in said
    assert holders(tmp_path / "out") == []


def test_gap_and_the_trainer_itself_still_have_them(models, files, tmp_path) -> None:
    words = ["--method", "gap", "--model", models["causal"], "--train_file", files["texts.jsonl"], "--use_cpu"]
    words += ["--gap_steps", "1", "--max_length", "4", "--output_dir", str(tmp_path / "gap")]
    assert main(["train", *words, "--dataset_config", "x"]) == 2
    assert main(["train", *words]) == 0
    run = train_options.parse(words_of("sam", models, files, tmp_path, "--hub_token", TOKEN)[1:])
    assert run.arguments.hub_token == TOKEN
    assert COMMON[0] in run.command
