"""Curves and peers of the bench: cases by size, what cannot run, what is noisy, and what is made from their CSV files."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastpost.bench import pages, peers, registry, run, scaling, scaling_figure, table
from fastpost.bench.clocks import HostClock, measure
from fastpost.bench.registry import Case, Contender, Goal

SMALLEST = ("scaling_parameters", "scaling_tensors", "scaling_vocabulary", "scaling_threads")


def rows_of(case: Case) -> list[dict[str, object]]:
    return table.rows(case, measure(case, case.build(), 2, HostClock()), {"isa": "avx2"})


@pytest.mark.parametrize("name", SMALLEST)
def test_every_contender_of_a_curve_runs_at_its_smallest_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PAIRS", 1 << 12)
    sizes = sorted(int(key.rpartition("_")[2]) for key in registry.CASES if key.startswith(f"{name}_"))
    assert len(sizes) >= (1 if name == "scaling_threads" else 5)
    case = registry.CASES[f"{name}_{sizes[0]}"]()
    rows = rows_of(case)
    assert next(row["contender"] for row in rows if "contender" in row) == scaling.COPY
    assert all(row["ratio"] for row in rows if "goal" in row)
    assert case.name == scaling.CURVES[name]
    assert case.shape == f"{sizes[0]:,}"


def test_everybody_goes_to_the_same_place_and_back() -> None:
    contenders = {c.name: c for c in scaling.there_and_back(3, 17)}
    assert list(contenders) == [scaling.COPY, scaling.OURS, scaling.FOREACH, scaling.PUBLISHED]


def test_what_does_not_fit_into_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = 3 * 17
    monkeypatch.setattr(scaling, "free_memory", lambda: 20 * parameters)
    found = {c.name: c.missing for c in scaling.there_and_back(3, 17)}
    assert found[scaling.OURS] == found[scaling.COPY] == ""
    assert found[scaling.FOREACH] == found[scaling.PUBLISHED] == "needs 1.84e-06 GB of memory, of which 1.02e-06 are free"
    monkeypatch.setattr(scaling, "free_memory", lambda: 15 * parameters)
    assert all(c.missing for c in scaling.there_and_back(3, 17))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("by_sam", [False, True])
def test_processes_report_the_time_of_a_step(by_sam: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < scaling.in_processes(2, by_sam, width=16) < 60


def test_a_library_that_does_not_import_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_peer.py").write_text("raise OSError('libpeer.so: no such file\\nsecond line')")
    monkeypatch.syspath_prepend(tmp_path)
    why = registry.imported("broken_peer")
    assert why == "broken_peer does not import: OSError: libpeer.so: no such file"
    assert registry.imported("torch") == ""
    assert registry.imported("a_peer_that_is_nowhere").startswith("a_peer_that_is_nowhere does not import: ModuleNotFound")
    case = Case(
        "work", "1", "float32", [Contender("ours", lambda: None), Contender.absent("theirs", "broken_peer", why)],
        [Goal("ours", "theirs", {"avx2": 1.0}), Goal("theirs", "ours", {})],
    )  # fmt: skip
    _, theirs, bound, unbound = rows_of(case)
    assert theirs["result"] == f"not measured: {why}"
    assert theirs["backend"] == "broken_peer"
    assert "median_ms" not in theirs
    assert (bound["ratio"], bound["result"]) == ("", table.NOT_MEASURED)
    assert (unbound["ratio"], unbound["result"]) == ("", table.INFO)
    shown = io.StringIO()
    table.show(Console(file=shown, width=200), rows_of(case))
    assert why in shown.getvalue()


def test_a_row_whose_rounds_differ_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("work", "1", "float32", [])
    even, uneven = (registry.Result(seconds=seconds) for seconds in ([1.0, 1.01, 1.02, 1.0], [1.0, 1.3, 1.6, 1.0]))
    rows = table.rows(case, {"even": even, "uneven": uneven}, {"isa": "avx2"})
    assert [row["noisy"] for row in rows] == ["", "noisy"]


def test_libraries_make_the_same_step_as_the_published_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are installed; the others' rows say that they are not."""
    monkeypatch.setitem(sys.modules, "heavyball", None)  # whatever is installed: not importable here
    case = registry.CASES["peers_small"]()
    contenders = {c.name: c for c in case.build()}
    assert list(contenders)[:3] == [peers.PLAIN, peers.OURS, peers.PUBLISHED]
    assert contenders["heavyball.SAMWrapper"].missing.startswith("heavyball does not import: ModuleNotFoundError")
    assert set(contenders) == {peers.PLAIN, *(g.contender for g in case.goals), *(g.baseline for g in case.goals)}
    for contender in contenders.values():
        contender.run()
    assert case.threads == 1


def test_curves_are_read_from_their_file(tmp_path: Path) -> None:
    rows = []
    for size, ours, share in ((2, 8.0, 0.25), (1024, 4.0, 0.5)):
        common = {"case": scaling.CURVES["scaling_vocabulary"], "shape": f"{size:,}"}
        rows.append({**common, "contender": scaling.COPY, "median_ms": 1.0, "fraction_of_copy": 1.0})
        rows.append({**common, "contender": scaling.OURS, "median_ms": ours, "fraction_of_copy": share})
        rows.append({**common, "contender": scaling.FAIRSEQ, "median_ms": 10 * ours})
        rows.append({**common, "contender": scaling.KL_DIV, "result": "not measured: no memory"})
        rows.append({**common, "goal": "ours over theirs", "ratio": 0.1})
    table.write(tmp_path / scaling_figure.FILE, rows)
    found = scaling_figure.curves(tmp_path)["scaling_vocabulary"]
    ns = 1e6 / (1 << 22)
    assert found == {
        scaling.OURS: {2: 8 * ns, 1024: 4 * ns},
        scaling_figure.FLOOR: {2: 2 * ns, 1024: 2 * ns},
        scaling.FAIRSEQ: {2: 80 * ns, 1024: 40 * ns},
    }
    figure = scaling_figure.draw(tmp_path)
    (axis,) = figure.axes
    assert len(axis.lines) == 3
    assert scaling_figure.curves(tmp_path / "nowhere") == {}


def test_every_curve_has_axes_and_every_case_a_curve() -> None:
    assert set(scaling_figure.AXES) == set(scaling.CURVES)
    cases = {name.rpartition("_")[0] for name in run.load(["scaling_parameters", "scaling_tensors"])}
    assert cases <= set(scaling.CURVES)


def test_the_committed_curves_hold_every_contender_at_every_size() -> None:
    """Or a row that says why one was not measured."""
    path = pages.DATA / scaling_figure.FILE
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["contender"]]
    for name, title in scaling.CURVES.items():
        sizes = {row["shape"] for row in rows if row["case"] == title}
        assert len(sizes) >= (2 if name in ("scaling_threads", "scaling_processes") else 5), name
        for row in rows:
            assert row["median_ms"] or row["result"].startswith("not measured: "), row
