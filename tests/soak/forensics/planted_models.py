"""The small models that injection trials train (four library architectures and one with branches), and the faults that are
planted in one of their modules, in the optimizer or in unscaling, at one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, LENGTH, ROWS = 48, 16, 10, 4
LIBRARY = ("gpt2", "roberta", "opt", "bert")
MODELS = (*LIBRARY, "branches")


@dataclass(frozen=True)
class Subject:
    """A model and how one micro-batch of it is run: ``loss_of(model, step, microbatch)`` gives the loss."""

    model: nn.Module
    loss_of: object


class Branches(nn.Module):
    """Two branches that meet, a module called twice, a checkpointed part, tied and frozen weights, a
    keyword input, and an output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.left = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(approximate="tanh"))
        self.right = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)])
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.deep = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, *, gate: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, L) token ids and a gate (L, 1) -> ``{"logits": (B, L, V), "hidden": (B, L, D)}``."""
        x = self.embed(input_ids)
        right = self.right[1](self.right[0](x))
        future = torch.ones(LENGTH, LENGTH, device=x.device).tril() == 0
        scores = (x @ x.transpose(1, 2)).masked_fill(future, -torch.inf)  # a mask in health
        x = self.left(torch.softmax(scores, -1) @ x) * gate + right
        x = self.twice(torch.tanh(self.twice(x))) + self.frozen(x)
        x = x + checkpoint(self.deep, x, use_reentrant=False)
        return {"logits": self.out(x), "hidden": x}


def build(kind: str, dtype: torch.dtype, attention: str, seed: int, device: str = "cpu") -> Subject:
    """A seeded model in ``dtype`` with deterministic batches by step and micro-batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (Branches() if kind == "branches" else _library(kind, attention)).to(device, dtype).train()

    def loss_of(model: nn.Module, step: int, microbatch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 7919 + step * 31 + microbatch)
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator).to(device)
        if kind == "branches":
            gate = torch.linspace(0, 1, LENGTH, dtype=dtype, device=device)[:, None]
            logits = model(ids, gate=gate)["logits"]
        else:
            mask = torch.ones(ROWS, LENGTH, dtype=torch.int64, device=device)
            mask[0, LENGTH - 3 :] = 0  # padding: the library's masks hold -inf or the dtype's minimum
            logits = model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())

    return Subject(model, loss_of)


