"""Checkpoints: whole or not there, and readable by another layout."""

import dataclasses
import errno
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from moekernels.errors import RunError, UsageError
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import shard
from moekernels.run import files as cfg
from moekernels.train import checkpoint, resume, shards
from moekernels.train.checkpoint import Checkpoints
from python_tests.support.checkpoints import ONE, read, state_of, write
from python_tests.support.distributed import run_ranks


def save(rank, layout, folder):
    write(folder, Mesh(layout), 5)


def load(rank, layout, folder):
    return read(folder, Mesh(layout))


LAYOUTS = [
    Layout(),
    Layout(tp=2, ep=2),
    Layout(tp=2, etp=2),
    Layout(pp=2),
    Layout(dp=3),
    Layout(tp=2, dp=2, ep=2, etp=2),
]


@pytest.mark.parametrize("there", LAYOUTS, ids=str)
@pytest.mark.parametrize("here", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[5]], ids=str)
def test_one_layout_reads_what_another_wrote(tmp_path, here, there):
    run_ranks(there.world, save, there, tmp_path)
    assert run_ranks(here.world, load, here, tmp_path) == [(5, True, ())] * here.world


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_rank_writes_several_files(tmp_path, monkeypatch):
    """So that they are hashed at once; a piece larger than a file has one of its own."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 300)
    write(tmp_path, ONE, 1)
    assert len(list((tmp_path / "step-0000001").glob("*.safetensors"))) == 4
    assert read(tmp_path, ONE) == (1, True, ())


def test_dtypes_and_shapes_come_back(tmp_path):
    kept = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp64": torch.randn(7, dtype=torch.float64),
        "none": torch.zeros(0, 4),
    }
    state = [(name, x, shard(x.shape)) for name, x in kept.items()]
    checkpoints = Checkpoints(tmp_path, ONE, 1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    blank = [(name, torch.full_like(x, -1), info) for name, x, info in state]
    found = resume.newest(tmp_path)
    checkpoint.load(found.path, found.manifest.tensors, blank)
    assert all(torch.equal(x, kept[name]) for name, x, _ in blank)


def test_the_hashes_are_those_of_sha256sum(tmp_path):
    write(tmp_path, ONE, 1)
    folder = tmp_path / "step-0000001"
    assert os.system(f"cd {folder} && sha256sum --quiet -c manifest.sha256") == 0


def test_a_step_waits_for_the_copy_alone(tmp_path, monkeypatch):
    """Steps go on over tensors that are being saved; what is saved is as they were."""
    monkeypatch.setattr(checkpoint, "_fits", lambda size: True)
    release, written = threading.Event(), shards.write
    monkeypatch.setattr(shards, "write", lambda *a: (release.wait(30), written(*a))[1])
    checkpoints = Checkpoints(tmp_path, ONE, 2)
    state = state_of(ONE, True)
    checkpoints.save(1, state, {})
    for _, x, _ in state:
        x.zero_()
    checkpoints.poll()
    assert resume.newest(tmp_path).path is None
    release.set()
    checkpoints.close()
    assert read(tmp_path, ONE) == (1, True, ())


def test_without_memory_for_a_copy_the_step_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_fits", lambda size: False)
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: pytest.fail("a copy was made"))
    checkpoints = Checkpoints(tmp_path, ONE, 2)
    state = state_of(ONE, True)
    checkpoints.save(1, state, {})
    for _, x, _ in state:
        x.zero_()
    checkpoints.close()
    assert read(tmp_path, ONE) == (1, True, ())


def test_the_newest_are_kept(tmp_path):
    write(tmp_path, ONE, 1, 9, 10, 11, keep=2)
    assert names(tmp_path) == ["step-0000010", "step-0000011"]


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["*.safetensors", "manifest.json", "manifest.sha256"])
def test_only_a_verified_checkpoint_lets_an_older_one_go(tmp_path, where):
    """A damaged one of a later step, or one damaged since it was written, keeps nothing's place."""
    write(tmp_path, ONE, 3, 9, keep=2)
    flip(next((tmp_path / "step-0000009").glob(where)))
    write(tmp_path, ONE, 6, keep=1)
    assert "step-0000006" in names(tmp_path) and "step-0000003" not in names(tmp_path)
    assert read(tmp_path, ONE)[:2] == (6, True)
    checkpoints = write(tmp_path, ONE, 7, keep=2)
    flip(next((tmp_path / "step-0000007").glob(where)))
    checkpoints._worker = ThreadPoolExecutor(1)
    checkpoints.save(8, state_of(ONE, True), {})
    checkpoints.close()
    assert {"step-0000006", "step-0000008"} <= set(names(tmp_path))


def test_the_one_just_written_stays(tmp_path):
    """Though newer ones are good: a disk may have come back since they were passed over."""
    write(tmp_path, ONE, 8, 9)
    write(tmp_path, ONE, 3, keep=2)
    assert names(tmp_path) == ["step-0000003", "step-0000008", "step-0000009"]


def test_another_runs_checkpoint_keeps_nothing_s_place(tmp_path):
    write(tmp_path, ONE, 9, run="b")
    write(tmp_path, ONE, 3, keep=1, run="a")
    assert names(tmp_path) == ["step-0000003", "step-0000009"]
    step, right, passed = read(tmp_path, ONE, run="a")
    assert (step, right) == (3, True) and "is of run b" in passed[0]


def test_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / ".partial-step-0000002-12").mkdir(parents=True)
    (tmp_path / ".partial-step-0000002-12" / "note-0.json").write_text("{}")
    write(tmp_path, ONE, 1)
    assert names(tmp_path) == ["step-0000001"]


