"""Runs whose folder, or whose disk, is not what a run expects: each is one line, nothing that is
no file is replaced, and nothing waits for ever."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from moekernels import files
from moekernels.train import profiling
from moekernels.train.metrics import read_metrics
from python_tests.support.small_runs import train_here

MORE = ("--sequences", "8", "--microbatches", "2", "--resume", "auto", "--eval-sequences", "4")
NULL = os.stat("/dev/null").st_rdev


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    """A run of one step."""
    out = tmp_path_factory.mktemp("base") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(text / "cache"))
        assert train_here(text, out, *MORE, "--steps", "1") == 0
    return out


@pytest.fixture
def run(base, text, cache, tmp_path, monkeypatch, capfd):
    """A copy of it that goes on for a step: (exit code, lines on stderr)."""
    monkeypatch.setattr(files, "PIPE_SECONDS", 0.1)
    shutil.copytree(base, tmp_path / "run")

    def go_on(*more):
        code = train_here(text, tmp_path / "run", *MORE, "--steps", "2", *more)
        return code, capfd.readouterr().err.splitlines()

    return tmp_path / "run", go_on


def in_place(path, kind):
    """Something that is no regular file in the place of one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, NULL)
            path.write_text("x")
        except PermissionError:
            pytest.skip("device nodes need the superuser, and a file system that has them")
    else:
        (path.mkdir if kind == "folder" else lambda: os.mkfifo(path))()
    return path.lstat().st_ino


PLACES = [
    ("trace.json", "device", ""),
    ("trace.json", "folder", "trace.json: cannot be written: Is a directory"),
    ("loads.json", "pipe", "loads.json: cannot be written: nobody reads this pipe"),
    ("experts.png", "device", ""),
    ("experts.safetensors", "folder", "experts.safetensors: cannot be written: Is a directory"),
    ("tokenizer.json", "pipe", "no tokenizer that can be read: nobody writes to this pipe"),
    ("metrics.jsonl", "device", "metrics.jsonl: is there and is no file"),
    ("metrics.jsonl", "folder", "metrics.jsonl: is there and is no file"),
    ("metrics.jsonl", "pipe", "metrics.jsonl: is there and is no file"),
    ("checkpoints", "pipe", "checkpoints: is there and is no folder"),
    ("checkpoints/run.json", "pipe", "run.json: cannot be written: nobody reads this pipe"),
    (".lock", "pipe", "run: cannot be a run's folder: No such device"),
    (".lock", "device", ""),
    ("config.toml", "device", ""),
]


@pytest.mark.parametrize("name, kind, said", PLACES)
def test_what_is_no_file_in_a_runs_folder(run, name, kind, said):
    out, go_on = run
    there = in_place(out / name, kind)
    code, lines = go_on()
    assert (code != 0, len(lines)) == (bool(said), bool(said)), lines
    assert not said or said in lines[0]
    assert (out / name).lstat().st_ino == there, "it stays"


def test_a_checkpoint_takes_the_place_of_no_pipe(run):
    out, go_on = run
    place = out / "checkpoints" / "step-0000002"
    place.mkdir()
    there = in_place(place, "pipe")
    code, lines = go_on()
    assert code == 1 and len(lines) == 1 and "step-0000002: is there and is no folder" in lines[0]
    assert place.lstat().st_ino == there and not list(place.parent.glob(".partial*"))


def test_a_profile_that_finds_no_room(run, monkeypatch):
    """torch.profiler says so on stderr alone, and leaves what it has written."""
    out, go_on = run

    def full(self, path):
        Path(f"{path}.tmp").write_text("{")

    monkeypatch.setattr(profiling.profile, "export_chrome_trace", full)
    code, lines = go_on("--profile", "2")
    assert code == 1 and "profile-00000.json: cannot be written" in lines[-1], lines
    assert " are free; make room, or give another --out" in lines[-1]
    assert not list(out.glob(".profile*"))


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[1]\n", b'{"loss": 1}\n', b"[" * 100_000])
def test_damaged_metrics_are_cut(run, damage):
    out, go_on = run
    before = read_metrics(out)
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(damage)
    assert read_metrics(out) == before
    assert go_on() == (0, []) and len(read_metrics(out)) == 2
