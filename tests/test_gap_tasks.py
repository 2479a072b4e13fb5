"""Tasks from files, suites of them, and the evaluation harness beside our own scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastpost
from fastpost.gap.harness import harness_scores
from fastpost.gap.tasks import Suite, Task, read_task
from fastpost.gap.zero_shot import Choice, choice_accuracy, mean_of

from .test_gap import tiny_model
from .test_zero_shot import DIALOGUES, letters, spelled


def small_model() -> torch.nn.Module:
    return tiny_model(vocab_size=64, n_positions=96, initializer_range=0.2)


QUESTIONS = [Choice(f"number {k} is", [" one", " two", " many"], k % 3) for k in range(9)]


# -- files ---------------------------------------------------------------------------------------------------------------


def test_dialogues(tmp_path: Path) -> None:
    as_columns = {"text": {str(k): turns for k, turns in enumerate([*DIALOGUES, ["alone"]])}}
    for name, data in (("a", as_columns), ("b", DIALOGUES), ("c", {"text": DIALOGUES})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        task = read_task(path)
        assert (task.name, task.metric, list(task.dialogues)) == (name, "f1", DIALOGUES)


def test_questions(tmp_path: Path) -> None:
    lines = [json.dumps({"context": q.context, "choices": q.choices, "answer": q.answer}) for q in QUESTIONS]
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(lines) + "\n")
    task = read_task(path)
    assert (task.metric, list(task.questions)) == ("accuracy", QUESTIONS)
    path = tmp_path / "pubmed_qa.csv"
    path.write_text("pubid,question,abstract,final_decision\n1,Is it?,We looked.,maybe\n2,Is it?,We looked., Yes\n")
    assert list(read_task(path).questions) == [
        Choice("Context: We looked.\nQuestion: Is it?\nAnswer:", [" yes", " maybe", " no"], answer) for answer in (1, 0)
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"dialogues are \.json"),
        ("a.json", '{"texts": []}', "lacks 'text'"),
        ("a.json", '["a", "b"]', 'expected lists of turns, and dialogue 0 is "a"'),
        ("a.json", '{"text": {"x": ["a", "b"], "y": 3}}', "expected lists of turns, and dialogue 'y' is 3"),
        ("a.json", '{"text": 3}', "expected lists of turns, not 3"),
        ("a.json", "null", "expected lists of turns, not null"),
        ("a.json", '[["a", "b\\ud800"]]', "dialogue 0: .*surrogates not allowed"),
        ("a.jsonl", "\n3", "a.jsonl: line 2: expected a mapping of context, choices and answer, not 3"),
        ("a.jsonl", "\n\n{", "a.jsonl: line 3: Expecting"),
        ("a.csv", "final_decision,question,abstract\nyes,a,b\nno,c\n", "a.csv: line 3: the abstract is missing or empty"),
        ("a.csv", "final_decision,abstract,question\nyes,a\n", "line 2: the question is missing or empty"),
        ("a.csv", "final_decision,abstract,question\nyes,a, \n", "line 2: the question is missing or empty"),
        ("a.csv", "final_decision,abstract,question\nyes,a,b,c\n", "line 2 has more cells than columns"),
        ("a.json", '[["alone"]]', "either questions or dialogues"),
        ("a.json", "{", "a.json: Expecting"),
        ("a.jsonl", '{"context": "a", "choices": ["b"]}', "line 1 lacks 'answer'"),
        ("a.jsonl", '{"context": "a", "choices": "bc", "answer": 0}', "line 1: choices are a list of two texts or more"),
        ("a.jsonl", '{"context": "a", "choices": ["b", ""], "answer": 0}', "none of them empty"),
        ("a.jsonl", '{"context": "a", "choices": ["b", "c"], "answer": "0"}', "line 1: answer '0' of 2 choices"),
        ("a.jsonl", '{"context": "a\\ud800", "choices": ["b", "c"], "answer": 0}', "surrogates not allowed"),
        ("a.jsonl", '\n{"context": "a", "choices": ["b", "c"], "answer": 2}', "line 2: answer 2 of 2 choices"),
        ("a.jsonl", '{"context": "", "choices": ["b", "c"], "answer": 0}', "the context is empty"),
        ("a.csv", "question,abstract\na,b\n", "lacks 'final_decision'"),
        (
            "a.csv",
            "question,abstract,final_decision\na,b,perhaps\n",
            "line 2: final_decision 'perhaps' is none of yes, maybe, no",
        ),
    ],
)
def test_files_that_are_no_tasks(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_task(path)
    with pytest.raises(FileNotFoundError):
        read_task(tmp_path / "none.json")


# -- suites --------------------------------------------------------------------------------------------------------------


def suite(**options: object) -> Suite:
    return Suite([Task("numbers", questions=QUESTIONS), Task("talk", dialogues=DIALOGUES)], letters, spelled, **options)


def test_a_suite_scores_every_task() -> None:
    model, whole = small_model(), suite()
    score = whole(model)
    assert list(whole.last) == ["numbers", "talk"]
    assert score == mean_of(whole.last)[0] == pytest.approx((whole.last["numbers"].mean + whole.last["talk"].mean) / 2)
    assert whole.last["numbers"] == choice_accuracy(model, letters, QUESTIONS)
    assert list(whole.of("f1").scores(model)) == ["talk"]
    assert len(suite(limit=2).scores(model)["numbers"].values) == 2


def test_halves_share_no_example_and_cover_the_limit() -> None:
    choose, report = suite(limit=7).halves()
    (a, talk), (b, _) = choose.tasks, report.tasks
    assert list(a.questions) == QUESTIONS[:7:2]
    assert list(b.questions) == QUESTIONS[1:7:2]
    assert list(talk.dialogues) == DIALOGUES[::2]
    assert choose is not report
    assert choose.last is not report.last


def test_a_run_chooses_on_one_half_and_reports_the_other() -> None:
    choose, report = suite().halves()
    result = fastpost.GAP(n_steps=2, lr=1e-3)(
        small_model(), torch.tensor(letters("a short text")), evaluate=choose, test=report
    )
    assert len(result.scores) == 3
    assert len(result.test_scores) == 2
    untouched = small_model().eval()
    assert result.scores[0] == choose(untouched)
    assert result.test_scores[0] == report(untouched)


def test_suites_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="task numbers has a single example"):
        Suite([Task("numbers", questions=QUESTIONS[:1])], letters, spelled).halves()
    with pytest.raises(ValueError, match="different names, not a, a"):
        Suite([Task("a", questions=QUESTIONS), Task("a", dialogues=DIALOGUES)], letters, spelled)
    with pytest.raises(ValueError, match="not none"):
        suite().of("f2")


# -- the harness -----------------------------------------------------------------------------------------------------------


def a_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {"<end>": 0} | {chr(c): c - 31 for c in range(32, 94)}
    vocabulary |= {chr(c): vocabulary[chr(c - 32)] for c in range(ord("a"), ord("z") + 1)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", model_max_length=96)


TASK = """
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_the_harness_and_our_own_scores_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "numbers.jsonl"
    data.write_text(
        "".join(json.dumps({"context": q.context, "choices": q.choices, "answer": q.answer}) + "\n" for q in QUESTIONS)
    )
    (tmp_path / "numbers.yaml").write_text(TASK.format(data=data))
    model, tokenizer = small_model(), a_tokenizer()
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = harness_scores(model, tokenizer, ["numbers"], limit=7, task_manager=manager)
    ours = choice_accuracy(model, lambda text: tokenizer(text)["input_ids"], QUESTIONS, limit=7)
    assert found["numbers"] == ours
    assert 0 < ours.mean < 1  # else they would agree by saying nothing
    assert model.training
    with pytest.raises(ValueError, match="numbers has no 'f1' per example, only acc"):
        harness_scores(model, tokenizer, ["numbers"], metric="f1", limit=2, task_manager=manager)


