"""Tunes the Hopper products at run time: every setting's result is held to the default's bits, then
the settings are timed by successive halving; the winners become rows of gemm_tuned.h.

python bench/tune.py [--quick] [--out FILE] [--rows FILE] [--seconds 180] [--rehearse]
python bench/tune.py --apply FILE      # puts the rows of such a FILE into gemm_tuned.h

One JSON line a product, written at once: the default's time, the winner's, the runner-up's.
--rehearse runs on the CPU, at a tiny shape and by a clock that is made up.
"""

from __future__ import annotations

import argparse
import datetime
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from tune_problems import (  # noqa: E402
    GROUPED,
    LAYERS,
    MANY,
    PRODUCTS,
    QUICK,
    SMALL,
    STAGES,
    TINY,
    TOKENS,
    Problem,
    Setting,
    every,
    settings_of,
)

from moekernels import jsonio  # noqa: E402

TABLE = ROOT / "csrc" / "include" / "moekernels" / "gemm_tuned.h"
BEGIN, END = "    // measured: begin\n", "    // measured: end\n"
ORDER = "constexpr LaunchOrder kLaunchOrder = "
WORTH = 0.01  # a gain below it is noise: the default stays
CONFIRM = 9  # timings of the finalists

Apply = Callable[[Setting], None]
Seconds = Callable[[Problem, Setting], float]


class Card:
    """Applies settings to the library and times calls by events."""

    def __init__(self):
        from moekernels.ops._library import raw

        if (build := raw._sm90_build()) != "plain":
            sys.exit(f"tune: the library is the {build} build; the tuner wants the plain one")
        self.raw = raw
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        self.name, self.driver = (facts.split(", ") + ["unknown"])[:2]

    def apply(self, setting: Setting) -> None:
        self.raw._sm90_settings(*asdict(setting).values())

    def seconds(self, problem: Problem, setting: Setting) -> float:
        taken = self._time(problem.run)
        return taken - self._time(problem.alone) if problem.alone else taken

    def _time(self, fn: Callable) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3


class Rehearsal:
    """No card: settings change nothing, and times are made up of them."""

    multiprocessors, name, driver = 132, "rehearsal", "none"

    def apply(self, setting: Setting) -> None:
        self.now = setting

    def seconds(self, problem: Problem, setting: Setting) -> float:
        """Band 8 and 128 bytes are best, and of dact no prefetch; stages 3 are worse."""
        gain = 0.06 * (setting.band == 8) + 0.03 * (setting.promotion == 128)
        gain += 0.05 * (not setting.prefetch) * (1 if problem.op == "dact" else -1)
        gain -= 0.08 * (setting.stages == 3) + 0.01 * (setting.grid != 0)
        gain += 0.02 * bool(setting.chain)
        return 1e-3 * (1 - gain)


def setting_in(part: dict) -> Setting:
    """The setting that a line's `best` or `next` holds."""
    return Setting(**{name: part[name] for name in asdict(Setting())})


def usable(problem: Problem, settings: list[Setting], apply: Apply, line: dict) -> list[Setting]:
    """The settings that can be launched and give the default's bits; what cannot goes to `line`."""
    accumulates = problem.op == "wgrad"

    def result(setting: Setting) -> torch.Tensor:
        apply(setting)
        out = problem.run()
        if accumulates:  # every call adds to what is there: from zeros
            out.zero_()
            out = problem.run().clone()
        return out

    expected, good = result(Setting()), []
    for setting in settings:
        try:
            same = torch.equal(result(setting), expected)
        except RuntimeError as error:
            if "shared memory has room" not in str(error):
                raise
            line.setdefault("refused", []).append(str(setting))
            continue
        if same:
            good.append(setting)
        else:
            line.setdefault("other_bits", []).append(str(setting))
    return good


