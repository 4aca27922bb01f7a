"""What the program writes: files of every kind, closed or narrow outputs, help."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from moekernels import cli, files
from moekernels.errors import UsageError, one_line
from moekernels.run import files as cfg
from moekernels.train import plots

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {  # name -> its parser; bench's flags are pytest's
    name: parser
    for name, parser in cli.build_parser()._subparsers._group_actions[0].choices.items()
    if name != "bench"
}


def program(command, **env):
    """A shell's command line around `moekernels`."""
    script = f'moekernels() {{ {sys.executable} -m moekernels "$@"; }}\n{command}'
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    settings = {key: value for key, value in settings.items() if value is not None}
    return subprocess.run(["bash", "-c", script], capture_output=True, env=settings, timeout=300)


# --- files


def test_a_regular_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    files.write(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    path.chmod(0o640)
    with open(path) as old:
        files.write(path, b"new")
        assert old.read() == "é\n", "whoever has it open keeps the old one"
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a"]


def test_links_stay_and_their_targets_are_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    for name in ("old", "new"):
        (tmp_path / f"to_{name}").symlink_to(Path("there") / name)
        files.write(tmp_path / f"to_{name}", "x")
        assert (tmp_path / f"to_{name}").is_symlink()
        assert (tmp_path / "there" / name).read_text() == "x"


def test_what_is_no_file_is_written_to_or_refused(tmp_path, monkeypatch):
    device = os.stat("/dev/null")
    files.write("/dev/null", "gone")
    (tmp_path / "null").symlink_to("/dev/null")
    files.write(tmp_path / "null", "gone")
    assert os.path.samestat(os.stat("/dev/null"), device) and (tmp_path / "null").is_symlink()

    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.write(tmp_path / "pipe", "through")
    reader.join(10)
    assert got == ["through"] and (tmp_path / "pipe").is_fifo()

    monkeypatch.setattr(files, "PIPE_SECONDS", 0.1)
    for path, reason in (
        (tmp_path / "pipe", "nobody reads this pipe"),
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "such", "No such file"),
    ):
        with pytest.raises(OSError, match=reason) as error:
            files.write(path, "x")
        assert error.value.filename == str(path)
    with pytest.raises(ValueError, match="nobody writes"):
        files.read(tmp_path / "pipe")
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]


def test_a_full_device_says_what_is_missing(tmp_path):
    with pytest.raises(OSError) as error:
        files.write("/dev/full", "x" * 12_345)
    said = files.no_room(Path("/dev/full"), error.value)
    assert re.fullmatch(
        r"/dev/full: cannot be written: No space left on device; it needs 12,345 bytes, [\d,]+ are "
        r"free; make room, or give another --out",
        said,
    )
    with pytest.raises(OSError) as error:
        files.write(tmp_path, "x")
    said = files.no_room(tmp_path, error.value, remedy="give another file")
    assert said == f"{tmp_path}: cannot be written: Is a directory; give another file"


def test_the_programs_own_output_is_written_to(tmp_path):
    code = "from moekernels import files; print(1); files.write('/dev/stdout', '2\\n'); print(3)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, env=env, check=True)
    assert (tmp_path / "out").read_text() == "1\n2\n3\n"


def test_the_cache_has_a_place_without_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "moekernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "moekernels"
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    private = tmp_path / f"moekernels-{os.getuid()}"
    monkeypatch.setenv("HOME", "")
    assert files.cache_folder() == private and private.stat().st_mode & 0o777 == 0o700

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files.Path, "home", nobody)
    assert files.cache_folder() == private


# --- words


def test_messages_show_no_more_than_a_line_of_a_value():
    text = str(UsageError(f"a\nb\t\x1b[31m {'x' * 60_000} \udce9: é漢"))
    assert text == f"a b\\t\\x1b[31m {'x' * 60}...{'x' * 20} (60000 characters) \\udce9: é漢"
    assert one_line("two  spaces stay") == "two  spaces stay"
    assert len(one_line("word " * 10_000)) < 1400


