"""Measures what the card gives, one resource at a time: what predictions are made of.

python bench/calibrate.py [--pack gpu_pack] [--out FILE] [--rehearse]

One JSON line a figure, written at once. Rates of SMs are in cycles of their own clock, so that they
hold at any. --rehearse runs the kernels under the emulator at tiny sizes: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import ptx_emulator as ptx  # noqa: E402
from moekernels import jsonio  # noqa: E402
from ptx_emulator import hardware as ptx_hardware  # noqa: E402

SOURCE = ROOT / "bench" / "calibrate.cu"
STEP_CYCLES = {128: 512, 192: 768, 256: 1024}  # of 128 x n x 64 at a tensor core's full rate
BOX = (64, 64)
DENSE = 8192


class Emulated:
    """Tiny launches of the emulator."""

    def __init__(self):
        text = ptx.compile_ptx(
            SOURCE, "90a", include=(ROOT / "csrc", ROOT / "csrc" / "include"), lines=False
        )
        self.module, self.blocks, self.small = ptx.Module(text), 2, True

    def launch(self, *args) -> None:
        self.module.launch(*args)


class Card:
    """nvcc's machine code on the GPU."""

    def __init__(self, pack: Path):
        module = ptx.Module((pack / "calibrate.ptx").read_text())
        self.program = ptx_hardware.Program((pack / "calibrate.cubin").read_bytes(), module)
        self.blocks = torch.cuda.get_device_properties(0).multi_processor_count
        self.small = False

    def launch(self, *args) -> None:
        for _ in range(2):  # the first one warms the caches and the clock up
            self.program.launch(*args)


def tensor_cores(on) -> Iterator[dict]:
    """Products from shared memory that nothing feeds."""
    steps = 4 if on.small else 4000
    for columns, ideal in STEP_CYCLES.items():
        random = np.random.default_rng(0).standard_normal((128 + columns, 64)).astype(np.float32)
        words = ptx.types.f32_to_bf16(random)
        taken, sink = np.zeros((on.blocks, 2), np.int64), np.zeros((on.blocks, 256), np.float32)
        shared = words.nbytes
        args = [words, steps, taken, sink]
        on.launch(f"wgmma_peak_{columns}", on.blocks, 256, args, shared)
        cycles = float(np.median(taken.max(1))) / steps
        yield {"name": f"wgmma_n{columns}", "cycles_a_step": cycles, "ideal": ideal}


def through_l2(on) -> Iterator[dict]:
    """Boxes from an array that L2 holds (16 MiB) and from one that it does not (256 MiB)."""
    for name, lines in (("l2", 1 << 17), ("dram", 1 << 21)):
        lines, steps = (512, 6) if on.small else (lines, 1000)
        array = np.zeros((lines, 64), np.uint16)
        taken = np.zeros(on.blocks, np.int64)
        args = [ptx.TensorMap(array, BOX), lines, steps, taken]
        on.launch("tma_bandwidth", on.blocks, 32, args, 4 * 6 * 8192)
        rate = steps * 6 * 8192 / float(np.median(taken))
        yield {"name": f"tma_{name}", "bytes_a_cycle_and_sm": rate}


def multicast(on) -> Iterator[dict]:
    """What an SM takes in of boxes in L2 that each of two blocks loads for both: half is read."""
    lines, steps = (512, 12) if on.small else (1 << 17, 1000)
    blocks = on.blocks // 2 * 2
    taken = np.zeros(blocks, np.int64)
    args = [ptx.TensorMap(np.zeros((lines, 64), np.uint16), BOX), lines, steps, taken]
    on.launch("tma_multicast_2", blocks, 32, args, 4 * 6 * 8192)
    rate = steps * 6 * 8192 / float(np.median(taken))
    yield {"name": "tma_l2_multicast_2", "bytes_a_cycle_and_sm": rate}


def latencies(on) -> Iterator[dict]:
    rounds, lines = (4, 512) if on.small else (256, 1 << 14)
    array, taken = np.zeros((lines, 64), np.uint16), np.zeros(rounds, np.int64)
    on.launch("tma_latency", 1, 32, [ptx.TensorMap(array, BOX), lines, rounds, taken], 8192)
    low, middle = int(taken.min()), float(np.median(taken))
    yield {"name": "tma_latency", "cycles": middle, "least": low}
    taken = np.zeros(1, np.int64)
    on.launch("mbarrier_latency", 1, 64, [rounds, taken], 0)
    yield {"name": "mbarrier_round_trip", "cycles": int(taken[0]) / rounds}


def seconds(fn, rounds: int = 10) -> float:
    """The median of events around a call."""
    fn()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def by_events(card: Card) -> Iterator[dict]:
    """What torch can time: device memory, cuBLAS."""
    nbytes = 4 << 30
    source = torch.empty(nbytes, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    rate = 2 * nbytes / seconds(lambda: target.copy_(source))
    yield {"name": "hbm_copy", "gb_a_second": rate * 1e-9}
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def argument(kind, value) -> ctypes.Array:
        return ctypes.create_string_buffer(bytes(kind(value)), 8)

    pointers = [argument(ctypes.c_uint64, t.data_ptr()) for t in (source, sink)]
    buffers = [pointers[0], argument(ctypes.c_int64, nbytes // 16), pointers[1]]
    rate = nbytes / seconds(
        lambda: card.program.start("read_memory", 8 * card.blocks, 512, buffers, 0)
    )
    yield {"name": "hbm_read", "gb_a_second": rate * 1e-9}
    a, b = (torch.randn(DENSE, DENSE, device="cuda").bfloat16() for _ in range(2))
    taken = seconds(lambda: a @ b, 20)
    yield {"name": f"cublas_{DENSE}", "tflops": 2e-12 * DENSE**3 / taken}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, default=ROOT / "gpu_pack")
    out = ROOT / "build" / "gpu_suite" / "calibrate.jsonl"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--rehearse", action="store_true", help="under the emulator")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("calibrate: no GPU here; --rehearse runs it under the emulator", file=sys.stderr)
        return 2
    on = Emulated() if args.rehearse else Card(args.pack)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    parts = [tensor_cores, through_l2, multicast, latencies, *([] if on.small else [by_events])]
    with args.out.open("w") as out:
        for part in parts:
            for figure in part(on):
                print(" ".join(f"{k} {v:.6g}" if k != "name" else v for k, v in figure.items()))
                out.write(jsonio.dumps(figure) + "\n")
                out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