def halve(
    problem: Problem, settings: list[Setting], apply: Apply, seconds: Seconds, deadline: float
) -> list[tuple[float, Setting]]:
    """Times all settings once, the better half twice, ... -> the finalists' medians, best first.

    The default is timed to the end, whatever it is worth."""
    times: dict[Setting, list[float]] = {setting: [] for setting in settings}
    alive, rounds = list(settings), 1

    def measure(those: list[Setting], count: int) -> None:
        for _ in range(count):
            for setting in those:  # in turn, so that a drifting clock meets all of them
                apply(setting)
                times[setting].append(seconds(problem, setting))

    for setting in alive[:1]:  # caches and clocks are warm before anything counts
        apply(setting)
        seconds(problem, setting)
    while len(alive) > 3 and time.monotonic() < deadline:
        measure(alive, rounds)
        ranked = sorted(alive, key=lambda s: statistics.median(times[s]))
        alive = ranked[: max(2, len(ranked) // 2)]
        alive += [Setting()] if Setting() not in alive else []
        rounds *= 2
    measure(alive, CONFIRM)
    return sorted(((statistics.median(times[s][-CONFIRM:]), s) for s in alive), key=lambda x: x[0])


def by_table(problem: Problem) -> tuple[str, str]:
    """The style and the pairing of the default; whole layers are timed by their launches alone."""
    from moekernels import _host

    if problem.op == "layer":
        return "direct", "none"
    sizes = {name: getattr(problem, name) for name in "mnk"}
    chosen = _host.choose_gemm(
        problem.op, "bf16", **sizes, experts=problem.layer.E, capability=90, wgmma=True
    )
    return chosen["order"]["style"], chosen["order"]["pair"]


def tune(problem: Problem, settings: list[Setting], on, deadline: float) -> dict:
    """One product -> its line."""
    line = {"op": problem.op, "of": problem.of, **asdict(problem.layer)}
    line |= {"m": problem.m, "n": problem.n, "k": problem.k}
    line |= {"card": on.name, "driver": on.driver}
    line["date"] = datetime.date.today().isoformat()
    line["default"] = dict(zip(("style", "pair"), by_table(problem)))
    good = usable(problem, settings, on.apply, line)
    ranked = halve(problem, good, on.apply, on.seconds, deadline)
    on.apply(Setting())
    default = next(t for t, s in ranked if s == Setting())
    line |= {"tried": len(good), "default_ms": default * 1e3}
    for place, (taken, setting) in zip(("best", "next"), ranked):
        rate = problem.flops / taken / 1e12
        line[place] = {"ms": taken * 1e3, "tflops": rate, **asdict(setting)}
    return line


# ---- rows of the table
def row(line: dict) -> str:
    """The row of gemm_tuned.h for a product. Where the default is as good it says so: without it a
    row of fewer rows an expert would answer for this shape."""
    best, default, other = line["best"], line["default_ms"], line.get("next")
    table = line.get("default", {"style": "direct", "pair": "none"})
    if best["ms"] > default * (1 - WORTH):
        best = {**best, **asdict(Setting()), "ms": default, **{n: best[n] for n in TOLD}}
        best["tflops"] = line["best"]["tflops"] * line["best"]["ms"] / default
    best = best if best["style"] else {**best, **table}
    least = line["T"] * line["K"] // line["E"]
    least_m = line["m"] if line["op"] == "wgrad" else 0
    flags = ", ".join(str(best[name]).lower() for name in ("prefetch", "bulk_sums"))
    told = [-1 if best[name] is None else int(best[name]) for name in TOLD]
    while told and told[-1] < 0:  # as the table has it by itself
        told.pop()
    order = f"{{{best['band']}, {best['grid']}, {best['promotion']}, {flags}"
    if best["style"] != "direct" or told:
        order += f", GemmStyle::{best['style']}, GemmPair::{best['pair']}"
    order += "".join(f", {value}" for value in told) + "}"
    tile_n = 128 if best["style"] == "pingpong" else 256
    setting = setting_in(other) if other else "none"
    reason = (
        f"measured, {line['card']}, driver {line['driver']}, {line['date']}: "
        f'{best["ms"]:.3f} ms, {best["tflops"]:.0f} TFLOP/s; "\n'
        f'     "the default {default:.3f} ms'
    )
    if other:
        reason += f"; next {setting}: {other['ms']:.3f} ms"
    return (
        f"    {{GemmKernel::wgmma, gemm_op_bit(GemmOp::{line['op']}), {least}, {least_m}, "
        f"{line['n']}, 128, {tile_n}, 64, {best['stages'] or STAGES[best['style']]}, {order},\n"
        f'     "{reason}"}},\n'
    )


# Problems without a row of their own, by how `of` ends; each says one thing in the row of the
# product that it is a case of.
TOLD = {"gather": TOKENS, "join": MANY}


def product_of(line: dict) -> tuple:
    return tuple(line[name] for name in ("op", "m", "n", *"THFEK"))


def told_by(lines: list[dict], name: str) -> dict[tuple, bool | None]:
    """What the problems of `name` say, by product; None: the default is as good."""
    return {
        product_of(line): line["best"][name]
        if line["best"]["ms"] <= line["default_ms"] * (1 - WORTH)
        else None
        for line in lines
        if line.get("of", "").endswith(TOLD[name])
    }


def rows(lines: list[dict]) -> str:
    """Rows in the order that the first fit needs: more rows an expert and wider ones come first.

    A product that sees x through token_of, or is of several microbatches, has no row: it says in
    the other's who gathers, or whether one launch adds them.
    """
    products = [line for line in lines if line["op"] != "layer"]
    plain = [line for line in products if not line.get("of", "").endswith(tuple(TOLD.values()))]
    say = {name: told_by(products, name) for name in TOLD}
    told = []
    for line in plain:
        by_name = {name: of.get(product_of(line)) for name, of in say.items()}
        told.append({**line, "best": {**line["best"], **by_name}})
    wide = [line for line in told if line["n"] > 128]
    order = sorted(wide, key=lambda x: (-(x["T"] * x["K"] // x["E"]), -x["n"], -x["m"]))
    return "".join(map(row, order))


def launch_order(lines: list[dict]) -> str:
    """The line of gemm_tuned.h for what is faster in each of the small layers; empty: none was
    measured."""
    layers = [line for line in lines if line["op"] == "layer"]
    if not layers:
        return ""
    worth = [line["best"]["ms"] <= line["default_ms"] * (1 - WORTH) for line in layers]
    flags = [
        all(w and line["best"][name] for w, line in zip(worth, layers))
        for name in ("chain", "route_at_once")
    ]
    told = ", ".join(str(flag).lower() for flag in flags)
    measured = f"// measured, {layers[0]['card']}, {layers[0]['date']}"
    return f"{ORDER}{{{told}}};  {measured}\n"


def write_rows(text: str, found: str) -> str:
    """A table with its measured rows replaced, and how launches follow one another where that is
    told."""
    found, told, order = found.partition(ORDER)
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    text = text[:begin] + found + text[end:]
    return re.sub(re.escape(ORDER) + ".*\n", lambda _: told + order, text) if told else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = ROOT / "build" / "gpu_suite"
    parser.add_argument("--out", type=Path, default=folder / "tune.jsonl")
    parser.add_argument("--rows", type=Path, default=folder / "gemm_tuned_rows.txt")
    parser.add_argument("--seconds", type=float, default=180, help="for all products together")
    parser.add_argument("--quick", action="store_true", help="the first layer's products only")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, by a made-up clock")
    parser.add_argument("--apply", type=Path, help="rows to put into gemm_tuned.h")
    args = parser.parse_args()
    if args.apply:
        found = args.apply.read_text()
        row = r"    \{GemmKernel::wgmma.*\n     \"measured.*\n     \".*\n"
        if not re.fullmatch(rf"({row})*({ORDER}.*;  // measured.*\n)?", found):
            print(f"tune: {args.apply} holds other lines than measured rows", file=sys.stderr)
            return 2
        TABLE.write_text(write_rows(TABLE.read_text(), found))
        print(f"{found.count('GemmKernel')} rows in {TABLE.relative_to(ROOT)}; rebuild, then test")
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print("tune: no GPU here; --rehearse runs it on the CPU", file=sys.stderr)
        return 2
    on = Rehearsal() if args.rehearse else Card()
    layers = TINY if args.rehearse else QUICK if args.quick else LAYERS
    grouped = TINY if args.rehearse else () if args.quick else GROUPED
    small = TINY if args.rehearse else () if args.quick else SMALL
    args.out.parent.mkdir(parents=True, exist_ok=True)
    begin, count = time.monotonic(), 0
    done = PRODUCTS * len(layers) + len(grouped) + len(small)
    lines: list[dict] = []
    bad = False
    with args.out.open("w") as out:
        for problem in every(layers, grouped, "cpu" if args.rehearse else "cuda", small):
            left = args.seconds - (time.monotonic() - begin)
            if left < 0:
                line = {"op": problem.op, "of": problem.of, **asdict(problem.layer)}
                line["skipped"] = "the time was over"
                bad = True
            else:
                deadline = time.monotonic() + left / (done - count)
                table = by_table(problem)
                settings = settings_of(problem.op, on.multiprocessors, problem.of, table)
                lines.append(line := tune(problem, settings, on, deadline))
            count += 1
            out.write(jsonio.dumps(line) + "\n")
            out.flush()
            args.rows.write_text(rows(lines) + launch_order(lines))  # what is known so far
            best = line.get("best", {})
            text = line.get("skipped") or (
                f"{line['default_ms']:8.3f} ms, best {best['ms']:8.3f} ms "
                f"{best['tflops']:6.0f} TFLOP/s, "
                f"{setting_in(best)}"
            )
            print(f"{problem.name:44} {text}", flush=True)
            if wrong := line.get("other_bits"):
                bad = True
                print(f"  OTHER BITS under {'; '.join(wrong)}", flush=True)
    print(f"{args.rows.read_text().count('GemmKernel')} rows in {args.rows}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
