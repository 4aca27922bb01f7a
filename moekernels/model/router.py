"""The router: a product a token, the choice of top_k experts, and what keeps it balanced."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.model.spec import MOST, Owed, Part, Place, Shape, Width, Work, key, norm_kept

SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
SCOPES = ("microbatch", "sequence")


@dataclass(frozen=True)
class RouterSpec(Width):
    """How tokens choose experts, and what keeps the choice balanced.

    The load-balancing loss multiplies an expert's share of choices by its share of scores, so it
    depends on which tokens the shares are of. `balance_scope` "microbatch": those of a microbatch,
    as most programs have it; another number of microbatches, of data-parallel ranks, or another
    packing is then another loss. "sequence": those of each sequence, weighted by its tokens
    (DeepSeek-V3): the same loss whatever the split, and a stricter one, for it asks for balance
    within every sequence. All other losses and statistics are sums over tokens.
    """

    num_experts: int = key(64, "experts of a layer", low=1, flag="experts", high=MOST)
    top_k: int = key(2, "experts that a token visits", low=1, high=1024)
    score: str = key("softmax", "how router logits become scores", choices=SCORES)
    renormalize: bool = key(True, "weights of a token's experts sum to one")
    router_bias: bool = key(False, "a learned bias of the router logits")
    scale: float = key(1.0, "factor on the routing weights", above=0, high=1e6)
    num_groups: int = key(
        1, "groups of experts (group-limited routing)", low=1, flag="expert-groups", high=MOST
    )
    groups_kept: int = key(1, "groups that a token may choose from", low=1, high=MOST)
    group_score: str = key(
        "max", "score of a group: of its best, or of its two best", choices=("max", "sum2")
    )
    balance_coef: float = key(0.01, "coefficient of the load-balancing loss", low=0)
    balance_scope: str = key(
        "microbatch",
        "tokens that the load-balancing loss compares: of a microbatch, which depends on how the "
        "step is split, or of each sequence, which does not",
        choices=SCOPES,
    )
    z_coef: float = key(0.001, "coefficient of the router's z-loss", low=0)
    bias_update_rate: float = key(
        0.0, "step of the selection bias (aux-loss-free balancing); 0: none", low=0, high=1000
    )


def shapes(spec: RouterSpec) -> dict[str, Shape]:
    weight = {"weight": (spec.num_experts, spec.d_model)}
    return weight | ({"bias": (spec.num_experts,)} if spec.router_bias else {})


def parameters(spec: RouterSpec, at: Place, active: bool = False) -> int:
    """Without sequence parallel the ranks of a tensor-parallel group share the columns."""
    split = 1 if at.sequence_parallel else at.layout.tp
    return spec.num_experts // split * (spec.d_model + int(spec.router_bias))


def kept(spec: RouterSpec, at: Place) -> float:
    """The gate computes in fp32 at least: below that its input and weight are copies."""
    size = norm_kept(spec, at) + at.residual * spec.d_model * at.wide
    size += at.own * spec.num_experts * at.wide + at.own * spec.top_k * 4
    if at.width < at.wide:
        size += parameters(spec, at) * at.wide
    return size


def owed(spec: RouterSpec, at: Place) -> Owed:
    split = 1 if at.sequence_parallel else at.layout.tp
    gradient = at.residual * spec.num_experts / split * at.wide
    return Owed(at.residual * spec.d_model * at.wide, gradient)


def work(spec: RouterSpec, at: Place) -> Work:
    tp = at.layout.tp
    return Work(
        wide=2.0 * spec.d_model * spec.num_experts / tp,
        traffic=(10 * spec.d_model + 2 * spec.num_experts) * at.width / tp,
    )


PART = Part(
    parameters, kept, work, shapes, copies=lambda layout: (layout.stage_ranks, 1), owed=owed
)
