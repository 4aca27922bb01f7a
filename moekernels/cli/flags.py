"""What the commands' flags have in common: their mistakes, their types, and a flag for every key of
a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import typing
from pathlib import Path

from moekernels.errors import UsageError
from moekernels.run import files as cfg


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, with the nearest flag that exists."""

    def error(self, message: str) -> typing.NoReturn:
        commands = next((a.choices for a in self._actions if a.dest == "command"), None)
        if commands and "command" in message:
            given = re.search(r"invalid choice: '([^']*)'", message)
            near = cfg.near(given[1], commands) if given else None
            message = f"unknown command {given[1]}" if given else "no command given"
            message += f": did you mean {near}?" if near else f"; one of {', '.join(commands)}"
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            wrong = message[len(prefix) :].split()[0]
            flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
            near = cfg.near(wrong[2:].split("=")[0], flags) if wrong.startswith("--") else None
            message = f"unknown argument {wrong}" + (
                f": did you mean --{near}?" if near else f"; see {self.prog} -h"
            )
        message = re.sub(r"^argument (--\S+): ", r"\1 ", message)
        message = re.sub(
            r"^(--\S+) expected one argument$",
            r"\1 needs a value; \1=VALUE where that begins with a dash",
            message,
        )
        raise UsageError(message)

    def parse_known_args(self, args=None, namespace=None):
        # A subparser hands what it does not know up to the main parser, which knows no flag to
        # suggest.
        namespace, rest = super().parse_known_args(args, namespace)
        if rest and self.prog.count(" "):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest


class Given(argparse.Action):
    """Collects configuration flags as given, by (section, key), so that presets and files stay
    beneath them."""

    def __init__(self, option_strings, dest, key=None, **kwargs):
        super().__init__(option_strings, dest, **kwargs)
        self.key = key

    def __call__(self, parser, namespace, values, option_string=None):
        if self.nargs == 0:
            values = not option_string.startswith("--no-")
        elif self.nargs == "+":
            values = values[0] if len(values) == 1 else shlex.join(values)
        namespace.flags = {**namespace.flags, self.key: values}


def number(kind: type, auto: bool = False):
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


def word(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path(text: str) -> Path:
    return Path(word(text))


def default_text(value: object) -> str:
    """What a flag's help says of its default."""
    if isinstance(value, bool):
        return " (default: yes)" if value else " (default: no)"
    return f" (default: {value if value != '' else 'empty'})".replace("%", "%%")


def add_config_flags(parser: argparse.ArgumentParser, preset: str) -> None:
    """`--preset`, `--config`, and one flag for every key of the sections that drive a run; what
    they are without any of these comes from `preset`."""
    parser.set_defaults(flags={})
    parser.add_argument(
        "--preset",
        type=word,
        help=f"a configuration of the package: {', '.join(cfg.preset_names())} (default: {preset}, "
        "whose values are shown as defaults; a --config without a preset begins with others)",
    )
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="a TOML file over the preset; flags come last (default: none)",
    )
    run = cfg.resolve(preset, None, {})
    for name in cfg.FLAG_SECTIONS:
        section = cfg.SECTIONS[name]
        group = parser.add_argument_group((section.__doc__ or name).rstrip("."))
        for f in dataclasses.fields(section):
            flag = cfg.flag_of(section, f.name)
            kind = cfg.types_of(section)[f.name]
            value = getattr(getattr(run, name), f.name)
            value = "auto" if f.metadata.get("auto") and value == cfg.AUTO else value
            text = f.metadata["help"].replace("%", "%%") + default_text(value)
            common = {
                "action": Given,
                "key": (name, f.name),
                "dest": argparse.SUPPRESS,
                "help": text,
            }
            if kind is bool:
                group.add_argument(f"--{flag}", f"--no-{flag}", nargs=0, **common)
            else:
                auto = bool(f.metadata.get("auto"))
                parse = str if kind is str else number(kind, auto)
                metavar = (
                    "|".join(f.metadata["choices"])
                    if f.metadata.get("choices")
                    else kind.__name__.upper() + "|auto" * auto
                )
                count = "+" if f.metadata.get("several") else None
                group.add_argument(f"--{flag}", type=parse, metavar=metavar, nargs=count, **common)
