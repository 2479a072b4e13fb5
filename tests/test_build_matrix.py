"""The builds of build_matrix.py: warnings are errors, the core loads, the operations' tests pass on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import build_matrix


# One build for the suite: clang's warnings, and libstdc++ inside of the core. g++ compiles the core that all other tests run
# on, in CI with its warnings being errors (.ci/run); `make matrix` builds all of DEFAULT.
def test_it_builds_without_a_warning_and_passes_the_operations_tests() -> None:
    build = "clang++:static"
    try:
        build_matrix.compiler(build)
    except build_matrix.Failed as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))
    assert build_matrix.try_build(build, build_matrix.folder(build)).passed


def test_a_missing_compiler_is_a_failure_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_matrix.main(["nonesuch++"]) == 1
    assert "FAILED: nonesuch++ was not found (Debian: apt-get install nonesuch++)" in capsys.readouterr().out


def test_a_warning_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = tmp_path / "warns.h"
    header.write_text('#warning "planted"\n')
    compiler = tmp_path / "warns++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *csrc/*) set -- -include {header} "$@";; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(build_matrix.Failed, match="the build failed") as failure:
        build_matrix.try_build("warns++", tmp_path / "build")
    assert "planted" in str(failure.value)
    assert "-Werror" in str(failure.value)
