"""Climbs the ladder: every rung in a process of its own, one JSON line each, written at once.

python bench/ladder/climb.py [--rehearse] [--pack gpu_pack] [--out FILE] [--only NAME ...]

A rung that fails stops those that need it, and says where to look. The exit code is 0 where all
passed, 1 where one did not, 2 where there is no GPU and no --rehearse.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from ladder import kit as kits  # noqa: E402
from ladder.kit import RUNGS, Kit, Rung  # noqa: E402
from moekernels import jsonio  # noqa: E402

# What the first words of CUDA's errors mean here.
LEGEND = {
    "illegal instruction": "715: a bad tensor map or descriptor, or sm_90a code on another card",
    "misaligned address": "716: an address that is no multiple of the access: tile base, bias, map",
    "invalid address space": "717: a generic address where a shared one belongs",
    "unspecified launch failure": "719: misused mbarrier (more arrivals than it counts), bad bulk "
    "copy, or a trap",
    "illegal memory access": "700: an address outside every allocation: offsets, row_end, strides",
    "no kernel image": "209: the library was not built for this card: MOEKERNELS_CUDA_ARCHS",
    "out of memory": "2: the card is shared or the shape is too large for it",
    "hang": "a wait that never ends: bytes announced and brought, arrivals and their count, "
    "parity; or setmaxnreg.inc beyond the launch's registers",
}


FINE = ("pass", "skipped")
WATCHDOG = ROOT / "moekernels" / "_C_watch.so"


def legend(text: str) -> str | None:
    return next((meaning for words, meaning in LEGEND.items() if words in text), None)


def load_rungs(products: bool) -> None:
    """Registers the rungs; those of ops need the built library."""
    from ladder import probe_rungs  # noqa: F401

    if products:
        from ladder import (  # noqa: F401
            chain_rungs,
            exchange_rungs,
            product_rungs,
            style_rungs,
            whole_rungs,
        )


def _work(pipe, name: str, kit: Kit) -> None:
    """In the rung's own process."""
    try:
        pipe.send({"status": "pass", "facts": RUNGS[name].fn(kit) or {}})
    except kits.RungFailed as error:
        pipe.send({"status": "fail", "error": str(error)})
    except kits.RungSkipped as error:
        pipe.send({"status": "skipped", "why": str(error)})
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        pipe.send({"status": "fail", "error": text})


def under_the_watchdog(rung: Rung, pack: Path, library: Path) -> str:
    """The rung again, over the library whose waits end by themselves -> what it says of them."""
    command = [sys.executable, __file__, "--pack", str(pack), "--only", rung.name]
    command += ["--out", os.devnull]
    environment = {**os.environ, "MOEKERNELS_LIBRARY": str(library)}
    limit = rung.limit + 45  # the program starts anew
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"no result under the watchdog after {limit:.0f} s either"
    said = [line for line in done.stderr.splitlines() if "watchdog" in line]
    return "; ".join(said) or done.stdout.strip()[-500:]


