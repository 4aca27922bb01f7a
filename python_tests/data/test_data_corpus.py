"""Sources and their faults, the tokenizer, and the cache that appears whole or not at all."""

import asyncio
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from moekernels.data import corpus as corpus_module
from moekernels.data.corpus import load_corpus, unigram_entropy
from moekernels.data.documents import survey
from moekernels.data.shuffle import integers, permutation, random_bits
from moekernels.data.sources import list_files
from moekernels.data.tokenizer import END_OF_TEXT, Tokenizer
from moekernels.errors import UsageError
from moekernels.files import cache_folder

REMEDY = "name a UTF-8 text file, a directory of them, a .jsonl file, or stdlib"
TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


def load(source, tmp_path, vocab_size=300, **options):
    return load_corpus(str(source), vocab_size=vocab_size, cache=tmp_path / "cache", **options)


def documents(corpus):
    return [
        corpus.tokenizer.decode(corpus.tokens[a:b])
        for a, b in zip(corpus.offsets, corpus.offsets[1:])
    ]


# --- sources


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "data: {path} is missing; {remedy}"),
        ("empty.txt", b"", "data: {path} is empty; {remedy}"),
        ("blank.txt", b" \n\t\n", "data: {path} is empty; {remedy}"),
        ("a.bin", b"ab\0c", "data: {path} is binary (a zero byte at offset 2); {remedy}"),
        (
            "latin1.txt",
            "caf\xe9".encode("latin-1"),
            "data: {path} is not UTF-8 (byte 0xe9 at offset 3); {remedy}",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "b"\n',
            "data: {path} is not JSONL (line 3: Expecting ',' delimiter at column 13); {remedy}",
        ),
        (
            "list.jsonl",
            b'["text"]\n',
            "data: {path} is not JSONL (line 1: an object was expected, got list); {remedy}",
        ),
        (
            "field.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            "data: {path} is not JSONL (line 2: 'text' must be a string, got no such field); "
            "{remedy}",
        ),
        (
            "null.jsonl",
            b'{"text": null}\n',
            "data: {path} is not JSONL (line 1: 'text' must be a string, got NoneType); {remedy}",
        ),
        (
            "blank.jsonl",
            b'{"text": " "}\n',
            "data: {path} is empty (every 'text' is blank); {remedy}",
        ),
    ],
)
def test_a_named_file_that_is_no_text_is_the_users_error(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        load(path, tmp_path)
    assert str(error.value) == message.format(path=path, remedy=REMEDY)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/corpus-*/"))


def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a regular file; name a UTF-8"):
        load(tmp_path / "pipe", tmp_path)


def test_an_unreadable_path_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(UsageError, match=r"is unreadable \(Not a directory\); name a UTF-8"):
        load(tmp_path / "a.txt" / "b.txt", tmp_path)


def test_a_directorys_misfits_are_skipped_and_counted(tmp_path):
    root = tmp_path / "texts"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b.txt").write_text("second")
    (root / "deep" / "er" / "a.md").write_bytes(b"\xef\xbb\xbfthird, with a mark")
    (root / "a.txt").write_text("first")
    (root / "z.jsonl").write_text('{"text": "fourth"}\n{"text": "fifth"}\n')
    (root / "empty.txt").write_text("")
    (root / "image.png").write_bytes(b"\x89PNG\0")
    (root / "old.txt").write_bytes(b"\xff\xfe")
    (root / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    (root / "dangling").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe")
    (root / ".hidden").write_text("hidden")
    (root / ".git" / "config").write_text("hidden")

    found = survey(list_files(str(root)))
    texts, skipped = [found.text(i) for i in range(len(found))], found.skipped
    assert texts == ["first", "second", "third, with a mark", "fourth", "fifth"]
    assert skipped == {
        "missing": 1,
        "empty": 1,
        "binary": 1,
        "not JSONL": 1,
        "not UTF-8": 1,
        "not a regular file": 1,
    }
    corpus = load(root, tmp_path)
    assert corpus.stats.skipped == skipped
    assert (corpus.stats.files, corpus.stats.documents) == (10, 5)
    assert sorted(documents(corpus)) == sorted(texts)


def test_a_directory_without_text_is_the_users_error(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    with pytest.raises(UsageError) as error:
        load(root, tmp_path)
    assert str(error.value) == f"data: there are no files in {str(root)!r}; {REMEDY}"
    (root / "a").write_bytes(b"\0")
    (root / "b").write_bytes(b"")
    with pytest.raises(UsageError) as error:
        load(root, tmp_path)
    message = f"data: no text in any of the 2 files (1 binary, 1 empty); {REMEDY}"
    assert str(error.value) == message


def test_several_sources_and_another_field(tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.jsonl").write_text('{"body": "beta"}\n')
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    corpus = load_corpus(sources, vocab_size=300, cache=tmp_path / "cache", text_field="body")
    assert sorted(documents(corpus)) == ["alpha", "beta"]


def test_the_standard_library_is_there_without_its_tests():
    names = {file.name for file in list_files("stdlib")}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert all(name.endswith(".py") for name in names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "site-packages"}


# --- tokenizer


def test_any_text_comes_back(tmp_path):
    tokenizer = Tokenizer.train([TEXT], 300)
    for text in ["", "a", TEXT, "déjà 漢字 \U0001f600\r\n\t", f"x{END_OF_TEXT}y", "\x01\x7f"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode(TEXT + END_OF_TEXT) == tokenizer.encode(TEXT + END_OF_TEXT)


def test_long_documents_are_encoded_in_chunks_and_end_once():
    tokenizer = Tokenizer.train([TEXT], 300)
    texts = [TEXT * 500, "short", "no line ends here " * 20_000, TEXT * 300]
    pieces = list(tokenizer.encode_documents(([t[:77], t[77:]] for t in texts), np.uint16))
    assert len(pieces) > 2 * len(texts) and all(len(ids) <= 1 << 17 for _, ids in pieces)
    tokens = np.concatenate([ids for _, ids in pieces])
    lengths = np.bincount([n for n, _ in pieces], weights=[len(ids) for _, ids in pieces])
    lengths = lengths.astype(int)
    ends = np.cumsum(lengths)
    assert (np.flatnonzero(tokens == tokenizer.end_of_text) == ends - 1).all()
    for text, end, length in zip(texts, ends, lengths):
        assert tokenizer.decode(tokens[end - length : end - 1]) == text


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(UsageError) as error:
        load("stdlib", tmp_path, vocab_size=256)
    assert str(error.value) == (
        "data: a vocabulary of 256 cannot hold the 256 bytes and the end of text; use at least 257"
    )


# --- the cached corpus


def test_statistics(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = load(tmp_path / "a.txt", tmp_path)
    stats = corpus.stats
    assert (stats.documents, stats.files, stats.skipped) == (1, 1, {})
    assert stats.characters == len(TEXT)
    assert stats.tokens == len(corpus.tokens) == corpus.offsets[-1]
    assert corpus.tokens[-1] == corpus.tokenizer.end_of_text
    assert 257 <= stats.vocab_size <= 300 and corpus.tokens.max() < stats.vocab_size
    assert stats.unigram_entropy == unigram_entropy(np.bincount(corpus.tokens))


def test_unigram_entropy():
    assert unigram_entropy(np.array([0, 3, 0])) == 0.0
    assert unigram_entropy(np.full(8, 5)) == pytest.approx(math.log(8))


def test_the_cache_is_read_again_and_follows_the_content(tmp_path, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    first = load(source, tmp_path)

    source.touch()
    lines = []
    again = load(source, tmp_path, log=lines.append)
    assert not lines
    assert again.identity == first.identity and (again.tokens == first.tokens).all()
    assert isinstance(again.tokens, np.memmap)

    source.write_text(TEXT + "more")
    changed = load(source, tmp_path, log=lines.append)
    assert changed.identity != first.identity
    assert lines == [f"tokenising {source}, once; the result is kept in {changed.folder}"]
    assert load(source, tmp_path, vocab_size=280).identity != changed.identity

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "moekernels"
    assert load_corpus(str(source), vocab_size=300).folder.parent == cache_folder()


def test_building_twice_gives_the_same_bytes(tmp_path):
    source = str(Path(asyncio.__file__).parent)
    one, two = (
        load_corpus(source, vocab_size=512, cache=tmp_path / name) for name in ("one", "two")
    )
    for name in ("tokens.npy", "offsets.npy", "tokenizer.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert 4.0 < one.stats.unigram_entropy < math.log(512)


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "tokenizer.json", "corpus.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_cache_is_built_again(tmp_path, name, damage):
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    whole = load(source, tmp_path)
    expected = whole.tokens.tolist()
    path = whole.folder / name
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[-4] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes()[:-3])
    lines = []
    assert load(source, tmp_path, log=lines.append).tokens.tolist() == expected
    assert len(lines) == 1 and f"{whole.folder} is damaged ({name}" in lines[0]


def test_a_build_that_dies_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(
            corpus_module.os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            load(source, tmp_path)
    assert not list(tmp_path.glob("cache/corpus-*/"))
    assert documents(load(source, tmp_path)) == [TEXT]


KILLED = """
import os, sys, time
from moekernels.data import corpus

def stop(_):
    print("half written", flush=True)
    time.sleep(60)

corpus.os.fsync = stop
corpus.load_corpus(sys.argv[1], vocab_size=300, cache=sys.argv[2])
"""


def test_a_build_that_is_killed_is_begun_again(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    arguments = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "cache")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half written\n"
        process.kill()
    assert len(list(tmp_path.glob("cache/*.partial-*/tokens.npy"))) == 1
    corpus = load(source, tmp_path)  # the killed one's lock is gone with it
    assert [path.name for path in tmp_path.glob("cache/corpus-*/")] == [corpus.folder.name]
    assert documents(corpus) == [TEXT]


def test_one_of_many_builds_and_the_others_wait(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(TEXT * 200)
    lines, corpora = [], []
    threads = [
        threading.Thread(target=lambda: corpora.append(load(source, tmp_path, log=lines.append)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines) == 1
    assert len({corpus.identity for corpus in corpora}) == 1 and len(corpora) == 6


def test_a_cache_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UsageError) as error:
        load(tmp_path / "a.txt", tmp_path)
    said = str(error.value)
    assert said.startswith(
        f"data: the tokenised corpus cannot be kept: {tmp_path / 'cache'}/corpus"
    )
    assert said.endswith(": cannot be written: File exists; set XDG_CACHE_HOME to another folder")


@pytest.mark.parametrize("name", ["corpus.json", "tokens.npy"])
def test_a_pipe_in_the_cache_is_not_waited_for(tmp_path, monkeypatch, name):
    monkeypatch.setattr("moekernels.files.PIPE_SECONDS", 0.1)
    (tmp_path / "a.txt").write_text(TEXT)
    folder = load(tmp_path / "a.txt", tmp_path).folder
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert load(tmp_path / "a.txt", tmp_path).folder == folder and (folder / name).is_file()


def test_a_lock_that_is_no_file(tmp_path):
    """A pipe is not waited for, and what a link leads to is not emptied."""
    (tmp_path / "a.txt").write_text(TEXT)
    folder = load(tmp_path / "a.txt", tmp_path / "other").folder
    lock = tmp_path / "cache" / folder.with_suffix(".lock").name
    lock.parent.mkdir()
    os.mkfifo(lock)
    with pytest.raises(UsageError, match="cannot be written: No such device"):
        load(tmp_path / "a.txt", tmp_path)
    lock.unlink()
    lock.symlink_to(tmp_path / "a.txt")
    load(tmp_path / "a.txt", tmp_path)
    assert (tmp_path / "a.txt").read_text() == TEXT


# --- the held-out split


def spans_of(corpus, share):
    train, held = corpus.split(share)
    assert len(np.intersect1d(_covered(train), _covered(held))) == 0
    assert len(_covered(train)) + len(_covered(held)) == len(corpus.tokens)
    return train, held


def _covered(spans):
    return np.concatenate([np.arange(a, b) for a, b in spans]) if len(spans) else np.array([])


def test_whole_documents_are_held_out(tmp_path):
    lines = [json.dumps({"text": f"document {i} " * (1 + i % 7)}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = load(tmp_path / "a.jsonl", tmp_path)
    train, held = spans_of(corpus, 0.1)
    assert 0.05 < len(_covered(held)) / len(corpus.tokens) <= 0.1
    assert set(train[:, 0]) | set(held[:, 0]) == set(corpus.offsets[:-1])
    assert len(corpus.split(0.0)[1]) == 0


def test_of_a_single_text_the_tail_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = load(tmp_path / "a.txt", tmp_path)
    train, held = spans_of(corpus, 0.1)
    assert len(train) == len(held) == 1
    assert len(_covered(held)) == int(len(corpus.tokens) * 0.1)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(tmp_path, share):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(UsageError, match=f"held-out share is {share}; use 0 up to less than 1"):
        load(tmp_path / "a.txt", tmp_path).split(share)


# --- random numbers


def test_random_numbers_are_the_same_for_ever():
    assert [hex(x) for x in random_bits(0, 0, 2).tolist()] == [
        "0x568a9b0b1a2c05ec",
        "0x44e5b8b147ef718b",
    ]
    assert random_bits(5, 9, 10)[4:].tolist() == random_bits(5, 9, 6, start=4).tolist()
    assert random_bits(-1, 3, 4).tolist() != random_bits(1, 3, 4).tolist()


def test_permutations_and_integers():
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(n, 1, 2).tolist()) == list(range(n))
    assert permutation(1000, 1, 2).tolist() != permutation(1000, 1, 3).tolist()
    drawn = integers(3, 6, 4000, seed=0, stream=0)
    counts = np.bincount(drawn, minlength=8)
    assert counts[:3].sum() == counts[7:].sum() == 0
    assert counts[3:7].min() > 850
