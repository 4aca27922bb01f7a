"""The loader: every token once an epoch, a step from anywhere, the same data on any layout."""

import json

import pytest
import torch

from moekernels.data import NO_LABEL
from moekernels.data.batch_plan import POLICIES, Cost
from moekernels.data.corpus import load_corpus
from moekernels.data.loader import BatchLoader, Pieces, Sampler
from moekernels.errors import UsageError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    lines = [
        json.dumps({"text": " ".join(f"word{(i * j) % 97}" for j in range(1 + i * 7 % 150))})
        for i in range(300)
    ]
    (root / "a.jsonl").write_text("\n".join(lines))
    return load_corpus(str(root / "a.jsonl"), vocab_size=320, cache=root / "cache")


def loader(corpus, **options):
    defaults = {"sequences": 24, "microbatches": 4, "context": 64}
    if "lengths" in options:
        defaults["context"] = None
    return BatchLoader(corpus, **(defaults | options))


def pairs(batches):
    """(tokens, labels) of every sequence in microbatches, padding removed, sorted."""
    found = []
    for batch in batches:
        for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
            keep = slice(a, b) if batch.valid is None else batch.valid[a:b].nonzero()[:, 0] + a
            tokens, labels = batch.tokens[keep].tolist(), batch.labels[keep].tolist()
            if tokens:
                found.append((tokens, labels))
    return sorted(found)


def test_an_epoch_reads_every_token_of_every_document_once(corpus):
    data = loader(corpus)
    train, _ = corpus.split(data.held_out)
    seen = {int(a): [] for a, _ in train}
    starts, lengths = data.train.draw(0, len(data.train), seed=3)
    assert lengths.min() >= 1 and lengths.max() == 64
    owners = sorted(seen)
    for start, length in zip(starts.tolist(), lengths.tolist()):
        owner = max(o for o in owners if o <= start)
        seen[owner] += range(start, start + length)
    for a, b in train.tolist():
        assert sorted(seen[a]) == list(range(a, b - 1))  # the end of text is a label only
    assert data.train.cut == sum(b - a - 1 > 64 for a, b in train.tolist())
    again = data.train.draw(len(data.train), len(data.train), seed=3)
    assert sorted(again[0]) == sorted(starts) and again[0].tolist() != starts.tolist()


def test_labels_are_the_next_tokens(corpus):
    batches = loader(corpus, align=4).batch(1)
    stream = corpus.tokens.tolist()
    text = "".join(map(chr, stream))
    for tokens, labels in pairs(batches):
        assert tokens[1:] == labels[:-1]
        assert "".join(map(chr, [*tokens, labels[-1]])) in text
    for batch in batches:
        assert batch.rows % 4 == 0
        assert batch.positions[batch.cu_seqlens[:-1]].eq(0).all()
        assert int((batch.labels != NO_LABEL).sum()) == batch.num_tokens


def test_the_last_piece_of_a_document_learns_its_end():
    spans = torch.tensor([[0, 6], [6, 7], [7, 12]]).numpy()
    pieces = Pieces.of(spans, 2)
    assert pieces.starts.tolist() == [0, 2, 4, 7, 9]
    assert pieces.lengths.tolist() == [2, 2, 1, 2, 2]
    assert (pieces.documents, pieces.cut) == (3, 2)


def test_the_step_alone_decides_the_batch(corpus):
    one, other = loader(corpus), loader(corpus)
    for step in (1, 2, 7, 40):  # 40 lies some epochs on
        one.batch(step)
    resumed, straight = other.batch(40), one.batch(40)
    assert len(resumed) == len(straight) == 4
    for a, b in zip(resumed, straight):
        assert a.tokens.equal(b.tokens) and a.labels.equal(b.labels)
        assert a.cu_seqlens == b.cu_seqlens and a.loss_scale == b.loss_scale
    assert pairs(one.batch(1)) != pairs(one.batch(2))
    assert pairs(one.batch(1)) != pairs(loader(corpus, seed=1).batch(1))
    with pytest.raises(ValueError, match="steps count from 1, got 0"):
        one.batch(0)


@pytest.mark.parametrize("options", [{}, {"lengths": (8, 120)}])
def test_every_layout_and_policy_sees_the_same_sequences(corpus, options):
    whole = loader(corpus, **options)
    expected = pairs(whole.batch(3))
    assert len(expected) == 24
    for policy in POLICIES:
        for dp, align in ((1, 2), (2, 1), (3, 4)):
            ranks = [
                loader(corpus, policy=policy, dp=dp, dp_rank=r, align=align, **options)
                for r in range(dp)
            ]
            steps = [rank.batch(3) for rank in ranks]
            assert pairs([batch for step in steps for batch in step]) == expected
            tokens = sum(batch.num_tokens for step in steps for batch in step)
            assert {1 / batch.loss_scale for step in steps for batch in step} == {tokens}
            assert all(rank.global_tokens(3) == tokens for rank in ranks)
            assert len({str(rank.plan(3)) for rank in ranks}) == 1
            rows = [[batch.rows for batch in step] for step in steps]
            assert rows == ranks[0].plan(3).rows


