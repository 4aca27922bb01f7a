"""The GPU suite's tuner, trace, calibration, report and pack, without a GPU: made-up clocks and
records, and the bugs that each must notice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

import ptx_emulator as ptx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import bench_cuda_experts  # noqa: E402
import calibrate  # noqa: E402
import gpu_report  # noqa: E402
import pack_gpu_suite  # noqa: E402
import predict  # noqa: E402
import trace_tiles  # noqa: E402
import tune  # noqa: E402
import tune_problems  # noqa: E402
from tune_problems import LAYERS, Layer, Problem, Setting, settings_of  # noqa: E402

SHAPE = Layer(16, 136, 136, 2, 2)


def problem(op: str = "dact", run=None, layer: Layer = SHAPE) -> Problem:
    return Problem(op, layer, layer.rows, 256, 64, run or (lambda: torch.ones(2)))


class Clock(tune.Rehearsal):
    """A made-up card: one setting is best, and times tremble by 0.5 %."""

    def __init__(self, best: Setting, broken: Setting | None = None):
        self.best, self.broken, self.calls, self.now = best, broken, 0, Setting()

    def seconds(self, problem: Problem, setting: Setting) -> float:
        self.calls += 1
        assert setting == self.now, "what is timed is what is applied"
        off = sum(a != b for a, b in zip(astuple(setting), astuple(self.best)))
        return 1e-3 * (1 + 0.04 * off) * (1 + 0.005 * (self.calls * 37 % 11 - 5) / 5)

    def result(self) -> torch.Tensor:
        if self.now == self.broken:
            raise RuntimeError("up_sm90: shared memory has room for 3 stages")
        return torch.ones(2)


# ---- the tuner
@pytest.mark.parametrize("best", [Setting(band=8, promotion=128), Setting(grid=128), Setting()])
def test_halving_finds_the_best_setting(best):
    clock = Clock(best)
    line = tune.tune(
        problem(run=clock.result), settings_of("dact", 132), clock, time.monotonic() + 60
    )
    assert tune.setting_in(line["best"]) == best
    assert tune.setting_in(line["next"]) != best and line["tried"] == 112
    assert line["default_ms"] >= line["best"]["ms"] and clock.now == Setting()


def test_settings_are_all_tried_and_the_default_is_first():
    for op in tune_problems.OPS:
        settings = settings_of(op, 132)
        assert settings[0] == Setting() and len(set(settings)) == len(settings)
        assert any(not s.prefetch for s in settings) == (op in tune_problems.PREFETCHING)
    assert {s.grid for s in settings_of("up", 132)} == {0, 128}
    closely = {(bool(s.chain), bool(s.route_at_once)) for s in settings_of("layer", 132)}
    assert len(closely) == 4 and settings_of("layer", 132)[0] == Setting()


def test_a_setting_that_changes_a_bit_is_refused_however_fast():
    wrong = Setting(band=8)

    class Wrong(Clock):
        def result(self):
            return torch.full((2,), 1.0 + (self.now == wrong))

    clock = Wrong(best=wrong)
    line = tune.tune(
        problem(run=clock.result), settings_of("up", 132), clock, time.monotonic() + 60
    )
    assert line["other_bits"] == ["band 8"]
    assert tune.setting_in(line["best"]) != wrong


def test_a_setting_without_room_is_left_out_and_said():
    clock = Clock(Setting(), broken=Setting(stages=3))
    line = tune.tune(
        problem(run=clock.result), settings_of("up", 132), clock, time.monotonic() + 60
    )
    assert line["refused"] == ["stages 3"] and line["tried"] == 55


def test_the_time_is_kept_and_what_is_skipped_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", "--rehearse", "--seconds", "-1"])
    sys.argv += ["--out", str(tmp_path / "t.jsonl"), "--rows", str(tmp_path / "rows")]
    assert tune.main() == 1
    lines = [json.loads(x) for x in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(x["skipped"] for x in lines)


@pytest.fixture
def rehearsed(tmp_path, monkeypatch) -> list[dict]:
    """The lines of a tuner's rehearsal; they and its rows are in tmp_path."""
    monkeypatch.setattr(sys, "argv", ["tune", "--rehearse"])
    sys.argv += ["--out", str(tmp_path / "tune.jsonl"), "--rows", str(tmp_path / "rows.txt")]
    assert tune.main() == 0
    return [json.loads(x) for x in (tmp_path / "tune.jsonl").read_text().splitlines()]


