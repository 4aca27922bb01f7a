"""The kernels' registers of activations and scores, the reference's and the model's are one."""

from __future__ import annotations

import pytest
import torch

from moekernels import _host, ops, reference
from moekernels.model.experts import ACTIVATIONS
from moekernels.model.router import SCORES, RouterSpec
from moekernels.ops._library import raw


def test_activations():
    assert _host.activations == ACTIVATIONS
    for gated, meaning in ((True, reference.GATED), (False, reference.UNGATED)):
        assert list(meaning) == [
            name for name, is_gated in ACTIVATIONS.items() if is_gated == gated
        ]


def test_scores():
    assert _host.gate_scores == list(SCORES) == list(reference.SCORES)
    choices = RouterSpec.__dataclass_fields__["group_score"].metadata["choices"]
    assert _host.group_scores == list(choices) == list(reference.GROUP_SCORES)


@pytest.mark.parametrize("argument", ["score", "group_score"])
def test_unknown_names_are_refused_in_every_way(argument):
    logits = torch.zeros(4, 6)
    words = f"{argument} must be .*, got 'tanh'"
    with pytest.raises(RuntimeError, match=words):
        ops.gate(logits, 2, **{argument: "tanh"})
    with pytest.raises(ValueError, match=words):  # there the reference computes
        torch.func.grad(lambda x: ops.gate(x, 2, **{argument: "tanh"}).weights.sum())(logits)


def test_the_raw_backward_checks_the_score():
    logits, ids = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gate_backward: score must be .*, got 'tanh'"):
        raw._gate_backward(logits, ids, None, None, None, "tanh", False, 1.0, None)
