"""Tokens that somebody else has made: the same corpus as from the text, and every fault named."""

import struct

import numpy as np
import pytest
from tokenizers import Tokenizer as Theirs
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from moekernels.data.corpus import load_corpus
from moekernels.data.mixture import parse
from moekernels.errors import UsageError

END = 49
DOCUMENTS = [np.arange(i, i + 5 + i % 11) % 49 for i in range(40)]


@pytest.fixture
def load(tmp_path):
    theirs = Theirs(WordLevel({f"w{i}": i for i in range(49)} | {"<|endoftext|>": END}, "w0"))
    theirs.pre_tokenizer = Whitespace()
    theirs.save(str(tmp_path / "tokenizer.json"))

    def run(source, **options):
        options = {"tokenizer": tmp_path / "tokenizer.json"} | options
        return load_corpus(source, vocab_size=300, cache=tmp_path / "cache", **options)

    return run


def megatron(stem, documents, dtype=np.uint16, code=8, **damage):
    """As Megatron-Core's IndexedDatasetBuilder writes it, each document of two sequences."""
    halves = [half for one in documents for half in (one[: len(one) // 2], one[len(one) // 2 :])]
    lengths = np.array([len(x) for x in halves], np.int32)
    places = (np.cumsum(lengths) - lengths).astype(np.int64) * np.dtype(dtype).itemsize
    firsts = np.arange(0, len(halves) + 1, 2, dtype=np.int64)
    values = {"magic": b"MMIDIDX\x00\x00", "version": 1, "code": code} | damage
    head = struct.pack("<9sQB", values["magic"], values["version"], values["code"])
    counts = struct.pack("<QQ", len(lengths), len(firsts))
    arrays = (values.get("lengths", lengths), values.get("places", places), firsts)
    stem.with_suffix(".idx").write_bytes(head + counts + b"".join(x.tobytes() for x in arrays))
    stem.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())


def documents_of(corpus):
    bounds = zip(corpus.offsets, corpus.offsets[1:])
    return sorted(corpus.tokens[a:b].tolist() for a, b in bounds)


EXPECTED = sorted([*one.tolist(), END] for one in DOCUMENTS)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.int64, 5)])
def test_megatrons_documents_arrive(tmp_path, load, dtype, code, ended):
    given = [np.append(one, END) for one in DOCUMENTS] if ended else DOCUMENTS
    megatron(tmp_path / "a_text_document", given, dtype, code)
    for name in ("a_text_document", "a_text_document.bin", "a_text_document.idx"):
        assert documents_of(load(str(tmp_path / name))) == EXPECTED


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_a_stream_ends_its_documents_itself(tmp_path, load, dtype):
    stream = np.concatenate([np.append(one, END) for one in DOCUMENTS]).astype(dtype)
    np.save(tmp_path / "a.npy", stream)
    corpus = load(str(tmp_path / "a.npy"))
    assert documents_of(corpus) == EXPECTED and corpus.stats.tokens == len(stream)
    np.save(tmp_path / "a.npy", stream[:-1])
    assert documents_of(load(str(tmp_path / "a.npy"))) == EXPECTED


def test_the_rows_of_a_table_are_documents(tmp_path, load):
    np.save(tmp_path / "a.npy", np.arange(40).reshape(5, 8))
    assert documents_of(load(str(tmp_path / "a.npy"))) == [
        [*range(8 * i, 8 * i + 8), END] for i in range(5)
    ]


def test_blocks_meet_where_they_should(tmp_path, load, monkeypatch):
    monkeypatch.setattr("moekernels.data.tokenised._BLOCK", 3)
    test_a_stream_ends_its_documents_itself(tmp_path, load, np.uint16)


def test_a_folder_and_a_mixture_of_them(tmp_path, load):
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "a.npy", np.concatenate([np.append(one, END) for one in DOCUMENTS[:20]]))
    megatron(folder / "b", DOCUMENTS[20:])
    (folder / "notes.txt").write_text("about them")
    corpus = load(str(folder))
    assert documents_of(corpus) == EXPECTED
    assert corpus.stats.skipped == {"text beside tokens": 1}
    mixed = load(parse(f"{folder / 'a.npy'}:0.25 {folder / 'b.bin'}:0.75"))
    assert [len(part.offsets) - 1 for part in mixed.parts()] == [20, 20]


def test_changed_tokens_are_another_corpus(tmp_path, load):
    megatron(tmp_path / "b", DOCUMENTS)
    one = load(str(tmp_path / "b.idx"))
    megatron(tmp_path / "b", [48 - x for x in DOCUMENTS])
    assert load(str(tmp_path / "b.idx")).identity != one.identity


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"magic": b"MMIDIDX\x00\x01"}, "is no .idx file of Megatron that holds whole numbers"),
        ({"version": 2}, "version 2"),
        ({"code": 7}, "dtype 7"),
        ({"lengths": np.full(80, -1, np.int32)}, "is damaged"),
        ({"places": np.zeros(80, np.int64)}, "is damaged"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, load, damage, message):
    megatron(tmp_path / "b", DOCUMENTS, **damage)
    with pytest.raises(UsageError) as error:
        load(str(tmp_path / "b.bin"))
    assert "b.idx" in str(error.value) and message in str(error.value)


def test_a_pair_cut_short_is_named(tmp_path, load):
    megatron(tmp_path / "b", DOCUMENTS)
    index, data = tmp_path / "b.idx", tmp_path / "b.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-2])
    with pytest.raises(UsageError, match=f"is cut short .b.bin has {len(whole) - 2} bytes"):
        load(str(index))
    data.unlink()
    with pytest.raises(UsageError, match="is half of a pair .b.bin is missing"):
        load(str(index))
    data.write_bytes(whole)
    for count in (5, 100):
        index.write_bytes(index.read_bytes()[:count])
        with pytest.raises(UsageError, match="too short|cut short"):
            load(str(data))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"not an array of token ids, \[N\] or \[documents, length\] .float64 \[4\]"),
        (np.zeros((2, 2, 2), int), r"int64 \[2, 2, 2\]"),
        (np.array([{}]), "is no .npy file .*Python objects"),
        (np.array([3, 4, 50, 1]), "token 2 is 50, but the tokenizer has 50 entries"),
        (np.array([3, -1]), "token 1 is -1, but the tokenizer has 50 entries"),
    ],
)
def test_what_holds_no_tokens_is_named(tmp_path, load, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match=message):
        load(str(tmp_path / "a.npy"))


def test_tokens_need_their_tokenizer_and_no_text_beside_them(tmp_path, load):
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="a.npy holds tokens; name the tokenizer that made them"):
        load(str(tmp_path / "a.npy"), tokenizer=None)
    with pytest.raises(UsageError, match="a.txt is text beside tokens; give either"):
        load([str(tmp_path / "a.npy"), str(tmp_path / "a.txt")])