def test_rows_go_into_the_table_and_are_replaced_there(tmp_path, rehearsed):
    # up and w1's also of tokens, both gradients also of several microbatches
    ops = ["up", *tune_problems.OPS, *["wgrad"] * 4, "forward", "layer"]
    assert [x["op"] for x in rehearsed] == ops
    found, table = (tmp_path / "rows.txt").read_text(), tune.TABLE.read_text()
    once = tune.write_rows(table, found)
    rows, order, told = found.partition(tune.ORDER)
    assert told.startswith("{true, false};  // measured, rehearsal, ")
    assert rows in once and order + told in once and tune.write_rows(once, found) == once
    assert tune.write_rows(once, rows) == once, "no launches were measured: as before"
    assert tune.write_rows(once, order + told) == tune.write_rows(table, order + told)
    assert (
        found.count("GemmKernel::wgmma") == 7 and '"measured, rehearsal, driver none, 20' in found
    )
    assert "{8, 0, 128, false, true}" in found and max(map(len, found.splitlines())) <= 120


def test_rows_compile_and_are_taken_where_they_fit(tmp_path):
    """The table with measured rows, through the very functions that choose and that say what a
    launch does; settings go before a row."""
    if (compiler := ptx.launch.shutil.which("g++")) is None:
        pytest.skip("g++ is not on PATH")
    base = {"card": "H", "driver": "1", "date": "today", "default_ms": 1.0, "k": 2048}
    found = Setting(stages=3, band=-8, grid=128, promotion=64, prefetch=False, bulk_sums=False)
    best = {"ms": 0.9, "tflops": 600.0, **tune.asdict(found)}
    as_before = {"ms": 0.999, "tflops": 600.0, **tune.asdict(Setting(band=32))}
    paired = {**best, **tune.asdict(Setting(style="pingpong", pair="n"))}
    lines = [
        {**base, **tune.asdict(LAYERS[1]), "op": "dact", "m": 32768, "n": 8192, "best": paired},
        {**base, **tune.asdict(LAYERS[1]), "op": "dact", "m": 32768, "n": 4096, "best": best},
        {**base, **tune.asdict(LAYERS[0]), "op": "dact", "m": 131072, "n": 4096, "best": as_before},
    ]
    include = tmp_path / "moekernels"
    include.mkdir()
    table = tune.write_rows(tune.TABLE.read_text(), tune.rows(lines))
    (include / "gemm_tuned.h").write_text(table)
    (tmp_path / "main.cpp").write_text(
        """#include "moekernels/gemm_order.h"
        #include <cstdio>
        #include <initializer_list>
        using namespace moekernels;
        void say(int64_t rows, const cuda::sm90::Settings& asked, int64_t n = 4096) {
          const GemmProblem p{GemmOp::dact, DType::bf16, rows * 64, n, 2048, 64,
                              16, false, 90, true};
          const GemmChoice c = choose_gemm(p);
          const GemmOrder o = cuda::sm90::order_of(c, asked, 132);
          std::printf("%d %d %d %d %d %d", c.stages, o.band, o.grid, o.promotion, o.prefetch,
                      o.bulk_sums);
          if (o.style != GemmStyle::direct)
            std::printf(" %d %s %s", c.tile_n, kGemmStyles[int(o.style)], kGemmPairs[int(o.pair)]);
          std::printf("\\n");
        }
        int main() {
          for (int64_t rows : {511, 512, 2047, 2048}) say(rows, {});
          say(512, {2, 4, 100, 256, 1, 1});
          say(512, {}, 8192);
          say(512, {0, 0, 0, 0, -1, -1, 0, 0}, 8192);
        }"""
    )
    command = [compiler, "-std=c++17", f"-I{tmp_path}", f"-I{ROOT / 'csrc' / 'include'}"]
    command += [str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = subprocess.run([tmp_path / "main"], capture_output=True, text=True).stdout
    ours = "3 -8 128 64 0 0"
    assert said.splitlines() == [
        "4 16 132 256 1 1",
        ours,
        ours,
        "4 16 132 256 1 1",
        "3 4 100 256 1 1",  # stages are settled with the room that there is
        "6 16 132 256 1 1 128 pingpong n",
        "6 16 132 256 1 1",
    ]


def test_who_gathers_is_told_by_the_product_of_tokens():
    """In the row of the product that it is: where it gains."""
    shape = {**tune.asdict(LAYERS[2]), "op": "up", "m": 262144, "n": 2048, "k": 2048}
    base = {**shape, "card": "H", "driver": "1", "date": "today", "default_ms": 1.0}
    plain = {**base, "of": "", "best": {"ms": 0.9, "tflops": 6.0, **tune.asdict(Setting(band=8))}}
    for gather, ms, told in ((True, 0.8, 1), (False, 0.8, 0), (True, 0.999, -1), (None, 1.0, -1)):
        best = {"ms": ms, "tflops": 6.0, **tune.asdict(Setting(gather=gather))}
        seen = {**base, "of": "tokens", "best": best}
        found = tune.rows([plain, seen])
        gather = f", GemmStyle::direct, GemmPair::none, {told}" * (told >= 0)
        assert found.count("GemmKernel::") == 1 and f"{{8, 0, 0, true, true{gather}}}" in found


def test_what_joins_is_told_by_the_product_of_several_microbatches():
    shape = {**tune.asdict(LAYERS[1]), "op": "wgrad", "m": 8192, "n": 2048}
    base = {**shape, "card": "H", "driver": "1", "date": "today", "default_ms": 1.0}
    best = {"ms": 0.9, "tflops": 6.0, **tune.asdict(Setting())}
    plain = {**base, "k": 32768, "of": "w1", "best": best}
    for join, ms, told in ((True, 0.8, ", 1"), (False, 0.8, ", 0"), (False, 0.999, None)):
        best = {"ms": ms, "tflops": 6.0, **tune.asdict(Setting(join=join))}
        many = {**base, "k": 4 * 32768, "of": "w1 of 4", "best": best}
        found = tune.rows([plain, many])
        more = f", GemmStyle::direct, GemmPair::none, -1{told}" * (told is not None)
        assert found.count("GemmKernel::") == 1 and f"{{0, 0, 0, true, true{more}}}" in found


def test_other_lines_than_rows_are_not_applied(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows").write_text("#error\n")
    monkeypatch.setattr(sys, "argv", ["tune", "--apply", str(tmp_path / "rows")])
    before = tune.TABLE.read_text()
    assert tune.main() == 2 and tune.TABLE.read_text() == before
    assert "other lines than measured rows" in capsys.readouterr().err


def test_the_problems_are_the_layers_products():
    for found in tune_problems.problems(SHAPE, "cpu"):
        assert found.run().isfinite().all(), found.name
    layer = Layer(16, 136, 72, 2, 2)
    sizes = {p.op + p.of: (p.m, p.n, p.k) for p in tune_problems.every((layer,), (layer,), "cpu")}
    assert sizes == {
        "up": (32, 144, 136),
        "down": (32, 136, 72),
        "dact": (32, 72, 136),
        "dgrad": (32, 136, 144),
        "wgradw1": (144, 136, 32),
        "uptokens": (32, 144, 136),
        "wgradw1 tokens": (144, 136, 32),
        "wgradw2": (136, 72, 32),
        "wgradw1 of 4": (144, 136, 128),
        "wgradw2 of 4": (136, 72, 128),
        "forward": (32, 72, 136),
    }


# ---- calibration
@pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on PATH")
def test_multicast_brings_two_blocks_what_each_loads_half_of():
    on = calibrate.Emulated()
    (figure,) = calibrate.multicast(on)
    assert figure["name"] == "tma_l2_multicast_2" and figure["bytes_a_cycle_and_sm"] > 0
    # A stage is free once both say so; where all tell one block alone, none goes on.
    text = re.sub(r"(mapa\.\S+\s+there, [^,]+), [^;]+;", r"\1, 0;", on.module.text)
    on.module = ptx.Module(text)
    with pytest.raises(ptx.Deadlock):
        list(calibrate.multicast(on))


# ---- the trace
def test_the_trace_reads_records_back():
    made = trace_tiles.made_up(problem("dact"))
    found = trace_tiles.figures("dact", made)
    cycles = trace_tiles.PREDICTED
    assert found["step"] == cycles["step"] and found["epilogue"] == cycles["epilogue"]["dact"]
    assert found["sms"] == 8
    assert found["tiles"] == 2 * 8 * 6
    made[:, :2, :, trace_tiles.END] += 500 * (made[:, :2, :, trace_tiles.TIMER] != 0)
    assert trace_tiles.figures("dact", made)["epilogue"] == cycles["epilogue"]["dact"] + 500
    assert trace_tiles.figures("dact", made * 0)["tiles"] == 0


# ---- the report
def test_the_report_sets_measured_beside_predicted(tmp_path, rehearsed, capsys, monkeypatch):
    line = {"op": "dact", "of": "", **tune.asdict(LAYERS[0]), "m": 131072, "n": 4096, "k": 2048}
    stored, shape = gpu_report.PREDICTED, str(LAYERS[0])
    rate = stored["products"][shape]["dact"][0]
    line |= {"default_ms": 2e-9 * 131072 * 4096 * 2048 / rate, "best": {"ms": 4, "tflops": 550.0}}
    with (tmp_path / "tune.jsonl").open("a") as out:
        out.write(json.dumps(line) + '\n{"op": "dgr')  # cut off in the middle
    broken = {
        "rung": "ring",
        "way": "sass",
        "status": "hang",
        "error": "hang: ...",
        "look": "there",
    }
    (tmp_path / "ladder.jsonl").write_text(json.dumps(broken) + "\n")
    (tmp_path / "clocks.csv").write_text("t, 1755, 690.5, 61, 0x4\nt, 345, 80, 40, 0x1\ncut")
    (tmp_path / "sections.txt").write_text("ladder rc=1 seconds=40\ntune rc=124 seconds=200\n")
    of_passes = {way: on[0] for way, on in stored["layers"][shape].items()}
    at = {**tune.asdict(LAYERS[0]), "routing": "balanced", "implementation": "ours"}
    passes = [
        {"op": "layer forward", "us": 1000, "tflops": of_passes["forward"], **at},
        {"op": "layer forward, backward", "us": 3500, "tflops": 0.0, **at},
        {"op": "layer forward", "us": 1, "tflops": 9.0, **at, "routing": "zipf"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in passes)
    (tmp_path / "experts.jsonl").write_text(text + '{"op": "layer f')  # cut off, too
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(tmp_path)])
    assert gpu_report.main() == 0
    said = capsys.readouterr().out
    # The backward's operations are twice the forward's, its time what both take without that.
    backward = 2 * of_passes["forward"] * 1000 / (3500 - 1000)
    for what, predicted, measured in (
        ("dact", rate, rate),
        ("layer forward", of_passes["forward"], of_passes["forward"]),
        ("layer backward", of_passes["backward"], backward),
    ):
        text = f"{what} {shape} TFLOP/s"
        ratio = measured / predicted
        assert f"  {text:50}{predicted:9}{measured:9.0f}{ratio:8.2f}\n" in said
    assert "ring (sass) hang" in said and "look: there" in said
    assert "busy: 1755 MHz" in said and "TIMED OUT" in said and "0 of 1 rungs hold" in said
    report = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert report["tune"][-1] == {"cut_off": '{"op": "dgr'} and len(report["tune"]) == 14


def test_predictions_are_of_what_is_measured():
    layers, grouped = ({str(x) for x in some} for some in (LAYERS, tune_problems.GROUPED))
    tiny = tune_problems.problems(tune_problems.TINY[0], "cpu")
    products = {" ".join(filter(None, (p.op, p.of))) for p in tiny if "tokens" not in p.of}
    assert set(gpu_report.PREDICTED["layers"]) == layers
    assert set(gpu_report.PREDICTED["products"]) == layers | grouped
    for shape, rates in gpu_report.PREDICTED["products"].items():
        assert set(rates) == ({"forward"} if shape in grouped else products)
    quick = {f"T{s.T} H{s.H} F{s.F} E{s.E} K{s.K}" for s in bench_cuda_experts.shapes(quick=True)}
    whole = {f"T{s.T} H{s.H} F{s.F} E{s.E} K{s.K}" for s in bench_cuda_experts.shapes(quick=False)}
    assert layers <= whole and len(layers & quick) == 3


def test_predictions_are_what_the_model_says_today():
    """A shape of each kind: all take half a minute. `python bench/predict.py store` stores them."""
    stored, layer = gpu_report.PREDICTED, LAYERS[3]
    assert stored["cycles"] == predict.cycles() and stored["calibrate"] == predict.calibration()
    assert stored["products"][str(layer)] == predict.of_products(layer)
    assert stored["layers"][str(layer)] == predict.of_layer(layer)
    for grouped in tune_problems.GROUPED[:1]:
        assert stored["products"][str(grouped)] == predict.of_grouped(grouped)
    assert json.loads(predict.in_lines(stored)) == stored


# ---- the pack and the plan
def test_the_pack_wants_an_empty_folder_and_built_libraries(tmp_path, monkeypatch, capsys):
    (tmp_path / "old").touch()
    for arguments, words in (([str(tmp_path)], "holds old"),):
        monkeypatch.setattr(sys, "argv", ["pack", *arguments])
        with pytest.raises(SystemExit) as error:
            pack_gpu_suite.main()
        assert error.value.code == 2 and words in capsys.readouterr().err
    monkeypatch.setattr(pack_gpu_suite, "LIBRARIES", ("_C_absent.so",))
    with pytest.raises(SystemExit):
        pack_gpu_suite.built(tmp_path, "python3")
    assert "_C_absent.so not built" in capsys.readouterr().err


def test_the_plan_names_what_there_is():
    """Every command of PLAN.md is a section or a script that exists."""
    plan, suite = (ROOT / "bench" / name for name in ("PLAN.md", "gpu_suite.sh"))
    sections = suite.read_text().split('all="')[1].split('"')[0].split()
    text = plan.read_text()
    for line in text.splitlines():
        if "bench/gpu_suite.sh " in line and line.startswith("    "):
            named = line.split("bench/gpu_suite.sh ")[1].split(";")[0].split()
            assert set(named) <= set(sections), line
    for path in set(ptx.launch.re.findall(r"(?<![\w/])bench/[\w/]+\.\w+", text)):
        assert (ROOT / path).exists() or "baselines" in path, path


def test_the_suite_refuses_what_it_does_not_know(tmp_path):
    suite = str(ROOT / "bench" / "gpu_suite.sh")
    for arguments, words in (
        (["nonsense"], "no section is called nonsense"),
        ([], "give sections"),
    ):
        done = subprocess.run(
            ["bash", suite, *arguments],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "OUT": str(tmp_path)},
        )
        assert done.returncode == 2 and words in done.stderr
