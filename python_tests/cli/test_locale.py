"""Locales that do not count in UTF-8, and a user that the machine does not know: whole runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moekernels.cli import main
from python_tests.support.small_runs import ROOT, SMALL, losses

LATIN_1 = "de_DE.ISO-8859-1"
TINY = "--layers 2 --experts 4 --d-model 16 --heads 2 --tp 1 --sequences 4 --eval-sequences 4"
TRAIN = ["train", *SMALL, *TINY.split(), "--microbatches", "2", "--steps", "2"]

# One process for several command lines, as a shell passes them: in bytes, with + between them.
COMMANDS = """
import sys
from moekernels import console
from moekernels.cli import main
console.prepare()
line = []
for word in [*sys.argv[1:], "+"]:
    if word == "+":
        print("exit code", main(line), sys.getfilesystemencoding())
    line = [] if word == "+" else [*line, word]
"""


def run(commands, folder, before=(), **environment):
    """The exit codes, the encoding of file names, and what was said on stderr."""
    words = [os.fsencode(word) for line in commands for word in (*line, "+")][:-1]
    hidden = ("HOME", "XDG_CACHE_HOME", "PYTHONUTF8", "PYTHONIOENCODING", "LANG", "LC_ALL")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [*before, sys.executable, "-c", COMMANDS, *words],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        cwd=folder,
        capture_output=True,
        timeout=300,
    )
    said = [x.split()[2:] for x in done.stdout.splitlines() if x.startswith(b"exit code")]
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return [int(code) for code, _ in said], said[0][1].decode(), done.stderr


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory):
    """The environment of a locale that counts in Latin-1."""
    folder = tmp_path_factory.mktemp("locales")
    make = ["localedef", "-c", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / LATIN_1)]
    if shutil.which("localedef") is None:
        pytest.skip("no localedef to make a Latin-1 locale with")
    made = subprocess.run(make, capture_output=True, timeout=60)
    if not (folder / LATIN_1 / "LC_CTYPE").exists():
        pytest.skip(f"localedef makes no Latin-1 locale here: {made.stderr[-200:]}")
    return {"LC_ALL": LATIN_1, "LOCPATH": str(folder)}


@pytest.mark.parametrize("name", ["latin_1", "C"])
def test_accents_under_another_locale(name, request, tmp_path, monkeypatch, capfd):
    """Files and names are UTF-8 wherever they were written: a run goes on under another locale."""
    as_c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    locale = as_c if name == "C" else request.getfixturevalue(name)
    folder = tmp_path / "déjà vu"
    folder.mkdir()
    text, out, cache = folder / "téxt.jsonl", folder / "läuft", folder / "caché"
    rows = "".join(f'{{"wörter": "zeile {i}: käse {i * i}"}}\n' for i in range(1000))
    text.write_text(rows, encoding="utf-8")
    (folder / "ä.toml").write_text('[train]\nlr = "é漢"\n', encoding="utf-8")
    plan = ["plan", "--config", out / "config.toml", "--loads-from", out]
    commands = [
        [*TRAIN, "--data", text, "--text-field", "wörter", "--out", out],
        ["generate", out, "--prompt", "käse", "--tokens", "2", "--temperature", "0"],
        [*plan, "--html", folder / "plän.html"],
        ["train", "--config", folder / "ä.toml"],
        [*TRAIN, "--data", folder / "fehlt é", "--out", folder / "none"],
        [*TRAIN, "--data", b"caf\xe9", "--out", folder / "none"],
        ["generate", out, "--prompt", b"caf\xe9"],
    ]
    codes, encoding, err = run(commands, folder, XDG_CACHE_HOME=str(cache), **locale)
    assert encoding in (["iso8859-1"] if name == "latin_1" else ["ascii", "utf-8"])
    lines = err.splitlines()
    assert codes == [0, 0, 0, 2, 2, 2, 2] and len(lines) == 4, err
    assert b"train.lr must be a number" in lines[0] and b"fehlt" in lines[1]
    assert b"not UTF-8" in lines[2] and b"not UTF-8" in lines[3]
    config = (out / "config.toml").read_text(encoding="utf-8")
    assert f'data = "{text}"' in config
    page = (folder / "plän.html").read_text(encoding="utf-8")
    assert "</html>" in page and not list(folder.glob("none*"))
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["téxt.jsonl", "läuft", "caché", "ä.toml", "plän.html"]
    )

    before = losses(out)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert main(["train", "--resume", "--out", str(out), "--steps", "3"]) == 0
    assert losses(out)[:2] == before and len(losses(out)) == 3
    said = capfd.readouterr().out
    assert "from step 2" in said and "--data was" not in said and "--text-field" not in said


def nobody() -> list[str]:
    """A command line that runs another as a user whom no list of users has."""
    before = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    try:
        tried = subprocess.run([*before, "id", "-u"], capture_output=True, timeout=60)
    except OSError:
        pytest.skip("no unshare, which makes an unknown user")
    if tried.stdout != b"12345\n":
        pytest.skip(f"no unknown user can be made here: {tried.stderr[-200:]}")
    return before


def test_a_user_without_a_name_or_a_home(tmp_path):
    """As in a container: trained, drawn, planned; the cache lies in a private temporary folder."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(2000)))
    commands = [
        [*TRAIN, "--data", "text.txt", "--out", "one"],
        [*TRAIN, "--pp", "2", "--data", "text.txt", "--out", "two"],
        ["plan", "--preset", "tiny"],
        ["info"],
        ["experts", "one"],
    ]
    codes, _, err = run(commands, tmp_path, nobody(), TMPDIR=str(tmp_path / "tmp"))
    assert codes == [0] * 5, err
    for name in ("one", "two"):
        assert {"loss.png", "experts.png", "loads.json"} <= set(os.listdir(tmp_path / name))
        assert json.loads((tmp_path / name / "loads.json").read_text())
    (private,) = Path(tmp_path, "tmp").glob("moekernels-*")
    assert private.name == "moekernels-12345" and private.stat().st_mode & 0o777 == 0o700
