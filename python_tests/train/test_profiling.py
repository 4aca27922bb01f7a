"""`--profile`: the steps that were asked for, every rank, in one file with the schedule's names."""

import gzip
import json

import pytest

from moekernels.cli import main
from moekernels.errors import UsageError
from moekernels.run import files as cfg
from moekernels.train.profiling import NAME, merge
from python_tests.support.small_runs import argv

TINY = "--layers 2 --experts 4 --d-model 16 --heads 2 --vocab-size 258 --tp 1".split()


def test_steps_are_read():
    assert list(cfg.profiled("10:12")) == [10, 11, 12] and list(cfg.profiled("3")) == [3]
    assert not cfg.profiled("")
    for text in ("0:1", "3:2", "a", "1:", ":", "1:2:3", "-1"):
        with pytest.raises(UsageError, match="--profile must be FIRST:LAST"):
            cfg.profiled(text)


@pytest.mark.parametrize("steps, seen", [("2:3", 2), ("4:9", 1)])
def test_a_run_leaves_one_file_of_all_ranks(text, cache, tmp_path, capfd, steps, seen):
    out = tmp_path / "run"
    more = ("--pp", "2", "--steps", "4", "--profile", steps)
    assert main(argv(text, out, *TINY, *more)) == 0
    assert f"profile  {out / NAME}\n" in capfd.readouterr().out
    assert not list(out.glob(".profile*"))
    events = json.loads(gzip.decompress((out / NAME).read_bytes()))["traceEvents"]
    named = {
        e["pid"]: e["args"]["name"]
        for e in events
        if e["ph"] == "M" and e["name"] == "process_name"
    }
    for rank in (0, 1):
        own = [e for e in events if named.get(e["pid"], "").startswith(f"rank {rank}")]
        for action in ("F0", "F3", "B0", "B3"):
            marks = [e for e in own if e["name"] == action and e["ph"] == "X"]
            assert len(marks) == seen, (rank, action)


def test_ranks_keep_apart_and_share_a_clock():
    def trace(origin):
        return {
            "baseTimeNanoseconds": origin,
            "deviceProperties": [],
            "traceEvents": [
                {"ph": "M", "pid": 7, "name": "process_name", "args": {"name": "python"}},
                {"ph": "X", "pid": 7, "name": "F0", "ts": 10.0, "dur": 1.0},
                {"ph": "s", "pid": "Spans", "name": "ac2g", "id": 3, "ts": 10.0},
            ],
        }

    merged = merge([trace(5000), trace(2000)])
    assert merged["baseTimeNanoseconds"] == 2000
    events = merged["traceEvents"]
    assert [e["ts"] for e in events if e["ph"] == "X"] == [13.0, 10.0]
    assert len({e["pid"] for e in events}) == 4
    assert [e["id"] for e in events if e["ph"] == "s"] == ["0.3", "1.3"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert names == ["rank 0 python", "rank 1 python"]