@pytest.mark.parametrize(
    "name, names, near",
    [
        ("stps", ["steps", "seed"], "steps"),
        ("modle", ["model", "batch"], "model"),
        ("/etc/passwd", ["data", "steps"], None),
        ("banana", ["train", "plan", "bench"], None),
        ("bf16", ["fp64", "fp32"], None),
        ("x" * 60_000, ["x" * 8], None),
        ("", ["train"], None),
    ],
)
def test_a_hint_is_given_where_a_name_is_near(name, names, near):
    assert cfg.near(name, names) == near


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_default_of_every_flag_that_takes_a_value(capsys, command):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    optional = [a for a in COMMANDS[command]._actions if a.option_strings and not a.required]
    valued = [a for a in optional if a.nargs != 0]
    boolean = [a for a in optional if "--no-" in "".join(a.option_strings)]
    assert len(valued) >= 2 or command in ("import", "export", "experts")
    assert out.count("(default") >= len(valued) + len(boolean)
    for action in valued + boolean:
        assert "(default" in action.help, action.option_strings


# --- outputs that are closed, narrow or gone


def test_closed_and_narrow_outputs(tmp_path):
    """One command line for all: a start of the program takes seconds."""
    (tmp_path / "é.toml").write_text("[train]\nlr = 'é'\n", encoding="utf-8")
    done = program(
        "moekernels info | head -1 >/dev/null; echo ${PIPESTATUS[0]}\n"
        "moekernels info >&-; echo $?\n"
        "moekernels train --preset x 2>&-; echo $?\n"
        f"moekernels train --config {tmp_path}/é.toml; echo $?\n",
        LC_ALL="POSIX",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        PYTHONIOENCODING=None,
    )
    assert done.stdout.split() == [b"0", b"0", b"2", b"2"]
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and b"train.lr must be a number" in lines[0]


def test_a_configuration_holds_paths_as_utf8(tmp_path, monkeypatch):
    run = cfg.resolve(None, None, {("batch", "data"): "/données/\x7f"})
    (tmp_path / "a.toml").write_text(cfg.to_toml(run), encoding="utf-8")
    assert cfg.resolve(None, tmp_path / "a.toml", {}).batch.data == "/données/\x7f"
    # What a Latin-1 file system calls é is written down as é all the same.
    monkeypatch.setattr(files.os, "fsencode", lambda text: text.encode("latin-1"))
    monkeypatch.setattr(files.os, "fsdecode", lambda data: data.decode("latin-1"))
    here = "é".encode().decode("latin-1")
    assert files.portable(here) == "é" and files.native("é") == here


# --- pictures


def test_pictures_do_not_hang_on_a_notebooks_settings(tmp_path):
    code = (
        "import numpy as np, pathlib, sys; from moekernels.train import plots; "
        "print(plots.draw(pathlib.Path(sys.argv[1]), [{'step': 1, 'loss': 2.0}], "
        "np.ones((2, 4)), 1.0))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "no_such_backend"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.stdout == "[]\n" and not done.stderr
    assert sorted(os.listdir(tmp_path)) == ["experts.png", "loss.png"]


def test_a_picture_of_many_experts_is_of_a_picture_s_size(tmp_path):
    """It grew with them: minutes and gigabytes for 65,536."""
    plots.plot_experts(tmp_path / "a.png", np.ones((600, 8192)))
    width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert width <= 5000 and height <= 5000


def test_a_picture_that_fails_is_said(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(plots, "plot_loss", broken)
    said = plots.draw(tmp_path, [], np.ones((1, 2)), None)
    assert said == ["loss.png is not drawn: RuntimeError: no font"]
    assert os.listdir(tmp_path) == ["experts.png"]


def test_trace_goes_where_it_is_told(tmp_path, capsys):
    target, link = tmp_path / "flush.json", tmp_path / "link.json"
    link.symlink_to(target)
    assert cli.main(["plan", "--trace", str(link), "--html", "/dev/null"]) == 0
    assert json.loads(target.read_text())["traceEvents"] and link.is_symlink()
