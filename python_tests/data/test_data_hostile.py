"""Text as it comes: odd lines, odd names, linked folders, words without end, another release."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moekernels.data import tokenizer as tokenizer_module
from moekernels.data.corpus import load_corpus
from moekernels.data.documents import survey
from moekernels.data.sources import list_files
from moekernels.data.tokenizer import Tokenizer
from moekernels.errors import UsageError

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


def load(source, tmp_path, vocab_size=300, **options):
    return load_corpus(str(source), vocab_size=vocab_size, cache=tmp_path / "cache", **options)


def texts(root):
    found = survey(list_files(str(root)))
    return [found.text(i) for i in range(len(found))], found.skipped


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a\\ud800b"}', r"line 2: \ud800 at character 1 is half a character"),
        ('{"n": ' + "7" * 5000 + ', "text": "a"}', "line 2: a number of thousands of digits"),
        ("[" * 100_000 + "]" * 100_000, "line 2: nested too deeply"),
    ],
    ids=["surrogate", "digits", "nesting"],
)
def test_an_odd_line_is_named_with_its_file(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UsageError) as error:
        survey(list_files(str(path)))
    assert f"{path} is not JSONL ({message})" in str(error.value)
    with pytest.raises(UsageError, match=r"1 files \(1 not JSONL\)"):
        survey(list_files(str(tmp_path)))


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".NDJson"])
def test_rows_are_read_whatever_the_suffix_looks_like(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert texts(tmp_path) == (["first", "second"], {})


def test_linked_folders_are_read_once(tmp_path):
    root, other = tmp_path / "texts", tmp_path / "other"
    (root / "real").mkdir(parents=True)
    other.mkdir()
    (root / "real" / "b.txt").write_text("inside")
    (other / "c.txt").write_text("elsewhere")
    (root / "again").symlink_to(other)
    (root / "linked").symlink_to(other)
    (root / "to_real").symlink_to(root / "real")
    (root / "up").symlink_to(tmp_path)
    (root / "real" / "circle").symlink_to(root)
    (other / "circle").symlink_to(other)
    (root / "self").symlink_to(root / "self")
    found, skipped = texts(root)
    assert sorted(found) == ["elsewhere", "inside"]
    assert skipped == {"a link to a folder that is read already": 5, "unreadable": 1}


def test_a_name_that_is_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_text(TEXT)
    (tmp_path / "texts" / os.fsdecode(b"\xff.txt")).write_bytes(b"\0")
    corpus = load(tmp_path / "texts", tmp_path)
    assert corpus.stats.documents == 1 and corpus.stats.skipped == {"binary": 1}
    assert load(tmp_path / "texts" / name, tmp_path).stats.documents == 1


def test_a_file_that_changes_meanwhile_is_said(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    found = survey(list_files(str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_text(TEXT + TEXT)
    with pytest.raises(UsageError, match="was changed while it was read"):
        found.text(0)


def test_parts_hold_the_whole_text_whatever_the_blocks(tmp_path, monkeypatch):
    text = "aé漢\U0001f600\n" * 50
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr("moekernels.data.documents._BLOCK", 5)
    found = survey(list_files(str(tmp_path / "a.txt")))
    assert found.characters.tolist() == [len(text)]
    assert found.text(0) == text and found.beginning(0, 7) == text[:7]
    (tmp_path / "a.txt").write_bytes(text.encode()[:-2])
    with pytest.raises(UsageError, match=f"0xf0 at offset {len(text.encode()) - 5}"):
        survey(list_files(str(tmp_path / "a.txt")))


def test_chunks_do_not_depend_on_the_parts():
    text = "".join(random.Random(0).choices("ab \n", k=400_000)).replace("\n", "", 3)
    whole = list(tokenizer_module._chunks([text]))
    pieces = [text[i : i + 7777] for i in range(0, len(text), 7777)]
    assert list(tokenizer_module._chunks(pieces)) == whole and "".join(whole) == text
    assert list(tokenizer_module._chunks([])) == [""]


@pytest.mark.parametrize("letters", ["ACGT", "a", " "])
def test_text_without_spaces_is_learnt_in_short_words(letters, monkeypatch):
    """400,000 letters as one word took two minutes: the square of its length."""
    learnt, bounded = [], tokenizer_module._bounded
    monkeypatch.setattr(
        tokenizer_module, "_bounded", lambda texts: learnt.extend(bounded(texts)) or learnt
    )
    text = "".join(random.Random(0).choices(letters, k=400_000))
    tokenizer = Tokenizer.train([text], 400)
    assert "".join(learnt) == text
    assert max(len(word) for piece in learnt for word in re.findall(r"\S+|\s+", piece)) <= 256
    ids = np.concatenate([ids for _, ids in tokenizer.encode_documents([[text]], np.uint16)])
    assert tokenizer.decode(ids[:-1].tolist()) == text and len(ids) < len(text) / 2


def test_words_of_ordinary_length_are_not_cut():
    assert list(tokenizer_module._bounded([TEXT, "x" * 255])) == [TEXT, "x" * 255]
    assert list(tokenizer_module._bounded(["x" * 600])) == ["x" * 256, "x" * 256, "x" * 88]


INTERRUPTED = """
import signal, sys, time
from moekernels.data.progress import Progress
signal.signal(signal.SIGINT, signal.default_int_handler)
print("working", flush=True)
with Progress(None) as progress:
    progress.wait_for(lambda: time.sleep(600))
