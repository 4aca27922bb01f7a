"""Runs that real life disturbs: signals, kills, restarts, damaged checkpoints, full disks."""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from moekernels.cli import main
from moekernels.data.tokenizer import Tokenizer
from moekernels.parallel.stop import handled
from moekernels.train import shards
from moekernels.train.metrics import read_metrics
from python_tests.support.small_runs import (
    argv,
    environment,
    losses,
    torchrun,
    wait_for_checkpoint,
    wait_for_steps,
)

TINY = "--layers 2 --experts 4 --d-model 16 --heads 2 --vocab-size 258 --tp 1".split()
PAIR = ("--pp", "2")  # two local ranks


def saved(out):
    folder = out / "checkpoints"
    return sorted(int(p.name[5:]) for p in folder.glob("step-*")) if folder.exists() else []


@pytest.fixture
def train(text, cache, capfd, tmp_path):
    """Train in tmp_path/run: (exit code, what was said, on stderr)."""
    torch.set_num_threads(1)  # so small that a second thread only waits

    def run(*more, out="run"):
        code = main(argv(text, tmp_path / out, *TINY, *more))
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


def test_a_run_ends_with_its_weights_saved(train, tmp_path):
    assert train("--steps", "2")[0] == 0 and saved(tmp_path / "run") == [2]
    assert train("--steps", "2", "--save-every", "0", out="none")[0] == 0
    assert saved(tmp_path / "none") == []


def test_resume_auto(train, tmp_path):
    """Begins where there is nothing, goes on where there is a checkpoint, has nothing to do where
    all is done."""
    out = tmp_path / "run"
    assert train("--steps", "2", "--resume")[0] == 2
    code, said, _ = train("--steps", "2", "--resume", "auto")
    assert code == 0 and saved(out) == [2] and "begins anew" not in said
    code, said, err = train("--steps", "4", "--resume", "auto", "--balance-coef", "0.5")
    assert code == 0 and "from step 2" in said and not err and len(losses(out)) == 4
    assert "resume   --balance-coef was 0.05 when the checkpoint was saved, is 0.5\n" in said
    assert "resume   --steps was 2, is 4: the learning rate follows the new length" in said
    code, said, _ = train("--steps", "4", "--resume", "auto")
    assert code == 0 and "step 4 of --steps 4 is done: nothing is left to do" in said


def test_a_run_killed_before_its_first_checkpoint(train, tmp_path):
    out = tmp_path / "run"
    assert train("--steps", "2", "--save-every", "0")[0] == 0
    assert train("--steps", "2")[0] == 2
    code, _, err = train("--steps", "2", "--resume")
    assert code == 2 and "--resume auto" in err
    code, said, _ = train("--steps", "3", "--resume", "auto", "--save-every", "-1")
    assert code == 0 and "no checkpoint in" in said and "begins anew" in said
    assert len(losses(out)) == 3 and saved(out) == [3]


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_goes_on(train, tmp_path):
    out, more = tmp_path / "run", ("--steps", "4", "--save-every", "1", "--keep", "9")
    assert train(*more)[0] == 0
    expected = losses(out)
    for step in (3, 4):
        shard = next((out / "checkpoints" / f"step-000000{step}").glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-40] ^= 4
        shard.write_bytes(data)
    code, said, err = train(*more, "--resume")
    assert code == 0 and not err and "from step 2" in said and losses(out) == expected
    passed = [line for line in said.splitlines() if line.startswith("resume   passed over")]
    assert len(passed) == 2 and all("its contents changed" in line for line in passed)
    for path in (out / "checkpoints").glob("step-*/manifest.json"):
        path.write_text("{}")
    for how in ("must", "auto"):
        code, said, err = train("--steps", "5", "--resume", how)
        assert code == 2 and err.count("\n") == 1 and "no checkpoint can be used" in err
    assert losses(out) == expected


def test_a_checkpoint_of_another_run_is_not_gone_on_from(train, tmp_path):
    """Another seed's, in the same place, whole: its manifest says whose it is."""
    assert train("--steps", "2")[0] == 0 and train("--steps", "2", "--seed", "1", out="b")[0] == 0
    step = "checkpoints/step-0000002"
    (tmp_path / "run" / step).rename(tmp_path / "a")
    (tmp_path / "b" / step).rename(tmp_path / "run" / step)
    code, _, err = train("--steps", "3", "--resume")
    assert code == 2 and err.count("\n") == 1 and "run.json says" in err


def test_the_tokenizer_of_the_run_is_used_under_another_release(train, tmp_path, monkeypatch):
    """Which would learn other merges of the same text."""
    assert train("--steps", "2")[0] == 0
    monkeypatch.setattr("moekernels.data.corpus.library_version", lambda: "99.0")
    monkeypatch.setattr(Tokenizer, "train", lambda *_: pytest.fail("learnt anew"))
    code, said, _ = train("--steps", "3", "--resume")
    assert code == 0 and "from step 2" in said and len(losses(tmp_path / "run")) == 3


