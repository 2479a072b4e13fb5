"""Linear probes: what they score on features that hold an answer and on those that hold none, and the chain end to end."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from fastpost.bench.studies import probe as command
from fastpost.bench.studies import results as shared
from fastpost.bench.studies import tuning
from fastpost.bench.studies.__main__ import main
from fastpost.r3f.probe import encoder_of, features, linear_probe
from tests.conftest import bits
from tests.tiny import Batch, batch_for, build, pad, word_level_bert

WORDS = ("the", "a", "of", "file", "socket", "test", "thread", "window", "number", "date", "mail", "parse", "return", "read")


def planted(rows: int, seed: int, width: int = 20) -> tuple[Tensor, Tensor]:
    """Features in which one direction says the label, with a margin."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    x[:, 3] = (2.0 * labels - 1) * (1 + x[:, 3].abs())
    return x, labels


# -- the probe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [None, 1.0])
def test_separable_features_are_told_apart(C: float | None) -> None:
    result = linear_probe(*planted(300, 0), *planted(400, 1), C=C)
    assert result.accuracy > 0.98
    assert result.converged
    assert (result.train_size, result.test_size) == (300, 400)
    assert C is None or result.C == C


def test_shuffled_labels_give_chance() -> None:
    (x, y), (x_test, y_test) = planted(300, 0), planted(1000, 1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    result = linear_probe(x, y[order], x_test, y_test)
    assert abs(result.accuracy - 0.5) < 4 * result.standard_error + 0.02


@pytest.mark.parametrize("C", [None, 0.01])
def test_result_is_what_it_says(C: float | None) -> None:
    generator = torch.Generator().manual_seed(5)
    (x, y), (x_test, y_test) = planted(200, 3), planted(150, 4)
    x[:, 3] += 3 * torch.randn(200, generator=generator)
    x_test[:, 3] += 3 * torch.randn(150, generator=generator)
    y_test[:20] = 2  # a class that training never saw
    result = linear_probe(x, y, x_test, y_test, C=C)
    assert result.correct.dtype == torch.bool
    assert not bool(result.correct[:20].any())
    assert result.accuracy == pytest.approx(int(result.correct.sum()) / 150)
    p = result.accuracy
    assert result.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 150))
    assert result.majority == max(int((y_test == k).sum()) for k in range(3)) / 150
    again = linear_probe(x, y, x_test, y_test, C=C)
    assert torch.equal(again.correct, result.correct)
    assert "±" in str(result)
    # standardised with the training rows alone: units and offsets change nothing
    moved = linear_probe(x * 1e3 + 7, y, x_test * 1e3 + 7, y_test, C=C)
    assert int((moved.correct != result.correct).sum()) <= 1


def test_a_class_of_one_row_and_a_solver_that_is_stopped() -> None:
    x, y = planted(30, 0)
    y[:] = 0
    y[4] = 1
    assert linear_probe(x, y, x, y).C == 1.0
    assert not linear_probe(*planted(300, 0), *planted(30, 1), C=1e6, max_iter=1).converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": torch.zeros(3)}, r"train must be \(rows, width\)"),
        ({"test": torch.zeros(0, 20)}, "test must be"),
        ({"train_labels": torch.zeros(7, dtype=torch.long)}, r"train_labels have shape \(7,\), expected \(30,\)"),
        ({"test": torch.zeros(20, 5)}, "20 wide, test features 5"),
        ({"train_labels": torch.ones(30, dtype=torch.long)}, "all the same"),
        ({"train": torch.full((30, 20), math.nan)}, "train features are not finite"),
        ({"C": 0.0}, "C must be finite and > 0"),
        ({"max_iter": 0}, "max_iter >= 1"),
    ],
)
def test_bad_features(change: dict, message: str) -> None:
    (x, y), (x_test, y_test) = planted(30, 0), planted(20, 1)
    given = {"train": x, "train_labels": y, "test": x_test, "test_labels": y_test, **change}
    with pytest.raises(ValueError, match=f"^probe: .*{message}"):
        linear_probe(**given)