def test_drawn_lengths_lie_in_the_range_and_cover_it(corpus):
    data = loader(corpus, lengths=(10, 200), sequences=64)
    assert isinstance(data.train, Sampler)
    lengths = [n for step in range(1, 20) for n in data._drawn(step)[1].tolist()]
    assert min(lengths) == 10 and max(lengths) == 200
    assert sum(lengths) / len(lengths) == pytest.approx(105, rel=0.05)
    starts, lengths = data.train.draw(0, len(data.train), seed=0)
    train, _ = corpus.split(data.held_out)
    assert (starts + lengths).max() < train[-1, 1]
    ranges = sorted(zip(starts.tolist(), lengths.tolist()))
    assert all(a + n <= b for (a, n), (b, _) in zip(ranges, ranges[1:]))


def test_held_out_batches_are_fixed_and_never_trained_on(corpus):
    data, other = loader(corpus, held_out=0.2), loader(corpus, held_out=0.2, seed=9)
    batches = [batch for step in data.eval_batches(3) for batch in step]
    assert len(batches) == 12
    assert pairs(batches) == pairs([b for step in other.eval_batches(3) for b in step])
    train, held = corpus.split(0.2)
    starts, lengths = data._eval.draw(0, 72, seed=0)
    assert starts.min() >= held[0, 0] and train[-1, 1] <= held[0, 0]
    for options in ({"lengths": (8, 120)}, {}):
        step = next(loader(corpus, **options).eval_batches(1))
        assert sum(batch.num_tokens for batch in step) * step[0].loss_scale == pytest.approx(1)
    with pytest.raises(UsageError, match="nothing is held out; use a held-out share above 0"):
        next(loader(corpus, held_out=0.0).eval_batches(1))


def test_a_short_text_has_a_held_out_loss_all_the_same(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("to be or not to be, that is the question\n" * 3)
    short = load_corpus(str(path), vocab_size=300, cache=tmp_path)
    for options in ({}, {"lengths": (2, 30)}):
        data = loader(short, **options)
        assert len(next(data.eval_batches(1))) == len(data.batch(1)) == 4


def test_resume_with_other_data_is_refused(corpus):
    data = loader(corpus)
    state = json.loads(json.dumps(data.state_dict()))
    loader(corpus, dp=2, policy="padded", microbatches=2).load_state_dict(state)
    with pytest.raises(UsageError) as error:
        loader(corpus, seed=1).load_state_dict(state)
    assert str(error.value) == (
        "batch: seed is 1, but was 0 when the checkpoint was saved; use the same value"
    )
    with pytest.raises(UsageError) as error:
        data.load_state_dict(state | {"corpus": "another"})
    assert str(error.value) == (
        f"data: {corpus.stats.source} is not the text that the checkpoint was trained on; "
        "use the same files and vocabulary"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "batch: the context is 0; use at least 1"),
        ({"context": None}, "batch: use either a context or a range of lengths"),
        (
            {"context": None, "lengths": (9, 8)},
            "batch: lengths 9:8; use low:high with 1 <= low <= high",
        ),
        ({"sequences": 0}, "batch: 0 sequences per step; use at least 1"),
        (
            {"sequences": 3},
            "batch: 3 sequences cannot fill 4 microbatches; use at least 4 sequences, or at most "
            "3 microbatches",
        ),
        (
            {"max_tokens": 20},
            "batch: a sequence of 64 tokens exceeds the limit of 20 per microbatch; use sequences "
            "of at most 20, or a limit of at least ",
        ),
    ],
)
def test_bad_options_show_before_the_first_step(corpus, options, message):
    with pytest.raises(UsageError) as error:
        loader(corpus, **options)
    assert str(error.value).startswith(message)


def test_too_little_text_is_the_users_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(UsageError) as error:
        loader(load_corpus(str(path), vocab_size=300, cache=tmp_path))
    assert str(error.value) == (f"data: {path} leaves 0 tokens for training; use a longer text")
    path.write_text("abcd")
    tiny = load_corpus(str(path), vocab_size=300, cache=tmp_path)
    assert sum(batch.num_tokens for batch in loader(tiny).batch(1)) == 48  # one piece, repeated
    with pytest.raises(UsageError) as error:
        loader(tiny, lengths=(1, 9))
    assert str(error.value) == (
        f"data: {path} leaves 3 tokens for training, too few for lengths 1:9; "
        "use a longer text, or lengths up to 2"
    )


def test_describe(corpus):
    text = loader(corpus, cost=Cost(1, 1)).describe()
    assert text.startswith(corpus.stats.source + ": 300 documents, ")
    assert "sequences of at most 64 tokens" in text and "are longer and cut" in text
    assert loader(corpus, lengths=(2, 9)).describe().endswith("; lengths drawn from 2 to 9")
