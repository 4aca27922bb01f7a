"""A Megatron-Core layer's experts on our ops (megatron-core 0.16), all local experts in one call.

    from moekernels.integrations.megatron import experts_spec
    MoESubmodules(experts=experts_spec())  # beside Megatron's own router and token dispatcher

No part of it needs TransformerEngine or a GPU. Checkpoints are those of Megatron's own expert
classes, each of which loads the others'. `transformer_engine.patch_megatron` puts the dispatcher's
and the router's work on our kernels, too.

Legend: R rows in expert order, H hidden, F expert hidden of this rank, e local experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekernels import ops
from moekernels.errors import UsageError

try:
    from megatron.core import activations
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.fusions import fused_bias_geglu
    from megatron.core.tensor_parallel import (
        get_cuda_rng_tracker,
        get_expert_parallel_rng_tracker_name,
    )
    from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
except ImportError as error:
    raise ImportError(
        "moekernels.integrations.megatron needs megatron-core: pip install megatron-core"
    ) from error

__all__ = ["Experts", "experts_spec"]

_QUICK_GELU = (activations.quick_gelu, fused_bias_geglu.quick_gelu)


def experts_spec() -> ModuleSpec:
    """What `MoESubmodules(experts=...)` takes."""
    return ModuleSpec(module=Experts)


def _epilogue(config: Any) -> dict[str, Any]:
    """What `ops.experts` is told of a config's activation."""
    act, limit, offset = (
        config.activation_func,
        config.activation_func_clamp_value,
        config.glu_linear_offset,
    )
    if config.gated_linear_unit:
        plain = {F.silu: "swiglu", F.gelu: "geglu", F.relu: "reglu"}
        if offset == 0 and limit is None and act in plain:
            return {"activation": plain[act]}
        if offset == 0 and limit is not None and act is F.silu:
            return {"activation": "swiglu_clamped", "limit": limit}
        if offset == 1 and act in _QUICK_GELU:
            bound = torch.finfo(torch.float32).max if limit is None else limit
            return {"activation": "swiglu_oai", "alpha": 1.702, "limit": bound}
    else:
        plain = {activations.squared_relu: "relu2", F.silu: "silu", F.gelu: "gelu"}
        if act in plain:
            return {"activation": plain[act]}
    name = getattr(act, "__name__", act)
    raise UsageError(
        f"moekernels' Experts: no kernel for activation_func {name} with gated_linear_unit "
        f"{config.gated_linear_unit}, activation_func_clamp_value {limit}, glu_linear_offset "
        f"{offset}; use Megatron's own experts"
    )


def _refuse_what_is_not_here(config: Any) -> None:
    """UsageError for the first setting of a config that would be ignored."""
    offloaded = config.fine_grained_activation_offloading
    unknown = {
        "add_bias_linear": config.add_bias_linear,
        "fp8": config.fp8,
        "fp4": config.fp4,
        "moe_latent_size": config.moe_latent_size,
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "delay_wgrad_compute": config.delay_wgrad_compute,
        "use_te_activation_func": config.use_te_activation_func,
        "offload_modules": offloaded and {"expert_fc1", "moe_act"} & {*config.offload_modules},
    }
    for name, value in unknown.items():
        if value:
            raise UsageError(
                f"moekernels' Experts: {name} is {value!r}, which is not supported; unset it or "
                "use Megatron's own experts"
            )