def test_sigterm_before_the_first_step(train, tmp_path, monkeypatch):
    """While text is read, say: at once, and nothing is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def reading(*_, **__):
        with tempfile.TemporaryDirectory():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    monkeypatch.setattr("moekernels.data.corpus.load_corpus", reading)
    with handled(signal.SIG_IGN, (signal.SIGTERM,)):  # of a program without a handler for it
        code, _, err = train("--steps", "2")
    assert code == 143 and err == "moekernels: terminated\n"
    assert not (tmp_path / "run").exists() and not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("ranks", [(), PAIR], ids=["one rank", "two ranks"])
def test_a_full_disk_ends_the_run_with_one_line(train, tmp_path, monkeypatch, ranks):
    more = (*ranks, "--steps", "4", "--save-every", "1", "--keep", "1")
    write = shards.write

    def full(path, tensors):
        if "step-0000003" in str(path) and path.name.startswith(f"rank-0000{len(ranks) // 2}"):
            with shards.writing(path, 123_456):
                raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(shards, "write", full)
    code, _, err = train(*more)
    assert code == 1 and err.count("\n") == 1, err
    assert "No space left on device; it needs 123,456 bytes, " in err and " are free" in err
    folder = tmp_path / "run" / "checkpoints"
    assert saved(tmp_path / "run") == [2] and not list(folder.glob(".partial*"))
    monkeypatch.undo()


@contextlib.contextmanager
def signals_behind(out, steps, *signals):
    """Send this process signals once the run has done some steps, unless it is over before."""
    over = threading.Event()

    def watch():
        while len(read_metrics(out)) < steps:
            if over.wait(0.01):
                return
        for number in signals:
            if not over.is_set():
                os.kill(os.getpid(), number)
            over.wait(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    with handled(lambda *_: None):  # one that comes too late for the run ends no test
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(
    "ranks, number",
    [((), signal.SIGINT), (PAIR, signal.SIGTERM)],
    ids=["one rank, Ctrl-C", "two ranks, SIGTERM"],
)
def test_a_signal_ends_a_run_behind_its_step(train, tmp_path, monkeypatch, ranks, number):
    """Saved, drawn, and gone on from bit for bit; nothing is left in the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    out, more = tmp_path / "run", (*ranks, "--steps", "400")
    with signals_behind(out, 3, number):
        code, _, err = train(*more)
    done = len(losses(out))
    assert code == 128 + number and 3 <= done < 400 and saved(out) == [done]
    assert f"moekernels: stopped behind step {done} of 400: saved in" in err
    assert (out / "loss.png").exists() and not list((tmp_path / "tmp").iterdir())
    before = losses(out)
    with signals_behind(out, done + 2, number):
        assert train(*more, "--resume")[0] == 128 + number
    assert losses(out)[:done] == before and len(losses(out)) >= done + 2


def test_a_second_signal_ends_it_at_once(train, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "run"
    monkeypatch.setattr("moekernels.train.loop.finish", lambda *_: time.sleep(600))
    began = time.monotonic()
    with signals_behind(out, 2, *[signal.SIGTERM] * 20):
        code, _, err = train(*PAIR, "--steps", "400")
    assert code == 143 and err == "moekernels: terminated\n" and time.monotonic() - began < 300
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((out / "checkpoints").glob(".partial*"))


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_restarts_a_run_that_lost_a_rank(train, text, tmp_path):
    """kill -9 of a worker, then SIGTERM to torchrun, then another start: the losses of a run that
    nothing disturbed."""
    more = (*PAIR, "--steps", "150", "--save-every", "3")
    assert train(*more, out="whole")[0] == 0
    out, env = tmp_path / "run", {**environment(text), "OMP_NUM_THREADS": "1"}
    command = [*torchrun("--max-restarts", "2"), *argv(text, out, *TINY, *more)]
    process = subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True)
    wait_for_steps(out, 4, process)
    wait_for_checkpoint(out, process)
    before = children(process.pid)
    os.kill(before[1], signal.SIGKILL)
    deadline = time.monotonic() + 300
    while set(children(process.pid)) & set(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    wait_for_steps(out, len(losses(out)) + 2, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert "from step" in stdout and "stopped behind step" in stderr, stderr
    done = len(losses(out))
    assert saved(out)[-1] == done < 150
    code, said, _ = train(*more, "--resume")
    assert code == 0 and f"from step {done}" in said
    assert losses(out) == losses(tmp_path / "whole")
