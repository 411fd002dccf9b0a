"""A stored state as another implementation of AdamW keeps it."""

from __future__ import annotations

from dataclasses import replace

import torch

from instrument.replay.snapshot import NamedState

MOMENTS = {"state1": "exp_avg", "state2": "exp_avg_sq"}
"""bitsandbytes' names and torch's."""
BLOCK = 256
"""Elements that share a scale in bitsandbytes' blockwise optimizers."""


def without_options(state: NamedState) -> NamedState:
    """The state without what a configuration decides (epsilon and the like), so that a changed one keeps its own."""
    return replace(state, groups=[{} for _ in state.groups])


def with_fp32_moments(state: NamedState) -> NamedState:
    """Both moments in fp32 under torch's names: 16-bit ones widened, 8-bit ones decoded."""
    tensors = {name: t for name, t in state.tensors.items() if not name.startswith(("optimizer/", "random/optimizer/"))}
    devices: dict[str, str] = {}
    for name, device in state.devices.items():
        owner, _, key = name.rpartition("/")
        key = MOMENTS.get(key, key)
        if key in ("exp_avg", "exp_avg_sq", "step") and name in state.tensors:
            tensors[f"{owner}/{key}"], devices[f"{owner}/{key}"] = _decoded(state, name).float(), device
    states = {}
    for parameter, plain in state.states.items():
        states[parameter] = {}
        if "step" in plain:  # bitsandbytes counts on the host
            name = f"optimizer/{parameter}/step"
            tensors[name], devices[name] = torch.tensor(float(plain["step"])), "cpu"
    return replace(state, tensors=tensors, devices=devices, aliases={}, states=states)


def _decoded(state: NamedState, name: str) -> torch.Tensor:
    """A moment's values; 8-bit codes are looked up and multiplied by their block's scale."""
    value = state.tensors[name]
    if value.dtype != torch.uint8:
        return value
    number = name[-1]
    owner = name.rpartition("/")[0]

    def other(key: str) -> torch.Tensor:
        full = f"{owner}/{key}{number}"
        return state.tensors[state.aliases.get(full, full)]

    scales = other("absmax").repeat_interleave(BLOCK)[: value.numel()]
    return (other("qmap")[value.flatten().long()] * scales).view(value.shape)
