"""Trainings of seconds, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from moekernels.cli import main
from moekernels.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--layers 4 --experts 8 --d-model 32 --heads 4 --head-dim 8 --expert-d-in 48 --expert-d-ff 32 "
    "--vocab-size 300 --sequences 16 --context 48 --microbatches 4 --accumulation 1 --warmup 2 "
    "--device cpu --eval-sequences 16"
).split()
# Two layers, a second or less; what a test is about it adds.
TINY = (
    "--layers 2 --experts 8 --d-model 16 --heads 2 --head-dim 8 --expert-d-in 24 --expert-d-ff 16 "
    "--vocab-size 300 --context 32 --accumulation 1 --device cpu --tp 1"
).split()
LAYOUT = ["--tp", "2", "--pp", "2"]


def argv(text, out, *more):
    return ["train", *SMALL, "--data", str(text / "text.txt"), "--out", str(out), *more]


def train_here(text, out, *more):
    """A TINY run in this process (and its ranks): its exit code."""
    torch.set_num_threads(1)  # threads of so small a run only wait for each other
    return main(["train", *TINY, "--data", str(text / "text.txt"), "--out", str(out), *more])


def trained(text, out, capfd, *more):
    """What a run in this process printed, which did not fail."""
    torch.set_num_threads(1)
    code = main(argv(text, out, *more))
    said = capfd.readouterr()
    assert code == 0, said.err
    return said.out


def environment(text):
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(text / "cache")}


def run_command(text, *command):
    return subprocess.Popen(
        [sys.executable, "-m", "moekernels", *command],
        env=environment(text),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(text, out, *more):
    return run_command(text, *argv(text, out, *more))


def losses(out):
    return [line["loss"] for line in read_metrics(out)]


def wait_for_steps(out, steps, process, seconds=300):
    deadline = time.monotonic() + seconds
    while len(read_metrics(out)) < steps and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    assert len(read_metrics(out)) >= steps


def wait_for_checkpoint(out, process, seconds=300):
    """Until one is whole: the run goes on while it is written, several steps on a busy machine."""
    deadline = time.monotonic() + seconds
    while not list((out / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    assert list((out / "checkpoints").glob("step-*"))


def torchrun(*flags):
    """The command line up to moekernels' own arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*command, "2", *flags, "-m", "moekernels"]
