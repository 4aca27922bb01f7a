"""`moekernels info --explain`: which CUDA kernel each product of an MoE layer takes, and why.

Legend: T tokens, H hidden, F expert hidden, E experts, K top-k, R = T K routed rows.
"""

from __future__ import annotations

import re
from typing import Any

from moekernels.errors import UsageError
from moekernels.predict import launches
from moekernels.predict.card import CARDS, Card
from moekernels.predict.layer import Layer, layer_tflops
from moekernels.predict.ours import VARIANTS, fastest, kernel_of, product, recipe_of

KEYS = ("T", "H", "F", "E", "K")
DTYPES = ("bf16", "fp16", "fp32")
# Where the table says nothing.
ORDER: dict[str, Any] = {"band": 0, "grid": 0, "promotion": 0, "prefetch": True, "bulk_sums": True}
ORDER |= {"style": "direct", "pair": "none", "gather": -1, "join": -1}
OPS = {  # of the products, as the timing model names them
    "up (forward)": "up",
    "down (forward)": "down",
    "down dgrad + dact": "dact",
    "down wgrad": "wgrad2",
    "up dgrad": "dgrad",
    "up wgrad": "wgrad1",
}
EXAMPLE = 'for example "T=16384 H=2048 F=4096 E=64 K=2"'


def parse_shape(text: str) -> dict[str, Any]:
    """`T=.. H=.. F=.. E=.. K=.. [dtype=bf16|fp16|fp32]` in any order -> its values."""
    shape: dict[str, Any] = {}
    for part in text.replace(",", " ").split():
        key, _, value = part.partition("=")
        if key == "dtype":
            if value not in DTYPES:
                raise UsageError(f"--explain: dtype must be {'|'.join(DTYPES)}, got {value!r}")
            shape[key] = value
        elif key not in KEYS:
            raise UsageError(f"--explain: unknown {part!r}; give {' '.join(KEYS)}, {EXAMPLE}")
        elif not value.isascii() or not value.isdigit() or int(value) < 1:
            raise UsageError(f"--explain: {key} must be a whole number from 1 on, got {value!r}")
        elif int(value) >= 2**31:
            raise UsageError(f"--explain: {key} must be less than 2^31, got {value}")
        else:
            shape[key] = int(value)
    missing = [key for key in KEYS if key not in shape]
    if missing:
        raise UsageError(f"--explain: {' '.join(missing)} missing, {EXAMPLE}")
    if shape["K"] > shape["E"]:
        raise UsageError(f"--explain: K={shape['K']} is more than E={shape['E']}")
    return {"dtype": "bf16", **shape}


def parse_device(name: str | None) -> int:
    """`sm_90` or `sm_90a` -> 90; None: the current device, or an sm_90 where there is none."""
    import torch

    if name is None:
        if not torch.cuda.is_available():
            return 90
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    found = re.fullmatch(r"sm_(\d{2,3})[af]?", name)
    if found is None or int(found[1]) < 80:
        raise UsageError(f"--device must be sm_80 or later, such as sm_90, got {name!r}")
    return int(found[1])


def products(shape: dict) -> list[tuple[str, str, int, int, int]]:
    """(name, op of the table, m, n, k) of a layer's products, in the order that they run in."""
    rows, hidden, ffn = shape["T"] * shape["K"], shape["H"], shape["F"]
    return [
        ("up (forward)", "up", rows, 2 * ffn, hidden),
        ("down (forward)", "down", rows, hidden, ffn),
        ("down dgrad + dact", "dact", rows, ffn, hidden),
        ("down wgrad", "wgrad", hidden, ffn, rows),
        ("up dgrad", "dgrad", rows, hidden, 2 * ffn),
        ("up wgrad", "wgrad", 2 * ffn, hidden, rows),
    ]


def card_of(device: str | None) -> Card:
    """The card that times are predicted for: this machine's if it is an H200, else an H100."""
    import torch

    here = device is None and torch.cuda.is_available()
    return CARDS["H200" if here and "H200" in torch.cuda.get_device_name() else "H100"]


def predicted_tflops(name: str, shape: dict, chosen: dict, card: Card) -> float:
    """What the timing model says of one of `products` in the kernel that was chosen for it."""
    layer = Layer(*(int(shape[key]) for key in KEYS))
    tile_m, tile_n, _ = chosen["tile"]
    how = {"tile_m": tile_m, "tile_n": tile_n, "stages": chosen["stages"]}
    how |= {key: chosen["order"][key] for key in ("band", "grid")}
    how["bulk_sums"] = chosen["order"]["bulk_sums"] and "wgrad" in OPS[name]
    how["epilogue"] = chosen["order"]["style"]
    how["pair"] = chosen["order"]["pair"].replace("none", "")
    return product(OPS[name], layer, card, kernel_of(OPS[name], **how)).tflops


