"""Many tensors for many peers, in one message each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moekernels.parallel.mesh import Group

Parcels = Mapping[int, Sequence[Tensor]]  # peer -> flat tensors of one dtype, in order


def swap(
    out: Parcels, into: Parcels, group: Group, like: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Send `out`; a pair for each tensor of `into`, in peer order: itself, and what came for it.

    All ranks of the group call it together; what a rank sends to a peer the peer expects, tensor by
    tensor. `like` has the dtype of all, and the device of the message: some may lie on the host.
    """
    send, receive = (_sizes(parts, group.size) for parts in (out, into))
    flat, wanted = _in_peer_order(out), _in_peer_order(into)
    message = torch.cat([x.to(like.device) for x in flat]) if flat else like.new_empty(0)
    came = message.new_empty(sum(receive))
    dist.all_to_all_single(came, message, receive, send, group=group.process_group)
    return zip(wanted, came.split([x.numel() for x in wanted]))


def _in_peer_order(parts: Parcels) -> list[Tensor]:
    return [x for peer in sorted(parts) for x in parts[peer]]


def _sizes(parts: Parcels, peers: int) -> list[int]:
    return [sum(x.numel() for x in parts.get(peer, ())) for peer in range(peers)]
