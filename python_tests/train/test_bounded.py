"""A run whose exchange has buffers of a bounded size: steps that did not fit never were."""

from __future__ import annotations

import hashlib

import pytest

from moekernels.parallel import bound
from moekernels.train import monitor
from moekernels.train.metrics import read_metrics
from python_tests.support.small_runs import train_here

RUN = (
    "--dp 2 --ep 2 --steps 3 --sequences 8 --microbatches 2 --warmup 2 --lr 1e-2 --eval-every 2 "
    "--eval-sequences 8 --bias-update-rate 0.01 --save-every 3"
).split()
ITS_OWN = {"attempts", "bubble", "cores", "memory_gb", "seconds", "tokens_per_s"}


def state(out) -> list[str]:
    """A digest of each file of tensors that the run saved."""
    files = sorted((out / "checkpoints").glob("step-*/*.safetensors"))
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def numbers(line: dict) -> dict:
    return {k: v for k, v in line.items() if k not in ITS_OWN and not k.startswith("exchange_")}


@pytest.mark.parametrize("more", [(), ("--exchange-parts", "2")], ids=["whole", "in parts"])
def test_a_tiny_bound_ends_in_the_bits_of_exact_buffers(text, cache, tmp_path, monkeypatch, more):
    """Losses, gradients, loads, what is watched, held-out losses, parameters and moments: even
    where the bound grows by what was seen alone."""
    monkeypatch.setattr(bound, "GROWTH", 1.0)
    monkeypatch.setattr(monitor, "EVERY", 1)
    end = monitor.Monitor.end

    def of_one_attempt(self, shown):
        assert len(self.watching) == 2  # a layer each
        return end(self, shown)

    monkeypatch.setattr(monitor.Monitor, "end", of_one_attempt)
    for name, buffers in (("exact", "exact"), ("bounded", "bounded:1")):
        train_here(text, tmp_path / name, *RUN, *more, "--exchange-buffers", buffers)
    exact, bounded = (read_metrics(tmp_path / name) for name in ("exact", "bounded"))
    assert list(map(numbers, bounded)) == list(map(numbers, exact))
    assert state(tmp_path / "bounded") == state(tmp_path / "exact") != []
    assert [line["attempts"] for line in exact] == [1, 1, 1]
    assert sum(line["attempts"] for line in bounded) > 3
    assert "together_on_a_rank" in exact[0]  # watched, and repeated
    assert bounded[0]["attempts"] > 1


def test_a_bound_that_holds_is_never_exceeded(text, cache, tmp_path, capfd):
    more = ("--exchange-buffers", "bounded:2")
    assert train_here(text, tmp_path / "run", *RUN, *more) == 0
    assert [line["attempts"] for line in read_metrics(tmp_path / "run")] == [1, 1, 1]
    assert "rows did not fit" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--dp 2 --ep 2 --exchange-buffers bounded:0.9", "below 1 not even rows that are spread"),
        ("--dp 2 --exchange-buffers bounded:2", "with ep 1 no rows are exchanged; give --ep"),
        ("--dp 2 --ep 2 --top-k 3 --exchange-buffers bounded:2", "give --dispatcher all_to_all"),
        (
            "--dp 2 --ep 2 --exchange collective --exchange-buffers bounded:2",
            "is one of the shared exchange; leave --exchange collective out",
        ),
    ],
)
def test_what_cannot_be_bounded_is_refused(text, cache, tmp_path, capfd, flags, said):
    assert train_here(text, tmp_path / "run", *flags.split()) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and said in error