def test_labels_must_be_integers() -> None:
    (x, y), (x_test, y_test) = planted(30, 0), planted(20, 1)
    with pytest.raises(TypeError, match="test_labels must be integers"):
        linear_probe(x, y, x_test, y_test.float())


# -- features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequence", "roberta", "causal", "seq2seq", "t5"])
def test_frozen_means_that_no_bit_changes(kind: str) -> None:
    model, batch = build(kind, dropout=0.3), batch_for(kind)
    encoder_of(model).eval()
    next(encoder_of(model).children()).train()  # a mode of its own, which is put back
    before = [bits(t) for t in model.state_dict().values()]
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    vectors = [features(model, [batch], pooling="mean") for _ in range(2)]
    assert torch.equal(*vectors)  # dropout is off
    assert vectors[0].shape == (4, 24)
    assert not vectors[0].requires_grad
    assert all(torch.equal(bits(t), b) for t, b in zip(model.state_dict().values(), before, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_poolings() -> None:
    model, batch = build("sequence").eval(), batch_for("sequence")
    mask = batch["attention_mask"]
    with torch.no_grad():
        out = model.bert(input_ids=batch["input_ids"], attention_mask=mask)  # type: ignore[operator]
    hidden = out.last_hidden_state
    expected = {
        "first": hidden[:, 0],
        "mean": torch.stack([row[: int(m.sum())].mean(0) for row, m in zip(hidden, mask, strict=True)]),
        "pooler": out.pooler_output,
    }
    for pooling, vectors in expected.items():
        torch.testing.assert_close(features(model, [batch], pooling=pooling), vectors)
        halves: list[Batch] = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
        torch.testing.assert_close(features(model, halves, pooling=pooling), vectors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features(model, [pad(batch, 5)], pooling=pooling), vectors, rtol=1e-4, atol=1e-5)
    assert features(model.bfloat16(), [batch]).dtype == torch.float32


def test_other_encoders() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids[..., None].double().expand(*input_ids.shape, 3)

    ids = torch.arange(6).view(2, 3)
    torch.testing.assert_close(features(Plain(), [{"input_ids": ids}], pooling="mean"), torch.tensor([[1.0] * 3, [4.0] * 3]))
    model = build("sequence")
    assert torch.equal(features(model, [{"input_ids": ids}], encoder=Plain()), torch.tensor([[0.0] * 3, [3.0] * 3]))
    with pytest.raises(ValueError, match="no pooler_output"):
        features(Plain(), [{"input_ids": ids}], pooling="pooler")
    with pytest.raises(ValueError, match=r"unknown pooling 'meen'\. Did you mean 'mean'"):
        features(model, [batch_for("sequence")], pooling="meen")
    with pytest.raises(ValueError, match="no batches"):
        features(model, [])
    with pytest.raises(TypeError, match="no hidden states"):
        features(nn.Linear(3, 3), [{"input": torch.zeros(2, 3)}])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        features(lambda **_: 0, [{"input_ids": ids}])


# -- the chain ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return word_level_bert(tmp_path_factory.mktemp("model"), WORDS)


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """RTE and CoLA in GLUE's form, with a rule to learn: whether a text speaks of a file."""
    root = tmp_path_factory.mktemp("glue")
    generator = torch.Generator().manual_seed(1)

    def text() -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (6,), generator=generator))

    (root / "RTE").mkdir()
    (root / "CoLA").mkdir()
    for split, count in (("train", 120), ("dev", 40)):
        texts = [text() for _ in range(count)]
        pairs = [f"{i}\t{t}\t{text()}\t{'' if 'file' in t else 'not_'}entailment" for i, t in enumerate(texts)]
        (root / "RTE" / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *pairs]) + "\n", "utf-8")
        (root / "CoLA" / f"{split}.tsv").write_text("".join(f"x\t{int('file' in t)}\t\t{t}\n" for t in texts), "utf-8")
    return root


