"""The command line: `moekernels train | verify | plan | import | export | generate | bench | info`.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration (one line on stderr, no traceback), 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.util import find_spec

from moekernels import console
from moekernels.cli.parser import build_parser
from moekernels.errors import PlaceError, RunError, UsageError
from moekernels.parallel.stop import Terminated, end_now, handled

CHECKED = {"MOEKERNELS_ISA", "MOEKERNELS_GEMM", "MOEKERNELS_LIBRARY", "LOCAL_WORLD_SIZE"}
RUNS = ("numpy", "tokenizers", "rich", "matplotlib", "safetensors")
FOLDERS = ("numpy", "tokenizers", "safetensors", "transformers")
NEEDS = {
    "import": FOLDERS,
    "export": FOLDERS,
    "generate": ("numpy", "tokenizers", "safetensors"),
    "train": RUNS,
    "experts": RUNS,
    "plan": ("numpy", "rich"),
    "plan --json": ("numpy",),
    "plan --html": ("numpy", "rich", "matplotlib"),
    "verify": ("numpy",),
    "bench": (*RUNS, "pytest-benchmark"),
}


def _require(command: str) -> None:
    """Packages that a command needs beyond torch, before it has begun rather than at its end."""
    missing = [name for name in NEEDS.get(command, ()) if not find_spec(name.replace("-", "_"))]
    if missing:
        raise UsageError(
            f"{command} needs packages that are not here: pip install {' '.join(missing)}"
        )


def _asked(args: argparse.Namespace) -> str:
    """The command, with what of its flags asks for other packages."""
    if args.command != "plan":
        return args.command
    if args.html is not None:
        return "plan --html"
    plain = args.json or args.calibrate or args.against is not None
    return "plan --json" if plain else "plan"


def _check_environment() -> None:
    """The words in the kernels' variables, before a command has begun. The library knows them."""
    if not CHECKED & os.environ.keys():
        return
    try:
        import moekernels.ops  # noqa: F401
    except ImportError as error:
        if "MOEKERNELS_LIBRARY" in os.environ:
            raise UsageError(str(error)) from None
        # Not built: the command that needs the kernels says so.
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
            _require(_asked(args))
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
        if isinstance(error, ImportError) and error.name == "moekernels._C":  # not built, or stale
            print(f"moekernels: {error}", file=sys.stderr)
            return 1
        from moekernels.parallel.launch import RankFailure, say

        if isinstance(error, RankFailure):
            print(error.details, end="", file=sys.stderr)
            print(f"moekernels: {error}", file=sys.stderr)
        else:
            import traceback

            traceback.print_exc()
            print(f"moekernels: {say(error)}", file=sys.stderr)
        return 1
