"""MicroBatch: packing, the two kinds of padding, positions."""

import pytest
import torch

from moekernels.data import NO_LABEL, MicroBatch


def sequence(*tokens):
    t = torch.tensor(tokens)
    return t[:-1], t[1:]


def test_pack_lays_sequences_end_to_end():
    batch = MicroBatch.pack([sequence(1, 2, 3), sequence(4, 5)], loss_scale=0.5)
    assert batch.tokens.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [2, 3, 5]
    assert batch.positions.tolist() == [0, 1, 0]
    assert batch.cu_seqlens == [0, 2, 3]
    assert (batch.num_tokens, batch.rows, batch.max_seqlen, batch.loss_scale) == (3, 3, 2, 0.5)
    assert batch.valid is None


def test_alignment_adds_a_segment_that_is_not_valid():
    batch = MicroBatch.pack([sequence(1, 2, 3), sequence(4, 5)], loss_scale=1.0, align=4)
    assert batch.cu_seqlens == [0, 2, 3, 4]
    assert batch.valid.tolist() == [True, True, True, False]
    assert batch.labels.tolist() == [2, 3, 5, NO_LABEL]
    assert batch.num_tokens == 3 and batch.rows == 4


def test_pad_to_keeps_padding_behind_its_sequence():
    batch = MicroBatch.pack([sequence(1, 2, 3), sequence(4, 5)], loss_scale=1.0, align=3, pad_to=4)
    assert batch.cu_seqlens == [0, 4, 8, 9]
    assert batch.tokens.tolist() == [1, 2, 0, 0, 4, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert batch.valid.nonzero().flatten().tolist() == [0, 1, 4]
    assert (batch.labels != NO_LABEL).equal(batch.valid)


def test_pad_to_below_the_longest_is_refused():
    with pytest.raises(ValueError, match="pad_to must be at least the longest sequence, 2, got 1"):
        MicroBatch.pack([sequence(1, 2, 3)], loss_scale=1.0, pad_to=1)


def test_to_moves_every_tensor():
    batch = MicroBatch.pack([sequence(1, 2, 3)], loss_scale=1.0, align=4).to("meta")
    tensors = (batch.tokens, batch.labels, batch.positions, batch.valid)
    assert {t.device.type for t in tensors} == {"meta"}
    assert batch.cu_seqlens == [0, 2, 4]