def run_rung(rung: Rung, kit: Kit, limit: float) -> dict:
    """One rung in a process of its own -> its line."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    begin = time.monotonic()
    process = context.Process(target=_work, args=(theirs, rung.name, kit))
    process.start()
    theirs.close()
    line = {"rung": rung.name, "number": rung.number, "way": kit.way}
    try:
        if ours.poll(limit):
            line |= ours.recv()
        else:
            line |= {"status": "hang", "error": f"hang: no result after {limit:.0f} s"}
    except EOFError:
        process.join(5)
        line |= {"status": "fail", "error": f"the process died, exit code {process.exitcode}"}
    if process.is_alive():
        process.join(2 if line["status"] in FINE else 0)
        process.kill()
        process.join()
    line["seconds"] = round(time.monotonic() - begin, 2)
    if line["status"] not in FINE:
        line["look"] = rung.look
        if meaning := legend(line["error"]):
            line["legend"] = meaning
    return line


def blocked_by(rung: Rung, way: str, passed: dict[tuple[str, str], bool]) -> list[str]:
    """The rungs below that did not pass: this way, or in the ways of the probes below an op."""

    def fine(name: str) -> bool:
        results = [ok for (n, w), ok in passed.items() if n == name and w in (way, "library")]
        if not results:  # an op's probes below: nvcc's code is what the library holds
            results = [ok for (n, w), ok in passed.items() if n == name and w != "ptx"]
        return bool(results) and all(results)

    return [name for name in rung.needs if not fine(name)]


def climb(ways: list[str], hardware: bool, pack: Path | None, only: list[str], out, watch) -> bool:
    """Runs the rungs in order, writes their lines -> whether all passed."""
    passed: dict[tuple[str, str], bool] = {}
    for rung in sorted(RUNGS.values(), key=lambda r: r.number):
        if only and rung.name not in only:
            continue
        for way in ways if rung.probe else ["library" if hardware else "emulator"]:
            kit = Kit(hardware=hardware, way=way, pack=pack)
            line = {"rung": rung.name, "number": rung.number, "way": way}
            if not only and (below := blocked_by(rung, way, passed)):
                line |= {"status": "stopped", "error": f"not run: {', '.join(below)} did not pass"}
            else:
                limit = rung.limit if hardware else 20 * rung.limit
                line = run_rung(rung, kit, limit)
                if line["status"] == "hang" and watch and not rung.probe:
                    line["watchdog"] = under_the_watchdog(rung, pack, watch)
            passed[rung.name, way] = line["status"] in FINE
            out.write(jsonio.dumps(line) + "\n")
            out.flush()
            print(sentence(line), flush=True)
    return all(passed.values())


def sentence(line: dict) -> str:
    text = f"{line['number']:3} {line['rung']:16}{line['way']:9}{line['status']:8}"
    text += f"{line.get('seconds', 0):6.1f} s"
    for key in ("why", "error", "look", "legend", "watchdog"):
        if key in line:
            text += f"\n      {key}: {line[key]}"
    return text


def _ask_for_gpu() -> None:
    import torch

    sys.exit(0 if torch.cuda.is_available() else 1)


def gpu_is_there() -> bool:
    """Asked in a process of its own: once CUDA is touched here, the rungs' forks cannot use it."""
    process = multiprocessing.get_context("fork").Process(target=_ask_for_gpu)
    process.start()
    process.join()
    return process.exitcode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="under the emulator, without a GPU")
    parser.add_argument("--pack", type=Path, help="the folder of pack_gpu_suite.py")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_suite" / "ladder.jsonl")
    parser.add_argument("--only", nargs="*", default=[], help="these rungs, whatever lies below")
    args = parser.parse_args()
    if not args.rehearse:
        if not gpu_is_there():
            print("ladder: no GPU here; --rehearse runs it under the emulator", file=sys.stderr)
            return 2
        if not args.pack or not (args.pack / "probes.cubin").exists():
            print("ladder: give --pack, the folder that pack_gpu_suite.py made", file=sys.stderr)
            return 2
    load_rungs(True)
    if unknown := [name for name in args.only if name not in RUNGS]:
        print(
            f"ladder: no rung is called {unknown[0]}; there are {' '.join(RUNGS)}", file=sys.stderr
        )
        return 2
    kits.probes(args.pack)  # parsed once, before the forks
    if args.rehearse:
        for stem in kits.emulated.stems():
            kits.emulated.module(stem)
    # Where this is the watchdog's own run, there is no other to ask.
    watch = None if "MOEKERNELS_LIBRARY" in os.environ else WATCHDOG
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ways = ["emulator"] if args.rehearse else ["sass", "ptx"]
    with args.out.open("w") as out:
        fine = climb(
            ways,
            not args.rehearse,
            args.pack,
            args.only,
            out,
            watch if watch and watch.exists() else None,
        )
    print("the ladder holds" if fine else "the ladder is broken: go on from the first rung above")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
