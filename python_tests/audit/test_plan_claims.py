"""The planner's verdict on the document, its output, and its answers to bad input."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest

from moekernels import assembly
from moekernels.audit import claims as judge
from moekernels.audit.document import formats, named_layouts, readings, recomputes
from moekernels.cli import build_parser, main
from moekernels.plan.evaluate import evaluate
from moekernels.plan.problem import configured, problem_of
from moekernels.run import files as cfg
from python_tests.support.counting import at_most_calls


@pytest.fixture(scope="module")
def run():
    return cfg.resolve("spec-30b", None, {})


@pytest.fixture(scope="module")
def problem(run):
    return problem_of(run)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """(JSON, page, trace) of one run of the command."""
    folder = tmp_path_factory.mktemp("plan")
    page, trace, out = folder / "plan.html", folder / "trace.json", folder / "out.json"
    import contextlib

    with out.open("w") as file, contextlib.redirect_stdout(file):
        assert main(["plan", "--json", "--html", str(page), "--trace", str(trace)]) == 0
    return json.loads(out.read_text()), page.read_text(), json.loads(trace.read_text())


def test_readings_of_the_dimensions(problem):
    """The document's arithmetic: one reading alone is 30 B."""
    found = {r.name: r for r in readings(problem)}
    assert len(found) == 8
    lifted = found["1024>2048-4096-2048>1024, SwiGLU (3)"]
    assert lifted.parameters == problem.model.parameters_count()
    assert lifted.per_expert == 29_360_128
    assert [n for n, r in found.items() if abs(r.parameters / 30e9 - 1) < 0.05] == [lifted.name]
    assert found["2048-4096-2048, SwiGLU (3)"].parameters == pytest.approx(26.04e9, rel=1e-3)
    assert found["1024-2048-1024, 2 matrices"].parameters == pytest.approx(4.43e9, rel=1e-3)
    assert lifted.sequences_per_second == pytest.approx(89, abs=1)
    assert max(r.sequences_per_second for r in found.values()) == pytest.approx(296, abs=1)


def test_layouts_of_the_document(problem, run):
    found = {r.name: r for r in named_layouts(problem, run.claims)}
    assert {n: (r.gpus, r.experts_per_gpu, r.modules_per_gpu) for n, r in found.items()} == {
        "R1": (8, 32, 128),
        "R1'": (8, 64, 256),
        "R2": (8, 8, 128),
        "R3": (32, 8, 32),
        "R4": (64, 8, 32),
        "R5": (8, 8, 128),
    }
    assert found["R5"].plan is None and "every stage" in found["R5"].why_not


def test_formats_and_checkpoint_sets(problem, run):
    s = configured(run)
    state = {f.bytes_per_parameter: f.state / 1e9 for f in formats(problem, s)}
    assert state[18] == pytest.approx(68.1, abs=0.1)
    assert state[16] == pytest.approx(60.5, abs=0.1)
    assert state[12] == pytest.approx(45.4, abs=0.1)
    claimed, fewest, everything, none = recomputes(problem, s, tuple(range(2, 16)))
    assert fewest.fits and not none.fits
    assert fewest.step < claimed.step < everything.step


def test_verdicts(printed):
    said = {c["name"]: c for c in printed[0]["claims"]}
    assert {n for n, c in said.items() if c["verdict"] == "holds"} == {
        "parameters", "gpus", "tp", "pp", "modules_per_gpu",
    }  # fmt: skip
    for name in ("sequences_per_second", "layer_ms", "mfu", "memory_gb", "experts_per_gpu"):
        assert said[name]["verdict"] == "fails"
        assert re.match(r"[\d.]+ ", said[name]["instead"])
    assert float(said["sequences_per_second"]["instead"].split()[0]) < 30


def test_contradictions_are_minimal_and_true(problem, run):
    found = judge.contradictions(problem, run.claims, {8, 32})
    sets = [set(c.claims) for c in found]
    assert {"8 cards", "800-1200 sequences/s"} in sets
    assert {"8 cards", "PP4", "8 experts per card"} in sets
    assert {"30 B parameters", "8 cards", "45 GB per card"} in sets
    assert {"15-20 ms per layer", "800-1200 sequences/s"} in sets
    assert not any(a < b for a in sets for b in sets)
    wanted = judge.said(run.claims)
    by_text = {judge.text_of(n, v): n for n, v in wanted.items()}
    every = judge.points(problem, run.claims, {8, 32})
    for one in found:
        names = [by_text[text] for text in one.claims]
        for left_out in [None, *names]:  # nothing satisfies all; something all but any one
            kept = [n for n in names if n != left_out]
            possible = any(all(judge.satisfies(p, n, wanted[n]) for n in kept) for p in every)
            assert possible == (left_out is not None)
        assert one.repair == one.repairs[0]


