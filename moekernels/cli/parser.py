"""The commands and their flags."""

from __future__ import annotations

from moekernels import __version__
from moekernels.cli import commands
from moekernels.cli.commands import PLAN_FLAGS
from moekernels.cli.flags import Parser, add_config_flags, default_text, number, path, word
from moekernels.pipeline.build import SCHEDULES
from moekernels.run import files as cfg

DEGREE_DEFAULTS = {
    "ep": " (default: tp/etp where that is whole, else 1)",
    "dp": " (default: 1, under torchrun what remains of its ranks)",
}


def build_parser() -> Parser:
    """Of the whole command line; `run` of what it parses is the command's function."""
    parser = Parser(
        prog="moekernels",
        description="Mixture-of-Experts training from the kernel up.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moekernels {__version__}")
    parent = parser.add_subparsers(
        dest="command", metavar="command", required=True, parser_class=Parser
    )
    for add in (_train, _verify, _plan, _import, _export, _generate, _experts, _bench, _info):
        add(parent)
    return parser


def _train(parent) -> None:
    parser = parent.add_parser(
        "train",
        help="train a model on text, on local ranks or under torchrun",
        usage="%(prog)s [--preset NAME] [--config FILE] [--out DIR] [--resume [auto]] [flags of "
        "the configuration]",
        description="Trains on text. Without torchrun the layout's ranks are started here. The "
        "layout of a preset counts only where none of --tp --dp --pp --ep --etp is given; "
        "otherwise unset tp, pp and etp are 1, ep is tp/etp where that is whole and else 1, and "
        "dp is 1 (under torchrun: what remains of its ranks).",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=path, help="folder of the run (default: runs/<name>)")
    parser.add_argument(
        "--name", help="name of the run under runs/ (default: the preset's, or the file's)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        metavar="auto|must",
        help="go on from the newest whole checkpoint in --out; auto: or begin anew where there is "
        "none (default must; torchrun's restarts take auto by themselves)",
    )
    parser.add_argument(
        "--init-from",
        type=path,
        metavar="FOLDER",
        help="begin with the weights of a Hugging Face folder or of a run; [model] is theirs "
        "(default: random weights)",
    )
    add_config_flags(parser, "tiny")
    parser.set_defaults(run=commands.train)


def _verify(parent) -> None:
    parser = parent.add_parser(
        "verify",
        help="prove that a layout computes what one process computes",
        description="Runs the same microbatches and parameters in one process and on the layout "
        "and compares the loss and every gradient. Exit code 0 if all agree, 1 if not.",
        allow_abbrev=False,
    )
    for degree in cfg.DEGREES:
        text = cfg.help_of("layout", degree) + DEGREE_DEFAULTS.get(degree, " (default: 1)")
        parser.add_argument(f"--{degree}", type=number(int), metavar="INT", help=text)
    parser.add_argument(
        "--all", action="store_true", help="every layout and variant that the project promises"
    )
    for flag, kind, value, text in (
        ("schedule", str, "1f1b", ", ".join(SCHEDULES)),
        ("virtual-stages", int, 0, "chunks of layers a rank holds; 0: 2 if interleaved, or else 1"),
        ("experts", int, 8, "experts of a layer"),
        ("top-k", int, 2, "experts that a token visits"),
        ("steps", int, 3, "steps to compare"),
        ("balance-scope", str, "microbatch", "microbatch or sequence"),
        ("dtype", str, "fp64", "fp64 (to 1e-9) or fp32 (to 1e-5)"),
        ("device", str, "auto", "auto, cpu or cuda"),
        ("exchange", str, "auto", "auto, shared or collective"),
        ("exchange-buffers", str, "exact", "exact, or bounded:C"),
    ):
        parse, metavar = (str, None) if kind is str else (number(kind), "INT")
        parser.add_argument(
            f"--{flag}", type=parse, default=value, metavar=metavar, help=text + default_text(value)
        )
    parser.set_defaults(run=commands.verify)


