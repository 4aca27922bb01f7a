"""The bench guard on made-up figures: what fell is said, and nothing else decides."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import compare  # noqa: E402


def report(
    ours: float = 2e-3, theirs: float = 5e-3, training: float = 1.5, cpu: str = "X 9"
) -> dict:
    def bench(name: str, time: float) -> dict:
        facts = {"implementation": name, "threads": 2}
        return {"name": name, "group": "gate", "extra_info": facts, "stats": {"min": time}}

    trained = {
        "name": "train",
        "group": None,
        "extra_info": {"ratio": training},
        "stats": {"min": 1},
    }
    return {
        "datetime": "2026-11-28T01:02:03",
        "machine_info": {
            "machine": "x86_64",
            "node": "here",
            "cpu": {"brand_raw": cpu, "count": 2},
        },
        "benchmarks": [bench("ours", ours), bench("torch", theirs), trained],
    }


@pytest.fixture
def guard(tmp_path, capsys):
    """guard(report, *flags) -> exit code and what was printed; a first report is stored."""

    def run(said: dict, *flags: str) -> tuple[int, str]:
        path = tmp_path / "report.json"
        path.write_text(json.dumps(said))
        code = compare.main([str(path), "--folder", str(tmp_path / "kept"), *flags])
        out = capsys.readouterr()
        return code, out.out + out.err

    assert run(report(), "--store")[0] == 0
    return run


def test_the_same_ratios_pass_whatever_the_times(guard):
    code, text = guard(report(ours=2e-1, theirs=5e-1))
    assert code == 0 and "2 ratios of X 9, 2 cores, 2 threads against those of 2026-11-28" in text
    assert "nothing fell" in text


@pytest.mark.parametrize("theirs, fell", [(4.6e-3, False), (4.4e-3, True)])
def test_a_ratio_may_lose_ten_per_cent(guard, theirs, fell):
    code, text = guard(report(theirs=theirs))
    assert code == int(fell)
    assert ("FELL  gate: torch: 2.50x -> 2.20x, 12 % less" in text) == fell


def test_ratios_that_a_bench_names_count_too_and_the_worst_comes_first(guard):
    code, text = guard(report(theirs=4e-3, training=0.6))
    assert code == 1 and "2 fell by more than 10 %" in text
    assert text.index("FELL  train: 1.50x -> 0.60x, 60 % less") < text.index("FELL  gate: torch")
    assert guard(report(theirs=4e-3), "--fall", "0.3")[0] == 0


def test_what_one_run_lacks_is_said(guard):
    other = copy.deepcopy(report())
    other["benchmarks"][1]["extra_info"]["implementation"] = "scatter"
    code, text = guard(other)
    assert code == 0
    assert "not in this run: gate: torch" in text and "not stored: gate: scatter 2.50x" in text


@pytest.fixture
def runs(tmp_path, capsys):
    """runs(reports, *flags) -> exit code and what was printed, in a folder of its own."""

    def run(reports: list[dict], *flags: str) -> tuple[int, str]:
        paths = [tmp_path / f"run-{i}.json" for i in range(len(reports))]
        for path, said in zip(paths, reports):
            path.write_text(json.dumps(said))
        folder = ("--folder", str(tmp_path / "several"))
        code = compare.main([*map(str, paths), *folder, *flags])
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def test_of_several_runs_the_median_is_kept(runs):
    stored = [report(theirs=t) for t in (4.9e-3, 5e-3, 5.1e-3)]
    code, text = runs(stored, "--store")
    assert code == 0 and "2 ratios" in text and "of 3 runs" in text and "uneven" not in text
    assert runs([report(theirs=4.6e-3)])[0] == 0  # of the median, 5e-3
    assert runs([report(theirs=4.4e-3)])[0] == 1
    assert runs([report(theirs=t) for t in (1e-3, 4.9e-3, 5e-3)])[0] == 0


def test_what_stored_runs_do_not_agree_on_is_not_judged(runs):
    code, text = runs([report(theirs=4e-3), report(theirs=5e-3)], "--store")
    assert code == 0 and "1 of them differ by more than 10 %: too uneven to judge" in text
    code, text = runs([report(theirs=1e-3)])
    assert code == 0 and "uneven, not judged: gate: torch 2.25x -> 0.50x" in text
    assert runs([report(theirs=1e-3, training=1.0)])[0] == 1  # the other ratio still is


def test_runs_of_two_machines_are_refused(runs):
    code, text = runs([report(), report(cpu="Y 1")], "--store")
    assert code == 2 and text.count("\n") == 1 and "give those of one machine" in text


def test_another_kind_of_machine_has_nothing_to_compare_with(guard):
    code, text = guard(report(cpu="Y 1"))
    assert code == 2 and text.count("\n") == 1
    assert "no ratios are stored for Y 1, 2 cores, 2 threads" in text and "--store" in text


def test_a_report_without_ratios(guard, tmp_path, capsys):
    empty = report() | {"benchmarks": []}
    code, text = guard(empty)
    assert code == 2 and "the report holds no ratio" in text
    assert compare.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
