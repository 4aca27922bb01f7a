"""Every field of a foreign configuration is honoured, known not to matter here, or at its neutral
value; anything else is refused by name, fields of releases to come included."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from moekernels.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Names, places, token numbers, what a forward call returns, how a class computes what it computes.
IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def check(
    config: PreTrainedConfig,
    *,
    honoured: Collection[str],
    neutral: Mapping[str, Any],
    irrelevant: Collection[str] = (),
) -> None:
    """UsageError at the first field that the caller does not account for.

    honoured: carried over by the caller. neutral: field -> the value at which it does nothing.
    irrelevant: of this architecture, beside `IRRELEVANT`. A field that is none of them must have
    the default of its class, or be None where its class does not have it.
    """
    kind = config.model_type
    fields, defaults = _all(config), _all(type(config)())
    for name, value in fields.items():
        if name in neutral:
            if value != neutral[name]:
                raise UsageError(f"{kind}: {name} is {value!r}; use {neutral[name]!r}")
        elif name not in honoured and name not in irrelevant and name not in IRRELEVANT:
            default = defaults.get(name)
            if value != default:
                raise UsageError(
                    f"{kind}: {name} is {value!r}, and what it means is not known here; "
                    f"use {default!r}"
                )


def check_inside(
    kind: str, name: str, value: Mapping[str, Any], neutral: Mapping[str, Any]
) -> None:
    """The same for a field that is a dictionary; `...` in `neutral` marks a key as honoured."""
    for key, inner in value.items():
        does = neutral.get(key)
        if does is not ... and inner != does:
            would = "leaving it out" if does is None else repr(does)
            raise UsageError(f"{kind}: {name}[{key!r}] is {inner!r}; use {would}")


def _all(config: PreTrainedConfig) -> dict[str, Any]:
    """What it would write of itself, and public attributes that it would not."""
    public = {name: value for name, value in vars(config).items() if name[0] != "_"}
    return {**public, **config.to_dict()}
