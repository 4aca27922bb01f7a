"""What NCCL is told of each group of ranks: one table, and what a run changes of it.

Nothing of it has run on a GPU; what the rows ask for is what its documentation and others' reports
say (`why`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moekernels.errors import UsageError

POLICIES = {"default": 0, "efficiency": 1, "zero": 2}  # NCCL_CTA_POLICY_*
CONFIG = ("min_ctas", "max_ctas", "cga_cluster_size", "nvls_ctas", "traffic_class", "cta_policy")


@dataclass(frozen=True)
class Row:
    """None: as NCCL chooses. ctas: blocks of a collective, which take SMs from products."""

    high_priority: bool = False
    min_ctas: int | None = None
    max_ctas: int | None = None
    cga_cluster_size: int | None = None
    nvls_ctas: int | None = None
    traffic_class: int | None = None
    cta_policy: str | None = None
    why: str = ""

    def describe(self) -> str:
        said = ["high priority" if self.high_priority else "normal priority"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("high_priority", "why") and value is not None:
                said.append(f"{f.name} {value}")
        return ", ".join(said)


TABLE: dict[str, Row] = {
    "exchange": Row(
        high_priority=True,
        max_ctas=16,
        why="uneven all-to-all is grouped sends, up to 32 blocks; whether this binds them is "
        "unknown until it runs",
    ),
    "pp": Row(
        high_priority=True,
        min_ctas=1,
        max_ctas=4,
        why="small and urgent, and must not eat the products' SMs; one group a direction",
    ),
    "tp": Row(high_priority=True, why="on the critical path"),
    "dp": Row(max_ctas=8, cta_policy="efficiency", why="beside the last backward"),
    "edp": Row(max_ctas=8, cta_policy="efficiency", why="beside the last backward"),
    "ends": Row(
        max_ctas=8,
        cta_policy="efficiency",
        why="a tied embedding's gradient, once a step, beside the last backward",
    ),
}


def changed(name: str, text: str) -> Row:
    """The table's row with what `max_ctas=8, high_priority=no` changes."""
    row = TABLE[name]
    kinds = {f.name: str(f.type) for f in fields(Row) if f.name != "why"}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        where = f"--nccl-{name} {item!r}"
        if key not in kinds:
            raise UsageError(f"{where}: no such option; use one of {', '.join(kinds)}")
        said: dict[str, Any] = {key: _value(where, kinds[key], value)}
        row = replace(row, **said)
    if row.min_ctas and row.max_ctas and row.min_ctas > row.max_ctas:
        raise UsageError(
            f"--nccl-{name}: min_ctas {row.min_ctas} is more than max_ctas {row.max_ctas}"
        )
    return row


def _value(where: str, kind: str, text: str) -> bool | int | str:
    if kind.startswith("bool"):
        if text not in ("yes", "no"):
            raise UsageError(f"{where} must be yes or no")
        return text == "yes"
    if kind.startswith("str"):
        if text not in POLICIES:
            raise UsageError(f"{where} must be one of {', '.join(POLICIES)}")
        return text
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise UsageError(f"{where} must be a whole number")
    return int(text)


def rows_of(section: object) -> dict[str, Row]:
    """Of a run's [nccl]: what it says of each group, over the table."""
    return {name: changed(name, getattr(section, name)) for name in TABLE}


# Set where they are not; what torch and NCCL otherwise do with a rank that is lost.
DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # read when the card is first used
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
}
RECORDED = ("NCCL_CUMEM_ENABLE", "NCCL_P2P_LEVEL", "NCCL_P2P_DISABLE", "NCCL_ALGO", "NCCL_PROTO")


def check_environment(environment: Mapping[str, str]) -> None:
    """UsageError where a variable makes what is meant to overlap wait in line."""
    if environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise UsageError(
            "CUDA_DEVICE_MAX_CONNECTIONS is 1, which puts the exchange and what is to hide it into "
            "one queue; unset it, or set 32"
        )


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What is set of the variables that NCCL's ways depend on."""
    names = [n for n in environment if n in DEFAULTS or n in RECORDED or n.startswith("NCCL_IB_")]
    return {name: environment[name] for name in sorted(names)}


def api() -> Any | None:
    """torch's ProcessGroupNCCL; None where it was built without NCCL."""
    try:
        from torch.distributed import ProcessGroupNCCL
    except ImportError:
        return None
    return ProcessGroupNCCL


def options(row: Row, nccl: Any) -> tuple[Any, list[str]]:
    """(the options of a group, what of the row this version of NCCL does not know)."""
    made = nccl.Options()
    made.is_high_priority_stream = row.high_priority
    missing = []
    for name in CONFIG:
        value = getattr(row, name)
        if value is None:
            continue
        if not hasattr(made.config, name):
            missing.append(name)
            continue
        setattr(made.config, name, POLICIES[value] if name == "cta_policy" else value)
    return made, missing


def described() -> list[tuple[str, str]]:
    """The table, a group a line, with what this torch's NCCL does not know of it."""
    nccl, lines = api(), []
    for name, row in TABLE.items():
        text = row.describe()
        missing = options(row, nccl)[1] if nccl else []
        if missing:
            text += f" (unknown to this NCCL: {', '.join(missing)})"
        lines.append((f"nccl {name}", f"{text}: {row.why}"))
    return lines