def make_gelu_overflow(model: nn.Module) -> None:
    """Scale GPT-2's first MLP so that ``gelu_new``'s cube overflows fp16 and ``tanh`` maps it to 1: infinities
    inside, a right and finite output, and finite gradients."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("h.0.mlp.c_fc"):
                module.weight.zero_()
                module.bias.fill_(60.0)


def _library(kind: str, attention: str) -> nn.Module:
    import transformers as t

    common = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "use_cache": False}
    bert = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind == "gpt2":
        config, auto = (
            t.GPT2Config(
                n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common
            ),
            t.AutoModelForCausalLM,
        )
    elif kind == "opt":
        config, auto = (
            t.OPTConfig(
                hidden_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=2 * WIDTH,
                word_embed_proj_dim=WIDTH,
                max_position_embeddings=32,
                dropout=0.0,
                layerdrop=0.0,
                **common,
            ),
            t.AutoModelForCausalLM,
        )
    else:
        config, auto = (t.RobertaConfig if kind == "roberta" else t.BertConfig)(**bert, **common), t.AutoModelForMaskedLM
    return auto.from_config(config, attn_implementation=attention)


PLANTS = (
    "forward_nan",
    "forward_inf",
    "overflow_weight",
    "backward_nan",
    "backward_inf",
    "state_nan",
    "state_inf",
    "underflow_then_divide",
    "unscale",
)


@dataclass
class Planted:
    """What the plant does in a step, and where its fault should be found. ``module`` None: outside of modules; ``op``: the
    one that the planted line calls."""

    phase: str
    module: str | None
    op: str | None = None
    begin: Callable[[int], None] = lambda step: None
    before_update: Callable[[int], None] = lambda step: None
    unscale_by: Callable[[int], float] = lambda step: 1.0


def plant(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, module: str, at: int) -> Planted:
    """Arm ``kind`` in ``module`` for step ``at``. It acts again whenever that step is run again."""
    where = dict(model.named_modules(remove_duplicate=True))[module]
    if kind.startswith("forward"):
        return _in_forward(where, module, at, float(kind.rpartition("_")[2]))
    if kind.startswith("backward"):
        return _in_backward(where, module, at, float(kind.rpartition("_")[2]))
    if kind == "overflow_weight":
        return _overflow(where, module, at)
    parameter = next(p for p in where.parameters(recurse=False) if p.requires_grad)
    if kind == "unscale":
        return Planted(
            "unscale", module, "aten.mul_", unscale_by=lambda step: math.inf if step == at else 1.0
        )  # 1 / a scale of 0
    if kind == "underflow_then_divide":
        return _underflow(parameter, optimizer, module, at)
    return _in_state(parameter, optimizer, module, at, float(kind.rpartition("_")[2]))


WRITES_ONE = "aten.copy_"
"""What ``tensor[i, j] = number`` calls."""


def _spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with one element replaced."""
    spoiled = tensor.clone()
    spoiled[tuple(size // 2 for size in tensor.shape)] = value
    return spoiled


def _on_first_tensor(output, change):
    """``output`` with its first floating-point tensor changed; nested outputs keep their form."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, dict):
        key = next(iter(output))
        output[key] = _on_first_tensor(output[key], change)
        return output
    return type(output)([_on_first_tensor(output[0], change), *output[1:]])


def _wrap(where: nn.Module, active: Callable[[], bool], change) -> None:
    """Change the module's own result, underneath every hook, as a defect in its code would."""
    forward = where.forward

    def wrapped(*args, **kwargs):
        out = forward(*args, **kwargs)
        return _on_first_tensor(out, change) if active() else out

    where.forward = wrapped


def _in_forward(where: nn.Module, name: str, at: int, value: float) -> Planted:
    now = {"step": 0}
    _wrap(where, lambda: now["step"] == at, lambda tensor: _spoiled(tensor, value))
    return Planted("forward", name, WRITES_ONE, begin=lambda step: now.update(step=step))


class _SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _spoiled(gradient, ctx.value), None


def _in_backward(where: nn.Module, name: str, at: int, value: float) -> Planted:
    now = {"step": 0}
    _wrap(where, lambda: now["step"] == at and torch.is_grad_enabled(), lambda tensor: _SpoilGradient.apply(tensor, value))
    return Planted("backward", name, WRITES_ONE, begin=lambda step: now.update(step=step))


def _overflow(where: nn.Module, name: str, at: int) -> Planted:
    """At the step, the weight grows so large that products with it overflow its dtype."""
    weight = where.weight

    def grow(step: int) -> None:
        if step == at:
            with torch.no_grad():
                weight.copy_(weight.sign() * torch.finfo(weight.dtype).max * 0.9)

    biased = getattr(where, "bias", None) is not None
    return Planted("forward", name, "aten.addmm" if biased else "aten.mm", begin=grow)


def _in_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, name: str, at: int, value: float) -> Planted:
    def spoil(step: int) -> None:
        state = optimizer.state.get(parameter, {})
        if step == at and "exp_avg" in state:
            state["exp_avg"].view(-1)[0] = value

    return Planted("optimizer", name, WRITES_ONE, before_update=spoil)


def _underflow(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, name: str, at: int) -> Planted:
    """The gradient of one parameter shrinks until its square is zero, and its epsilon is too small to count."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    group["params"] = [p for p in group["params"] if p is not parameter]
    optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": [parameter]})
    mine = optimizer.param_groups[-1]
    eps = mine["eps"]
    small = torch.finfo(parameter.dtype).tiny ** 0.75

    def shrink(step: int) -> None:
        mine["eps"] = eps if step != at else torch.finfo(parameter.dtype).smallest_normal * 1e-30
        if step == at:
            with torch.no_grad():
                parameter.grad.copy_(torch.full_like(parameter.grad, small))
                state = optimizer.state.get(parameter, {})
                if "exp_avg_sq" in state:
                    state["exp_avg_sq"].zero_()

    return Planted("optimizer", name, "aten._foreach_addcdiv_", before_update=shrink)
