"""Secrets by name, in URLs, in texts and in pickles of arguments."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastpost.cli.train_options import DataOptions, GapOptions
from fastpost.integrations.masking import MASK, Mask, is_secret, masked_in
from fastpost.integrations.transformers import PostTrainingArguments, Seq2SeqPostTrainingArguments

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUv"


TELLING = """hub_token push_to_hub_token
    HF_TOKEN WANDB_API_KEY apiKey api-key accessKey secret AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID
    password db_passwd PGPASSWORD pwd passphrase credentials private_key key authToken --hub_token clientSecret"""
PLAIN = """gap_max_tokens
    average_tokens_across_devices include_num_input_tokens_seen tokenizer TOKENIZERS_PARALLELISM pad_token
    eos_token_id token_type_ids HF_TOKEN_PATH key_column monkey keys turkey max_length hub_model_id bearing OLDPWD"""


@pytest.mark.parametrize("name", TELLING.split())
def test_names_that_tell_a_secret(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", PLAIN.split())
def test_names_that_do_not(name: str) -> None:
    assert not is_secret(name)


def test_of_all_options_the_tokens_are_secret_and_no_other() -> None:
    """A new version of transformers that brings another shows here."""
    names = {f.name for c in (PostTrainingArguments, DataOptions, GapOptions) for f in fields(c)}
    assert {name for name in names if is_secret(name)} == {"hub_token"}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pa55word@host.org/data?x=1", f"https://{MASK}@host.org/data?x=1"),
        ("s3://user@bucket", f"s3://{MASK}@bucket"),
        ("https://host.org/a?token=abc&x=1", f"https://host.org/a?token={MASK}&x=1"),
        ("betas=1,api_key=abc,eps=2", f"betas=1,api_key={MASK},eps=2"),
        ("{'api_key': 'abc', 'x': 1}", f"{{'api_key': '{MASK}', 'x': 1}}"),
        ('{"password":"abc"}', f'{{"password":"{MASK}"}}'),
        ("Authorization: Bearer abcdefgh12345", f"Authorization: Bearer {MASK}"),
        (f"401 for {TOKEN}.", f"401 for {MASK}."),
        ("UID=sa;PWD=hunter2pass", f"UID=sa;PWD={MASK}"),
        ("argument --hub_token: expected one argument", "argument --hub_token: expected one argument"),
        ("the pad_token=[PAD] and a token", "the pad_token=[PAD] and a token"),
        ("mail a@b.org about 1 token: none left", "mail a@b.org about 1 token: none left"),
    ],
)
def test_texts(text: str, masked: str) -> None:
    assert Mask().text(text) == masked


def test_where_something_lies_is_no_secret(tmp_path, monkeypatch) -> None:
    """The working folder, which shells put into the environment, and a file that holds a key: paths of runs begin so."""
    (tmp_path / "key.json").touch()
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.setenv("SOME_API_KEY", "/sesame/street/7")
    mask = Mask(os.environ)
    assert mask.text(f"--output_dir {tmp_path}/out /sesame/street/7") == f"--output_dir {tmp_path}/out {MASK}"
    arguments = PostTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    assert pickle.loads(pickle.dumps(arguments)).output_dir == arguments.to_dict()["output_dir"] == str(tmp_path / "out")


def test_what_was_seen_as_a_secret_is_masked_wherever_it_occurs() -> None:
    mask = Mask({"hub_token": "swordfish-1", "nested": [{"deep": {"db_password": "abc"}}], "key": 4711, "other": "plain"})
    mask.add_words(["--apiKey", "openseSAME", "--secret=half/time", "--hub_token", "--bf16", "True"])
    said = "swordfish-1 or openseSAME or half/time, abc abcd 4711 47110 plain True"
    assert mask.text(said) == f"{MASK} or {MASK} or {MASK}, {MASK} abcd {MASK} 47110 plain True"
    assert mask.value({"a": ("x", "swordfish-1"), "hub_token": "new", "key": True, "password": None}) == {
        "a": ["x", MASK],
        "hub_token": MASK,
        "key": True,
        "password": None,
    }


def test_what_transformers_masks_stays_as_it_is(tmp_path: Path) -> None:
    plain = PostTrainingArguments(str(tmp_path), use_cpu=True)
    assert plain.to_dict()["hub_token"] == "<HUB_TOKEN>"
    own = transformers.TrainingArguments(str(tmp_path), use_cpu=True).to_dict()
    assert {name: value for name, value in plain.to_dict().items() if name in own} == own


def test_a_command_line_is_shown_without_them() -> None:
    words = ["fastpost", "--hub_token", "a b'c", "--api-key=x", "--out", "d e", "--password", "--bf16"]
    assert Mask().command(words) == f"fastpost --hub_token '{MASK}' '--api-key={MASK}' --out 'd e' --password --bf16"


def test_masks_are_found_again() -> None:
    assert masked_in({"a": [{"b": MASK}]})
    assert masked_in(f"https://{MASK}@host")
    assert masked_in(f"a=1,key={MASK}")
    assert not masked_in({"run_name": "*** best ***", "a": [1, None]})


@pytest.mark.parametrize("cls", [PostTrainingArguments, Seq2SeqPostTrainingArguments])
def test_pickles_and_prints_of_arguments_hold_no_secret_and_copies_do(cls: Any, tmp_path: Path) -> None:
    nested = {"use_reentrant": False, "api_key": "open-sesame"}
    made = cls(str(tmp_path), use_cpu=True, hub_token=TOKEN, activation_checkpointing_kwargs=nested, run_name="open-sesame!")
    stored = pickle.dumps(made)
    assert TOKEN.encode() not in stored
    assert b"open-sesame" not in stored
    back = pickle.loads(stored)
    assert back.hub_token is None
    assert (back.method, back.sam_rho, back.output_dir) == (made.method, made.sam_rho, made.output_dir)
    assert back.activation_checkpointing_kwargs == {"use_reentrant": False, "api_key": MASK}
    for text in (repr(made), str(made), made.to_json_string(), str(made.to_sanitized_dict())):
        assert TOKEN not in text
        assert "open-sesame" not in text
        assert "use_reentrant" in text
    for twin in (copy.copy(made), copy.deepcopy(made)):
        assert (twin.hub_token, twin.activation_checkpointing_kwargs) == (TOKEN, nested)
    assert copy.deepcopy(made).activation_checkpointing_kwargs is not nested
    assert copy.copy(made).activation_checkpointing_kwargs is nested
    assert isinstance(back, transformers.TrainingArguments)
