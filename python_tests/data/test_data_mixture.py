"""Several sources with weights, and held-out text of one's own."""

import dataclasses
import json
import random

import numpy as np
import pytest

from moekernels.cli import main
from moekernels.data.corpus import load_corpus
from moekernels.data.loader import BatchLoader
from moekernels.data.mixture import BLOCK, Mixture, Source, parse
from moekernels.errors import UsageError
from moekernels.run.folder import read_metrics


def noise(letters, count):
    return "".join(random.Random(count).choices(letters, k=count))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """No source has a letter of another."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": noise("adgjm", 50 + 5 * i)}) for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b").mkdir()
    for i in range(30):
        (tmp_path / "b" / f"{i}.txt").write_text(noise("behkn", 50 + 5 * i))
    (tmp_path / "c.txt").write_text(noise("cfilo", 2000))
    return tmp_path


def load(sources, cache, **options):
    return load_corpus(sources, vocab_size=300, cache=cache, **options)


def loader(corpus, **options):
    return BatchLoader(corpus, **({"sequences": 64, "microbatches": 2, "context": 32} | options))


def texts_of(corpus, batches):
    for batch in batches:
        for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
            yield corpus.tokenizer.decode(batch.tokens[a:b].tolist())


def whose(text):
    return next(kind for kind in ("adgjm", "behkn", "cfilo") if set(text) <= set(kind))[0]


def test_how_sources_are_written(texts):
    assert parse("stdlib") == [Source("stdlib")]
    assert parse("a.jsonl:3 b/:1") == [Source("a.jsonl", 0.75), Source("b/", 0.25)]
    assert parse("a.jsonl b") == [Source("a.jsonl"), Source("b")]
    assert parse("a.jsonl:3") == [Source("a.jsonl")]
    (texts / "my text:2").write_text("c")
    assert parse("my text:2") == [Source("my text:2")]
    assert parse("'my text:2':1 b:1") == [Source("my text:2", 0.5), Source("b", 0.5)]
    assert parse("no such file.txt") == [Source("no such file.txt")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl:1 b", "--data: b has no weight, but a.jsonl has; give all of them one"),
        ("a.jsonl:0 b:1", "--data: the weight of a.jsonl is 0; use one above 0"),
        ("a.jsonl:-1 b:1", "--data: the weight of a.jsonl is -1; use one above 0"),
        ("a.jsonl:1e999 b:1", "--data: the weight of a.jsonl is 1e999; use one above 0"),
        ("a.jsonl:1 a.jsonl:2", "--data: a.jsonl is named twice"),
        ("a.jsonl 'b", '--data "a.jsonl \'b": No closing quotation; quote names'),
    ],
)
def test_what_cannot_be_read_is_said(texts, text, message):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("lengths", [None, (4, 24)], ids=["documents", "lengths"])
def test_each_source_has_its_share(texts, lengths):
    corpus = load(parse("a.jsonl:0.25 b:0.5 c.txt:0.25"), texts / "cache")
    options = {"context": None, "lengths": lengths} if lengths else {}
    data = loader(corpus, **options)
    steps = BLOCK // 64
    seen = [whose(t) for step in range(1, steps + 1) for t in texts_of(corpus, data.batch(step))]
    assert [seen.count(x) for x in "abc"] == [BLOCK // 4, BLOCK // 2, BLOCK // 4]
    held = {whose(t) for batches in data.eval_batches(4) for t in texts_of(corpus, batches)}
    assert held == set("abc")
    assert "0.5 of it b: " in data.describe()


def test_any_place_is_reached_without_what_came_before(texts):
    corpus = load(parse("a.jsonl:0.7 b:0.3"), texts / "cache")
    pool = loader(corpus).train
    starts, lengths = pool.draw(0, 3 * BLOCK, seed=5)
    for first, count in ((0, 7), (BLOCK - 3, 9), (BLOCK + 100, BLOCK + 50), (3 * BLOCK - 1, 1)):
        here = pool.draw(first, count, seed=5)
        assert np.array_equal(here[0], starts[first : first + count])
        assert np.array_equal(here[1], lengths[first : first + count])


def test_a_source_is_read_through_before_it_repeats(texts):
    corpus = load(parse("a.jsonl:0.5 c.txt:0.5"), texts / "cache")
    pool = loader(corpus).train
    first = pool.pools[0]
    starts, _ = pool.draw(0, 2 * len(first), seed=1)
    own = [s for s in starts.tolist() if s in set(first.starts.tolist())]
    assert len(own) > 20 and len(set(own[: len(first)])) == min(len(own), len(first))


def test_sources_without_weights_are_one_text(texts):
    corpus = load(parse("a.jsonl b"), texts / "cache")
    assert corpus.stats.documents == 150 and not corpus.sources
    assert corpus.identity == load(["a.jsonl", "b"], texts / "cache").identity


def test_other_weights_are_another_run_in_the_same_tokens(texts):
    one = load(parse("a.jsonl:0.7 b:0.3"), texts / "cache")
    two = load(parse("a.jsonl:0.6 b:0.4"), texts / "cache")
    assert one.folder == two.folder
    with pytest.raises(UsageError, match=r"batch: weights is \[0.6, 0.4\], but was \[0.7, 0.3\]"):
        loader(two).load_state_dict(loader(one).state_dict())
    loader(one).load_state_dict(loader(one).state_dict())


def test_a_source_too_rare_or_without_text_is_said(texts):
    with pytest.raises(UsageError, match="less than one sequence in 4096"):
        loader(load(parse("a.jsonl:1e-6 b:1"), texts / "cache"))
    (texts / "empty").mkdir()
    (texts / "empty" / "x.bin").write_bytes(b"\0")
    with pytest.raises(UsageError, match="data: no text in any file of empty; name a UTF-8"):
        load(parse("a.jsonl:1 empty:1"), texts / "cache")


def test_shares_sum_to_a_block():
    for weights in ([1.0], [1 / 3] * 3, [0.7, 0.2, 0.1], [1 / 7] * 7):
        mixed = Mixture.of([None] * len(weights), [Source("x", w) for w in weights])
        assert sum(mixed.counts) == BLOCK
        assert all(abs(n - w * BLOCK) <= 1 for n, w in zip(mixed.counts, weights))


RUN = ("--steps", "2", "--sequences", "8", "--context", "32", "--vocab-size", "300")
SMALL = (
    "--layers",
    "2",
    "--d-model",
    "16",
    "--expert-d-ff",
    "16",
    "--heads",
    "2",
    "--kv-heads",
    "1",
)


def run(*more):
    return main(
        ["train", *RUN, *SMALL, "--head-dim", "8", "--microbatches", "2", "--accumulation", "1"]
        + ["--tp", "1", "--eval-sequences", "8", "--out", "run", *more]
    )


def test_a_run_of_several_sources_with_held_out_text_of_its_own(texts, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(texts / "cache"))
    sources = ("--data", "a.jsonl:0.7", "b:0.3")
    assert run(*sources, "--eval-data", "c.txt") == 0
    said = capsys.readouterr().out
    assert "0.7 of it a.jsonl" in said and "held-out loss of c.txt" in said
    (line,) = (x for x in read_metrics(texts / "run") if "eval_loss" in x)
    # Words that training never saw: that text alone is measured.
    assert line["eval_loss"] > 0
    assert run("--steps", "3", "--resume") == 0
    assert len(read_metrics(texts / "run")) == 3
    assert run("--steps", "4", "--resume", "--eval-data", "b") == 2
    assert "--eval-data names b, but the checkpoint's run had another" in capsys.readouterr().err
    assert run("--steps", "4", "--resume", "--eval-data", "") == 2
    assert "names no text, but the checkpoint's run had one" in capsys.readouterr().err
    assert run("--steps", "4", "--resume", "--data", "a.jsonl:1", "b:1") == 2
    assert "weights" in capsys.readouterr().err


def test_held_out_text_of_ones_own_leaves_all_others_to_training(texts):
    corpus = load("a.jsonl", texts / "cache")
    own = load("c.txt", texts / "cache", tokenizer=corpus.folder / "tokenizer.json")
    data = loader(dataclasses.replace(corpus, evaluation=own))
    assert data.train.documents == 120
    held = {whose(t) for batches in data.eval_batches(2) for t in texts_of(own, batches)}
    assert held == {"c"}
    assert corpus.tokenizer.decode(data.held_out_tokens(8))[0] in "cfilo"
