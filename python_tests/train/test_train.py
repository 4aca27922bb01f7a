"""The main job at a small size: its folder, its numbers, its ends."""

import json
import os
import shutil
import signal
import subprocess
import threading
import tomllib
from pathlib import Path

import pytest

from moekernels.cli import main
from moekernels.errors import UsageError
from moekernels.train.metrics import RunFolder, read_metrics
from python_tests.support.small_runs import (
    LAYOUT,
    argv,
    environment,
    losses,
    run_command,
    start,
    torchrun,
    wait_for_checkpoint,
    wait_for_steps,
)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of 8 steps that nothing disturbed, under TP2 x PP2."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    more = (*LAYOUT, "--steps", "8", "--save-every", "3", "--eval-every", "4", "--lr", "1e-2")
    process = start(text, out, *more)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0 and not stderr, stderr
    return out, stdout, more


def test_folder_of_a_run(whole):
    out, stdout, _ = whole
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "checkpoints",
        "config.toml",
        "experts.png",
        "experts.safetensors",
        "flush.png",
        "loads.json",
        "loss.png",
        "metrics.jsonl",
        "tokenizer.json",
        "trace.json",
    ]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert line["tokens_per_s"] > 0 and line["grad_norm"] > 0 and line["dropped"] == 0
        assert line["load_max_over_mean"] >= 1 and 0 <= line["bubble"] < 1 and line["lr"] > 0
        assert 0 <= line["exchange_exposed"] < 1 and 0 <= line["exchange_skew"] < 1
        assert line["exchange_hidden"] is None or 0 <= line["exchange_hidden"] <= 1
        assert line["cores"] > 0
        assert line["aux"] > 0.9 and line["z"] > 0 and "mfu" not in line
    assert ["eval_loss" in line for line in lines] == [False, False, False, True] * 2
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    for name in ("loss.png", "experts.png", "flush.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["train"]["steps"] == 8 and config["layout"] == {**config["layout"], "ep": 2}


def test_the_trace_holds_every_pass_of_every_stage(whole):
    """As measured, and on pids of their own as planned."""
    events = json.loads((whole[0] / "trace.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "stage 0", 1: "stage 1", 2: "stage 0, planned", 3: "stage 1, planned"}
    places = {e["pid"]: e["args"]["sort_index"] for e in events if "sort_index" in e["name"]}
    assert sorted(places, key=places.get) == [0, 2, 1, 3]
    passes = [(e["pid"], e["name"]) for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert sorted(passes) == sorted(
        (pid, f"{kind}{m}") for pid in names for kind in "FB" for m in range(4)
    )
    for e in events:
        if e["ph"] == "X":
            assert e["dur"] >= 0 and e["ts"] >= 0
            assert e["args"].get("planned", False) == (e["pid"] >= 2)


def test_the_trace_draws_the_exchange_on_a_track_of_its_own(whole):
    """Of 4 layers and 4 microbatches: there and back, and their gradients."""
    events = json.loads((whole[0] / "trace.json").read_text())["traceEvents"]
    tracks = {(e["pid"], e["tid"]) for e in events if e["args"].get("name") == "exchange"}
    assert tracks == {(pid, 2) for pid in range(4)}
    for pid in range(4):
        flights = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, 2)]
        names = sorted(e["name"] for e in flights)
        ways = ("combine", "combine's gradient", "dispatch", "dispatch's gradient")
        layers = (2 * (pid % 2) + 1, 2 * (pid % 2) + 2)
        assert names == sorted(f"{way} {n}" for way in ways for n in layers for _ in range(4))
        assert all(e["args"]["bytes"] > 0 and e["dur"] >= 0 for e in flights)
        assert all(e["args"]["waited_us"] >= e["args"]["late_us"] >= 0 for e in flights)


def test_the_collective_exchange_has_the_same_losses(text, whole, tmp_path):
    """Bit for bit; it cannot tell which part of a wait was a late peer's."""
    process = start(text, tmp_path, *whole[2], "--exchange", "collective")
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert losses(tmp_path) == losses(whole[0])
    for line in read_metrics(tmp_path):
        assert line["exchange_exposed"] > 0 and line["exchange_skew"] is None
        assert line["exchange_hidden"] is None and line["exchange_moving"] == 0


def test_parts_over_a_link_have_the_same_losses_and_hide_it(text, whole, tmp_path):
    """Of 4 local experts two parts: their rows arrive later, under other work."""
    more = ("--steps", "3", "--exchange-parts", "2", "--link", "2ms,100MB/s")
    process = start(text, tmp_path, *whole[2], *more)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert losses(tmp_path)[:1] == losses(whole[0])[:1]  # later ones have another learning rate
    for line in read_metrics(tmp_path):
        assert 0 < line["exchange_hidden"] < 1 and line["exchange_exposed"] > 0
    assert "% of the flight hidden" in stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--link", "20us"), "--link must be a latency and a rate, as in 20us,1GB/s"),
        (("--link", "0us,0GB/s"), "--link 0us,0GB/s: a link of zero bytes a second carries"),
        (
            ("--link", "1s,1GB/s", "--exchange", "collective"),
            "--link 1s,1GB/s is one of the shared",
        ),
        (("--exchange", "shard"), "--exchange is 'shard': did you mean shared?"),
        (("--exchange-parts", "0"), "--exchange-parts must be at least 1, got 0"),
    ],
)
def test_an_exchange_that_cannot_be(text, tmp_path, flags, said, capsys):
    assert main(argv(text, tmp_path / "out", *flags)) == 2
    assert said in capsys.readouterr().err


