"""The command by itself, and the doctor on sound and on broken installations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import torch

from fastpost.bench.studies.__main__ import main as studies
from fastpost.cli import main
from tests.test_compare import refusal


def test_commands(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert "Did you mean 'doctor'?" in refusal(capsys, ["docter"], main)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_a_missing_extra_is_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    words = ["train", "--method", "none", "--train_file", "x.txt"]
    shown = python(f"import sys; sys.modules['matplotlib'] = None; from fastpost.cli import main; sys.exit(main({words}))")
    assert (shown.returncode, shown.stderr.count("\n")) == (2, 1)
    assert "fastpost train needs matplotlib. Run: pip install 'fastpost[cli]'" in shown.stderr
    for study in ("compare", "probe"):
        assert f"studies {study} needs rich" in refusal(capsys, [study], studies)
    assert "pip install 'fastpost[cli]'" in refusal(capsys, ["compare"], studies)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("FASTPOST_")}, **environment},
        timeout=120,
    )


def test_doctor_json_on_a_sound_installation(capsys):
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["problems"] == []
    assert data["torch"] == torch.__version__
    assert data["threads"] == torch.get_num_threads()
    assert set(data["backends"]) == {"reference", "cpu", "cuda", "triton"}
    assert data["backends"]["reference"]["self_test"] == "passed"
    assert data["backends"]["cpu"]["self_test"] == "passed"
    for backend in data["backends"].values():
        assert backend["reason"]
        assert backend["available"] or backend["self_test"] == ""


def test_doctor_table(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "backend cpu:" in shown
    assert "all is well" in shown


def test_doctor_without_the_packages_of_the_other_commands():
    code = "import sys; sys.modules['rich'] = None; from fastpost.cli import main; sys.exit(main([{}]))"
    shown = python(code.format("'doctor'"))
    assert shown.returncode == 0, shown.stderr
    assert "backend cpu: yes" in " ".join(shown.stdout.split())
    assert "all is well" in shown.stdout
    refused = python(code.format("'bench'"))
    assert refused.returncode == 2
    assert "pip install 'fastpost[cli]'" in refused.stderr


def test_doctor_names_a_backend_that_computes_nonsense(monkeypatch, capsys):
    from fastpost import dispatch
    from fastpost.backends import cpu
    from fastpost.ops import params

    def forget() -> None:
        """No selection and no kept plan knows the function that there was."""
        dispatch._select.cache_clear()
        vars(params._OP_SQUARED_NORM).pop("_plans", None)

    monkeypatch.setattr(cpu, "squared_norm", lambda bucket, eta: torch.zeros((), dtype=torch.float64))
    forget()
    try:
        assert main(["doctor", "--json"]) == 1
    finally:
        forget()
    data = json.loads(capsys.readouterr().out)
    assert data["backends"]["cpu"]["self_test"].startswith("failed: norm")
    assert data["backends"]["reference"]["self_test"] == "passed"
    assert len(data["problems"]) == 1


BROKEN_CORE = """
    import sys, importlib.abc
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "fastpost._C":
                raise ImportError("libstdc++.so.6: version `GLIBCXX_9.9.99' not found")
    sys.meta_path.insert(0, Broken())
    from fastpost.cli import main
    sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def test_doctor_explains_a_core_that_does_not_load():
    shown = python(BROKEN_CORE.replace("*sys.argv[1:]", '"--json"'))
    assert shown.returncode == 1, shown.stderr
    data = json.loads(shown.stdout)
    assert "GLIBCXX_9.9.99" in data["problems"][0]
    assert "reinstall" in data["problems"][0]
    assert data["backends"]["cpu"]["available"] is False
    assert data["backends"]["reference"]["self_test"] == "passed"
    assert (data["core"], data["isa"]) == (None, None)
    as_table = python(BROKEN_CORE)
    assert as_table.returncode == 1
    assert "something is broken" in as_table.stdout


def test_doctor_explains_environment_variables():
    code = "import sys; from fastpost.cli import main; sys.exit(main(['doctor', '--json']))"
    shown = python(code, FASTPOST_BACKEND="tritn", FASTPOST_CPU_ISA="mmx")
    assert shown.returncode == 1, shown.stderr
    problems = json.loads(shown.stdout)["problems"]
    assert any("Did you mean 'triton'" in problem for problem in problems)
    assert any("mmx" in problem for problem in problems)
    assert python("import fastpost.cli, sys; assert 'transformers' not in sys.modules").returncode == 0