class Experts(MegatronModule):
    """Megatron's expert interface: (rows [R, H], rows of each expert [e], probabilities [R]) ->
    (weighted rows [R, H], None).

    weight1 [e, 2F, H], gate before up (ungated [e, F, H]), and weight2 [e, H, F]; under expert
    tensor parallelism F is this rank's part and the rows are partial sums, which the dispatcher
    adds. The sum of a product is fp32. Nothing between the products is kept for the backward but
    the first one's result, so that recomputing "moe_act" is what happens anyway. Under
    `gradient_accumulation_fusion` gradients are added to fp32 main gradients by the kernels.

    Raises:
        UsageError: a configuration that asks for what is not here.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_what_is_not_here(config)
        self.epilogue = _epilogue(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        local = config.moe_ffn_hidden_size // self.tp_group.size()
        gated = 2 if config.gated_linear_unit else 1
        hidden = config.hidden_size
        cpu = config.use_cpu_initialization or not torch.cuda.is_available()
        place = {
            "device": "cpu" if cpu else torch.cuda.current_device(),
            "dtype": config.params_dtype,
        }
        self.weight1 = nn.Parameter(torch.empty(num_local_experts, gated * local, hidden, **place))
        self.weight2 = nn.Parameter(torch.empty(num_local_experts, hidden, local, **place))
        if config.perform_initialization:
            self._initialize(cpu)
        for weight, dim in ((self.weight1, 1), (self.weight2, 2)):
            weight.allreduce = config.expert_model_parallel_size <= 1  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = dim  # type: ignore[attr-defined]
            weight.partition_stride = gated if dim == 1 else 1  # type: ignore[attr-defined]
        # Checkpoints of Megatron's classes hold an empty state for each linear layer.
        self.register_load_state_dict_post_hook(_forget_extra_states)

    def _initialize(self, cpu: bool) -> None:
        """Expert by expert, as Megatron's SequentialMLP: the same seed gives the same weights."""
        config = self.config
        for w1, w2 in zip(self.weight1.data, self.weight2.data):
            for w, dim, stride, init in (
                (w1, 0, 2 if config.gated_linear_unit else 1, config.init_method),
                (w2, 1, 1, config.output_layer_init_method),
            ):
                if not cpu:
                    with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                        init(w)
                    continue
                size = [*w.shape]
                size[dim] *= self.tp_group.size()
                _initialize_affine_weight_cpu(
                    w,
                    *size,
                    w.shape[dim],
                    dim,
                    init,
                    stride,
                    params_dtype=config.params_dtype,
                    rank=self.tp_group.rank(),
                    world_size=self.tp_group.size(),
                    skip_set_tensor_parallel_attributes=True,
                )

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """See the class. tokens_per_expert [e] may lie on either device."""
        x = permuted_local_hidden_states
        counts = tokens_per_expert.to(x.device, torch.int64, non_blocking=True)
        w1, w2 = self._weight(self.weight1), self._weight(self.weight2)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        return ops.experts(x, permuted_probs, w1, w2, offsets, **self.epilogue), None

    def _weight(self, weight: nn.Parameter) -> Tensor:
        main_grad = getattr(weight, "main_grad", None)
        if not self.config.gradient_accumulation_fusion or main_grad is None:
            return weight.view_as(weight)  # has no main_grad: its gradient is returned
        if main_grad.dtype != torch.float32:
            return weight.view_as(weight)
        w: Tensor = _Accumulated.apply(weight)
        if w.requires_grad:
            w.main_grad = main_grad  # type: ignore[attr-defined]
        return w

    def backward_dw(self) -> None:
        """Nothing is left to compute: `delay_wgrad_compute` is refused."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The tensors of a distributed checkpoint, by the keys of Megatron's own expert classes.

        Raises:
            UsageError: metadata that asks for a key per expert (`singleton_local_shards`).
        """
        if (metadata or {}).get("singleton_local_shards"):
            raise UsageError(
                "moekernels' Experts: checkpoints of singleton_local_shards are not "
                "supported; unset it"
            )
        axis = len(sharded_offsets)
        ep = (axis, self.ep_group.rank(), self.ep_group.size())
        tp, parts = self.tp_group.rank(), self.tp_group.size()
        replica = (0, 0, self.dp_group.rank())

        def shard(key: str, t: Tensor, dim: int, place: int, of: int, replica_id: Any) -> Any:
            return ShardedTensor.from_rank_offsets(
                key,
                t.contiguous(),
                *sharded_offsets,
                ep,
                (axis + dim, place, of),
                replica_id=replica_id,
                prepend_axis_num=axis,
            )

        def halves(key: str, t: Tensor, replica_id: Any, flattened_range: Any) -> list:
            places = (tp, parts + tp)
            return [
                shard(key, half, 1, place, 2 * parts, replica_id)
                for half, place in zip(t.detach().chunk(2, 1), places)
            ]

        first, second = (f"{prefix}experts.linear_fc{i}.weight" for i in (1, 2))
        if self.config.gated_linear_unit:
            w1 = ShardedTensorFactory(
                first, self.weight1, halves, lambda found: torch.cat(found, 1), replica
            )
        else:
            w1 = shard(first, self.weight1.detach(), 1, tp, parts, replica)
        found = {
            f"{prefix}weight1": w1,
            f"{prefix}weight2": shard(second, self.weight2.detach(), 2, tp, parts, replica),
        }
        experts = self.num_local_experts * self.ep_group.size()
        for expert in range(self.num_local_experts):
            place = self.ep_group.rank() * self.num_local_experts + expert
            for layer in ("linear_fc1", "linear_fc2"):
                found[f"{prefix}expert{place}.{layer}._extra_state"] = (
                    make_sharded_object_for_checkpoint(
                        None,
                        f"{prefix}experts.{layer}._extra_state",
                        (*sharded_offsets, (axis, place, experts)),
                        (0, tp, self.dp_group.rank()),
                    )
                )
        return found


def _forget_extra_states(module: nn.Module, incompatible: Any) -> None:
    unexpected = incompatible.unexpected_keys
    unexpected[:] = [key for key in unexpected if "_extra_state" not in key]


class _Accumulated(torch.autograd.Function):
    """A weight whose gradient the kernels have added to its main gradient. Megatron's data
    parallelism wants some gradient nevertheless, and the mark that it is not to be added."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor | None) -> Tensor:
        if dweight is not None:
            return dweight
        ctx.weight.grad_added_to_main_grad = True
        return ctx.weight.new_zeros(1).expand_as(ctx.weight)
