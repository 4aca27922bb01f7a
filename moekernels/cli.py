"""The command line: `moekernels train | verify | plan | bench | info`.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration (one line on stderr, no traceback), 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from moekernels import __version__, console
from moekernels.errors import PlaceError, RunError, UsageError
from moekernels.flags import Parser, add_config_flags, default_text, number, path, word
from moekernels.pipeline.schedule import SCHEDULES
from moekernels.run import files as cfg
from moekernels.train.stop import Terminated, end_now, handled

RUNS = ("numpy", "tokenizers", "rich", "matplotlib", "safetensors")
FOLDERS = ("numpy", "tokenizers", "safetensors", "transformers")
NEEDS = {
    "import": FOLDERS,
    "export": FOLDERS,
    "train": RUNS,
    "plan": RUNS,
    "verify": ("numpy",),
    "bench": (*RUNS, "pytest-benchmark"),
}

DEGREE_DEFAULTS = {
    "ep": " (default: tp/etp where that is whole, else 1)",
    "dp": " (default: 1, under torchrun what remains of its ranks)",
}
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
    train.add_argument("--out", type=path, help="folder of the run (default: runs/<name>)")
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
    train.add_argument(
        "--init-from",
        type=path,
        metavar="FOLDER",
        help="begin with the weights of a Hugging Face folder or of a run; [model] is theirs "
        "(default: random weights)",
    )
    add_config_flags(train, "tiny")
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
        text = cfg.help_of("layout", degree) + DEGREE_DEFAULTS.get(degree, " (default: 1)")
        verify.add_argument(f"--{degree}", type=number(int), metavar="INT", help=text)
    verify.add_argument(
        "--all", action="store_true", help="every layout and variant that the project promises"
    )
    for flag, kind, value, text in (
        ("schedule", str, "1f1b", ", ".join(SCHEDULES)),
        ("experts", int, 8, "experts of a layer"),
        ("top-k", int, 2, "experts that a token visits"),
        ("steps", int, 3, "steps to compare"),
        ("balance-scope", str, "microbatch", "microbatch or sequence"),
        ("dtype", str, "fp64", "fp64 (to 1e-9) or fp32 (to 1e-5)"),
        ("device", str, "auto", "auto, cpu or cuda"),
        ("exchange", str, "auto", "auto, shared or collective"),
    ):
        parse, metavar = (str, None) if kind is str else (number(kind), "INT")
        verify.add_argument(
            f"--{flag}", type=parse, default=value, metavar=metavar, help=text + default_text(value)
        )
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
    run = cfg.resolve("spec-30b", None, {})
    for name, (section, key, kind, text) in PLAN_FLAGS.items():
        parse = word if kind is str else number(kind)
        flag, metavar = "--" + name.replace("_", "-"), kind.__name__.upper()
        text += default_text(getattr(getattr(run, section), key))
        plan.add_argument(flag, type=parse, metavar=metavar, help=text)
    for flag, text in (
        ("lengths-from", "lengths of a step's sequences (default: as --lengths)"),
        ("html", "write a page with plots (default: none)"),
        ("trace", "write the flush as Chrome trace (default: none)"),
    ):
        plan.add_argument(f"--{flag}", type=path, metavar="FILE", help=text)
    plan.add_argument("--json", action="store_true", help="print JSON, not the screen")
    plan.add_argument(
        "--calibrate", action="store_true", help="measure this machine's constants and store them"
    )
    plan.add_argument(
        "--here",
        type=number(int),
        metavar="RANKS",
        help="plan for ranks of this machine (default: for the cards of [hardware])",
    )
    plan.add_argument(
        "--against",
        type=path,
        metavar="RUN",
        help="a run's measured times beside the prediction (default: plan)",
    )
    plan.add_argument("--all", action="store_true", help="every table, every rejected layout")
    add_config_flags(plan, "spec-30b")
    plan.set_defaults(run=_plan)

    folders = commands.add_parser(
        "import",
        help="make a run of a Hugging Face folder",
        description="Copies the weights of a Hugging Face folder and holds them to what its "
        "config.json says. `train --init-from` begins with the result, `export` gives it back.",
        allow_abbrev=False,
    )
    folders.add_argument("source", type=path, metavar="HF_FOLDER")
    folders.add_argument("--out", type=path, required=True, help="folder of the new run")
    folders.set_defaults(run=_import)

    export = commands.add_parser(
        "export",
        help="write a run's newest checkpoint as a Hugging Face folder",
        description="Writes safetensors, config.json, generation config and tokenizer as "
        "transformers reads and writes them.",
        allow_abbrev=False,
    )
    export.add_argument("source", type=path, metavar="RUN")
    export.add_argument("--out", type=path, required=True, help="the new folder")
    export.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the weights (default: as they are kept)",
    )
    export.set_defaults(run=_export)

    bench = commands.add_parser(
        "bench", help="run the benches of a source checkout", add_help=False
    )
    bench.set_defaults(run=_bench, flags={})

    info = commands.add_parser("info", help="what this build holds and what this machine has")
    info.add_argument(
        "--explain",
        metavar="SHAPE",
        help='which CUDA kernel each product of a layer takes: "T=16384 H=2048 F=4096 E=64 K=2" '
        "(default: none)",
    )
    info.add_argument(
        "--device", metavar="ARCH", help="with --explain: for sm_90, say (default: the one here)"
    )
    info.set_defaults(run=_info)
    return parser


def _train(args) -> int:
    from moekernels.train.start import train

    return train(
        args.preset,
        args.config,
        args.flags,
        out=args.out,
        name=args.name,
        resume_how=args.resume,
        init_from=args.init_from,
    )


def _import(args) -> int:
    from moekernels.train.importing import import_

    return import_(args.source, args.out)


def _export(args) -> int:
    from moekernels.train.exporting import export

    return export(args.source, args.out, args.dtype or "")


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
        exchange=args.exchange,
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
    if argv is None:
        argv = sys.argv[1:]
        console.prepare()
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
                print(f"moekernels: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print("moekernels: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated:
        print("moekernels: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except RunError as error:
        if not quiet:
            print(f"moekernels: {error}", file=sys.stderr)
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
