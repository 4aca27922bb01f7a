"""What the model knows of a card. Free constants are fitted to `published.CALIBRATION`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """clock_ghz: under a long bf16 load, which power limits: fitted. Bytes a cycle: of the cache to
    all SMs, and of the link to one. dram: bytes a second that a copy reaches."""

    name: str
    clock_ghz: float
    dram: float
    multiprocessors: int = 132
    flops: int = 4096  # of dense 16-bit products, a cycle and SM
    l2_rate: float = 6150.0  # 8e6 / 1.3e3, as DeepGEMM's heuristics take it
    link_rate: float = 64.0
    l2_bytes: int = 40 << 20  # of 50 MiB: two halves hold some lines twice
    l2_latency: float = 650.0
    dram_latency: float = 500.0  # on top
    sync: float = 60.0  # from an arrival to the thread that waits for it
    issue: float = 40.0  # of a stage's loads, by the producer's one thread
    step_gap: float = 24.0  # between the products of two stages: fitted
    tile_gap: float = 900.0  # to fill and drain the products of a tile, and to find it: fitted
    gather_gap: float = 65.0  # of a stage whose rows come one by one: SonicMoE's ablation, 6.3 %
    ipc: float = 0.55  # of a scheduler in an epilogue, two or three warps on it: fitted
    launch_s: float = 4e-6


# 85 % of the DRAM's peak is what copies and SonicMoE's aggregation reach. Both clocks are fitted,
# the H200's to one batched product that took 15 s: the same chip under the same 700 W.
H100 = Card("H100", clock_ghz=1.38, dram=3.35e12 * 0.85)
H200 = Card("H200", clock_ghz=1.38, dram=4.8e12 * 0.85)
CARDS = {"H100": H100, "H200": H200}