def test_claims_that_agree_contradict_nothing(problem, run):
    agreeing = replace(
        run.claims, experts_per_gpu=32, ep=0, memory_gb=64.0, layer_ms=[], mfu=[],
        sequences_per_second=[20.0, 30.0],
    )  # fmt: skip
    assert judge.contradictions(problem, agreeing, {8, 32}) == []


def test_json_page_and_trace(printed):
    data, page, trace = printed
    best = data["recommended"]
    assert best["memory_bytes"] <= data["hardware"]["memory"] - data["hardware"]["reserve"]
    assert sum(best["step_parts"].values()) == pytest.approx(best["step_seconds"])
    assert data["rejected"] and data["pareto"] and data["contradictions"]
    assert data["calibrated"] is False
    assert page.count("<svg") == 8 and "cannot all be true" in page
    assert not re.search(r"<script|src=|href=\"(?!#)", page)
    played = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    s = best["strategy"]
    passes = [e for e in played if e["cat"] != "exchange"]
    assert len(passes) == 2 * s["microbatches"] * len(s["layers_per_stage"])
    exchanges = 4 * s["microbatches"] * sum(s["layers_per_stage"])
    assert len(played) == len(passes) + exchanges


@pytest.mark.parametrize("extra", [[], ["--pp", "4"], ["--gpus", "64", "--pp", "8"]])
def test_the_launch_line_runs_what_was_planned(extra, capsys):
    assert main(["plan", "--json", *extra]) == 0
    data = json.loads(capsys.readouterr().out)
    words = shlex.split(data["launch"])
    args = build_parser().parse_args(words[words.index("moekernels") + 1 :])
    planned = cfg.resolve(args.preset, args.config, args.flags)
    assembly.layout_of(planned)
    s, want = configured(planned), data["recommended"]["strategy"]
    assert list(s.layers) == want["layers_per_stage"]
    assert list(s.checkpointed) == want["checkpointed_per_stage"]
    assert (s.microbatches, s.schedule, s.optimizer_state, s.dispatcher) == (
        want["microbatches"], want["schedule"], want["optimizer_state"], want["dispatcher"],
    )  # fmt: skip
    assert s.layout.world == data["recommended"]["gpus"]
    again = evaluate(problem_of(planned), s)
    assert again.memory == pytest.approx(data["recommended"]["memory_bytes"])


@pytest.mark.parametrize("gpus, millions", [(64, 5), (1024, 13)])
def test_it_is_quick(gpus, millions, capsys):
    """A core makes some four million calls a second; these are a quarter more than it makes now."""
    assert main(["plan", "--json", "--gpus", "64"]) == 0  # imports
    with at_most_calls(millions * 1_000_000):
        assert main(["plan", "--json", "--gpus", str(gpus)]) == 0


def test_the_screen(capsys):
    assert main(["plan", "--all"]) == 0
    out = " ".join(capsys.readouterr().out.split())  # lines end where they are full
    for text in (
        "recommended",
        "as written",
        "schedules",
        "zb x2:",
        "claims",
        "cannot all be true",
        "R5",
        "uncalibrated",
    ):
        assert text in out


BAD = {
    "[claims]\nparameters = 30": r"claims.parameters = 30.0 is a number of parameters",
    "[claims]\nmemory_gb = 45e9": r"claims.memory_gb = .* is in GB; 45 would",
    "[claims]\nmfu = [55, 65]": r"claims.mfu = .* \[0.55, 0.65\] would",
    "[claims]\nlayer_ms = [20, 15]": r"claims.layer_ms = .* must be \[from, to\]",
    '[claims]\ncheckpoint_layers = "x"': r"claims.checkpoint_layers = 'x' must be as in 2-15",
    "[claims]\nparametres = 1e9": r"unknown key claims.parametres.*did you mean parameters",
    "[hardware]\ngpus = 0": r"hardware.gpus must be at least 1, got 0",
    "[hardware]\nmemory_gb = 2": r"nothing fits 1 cards of 2 GB.*memory binds.*over by",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_one_line(text, tmp_path, capsys):
    file = tmp_path / "plan.toml"
    file.write_text(text)
    assert main(["plan", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(BAD[text], error), error


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--tp", "3"], "no layout of 8 cards"),
        (["--lengths-from", "/nowhere"], "cannot be read"),
        (["--html", "/nowhere/x.html"], "cannot be written"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--memory-gb", "40", "--offload-optimizer", "0"], "memory binds"),
        (["--memory-gb", "20"], "memory binds"),
        (["--tp", "3", "--offload-optimizer", "1"], "no layout of 8 cards"),
    ],
)
def test_bad_flags_are_one_line(flags, says, capsys):
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error, error


def test_lengths_from_a_file(tmp_path, capsys):
    file = tmp_path / "lengths"
    file.write_text("100 2000, 512\n" * 16)
    assert main(["plan", "--json", "--lengths-from", str(file)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["batch"]["sequences"] == 48 and data["batch"]["tokens"] == 16 * 2612
    file.write_text("12 many")
    assert main(["plan", "--lengths-from", str(file)]) == 2
    assert "'many' is no length" in capsys.readouterr().err
