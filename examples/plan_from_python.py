"""The planner from Python: how many cards does a target throughput take?

python examples/plan_from_python.py
"""

from moekernels.errors import UsageError
from moekernels.plan.evaluate import Plan
from moekernels.plan.problem import problem_of
from moekernels.plan.search import search
from moekernels.run import files


def main() -> list[Plan]:
    plans = []
    for gpus in (2, 4, 8, 32):
        flags = {("hardware", "gpus"): gpus, ("hardware", "memory_gb"): 80.0}
        try:
            best = search(problem_of(files.resolve("spec-30b", None, flags))).best
        except UsageError as error:  # nothing fits: the message says what binds
            print(f"{gpus:3} cards  {error}")
            continue
        layout, away = best.strategy.layout, best.strategy.offload_optimizer
        print(
            f"{gpus:3} cards  tp {layout.tp} dp {layout.dp} pp {layout.pp} ep {layout.ep}  "
            f"{best.sequences_per_second:5.1f} sequences/s  {best.memory / 1e9:.0f} GB per card, "
            f"{100 * away:.0f} % of the optimizer's state on the host"
        )
        plans.append(best)
    return plans


if __name__ == "__main__":
    main()