def test_a_task_read_through_several_filters_is_no_single_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness logs every example once per filter, as gsm8k's strict-match and flexible-extract."""
    import lm_eval

    def samples(*filters: str) -> dict[str, object]:
        rows = [{"doc_id": k, "filter": name, "metrics": ["acc"], "acc": float(k % 2)} for name in filters for k in range(4)]
        return {"samples": {"numbers": rows}}

    model, tokenizer = small_model(), a_tokenizer()
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *args, **options: samples("none"))
    assert harness_scores(model, tokenizer, ["numbers"])["numbers"].values == (0.0, 1.0, 0.0, 1.0)
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *args, **options: samples("strict-match", "flexible-extract"))
    with pytest.raises(ValueError, match="several filters"):
        harness_scores(model, tokenizer, ["numbers"])


def test_pubmed_qa_answers_in_any_case_and_none_other(tmp_path: Path) -> None:
    file = tmp_path / "pubmed.csv"
    file.write_text("abstract,question,final_decision\na,b,Yes\nc,d, NO \ne,f,maybe\n")
    assert [q.answer for q in read_task(file).questions] == [0, 2, 1]
    for line, answer in (("g,h,perhaps", "'perhaps'"), ("g,h,", "''"), ("g,h", "None")):
        file.write_text(f"abstract,question,final_decision\na,b,yes\n{line}\n")
        with pytest.raises(ValueError, match=rf"pubmed\.csv: line 3: final_decision {answer} is none of yes, maybe, no"):
            read_task(file)