def variants(name: str, shape: dict, card: Card) -> str:
    """What the timing model says of every variant that is built of one of `products`."""
    layer, op = Layer(*(int(shape[key]) for key in KEYS)), OPS[name]
    kernels = [kernel_of(op, **how) for how in VARIANTS[op.rstrip("12")]]
    rates = ((kernel.name, product(op, layer, card, kernel).tflops) for kernel in kernels)
    return "; ".join(f"{kind} {rate:.0f}" for kind, rate in rates)


def launches_of(shape: dict, card: Card, order: dict[str, bool]) -> str:
    """What the model says of a layer's launches in turn, in a chain, and where one routes."""
    layer = Layer(*(int(shape[key]) for key in KEYS))
    turn = launches.passes(layer, card, False, False)
    told = [f"{1e6 * seconds:.0f} us {way}" for way, seconds in turn.items()]
    parts = [f"in turn {', '.join(told)}"]
    for name, way in zip(("in a chain", "and routed by one"), launches.WAYS[1:]):
        gains = launches.gains(layer, card, *way)
        parts.append(f"{name} {', '.join(f'{gain:+.1%}' for gain in gains.values())}")
    chosen = [name.replace("_", " ") for name, on in order.items() if on] or ["in turn"]
    return f"{'launches':<18} {', '.join(chosen)}  predicted {'; '.join(parts)}"


def layer_line(shape: dict, card: Card) -> str:
    """What the timing model says of the layer as it is, and in the fastest that is built."""
    layer = Layer(*(int(shape[key]) for key in KEYS))
    ways = {"as chosen": recipe_of(layer), "in the fastest built of each": fastest(layer, card)}
    rates = {name: layer_tflops(layer, recipe, card) for name, recipe in ways.items()}
    told = (f"{r['forward']:.0f} / {r['backward']:.0f} {name}" for name, r in rates.items())
    return f"predicted of the layer, forward / backward, TFLOP/s: {', '.join(told)}"


def explain(text: str, device: str | None = None) -> str:
    """One line a product of a gated layer: its size, kernel, tile, stages and the reason."""
    shape, capability = parse_shape(text), parse_device(device)
    import torch

    try:
        from moekernels import _host
    except ImportError as error:
        raise UsageError(f"--explain needs the built library: {error}") from None
    item = 4 if shape["dtype"] == "fp32" else 2
    lengths = (16, shape["H"] * item, shape["F"] * item)
    alignment = min(length & -length for length in lengths)
    wgmma, rows = _host.build["wgmma"], shape["T"] * shape["K"]
    lines = [
        f"{' '.join(f'{key}={shape[key]}' for key in KEYS)} {shape['dtype']} on sm_{capability}: "
        f"R={rows} rows, {rows / shape['E']:.0f} an expert if all are alike; "
        f"wgmma kernels in this build: {'yes' if wgmma else 'no'}"
    ]
    measured = predicted = 0
    card = card_of(device)
    for name, op, m, n, k in products(shape):
        chosen = _host.choose_gemm(
            op,
            shape["dtype"],
            m=m,
            n=n,
            k=k,
            experts=shape["E"],
            alignment=alignment,
            capability=capability,
            wgmma=wgmma,
            tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        )
        tile = "x".join(map(str, chosen["tile"]))
        # Of wgrad, k is shared out among the experts; of the others, m is.
        size = f"{shape['E']} of {m} x {n}, k {k} in all" if op == "wgrad" else f"{m} x {n} x {k}"
        reason = chosen["reason"]
        measured += reason.startswith("measured")
        if told := [
            f"{key} {value}" for key, value in chosen["order"].items() if value != ORDER[key]
        ]:
            reason = f"{', '.join(told)}: {reason}"
        if chosen["obstacle"] is not None:
            reason += f"; no wgmma: {chosen['obstacle']}"
        rate = ""
        if chosen["kernel"] == "wgmma":
            rate = f"predicted {predicted_tflops(name, shape, chosen, card):.0f} TFLOP/s  "
            predicted += 1
        lines.append(
            f"{name:<18} {size:<36} {2e-12 * m * n * k:7.3f} TFLOP  {chosen['kernel']:<6}"
            f"{tile:<12} {chosen['stages']} stages  {rate}{reason}"
        )
        if rate:
            lines.append(f"{'':<18} built: {variants(name, shape, card)}")
    if predicted == len(OPS) and shape["dtype"] == "bf16":
        lines.append(launches_of(shape, card, _host.launch_order))
    if not measured:
        lines.append("tiles are predicted from the H200's arithmetic, not measured on one")
    if predicted == len(OPS):
        lines.append(layer_line(shape, card))
    if predicted:
        lines.append(
            f"TFLOP/s are predicted by a model of the {card.name}, with an error of 4 to 7 %, and "
            "not measured; docs/howto/predict.md"
        )
    return "\n".join(lines)
