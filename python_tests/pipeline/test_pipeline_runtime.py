"""The pipeline over real ranks computes, bit for bit, what the unsplit model computes."""

import os
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import moekernels.pipeline.runtime as runtime_module
from moekernels.parallel.nodes import Nodes, gather, node_name
from moekernels.parallel.peers import share
from moekernels.pipeline.build import build
from moekernels.pipeline.runtime import PipelineRuntime
from moekernels.pipeline.schedule import Action, Kind
from moekernels.pipeline.trace import Clock
from python_tests.support.distributed import RankError, RankPool, run_ranks

HIDDEN, VOCABULARY = 6, 11


class InjectGradient(torch.autograd.Function):
    """Adds `scale * aux` to the loss without adding it to any output, as MoE's losses do."""

    @staticmethod
    def forward(ctx, x, aux, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full((), ctx.scale, dtype=grad.dtype), None


class Chunk(torch.nn.Module):
    """Virtual stage `number` of `depth`: a layer with an auxiliary loss, the first one embeds."""

    def __init__(self, number, depth, dtype=torch.float64):
        super().__init__()
        self.number, self.first, self.last = number, number == 0, number == depth - 1
        random = torch.Generator().manual_seed(number)

        def parameter(*shape):
            values = torch.randn(*shape, generator=random, dtype=torch.float64)
            return torch.nn.Parameter(values.to(dtype))

        if self.first:
            self.embedding = parameter(VOCABULARY, HIDDEN)
        self.weight = parameter(HIDDEN, HIDDEN)

    def forward(self, batch, x):
        if self.first:
            assert x is None
            x = self.embedding[batch]
        hidden = torch.tanh(x @ self.weight)
        x = InjectGradient.apply(x + hidden, hidden.square().sum(), 0.125)
        return x.float().square().sum() / len(batch) if self.last else x


def make_batches(count):
    random = torch.Generator().manual_seed(17)
    return [torch.randint(VOCABULARY, (3 + 5 * i % 7,), generator=random) for i in range(count)]


def unsplit(depth, count, dtype=torch.float64):
    """Losses, and gradients by (virtual stage, name), of one process."""
    chunks = [Chunk(number, depth, dtype) for number in range(depth)]
    losses = []
    for batch in make_batches(count):
        x = None
        for chunk in chunks:
            x = chunk(batch, x)
        x.backward()
        losses.append(x.detach())
    return losses, gradients(chunks)


def gradients(chunks):
    return {(c.number, name): p.grad for c in chunks for name, p in c.named_parameters()}


def make_runtime(
    rank,
    name,
    stages,
    count,
    virtual_stages,
    *,
    ranks=None,
    dtype=torch.float64,
    wrap=None,
    memory=None,
):
    depth = stages * virtual_stages
    chunks = [Chunk(c * stages + rank, depth, dtype) for c in range(virtual_stages)]
    group = SimpleNamespace(
        process_group=dist.group.WORLD if stages > 1 else None,
        rank=rank,
        size=stages,
        ranks=ranks or list(range(stages)),
        memory=memory,
    )
    runtime = PipelineRuntime(
        build(name, stages, count, virtual_stages),
        [wrap(chunk) for chunk in chunks] if wrap else chunks,
        group,
        lambda batch: (len(batch), HIDDEN),
        dtype,
        "cpu",
    )
    return runtime, chunks


def one_step(rank, name, stages, count, virtual_stages, dtype=torch.float64):
    if rank >= stages:
        return [], {}, []
    runtime, chunks = make_runtime(rank, name, stages, count, virtual_stages, dtype=dtype)
    losses, events = runtime.step(make_batches(count), origin=0.0)
    assert runtime._stage.in_flight == 0
    return losses, gradients(chunks), events


def assert_same(results, depth, count, dtype=torch.float64):
    losses, grads = unsplit(depth, count, dtype)
    found_losses = [loss for result in results for loss in result[0]]
    assert len(found_losses) == count
    assert all(torch.equal(a, b) for a, b in zip(found_losses, losses, strict=True))
    found = {key: grad for result in results for key, grad in result[1].items()}
    assert found.keys() == grads.keys()
    for key, grad in grads.items():
        assert torch.equal(found[key], grad), key


@pytest.mark.parametrize("name, virtual", [("1f1b", 1), ("interleaved", 2), ("zb", 2)])
def test_a_chunk_is_finished_with_its_last_gradient(name, virtual):
    """The last chunk while the first has still something to compute."""
    runtime, chunks = make_runtime(0, name, 1, 4, virtual)
    seen = {}

    def finished(chunk):
        seen[chunk] = [c.weight.grad.clone() for c in chunks]

    runtime.step(make_batches(4), finished=finished)
    assert list(seen) == [*range(virtual)][::-1]
    for chunk, grads in seen.items():
        assert torch.equal(grads[chunk], chunks[chunk].weight.grad)
        for before in range(chunk if name == "interleaved" else 0):  # here W has nothing to add
            assert not torch.equal(grads[before], chunks[before].weight.grad)


@pytest.fixture(scope="module")
def ranks():
    with RankPool(4) as pool:
        yield pool


CASES = [
    (name, stages, count, virtual_stages)
    for stages in (1, 2, 3, 4)
    for count in (1, 3, 4, 9)
    for name, virtual_stages in (
        ("gpipe", 1),
        ("1f1b", 1),
        ("zb", 1),
        ("interleaved", 2),
        ("interleaved", 3),
        ("zb", 2),
        ("zb", 3),
    )
]


@pytest.mark.parametrize("name, stages, count, virtual_stages", CASES)
def test_step_equals_the_unsplit_model_bit_for_bit(ranks, name, stages, count, virtual_stages):
    results = ranks.run(one_step, name, stages, count, virtual_stages)
    assert_same(results, stages * virtual_stages, count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_types(ranks, dtype):
    results = ranks.run(one_step, "1f1b", 4, 5, 1, dtype)
    assert_same(results, 4, 5, dtype)


def _through_memory(rank, cases):
    """The same through memory that the stages share, and no message of torch.distributed."""
    nodes, results = Nodes.named(gather(node_name(), 4)), []
    post, dist.batch_isend_irecv = dist.batch_isend_irecv, None
    for name, stages, count, virtual_stages in cases:
        ranks = tuple(range(stages))
        memory = share([ranks], rank, nodes, "shared", torch.device("cpu"))[0].get(ranks)
        if rank >= stages:
            results.append(([], {}, []))
            continue
        options = {"memory": memory}
        runtime, chunks = make_runtime(rank, name, stages, count, virtual_stages, **options)
        losses = runtime.step(make_batches(count), record=False).losses
        results.append((losses, gradients(chunks), []))
    dist.batch_isend_irecv = post
    return results


def test_messages_through_shared_memory(ranks):
    cases = [case for case in (*CASES, ("gpipe", 3, 40, 1), ("1f1b", 4, 40, 1)) if case[1] > 1]
    for case, results in zip(cases, zip(*ranks.run(_through_memory, cases)), strict=True):
        assert_same(results, case[1] * case[3], case[2])


def _steps_of_changing_size(rank):
    runtime, chunks = make_runtime(rank, "interleaved", 4, 6, 2)
    for count in (6, 3, 8):
        for chunk in chunks:
            chunk.zero_grad()
        losses = runtime.step(make_batches(count), record=False).losses
    return losses, gradients(chunks), []


def test_the_number_of_microbatches_may_change_from_step_to_step(ranks):
    assert_same(ranks.run(_steps_of_changing_size), 8, 8)


def _evaluate(rank, name, virtual_stages):
    runtime, chunks = make_runtime(rank, name, 4, 4, virtual_stages)
    losses, events = runtime.evaluate(make_batches(7))
    assert not events and runtime._stage.in_flight == 0
    assert all(p.grad is None for chunk in chunks for p in chunk.parameters())
    return losses


@pytest.mark.parametrize("name, virtual_stages", [("1f1b", 1), ("interleaved", 2)])
def test_evaluate_gives_the_losses_alone(ranks, name, virtual_stages):
    losses = ranks.run(_evaluate, name, virtual_stages)
    assert losses[:3] == [[], [], []]
    expected = unsplit(4 * virtual_stages, 7)[0]
    assert all(torch.equal(a, b) for a, b in zip(losses[3], expected, strict=True))


def test_pipelines_over_some_of_the_ranks():
    """Two pipelines side by side, [0, 2] and [1, 3]: peers are named by global rank."""

    def work(rank):
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        runtime, chunks = make_runtime(rank // 2, "1f1b", 2, 5, 1, ranks=[rank % 2, rank % 2 + 2])
        runtime.group.process_group = groups[rank % 2]
        runtime._channels = runtime._open_channels()
        return runtime.step(make_batches(5)).losses, gradients(chunks), []

    results = run_ranks(4, work)
    assert_same(results[0::2], 2, 5)
    assert_same(results[1::2], 2, 5)


def _peak(rank, name):
    """The most microbatches that this rank has kept at once."""
    peak = 0

    def wrap(chunk):
        def call(batch, x):
            nonlocal peak
            peak = max(peak, runtime._stage.in_flight + 1)
            return chunk(batch, x)

        return call

    runtime, _ = make_runtime(rank, name, 4, 8, 1, wrap=wrap)
    runtime.step(make_batches(8))
    return peak


def test_1f1b_keeps_no_more_microbatches_than_it_has_stages_behind_it(ranks):
    assert ranks.run(_peak, "1f1b") == [4, 3, 2, 1]
    assert ranks.run(_peak, "gpipe") == [8, 8, 8, 8]


def _kept_outputs(rank):
    """How many outputs are alive at each call of a chunk."""
    alive, most = [], 0

    def wrap(chunk):
        def call(batch, x):
            nonlocal most
            output = chunk(batch, x)
            most = max(most, 1 + sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(output.untyped_storage()))
            return output

        return call

    runtime, _ = make_runtime(rank, "gpipe", 2, 8, 1, wrap=wrap)
    runtime.step(make_batches(8))
    return most


def test_outputs_go_when_they_are_sent():
    """GPipe keeps the graphs of all 8 microbatches, but of their outputs only those on the way."""
    assert run_ranks(2, _kept_outputs)[0] <= 4


def test_events_are_a_timeline_of_every_computation(ranks):
    results = ranks.run(one_step, "1f1b", 4, 6, 1)
    schedule = build("1f1b", 4, 6)
    ended = {}
    for rank, (_, _, events) in enumerate(results):
        computed = [(e.kind, e.chunk, e.microbatch) for e in events if e.kind.computes]
        assert computed == [tuple(a) for a in schedule.computations(rank)]
        assert all(e.stage == rank and e.start <= e.end for e in events)
        assert all(a.end <= b.start for a, b in zip(events, events[1:]))
        ended |= {(rank, e.kind, e.microbatch): e for e in events if e.kind.computes}
    for (rank, kind, microbatch), event in ended.items():  # one clock: nothing precedes its cause
        before = rank - 1 if kind is Kind.F else rank + 1
        if (before, kind, microbatch) in ended:
            assert ended[before, kind, microbatch].end <= event.start


def test_a_stage_that_raises_is_named():
    def work(rank):
        def wrap(chunk):
            def call(batch, x):
                if chunk.number == 4 and len(batch) == len(make_batches(4)[2]):
                    raise ArithmeticError("no such expert")
                return chunk(batch, x)

            return call

        runtime, _ = make_runtime(rank, "interleaved", 3, 4, 2, wrap=wrap)
        try:
            runtime.step(make_batches(4))
        finally:
            assert runtime._stage.in_flight == 0

    with pytest.raises(RankError) as caught:
        run_ranks(3, work)
    assert caught.value.rank == 1
    assert "no such expert" in str(caught.value)
    where = "in pipeline stage 1 of 3: F of chunk 1, microbatch 2 (virtual stage 4 of 6)"
    assert where in str(caught.value)


def test_a_peer_that_is_gone_is_named(tmp_path):
    def work(rank):
        def die(batch, x):
            while not (tmp_path / "started").exists():
                time.sleep(0.01)
            os._exit(3)

        wrap = (lambda chunk: die) if rank == 0 else None
        runtime, _ = make_runtime(rank, "1f1b", 2, 4, 1, wrap=wrap)
        if rank == 1:
            (tmp_path / "started").touch()
        try:
            runtime.step(make_batches(4))
        except RuntimeError as error:
            (tmp_path / "notes").write_text(error.__notes__[0])
            raise

    with pytest.raises(RankError, match="rank 0 exited with code 3"):
        run_ranks(2, work)
    assert (tmp_path / "notes").read_text() == (
        "in pipeline stage 1 of 2: RECV_F of chunk 0, microbatch 0 (virtual stage 1 of 2), "
        "with stage 0 at the other end"
    )


def test_a_result_of_another_shape_or_type_than_planned():
    """A message of another size would end the whole process inside gloo."""

    def work(rank, change):
        runtime, _ = make_runtime(
            rank, "1f1b", 2, 2, 1, wrap=lambda chunk: lambda batch, x: change(chunk(batch, x))
        )
        runtime.step(make_batches(2))

    with pytest.raises(RankError, match=r"result is \[4, 6\] torch.float64, planned were \[3, 6\]"):
        run_ranks(2, work, lambda y: torch.cat([y, y[:1]]))
    with pytest.raises(RankError, match=r"result is \[3, 6\] torch.float32, planned .*float64"):
        run_ranks(2, work, lambda y: y.float())


def test_a_schedule_for_another_pipeline():
    group = SimpleNamespace(process_group=None, rank=0, size=1, ranks=[0], memory=None)
    with pytest.raises(ValueError, match="4 stages of 1 chunks, the group has 1 ranks"):
        PipelineRuntime(build("1f1b", 4, 4), [Chunk(0, 1)], group, len, torch.float32, "cpu")


def test_a_backend_with_ordered_channels_and_one_handle_a_batch(monkeypatch):
    """NCCL's two ways: each direction has its own group, and a batch is waited for as a whole."""
    post = dist.batch_isend_irecv

    class Whole:
        def __init__(self, works):
            self.works = works

        def wait(self):
            while self.works:
                self.works.pop().wait()

    monkeypatch.setattr(runtime_module, "ORDERED_BACKENDS", ("gloo",))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [Whole(post(operations))])

    def work(rank):
        runtime, chunks = make_runtime(rank, "interleaved", 3, 7, 2)
        assert runtime._channels[True] is not runtime._channels[False]
        return runtime.step(make_batches(7)).losses, gradients(chunks), []

    assert_same(run_ranks(3, work), 6, 7)


def test_events_of_a_gpu_are_its_own_times(monkeypatch):
    """Marks on the device's stream, in milliseconds from the first one."""
    ticks = iter(range(100))

    class Mark:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = 10.0 * next(ticks)

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=int))
    clock = Clock(torch.device("cuda"), None, record=True)
    for microbatch in range(2):
        with clock.time(Action(Kind.F, 0, microbatch)):
            pass
    assert [(e.stage, e.microbatch, e.start, e.end) for e in clock.events(3)] == [
        (3, 0, pytest.approx(0.01), pytest.approx(0.02)),
        (3, 1, pytest.approx(0.03), pytest.approx(0.04)),
    ]
