"""A Hugging Face folder: its configuration, and where each of our tensors lies in its files.

Every file's header is read and held to the others before anything is made of them, so that a folder
that is not whole is one line and not a model with a hole. No tensor is read here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moekernels import files
from moekernels.errors import UsageError
from moekernels.integrations.keys import parts
from moekernels.model import tensors
from moekernels.model.decoder import DecoderSpec
from moekernels.train import shards
from moekernels.train.manifest import Box, Saved

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG, SINGLE = "config.json", "model.safetensors"
INDEX = f"{SINGLE}.index.json"
GENERATION = "generation_config.json"
# What goes along with the weights where a folder has it.
BESIDE = (
    CONFIG,
    GENERATION,
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
LARGEST_HEADER = 100 << 20  # bytes, as the safetensors library has it
FLOATS = {code: dtype for dtype, code in shards.NAMES.items() if dtype.is_floating_point}
DTYPES = {code: str(dtype).removeprefix("torch.") for code, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: dtype as safetensors names it, shape, bytes from and to."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Folder:
    """A folder that is whole. tensors: our full name -> its boxes."""

    path: Path
    config: PreTrainedConfig
    spec: DecoderSpec
    family: str
    files: tuple[str, ...]  # of weights
    dtype: str
    tensors: dict[str, Saved] = field(repr=False)


def is_folder(path: Path) -> bool:
    """Whether it is meant as a Hugging Face folder; a run's has a config.toml."""
    return (path / CONFIG).is_file()


def read(path: Path) -> Folder:
    """The folder at `path`; UsageError, one line, where it is no model that is whole and known."""
    from moekernels.integrations.families import decoder_spec

    config = read_config(path)
    spec, family = decoder_spec(config), config.model_type
    held = _weights(path)
    wanted = {part.key: part for part in parts(spec, family)}
    if unknown := sorted(held.keys() - wanted.keys()):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        file, _ = held[unknown[0]]
        raise UsageError(
            f"{path / file}: {unknown[0]} is no tensor of the {family} that {CONFIG} describes"
            f"{more}; take it out of the folder"
        )
    if missing := [key for key in wanted if key not in held]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UsageError(f"{path}: {missing[0]} is missing{more}; get the folder's other files")
    dtypes: dict[str, str] = {}
    for key, part in wanted.items():
        file, stored = held[key]
        if stored.shape != part.shape:
            raise UsageError(
                f"{path / file}: {key} has shape {list(stored.shape)}, {CONFIG} asks for "
                f"{list(part.shape)}"
            )
        if not part.wide:
            dtypes.setdefault(stored.dtype, key)
    if len(dtypes) > 1:
        said = " and ".join(f"{key} is {dtype}" for dtype, key in list(dtypes.items())[:2])
        raise UsageError(f"{path}: two dtypes: {said}; save the model in one")
    boxes: dict[str, list[Box]] = {}
    shapes = {**tensors.parameters(spec), **tensors.biases(spec)}
    for key, part in wanted.items():
        boxes.setdefault(part.name, []).append(
            Box(held[key][0], key, part.begin, part.size, part.form)
        )
    saved = {
        name: Saved(DTYPES[held[found[0].key][1].dtype], shapes[name], tuple(found))
        for name, found in boxes.items()
    }
    names = tuple(sorted({file for file, _ in held.values()}))
    return Folder(path, config, spec, family, names, DTYPES[next(iter(dtypes))], saved)


def read_config(path: Path) -> PreTrainedConfig:
    """config.json as the class of its family reads it."""
    from moekernels.integrations.families import FAMILIES

    data = _json(path / CONFIG)
    kind = data.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(
            f"{path / CONFIG}: model_type {kind!r} is no family of decoders here; use one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise UsageError(
            "Hugging Face folders need a package that is not here: pip install transformers"
        ) from None
    try:
        return CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:  # noqa: BLE001, each release has its own
        raise UsageError(f"{path / CONFIG}: no configuration of {kind}: {error}") from None


def _weights(path: Path) -> dict[str, tuple[str, Stored]]:
    """Key -> (file, what it is there), of all files; UsageError where they are not what they say
    of each other."""
    if (path / SINGLE).is_file():
        return {key: (SINGLE, x) for key, x in header(path / SINGLE).items()}
    if not (path / INDEX).is_file():
        raise UsageError(f"{path}: holds neither {SINGLE} nor {INDEX}; give a folder with weights")
    placed = _json(path / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(map(_is_file_name, placed.values())):
        raise UsageError(f"{path / INDEX}: weight_map does not name files of the folder")
    held: dict[str, tuple[str, Stored]] = {}
    for file in sorted(set(placed.values())):
        if not (path / file).is_file():
            raise UsageError(f"{path / file}: is missing, {INDEX} names it; get that file, too")
        for key, stored in header(path / file).items():
            if placed.get(key) != file:
                where = f"in {placed[key]}" if key in placed else "nowhere"
                raise UsageError(f"{path / INDEX}: {key} is {where} by the index, but in {file}")
            held[key] = (file, stored)
    if gone := sorted(placed.keys() - held.keys()):
        raise UsageError(f"{path / INDEX}: {gone[0]} is not in {placed[gone[0]]}, as it says")
    return held


def _is_file_name(x: object) -> bool:
    return isinstance(x, str) and Path(x).name == x and x[:1] != "."


def header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, its length checked against it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise UsageError(f"{path}: is cut short, or no safetensors file: {size:,} bytes")
            data = json.loads(file.read(length))
        found = {
            key: Stored(x["dtype"], tuple(x["shape"]), *x["data_offsets"])
            for key, x in data.items()
            if key != "__metadata__"
        }
        end = 0
        for key, x in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
            if x.dtype not in DTYPES:
                raise UsageError(
                    f"{path}: {key} is of dtype {x.dtype}; use one of {', '.join(DTYPES)}"
                )
            if x.begin != end or x.end - x.begin != math.prod(x.shape) * FLOATS[x.dtype].itemsize:
                raise UsageError(f"{path}: its header is damaged at {key}")
            end = x.end
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: its header is damaged ({type(error).__name__})") from None
    if size != 8 + length + end:
        raise UsageError(f"{path}: is cut short: {size:,} bytes of {8 + length + end:,}")
    return found


def _json(path: Path) -> dict:
    try:
        data = json.loads(files.read(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: is missing; give the folder of a model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read: {files.said(error)}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: is no JSON object")
    return data
