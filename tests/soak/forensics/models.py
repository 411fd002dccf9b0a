"""The small models that injection trials train: four library architectures and one with branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, LENGTH, ROWS = 48, 16, 10, 4
LIBRARY = ("gpt2", "roberta", "opt", "bert")
KINDS = (*LIBRARY, "branches")


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
