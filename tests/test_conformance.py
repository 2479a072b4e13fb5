"""The conformance suite passes optimizers that are right and names the defects of those that are not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

import fastpost
from fastpost.conformance import Adapter, Result, properties, sam_conformance
from fastpost.conformance.__main__ import main

from . import conformance_subjects
from .conformance_subjects import DEFECTS, Dies, Hangs, NormOfOneShard, Right


def missed(results: list[Result]) -> dict[str, str]:
    return {r.property: f"{r.status}: {r.detail}" for r in results if r.status in ("fail", "error")}


ALONE = [prop.name for prop in properties().values() if prop.processes == 1]
TOGETHER = [prop.name for prop in properties().values() if prop.processes > 1]


@pytest.mark.parametrize("style", ["two_step", "closure"])
def test_fastpost_conforms(style: str) -> None:
    not_applicable = (
        {"GradScaler" + s: "no closure" for s in ("", ", first pass", ", second pass")} if style == "closure" else {}
    )
    results = sam_conformance(Adapter(fastpost.SAM, style=style, not_applicable=not_applicable), only=ALONE, table=False)
    assert not missed(results)
    assert sum(r.status == "pass" for r in results) == len(ALONE) - len(not_applicable)


@pytest.mark.usefixtures("forked")
def test_fastpost_conforms_in_two_processes() -> None:
    results = sam_conformance(fastpost.SAM, only=TOGETHER, table=False)
    assert not missed(results)
    assert all(r.status == "pass" for r in results)


def test_an_optimizer_of_plain_torch_conforms() -> None:
    assert not missed(sam_conformance(Right, table=False, only=ALONE))


def test_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's models are on the CPU. Of several GPUs their generators would be read, and torch warns of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delattr(torch.cuda, "get_rng_state")
    assert not missed(sam_conformance(Right, table=False, only=["perturbation", "second gradient"], isolate=False))


@pytest.mark.parametrize("broken", DEFECTS, ids=lambda cls: cls.__name__)
def test_a_defect_fails_its_properties_and_no_others(broken: type[Right]) -> None:
    found = missed(sam_conformance(broken, table=False, only=ALONE))
    assert found.keys() == DEFECTS[broken], found
    assert all(text.startswith("fail: ") for name, text in found.items() if broken.__name__ != "InsistsOnAClosure")


def test_every_property_of_one_process_has_a_defect_that_fails_it() -> None:
    assert set().union(*DEFECTS.values()) == set(ALONE)


@pytest.mark.usefixtures("forked")
def test_defects_of_shards_are_found() -> None:
    found = missed(sam_conformance(NormOfOneShard, only=["FSDP2", "FSDP2 checkpoint"], table=False))
    assert found.keys() == {"FSDP2"}
    assert "perturbed weights differ" in found["FSDP2"]
    from fastpost.conformance.peers import published

    found = missed(sam_conformance(published, only=["FSDP2 restore"], table=False))
    assert "the model still computes with other weights" in found["FSDP2 restore"]


def test_what_hangs_is_ended_and_what_dies_is_told() -> None:
    hung = sam_conformance(Hangs, only=["restore"], time_limit=0.5, table=False)[0]
    assert (hung.status, hung.detail) == ("error", "no answer within 0.5 s")
    hung = sam_conformance(Hangs, only=["DDP"], time_limit=20.0, table=False)[0]
    assert hung.status == "error"
    assert hung.detail.startswith("no answer within 20 s")
    assert "in first_step" in hung.detail
    died, alive = sam_conformance(Dies, only=["restore", "rho zero"], isolate=True, table=False)
    assert (died.status, died.detail) == ("error", "the process ended with exit code 3")
    assert alive.detail == died.detail


def test_what_is_left_out_says_why() -> None:
    results = sam_conformance(lambda *args, **kwargs: Right(*args, **kwargs), only=["rho zero", "DDP"], table=False)
    assert [r.status for r in results] == ["pass", "not applicable"]
    assert "cannot be sent to another process" in results[1].detail
    results = sam_conformance(Right, only=["FSDP2"], distributed=False, table=False)
    assert (results[0].status, results[0].detail) == ("not applicable", "left out: distributed=False")
    results = sam_conformance(Adapter(Right, not_applicable={"restore": "because"}), only=["restore"], table=False)
    assert (results[0].status, results[0].detail) == ("not applicable", "because")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no property is called 'restored'; there are: perturbation, "):
        sam_conformance(Right, only=["restored"])
    with pytest.raises(ValueError, match="time_limit=0: use a positive number"):
        sam_conformance(Right, time_limit=0)
    with pytest.raises(ValueError, match="time_limit=inf: use a positive number"):
        sam_conformance(Right, time_limit=float("inf"))
    with pytest.raises(TypeError, match=r"make_optimizer must be a class or a function of .*, not a module"):
        sam_conformance(json)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"style 'twice': use one of two_step, closure"):
        Adapter(Right, style="twice")
    with pytest.raises(ValueError, match="isolate=True: it cannot be sent"):
        sam_conformance(lambda *args, **kwargs: Right(*args, **kwargs), isolate=True, only=["restore"])


def test_a_closure_called_another_number_of_times_is_a_failure() -> None:
    wrong = sam_conformance(Adapter(Right, style="closure_after_gradient"), only=["restore"], table=False)[0]
    assert (wrong.status, wrong.detail) == (
        "fail",
        "step(closure) called the closure 2 times where 1 were expected",
    )


def test_the_table_tells_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    sam_conformance(Right, only=["rho zero"])
    printed = capsys.readouterr().out
    assert "SAM conformance of Right" in printed
    assert "1 pass" in printed


def test_the_command_prints_json_and_fails_where_a_property_does() -> None:
    command = [sys.executable, "-m", "fastpost.conformance", "tests.conformance_subjects:AssignsData", "--json"]
    command += ["--no-isolate", "--only", "storage", "--only", "restore"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert [(r["property"], r["status"]) for r in found["results"]] == [("storage", "fail"), ("restore", "pass")]
    assert done.returncode == 1
    done = subprocess.run([*command[:3], "tests.conformance_subjects"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "name the optimizer as module:make_optimizer" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Right", "--only", "bogus"], "no property is called 'bogus'; there are: perturbation, "),
        (["Right", "--time-limit", "-1"], "time_limit=-1: use a positive number of seconds"),
        (["torch"], "make_optimizer must be a class or a function"),
        (["NoPickle"], "cannot be sent to another process .*, or add --no-isolate"),
        (["missing"], "AttributeError: module 'tests.conformance_subjects' has no attribute 'missing'"),
    ],
)
def test_wrong_options_of_the_command_are_no_failed_property(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpicklable = lambda *args, **kwargs: Right(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(conformance_subjects, "NoPickle", unpicklable, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main([f"tests.conformance_subjects:{options[0]}", *options[1:]])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
