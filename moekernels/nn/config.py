"""What a model is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from moekernels.errors import UsageError

GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu", "swiglu_oai", "swiglu_clamped")
PLAIN_ACTIVATIONS = ("relu2", "silu", "gelu")
SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
SCOPES = ("microbatch", "sequence")


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: d_model -> (lift to d_in) -> d_ff -> d_in (-> lowered to d_model).

    The lift exists only where d_in differs from d_model.
    """

    d_model: int
    d_in: int
    d_ff: int
    gated: bool = True

    @property
    def lifted(self) -> bool:
        return self.d_in != self.d_model

    def parameters_count(self) -> int:
        ffn = (3 if self.gated else 2) * self.d_in * self.d_ff
        return ffn + (2 * self.d_model * self.d_in if self.lifted else 0)


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts, and what keeps the choice balanced.

    The load-balancing loss multiplies an expert's share of choices by its share of scores, so it
    depends on which tokens the shares are of. `balance_scope` "microbatch": those of a micro-batch,
    as most programs have it; another number of micro-batches, of data-parallel ranks, or another
    packing is then another loss. "sequence": those of each sequence, weighted by its tokens
    (DeepSeek-V3): the same loss whatever the split, and a stricter one, for it asks for balance
    within every sequence. All other losses and statistics are sums over tokens.
    """

    score: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"
    balance_coef: float = 0.01  # load-balancing loss
    balance_scope: str = "microbatch"
    z_coef: float = 0.0
    bias_update_rate: float = 0.0  # selection bias (aux-loss-free) where above 0


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert: ExpertSpec
    router: RouterConfig = field(default_factory=RouterConfig)
    activation: str = "swiglu"
    qk_norm: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02
    embedding_std: float = 0.0  # 0: init_std
    recompute_experts: bool = False  # keep not even the experts' pre-activations for backward

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_experts",
            "top_k",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"model: {name} is {getattr(self, name)}; at least 1 would do")
        if self.top_k > self.num_experts:
            raise UsageError(
                f"model: top_k {self.top_k} exceeds the {self.num_experts} experts; "
                f"top_k {self.num_experts} or less would do"
            )
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"model: num_kv_heads {self.num_kv_heads} does not divide "
                f"num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"model: head_dim is {self.head_dim}; rotary positions need it even")
        if self.expert.d_model != self.d_model:
            raise UsageError(
                f"model: expert.d_model is {self.expert.d_model}; d_model, {self.d_model}, would do"
            )
        kinds = GATED_ACTIVATIONS if self.expert.gated else PLAIN_ACTIVATIONS
        if self.activation not in kinds:
            gated = "gated" if self.expert.gated else "not gated"
            raise UsageError(
                f"model: activation {self.activation!r} but the experts are {gated}; "
                f"one of {', '.join(kinds)} would do"
            )
        router = self.router
        if router.score not in SCORES:
            raise UsageError(
                f"model: router score {router.score!r}; one of {', '.join(SCORES)} would do"
            )
        if router.balance_scope not in SCOPES:
            raise UsageError(
                f"model: balance_scope {router.balance_scope!r}; one of {', '.join(SCOPES)} would "
                f"do"
            )
        if self.num_experts % router.num_groups or not 1 <= router.groups_kept <= router.num_groups:
            raise UsageError(
                f"model: {router.groups_kept} of {router.num_groups} groups of experts cannot be "
                f"kept among {self.num_experts} experts"
            )
        eligible = self.num_experts // router.num_groups * router.groups_kept
        if self.top_k > eligible:
            raise UsageError(
                f"model: top_k {self.top_k} exceeds the {eligible} experts of the kept groups"
            )

    def parameters_count(self, *, active: bool = False) -> int:
        """All parameters, or only those that one token meets (top_k experts a layer)."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.d_model * self.head_dim * (heads + self.num_heads)
        if self.qk_norm:
            attention += 2 * self.head_dim
        used = self.top_k if active else self.num_experts
        layer = (
            attention
            + 2 * self.d_model  # the two norms
            + self.num_experts * self.d_model  # the router
            + used * self.expert.parameters_count()
        )
        vocabulary = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + vocabulary + self.d_model
