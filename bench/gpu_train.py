"""Trains the same steps on the CPU and on the GPU and compares the losses.

python bench/gpu_train.py OUT [--steps 20] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from moekernels import jsonio

# The tiny preset in one process, with a batch of which 20 steps take a minute on a CPU.
RUN = "--preset tiny --tp 1 --pp 1 --ep 1 --dp 1 --sequences 8 --microbatches 2 --accumulation 1"
FIRST, LATER = 1e-4, 1e-2  # relative: one step's rounding; what training makes of it


def losses(device: str, steps: int, folder: Path) -> list[float]:
    command = [sys.executable, "-m", "moekernels", "train", *RUN.split()]
    command += ["--device", device, "--steps", str(steps), "--save-every", "0"]
    command += ["--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [jsonio.restore(json.loads(line))["loss"] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="to compare with the CPU")
    args = parser.parse_args()
    cpu = losses("cpu", args.steps, args.out / "train_cpu")
    other = losses(args.device, args.steps, args.out / "train_device")
    apart = [abs(a - b) / abs(a) for a, b in zip(cpu, other)]
    for step, (a, b, d) in enumerate(zip(cpu, other, apart), 1):
        print(f"step {step:3}  cpu {a:.6f}  {args.device} {b:.6f}  apart {d:.1e}")
    ok = len(cpu) == len(other) == args.steps and apart[0] <= FIRST and max(apart) <= LATER
    ok = ok and all(map(math.isfinite, other))
    report = {"device": args.device, "cpu": cpu, "losses": other, "ok": ok}
    (args.out / "train.json").write_text(jsonio.dumps(report))
    print("losses agree" if ok else f"losses differ: allowed {FIRST} first, {LATER} later")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
