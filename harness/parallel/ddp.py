"""`DistributedDataParallel` over a prepared model."""

from __future__ import annotations

import inspect

import torch
from torch.nn.parallel import DistributedDataParallel

from harness.parallel.share import DdpShare
from harness.parallel.team import Team

NO_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
"""Torch's word for sending rank 0's buffers round before every forward pass."""


def ddp_share(team: Team, forward: torch.nn.Module, device: torch.device, *, some_unused: bool) -> DdpShare:
    """``forward`` under DDP. ``some_unused``: not every parameter takes part in the loss, which DDP has to look
    for in each step. Buffers stay every rank's own: they are made alike and no model here changes them."""
    return DdpShare(
        team,
        DistributedDataParallel(
            forward,
            device_ids=[device.index or torch.cuda.current_device()] if device.type == "cuda" else None,
            find_unused_parameters=some_unused,
            **{NO_BUFFERS: False},
        ),
    )


def takes_part(model: torch.nn.Module, logits: torch.Tensor) -> set[str]:
    """Names of the parameters that ``logits`` were made of, by autograd's graph."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: set[str] = set()
    seen, pending = set(), [logits.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            found.add(names[id(variable)])
        pending += [following for following, _ in node.next_functions]
    return found
