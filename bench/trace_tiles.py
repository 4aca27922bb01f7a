"""Where a tile's cycles go: mainloop, epilogue and waits of the Hopper products, from the trace
build of the library, beside what was predicted.

MOEKERNELS_LIBRARY=moekernels/_C_trace.so python bench/trace_tiles.py [--out FILE] [--rehearse]

One JSON line a product. Cycles are those of an SM, medians over tiles: a step of K (64), the
epilogue, what a tile waited for loads, and how long the producer waited for consumers. --rehearse
reads records that are made up from the prediction.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from tune_problems import LAYERS, MANY, TINY, TOKENS, Problem, problems  # noqa: E402

from moekernels import jsonio  # noqa: E402

BLOCKS, TILES = 8, 24
TIMER, BEGIN, SUMS, END, WAITED, SM, STEPS, GROUP, ROW, COLUMN = range(10)
PREDICTED = json.loads((ROOT / "bench" / "predicted.json").read_text())["cycles"]


def figures(op: str, records: Tensor) -> dict:
    """Medians over the consumers' tiles of one launch [blocks, 3, tiles, 10]."""
    consumers = records[:, :2].reshape(-1, records.shape[-1])
    consumers = consumers[(consumers[:, TIMER] != 0) & (consumers[:, STEPS] > 0)].double()
    producer = records[:, 2].reshape(-1, records.shape[-1])
    producer = producer[producer[:, TIMER] != 0].double()
    if not len(consumers):
        return {"op": op, "tiles": 0}
    main = consumers[:, SUMS] - consumers[:, BEGIN]
    found = {
        "step": (main / consumers[:, STEPS]).median().item(),
        "epilogue": (consumers[:, END] - consumers[:, SUMS]).median().item(),
        "waited_for_loads": consumers[:, WAITED].median().item(),
        "waited_for_room": producer[:, WAITED].median().item() if len(producer) else 0.0,
    }
    predicted = {"step": PREDICTED["step"], "epilogue": PREDICTED["epilogue"][op]}
    share = found["epilogue"] / (main.median().item() + found["epilogue"])
    return {
        "op": op,
        "tiles": len(consumers),
        "sms": len(consumers[:, SM].unique()),
        **found,
        "epilogue_share": share,
        "predicted": predicted,
    }


def record(problem: Problem) -> Tensor:
    """The records [blocks, 3, tiles, 10] of a call's first launch, which is the problem's own."""
    from moekernels.ops._library import raw

    problem.run()  # the second call finds caches and clocks warm
    room = torch.zeros(1, device="cuda")
    records = raw._sm90_trace(room, 1, BLOCKS, TILES)
    problem.run()
    torch.cuda.synchronize()
    raw._sm90_trace(room, 0, 0, 0)
    return records[0].cpu()


def made_up(problem: Problem) -> Tensor:
    """Records as the prediction would leave them: six tiles a block, the others unwritten."""
    records = torch.zeros(BLOCKS, 3, TILES, 10, dtype=torch.int64)
    steps = -(-problem.k // 64)
    main, epilogue = PREDICTED["step"] * steps, PREDICTED["epilogue"][problem.op]
    for tile in range(6):
        at = tile * (main + epilogue)
        fields = [1 + at, at, at + main, at + main + epilogue, 40, 0, steps, 0, 128 * tile, 0]
        records[:, :, tile] = torch.tensor(fields)
    records[..., SM] = torch.arange(BLOCKS)[:, None, None]
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_suite" / "trace.jsonl")
    parser.add_argument("--rehearse", action="store_true", help="made-up records, on the CPU")
    args = parser.parse_args()
    if not args.rehearse:
        from moekernels.ops._library import raw

        if not torch.cuda.is_available():
            print("trace: no GPU here; --rehearse reads made-up records", file=sys.stderr)
            return 2
        if (build := raw._sm90_build()) != "trace":
            print(
                f"trace: this is the {build} build; set MOEKERNELS_LIBRARY to _C_trace.so",
                file=sys.stderr,
            )
            return 2
        raw._sm90_settings(style="direct", pair="none")  # whose cycles are predicted
    args.out.parent.mkdir(parents=True, exist_ok=True)
    empty = False
    with args.out.open("w") as out:
        for layer in TINY if args.rehearse else LAYERS[:3]:
            for problem in problems(layer, "cpu" if args.rehearse else "cuda"):
                if problem.of.endswith((TOKENS, MANY)):
                    continue
                records = made_up(problem) if args.rehearse else record(problem)
                line = {"layer": str(layer), **figures(problem.op, records)}
                out.write(jsonio.dumps(line) + "\n")
                out.flush()
                empty |= not line["tiles"]
                print(sentence(line), flush=True)
    return 1 if empty else 0


def sentence(line: dict) -> str:
    if not line["tiles"]:
        return f"{line['op']:6} {line['layer']:28} NO RECORDS"
    wanted = line["predicted"]
    return (
        f"{line['op']:6} {line['layer']:28} a step {line['step']:7.0f} (predicted "
        f"{wanted['step']}), epilogue {line['epilogue']:7.0f} ({wanted['epilogue']}), "
        f"{line['epilogue_share']:.0%} of a tile; waits: loads {line['waited_for_loads']:.0f}, "
        f"room {line['waited_for_room']:.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
