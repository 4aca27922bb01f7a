"""However a checkpoint is damaged: the one before it goes on, bit for bit, and that is said; or
nothing changed. Never a traceback, never other numbers."""

import hashlib
import json
import os
import pickle
import shutil

import pytest

from moekernels.train import checkpoint
from python_tests.support.checkpoints import ONE, read, state_of, write

STEPS = ("step-0000001", "step-0000002")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs that differ in nothing that a file's name or length shows: of two the numbers
    differ, of two only the identity. Each has steps 1 and 2, of several files."""
    folder = tmp_path_factory.mktemp("runs")
    before, checkpoint.FILE_BYTES = checkpoint.FILE_BYTES, 300
    write(folder / "mine", ONE, *(1, 2), run="a" * 16)
    write(folder / "twin", ONE, *(1, 2), run="b" * 16)
    seeded = checkpoint.Checkpoints(folder / "other", ONE, 2, run="c" * 16)
    for step in (1, 2):
        seeded.save(step, [(n, x + step, info) for n, x, info in state_of(ONE, True)], {})
    seeded.close()
    checkpoint.FILE_BYTES = before
    return folder


def sealed(folder, data):
    """A manifest of other contents, whose hash is right."""
    (folder / "manifest.json").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def edited(folder, change):
    body = json.loads((folder / "manifest.json").read_text())
    change(body)
    return json.dumps(body).encode()


class Exploit:
    def __reduce__(self):
        return os.abort, ()


def of_bytes(path):
    """Damages to one file's bytes, by name."""
    data = path.read_bytes()
    for place in sorted({0, 7, 8, 40, len(data) // 2, len(data) - 1}):
        for bit in (1, 128):
            yield (
                f"bit {bit} of byte {place}",
                data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :],
            )
    middle = len(data) // 2
    yield "zeroed", data[:middle] + bytes(min(512, len(data) - middle)) + data[middle + 512 :]
    yield "all zeros", bytes(len(data))
    yield "empty", b""
    yield "half", data[:middle]
    yield "short", data[:-1]
    yield "long", data + b"\0"
    yield "reversed", data[::-1]
    yield "twice", data + data
    yield "a pickle", pickle.dumps(Exploit())


def damages(runs):
    """(name, function of the run's folder) of every way to spoil step 2."""
    second = runs / "mine" / STEPS[1]
    files = sorted(path.name for path in second.iterdir())
    for name in files:
        for what, data in of_bytes(second / name):
            if data != (second / name).read_bytes():
                yield f"{name}: {what}", lambda f, n=name, d=data: (f / STEPS[1] / n).write_bytes(d)
        yield f"{name}: deleted", lambda f, n=name: (f / STEPS[1] / n).unlink()
        yield f"{name}: a folder", lambda f, n=name: replace(f / STEPS[1] / n, os.mkdir)
        yield f"{name}: a pipe", lambda f, n=name: replace(f / STEPS[1] / n, os.mkfifo)
        yield (
            f"{name}: a link to itself",
            lambda f, n=name: replace(f / STEPS[1] / n, lambda p: os.symlink(p, p)),
        )
        for source in ("mine/step-0000001", "other/step-0000002", "twin/step-0000002"):
            other = (runs / source / name).read_bytes()
            if other != (second / name).read_bytes():
                yield (
                    f"{name}: of {source}",
                    lambda f, n=name, d=other: (f / STEPS[1] / n).write_bytes(d),
                )
    for source in ("mine/step-0000001", "other/step-0000002", "twin/step-0000002"):
        shards = [n for n in files if n.endswith(".safetensors")]
        same = all((runs / source / n).read_bytes() == (second / n).read_bytes() for n in shards)
        if not same:
            yield f"all shards of {source}", lambda f, s=source, n=shards: copy(runs / s, f, n)
        yield f"all of {source}", lambda f, s=source: copy(runs / s, f, files)
    yield "shards exchanged", lambda f: exchange(f / STEPS[1])
    edits = {
        "the step's number": lambda b: b.update(step=7),
        "a step of text": lambda b: b.update(step="2"),
        "no step": lambda b: b.pop("step"),
        "another format": lambda b: b.update(format=99),
        "no format": lambda b: b.pop("format"),
        "no files": lambda b: b.update(files={}),
        "a file elsewhere": lambda b: b["files"].update({"../x": [0, ""]}),
        "a hash": lambda b: b["files"]["rank-00000-000.safetensors"].reverse(),
        "tensors": lambda b: b.update(tensors=3),
        "a box": lambda b: b["tensors"]["head"]["boxes"][0].pop("file"),
        "an unknown key": lambda b: b.update(more=1),
        "facts": lambda b: b.update(facts=[]),
        "the run": lambda b: b.update(run="d" * 16),
    }
    for what, change in edits.items():
        data = edited(second, change)
        yield f"edited {what}", lambda f, d=data: (f / STEPS[1] / "manifest.json").write_bytes(d)
        yield f"edited and sealed {what}", lambda f, d=data: sealed(f / STEPS[1], d)
    for data in (b"", b"null", b"[]", b"{", b"3", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'):
        yield f"sealed {data[:8]!r}", lambda f, d=data: sealed(f / STEPS[1], d)
    yield "gone", lambda f: empty(f / STEPS[1])


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def replace(path, make):
    path.unlink()
    make(path)


def copy(source, folder, names):
    for name in names:
        shutil.copyfile(source / name, folder / STEPS[1] / name)


def exchange(folder):
    a, b = sorted(folder.glob("*.safetensors"))[:2]
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def test_every_damage_is_passed_over_by_name(runs, tmp_path):
    assert read(runs / "mine", ONE, "a" * 16) == (2, True, ())
    tried, wrong = 0, []
    for number, (name, damage) in enumerate(damages(runs)):
        folder = tmp_path / str(number)
        shutil.copytree(runs / "mine", folder)
        damage(folder)
        try:
            step, right, passed = read(folder, ONE, "a" * 16)
            good = step == 1 and right and len(passed) == 1
            good = good and f"{folder / STEPS[1]}: " in passed[0] and "\n" not in passed[0]
            if name.endswith((".safetensors: short", ".safetensors: long")):
                good = good and " bytes of " in passed[0]  # known without reading it
            if not good:
                wrong.append((name, step, right, passed))
        except Exception as error:  # noqa: BLE001
            wrong.append((name, repr(error)))
        shutil.rmtree(folder)
        tried += 1
    assert not wrong
    assert tried > 150


def test_without_a_good_one_nothing_is_taken(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "mine", folder)
    for step in STEPS:
        next((folder / step).glob("*.safetensors")).write_bytes(b"")
    step, _, passed = read(folder, ONE)
    assert step is None and [STEPS[1] in passed[0], STEPS[0] in passed[1]] == [True, True]


def test_what_is_no_checkpoint_is_left_alone(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "mine", folder)
    for name in ("step-x", "step-", "step-\u0663", ".partial-step-0000009", "other"):
        (folder / name).mkdir()
    (folder / "step-0000009").write_text("a file")
    step, right, passed = read(folder, ONE)
    assert (step, right, len(passed)) == (2, True, 1)


def test_nothing_is_unpickled():
    """Neither by us nor by what reads the files."""
    import moekernels.train as train

    root = os.path.dirname(train.__file__)
    for name in ("checkpoint.py", "manifest.py", "shards.py", "resume.py"):
        with open(os.path.join(root, name), encoding="utf-8") as file:
            text = file.read()
        assert "pickle." not in text and "torch.load" not in text and "dcp" not in text, name