def options(tiny: Path, glue: Path, out: Path, *extra: str) -> list[str]:
    given = "--tasks cola,rte --methods adamw,r3f --seeds 0,1 --train-size 24 --probe-size 60 --max-steps 2 --batch-size 4"
    return ["probe", "--model", str(tiny), "--data-dir", str(glue), "--output-dir", str(out), *given.split(), *extra]


def read(out: Path) -> list[dict[str, str]]:
    with open(out / "probe.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_chain_from_one_end_to_the_other(tiny, glue, tmp_path, capsys) -> None:
    assert main(options(tiny, glue, tmp_path, "--probes", "rte,cola")) == 0
    rows = read(tmp_path)
    probes = [(r["method"], r["seed"], r["stage"], r["trained_on"], r["task"]) for r in rows if r["kind"] == "probe"]
    assert probes == [
        *(("pretrained", "0", "0", "", task) for task in ("rte", "cola")),
        *(
            (method, seed, stage, trained, task)
            for seed in "01"
            for method in ("adamw", "r3f")
            for stage, trained in (("1", "cola"), ("2", "rte"))
            for task in ("rte", "cola")
        ),
    ]
    heads = [(r["method"], r["seed"], r["task"]) for r in rows if r["kind"] == "head"]
    assert heads == [(m, s, t) for s in "01" for m in ("adamw", "r3f") for t in ("cola", "rte")]
    for row in rows:
        p, n = float(row["accuracy"]), int(row["test_size"])
        assert n == 40
        assert p * n == pytest.approx(round(p * n))
        assert float(row["standard_error"]) == pytest.approx(math.sqrt(p * (1 - p) / n))
        assert 0.5 <= float(row["majority"]) < 1
        assert int(row["train_size"]) == (60 if row["kind"] == "probe" else 24)
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part*"))
    shown = capsys.readouterr().out
    assert "2 seed(s)" in shown
    assert "fitted to 60, scored on 40" in shown
    assert shown.count("±") == 12 + 2 + 4 + 1  # probes, differences, heads, caption


def test_every_method_runs_and_runs_repeat(tiny, glue, tmp_path) -> None:
    kept = []
    for name in ("a", "b"):
        extra = ["--methods", ",".join(command.METHODS), "--tasks", "rte", "--seeds", "3", "--pooling", "pooler"]
        assert main(options(tiny, glue, tmp_path / name, *extra)) == 0
        kept.append([{k: v for k, v in row.items() if k != "seconds"} for row in read(tmp_path / name)])
    assert kept[0] == kept[1]
    assert {row["method"] for row in kept[0]} == {"pretrained", *command.METHODS}


def test_a_stage_goes_on_with_the_encoder_of_the_one_before(tiny, glue, tmp_path, monkeypatch) -> None:
    states, ends = [], []

    def build(method: str, model: nn.Module, hyper: tuning.Hyperparameters) -> tuning.Trainee:
        if states:
            ends.append({k: bits(v) for k, v in states[-1][1].state_dict().items()})
        states.append(({k: bits(v) for k, v in encoder_of(model).state_dict().items()}, encoder_of(model)))
        return real(method, model, hyper)

    real = command.build
    monkeypatch.setattr(command, "build", build)
    assert main(options(tiny, glue, tmp_path, "--methods", "r4f", "--seeds", "0", "--tasks", "cola,rte,cola")) == 0
    for end, (start, _) in zip(ends, states[1:], strict=True):
        assert all(torch.equal(end[name], start[name]) for name in start)
    assert any(not torch.equal(states[0][0][name], ends[0][name]) for name in ends[0])


def test_probing_changes_no_weight(tiny, glue, tmp_path) -> None:
    plan = command.prepare(command.parse(options(tiny, glue, tmp_path)[1:]))
    data = plan.data["rte"]
    model = data.classifier.fresh(0)
    before = [bits(t) for t in model.state_dict().values()]
    result = command.probe_of(model, data, plan.arguments)
    assert result is not None
    assert all(torch.equal(bits(t), b) for t, b in zip(model.state_dict().values(), before, strict=True))
    assert all(m.training for m in model.modules())
    learnt = {tuple(row["input_ids"]) for row in data.train}
    assert not learnt & {tuple(row["input_ids"]) for row in data.probe}
    assert not tmp_path.joinpath("probe.csv").exists()


def test_differences_are_paired(tmp_path) -> None:
    results = shared.Results(tmp_path, "probe", command.COLUMNS)
    found = command.Found(results, ["rte"], ["cola"], ["adamw", "r3f"])
    right = {"adamw": [[1, 1, 0, 0], [1, 0, 0, 0]], "r3f": [[1, 1, 1, 0], [1, 1, 0, 0]]}
    for method, seeds in right.items():
        for seed, correct in enumerate(seeds):
            p = sum(correct) / 4
            row = {
                "method": method,
                "seed": seed,
                "stage": 1,
                "task": "cola",
                "kind": "probe",
                "accuracy": p,
                "test_size": 4,
            }
            results.add(**row, correct=correct)
    rows = torch.tensor([0.0, 0.5, 0.5, 0.0])
    assert found.difference("r3f", "cola") == pytest.approx((0.25, float(rows.std() / 2)))
    assert found.difference("adamw", "cola") is None
    mean, error, spread = command.mean_and_errors(found.probed("adamw", 1, "cola"))
    assert (mean, error, spread) == pytest.approx((0.375, math.sqrt(0.375 * 0.625 / 4), 0.25 / math.sqrt(2)))
    assert math.isnan(command.mean_and_errors(found.probed("adamw", 1, "cola")[:1])[2])


def test_what_was_computed_survives(tiny, glue, tmp_path, monkeypatch) -> None:
    def build(method: str, model: nn.Module, hyper: tuning.Hyperparameters) -> tuning.Trainee:
        if method == "r3f":
            raise KeyboardInterrupt
        return real(method, model, hyper)

    real = command.build
    monkeypatch.setattr(command, "build", build)
    assert main(options(tiny, glue, tmp_path, "--tasks", "rte")) == 130
    assert [row["method"] for row in read(tmp_path)] == ["pretrained", "adamw", "adamw"]
    assert (tmp_path / "probe.png").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tasks", "cola,rtee"], "unknown task 'rtee'. Did you mean 'rte'?"),
        (["--tasks", ","], "--tasks names none"),
        (["--probes", "colla"], "unknown probe 'colla'. Did you mean 'cola'?"),
        (["--methods", "adamw,r5f"], "unknown method 'r5f'. Did you mean 'r4f'?"),
        (["--seeds", "x"], "--seeds wants whole numbers"),
        (["--pooling", "last"], "unknown pooling 'last'"),
        (["--noise-type", "gauss"], "unknown noise_type 'gauss'"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--max-steps", "0"], "--max-steps must be at least 1 or -1"),
        (["--probe-c", "-1"], "--probe-c must be at least 0"),
        (["--taskz", "rte"], "unknown option '--taskz'. Did you mean '--tasks'?"),
        (["--data-dir", "/nowhere"], "--data-dir /nowhere is not a folder"),
        (["--tasks", "mrpc"], "train.tsv is missing"),
        (["--train-size", "1"], "hold one label only"),
        (["--model", "/nowhere/model"], "--model /nowhere/model cannot be loaded"),
    ],
)
def test_refusals(tiny, glue, tmp_path, capsys, extra, message) -> None:
    assert main(options(tiny, glue, tmp_path / "out", *extra)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_on_real_files(tiny, tmp_path) -> None:
    root = Path(os.environ.get("FASTPOST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "glue"
    if not root.is_dir():
        pytest.skip(f"no GLUE files in {root.parent} (FASTPOST_DATA)")
    extra = ["--tasks", "cola,mrpc,rte", "--seeds", "0", "--methods", "r4f", "--test-size", "32", "--max-length", "16"]
    assert main(options(tiny, root, tmp_path, *extra)) == 0
    assert len(read(tmp_path)) == 3 + 3 * 4
