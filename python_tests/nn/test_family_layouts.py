"""Every family on TP2 x PP2 x EP2, pipeline included, against transformers; and on other layouts
against one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from python_tests.support.distributed import RankPool
from python_tests.support.layouts import assemble, compare, micro_batches

pytest.importorskip("transformers")

from moekernels.data.batch import MicroBatch
from moekernels.integrations.families import (
    decoder_spec,
    family_of,
    form_of,
    in_our_shape,
    load_,
    their_names,
)
from moekernels.model.layout import Layout
from moekernels.parallel.mesh import Mesh
from moekernels.run import files as cfg
from moekernels.verify.compare import Side
from python_tests.support.transformers_models import tiny_model, worst

TOLERANCE = 1e-5
LENGTHS = [[17, 5], [5, 1], [23], [6, 8]]  # a microbatch each
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {},
    "Qwen2Moe": {"mlp_only_layers": [0], "qkv_bias": True},
    "Dots1": {},
    "Olmoe": {"attention_bias": True},
    "Mixtral": {"num_local_experts": 6, "sliding_window": 6},
    "Glm4Moe": {"use_qk_norm": True, "attention_bias": True},
    "DeepseekV3": {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}},
    "DeepseekV2": {"q_lora_rank": None, "v_head_dim": 20},
    "GptOss": {"sliding_window": 5},
}
SPECIAL = ("Qwen2Moe", "Olmoe", "Glm4Moe", "DeepseekV3", "DeepseekV2", "GptOss")


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4, timeout=120) as pool:
        yield pool


def model_of(family: str):
    overrides = dict(FAMILIES[family])
    if family == "Olmoe":
        overrides["num_experts"] = 8
    hf = tiny_model(family, **overrides)
    with torch.no_grad():
        for name, buffer in hf.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    return hf


def sequences() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(7)
    drawn = [[torch.randint(3, 96, (n + 1,), generator=generator) for n in one] for one in LENGTHS]
    return [[(x[:-1], x[1:]) for x in one] for one in drawn]


def _step(rank: int, spec, state: dict, family: str) -> dict[str, Any]:
    """Loss and gradients of one flush on this rank, with the given weights."""
    run = cfg.RunConfig(model=spec)
    cfg.set_degrees(run.layout, {"tp": 2, "pp": 2, "ep": 2})
    run.batch.microbatches, run.batch.accumulation = len(LENGTHS), 1
    mesh = Mesh(Layout(tp=2, pp=2, ep=2))
    side = Side(run, mesh)
    for chunk in side.chunks:
        load_(chunk, state, family)
    scale = 1 / sum(map(sum, LENGTHS))
    batches = [MicroBatch.pack(one, loss_scale=scale, align=2) for one in sequences()]
    loss = side.step(batches, lambda *_: None)
    return {"loss": loss, "gradients": {n: (p.main_grad, info) for n, p, info in side.shards}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_of_two_stages_computes_what_transformers_computes(four, family):
    hf = model_of(family)
    kind, state = family_of(hf.config), {k: v.clone() for k, v in hf.state_dict().items()}
    ranks = four.run(_step, decoder_spec(hf.config), state, kind)
    got = assemble(ranks, "gradients")
    total, scale = 0.0, 1 / sum(map(sum, LENGTHS))
    for tokens, labels in (pair for one in sequences() for pair in one):
        loss = F.cross_entropy(hf(tokens[None]).logits[0], labels, reduction="sum") * scale
        loss.backward()
        total += loss.detach()
    theirs = dict(hf.named_parameters())
    wanted = {
        name: in_our_shape(
            [theirs[n].grad for n in their_names(name, kind)], x.shape, form_of(name, kind)
        )
        for name, x in got.items()
    }
    known = {n for name in wanted for n in their_names(name, kind)}
    assert known >= theirs.keys()
    error, where = worst(
        {"loss": torch.tensor(ranks[0]["loss"]), **got}, {"loss": total.double(), **wanted}
    )
    assert error <= TOLERANCE, f"{where}: {error:.1e}"


BATCHES = micro_batches([[7, 7, 3], [5], [1, 9, 2], [11]])


@pytest.mark.parametrize("family", SPECIAL)
@pytest.mark.parametrize(
    "layout, options",
    [
        (Layout(tp=2, dp=2, ep=2, etp=2), {"dispatcher": "all_to_all"}),
        (Layout(tp=2, dp=2, ep=2), {"sequence_parallel": False, "checkpoint_layers": (1, 2)}),
    ],
    ids=["etp", "without sequence parallel"],
)
def test_other_layouts_compute_what_one_process_computes(four, family, layout, options):
    compare(four, layout, decoder_spec(model_of(family).config), BATCHES, **options)
