"""Configuration: presets, files, flags, and what is said about mistakes."""

from pathlib import Path

import pytest

from moekernels.errors import UsageError
from moekernels.model.experts import one_expert
from moekernels.run import files as cfg


def flags(**given):
    """`layout__tp=2` -> {("layout", "tp"): 2}."""
    return {tuple(k.split("__")): v for k, v in given.items()}


def degrees(run):
    return tuple(getattr(run.layout, d) for d in cfg.DEGREES)


@pytest.mark.parametrize(
    "preset, billions, experts_billions",
    [("spec-30b", 30.2, 30.065), ("spec-26b", 26.0, 25.77), ("spec-literal", 6.6, 6.442)],
)
def test_presets_have_the_parameters_of_the_document(preset, billions, experts_billions):
    run = cfg.resolve(preset, None, {})
    model = run.model
    assert model.parameters_count() / 1e9 == pytest.approx(billions, abs=0.06)
    experts = model.num_layers * model.num_experts * one_expert(model)
    assert experts / 1e9 == pytest.approx(experts_billions, abs=0.006)
    assert degrees(run) == (2, 1, 4, 2, 1)
    assert run.claims.parameters == 30e9 and run.hardware.tflops == 400
    assert (run.batch.microbatches, run.batch.accumulation, run.batch.lengths) == (
        8,
        4,
        "128:10240",
    )


def test_tiny_lays_128_expert_modules_on_each_of_8_ranks():
    run = cfg.resolve(None, None, {})
    lay = run.layout
    assert degrees(run) == (2, 1, 4, 2, 1) and lay.schedule == "1f1b"
    modules = run.model.num_layers * run.model.num_experts
    assert modules == 1024 and modules // (lay.pp * lay.ep) == 128
    assert run.model.expert_d_in > run.model.d_model, "tiny has the document's lift"
    assert run.batch.microbatches * run.batch.accumulation == 32


@pytest.mark.parametrize(
    "given, world, expected",
    [
        ({}, None, (2, 1, 4, 2, 1)),
        ({"tp": 2, "pp": 4}, None, (2, 1, 4, 2, 1)),
        ({"tp": 4}, None, (4, 1, 1, 4, 1)),
        ({"pp": 8}, None, (1, 1, 8, 1, 1)),
        ({"dp": 8, "ep": 8}, None, (1, 8, 1, 8, 1)),
        ({"dp": 4}, None, (1, 4, 1, 1, 1)),
        ({"tp": 2, "dp": 2, "etp": 2, "ep": 2}, None, (2, 2, 1, 2, 2)),
        ({"tp": 2, "pp": 4, "etp": 2, "ep": 1}, None, (2, 1, 4, 1, 2)),
        ({"tp": 2, "etp": 2}, None, (2, 1, 1, 1, 2)),
        ({"tp": 3, "etp": 2}, None, (3, 1, 1, 1, 2)),
        ({"tp": 2}, 8, (2, 4, 1, 2, 1)),
        ({"pp": 2}, 4, (1, 2, 2, 1, 1)),
        ({}, 8, (2, 1, 4, 2, 1)),
    ],
)
def test_degrees_that_are_not_given(given, world, expected):
    run = cfg.resolve(None, None, {("layout", k): v for k, v in given.items()}, world)
    assert degrees(run) == expected


@pytest.mark.parametrize(
    "given, world, text",
    [
        ({"tp": 3}, 8, "[1, 2, 4, 8]"),
        ({}, 4, "product is 4"),
        ({"tp": 2, "dp": 2, "pp": 1}, 8, "8"),
    ],
)
def test_degrees_against_the_ranks_of_torchrun(given, world, text):
    with pytest.raises(UsageError) as error:
        cfg.resolve(None, None, {("layout", k): v for k, v in given.items()}, world)
    assert text in str(error.value)


def test_file_lies_over_the_preset_and_flags_over_both(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nnum_experts = 32\n[layout]\ntp = 2\n[train]\nlr = 1\nsteps = 7\n")
    run = cfg.resolve("tiny", path, flags(train__steps=9))
    assert (run.model.num_experts, run.model.num_layers) == (32, 16)
    assert run.train.lr == 1.0 and isinstance(run.train.lr, float) and run.train.steps == 9
    assert degrees(run) == (2, 1, 1, 2, 1), "a file that gives a degree describes the layout anew"


def test_effective_configuration_reads_back_to_itself(tmp_path):
    run = cfg.resolve(
        "spec-26b", None, flags(layout__pp=2, train__lr=1e-5, batch__data='a "b" \\ c')
    )
    path = tmp_path / "config.toml"
    path.write_text(cfg.to_toml(run))
    again = cfg.resolve(None, path, {})
    for name in cfg.FLAG_SECTIONS:
        assert getattr(again, name) == getattr(run, name)


@pytest.mark.parametrize("preset", cfg.preset_names())
def test_every_preset_divides(preset):
    from moekernels.model.layout import Layout

    run = cfg.resolve(preset, None, {})
    m = run.model
    Layout(*degrees(run)).validate(
        num_experts=m.num_experts,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        d_ff=m.expert_d_ff,
    )


BAD_FILES = {
    "[modle]\n": ["[modle]", "did you mean model?"],
    "[model]\nnum_expert = 3\n": ["model.num_expert", "3", "did you mean num_experts?"],
    "[model]\nnum_experts = '3'\n": ["model.num_experts", "whole number", "'3'"],
    "[model]\nnum_experts = true\n": ["model.num_experts", "whole number", "True"],
    "[model]\nnum_experts = 0\n": ["model.num_experts", "at least 1", "0"],
    "[train]\nlr = 0\n": ["train.lr", "greater than 0", "0"],
    "[train]\nlr = nan\n": ["train.lr", "finite"],
    "[train]\ndtype = 'fp23'\n": ["train.dtype", "'fp23'", "did you mean fp32?"],
    "[batch]\npolicy = 'zzz'\n": ["batch.policy", "packed", "buckets"],
    "[claims]\nmfu = 'x'\n": ["claims.mfu", "list of numbers"],
    "[hardware]\ntflop = 3\n": ["hardware.tflop", "tflops"],
    "model = 3\n": ["model", "section"],
    "[model\n": ["not valid TOML"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_mistakes_in_a_file_name_it_and_what_would_do(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        cfg.resolve(None, path, {})
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path))
    for part in BAD_FILES[text]:
        assert part in message


BAD_FLAGS = [
    (flags(train__optimizer_state="fp16"), "--optimizer-state"),
    (flags(train__clip=-1.0), "--clip"),
    (flags(train__optimizer_state="bf16", train__beta2=0.99995), "0.9999"),
    (flags(batch__lengths="10"), "LOW:HIGH"),
    (flags(batch__lengths="9:3"), "LOW:HIGH"),
    (flags(batch__lengths="128:10240"), "--context 10240"),
    (flags(model__top_k=65), "64"),
    (flags(layout__schedule="interleaved"), "--virtual-stages"),
    (flags(layout__virtual_stages=2), "--schedule interleaved"),
    (flags(model__activation="relu2"), "swiglu"),
]


@pytest.mark.parametrize("given, text", BAD_FLAGS)
def test_mistakes_in_flags(given, text):
    with pytest.raises(UsageError, match=text.replace("[", r"\[")):
        cfg.resolve(None, None, given)


def test_missing_file_and_unknown_preset():
    with pytest.raises(UsageError, match="no such file"):
        cfg.resolve(None, Path("nowhere.toml"), {})
    with pytest.raises(UsageError, match="did you mean spec-30b"):
        cfg.resolve("spec-30", None, {})
