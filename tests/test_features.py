"""The table of features: its probes say of fastpost what is so, and no answer holds a place of some machine."""

from __future__ import annotations

import re

import torch

from fastpost.bench import features, features_distillation, features_names, features_sam
from fastpost.conformance.adapter import Adapter


def test_every_loss_that_is_asked_for_is_found_right() -> None:
    loss = features_distillation.of_fastpost
    for name, options in features_distillation.QUESTIONS.items():
        found = features_distillation.attempt(name, lambda o=options: features_distillation.right(loss, o))
        if "group" not in options:  # a process group is made for that one
            assert found.result == "yes", found


def test_a_wrong_loss_and_a_missing_argument_are_told_apart() -> None:
    def twice(problem: features_distillation.Problem, **options: object) -> torch.Tensor:
        return 2 * features_distillation.of_fastpost(problem, **options)

    assert features_distillation.attempt("x", lambda: features_distillation.right(twice, {})).result == "no"
    found = features_distillation.attempt(
        "x", lambda: features_distillation.right(features_distillation.of_torch, {"divergence": "js"})
    )
    assert (found.result, found.detail) == ("no", "not by F.kl_div alone")
    assert features_distillation.attempt("x", lambda: 1 / 0).result == "error"  # type: ignore[arg-type, return-value]


def test_what_is_held_between_the_passes_and_how_a_step_is_made() -> None:
    adapter = features_sam.ADAPTERS["fastpost"]
    assert round(features_sam.held(adapter, torch.float32), 2) == 4
    assert features_sam.ways(adapter)[0] == "two calls or step(closure)"
    assert features_sam.m_sam("fastpost", adapter)[0] == "yes"
    assert isinstance(adapter, Adapter)
    assert {"GSAM", "DecoupledWSAM", "ZerothOrderSAM"} <= set(features_sam.variants("fastpost")[0].split(", "))


def test_names_are_found_and_not_invented() -> None:
    found = {f.feature: f.result for f in features_names.findings("fastpost")}
    assert set(found.values()) == {"yes"}
    for pattern, names, others in (
        ("R-Drop", ("RDrop", "linear_r_drop_loss"), ("r_dropout", "MaskFormerDropPath")),
        ("NPO", ("npo_loss", "NPOTrainer"), ("snapshot",)),
        ("SymNoise", ("SymNoise", "sym_noise"), ("asymmetric_noise",)),
        ("HyPe", ("HyPe",), ("HyperNet", "hyperparameters")),
        ("GRU (rectified gradients)", ("SurgeryWindow",), ("GRU", "GRUCell")),
        ("SAGO", ("SAGO", "sago_combine"), ("Massago",)),
        ("SMART", ("SMARTLoss",), ("autocast_smart_context_manager",)),
    ):
        regex = {**features_names.REGULARISERS, **features_names.UNLEARNING, **features_names.SURGERY}[pattern]
        assert all(re.search(regex, name, re.IGNORECASE) for name in names), pattern
        assert not any(re.search(regex, name, re.IGNORECASE) for name in others), pattern


def test_reasons_hold_no_address_and_no_path() -> None:
    told = features.without_places("ERROR: no x in https://host.example/simple/x/ or /some/folder/x.whl\nmore")
    assert told == "ERROR: no x in ... or ..."
    assert all(row["detail"] == features.without_places(row["detail"]) for row in features.read())


def test_every_answer_has_a_library_that_is_known_and_a_date() -> None:
    rows = features.read()
    assert {row["library"] for row in rows} == set(features.LIBRARIES)
    assert all(row["date"] and row["result"] for row in rows)
    ours = [row for row in rows if row["library"] == "fastpost" and row["family"] != "SAM"]
    assert all(row["result"] not in ("no", "error") for row in ours)
