"""What the timing model of the Hopper products says: its errors on published figures, and the
variants of a layer's products side by side.

python bench/predict.py errors
python bench/predict.py variants [T H F E K]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moekernels.predict import published  # noqa: E402
from moekernels.predict.card import CARDS  # noqa: E402
from moekernels.predict.layer import Layer  # noqa: E402
from moekernels.predict.ours import VARIANTS, kernel_of, product  # noqa: E402


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


def main() -> int:
    command, *shape = sys.argv[1:] or ["errors"]
    if command == "errors" and not shape:
        errors()
    elif command == "variants" and len(shape) in (0, 5):
        variants(Layer(*(int(size) for size in shape or (32768, 2048, 4096, 64, 4))))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