def test_the_layout_comes_first_and_a_table_last(whole):
    out = whole[1]
    first, last = out.index("dense    4 ranks = tp 2 x dp 1 x pp 2"), out.index("unigram entropy")
    assert "experts  4 ranks = etp 1 x ep 2 x edp 1 x pp 2" in out
    assert "32 / 4 ranks = 8 per rank (checked)" in out
    assert first < out.index("step 1/8") < last


def test_killed_at_any_moment_and_resumed_has_the_same_losses(text, whole, tmp_path):
    """SIGKILL to the parent alone, twice; ranks must go by themselves. Bit for bit."""
    expected, out = losses(whole[0]), tmp_path / "killed"
    process = start(text, out, *whole[2])
    wait_for_steps(out, 4, process)
    wait_for_checkpoint(out, process)
    process.kill()
    process.communicate()
    process = start(text, out, *whole[2], "--resume")
    wait_for_steps(out, 5, process)  # steps before the end, however late this process wakes up
    process.kill()
    process.communicate()
    # Whatever the kill left half done must not be taken for whole.
    (out / "checkpoints" / ".partial-step-0000099").mkdir()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    assert process.returncode == -signal.SIGKILL
    process = run_command(text, "train", "--resume", "--out", str(out))  # its own config.toml
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert losses(out) == expected
    assert "from step 3" in stdout or "from step 6" in stdout


# A microbatch has a load-balancing loss of its own: without it, and in fp64, where no rounding
# sends a token to another expert, all numbers of microbatches train alike.
AUTO = (*LAYOUT, "--steps", "10", "--save-every", "4", "--balance-coef", "0", "--dtype", "fp64")


def counts(out):
    return [line["microbatches"] for line in read_metrics(out)]


def test_micro_batches_chosen_while_training(text, tmp_path, cache, capfd):
    """Measured in the first six steps, recorded, resumed bit for bit; the losses are those of any
    other number of microbatches."""
    out, fixed = tmp_path / "auto", tmp_path / "fixed"
    assert main(argv(text, out, *AUTO, "--microbatches", "auto")) == 0
    said = capfd.readouterr().out
    assert "2, then 8 microbatches for 3 steps each" in said and "m* = " in said
    chosen = counts(out)[-1]
    assert counts(out) == [2] * 3 + [8] * 3 + [chosen] * 4 and 1 <= chosen <= 16
    written = tomllib.loads((out / "config.toml").read_text())["batch"]
    assert (written["microbatches"], written["accumulation"]) == (chosen, 1)
    facts = [
        json.loads(p.read_text())["facts"] for p in out.glob("checkpoints/step-*/manifest.json")
    ]
    assert {f["microbatches"] for f in facts} == {chosen}

    assert main(argv(text, fixed, *AUTO)) == 0
    assert losses(out) == pytest.approx(losses(fixed), rel=1e-9)

    # From the checkpoint of step 8, asked for `auto` again and with the run's own configuration.
    expected = losses(out)
    for resumed in (argv(text, out, *AUTO, "--microbatches", "auto", "--resume"), None):
        shutil.rmtree(out / "checkpoints" / "step-0000010")
        assert main(resumed or ["train", "--resume", "--out", str(out)]) == 0
        assert "microbatches for 3 steps each" not in capfd.readouterr().out
        assert losses(out) == expected and counts(out)[-1] == chosen