def _plan(parent) -> None:
    parser = parent.add_parser(
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
        parser.add_argument(flag, type=parse, metavar=metavar, help=text)
    for flag, text in (
        ("lengths-from", "lengths of a step's sequences (default: as --lengths)"),
        ("html", "write a page with plots (default: none)"),
        ("trace", "write the flush as Chrome trace (default: none)"),
    ):
        parser.add_argument(f"--{flag}", type=path, metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON, not the screen")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine's constants and store them"
    )
    parser.add_argument(
        "--here",
        type=number(int),
        metavar="RANKS",
        help="plan for ranks of this machine (default: for the cards of [hardware])",
    )
    parser.add_argument(
        "--against",
        type=path,
        metavar="RUN",
        help="a run's measured times beside the prediction (default: plan)",
    )
    parser.add_argument("--all", action="store_true", help="every table, every rejected layout")
    add_config_flags(parser, "spec-30b")
    parser.set_defaults(run=commands.plan)


def _import(parent) -> None:
    parser = parent.add_parser(
        "import",
        help="make a run of a Hugging Face folder",
        description="Copies the weights of a Hugging Face folder and holds them to what its "
        "config.json says. `train --init-from` begins with the result, `export` gives it back.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=path, metavar="HF_FOLDER")
    parser.add_argument("--out", type=path, required=True, help="folder of the new run")
    parser.set_defaults(run=commands.import_)


def _export(parent) -> None:
    parser = parent.add_parser(
        "export",
        help="write a run's newest checkpoint as a Hugging Face folder",
        description="Writes safetensors, config.json, generation config and tokenizer as "
        "transformers reads and writes them.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=path, metavar="RUN")
    parser.add_argument("--out", type=path, required=True, help="the new folder")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the weights (default: as they are kept)",
    )
    _which_weights(parser)
    parser.set_defaults(run=commands.export)


def _experts(parent) -> None:
    parser = parent.add_parser(
        "experts",
        help="how a run's experts are loaded, who is chosen with whom, where they lie",
        description="Reads what a run left, prints a line a layer and draws RUN/experts.png anew.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=path, metavar="RUN")
    parser.add_argument("--json", action="store_true", help="print JSON, not the table")
    parser.set_defaults(run=commands.experts)


def _generate(parent) -> None:
    parser = parent.add_parser(
        "generate",
        help="have a run, or a Hugging Face folder, go on with a text",
        description="Prints what a model says behind each prompt; several go through together.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=path, metavar="RUN|HF_FOLDER")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="how a text begins; may be given several times (default: a text that has not begun)",
    )
    for flag, kind, value, text in (
        ("tokens", int, 64, "the most that are added"),
        ("temperature", float, 1.0, "0: the likeliest token always"),
        ("top-p", float, 1.0, "among the likeliest tokens that have this part of the probability"),
        ("seed", int, 0, "of the choices"),
        ("device", str, "auto", "auto, cpu or cuda"),
        (
            "expert-cache",
            int,
            0,
            "experts of each layer that are kept where the model computes, the others in the "
            "host's memory; the text is the same; 0: all of them",
        ),
        ("expert-policy", str, "lru", "which of them make room: lru, lfu or least-stale"),
    ):
        parse, metavar = (word, None) if kind is str else (number(kind), kind.__name__.upper())
        text += default_text(value)
        parser.add_argument(f"--{flag}", type=parse, default=value, metavar=metavar, help=text)
    _which_weights(parser)
    parser.set_defaults(run=commands.generate)


def _which_weights(parser) -> None:
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="the model's, or the moving average of a run with --ema" + default_text("model"),
    )


def _bench(parent) -> None:
    parser = parent.add_parser("bench", help="run the benches of a source checkout", add_help=False)
    parser.set_defaults(run=commands.bench, flags={})


def _info(parent) -> None:
    parser = parent.add_parser("info", help="what this build holds and what this machine has")
    parser.add_argument(
        "--explain",
        metavar="SHAPE",
        help='which CUDA kernel each product of a layer takes: "T=16384 H=2048 F=4096 E=64 K=2" '
        "(default: none)",
    )
    parser.add_argument(
        "--device", metavar="ARCH", help="with --explain: for sm_90, say (default: the one here)"
    )
    parser.set_defaults(run=commands.info)
