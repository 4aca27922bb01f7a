"""Training on two local ranks by the library's own pieces, on tokens that you make yourself.

    python examples/two_ranks.py

Both ranks share every layer's attention (tp 2) and hold half of its experts each (ep 2).
"""

import torch

from moekernels import assembly
from moekernels.data import MicroBatch
from moekernels.parallel import launch
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer
from moekernels.run import files

SMALL = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
SMALL |= {"expert_d_in": 32, "expert_d_ff": 32, "num_experts": 8, "vocab_size": 258}
STEP = {("batch", "microbatches"): 2, ("batch", "accumulation"): 1}


def train(env: launch.RankEnv, run: files.RunConfig, steps: int) -> list[float]:
    """What each rank does; all ranks see the same microbatches, as dp is 1."""
    mesh = Mesh(assembly.layout_of(run), device=env.device)
    chunks = assembly.build_chunks(run, mesh)
    runtime = assembly.build_runtime(run, mesh, chunks)
    shards = [shard for chunk in chunks for shard in chunk.named_shards()]
    optimizer = Optimizer(shards, mesh, AdamWConfig(lr=1e-2, warmup=2, steps=steps))
    count = torch.arange(21)  # what is to be learnt: to count
    sequences = [(count[:-1], count[1:])] * 4
    batch = MicroBatch.pack(sequences, loss_scale=1 / (2 * 4 * 20), align=run.layout.tp)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in runtime.step([batch, batch]).losses))
        optimizer.reduce()
        optimizer.step()
    return losses


def main(steps: int = 30) -> list[float]:
    flags = {("model", key): value for key, value in SMALL.items()} | STEP
    flags |= {("layout", "tp"): 2, ("layout", "ep"): 2}
    run = files.resolve("tiny", None, flags)
    losses = launch.run_local(2, "cpu", train, run, steps)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
