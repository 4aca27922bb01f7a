"""The planner's memory is counted: held to the modules, the optimiser, and MemTracker."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from moekernels.model.decoder import chunk_parameters
from moekernels.model.layout import Layout
from moekernels.model.spec import Place
from moekernels.nn import dispatcher, home
from moekernels.nn.transformer import StageModel
from moekernels.parallel import expert
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.exchange import Collective
from moekernels.parallel.expert import ExchangePlan
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.plan.memory import layer_bytes, place_of, rank_parameters, stage_memory
from moekernels.plan.strategy import Strategy
from moekernels.run import files as cfg
from python_tests.support.activations import DTYPES, counted, measure, small, total
from python_tests.support.spec import all_specs, nbytes

LAYOUTS = [
    Layout(tp=2, pp=4, ep=2),  # R1
    Layout(tp=2, dp=4, ep=8),  # R2
    Layout(tp=2, dp=4, pp=4, ep=8),  # R3
    Layout(tp=2, dp=8, pp=4, ep=8, etp=2),  # R4
    Layout(tp=4, dp=2, pp=2, ep=4, etp=2),
    Layout(tp=1, dp=2, pp=2, ep=1, etp=2),
    Layout(),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Sizes this small only wait for each other on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bare(monkeypatch):
    """Modules of any size cost nothing to make, and exchanges are balanced."""
    monkeypatch.setattr(home, "seeded_normal", lambda shape, *_: torch.empty(shape, device="meta"))
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, *a, _to=torch.Tensor.to, **k: (
            torch.empty(x.shape, device=a[0], dtype=a[1])
            if x.is_meta and len(a) == 2
            else _to(x, *a, **k)
        ),
    )

    def balanced(ids, local_experts, group, layer):
        routing = torch.empty(ids.numel(), dtype=torch.int32)
        share = ids.numel() // group.size
        counts = torch.full((group.size, local_experts), share // local_experts)
        rows = torch.empty(ids.shape, dtype=torch.int32), routing, routing.clone()
        plan = ExchangePlan(group, Collective(group), *rows, counts, counts, layer)
        plan.send = plan.receive = [share] * group.size
        return plan

    monkeypatch.setattr(ExchangePlan, "_make", staticmethod(balanced))


@pytest.fixture
def fake_world():
    """Process groups that exist in name only; `start(layout, rank)` gives a mesh."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(layout: Layout, rank: int = 0, **options) -> Mesh:
        if layout.world > 1:
            dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
        return Mesh(layout, device="cpu", **options)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("preset", ["spec-30b", "spec-26b"])
def test_parameters_are_those_of_the_modules(layout, preset, bare, fake_world):
    model = cfg.resolve(preset, None, {}).model
    layers = model.num_layers // layout.pp
    for stage in {0, layout.pp - 1}:
        if dist.is_initialized():
            dist.destroy_process_group()
        first, last = stage == 0, stage == layout.pp - 1
        mesh = fake_world(layout, stage * layout.stage_ranks + layout.tp - 1)
        chunk = StageModel(model, mesh, range(1, layers + 1), first, last, device="meta")
        at, held = Place(layout), range(1, layers + 1)
        counted = chunk_parameters(model, at, held, first, last, tp_index=layout.tp - 1)
        assert sum(counted.values()) == sum(p.numel() for p in chunk.parameters())
        if first and layout.pp == 1:
            ranks = [
                chunk_parameters(model, at, held, True, True, tp_index=i) for i in range(layout.tp)
            ]
            assert (
                max(r["vocabulary"] for r in ranks)
                == chunk_parameters(model, at, held, True, True)["vocabulary"]
            )


