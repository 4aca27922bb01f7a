"""The run's configuration: one dataclass a TOML section, then files, then flags.

`[model] [batch] [layout] [train]` drive a run; `[hardware] [workload] [objective] [claims]` are for
`moekernels plan`, and a run ignores them. Every value is checked when it arrives, so a mistake is
one line that names the file (or flag), the key, the value and the nearest name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from moekernels import files, jsonio
from moekernels.errors import UsageError
from moekernels.model.decoder import DecoderSpec
from moekernels.model.spec import AUTO, MOST
from moekernels.pipeline.build import SCHEDULES, offered
from moekernels.run import link
from moekernels.run.sections import FLAG_SECTIONS, SECTIONS, LayoutSection, RunConfig

PRESETS = Path(__file__).resolve().parent.parent / "presets"
LARGEST = 1 << 20  # bytes of a configuration
FLUSH = 1 << 14  # microbatches of a flush: its schedule is built before anything runs
PASSES = 1 << 18  # forward passes of it, over all stages: likewise
DEGREES = ("tp", "dp", "pp", "ep", "etp")


def near(name: str, names) -> str | None:
    """The one name that is meant, or None where none is near: a path or another word is not."""
    close = difflib.get_close_matches(name[:60], sorted(names), n=1, cutoff=0.7)
    return close[0] if close else None


def nearest(name: str, names) -> str:
    """`did you mean X?`, or the list of names where none is near."""
    close = near(name, names)
    return f"did you mean {close}?" if close else f"it is one of {', '.join(sorted(names))}"


def whole(text: str) -> bool:
    """Whether it is a whole number from 0 as people write it, of a size that anything has."""
    return text.isascii() and text.isdigit() and len(text) <= 18


@functools.cache
def types_of(section: type) -> dict[str, type]:
    """The type of every key of a section."""
    return typing.get_type_hints(section)


def _fits(value, kind) -> bool:
    if isinstance(kind, types.GenericAlias):
        return isinstance(value, list) and all(_fits(v, kind.__args__[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_value(where: str, section: type, name: str, value):
    """The value, converted to its field's type; UsageError `<where> must be ...` where it is none
    of its values."""
    kind = types_of(section)[name]
    meta = {f.name: f for f in dataclasses.fields(section)}[name].metadata
    if meta.get("auto") and value == "auto":
        return AUTO
    if not _fits(value, kind):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        text = wanted.get(kind, "a list of numbers") + (" or auto" if meta.get("auto") else "")
        raise UsageError(f"{where} must be {text}, got {value!r}")
    if kind is str:
        return _text(where, meta, value)
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = float("inf")
        if value != value or value in (float("inf"), float("-inf")):
            raise UsageError(f"{where} must be a finite number, got {value}")
    for bound, bad, text in (
        ("low", lambda v, b: v < b, "at least"),
        ("high", lambda v, b: v > b, "at most"),
        ("above", lambda v, b: v <= b, "greater than"),
    ):
        limit = meta.get(bound)
        if limit is not None and bad(value, limit):
            raise UsageError(f"{where} must be {text} {limit}, got {value}")
    if isinstance(value, list) and (len(value) > MOST or not all(map(math.isfinite, value))):
        raise UsageError(f"{where} must be a list of at most {MOST} finite numbers")
    return value


def _text(where: str, meta, value: str) -> str:
    if meta.get("choices") and value not in meta["choices"]:
        raise UsageError(f"{where} is {value!r}: {nearest(value, meta['choices'])}")
    try:
        files.portable(value)
    except ValueError:  # a run writes it down, for whoever goes on with it
        raise UsageError(f"{where} is {value!r}, which is not UTF-8; use another name") from None
    return value


def read_toml(path: Path) -> dict[str, dict]:
    """Sections of a TOML file, every key and value checked."""
    try:
        text = files.read(path, LARGEST)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give a TOML file or use --preset") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {files.said(error)}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    except ValueError:
        raise UsageError(f"{path}: a number of thousands of digits is no value here") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply to be a configuration") from None
    for name, keys in data.items():
        if name not in SECTIONS:
            raise UsageError(f"{path}: unknown section [{name}]: {nearest(name, SECTIONS)}")
        if not isinstance(keys, dict):
            raise UsageError(f"{path}: {name} must be a section, [{name}], got {keys!r}")
        known = [f.name for f in dataclasses.fields(SECTIONS[name])]
        for key, value in keys.items():
            if key not in known:
                raise UsageError(
                    f"{path}: unknown key {name}.{key} = {value!r}: {nearest(key, known)}"
                )
            value = files.native(value) if isinstance(value, str) else value
            keys[key] = check_value(f"{path}: {name}.{key}", SECTIONS[name], key, value)
    return data


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def preset_path(name: str) -> Path:
    if name not in preset_names():
        raise UsageError(f"unknown preset {name!r}: {nearest(name, preset_names())}")
    return PRESETS / f"{name}.toml"


def _overlay(config: RunConfig, model: dict, data: dict[str, dict]) -> None:
    """`data` over what is there; the model's keys are gathered in `model`, judged whole."""
    if any(d in data.get("layout", {}) for d in DEGREES):
        set_degrees(config.layout, {d: data["layout"][d] for d in DEGREES if d in data["layout"]})
    for name, keys in data.items():
        if name == "model":
            model |= keys
            continue
        for key, value in keys.items():
            setattr(getattr(config, name), key, value)


