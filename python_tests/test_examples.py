"""The programs of examples/, run as a reader runs them, and what they are to show."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *args):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*args)


def test_op_autograd():
    assert run("op_autograd") < 1e-12


def test_moe_layer():
    losses = run("moe_layer", 20)
    assert losses[-1] < losses[0] / 2


def test_in_transformers():
    pytest.importorskip("transformers", "5.10.1")
    assert run("in_transformers") < 1e-5


def test_two_ranks():
    losses = run("two_ranks", 12)
    assert losses[-1] < losses[0] - 1


def test_plan_from_python():
    plans = run("plan_from_python")
    assert [plan.gpus for plan in plans] == [4, 8, 32]  # two cards do not hold it
    assert [plan.strategy.offload_optimizer > 0 for plan in plans] == [True, False, False]
    assert sorted(plans, key=lambda plan: plan.sequences_per_second) == plans


def test_finetune_lora():
    pytest.importorskip("transformers", "5.10.1")
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    losses = run("finetune_lora", 12)
    assert losses[-1] < losses[0] - 1


def test_continue_pretraining():
    pytest.importorskip("transformers", "5.10.1")
    first, last = run("continue_pretraining", 12)
    assert last < first - 1


def test_megatron_layer():
    pytest.importorskip("megatron.core", reason="needs megatron-core 0.16")
    assert run("megatron_layer") < 1e-4


def test_every_example_is_run():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