def test_a_damaged_step_is_written_over(tmp_path):
    write(tmp_path, ONE, 1, 2)
    next((tmp_path / "step-0000002").glob("*.safetensors")).unlink()
    assert read(tmp_path, ONE)[0] == 1
    write(tmp_path, ONE, 2)
    assert read(tmp_path, ONE) == (2, True, ())


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("room", [True, False], ids=["behind", "waiting"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_one_line_and_costs_nothing_saved(tmp_path, monkeypatch, number, room):
    write(tmp_path, ONE, 1)
    monkeypatch.setattr(checkpoint, "_fits", lambda size: room)
    checkpoints = Checkpoints(tmp_path, ONE, 1)
    monkeypatch.setattr(shards.os, "fsync", fail_with(number))
    with pytest.raises(RunError) as error:
        checkpoints.save(2, state_of(ONE, True), {})
        checkpoints.wait()
    text = str(error.value)
    assert "rank-00000-000.safetensors: cannot be written: " + os.strerror(number) in text
    size = (tmp_path / "step-0000001" / "rank-00000-000.safetensors").stat().st_size
    assert (f"it needs {size:,} bytes" in text) == (number != errno.EIO) and "\n" not in text
    monkeypatch.undo()
    assert names(tmp_path) == ["step-0000001"] and read(tmp_path, ONE) == (1, True, ())


def fail_between(rank, folder):
    """Rank 1 fails after rank 0 has made the folder and before it opens its file there."""
    mesh = Mesh(Layout(pp=2))
    written = shards.write

    def paused(path, tensors):
        dist.barrier()  # both have made the folder
        if rank == 0:
            dist.barrier()
            return written(path, tensors)
        raise RunError("full")

    shards.write, checkpoint._fits = paused, lambda size: False
    checkpoints = Checkpoints(folder, mesh, 1)
    try:
        checkpoints.save(1, state_of(mesh, True), {})
    except (RunError, OSError) as error:
        return str(error)
    finally:
        if rank == 1:
            dist.barrier()  # what was its own is removed
        checkpoints.close(failed=True)
    return ""


def test_a_rank_that_fails_leaves_the_folder_to_the_others(tmp_path):
    """It was empty for a moment, and the other's fault was then the one that was told."""
    first, second = run_ranks(2, fail_between, tmp_path)
    assert (first, second) == ("", "full")


def test_a_limit_on_files_is_met_while_writing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, ONE, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RunError, match="File too large"):
            checkpoints.save(2, state_of(ONE, True), {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not names(tmp_path)


def test_nothing_there(tmp_path):
    for folder in (tmp_path, tmp_path / "no"):
        assert resume.newest(folder) == resume.Found(None, None)


def test_another_shape_is_refused_by_name(tmp_path):
    write(tmp_path, ONE, 3)
    found = resume.newest(tmp_path)
    for info, text in ((shard((7,)), "has shape"), (shard((6,)), "is missing")):
        name = "norm" if text == "has shape" else "other"
        with pytest.raises(UsageError, match=text):
            state = [(name, torch.zeros(info.full_shape), info)]
            checkpoint.load(found.path, found.manifest.tensors, state)


def facts_of(run, step=3):
    sections = {name: dataclasses.asdict(getattr(run, name)) for name in cfg.FLAG_SECTIONS}
    return {"step": step, "run": sections}


@pytest.mark.parametrize(
    "section, key, value, said",
    [
        ("model", "balance_coef", 0.5, "--balance-coef was 0.01 when the checkpoint was saved"),
        ("model", "recompute_experts", True, "--recompute-experts was False"),
        ("model", "init_std", 0.5, "--init-std was 0.02 when the checkpoint was saved, is 0.5"),
        ("batch", "data", "b.txt", "--data was 'stdlib' when the checkpoint was saved"),
        ("batch", "policy", "padded", "--policy was 'packed'"),
        ("model", "balance_scope", "sequence", "--balance-scope was 'microbatch'"),
        ("batch", "microbatches", 4, "had 32 microbatches, has 16: the load-balancing loss of"),
        ("layout", "dp", 2, "the layout was dp 1, is dp 2: the load-balancing loss of"),
        ("layout", "tp", 2, "the layout was tp 1, is tp 2: sums run in another order"),
        ("train", "lr", 1e-4, "--lr was 0.003 when the checkpoint was saved, is 0.0001"),
        ("train", "steps", 200, "the learning rate follows the new length, 0.00"),
        ("train", "keep", 9, None),
    ],
)
def test_what_may_change_is_said(section, key, value, said):
    run = cfg.RunConfig()
    facts = facts_of(run)
    assert resume.compare("step", facts, run) == []
    changed = {**vars(getattr(run, section)), key: value}
    setattr(run, section, type(getattr(run, section))(**changed))
    notes = resume.compare("step", facts, run)
    assert len(notes) == (said is not None) and all(said in note for note in notes)


@pytest.mark.parametrize("change", [{"balance_coef": 0.0}, {"balance_scope": "sequence"}])
def test_only_a_loss_of_micro_batches_changes_with_their_number(change):
    run = cfg.RunConfig(model=DecoderSpec(**change))
    facts = facts_of(run)
    run.batch.microbatches = 4
    assert resume.compare("step", facts, run) == [
        f"a step had 32 microbatches, has 16: {resume.TO_ROUNDING}"
    ]


@pytest.mark.parametrize("key", ["d_model", "top_k", "activation", "rope_theta", "vocab_size"])
def test_what_must_agree_is_refused(key):
    run = cfg.RunConfig()
    facts = facts_of(run)
    facts["run"]["model"][key] = 7
    with pytest.raises(UsageError, match=f"saved with model.{key} = 7, this run has"):
        resume.compare("step", facts, run)
