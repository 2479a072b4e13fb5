"""Options of SAM and R3F: as arguments, on command lines, in YAML and JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Trainer

from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.transformers import (
    PostTrainer,
    PostTrainingArguments,
    R3FTrainer,
    SAMTrainer,
    parse_arguments,
)

from . import tiny
from .trainers import arguments, rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sam_rho": -1.0}, "sam_rho must be finite and >= 0, not -1.0"),
        ({"sam_rho": float("nan")}, "sam_rho must be finite"),
        ({"sam_eta": -0.1}, "sam_eta must be finite"),
        ({"sam_ascent_fraction": 0.0}, "ascent_fraction must lie in"),
        ({"sam_interval": 0}, "interval must be a whole number"),
        ({"sam_rounding": "stochastc"}, "Did you mean 'stochastic'"),
        ({"sam_dropout_rng": "sane"}, "Did you mean 'same'"),
        ({"sam_per_micro_batch": True, "sam_ascent_fraction": 0.5}, "leave one of the two out"),
        ({"r3f_lambda": -1.0}, "r3f_lambda must be finite and >= 0"),
        ({"r3f_eps": -1.0}, "eps"),
        ({"noise_type": "unifrom"}, "Did you mean 'uniform'"),
        ({"r3f_noise_scale": "neftun"}, "Did you mean 'neftune'"),
        ({"method": "samlm"}, "Did you mean 'sam_lm'"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostTrainingArguments(str(tmp_path), use_cpu=True, **options)
    with pytest.raises(ValueError, match=message):
        PostTrainingOptions(**options)


def test_defaults_are_those_of_the_library_and_sam_lm_and_asam_are_presets() -> None:
    plain, lm = PostTrainingOptions(), PostTrainingOptions(method="sam_lm")
    assert (plain.sam_rho, plain.sam_ascent_fraction, plain.r3f_eps, plain.r3f_lambda) == (0.05, 1.0, 1e-5, 1.0)
    assert (lm.sam_rho, lm.sam_ascent_fraction) == (0.15, 0.25)
    assert PostTrainingOptions(method="sam_lm", sam_rho=0.1).sam_rho == 0.1
    adaptive = PostTrainingOptions(method="asam")
    assert (adaptive.sam_rho, adaptive.sam_adaptive, adaptive.sam_ascent_fraction) == (0.5, True, 1.0)
    assert PostTrainingOptions(method="asam", sam_rho=0.1).sam_rho == 0.1


def test_the_parser_of_transformers_reads_them() -> None:
    parser: Any = HfArgumentParser(PostTrainingArguments)
    words = "--output_dir out --use_cpu --method sam --sam_rho 0.15 --sam_adaptive --r3f_lambda 0.5 --sam_sync_ascent false"
    (args,) = parser.parse_args_into_dataclasses(words.split())
    assert (args.method, args.sam_rho, args.sam_adaptive, args.r3f_lambda) == ("sam", 0.15, True, 0.5)
    assert args.sam_sync_ascent is False
    assert args.to_dict()["sam_ascent_fraction"] == 1.0


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_files_of_settings_under_what_is_typed(tmp_path: Path, form: str) -> None:
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "method": "sam_lm",
        "learning_rate": 1e-4,
        "sam_adaptive": True,
        "label_names": ["labels"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }
    path = tmp_path / f"run.{form}"
    text = json.dumps(settings) if form == "json" else "\n".join(f"{k}: {json.dumps(v)}" for k, v in settings.items())
    path.write_text(text, encoding="utf-8")
    args = parse_arguments(argv=[str(path), "--sam_rho", "0.3"])
    assert (args.method, args.sam_rho, args.sam_ascent_fraction, args.sam_adaptive) == ("sam_lm", 0.3, 0.25, True)
    assert (args.learning_rate, args.label_names, args.lr_scheduler_kwargs) == (1e-4, ["labels"], {"num_cycles": 2})

    @dataclass
    class Data:
        texts: str = "some"

    _, data = parse_arguments((PostTrainingArguments, Data), [str(path), "--texts", "mine"])
    assert data.texts == "mine"


def test_files_as_transformers_reads_and_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: out\nuse_cpu: true\nlearning_rate: 2e-5\nr3f_eps: 1e-5\nsam_rho: 1e-1\nrun_name: --x\n"
        "report_to: [tensorboard, none]\noptim_target_modules: [attn, mlp]\n"
    )
    for args in (parse_arguments(argv=[str(path)]), HfArgumentParser(PostTrainingArguments).parse_yaml_file(str(path))[0]):
        assert (args.r3f_eps, args.sam_rho, float(args.learning_rate), args.run_name) == (1e-5, 0.1, 2e-5, "--x")
        assert args.optim_target_modules == ["attn", "mlp"]
    args = PostTrainingArguments("out", use_cpu=True, report_to="none", sam_rho=0.3)
    path = tmp_path / "args.json"
    path.write_text(args.to_json_string())
    assert parse_arguments(argv=[str(path)]).to_dict() == args.to_dict()
    path.write_text('{"output_dir": "out", "r3f_eps": "small"}')
    with pytest.raises(ValueError, match="r3f_eps: invalid float value: 'small'"):
        parse_arguments(argv=[str(path)])
    with pytest.raises(ValueError, match="sam_rho must be a number, not 'large'"):
        PostTrainingArguments("out", use_cpu=True, sam_rho="large")


def test_settings_of_a_file_are_read_as_if_typed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"

    def parsed(text: str) -> PostTrainingArguments:
        path.write_text(f"use_cpu: yes\nreport_to: none\n{text}")
        return parse_arguments(argv=[str(path)])

    args = parsed(
        "output_dir: 2024-05-01\nrun_name: 7\nlabel_names: labels\nsave_strategy: no\nbf16: off\nsam_adaptive: yes\n"
    )
    assert (args.output_dir, args.run_name, args.label_names) == ("2024-05-01", "7", ["labels"])
    assert (args.save_strategy, args.bf16, args.sam_adaptive) == ("no", False, True)
    args = parsed("output_dir: out\ngradient_checkpointing_kwargs: {use_reentrant: no}\nlabel_names: [a, 1]\n")
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert args.label_names == ["a", "1"]
    for line, message in (
        ("max_steps: 1.5", "max_steps: invalid int value: '1.5'"),
        ("per_device_train_batch_size: 4.0", "invalid int value: '4.0'"),
        ("sam_rho: true", "sam_rho: invalid float value: 'True'"),
        ("sam_adaptive: 3", "sam_adaptive: Truthy value expected"),
        ("learning_rate: [1, 2]", "learning_rate takes one value, not a list"),
        ("lr_scheduler_type: linea", "invalid choice: 'linea'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parsed(f"output_dir: out\n{line}\n")


def test_the_embedding_by_its_name(tmp_path: Path) -> None:
    args = arguments(tmp_path, 1, method="r3f", r3f_embedding="transformer.wte")
    trainer = R3FTrainer(tiny.build("causal"), args, train_dataset=rows())
    assert trainer.r3f.embedding == "transformer.wte"
    trainer.train()
    args = arguments(tmp_path, 1, method="r3f", r3f_embedding="transformer.wt")
    with pytest.raises(ValueError, match=r"Did you mean 'transformer\.wte'"):
        R3FTrainer(tiny.build("causal"), args, train_dataset=rows()).train()


def test_what_does_not_exist_names_the_nearest_that_does(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown option '--sam_roh'\. Did you mean '--sam_rho'"):
        parse_arguments(argv=["--output_dir", "out", "--use_cpu", "--sam_roh", "0.1"])
    path = tmp_path / "run.yaml"
    path.write_text("r3f_lambd: 1.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Did you mean 'r3f_lambda'"):
        parse_arguments(argv=[str(path)])
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse_arguments(argv=["none.yaml"])


def test_methods_and_classes_that_do_not_go_together(tmp_path: Path) -> None:
    model = tiny.build("causal")
    with pytest.raises(ValueError, match="does sam, not method='r3f'"):
        SAMTrainer(model, arguments(tmp_path, method="r3f"), train_dataset=rows())
    with pytest.raises(ValueError, match="does r3f, not method='sam_lm'"):
        R3FTrainer(model, arguments(tmp_path, method="sam_lm"), train_dataset=rows())
    with pytest.raises(ValueError, match="which is None"):
        PostTrainer(model, arguments(tmp_path), train_dataset=rows())
    with pytest.raises(ValueError, match="leave post_training out"):
        SAMTrainer(model, arguments(tmp_path), train_dataset=rows(), post_training=PostTrainingOptions())
    trainer = PostTrainer(model, arguments(tmp_path, 1, method="none"), train_dataset=rows())
    trainer.train()
    assert trainer.sam is None
    assert issubclass(PostTrainer, Trainer)


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, fastpost, fastpost.integrations, fastpost.integrations.options, fastpost.sam.optimizer\n"
        "assert not {'transformers', 'accelerate', 'trl', 'peft', 'lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("module", "missing"), [("transformers", "transformers"), ("trl", "trl")])
def test_a_missing_framework_says_what_to_install(module: str, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import fastpost.integrations.{module}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"pip install 'fastpost[{module}]'" in ran.stderr.splitlines()[-1]
