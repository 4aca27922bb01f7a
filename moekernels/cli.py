"""The command line: `moekernels train | verify | bench | info`.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration (one line on stderr, no traceback), 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import signal
import subprocess
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

from moekernels import __version__
from moekernels.errors import PlaceError, RunError, UsageError
from moekernels.train import config as cfg
from moekernels.train.stop import Terminated, end_now, handled

RUNS = ("numpy", "tokenizers", "rich", "matplotlib", "safetensors")
NEEDS = {"train": RUNS, "plan": RUNS, "verify": ("numpy",), "bench": (*RUNS, "pytest-benchmark")}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, with the nearest flag that exists."""

    def error(self, message: str) -> typing.NoReturn:
        commands = next((a.choices for a in self._actions if a.dest == "command"), None)
        if commands and "command" in message:
            given = re.search(r"invalid choice: '([^']*)'", message)
            near = difflib.get_close_matches(given[1], commands, n=1, cutoff=0.5) if given else []
            message = f"unknown command {given[1]}" if given else "no command given"
            message += f": did you mean {near[0]}?" if near else f"; one of {', '.join(commands)}"
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            wrong = message[len(prefix) :].split()[0]
            flags = list(self._option_string_actions) if wrong.startswith("-") else []
            near = difflib.get_close_matches(wrong.split("=")[0], flags, n=1, cutoff=0.5)
            message = f"unknown argument {wrong}" + (
                f": did you mean {near[0]}?" if near else f"; see {self.prog} -h"
            )
        raise UsageError(message)

    def parse_known_args(self, args=None, namespace=None):
        # A subparser hands what it does not know up to the main parser, which knows no flag to
        # suggest.
        namespace, rest = super().parse_known_args(args, namespace)
        if rest and self.prog.count(" "):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest


class _Given(argparse.Action):
    """Collects configuration flags as given, by (section, key), so that presets and files stay
    beneath them."""

    def __init__(self, option_strings, dest, key=None, **kwargs):
        super().__init__(option_strings, dest, **kwargs)
        self.key = key

    def __call__(self, parser, namespace, values, option_string=None):
        if self.nargs == 0:
            values = not option_string.startswith("--no-")
        namespace.flags = {**namespace.flags, self.key: values}


def _number(kind: type, auto: bool = False):
    def parse(text: str):
        if auto and text == "auto":
            return text
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            wanted += " or auto" if auto else ""
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None

    return parse


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """`--preset`, `--config`, and one flag for every key of the sections that drive a run."""
    parser.set_defaults(flags={})
    parser.add_argument(
        "--preset", help=f"a configuration of the package: {', '.join(cfg.preset_names())}"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file over the preset; flags come last"
    )
    for name in cfg.FLAG_SECTIONS:
        section = cfg.SECTIONS[name]
        group = parser.add_argument_group(section.__doc__.rstrip("."))
        for f in dataclasses.fields(section):
            flag = cfg.flag_of(section, f.name)
            kind = typing.get_type_hints(section)[f.name]
            text = f.metadata["help"].replace("%", "%%")
            common = {
                "action": _Given,
                "key": (name, f.name),
                "dest": argparse.SUPPRESS,
                "help": text,
            }
            if kind is bool:
                group.add_argument(f"--{flag}", f"--no-{flag}", nargs=0, **common)
            else:
                auto = bool(f.metadata.get("auto"))
                parse = str if kind is str else _number(kind, auto)
                metavar = (
                    "|".join(f.metadata["choices"])
                    if f.metadata.get("choices")
                    else kind.__name__.upper() + "|auto" * auto
                )
                group.add_argument(f"--{flag}", type=parse, metavar=metavar, **common)


PLAN_FLAGS = {  # flags of `plan` alone: section, key, type, help
    "gpus": ("hardware", "gpus", int, "cards"),
    "gpus_per_node": ("hardware", "gpus_per_node", int, "cards of a node"),
    "memory_gb": ("hardware", "memory_gb", float, "memory of a card, 1e9 bytes"),
    "tflops": ("hardware", "tflops", float, "dense bf16 TFLOP/s of a card"),
    "objective": ("objective", "best", str, "throughput, latency, cost, gpus or memory"),
    "at_least": ("objective", "at_least", float, "sequences/s that the plan must reach"),
    "zipf": ("workload", "zipf", float, "experts' loads fall with this power of their place"),
    "loads_from": ("workload", "loads_from", str, "experts' loads: a run's folder, or JSON"),
}


