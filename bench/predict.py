"""What the timing model of the Hopper products says: its errors on published figures, the variants
of a layer's products side by side, and what bench/gpu_report.py sets beside what a card gives.

python bench/predict.py errors
python bench/predict.py variants [T H F E K]
python bench/predict.py launches    # what a chain of launches and one that routes alone gain
python bench/predict.py store    # into bench/predicted.json, when a kernel or the model changes
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from tune_problems import GROUPED, LAYERS  # noqa: E402

from moekernels import jsonio  # noqa: E402
from moekernels.predict import fp8, launches, published  # noqa: E402
from moekernels.predict.card import CARDS, H100  # noqa: E402
from moekernels.predict.events import epilogue_cycles, predict  # noqa: E402
from moekernels.predict.kernel import Kernel  # noqa: E402
from moekernels.predict.layer import OPS, Layer, layer_tflops  # noqa: E402
from moekernels.predict.ours import (  # noqa: E402
    DEFAULT,
    GATHERING,
    JOINED,
    SEGMENTS,
    VARIANTS,
    kernel_of,
    product,
    recipe_of,
)

STORE = ROOT / "bench" / "predicted.json"
WHAT = (
    "What moekernels/predict says, by `python bench/predict.py store`: epilogues from the "
    "instructions of their machine code; no card has been asked. TFLOP/s as [H100, H200]; cycles "
    "of an SM."
)


def errors() -> None:
    for kind in ("CALIBRATION", "HOLDOUT"):
        found = published.errors(getattr(published, kind))
        print(f"{kind.lower()}: published, predicted TFLOP/s, error")
        for point, error in found:
            name = f"{point.source}: {point.name}"
            predicted = point.tflops * (1 + error)
            print(f"  {name:56}{point.tflops:6.0f}{predicted:7.0f} {error:+7.1%}")
        values = [error for _, error in found]
        print(f"  rms {published.rms(values):.1%}, most {max(map(abs, values)):.1%}")


def variants(layer: Layer) -> None:
    print(f"{layer}, predicted TFLOP/s: {' and '.join(CARDS)}")
    for op, ways in VARIANTS.items():
        for way in ways:
            kernel = kernel_of(op, **way)
            rates = [product(op, layer, card, kernel).tflops for card in CARDS.values()]
            print(f"  {op:8}{kernel.name:52}" + "".join(f"{rate:6.0f}" for rate in rates))
    for op in fp8.products(layer, H100):
        rates = "".join(f"{fp8.products(layer, card)[op]:6.0f}" for card in CARDS.values())
        print(f"  {op:8}{fp8.KERNEL.name:52}{rates}")
    recipes = {"rows permuted": DEFAULT, "rows gathered": GATHERING}
    recipes[f"gradients of {SEGMENTS} microbatches"] = JOINED
    for name, recipe in recipes.items():
        found = [layer_tflops(layer, recipe, card) for card in CARDS.values()]
        for way in found[0]:
            rates = "".join(f"{on[way]:6.0f}" for on in found)
            print(f"  the layer, {f'{name}, {way}':49}{rates}")
    for way in ("forward", "backward"):
        rates = "".join(f"{fp8.layer_tflops(layer, card)[way]:6.0f}" for card in CARDS.values())
        print(f"  the layer, experts in FP8, {way:34}{rates}")


TOKENS = (512, 1024, 2048, 4096, 8192, 32768)


def of_launches() -> None:
    """Our first layer, and Qwen3-30B's, at fewer tokens."""
    print("us in turn, gain in a chain, and with one launch that routes: forward, backward; H100")
    for shape in (LAYERS[0], LAYERS[3]):
        for tokens in TOKENS:
            layer = replace(shape, T=tokens)
            turn = launches.passes(layer, H100, False, False)
            ways = [launches.gains(layer, H100, *way) for way in launches.WAYS[1:]]
            told = [
                f"{1e6 * turn[way]:8.0f}" + "".join(f" {on[way]:+6.1%}" for on in ways)
                for way in turn
            ]
            print(f"  {layer!s:32}" + "   ".join(told))


# ---- what is stored
def cycles() -> dict:
    """Of a step of 64 of K, and of the epilogue of a whole tile of each product."""
    tile = {"forward": (LAYERS[0].plain(LAYERS[0].F, LAYERS[0].H), kernel_of("down"))}
    tile |= {op: (LAYERS[0].problem(op), DEFAULT.kernel(op, LAYERS[0])) for op in OPS}
    found = {op.rstrip("1"): round(epilogue_cycles(*of, H100)) for op, of in tile.items()}
    del found["wgrad2"]  # as wgrad1
    return {"step": round(Kernel().tensor + H100.step_gap), "epilogue": found}


def calibration() -> dict:
    """What bench/calibrate.py measures, by the model's constants."""
    rate = H100.l2_rate / H100.multiprocessors
    return {
        **{f"wgmma_n{n}": {"cycles_a_step": Kernel(tile_n=n).tensor} for n in (128, 192, 256)},
        "tma_l2": {"bytes_a_cycle_and_sm": round(rate, 1)},
        "tma_l2_multicast_2": {"bytes_a_cycle_and_sm": round(2 * rate, 1)},
        "hbm_copy": {"gb_a_second": [round(card.dram / 1e9) for card in CARDS.values()]},
    }


def of_products(layer: Layer) -> dict[str, list[int]]:
    """TFLOP/s of a layer's products, [H100, H200]."""
    kernels = {op.replace("wgrad", "wgrad w"): (op, None) for op in OPS}
    joined = JOINED.wgrad
    kernels |= {f"wgrad w{i} of {SEGMENTS}": (f"wgrad{i}", joined) for i in (1, 2)}
    return {
        name: [round(product(op, layer, card, kernel).tflops) for card in CARDS.values()]
        for name, (op, kernel) in kernels.items()
    }


def of_grouped(layer: Layer) -> dict[str, list[int]]:
    problem = layer.plain(layer.F, layer.H)
    return {
        "forward": [
            round(predict(problem, kernel_of("down"), card).tflops) for card in CARDS.values()
        ]
    }


def of_layer(layer: Layer) -> dict[str, list[int]]:
    """TFLOP/s of the passes of a whole layer, [H100, H200]."""
    both = [layer_tflops(layer, recipe_of(layer), card) for card in CARDS.values()]
    return {way: [round(on[way]) for on in both] for way in both[0]}


def figures() -> dict:
    return {
        "what": WHAT,
        "cycles": cycles(),
        "calibrate": calibration(),
        "products": {str(at): of_products(at) for at in LAYERS}
        | {str(at): of_grouped(at) for at in GROUPED},
        "layers": {str(at): of_layer(at) for at in LAYERS},
    }


def in_lines(found: dict) -> str:
    """JSON with a line for each entry of each part."""
    parts = []
    for name, part in found.items():
        entries = part.items() if isinstance(part, dict) else ()
        lines = ",\n".join(
            f"  {jsonio.dumps(key)}: {jsonio.dumps(value)}" for key, value in entries
        )
        value = f"{{\n{lines}\n }}" if lines else jsonio.dumps(part)
        parts.append(f" {jsonio.dumps(name)}: {value}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    command, *shape = sys.argv[1:] or ["errors"]
    if command == "errors" and not shape:
        errors()
    elif command == "variants" and len(shape) in (0, 5):
        variants(Layer(*(int(size) for size in shape or (32768, 2048, 4096, 64, 4))))
    elif command == "launches" and not shape:
        of_launches()
    elif command == "store" and not shape:
        STORE.write_text(in_lines(figures()))
        print(f"{STORE.relative_to(ROOT)} is as the model says")
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