def set_degrees(layout: LayoutSection, given: dict[str, int], world: int | None = None) -> None:
    """Degrees from those given: unset tp, pp, etp are 1, ep = tp/etp where whole and else 1, and
    dp is 1, or what remains of `world` ranks. Whoever gives one degree describes the layout anew;
    no preset's degree is kept."""
    tp, pp, etp = (given.get(k, 1) for k in ("tp", "pp", "etp"))
    ep = given.get("ep", tp // etp if tp % etp == 0 else 1)
    dp = given.get("dp")
    if dp is None:
        if world is not None and world % (tp * pp):
            divisors = [d for d in range(1, world + 1) if world % d == 0]
            raise UsageError(
                f"{world} ranks do not divide by tp {tp} x pp {pp} = {tp * pp}; tp x pp must be "
                f"one of {divisors}"
            )
        dp = 1 if world is None else world // (tp * pp)
    layout.tp, layout.dp, layout.pp, layout.ep, layout.etp = tp, dp, pp, ep, etp


def resolve(
    preset: str | None,
    file: Path | None,
    flags: dict[tuple[str, str], object],
    world: int | None = None,
    default: str = "tiny",
    model: DecoderSpec | None = None,
) -> RunConfig:
    """The effective configuration: preset, then file, then flags `{(section, key): value}`.

    `world` is the number of ranks that torchrun gave, None without it. A file without a preset
    starts from the schema's defaults; neither means the preset `default`. `model`: what [model] is
    in place of the preset's.
    """
    config = RunConfig()
    fields: dict[str, Any] = {}
    if preset is not None or file is None:
        _overlay(config, fields, read_toml(preset_path(preset or default)))
    if model is not None:
        fields = dataclasses.asdict(model)
    if file is not None:
        _overlay(config, fields, read_toml(file))
    degrees = {}
    for (section, key), value in flags.items():
        name = "--" + flag_of(SECTIONS[section], key)
        value = check_value(name, SECTIONS[section], key, value)
        if section == "model":
            fields[key] = value
            continue
        if section == "layout" and key in DEGREES:
            degrees[key] = value
        setattr(getattr(config, section), key, value)
    config.model = DecoderSpec(**fields)
    if degrees:
        set_degrees(config.layout, degrees, world)
    check(config, world)
    return config


def check(config: RunConfig, world: int | None = None) -> None:
    """What no single value shows; the mesh checks the layout against the model itself."""
    b, lay, t = config.batch, config.layout, config.train
    length_range(b.lengths, b.context)
    if (steps := profiled(t.profile)) and steps.start > t.steps:
        raise UsageError(f"--profile {t.profile} begins behind the last step, {t.steps}")
    ranks = lay.tp * lay.dp * lay.pp
    if max(ranks, lay.ep * lay.etp) > MOST:
        raise UsageError(
            f"tp {lay.tp} x dp {lay.dp} x pp {lay.pp}, ep {lay.ep} x etp {lay.etp}: "
            f"more than {MOST} ranks; use smaller degrees"
        )
    if b.microbatches * b.accumulation > FLUSH:
        raise UsageError(
            f"--microbatches {b.microbatches} x --accumulation {b.accumulation} = "
            f"{b.microbatches * b.accumulation} microbatches in a flush; use at most {FLUSH}"
        )
    chunks = lay.pp * lay.virtual_stages
    if chunks * b.microbatches * b.accumulation > PASSES:
        raise UsageError(
            f"--pp {lay.pp} x --virtual-stages {lay.virtual_stages} x {b.microbatches} x "
            f"{b.accumulation} microbatches = {chunks * b.microbatches * b.accumulation} forward "
            f"passes in a flush; use at most {PASSES}"
        )
    if lay.pp * lay.virtual_stages > config.model.num_layers:
        raise UsageError(
            f"--pp {lay.pp} x --virtual-stages {lay.virtual_stages} is more than the "
            f"{config.model.num_layers} layers; each virtual stage needs one"
        )
    if world is not None and ranks != world:
        raise UsageError(
            f"tp {lay.tp} x dp {lay.dp} x pp {lay.pp} = {ranks} ranks, but {world} were started; "
            f"give --tp, --dp, --pp whose product is {world}, or start {ranks} ranks"
        )
    if t.optimizer_state == "bf16" and t.beta2 > 0.9999:
        raise UsageError(
            f"--beta2 {t.beta2} with --optimizer-state bf16: rounded by chance, a moment that slow "
            f"is noise by a fifth and more; give at most 0.9999, or --optimizer-state fp32"
        )
    if t.optimizer == "muon" and lay.etp > 1:
        raise UsageError(
            f"--optimizer muon: it takes whole matrices, and --etp {lay.etp} parts each expert's "
            f"among ranks; give --etp 1, or --optimizer adamw"
        )
    if t.optimizer == "muon" and t.offload_optimizer:
        raise UsageError(
            "--optimizer muon: its matrices are updated whole, which no chunk from the host is; "
            "leave --offload-optimizer out, or give --optimizer adamw"
        )
    if t.eval_weights == "ema" and not t.ema:
        raise UsageError(
            "--eval-weights ema: there is no moving average without --ema; give a decay, as in "
            "--ema 0.999, or --eval-weights model"
        )
    if link.parse(t.link) and t.exchange == "collective":
        raise UsageError(f"--link {t.link} is one of the shared exchange; give --exchange shared")
    several = SCHEDULES[lay.schedule].several
    if several and lay.pp > 1 and lay.virtual_stages < 2:
        raise UsageError(f"--schedule {lay.schedule} needs --virtual-stages of at least 2")
    if several is False and lay.virtual_stages > 1:
        raise UsageError(
            f"--virtual-stages {lay.virtual_stages} needs --schedule {' or '.join(offered(True))}, "
            f"got {lay.schedule}"
        )


def profiled(text: str) -> range:
    """`10:12` as its steps, both included; none for empty text."""
    if not text:
        return range(0)
    first, colon, last = text.partition(":")
    last = last if colon else first
    if not (whole(first) and whole(last) and 1 <= int(first) <= int(last)):
        raise UsageError(
            f"--profile must be FIRST:LAST with 1 <= FIRST <= LAST, as in 10:12, got {text!r}"
        )
    return range(int(first), int(last) + 1)


def length_range(text: str, context: int) -> tuple[int, int] | None:
    """`128:10240` as numbers; None for empty text."""
    if not text:
        return None
    low, _, high = text.partition(":")
    if not (whole(low) and whole(high) and 2 <= int(low) <= int(high)):
        raise UsageError(
            f"--lengths must be LOW:HIGH with 2 <= LOW <= HIGH, as in 128:10240, got {text!r}"
        )
    if int(high) > context:
        raise UsageError(
            f"--lengths {text} is longer than the context {context}; give --context {high}"
        )
    return int(low), int(high)


def flag_of(section: type, key: str) -> str:
    """The flag of a key, without the dashes: `num_experts` -> `experts`."""
    meta = {f.name: f for f in dataclasses.fields(section)}[key].metadata
    return meta.get("flag") or key.replace("_", "-")


def help_of(section: str, key: str) -> str:
    """What a key is."""
    fields = {f.name: f for f in dataclasses.fields(SECTIONS[section])}
    return fields[key].metadata["help"]


def facts(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The sections that drive a run, to be written down: texts as `files.portable` has them."""
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in FLAG_SECTIONS}
    return {name: {key: _portable(x) for key, x in keys.items()} for name, keys in sections.items()}


def _portable(value: Any) -> Any:
    return files.portable(value) if isinstance(value, str) else value


def to_toml(config: RunConfig, sections=FLAG_SECTIONS) -> str:
    """The sections as TOML that `read_toml` reads back to the same values."""
    lines = []
    for name in sections:
        lines.append(f"[{name}]")
        for f in dataclasses.fields(SECTIONS[name]):
            value = getattr(getattr(config, name), f.name)
            if f.metadata.get("auto") and value == AUTO:
                value = "auto"
            text = jsonio.dumps(_portable(value), ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{f.name} = {text}")
        lines.append("")
    return "\n".join(lines)
