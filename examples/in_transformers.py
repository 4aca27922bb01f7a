"""The experts of a transformers model on these kernels; needs transformers 5.10 or newer.

    python examples/in_transformers.py

A random small model here; `from_pretrained(path, experts_implementation="moekernels")` is the same
for a real one.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moekernels.integrations.transformers  # noqa: F401, registers the implementation


def main() -> float:
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=3,
    )
    tokens = torch.randint(96, (2, 20))
    logits = []
    for implementation in ("eager", "moekernels"):
        torch.manual_seed(0)  # the same weights
        model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
        logits.append(model(tokens).logits)
    error = (logits[0] - logits[1]).abs().max().item()
    print(f"largest difference of the logits from transformers' own loop: {error:.1e}")
    return error


if __name__ == "__main__":
    main()
