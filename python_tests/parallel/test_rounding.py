"""Stochastic rounding: unbiased, exact where it can be, and the same bits in every layout."""

import pytest
import torch

from moekernels.parallel.rounding import Noise, round_
from moekernels.parallel.shard import shard

CPU, ALL = torch.device("cpu"), slice(0, 1 << 30)


def bits_of(info, *, step=3, seed=1, name="w", size=1 << 18, begin=0):
    """[local shape] of the noise of one parameter in a buffer of its own."""
    out = torch.zeros(begin + torch.Size(info.local_shape).numel(), dtype=torch.int32)
    for first, last, bits in Noise(seed, [(name, begin, info)], size, 1, CPU).chunks(step, ALL):
        out[first:last] = bits
    return out[begin:].view(info.local_shape)


@pytest.mark.parametrize("size", [1, 7, 40, 1 << 18])
@pytest.mark.parametrize(
    "shape, ranges",
    [
        ((12, 10), {0: [(3, 7)]}),
        ((12, 10), {1: [(5, 10)]}),
        ((12, 10), {0: [(0, 2), (4, 6), (8, 10)]}),  # as queries, keys and values lie
        ((4, 6, 5), {0: [(2, 4)], 1: [(3, 6)]}),  # experts over two groups
        ((9,), {0: [(4, 9)]}),
        ((9,), {0: [(0, 0)]}),
    ],
)
def test_a_shard_draws_what_the_whole_draws_there(shape, ranges, size):
    whole, part = shard(shape), shard(shape, ranges)
    assert torch.equal(bits_of(part, size=size, begin=32), part.take(bits_of(whole)))


def test_parameters_in_one_buffer_draw_what_each_draws_alone():
    infos = {"a": shard((5, 8)), "b": shard((3,)), "c": shard((2, 3, 4))}
    places = {"a": 0, "b": 48, "c": 64}
    noise = Noise(1, [(name, places[name], infos[name]) for name in infos], 20, 1, CPU)
    out = torch.zeros(88, dtype=torch.int32)
    for begin, end, bits in noise.chunks(3, ALL):
        out[begin:end] = bits
    for name, info in infos.items():
        got = out[places[name] :][: torch.Size(info.full_shape).numel()].view(info.full_shape)
        assert torch.equal(got, bits_of(info, name=name))


@pytest.mark.parametrize("size", [1, 60, 1 << 18])
def test_chunks_are_whole_lines(size):
    """Rows of 5 and of 24 elements, in lines of 16."""
    infos = {"a": shard((7, 5)), "b": shard((9, 24)), "c": shard((20, 5))}
    places = {"a": 0, "b": 48, "c": 272}
    noise = Noise(1, [(name, places[name], infos[name]) for name in infos], size, 16, CPU)
    out, done = torch.zeros(384, dtype=torch.int32), 0
    for begin, end, bits in noise.chunks(3, ALL):
        assert begin >= done and begin % 16 == end % 16 == 0
        out[begin:end], done = bits, end
    for name, info in infos.items():
        got = out[places[name] :][: torch.Size(info.full_shape).numel()].view(info.full_shape)
        assert torch.equal(got, bits_of(info, name=name))


@pytest.mark.parametrize("size", [1, 60, 1 << 18])
def test_a_slice_draws_what_the_whole_draws_there(size):
    noise = Noise(1, [("a", 0, shard((7, 5))), ("b", 48, shard((9, 24)))], size, 16, CPU)
    whole, parts = (torch.zeros(272, dtype=torch.int32) for _ in range(2))
    for begin, end, bits in noise.chunks(3, ALL):
        whole[begin:end] = bits
    for own in (slice(0, 96), slice(96, 112), slice(112, 272)):
        for begin, end, bits in noise.chunks(3, own):
            assert own.start <= begin and end <= own.stop
            parts[begin:end] = bits
    for begin, shape in ((0, (7, 5)), (48, (9, 24))):
        end = begin + shape[0] * shape[1]
        assert torch.equal(parts[begin:end], whole[begin:end])


def test_noise_differs_by_seed_step_name_and_place():
    info = shard((64, 64))
    drawn = [bits_of(info), bits_of(info, step=4), bits_of(info, seed=2), bits_of(info, name="v")]
    halves = [half for x in drawn for half in (x & 0xFFFF, (x >> 16) & 0xFFFF)]
    for i, a in enumerate(halves):
        for b in halves[:i]:
            together = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1]
            assert abs(together) < 0.08
    for half in halves:
        assert half.unique().numel() > 3000
        assert abs(half.double().mean() / 0x7FFF - 1) < 0.05


def test_rounding_is_right_on_average_and_never_off_by_more_than_a_step():
    x = torch.randn(8, 1) * torch.tensor([[1e-30, 1e-3, 1.0, 3e4, 1e30]]).repeat(8, 1)
    x = x.flatten()[:, None].repeat(1, 4096).contiguous()
    noise = bits_of(shard(x.shape)) & 0xFFFF
    got = torch.empty(x.shape, dtype=torch.bfloat16)
    round_(x.clone().view(-1), noise.view(-1), got.view(-1))
    step = torch.exp2(torch.floor(torch.log2(x.abs().double())) - 7)
    error = got.double() - x.double()
    assert (error.abs() <= step).all()
    assert (error.mean(1).abs() < 0.04 * step[:, 0]).all()
    assert (got[:, :1] != got).any(), "all were rounded alike"


def test_what_bf16_holds_stays_as_it_is():
    exact = torch.randn(512).bfloat16()
    exact[:2] = 0
    got = torch.empty_like(exact)
    round_(exact.float(), torch.full((512,), 0xFFFF, dtype=torch.int32), got)
    assert torch.equal(got, exact)