@pytest.mark.parametrize(
    "options", [{"gated": False, "activation": "gelu"}, {"qk_norm": True, "num_kv_heads": 2}]
)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_variants(options, tied):
    model = small(tie_embeddings=tied, **options)
    assert sum(chunk_parameters(model, Place(), range(1, 5), True, True).values()) == (
        model.parameters_count()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", DTYPES)
def test_state_is_the_optimisers(dtype, moments, bare):
    """To the byte where every tensor fills whole lines of 16 elements; alignment is less than
    1 % in a model this small."""
    model = cfg.resolve("tiny", None, {}).model
    with FakeTensorMode():
        chunk = StageModel(model, Mesh(Layout()), range(1, 5), True, False, dtype=DTYPES[dtype])
        optimizer = Optimizer(
            chunk.named_shards(), chunk.mesh, AdamWConfig(state_dtype=DTYPES[moments])
        )
    s = Strategy(Layout(), (4,), (0,), 1, dtype=dtype, optimizer_state=moments)
    counted = stage_memory(model, s, 0, 128)
    head = model.vocab_size * model.d_model + model.d_model  # this chunk has none
    per_parameter = counted.state / sum(counted.parameters.values())
    assert counted.state - head * per_parameter == optimizer.bytes()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_tied_table_is_counted_at_both_ends(stage, sharded, bare, fake_world):
    """To the byte: weights and gradients on both, the state split over both where it is split."""
    model, layout = small(tie_embeddings=True), Layout(dp=2, pp=4)
    mesh = fake_world(layout, stage * layout.stage_ranks, ends=True)
    with FakeTensorMode():
        chunk = StageModel(model, mesh, range(1, 2), stage == 0, stage == 3)
        optimizer = Optimizer(chunk.named_shards(), mesh, AdamWConfig(shard_optimizer=sharded))
    s = Strategy(layout, (1,) * 4, (0,) * 4, 8, dtype="fp32", shard_optimizer=sharded)
    counted = stage_memory(model, s, stage, 128)
    assert sum(counted.parameters.values()) == sum(p.numel() for p in chunk.parameters())
    assert counted.state == optimizer.bytes()


def test_chunks_of_one_rank_count_a_tied_table_once():
    model = small(tie_embeddings=True)
    s = Strategy(Layout(), (2, 2), (0, 0), 8, "zb", virtual_stages=2, dtype="fp32")
    assert sum(rank_parameters(model, s, 0).values()) == model.parameters_count()


@pytest.mark.parametrize("layout", [Layout(dp=8, ep=8), Layout(tp=2, dp=4, ep=4, etp=2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_experts_are_the_modules(layout, dtype, bare, fake_world):
    model = cfg.resolve("tiny", None, {}).model
    mesh = fake_world(layout, 0)
    with FakeTensorMode():
        chunk = StageModel(
            model, mesh, range(1, 17), True, True, dtype=DTYPES[dtype], replicas=3,
            dispatcher="all_to_all",
        )  # fmt: skip
    held = sum(moe.experts.spare.bytes() for moe in chunk.experts_layers)
    without, with_ = (
        stage_memory(model, Strategy(layout, (16,), (0,), 1, dtype=dtype, replicas=n), 0, 128)
        for n in (0, 3)
    )
    assert with_.state - without.state == held > 0
    assert with_.optimizer == without.optimizer


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("etp, moments", [(1, "fp32"), (2, "bf16")])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_state_of_64_ranks(stage, etp, moments, sharded, bare, fake_world):
    """MemTracker sees parameters, gradients and the optimiser's state of a rank of R4, and no byte
    more or less than is counted."""
    model = cfg.resolve("spec-30b", None, {}).model
    layout = Layout(tp=2, dp=8, pp=4, ep=8, etp=etp)
    mesh = fake_world(layout, stage * layout.stage_ranks)
    tracker = MemTracker()
    with FakeTensorMode(), tracker:
        chunk = StageModel(model, mesh, range(1, 5), stage == 0, stage == 3, dtype=torch.bfloat16)
        counts = sum(x.numel() * x.element_size() for x in chunk.buffers())
        counts += chunk.auxiliary.loads.nbytes + chunk.auxiliary.losses.nbytes
        config = AdamWConfig(state_dtype=DTYPES[moments], shard_optimizer=sharded)
        optimizer = Optimizer(chunk.named_shards(), mesh, config)
        held = total(tracker, "current")
    s = Strategy(layout, (4,) * 4, (0,) * 4, 8, optimizer_state=moments, shard_optimizer=sharded)
    counted = stage_memory(model, s, stage, 4096)
    # Norms within attention count as the rest of it where that is split.
    assert abs(counted.state - optimizer.bytes()) <= (1024 if sharded else 0)
    assert held == optimizer.bytes() + counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_in", [64, 128])
@pytest.mark.parametrize("checkpoint", [0, 3])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "recompute_experts": True}], ids=str)
def test_activations_of_a_real_run(dtype, d_in, checkpoint, options):
    """Real tensors on the CPU, one process: what is kept within 0.5 %, the peak within 5 %."""
    model, tokens = small(d_in, **options), 512
    layers = range(1, 1 + checkpoint)
    kept, peak = measure(model, Mesh(Layout()), 3, True, False, dtype, tokens, layers)
    s = Strategy(Layout(), (3,), (checkpoint,), 1, dtype=dtype)
    said_kept, said_peak = counted(model, s, tokens, True, False)
    assert said_kept == pytest.approx(kept, rel=5e-3)
    assert said_peak == pytest.approx(peak, rel=5e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"shared_d_ff": 96},
        {"shared_d_ff": 96, "shared_gate": True},
        {"dense_layers": 2, "dense_d_ff": 160},
    ],
    ids=str,
)
def test_activations_of_shared_experts_and_dense_layers(dtype, checkpoint, options):
    """Kept within 0.5 %; the peak at most 9 % above what there is, never below by 0.5 %."""
    model, tokens = small(**options), 512
    whole = StageModel(model, Mesh(Layout()), range(1, 5), True, True)
    assert sum(p.numel() for p in whole.parameters()) == model.parameters_count()
    layers = range(1, 1 + checkpoint)
    kept, peak = measure(model, Mesh(Layout()), 3, True, False, dtype, tokens, layers)
    s = Strategy(Layout(), (3,), (checkpoint,), 1, dtype=dtype)
    said_kept, said_peak = counted(model, s, tokens, True, False)
    assert said_kept == pytest.approx(kept, rel=5e-3)
    assert 0.995 * peak <= said_peak <= 1.09 * peak


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm_wide": True},
        {"qkv_bias": True, "out_bias": True, "rotary_dim": 8, "rope_pairs": True},
        {"kv_rank": 24, "q_rank": 20, "rotary_dim": 4},
        {"kv_rank": 24, "rotary_dim": 4, "value_dim": 12},
        {"sinks": True, "window": 40, "router_bias": True},
        {"expert_bias": True, "activation": "swiglu_oai"},
    ],
    ids=str,
)
def test_activations_of_what_the_families_ask_for(dtype, options):
    """Kept within 0.5 %; parameters to the byte on every rank of a layout that cuts all of them."""
    model, tokens = small(**options), 512
    whole = StageModel(model, Mesh(Layout()), range(1, 5), True, True)
    assert sum(p.numel() for p in whole.parameters()) == model.parameters_count()
    kept, _ = measure(model, Mesh(Layout()), 3, True, False, dtype, tokens, ())
    s = Strategy(Layout(), (3,), (0,), 1, dtype=dtype)
    assert counted(model, s, tokens, True, False)[0] == pytest.approx(kept, rel=5e-3)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm_wide": True, "qkv_bias": True, "out_bias": True, "sinks": True, "window": 4,
         "router_bias": True, "expert_bias": True},
        {"kv_rank": 24, "q_rank": 20, "rotary_dim": 4, "value_dim": 12},
        {"kv_rank": 24, "rotary_dim": 4},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_of_what_the_families_ask_for_on_a_rank(options, sequence_parallel, fake_world):
    layout = Layout(tp=2, dp=2, ep=2, etp=2)
    model, mesh = small(**options), fake_world(layout, 1)
    chunk = StageModel(model, mesh, range(1, 5), True, True, sequence_parallel=sequence_parallel)
    at = Place(layout, sequence_parallel=sequence_parallel)
    parts = chunk_parameters(model, at, range(1, 5), True, True, tp_index=1)
    assert sum(parts.values()) == sum(p.numel() for p in chunk.parameters())