def test_no_checkpoint_before_the_choice(text, tmp_path, cache, capfd):
    """One that was due before waits: what would go on from it could not choose again alike."""
    out = tmp_path / "early"
    early = ("--steps", "7", "--save-every", "1", "--keep", "9", "--microbatches", "auto")
    assert main(argv(text, out, *LAYOUT, *early)) == 0
    saved = sorted(int(p.name[5:]) for p in (out / "checkpoints").glob("step-*"))
    assert saved == [6, 7]


def test_one_stage_has_nothing_to_measure(text, tmp_path, cache, capfd):
    out = tmp_path / "one"
    assert main(argv(text, out, "--tp", "1", "--steps", "2", "--microbatches", "auto")) == 0
    assert "one stage waits for nobody" in capfd.readouterr().out
    assert counts(out) == [1, 1]


def test_another_layout_resumes(text, whole, tmp_path, cache, capfd):
    """The checkpoint of TP2 x PP2 goes on in one process: the same losses to rounding."""
    out = tmp_path / "moved"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "checkpoints" / "step-0000008")
    more = ("--tp", "1", "--steps", "8", "--lr", "1e-2", "--eval-every", "4", "--resume")
    assert main(argv(text, out, *more)) == 0
    assert "from step 6" in capfd.readouterr().out
    got, expected = losses(out), losses(whole[0])
    assert got[:6] == expected[:6]
    assert got[6:] == pytest.approx(expected[6:], rel=1e-4)


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "more, parts",
    [
        ((), ["already holds a run", "--resume"]),
        (("--resume", "--steps", "9", "--d-model", "64"), ["model.d_model = 32", "64"]),
        (("--resume", "--steps", "9", "--seed", "1"), ["seed"]),
        (("--resume",), ["step 8", "--steps"]),
    ],
)
def test_a_used_folder_is_not_touched(text, whole, cache, capsys, more, parts):
    before = contents(whole[0])
    flags = [x for x in (*whole[2], *more)]
    assert main(argv(text, whole[0], *flags)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert contents(whole[0]) == before


def test_a_live_run_locks_its_folder(text, tmp_path, cache, capsys):
    out = tmp_path / "live"
    process = start(text, out, *LAYOUT, "--steps", "500")
    try:
        wait_for_steps(out, 1, process)
        assert main(argv(text, out, "--resume", *LAYOUT)) == 2
        assert main(argv(text, out, *LAYOUT)) == 2
        assert "another run is writing" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=90)
        assert process.returncode == 130 and stderr.startswith("moekernels: stopped behind step")
    finally:
        process.kill()


def test_the_lock_of_a_run_that_goes_is_waited_for(tmp_path):
    """Ranks hold their parent's lock a moment longer than it lives."""
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open(resume=False)
    threading.Timer(0.3, lambda: first._lock.close()).start()
    second.open(resume=False)
    with pytest.raises(UsageError, match="another run is writing"):
        RunFolder(tmp_path).open(resume=False)


def test_a_rank_that_dies_ends_the_run_under_its_name(text, tmp_path):
    out = tmp_path / "dies"
    process = start(text, out, *LAYOUT, "--steps", "500")
    wait_for_steps(out, 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[3]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)  # half of what a collective waits
    assert process.returncode == 1
    assert stderr.strip().endswith("rank 3 (tp 1, pp 1): killed by SIGKILL")


def test_one_process_and_variations(text, tmp_path, cache, capfd):
    """bf16 with bf16 moments, selection bias, recomputed layers, drawn lengths, a padded policy."""
    more = "--tp 1 --dtype bf16 --optimizer-state bf16 --bias-update-rate 0.01 --balance-coef 0 "
    more += "--checkpoint-layers 2-3 --lengths 8:48 --policy buckets --steps 3 --recompute-experts"
    assert main(argv(text, tmp_path / "one", *more.split())) == 0
    lines = read_metrics(tmp_path / "one")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_under_torchrun(text, tmp_path):
    env = {**environment(text), "OMP_NUM_THREADS": "1"}
    command = [*torchrun(), *argv(text, tmp_path / "run", "--steps", "7")]
    command += ["--pp", "2", "--schedule", "interleaved", "--virtual-stages", "2"]
    command += ["--microbatches", "auto"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 8))
    assert done.stdout.count("dense    2 ranks") == 1
    assert done.stdout.count("m* = ") == 1 and counts(tmp_path / "run")[:6] == [2] * 3 + [8] * 3
