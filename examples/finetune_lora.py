"""LoRA fine-tuning of a Qwen3-MoE by transformers' Trainer, the experts on these kernels; needs
transformers 5.10 or newer, peft and accelerate.

    python examples/finetune_lora.py

A tiny random model here; `from_pretrained(path, experts_implementation="moekernels")` is the same
for a real one. The adapters lie on the attention and on the stacked weights of all experts; the
head is trained as it is.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments

import moekernels.integrations  # noqa: F401, makes the implementation known

TEXT = "Each token goes to a few of many experts; each expert sees few of many tokens. " * 40


def model() -> torch.nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, experts_implementation="moekernels")
    lora = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return get_peft_model(base, lora)


def main(steps: int = 20) -> list[float]:
    tokens = torch.tensor(list(TEXT.encode()))
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    data = [{"input_ids": row, "labels": row} for row in rows]
    tuned = model()
    tuned.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=tuned, args=arguments, train_dataset=data)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token")
    return losses


if __name__ == "__main__":
    main()