def build_parser() -> Parser:
    parser = Parser(
        prog="moekernels",
        description="Mixture-of-Experts training from the kernel up.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moekernels {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="command", required=True, parser_class=Parser
    )

    train = commands.add_parser(
        "train",
        help="train a model on text, on local ranks or under torchrun",
        usage="%(prog)s [--preset NAME] [--config FILE] [--out DIR] [--resume [auto]] [flags of "
        "the configuration]",
        description="Trains on text. Without torchrun the layout's ranks are started here. The "
        "layout of a preset "
        "counts only where none of --tp --dp --pp --ep --etp is given; otherwise unset tp, pp and "
        "etp are 1, "
        "ep is tp/etp where that is whole and else 1, and dp is 1 (under torchrun: what remains "
        "of its ranks).",
        allow_abbrev=False,
    )
    train.add_argument("--out", type=Path, help="folder of the run (default runs/<name>)")
    train.add_argument(
        "--name", help="name of the run under runs/ (default: the preset's, or the file's)"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        metavar="auto|must",
        help="go on from the newest whole checkpoint in --out; auto: or begin anew where there is "
        "none (default must; torchrun's restarts take auto by themselves)",
    )
    add_config_flags(train)
    train.set_defaults(run=_train)

    verify = commands.add_parser(
        "verify",
        help="prove that a layout computes what one process computes",
        description="Runs the same micro-batches and parameters in one process and on the layout "
        "and compares the "
        "loss and every gradient. Exit code 0 if all agree, 1 if not.",
        allow_abbrev=False,
    )
    for degree in cfg.DEGREES:
        verify.add_argument(f"--{degree}", type=_number(int), metavar="INT")
    verify.add_argument(
        "--all", action="store_true", help="every layout and variant that the project promises"
    )
    verify.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b or interleaved")
    verify.add_argument("--experts", type=_number(int), default=8, metavar="INT")
    verify.add_argument("--top-k", type=_number(int), default=2, metavar="INT")
    verify.add_argument("--steps", type=_number(int), default=3, metavar="INT")
    verify.add_argument("--balance-scope", default="microbatch", help="microbatch or sequence")
    verify.add_argument("--dtype", default="fp64", help="fp64 (to 1e-9) or fp32 (to 1e-5)")
    verify.add_argument("--device", default="auto", help="auto, cpu or cuda")
    verify.set_defaults(run=_verify)

    plan = commands.add_parser(
        "plan",
        help="find the layout that fits a cluster, how fast it is, and which claims cannot be true",
        usage="%(prog)s [--preset NAME] [--config FILE] [--gpus N] [--json] [--html FILE] [flags "
        "of the configuration]",
        description="Searches all strategies for the cluster in [hardware] and judges [claims]. "
        "Flags of the layout, and --microbatches and --optimizer-state, fix that part of the "
        "search. Needs no GPU and runs nothing.",
        allow_abbrev=False,
    )
    for name, (_, _, kind, text) in PLAN_FLAGS.items():
        parse = str if kind is str else _number(kind)
        flag, metavar = "--" + name.replace("_", "-"), kind.__name__.upper()
        plan.add_argument(flag, type=parse, metavar=metavar, help=text)
    plan.add_argument(
        "--lengths-from", type=Path, metavar="FILE", help="lengths of a step's sequences"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    plan.add_argument("--trace", type=Path, metavar="FILE", help="write the flush as Chrome trace")
    plan.add_argument(
        "--calibrate", action="store_true", help="measure this machine's constants and store them"
    )
    plan.add_argument(
        "--here", type=_number(int), metavar="RANKS", help="plan for ranks of this machine"
    )
    plan.add_argument(
        "--against", type=Path, metavar="RUN", help="a run's measured times beside the prediction"
    )
    plan.add_argument("--all", action="store_true", help="every table, every rejected layout")
    add_config_flags(plan)
    plan.set_defaults(run=_plan)

    bench = commands.add_parser(
        "bench", help="run the benches of a source checkout", add_help=False
    )
    bench.set_defaults(run=_bench, flags={})

    info = commands.add_parser("info", help="what this build holds and what this machine has")
    info.add_argument(
        "--explain",
        metavar="SHAPE",
        help='which CUDA kernel each product of a layer takes: "T=16384 H=2048 F=4096 E=64 K=2"',
    )
    info.add_argument(
        "--device", metavar="ARCH", help="with --explain: for sm_90, say, not the device here"
    )
    info.set_defaults(run=_info)
    return parser


def _train(args) -> int:
    from moekernels.train.start import train

    return train(
        args.preset, args.config, args.flags, out=args.out, name=args.name, resume_how=args.resume
    )


def _verify(args) -> int:
    from moekernels.train.verify import verify

    degrees = {d: getattr(args, d) for d in cfg.DEGREES if getattr(args, d) is not None}
    return verify(
        degrees,
        everything=args.all,
        schedule=args.schedule,
        experts=args.experts,
        top_k=args.top_k,
        steps=args.steps,
        balance_scope=args.balance_scope,
        dtype=args.dtype,
        device=args.device,
    )


def _plan(args) -> int:
    from moekernels.plan.command import against, calibrate, plan

    if args.calibrate:
        return calibrate()
    if args.against is not None:
        return against(args.against, as_json=args.json)
    told = {
        (section, key): getattr(args, name)
        for name, (section, key, _, _) in PLAN_FLAGS.items()
        if getattr(args, name) is not None
    }
    return plan(
        args.preset,
        args.config,
        args.flags,
        told=told,
        lengths_from=args.lengths_from,
        as_json=args.json,
        html=args.html,
        trace=args.trace,
        everything=args.all,
        here=args.here,
    )


def _bench(args) -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench").is_dir() or not (root / "pyproject.toml").is_file():
        raise UsageError(
            f"bench runs from a source checkout, and {root} has no bench/; clone the repository"
        )
    paths = (
        []
        if any(not a.startswith("-") and Path(a.split("::")[0]).exists() for a in args.rest)
        else ["bench"]
    )
    # Bench files are named bench_*.py, which pytest does not collect by itself.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "python_files=bench_*.py",
        "--benchmark-only",
        *args.rest,
        *paths,
    ]
    return subprocess.run(command, cwd=root).returncode


