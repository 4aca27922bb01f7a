"""Compressed sources, other fields, and tokenizers of elsewhere: the same tokens as by hand."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as Theirs
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from moekernels.data.corpus import load_corpus
from moekernels.data.tokenizer import find_tokenizer
from moekernels.errors import UsageError

TEXTS = [f"document {i} says {'spam ' * (i % 7)}eggs" for i in range(300)]


def rows(field: str) -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in TEXTS).encode()


def tokens(path, tmp_path, **options):
    return load_corpus(str(path), vocab_size=300, cache=tmp_path / "cache", **options)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_gives_the_tokens_of_the_plain_one(suffix, tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / f"b.jsonl{suffix}"
    plain.write_bytes(rows("body"))
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(rows("body")))
    else:
        zstandard = pytest.importorskip("zstandard")
        half = len(rows("body")) // 2
        parts = rows("body")[:half], rows("body")[half:]  # two frames, as `cat` makes of two files
        packed.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))
    one, other = (tokens(path, tmp_path, text_field="body") for path in (plain, packed))
    assert np.array_equal(one.tokens, other.tokens) and one.stats.documents == len(TEXTS)
    packed.write_bytes(packed.read_bytes()[:-50])
    with pytest.raises(UsageError, match="is damaged"):
        tokens(packed, tmp_path, text_field="body")


@pytest.mark.parametrize("form", ["parquet", "stream.arrow", "file.arrow"])
def test_a_table_gives_the_tokens_of_its_rows(form, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    plain, path = tmp_path / "a.jsonl", tmp_path / f"b.{form}"
    plain.write_bytes(rows("body"))
    kind = pa.large_string() if form == "parquet" else pa.string()
    columns = {"body": pa.array(TEXTS, kind), "number": range(len(TEXTS)), "other": TEXTS}
    table = pa.table(columns)
    if form == "parquet":
        parquet.write_table(table, path, row_group_size=70)
    else:
        new = pa.ipc.new_stream if form.startswith("stream") else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    one, other = (tokens(path, tmp_path, text_field="body") for path in (plain, path))
    assert np.array_equal(one.tokens, other.tokens) and other.stats.documents == len(TEXTS)
    with pytest.raises(UsageError, match="'number' must be a string, got no such field"):
        tokens(path, tmp_path, text_field="number")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match="is damaged"):
        tokens(path, tmp_path, text_field="body")


@pytest.mark.parametrize(
    ("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=f"{name} needs a package .* pip install {package}"):
        tokens(tmp_path / name, tmp_path)


@pytest.fixture
def words(tmp_path):
    """A tokenizer of whole words, whose texts end in one of its own, as a folder."""
    known = {"[UNK]": 0, "spam": 1, "eggs": 2, "document": 3, "</s>": 4}
    theirs = Theirs(WordLevel(known, unk_token="[UNK]"))
    theirs.pre_tokenizer = Whitespace()
    folder = tmp_path / "words"
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def test_a_tokenizer_of_elsewhere_is_used_and_kept(words, tmp_path):
    (tmp_path / "a.txt").write_text("document spam spam ham eggs")
    corpus = tokens(tmp_path / "a.txt", tmp_path, tokenizer=find_tokenizer(str(words)))
    assert corpus.tokens.tolist() == [3, 1, 1, 0, 2, 4]
    assert corpus.tokenizer.end_of_text == 4
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (corpus.folder / name).read_text() == (words / name).read_text()


def test_a_tokenizer_that_ends_no_text_is_refused(words, tmp_path):
    (words / "tokenizer_config.json").unlink()
    (tmp_path / "a.txt").write_text("spam")
    with pytest.raises(UsageError, match="no token <|endoftext|> that ends a text"):
        tokens(tmp_path / "a.txt", tmp_path, tokenizer=words / "tokenizer.json")
    with pytest.raises(UsageError, match="--tokenizer .*/none: .* is no file"):
        find_tokenizer(str(tmp_path / "none"))


def test_a_vocabulary_too_small_for_it_says_what_would_do(words, tmp_path):
    theirs = Theirs(WordLevel({f"w{i}": i for i in range(400)} | {"</s>": 400}, unk_token="w0"))
    theirs.save(str(words / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("spam")
    with pytest.raises(UsageError, match="401 entries, but .* has 300; give --vocab-size 401"):
        tokens(tmp_path / "a.txt", tmp_path, tokenizer=words / "tokenizer.json")
