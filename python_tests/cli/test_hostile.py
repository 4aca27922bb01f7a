"""Hostile configurations: each is refused in one line before anything is allocated, or it runs."""

import json
import os

import pytest

from moekernels import cli
from moekernels.plan import room
from python_tests.support.counting import at_most_calls

HUGE = "9" * 5000
LETTERS = "x" * 60_000
TINY = (
    "--layers 2 --d-model 32 --heads 2 --head-dim 16 --experts 4 --expert-d-ff 32 --vocab-size 300 "
    "--expert-d-in 0 --tp 1 --sequences 64 --context 64"
)

TRAIN = {  # flags -> what the line says
    "--layers 1000000": "--layers must be at most 4096",
    "--layers 0": "--layers must be at least 1, got 0",
    "--layers -16": "--layers must be at least 1, got -16",
    "--layers nan": "--layers must be a whole number",
    "--layers 1e3": "--layers must be a whole number",
    "--layers 0x10": "--layers must be a whole number",
    f"--layers {HUGE}": "--layers must be a whole number",
    "--layers ''": "--layers must be a whole number",
    "--layers 4096 --d-model 1024": "GB here",
    "--layers 9223372036854775808": "at most 4096",
    "--vocab-size 16777216": "GB here",
    "--vocab-size 100000000000": "--vocab-size must be at most",
    "--vocab-size 1": "--vocab-size must be at least 258",
    "--d-model 1048576": "GB here",
    "--d-model 1": "--d-model must be at least 2",
    "--d-model 4294967296": "--d-model must be at most",
    "--heads 3 --tp 2": "tp 2",
    "--heads 65536 --head-dim 1024": "GB here",
    "--heads 0": "--heads must be at least 1",
    "--kv-heads 3": "num_kv_heads 3 does not divide",
    "--kv-heads -1": "--kv-heads must be at least 0",
    "--head-dim 7": "head_dim is 7",
    "--head-dim 2147483648": "--head-dim must be at most",
    "--head-dim 65536 --heads 256": "GB here",
    "--experts 0": "--experts must be at least 1",
    "--experts 65536 --expert-d-ff 4096": "GB here",
    "--experts 1000000000": "--experts must be at most",
    "--top-k 0": "--top-k must be at least 1",
    "--top-k 65": "top_k 65 exceeds",
    "--top-k 1025 --experts 65536": "--top-k must be at most 1024",
    "--top-k 1000000": "--top-k must be at most",
    "--expert-d-ff 1048576": "GB here",
    "--expert-d-ff 0": "--expert-d-ff must be at least 1",
    "--expert-d-in 1048576": "GB here",
    "--expert-d-in -5": "--expert-d-in must be at least 0",
    "--expert-groups 7": "groups",
    "--expert-groups 65536": "groups",
    "--groups-kept 2": "groups",
    "--activation relu3": "--activation is 'relu3': did you mean",
    "--activation ''": "--activation is ''",
    f"--activation {LETTERS}": "(60003 characters)",
    "--score SOFTMAX": "--score is 'SOFTMAX'",
    "--scale inf": "--scale must be a finite number",
    "--scale 1e300": "--scale must be at most",
    "--scale 0": "--scale must be greater than 0",
    "--rope-theta 0": "--rope-theta must be at least 1",
    "--rope-theta nan": "--rope-theta must be a finite number",
    "--norm-eps -1": "--norm-eps must be at least",
    "--norm-eps 1e-400": "--norm-eps must be at least",
    "--balance-coef -0.1": "--balance-coef must be at least 0",
    "--balance-coef 1e400": "--balance-coef must be a finite number",
    "--z-coef ∞": "--z-coef must be a number",
    "--bias-update-rate 1e10": "--bias-update-rate must be at most",
    "--init-std 1e38": "--init-std must be at most",
    "--init-std -0.0": "--init-std must be greater than 0",
    "--embedding-std inf": "--embedding-std must be a finite number",
    "--data ''": "the name is empty",
    "--data /dev/zero": "not a regular file",
    "--data /no/such": "missing",
    f"--data {LETTERS}": "data: xxx",
    f"--data {LETTERS}.bin": "data: xxx",
    f"--data {LETTERS}:1 {LETTERS}.idx:2": "data: xxx",
    f"--eval-data {LETTERS}": "data: xxx",
    "--data \udcff": "not UTF-8",
    "--sequences 0": "--sequences must be at least 1",
    "--sequences 3": "3 sequences cannot fill",
    "--sequences 1000000000000": "--sequences must be at most",
    "--lengths 10": "LOW:HIGH",
    "--lengths 1:2": "LOW:HIGH",
    "--lengths 9:3": "LOW:HIGH",
    "--lengths ²:³": "LOW:HIGH",
    f"--lengths 2:{HUGE}": "LOW:HIGH",
    "--lengths 2:100000": "longer than the context",
    "--lengths -5:5": "--lengths needs a value",
    "--context 1": "--context must be at least 2",
    "--context 1e9": "--context must be a whole number",
    "--context 1000000000000": "--context must be at most",
    "--microbatches 0": "--microbatches must be at least 1|sequences cannot fill",
    "--microbatches 65536": "microbatches in a flush",
    "--microbatches automatic": "must be a whole number or auto",
    "--microbatches 10000 --accumulation 1": "cannot fill",
    "--accumulation 10000000": "--accumulation must be at most 65536",
    "--accumulation 65536": "microbatches in a flush",
    "--pp 4096 --layers 4096 --microbatches 4096": "forward passes in a flush; use at most",
    "--pp 4096 --layers 4096 --microbatches 1": "cannot fill|too many for the",
    "--accumulation -1": "--accumulation must be at least 1",
    "--policy zigzag": "--policy is 'zigzag'",
    "--tp 0": "--tp must be at least 1",
    "--tp 3": "tp 3",
    "--tp 1000000": "--tp must be at most",
    "--dp 4096 --sequences 8192 --microbatches 1 --accumulation 1": "too many for the",
    "--dp 65536 --tp 65536": "more than 65536 ranks",
    "--pp 2048": "more than the 2 layers",
    "--ep 5": "ep",
    "--ep 65536": "ep",
    "--etp 9": "etp",
    "--schedule zero": "--schedule is 'zero'",
    "--schedule interleaved --pp 2": "--virtual-stages",
    "--virtual-stages 4096": "--virtual-stages",
    "--schedule interleaved --pp 2 --virtual-stages 4096": "more than the 2 layers",
    "--layers-per-stage 1,1,1": "--layers-per-stage",
    "--layers-per-stage ²": "--layers-per-stage",
    "--layers-per-stage ,": "--layers-per-stage",
    "--checkpoint-layers 1-99999999999999": "--checkpoint-layers",
    "--checkpoint-layers 2-1": "--checkpoint-layers",
    "--checkpoint-layers -": "--checkpoint-layers",
    "--dispatcher teleport": "--dispatcher is 'teleport'",
    "--steps 0": "--steps must be at least 1",
    "--steps 100000000000000000000": "--steps must be at most",
    "--steps ten": "--steps must be a whole number",
    "--lr 0": "--lr must be greater than 0",
    "--lr -inf": "--lr needs a value",
    "--lr=-inf": "--lr must be a finite number",
    "--lr '1 000'": "--lr must be a number",
    "--min-lr-ratio 2": "--min-lr-ratio must be at most 1",
    "--warmup -1": "--warmup must be at least 0",
    "--clip nan": "--clip must be a finite number",
    "--weight-decay -1": "--weight-decay must be at least 0",
    "--beta1 1": "--beta1 must be at most",
    "--beta2 1.5": "--beta2 must be at most",
    "--eps 0": "--eps must be at least",
    "--dtype fp8": "--dtype is 'fp8'",
    "--optimizer-state int8": "--optimizer-state is 'int8'",
    "--seed -1": "--seed must be at least 0",
    "--seed 2147483648": "--seed must be at most",
    "--device tpu": "--device is 'tpu'",
    "--eval-sequences 100000000": "--eval-sequences must be at most",
    "--keep 0": "--keep must be at least 1",
    "--save-every -2": "--save-every must be at least -1",
    "--out ''": "--out must not be empty",
    "--out /proc/run": "/proc/run: cannot be a run's folder",
    f"--out {LETTERS}": "cannot be a run's folder",
    "--out /dev/null": "/dev/null: cannot be a run's folder",
    "--name ''": "--name ''",
    "--name ../x": "--name '../x'",
    "--name /etc": "--name '/etc'",
    "--name ..": "--name '..'",
    f"--name {LETTERS}": "--name",
    "--resume": "no checkpoint to resume from",
    f"--resume --out {LETTERS}": "cannot be a run's folder",
    "--preset ''": "--preset must not be empty",
    "--preset ../tiny": "unknown preset '../tiny'",
    "--config ''": "--config must not be empty",
    "--config /dev/zero": "larger than",
    "--config /": "Is a directory",
    "--config no.toml": "no such file",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i} of the text\n" for i in range(4000)))
    return path


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path, tmp_path_factory):
    """A machine of 8 GB; what would start ranks is told instead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(room, "available", lambda: 8e9)
    monkeypatch.setattr("moekernels.parallel.launch.run_local", lambda *_, **__: 0)


def call(capsys, argv):
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def split(flags):
    return [
        word.strip("'")
        for word in (flags.split(" ") if "'1 000'" not in flags else ["--lr", "1 000"])
    ]


def refused(capsys, argv, said):
    with at_most_calls(20_000_000):  # a search of the planner makes 4 million
        code, out, err = call(capsys, argv)
    assert (code, out) == (2, ""), err[-300:]
    assert err.startswith("moekernels: ") and err.count("\n") == 1 and len(err) < 1700
    assert any(part in err for part in said.split("|")), err[:300]
    assert "Traceback" not in err


@pytest.mark.parametrize("case", TRAIN.items(), ids=lambda c: ascii(c[0])[:60])
def test_train_refuses(capsys, text, tmp_path, case):
    flags, said = case
    data = [] if "--data" in flags else ["--data", str(text)]
    refused(capsys, ["train", *TINY.split(), *data, *split(flags)], said)
    assert not list(tmp_path.rglob("*")), "nothing is left behind"


RUNS = [
    "",
    "--lr 1e30 --clip 0 --weight-decay 0 --warmup 0",
    "--steps 1000000000 --warmup 1000000000",
    "--seed 2147483647",
    "--microbatches auto --pp 2",
    "--lengths 2:2",
    "--z-coef 1e38 --balance-coef 1e38",
    "--save-every 1000000000 --keep 1000000000 --eval-every 1000000000",
    "--eps 1e-30 --norm-eps 1e-30 --beta1 0 --beta2 0",
    "--name naïve-漢字",
]


@pytest.mark.parametrize("flags", RUNS)
def test_train_starts(capsys, text, flags):
    code, _, err = call(capsys, ["train", *TINY.split(), "--data", str(text), *flags.split()])
    assert (code, err) == (0, "")


TOML = {  # a file's bytes -> what the line says
    b"[model]\nnum_layers = " + HUGE.encode(): "thousands of digits",
    b"[model]\nnum_layers = 9223372036854775808": "model.num_layers must be at most",
    b"[train]\nlr = " + b"[" * 5000: "nested too deeply|not valid TOML",
    b"[train]\nlr = 1\nlr = 2\n": "not valid TOML",
    b"[train]\n[train]\n": "not valid TOML",
    b"train.lr = 1\n[train]\nsteps = 2\n": "not valid TOML",
    b"[train]\nlr = '1'\n": "train.lr must be a number, got '1'",
    b"[train]\nlr = true\n": "train.lr must be a number, got True",
    b"[train]\nlr = [1]\n": "train.lr must be a number, got [1]",
    b"[train]\nlr = {a = 1}\n": "train.lr must be a number",
    b"[train]\nlr = 2020-01-01\n": "train.lr must be a number, got datetime.date",
    b"[train]\nlr = inf\n": "train.lr must be a finite number",
    b"[train]\nlr = 1e400\n": "train.lr must be a finite number",
    b"[train]\nlr = 1" + b"0" * 400: "train.lr must be a finite number",
    b"[train]\nsteps = 1.0\n": "train.steps must be a whole number, got 1.0",
    b"[train]\nstepps = 1\n": "unknown key train.stepps = 1: did you mean steps?",
    b"[train.lr]\n": "train.lr must be a number, got {}",
    b"[[train]]\nlr = 1\n": "train must be a section",
    b"[trian]\n": "unknown section [trian]: did you mean train?",
    b"['/etc/passwd']\n": "unknown section [/etc/passwd]: it is one of",
    b"['']\n": "unknown section []",
    b"[layout]\ntp = 'two'\n": "layout.tp must be a whole number",
    b"[layout]\ntp = -2\n": "layout.tp must be at least 1",
    b"[batch]\ndata = 3\n": "batch.data must be a string",
    b'[batch]\ndata = "a\\u0000b"\n': "data: a\\x00b is",
    b"[batch]\nlengths = [1, 2]\n": "batch.lengths must be a string",
    b"[workload]\nlengths = [nan]\n": "workload.lengths must be a list",
    b"[workload]\nloads = [inf]\n": "workload.loads must be a list of at most",
    b"\xff\xfe[\0train]": "not UTF-8 text (byte 0xff at offset 0)",
    b"[batch]\npolicy = 'caf\xe9'": "not UTF-8 text (byte 0xe9 at offset 21)",
    b"[train]\r\nlr = 1\rsteps = 2\r\n": "not valid TOML",
    b"\0": "not valid TOML",
    b"# " + b"x" * (1 << 20): "larger than 1048576 bytes",
    b"[model]\nactivation = '" + LETTERS.encode() + b"'": "(600",
}


@pytest.mark.parametrize("content", TOML, ids=lambda c: ascii(c)[:50])
def test_a_file_is_refused(capsys, tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    refused(capsys, ["train", *TINY.split(), "--config", str(path)], TOML[content])
    assert [p.name for p in tmp_path.rglob("*")] == ["run.toml"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_file_may_have_a_mark_and_other_line_ends(capsys, text, tmp_path, mark, end):
    path = tmp_path / "é.toml"
    lines = [b"[train]", b"steps = 3", b"[batch]", f"data = {str(text)!r}".encode(), b""]
    path.write_bytes(mark + end.join(lines))
    code, _, err = call(capsys, ["train", *TINY.split(), "--config", str(path)])
    assert (code, err) == (0, "")


VERIFY = {
    "--experts 0": "--experts must be at least 1",
    "--experts 65536": "GB here",
    "--experts 10000000": "--experts must be at most",
    "--top-k 9": "top_k 9 exceeds",
    "--steps 1000000000": "--steps must be from 1 to",
    "--steps 0": "--steps must be from 1 to",
    "--tp 1000": "tp 1000|ranks are too many",
    "--dp 4000": "ranks are too many",
    "--dtype ''": "--dtype ''",
    f"--schedule {LETTERS}": "(60002 characters)|(60003 characters)",
}
PLAN = {
    "--gpus 0": "--gpus must be at least 1",
    "--gpus 100000000": "--gpus must be at most",
    "--gpus -8": "--gpus must be at least 1",
    "--gpus 65536 --layers 4096": "forward passes to search",
    "--gpus 64 --sequences 65536": "forward passes to search",
    "--gpus 4096 --layers 4096": "forward passes to search",
    "--memory-gb nan": "--memory-gb must be a finite number",
    "--memory-gb 1e-9": "memory binds|nothing fits",
    "--tflops 1e308": "--tflops must be at most",
    "--memory-gb 1e10": "--memory-gb must be at most",
    "--tflops 0": "--tflops must be greater than 0",
    "--objective speed": "--objective is 'speed': it is one of",
    "--at-least inf": "--at-least must be a finite number",
    "--zipf -1": "--zipf must be at least 0",
    "--loads-from ''": "--loads-from",
    "--loads-from /dev/zero": "larger than",
    "--loads-from /": "cannot be read: No such file",
    "--lengths-from /dev/zero": "larger than",
    "--here 0": "--here must be at least 1",
    "--against /no/such": "no such file|not calibrated",
    "--trace /": "/: cannot be written: Is a directory",
    "--html /no/such/x": "/no/such/x: cannot be written",
}


@pytest.mark.parametrize("flags", VERIFY, ids=lambda f: f[:40])
def test_verify_refuses(capsys, flags):
    refused(capsys, ["verify", *split(flags)], VERIFY[flags])


@pytest.mark.parametrize("flags", PLAN)
def test_plan_refuses(capsys, flags):
    refused(capsys, ["plan", *split(flags)], PLAN[flags])


LOADS = {
    '{"a": 1}': "an object",
    '"text"': "a text",
    "null": "null",
    "3": "a single value",
    "[]": "an empty list",
    "[[]]": "layer 1 has 0 loads",
    "[1, [2]]": "layer 1 has 2 loads",
    '[[1], {"a": 1}]': "layer 1 has 1 loads",
    "[" * 100_000: "not JSON",
    "[" + HUGE + "]": "not JSON: no such numbers",
    "[1": "not JSON: Expecting",
    json.dumps([1e400] * 64): "a load that is no number",
    json.dumps([True] * 64): "a load that is no number",
    json.dumps(["1"] * 64): "a load that is no number",
    json.dumps([-1] * 64): "a load that is no number",
    "[1" + "0" * 400 + ", " + "1, " * 62 + "1]": "a load that is no number",
    json.dumps([0] * 64): "has no row at all",
    "\udcff": "not UTF-8 text",
}


@pytest.mark.parametrize("content", LOADS, ids=lambda c: ascii(c)[:40])
def test_loads_of_another_shape(capsys, tmp_path, content):
    path = tmp_path / "loads.json"
    path.write_bytes(os.fsencode(content))
    refused(capsys, ["plan", "--loads-from", str(path)], LOADS[content])