@pytest.mark.parametrize("kind", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("stage, etp, layers", [(0, 1, 2), (1, 2, 2), (3, 1, 4), (3, 1, 1)])
def test_activations_of_64_ranks(
    stage, checkpoint, kind, etp, layers, bare, fake_world, monkeypatch
):
    """The document's model on a fake world of 64: TP2 x EP8 (x ETP2) x PP4, within 2 %."""
    model = cfg.resolve("spec-30b", None, {}).model
    layout = Layout(tp=2, dp=8, pp=4, ep=8, etp=etp)
    mesh, tokens = fake_world(layout, stage * layout.stage_ranks), 4096
    rows = tokens // layout.tp * layout.exchange * model.top_k // layout.ep
    monkeypatch.setattr(expert, "token_counts", lambda x, group, **_: [x.shape[0]] * group.size)
    monkeypatch.setattr(dispatcher, "int", lambda _: rows, raising=False)  # what a device knows
    first, last = stage == 0, stage == 3
    with FakeTensorMode(allow_non_fake_inputs=True):
        kept, peak = measure(
            model, mesh, layers, first, last, "bf16", tokens, range(1, 5 * checkpoint), kind
        )
    s = Strategy(layout, (layers,), (layers * checkpoint,), 1, dispatcher=kind)
    said_kept, said_peak = counted(model, s, tokens, first, last)
    print(f"kept {kept} said {said_kept}, peak {peak} said {said_peak}")
    assert said_kept == pytest.approx(kept, rel=2e-2)
    assert said_peak == pytest.approx(peak, rel=2e-2)


WAYS = {  # layout, dispatcher
    "local": (Layout(), "all_to_all"),
    "exchanged": (Layout(tp=2, dp=2, ep=4), "all_to_all"),
    "gathered": (Layout(tp=2, dp=2, ep=4), "all_gather"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_in", [64, 128])
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_keep_what_the_ops_save(way, dtype, d_in, recompute):
    """`OpSpec.saved`, which the contract holds to the autograd functions, of the ops of a layer:
    each tensor once, parameters elsewhere."""
    model, tokens = small(d_in, recompute_experts=recompute), 512
    layout, dispatcher = WAYS[way]
    s = Strategy(layout, (1,), (0,), 1, dtype=dtype, dispatcher=dispatcher)
    one = layer_bytes(model, place_of(s, tokens, device="cpu"))
    specs = {spec.name: spec.saved for spec in all_specs()}
    hidden, k, e = model.d_model, model.top_k, model.num_experts // layout.ep
    own = tokens // layout.tp
    seen = own * (layout.exchange if way == "gathered" else 1)  # tokens that are routed here
    rows = own * layout.exchange * k // layout.ep
    slots = seen * k  # token_of has room for every choice

    def tensor(*shape, dtype=DTYPES[dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    def saved(name, *elsewhere, **inputs):
        return specs[name](inputs) - nbytes(*elsewhere)

    logits = tensor(own, model.num_experts, dtype=torch.float32)
    token_of, slot_of = (tensor(slots, dtype=torch.int32) for _ in range(2))
    row_of = tensor(seen, k, dtype=torch.int32)
    offsets = tensor(e + 1, dtype=torch.int64)
    weights = tensor(rows, dtype=torch.float32)
    w1, w2 = tensor(e, 2 * model.expert_d_ff, d_in), tensor(e, d_in, model.expert_d_ff)
    w_in, w_out = tensor(e, d_in, hidden), tensor(e, hidden, d_in)
    x, arrived = tensor(seen, hidden), tensor(rows, hidden)
    lifted, view = d_in != hidden, way != "exchanged"

    gate = saved("gate", logits=logits, top_k=k)
    routing = saved("permute", token_of=slot_of, row_of=row_of) + nbytes(weights)
    routing += saved("combine", row_of, row_of=row_of, token_of=token_of, weights=None)
    kept = dict(weights=weights, w1=w1, w2=w2, offsets=offsets, recompute=recompute)
    if lifted:
        experts = saved("grouped_gemm", w_in, rows=arrived, w=w_in, offsets=offsets)
        experts += saved("experts", weights, w1, w2, offsets, x=tensor(rows, d_in), **kept)
        y = tensor(rows, d_in)
        experts += saved("grouped_gemm", w_out, offsets, rows=y, w=w_out, offsets=offsets)
    elif view:
        part = token_of[:rows]
        kept |= {"token_of": part, "row_of": row_of}
        experts = saved("experts", weights, w1, w2, part, row_of, x=x, **kept)
        if way == "local" and dtype == "fp32":
            experts -= nbytes(x)  # the gate's input
    else:
        experts = saved("experts", weights, w1, w2, x=arrived, **kept)

    copies = own * hidden * 4 + (0 if dtype == "fp32" else model.num_experts * hidden * 4)
    norm = own * (hidden * DTYPES[dtype].itemsize + 4)
    assert one.kept["router"] == gate + norm + copies
    assert one.kept["experts"] == experts
    if way == "gathered":  # the row weights are part of a storage with room for every choice
        assert one.kept["routing"] == routing + nbytes(tensor(slots - rows, dtype=torch.float32))
    else:
        assert one.kept["routing"] == routing
