"""`moekernels experts RUN`: which experts are hot, cold and dead, who is chosen with whom, how the
ranks are loaded and how they could be."""

from __future__ import annotations

from pathlib import Path

import torch

from moekernels import files, jsonio
from moekernels.balance import placement
from moekernels.balance.record import Record
from moekernels.errors import UsageError
from moekernels.train.plots import plot_experts

SHOWN = 3  # hottest experts and closest pairs of a layer


def experts(folder: Path, as_json: bool = False) -> int:
    record = Record.read(folder)
    layers = [_layer(record, number) for number in range(len(record.loads))]
    if as_json:
        print(jsonio.dumps({"ranks": record.ranks, "layers": layers}))
        return 0
    picture = folder / "experts.png"
    try:
        plot_experts(picture, record.loads.numpy(), record)
    except OSError as error:
        said = files.no_room(picture, error, remedy="--json prints what it shows")
        raise UsageError(said) from None
    print("\n".join([*_text(record, layers), f"drawn to {picture}"]))
    return 0


def _layer(record: Record, number: int) -> dict:
    """Facts of a layer; experts are numbered from 0, loads are over the mean."""
    loads = record.loads[number]
    share = loads / loads.mean().clamp_min(1e-300)
    order = share.argsort(descending=True, stable=True).tolist()
    together = record.together()[number].triu()
    closest = together.flatten().argsort(descending=True, stable=True)[:SHOWN].tolist()
    width = len(loads)
    nodes = record.node_of[number].tolist()
    watched = record.pairs[number] if record.pairs[number].any() else None
    best = placement.solve(loads, nodes, watched)
    return {
        "layer": number + 1,
        "hot": [[x, share[x].item()] for x in order[:SHOWN]],
        "cold": [[x, share[x].item()] for x in order[: -SHOWN - 1 : -1]],
        "dead": [x for x in range(width) if loads[x] == 0],
        "together": [
            [*divmod(place, width), together.flatten()[place].item()]
            for place in closest
            if together.flatten()[place] > 0
        ],
        "ranks": record.rank_loads[number].tolist(),
        "ranks_max_over_mean": _uneven(record.rank_loads[number]),
        "ranks_placed_anew": _uneven(torch.zeros(record.ranks).double().index_add(0, best, loads)),
    }


def _uneven(loads: torch.Tensor) -> float:
    return (loads.max() / loads.mean()).item() if loads.any() else 1.0


def _text(record: Record, layers: list[dict]) -> list[str]:
    nodes = int(record.node_of.max()) + 1
    moved = int((record.slot_of != placement.unmoved(*record.slot_of.shape)).any())
    lines = [
        f"{record.loads.shape[0]} layers x {record.loads.shape[1]} experts on {record.ranks} "
        f"rank{'s' * (record.ranks > 1)} of {nodes} node{'s' * (nodes > 1)}"
        f"{', moved' if moved else ''}; loads over their layer's mean, ranks: busiest over mean",
        f"{'layer':>5}  {'hot':<30}{'cold':<24}{'dead':>4}  {'ranks':>6}  {'placed anew':>11}  "
        f"chosen together, times chance",
    ]
    for layer in layers:
        hot, cold = (
            ", ".join(f"{x} {share:.2f}" for x, share in layer[key]) for key in ("hot", "cold")
        )
        pairs = ", ".join(f"{a}+{b} {lift:.1f}" for a, b, lift in layer["together"])
        lines.append(
            f"{layer['layer']:>5}  {hot:<30}{cold:<24}{len(layer['dead']):>4}  "
            f"{layer['ranks_max_over_mean']:>6.3f}  {layer['ranks_placed_anew']:>11.3f}  "
            f"{pairs or 'nothing was watched'}"
        )
    return lines