"""


def test_native_work_can_be_interrupted():
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"working\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=300)[1]


def test_long_work_is_told_in_lines(monkeypatch):
    monkeypatch.setattr("moekernels.data.progress.SECONDS", 0.0)
    from moekernels.data.progress import Progress

    lines = []
    with Progress(lines.append) as progress:
        progress.stage("tokenising", 8)
        progress.advance(2)
        progress.stage("learning")
        progress.advance()
    assert lines == ["tokenising: 25 %, 0 s", "learning: 0 s"]


def test_a_tokenizer_that_a_run_keeps_is_used_under_another_release(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    first = load(tmp_path / "a.txt", tmp_path)
    kept = tmp_path / "kept.json"
    kept.write_text((first.folder / "tokenizer.json").read_text())
    same = load(tmp_path / "a.txt", tmp_path, tokenizer=kept)
    assert same.folder == first.folder, "the cache of the same release serves"

    monkeypatch.setattr("moekernels.data.corpus.library_version", lambda: "99.0")

    def other(texts, size):
        raise AssertionError("another release would learn other merges")

    monkeypatch.setattr(Tokenizer, "train", other)
    again = load(tmp_path / "a.txt", tmp_path, tokenizer=kept)
    assert again.folder != first.folder and again.identity == first.identity
    assert again.tokens.tolist() == first.tokens.tolist()
    assert (again.folder / "tokenizer.json").read_bytes() == kept.read_bytes()

    kept.write_text(json.dumps({"model": 3}))
    with pytest.raises(UsageError, match="kept.json: no tokenizer that can be read"):
        load(tmp_path / "a.txt", tmp_path, tokenizer=kept)


MEMORY = """
import sys, tracemalloc
from moekernels.data import corpus, documents, tokenizer
tokenizer._SAMPLE_PIECE, tokenizer._CHARACTERS_AT_ONCE = 1 << 14, 1 << 14
documents._BLOCK, corpus._SAMPLE_BYTES = 1 << 14, 20_000
tokenizer._chunks.__defaults__ = (1 << 14,)
tracemalloc.start()
for name in ("small", "large"):
    tracemalloc.reset_peak()
    built = corpus.load_corpus(f"{sys.argv[1]}/{name}.txt", vocab_size=300, cache=sys.argv[2])
    characters = built.stats.characters
    del built
    print(characters, tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """A text that was held took six bytes a letter, at the peak of what Python and numpy allocate
    (the tokenizer gets chunks of one size)."""
    for name, copies in (("small", 600), ("large", 1200)):
        (tmp_path / f"{name}.txt").write_text(TEXT * copies)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
    )
    (letters, small), (more, large) = (map(int, x.split()) for x in done.stdout.splitlines())
    assert more - letters > 5e5 and large - small < 0.5 * (more - letters)
