"""Rungs 1 to 6: the driver, and each instruction family of the products by itself."""

from __future__ import annotations

import json
import re

import numpy as np
import torch

import ptx_emulator as ptx
from ladder.diagnose import LINE, explain_box, explain_order, swizzled, where
from ladder.kit import Kit, RungFailed, probes, require, rung
from ptx_emulator import hardware as ptx_hardware
from ptx_emulator.types import bf16_to_f32, f32_to_bf16

TILE_REGISTERS, FILE_REGISTERS = 384 * 168, 64 << 10  # of a product's launch; of an SM
UNWRITTEN = 0xEE


# ---- 1: the driver
@rung(1, look="the driver (12.0 or later), the card (sm_90), the library's architecture")
def driver(kit: Kit) -> dict:
    """A Hopper card, the tensor map encoder, and a context that runs something."""
    facts = kit.wrong("facts", None) or _facts(kit)
    require(facts["capability"] == [9, 0], f"the device is sm_{facts['capability']}, not sm_90")
    require(facts["encoder"], "the driver has no cuTensorMapEncodeTiled")
    require(facts["driver"] >= 12000, f"the driver is of CUDA {facts['driver']}, not 12.0 or later")
    return facts


def _facts(kit: Kit) -> dict:
    if not kit.hardware:
        return {"capability": [9, 0], "encoder": True, "driver": 13000, "name": "emulator"}
    import ctypes

    library, version = ptx_hardware.driver(), ctypes.c_int()
    ptx_hardware.check(library.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    return {
        "capability": list(torch.cuda.get_device_capability()),
        "encoder": hasattr(library, "cuTensorMapEncodeTiled"),
        "driver": version.value,
        "name": torch.cuda.get_device_name(),
        "memory": torch.cuda.mem_get_info()[1],
    }


@rung(1, "driver", look="nvcc's -res-usage of the kernel; rebuild for 90a-real")
def attributes(kit: Kit) -> dict:
    """Every Hopper product loads, without local memory, and may have the shared memory it asks."""
    found = kit.wrong("kernels", None) or _kernels(kit)
    require(found, "the library holds no Hopper product")
    for name, facts in found.items():
        require(facts["local"] == 0, f"{name} uses {facts['local']} bytes of local memory")
        require(
            facts["registers"] <= 168, f"{name} is launched with {facts['registers']} registers"
        )
    return {"products": len(found), "registers": max(f["registers"] for f in found.values())}


def _kernels(kit: Kit) -> dict[str, dict]:
    if not kit.pack:  # what ptxas will make of them is not known before: the launch bounds are
        return {"product": {"local": 0, "registers": TILE_REGISTERS // 384}}
    named = json.loads((kit.pack / "products.json").read_text())
    if not kit.hardware:
        return {name: facts for kernels in named.values() for name, facts in kernels.items()}
    found = {}
    for file, kernels in named.items():
        program = ptx_hardware.Program((kit.pack / file).read_bytes())
        for name in kernels:
            found[name] = program.attributes(name)
            program.allow_shared(name, ptx.launch.MAX_SHARED)
    return found


# ---- 2: mbarriers
@rung(2, "driver", look="init_barrier, arrive, wait in sm90/ptx.cuh: count and parity", probe=True)
def mbarrier(kit: Kit) -> dict:
    """A fresh barrier's phase 1 is over and its phase 0 is not; 40 rounds, both parities."""
    rounds = 40
    seen = np.full(2 + rounds, UNWRITTEN, np.uint32)
    kit.launch("mbarrier_probe", 1, 64, [kit.wrong("arrivals", 8), rounds, seen])
    require(seen[0] == 1, "a fresh barrier says that parity 1 is not over: the ring would hang")
    require(seen[1] == 0, "a fresh barrier says that parity 0 is over: nothing would be waited for")
    wanted = np.arange(rounds) * 3 + 7
    require((seen[2:] == wanted).all(), f"rounds came out of order: {where(seen[2:] != wanted)}")
    return {"rounds": rounds}


# ---- 3: TMA
def _array(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 65521 + 1).astype(np.uint16).reshape(shape)


def _box(array: np.ndarray, at: tuple[int, ...], lines: int) -> np.ndarray:
    """[lines, 64] of an array at (.., line, element), zeros outside."""
    *outer, y, x = at
    flat = array[tuple(outer)] if outer else array
    box = np.zeros((lines, 64), np.uint16)
    inside = flat[y : y + lines, x : x + 64]
    box[: inside.shape[0], : inside.shape[1]] = inside
    return box


def _hold_box(kit: Kit, array: np.ndarray, at: tuple[int, ...], lines: int) -> None:
    rank, nbytes = array.ndim, lines * LINE
    box = (*[1] * (rank - 2), lines, 64)
    tensor_map = ptx.TensorMap(array, box, kit.wrong("swizzle", 128))
    out = np.full(nbytes, UNWRITTEN, np.uint8)
    coordinates = kit.wrong("order", lambda at: at[::-1])(at)  # the innermost first
    args = [tensor_map, *coordinates, kit.wrong("bytes", nbytes), out]
    kit.launch(f"tma_{rank}d_probe", 1, 128, args, nbytes)
    lines_wanted = _box(array, at, lines)
    if not (out == swizzled(lines_wanted)).all():
        shape = "x".join(map(str, array.shape))
        raise RungFailed(f"box at {at} of {shape}: {explain_box(out, lines_wanted)}")


@rung(3, "mbarrier", look="tensor_map.cuh: swizzle, strides, coordinates of load_tile", probe=True)
def tma_2d(kit: Kit) -> dict:
    """Boxes of 64 and 128 lines from the inside of an array, byte for byte."""
    for at, lines in (((0, 0), 64), ((3, 8), 64), ((16, 64), 128)):
        _hold_box(kit, _array(160, 136), at, lines)
    return {"boxes": 3}


@rung(3, "tma_2d", look="tensor_map.cuh with rank 3: the weights' maps", probe=True)
def tma_3d(kit: Kit) -> dict:
    """Boxes of a stack of matrices, the second expert's and the last's."""
    for at, lines in (((1, 0, 0), 64), ((2, 5, 64), 64), ((2, 0, 8), 128)):
        _hold_box(kit, _array(3, 136, 136), at, lines)
    return {"boxes": 3}


@rung(
    3,
    "tma_2d",
    look="sizes in tensor_map.cuh; bytes announced must count what lies outside",
    probe=True,
)
def tma_edges(kit: Kit) -> dict:
    """Boxes that reach over an edge, one larger than its array: zeros, all bytes counted."""
    for shape, at in (((100, 72), (90, 0)), ((100, 72), (0, 64)), ((5, 24), (0, 0))):
        _hold_box(kit, _array(*shape), at, 128)
    _hold_box(kit, _array(2, 70, 72), (1, 64, 64), 128)  # the next expert's rows must not show
    return {"boxes": 4}


# ---- 4: warpgroup products
def _image(values: np.ndarray, transposed: bool, dtype: str) -> np.ndarray:
    """[M or N, 64 of K] -> the bytes of the operand, along K or (transposed) along M or N."""
    words = values.astype(np.float16).view(np.uint16) if dtype == "f16" else f32_to_bf16(values)
    if transposed:  # a box has 64 lines of K, 64 of M or N each
        words = np.concatenate([words[i : i + 64].T for i in range(0, len(words), 64)])
    return swizzled(words)


def _multiply(kit: Kit, name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One product [64, 64] [n, 64]^T by the probe of that name, d fp32 [64, n]."""
    _, dtype, _, majors = name.split("_")
    a, b = a.astype(np.float32), b.astype(np.float32)
    args = []
    for major, operand in zip(majors, (a, b)):
        transposed = major != "k"
        side = "b" if operand is b else "a"
        layout = (2048 if transposed else 32, 8192, 1024)  # step, leading, stride
        layout = kit.wrong(f"layout_{side}_{'mn' if transposed else 'k'}", layout)
        args.append((_image(operand, transposed, dtype), layout))
    (image_a, layout_a), (image_b, layout_b) = args
    out = np.full((64, len(b)), np.nan, np.float32)
    # What a wrong stride reaches for is there.
    shared = 2 * len(image_b) + len(image_a)
    kit.launch(name, 1, 128, [image_a, image_b, *layout_a, *layout_b, out], shared)
    return out


def _hold_product(kit: Kit, name: str) -> None:
    n = int(re.search(r"n(\d+)", name)[1])
    one, place = np.eye(64), np.arange(64.0)
    ones = np.tile(one, (n // 64, 1))  # B [n, 64]: 1 where k = n % 64
    index = np.arange(float(n))
    # What A one-hot shows of B, and B one-hot of A: d [m, n] = B [n, m] and A [m, n % 64].
    runs = {
        "B": [
            _multiply(kit, name, one, np.broadcast_to(codes, (n, 64))).T
            for codes in (index[:, None], place[None, :])
        ],
        "A": [
            _multiply(kit, name, np.broadcast_to(codes, (64, 64)), ones)[:, :64]
            for codes in (place[:, None], place[None, :])
        ],
    }
    found = [explain_order(w, "n" if w == "B" else "m", *runs[w]) for w in ("B", "A")]
    require(not any(found), f"{name}: " + "; ".join(filter(None, found)))
    random = np.random.default_rng(0)
    a, b = (bf16_to_f32(f32_to_bf16(random.standard_normal((e, 64)))) for e in (64, n))
    if name.split("_")[1] == "f16":
        a, b = (x.astype(np.float16).astype(np.float32) for x in (a, b))
    d, wanted = _multiply(kit, name, a, b), a.astype(np.float64) @ b.T.astype(np.float64)
    off = ~(np.abs(d - wanted) <= 1e-4 * (np.abs(wanted) + 1))
    require(not off.any(), f"{name}: random operands give other sums, {where(off)}")


@rung(4, "driver", look="operand() in sm90/ptx.cuh: stride 1024, step 32, swizzle", probe=True)
def wgmma_k_major(kit: Kit) -> dict:
    """m64n256k16, both operands along K, as a stage holds them: which element meets which."""
    _hold_product(kit, "wgmma_bf16_n256_kk")
    return {"shape": "m64n256k16"}


@rung(4, "wgmma_k_major", look="operand() with 64 lines of K a box: leading 8192", probe=True)
def wgmma_mn_major(kit: Kit) -> dict:
    """A along M, B along N, and both: the gradients' layouts, and w stored the other way round."""
    for name in ("wgmma_bf16_n256_mk", "wgmma_bf16_n256_kn", "wgmma_bf16_n256_mn"):
        _hold_product(kit, name)
    return {"layouts": 3}


@rung(4, "wgmma_k_major", look="multiply() of sm90/ptx.cuh with 64 accumulators", probe=True)
def wgmma_n128(kit: Kit) -> dict:
    """m64n128k16."""
    _hold_product(kit, "wgmma_bf16_n128_kk")
    return {"shape": "m64n128k16"}


@rung(4, "wgmma_k_major", look="the type in multiply() of sm90/ptx.cuh", probe=True)
def wgmma_f16(kit: Kit) -> dict:
    """fp16 operands: other bits than bf16's."""
    _hold_product(kit, "wgmma_f16_n256_kk")
    return {"dtype": "f16"}


# ---- 5: the ring
@rung(5, "tma_2d", look="Ring and release in sm90/product.cuh: phases, 8 arrivals", probe=True)
def ring(kit: Kit) -> dict:
    """Four stages through 1, 4, 5 and 40 steps: every stage's bytes at its turn."""
    stages, taken = 4, (1, 4, 5, 40)
    for steps in taken:
        array = _array(steps * 64, 64)
        out = np.full((steps, 64 * LINE), UNWRITTEN, np.uint8)
        arrivals, waits = kit.wrong("arrivals", 8), kit.wrong("waits", 1)
        args = [ptx.TensorMap(array, (64, 64)), stages, steps, arrivals, waits, out]
        kit.launch("ring_probe", 1, 384, args, stages * 64 * LINE)
        wrong = [
            step
            for step in range(steps)
            if (out[step] != swizzled(array[step * 64 : step * 64 + 64])).any()
        ]
        require(not wrong, f"{steps} steps: step {wrong} has another stage's bytes")
    return {"steps": taken}


# ---- 6: registers that change hands
@rung(6, "driver", look="take_registers and give_registers: their sum in the launch's", probe=True)
def setmaxnreg(kit: Kit) -> dict:
    """232 registers a consumer thread, 40 a producer's: the budget, and 200 values held."""
    text = kit.wrong("text", None) or probes(kit.pack).text
    entry = text[text.index("setmaxnreg_probe") :]
    give, take = (
        int(re.search(rf"setmaxnreg\.{kind}\.\S+\s+(\d+)", entry)[1]) for kind in ("dec", "inc")
    )
    asked = 256 * take + 128 * give
    require(
        asked <= TILE_REGISTERS <= FILE_REGISTERS,
        f"{take} and {give} registers a thread ask for {asked}, a launch has {TILE_REGISTERS}: "
        "setmaxnreg.inc would wait for ever",
    )
    held = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    out = np.full((256, 200), np.nan, np.float32)
    kit.launch("setmaxnreg_probe", 1, 384, [held, out])
    wanted = (held + held[::-1] * np.float32(2)).T
    wrong = ~np.isclose(out, wanted, rtol=1e-6, atol=1e-6)
    require(not wrong.any(), f"values held in registers changed: {where(wrong)}")
    return {"registers": asked}