def _info(args) -> int:
    from moekernels.train.explain import explain
    from moekernels.train.info import info

    if args.device is not None and args.explain is None:
        raise UsageError("--device goes with --explain")
    print(info() if args.explain is None else explain(args.explain, args.device))
    return 0


def _require(command: str) -> None:
    """Packages that a command needs beyond torch, before it has begun rather than at its end."""
    missing = [name for name in NEEDS.get(command, ()) if not find_spec(name.replace("-", "_"))]
    if missing:
        raise UsageError(
            f"{command} needs packages that are not here: pip install {' '.join(missing)}"
        )


def _check_environment() -> None:
    """The words in the kernels' variables, before a command has begun. The library knows them."""
    if not {"MOEKERNELS_ISA", "MOEKERNELS_GEMM"} & os.environ.keys():
        return
    try:
        import moekernels.ops  # noqa: F401
    except ImportError:
        pass  # not built: the command that needs the kernels says so
    except RuntimeError as error:
        raise UsageError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # Under a launcher one rank a machine says what all find.
    quiet = (os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or "0") != "0"
    try:
        try:
            rest = argv[1:] if argv[:1] == ["bench"] else []
            args = build_parser().parse_args(argv[: len(argv) - len(rest)])
            args.rest = rest
            _require(args.command)
            _check_environment()
            with handled(end_now, (signal.SIGTERM,)):
                return args.run(args)
        except UsageError as error:
            if not quiet or isinstance(error, PlaceError):
                print(f"moekernels: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print("moekernels: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated:
        print("moekernels: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RunError as error:
        if not quiet:
            print(f"moekernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001
        from moekernels.train.launch import RankFailure, say

        if isinstance(error, RankFailure):
            print(error.details, end="", file=sys.stderr)
            print(f"moekernels: {error}", file=sys.stderr)
        else:
            import traceback

            traceback.print_exc()
            print(f"moekernels: {say(error)}", file=sys.stderr)
        return 1
