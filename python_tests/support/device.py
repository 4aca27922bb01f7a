"""Inputs and results between the CPU and a GPU, and no wait for it in between."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device(inputs: dict) -> dict:
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def to_cpu(result):
    outputs, gradients = result
    return [t.cpu() for t in outputs], {
        n: None if g is None else g.cpu() for n, g in gradients.items()
    }


@contextlib.contextmanager
def no_waiting():
    """Any call that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
