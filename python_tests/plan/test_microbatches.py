"""`--microbatches auto`: the fit, the choice, and what is said of it; `test_train.py` runs it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from moekernels.data.corpus import Corpus, CorpusStats
from moekernels.errors import UsageError
from moekernels.pipeline.simulate import idle_microbatches
from moekernels.plan import microbatches as mb
from moekernels.run import files as cfg


def flush(alpha, work, idle, m):
    return (m + idle) * (alpha + work / m)


@pytest.mark.parametrize("alpha, work", [(2e-3, 0.3), (1e-4, 0.5), (5e-2, 0.1)])
@pytest.mark.parametrize("few, many", [(1, 2), (4, 16), (3, 31)])
def test_the_fit_finds_what_is_there(alpha, work, few, many):
    found = mb.fit((few, alpha + work / few), (many, alpha + work / many))
    assert found == pytest.approx((alpha, work), rel=1e-9)


def test_noise_gives_no_negative_cost():
    assert mb.fit((2, 1.0), (8, 2.0)) == (2.0, 0.0)  # slower where there is less to do
    assert mb.fit((2, 8.0), (8, 1.0)) == (0.0, pytest.approx(56 / 3))


def test_the_document():
    """The rule itself: p = 4, W = 320 ms, alpha = 0.94 ms."""
    assert mb.optimum(0.94e-3, 0.32, 3) == pytest.approx((3 * 0.32 / 0.94e-3) ** 0.5)


@pytest.mark.parametrize(
    "name, stages, virtual, idle",
    [
        ("1f1b", 1, 1, 0),
        ("1f1b", 4, 1, 3),
        ("interleaved", 4, 2, 3 / 2),
        ("interleaved", 8, 4, 7 / 4),
        ("zb", 4, 1, 1),  # W takes a third
    ],
)
def test_what_a_schedule_idles_for(name, stages, virtual, idle):
    assert idle_microbatches(name, stages, virtual) == pytest.approx(idle)


@pytest.mark.parametrize("idle", [0.0, 1.0, 3.0, 1.5, 7 / 4])
def test_no_count_is_better_than_the_chosen(idle):
    for alpha, work in itertools.product([0.0, 1e-4, 3e-3, 0.2], [0.0, 1e-3, 0.3, 5.0]):
        for least, most in ((1, 64), (5, 9), (7, 7), (20, 128)):
            chosen = mb.choose(alpha, work, idle, least, most)
            assert least <= chosen <= most
            best = min(flush(alpha, work, idle, m) for m in range(least, most + 1))
            assert flush(alpha, work, idle, chosen) <= best * (1 + 1e-12)


def test_two_settings_that_differ_and_fit():
    for least, most, stages in itertools.product(range(1, 20), range(1, 40), (1, 2, 4, 8)):
        found = mb.settings(least, most, stages)
        if least >= most:
            assert found is None
        else:
            few, many = found
            assert least <= few < many <= most
            assert many >= 4 * few or many == most or few == least


def test_a_tuner_measures_then_decides():
    """Steps of unequal tokens; the first step of a setting, ten times slower, is not counted."""
    alpha, work, mean = 1.5e-3, 0.24, 1100
    tuner = mb.Tuner(1, 64, (4, 16), 3.0, done=7)
    for place, tokens in enumerate((900, 1000, 1200, 5000, 1200, 1000)):
        m = tuner.count(8 + place)
        assert m == (4 if place < 3 else 16)
        took = (m * alpha / mean + work / mean) * tokens * (10 if place in (0, 3) else 1)
        assert tuner.saw(8 + place, took, tokens) == (place == 5)
    chosen, text = tuner.decide()
    assert chosen == round((3 * work / alpha) ** 0.5) == 22
    assert "alpha 1.50 ms, W 240.0 ms, m* = 21.9" in text and text.endswith("of 1 to 64: 22")


@pytest.mark.parametrize("gigabytes, fits", [(1e3, True), (0.05, False)])
def test_memory_bounds_the_count(gigabytes, fits):
    run = cfg.resolve("tiny", None, {("batch", "lengths"): "64:256"})

    offsets = np.arange(0, 100_001, 1000)  # lengths are all that a plan of a batch needs
    stats = CorpusStats("nothing", 1, {}, 100, 0, 100_000, 257, 1.0)
    corpus = Corpus(Path("nowhere"), "none", stats, np.empty(0), offsets)
    counts = [mb.least(run, corpus, f * gigabytes * 1e9, "cpu") for f in (1.0, 1.5, 3.0)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0] == 1) == fits and counts[0] <= 32


def test_what_auto_needs_and_how_it_is_written():
    flags = {("batch", "microbatches"): "auto"}
    run = cfg.resolve("tiny", None, flags)
    assert run.batch.microbatches == cfg.AUTO
    assert 'microbatches = "auto"' in cfg.to_toml(run)
    with pytest.raises(UsageError, match="measures for 6 steps, --steps is 6"):
        mb.check(cfg.resolve("tiny", None, {**flags, ("train", "steps"): 6}), 0)
    for wrong in (0, -1, "many", 2.5):
        with pytest.raises(UsageError, match="--microbatches must be"):
            cfg.resolve("tiny", None, {("batch", "microbatches"): wrong})
