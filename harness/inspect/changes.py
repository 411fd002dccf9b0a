"""The changes that a counterfactual can make: which configuration each applies to, which cause each confirms, and the
stored state as a changed AdamW keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch

from bench_cases import DtypeConfig
from bench_cases.lookup import UnknownId
from harness.settings import SettingsError
from instrument.replay.snapshot import NamedState
from instrument.results.schemas import FirstNonfinite

EPS = 1e-4
NAMED = ("fp32_head", "eps", "fp32_states", "scaler")
ALLOWED = f"{', '.join(NAMED)}, fp32:MODULE, all"
HEAD = "head"


@dataclass(frozen=True)
class Change:
    """One change of a configuration. ``config`` has it in it; ``module`` is computed in fp32 besides, and
    hands on fp32 where ``stays_fp32``. ``why_not`` says why the change cannot be tried."""

    name: str
    config: DtypeConfig
    module: str | None = None
    stays_fp32: bool = False
    why_not: str | None = None


def refuse_unknown(names: list[str]) -> None:
    """Raise `SettingsError` for a name that is no change, before anything is loaded."""
    for name in names:
        if name not in (*NAMED, "all") and not (name.startswith("fp32:") and name != "fp32:"):
            raise SettingsError(f"--try {name!r} is no change; allowed: {ALLOWED}")


def changes_of(names: list[str], config: DtypeConfig, model: torch.nn.Module, first: FirstNonfinite) -> list[Change]:
    """The changes that were asked for, ``all`` spelled out; raises `SettingsError` for one that does not exist
    and `UnknownId` for a module that does not."""
    refuse_unknown(names)
    known = first.module and first.module in dict(model.named_modules()) and first.phase in ("forward", "backward")
    culprit = [f"fp32:{first.module}"] if known else []
    wanted: list[str] = []
    for name in names:
        wanted += [*NAMED, *culprit] if name == "all" else [name]
    return [change_of(name, config, model) for name in dict.fromkeys(wanted)]


def change_of(name: str, config: DtypeConfig, model: torch.nn.Module) -> Change:
    """One change by its name."""
    if name.startswith("fp32:"):
        module = name.removeprefix("fp32:")
        _require_module(module, model)
        return _module_in_fp32(name, module, config)
    return {"fp32_head": _fp32_head, "eps": _eps, "fp32_states": _fp32_states, "scaler": _scaler}[name](config)


def confirms(change: str, first: FirstNonfinite) -> str | None:
    """The cause that is confirmed when ``change`` makes the run survive; None when its survival has another reason.

    ============================================ ==========================================
    what went wrong                              what confirms it
    ============================================ ==========================================
    underflow_then_divide in the optimizer       eps, fp32_states
    overflow or invalid in the optimizer         fp32_states
    anything in the forward pass of module M     fp32:M (or of a module that M is in)
    the same, M in the head, or in the loss      fp32_head
    anything in the backward pass of module M    fp32:M, fp32_head where M is in the head
    overflow in the backward pass                scaler as well
    unscale, clip; from_input                    nothing here
    ============================================ ==========================================
    """
    cause, phase, module = first.cause, first.phase, first.module or ""
    if cause not in ("overflow", "underflow_then_divide", "invalid"):
        return None
    if phase == "optimizer":
        removes = {"fp32_states"} | ({"eps"} if cause == "underflow_then_divide" else set())
        return cause if change in removes else None
    if phase not in ("forward", "loss", "backward"):
        return None
    if change == "fp32_head":
        return cause if phase == "loss" or is_inside(module, HEAD) else None
    if change == "scaler":
        return cause if (phase, cause) == ("backward", "overflow") else None
    return cause if change.startswith("fp32:") and module and is_inside(module, change.removeprefix("fp32:")) else None


def is_inside(module: str, of: str) -> bool:
    """Whether ``module`` is ``of`` or a part of it."""
    return module == of or module.startswith(f"{of}.")


def enclosing_modules(model: torch.nn.Module, module: str | None) -> list[str]:
    """The modules around a module, from the inside out, without the lists that only hold others."""
    parts = (module or "").split(".")
    around = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    return [name for name in around if type(model.get_submodule(name)).forward is not torch.nn.Module.forward]


def _require_module(name: str, model: torch.nn.Module) -> None:
    """Raise `UnknownId` with the nearest names unless the model has such a module."""
    names = [n for n, _ in model.named_modules() if n]
    if name not in names:
        near = get_close_matches(name, names, n=4, cutoff=0.4) or [n for n, _ in model.named_children()]
        raise UnknownId(f"--try 'fp32:{name}': the model has no such module; near: {', '.join(near)}")


def _fp32_head(config: DtypeConfig) -> Change:
    if config.head == "fp32":
        return Change("fp32_head", config, why_not="the head runs in fp32 already")
    if config.weights == "fp32":
        return Change("fp32_head", replace(config, head="fp32"))
    # 16-bit weights: the head computes with fp32 copies of them, and the loss of its fp32 logits is fp32.
    return Change("fp32_head", config, module=HEAD, stays_fp32=True)


def _eps(config: DtypeConfig) -> Change:
    why = None
    if config.eps >= EPS:
        why = f"epsilon is {config.eps:g} already"
    elif config.optimizer != "8bit" and (config.weights != "fp16" or config.optimizer == "fp32_states"):
        states = "fp32" if config.optimizer == "fp32_states" else config.weights
        why = f"epsilon {config.eps:g} is not lost beside {states} optimizer states"
    return Change("eps", config if why else replace(config, eps=EPS), why_not=why)


def _fp32_states(config: DtypeConfig) -> Change:
    if config.optimizer == "8bit":
        return Change("fp32_states", replace(config, optimizer="foreach"))
    if config.weights == "fp32" or config.optimizer == "fp32_states":
        return Change("fp32_states", config, why_not="the optimizer's states are fp32 already")
    return Change("fp32_states", replace(config, optimizer="fp32_states"))


def _scaler(config: DtypeConfig) -> Change:
    why = None
    if config.scaler:
        why = "the loss is scaled already"
    elif config.weights != "fp32":
        why = f"GradScaler needs fp32 weights: it refuses fp16 gradients (pytorch#74739), and these are {config.weights}"
    elif config.compute != "fp16":
        why = f"{config.compute} has the range of fp32: there is nothing to scale into it"
    return Change("scaler", config if why else replace(config, scaler=True), why_not=why)


def _module_in_fp32(name: str, module: str, config: DtypeConfig) -> Change:
    already = config.compute == "fp32" or (config.head == "fp32" and is_inside(module, HEAD))
    why_not = f"{module} runs in fp32 already" if already else None
    return Change(name, config, module=module, stays_fp32=config.weights == "fp32", why_not=why_not)


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
    owner, number = name.rpartition("/")[0], name[-1]
    names = (f"{owner}/{key}{number}" for key in ("absmax", "qmap"))
    absmax, qmap = (state.tensors[state.aliases.get(full, full)] for full in names)
    scales = absmax.repeat_interleave(BLOCK)[: value.numel()]
    return (qmap[value.flatten().long()] * scales).view(value.shape)
