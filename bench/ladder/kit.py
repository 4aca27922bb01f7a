"""What a rung works with: a way to launch probe kernels, and a device to call ops on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import ptx_emulator as ptx
from ptx_emulator import hardware as ptx_hardware
from python_tests.support import emulated

ROOT = Path(__file__).parents[2]
PROBES = Path(__file__).parent / "probes.cu"
INCLUDE = (ROOT / "csrc", ROOT / "csrc" / "include")


class RungFailed(AssertionError):
    """A rung that did not give what it must; the text says what it gave."""


class RungSkipped(Exception):
    """A rung that this machine has no place for; the text says why. What needs it goes on."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise RungFailed(text)


@functools.cache
def probes(pack: Path | None) -> ptx.Module:
    """The probe kernels' PTX, from the pack or from nvcc."""
    packed = pack and pack / "probes.ptx"
    if packed and packed.exists():
        return ptx.Module(packed.read_text())
    return ptx.Module(ptx.compile_ptx(PROBES, "90a", include=INCLUDE, lines=False))


@dataclass
class Kit:
    """hardware: a GPU is there; way: `emulator`, `ptx` (the driver compiles it) or `sass` (nvcc's);
    pack: the folder that pack_gpu_suite.py made; planted: what a test makes wrong."""

    hardware: bool = False
    way: str = "emulator"
    pack: Path | None = None
    how: dict = field(default_factory=dict)  # schedule, lazy, races of the emulator
    planted: dict = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)  # of the last ops, where they were emulated

    @functools.cached_property
    def program(self) -> ptx_hardware.Program:
        module = probes(self.pack)
        image = (self.pack / "probes.cubin").read_bytes() if self.way == "sass" else module.text
        return ptx_hardware.Program(image, module)

    def launch(self, name: str, blocks: int, threads: int, args: list, shared: int = 0) -> None:
        """Runs a probe; arrays among `args` are written in place."""
        if self.hardware:
            self.program.launch(name, blocks, threads, args, shared)
        else:
            probes(self.pack).launch(name, blocks, threads, args, shared, **self.how)

    def wrong(self, name: str, right):
        """A value of the rung, or what a test planted in its place."""
        return self.planted.get(name, right)

    # ---- ops
    @property
    def device(self) -> str:
        return "cuda" if self.hardware else "cpu"

    def place(self, inputs: dict) -> dict:
        """The tensors of `inputs` on the device, each as far off its alignment as it was."""
        return {n: self._placed(v) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        if not self.hardware:
            return value
        offset = value.storage_offset()
        room = torch.empty(offset + value.numel(), dtype=value.dtype, device="cuda")
        return room[offset:].view(value.shape).copy_(value)

    def settings(self, **settings) -> None:
        """Of the products' launches; none: the defaults."""
        if not self.hardware:
            emulated.device()  # loads the library
        library = torch.ops.moekernels if self.hardware else torch.ops.moekernels_emulated
        library._sm90_settings(**settings)

    @contextlib.contextmanager
    def ops(self) -> Iterator[list[str]]:
        """The ops run their Hopper kernels inside; the products launched, by epilogue.

        On a GPU the list is None where the profiler cannot name kernels."""
        launched: list[str] = []
        if not self.hardware:
            with emulated.emulated_cuda(capability=90, **self.how) as device:
                yield launched
            launched += products(device.launches)
            self.kernels = list(device.launches)
            return
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            yield launched
            torch.cuda.synchronize()
        launched += products([event.key for event in profile.key_averages()])


def expect_styles(kit: Kit, launched: list[str], style: str) -> None:
    """The products have run in this style; on a GPU the library itself refuses what it has not."""
    if kit.hardware:
        return
    found = {name for name in kit.kernels if "product" in name and "sm90" in name}
    require(
        found and all(f"{style}_product" in name for name in found),
        f"expected products in the style {style}, launched were {sorted(found) or 'none'}",
    )


EPILOGUES = ("StoreRows", "StoreGradient", "AddGradient", "StoreUp", "StoreDAct")


def products(kernels: list[str]) -> list[str]:
    """The epilogues of the Hopper products among kernels' names, mangled or not."""
    ours = [name for name in kernels if "sm90" in name and "product" in name]
    return [next(kind for kind in EPILOGUES if kind in name) for name in ours]


def expect_products(kit: Kit, launched: list[str], wanted: set[str]) -> None:
    """The Hopper products have run, and not the portable ones in their place."""
    if kit.hardware and not launched:
        return  # the profiler saw nothing: other rungs tell
    require(
        set(launched) == wanted,
        f"expected the products {sorted(wanted)}, launched were {sorted(set(launched)) or 'none'}",
    )


Fn = Callable[[Kit], dict | None]


@dataclass(frozen=True)
class Rung:
    """number: of the list in bench/PLAN.md; needs: the rungs below; look: where its fault lies.

    probe: launches probes, in every way that there is."""

    number: int
    name: str
    fn: Fn
    needs: tuple[str, ...]
    look: str
    probe: bool = False
    limit: float = 15.0


RUNGS: dict[str, Rung] = {}


def rung(number: int, *needs: str, look: str, probe: bool = False, limit: float = 15.0):
    """Registers a rung under its function's name."""

    def register(fn: Fn) -> Fn:
        RUNGS[fn.__name__] = Rung(number, fn.__name__, fn, needs, look, probe, limit)
        return fn

    return register
