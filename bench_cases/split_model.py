"""A model cut into encoder and head, and the heads. Imports torch: reached by `models` only."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


class SplitModel(nn.Module):
    """``logits = head(pool(encoder(tokens)))``.

    The encoder is registered under the library's own name (``transformer``, ``roberta``), so parameter and module names read as
    people know them. ``attention`` is its implementation (``sdpa``, ``eager``), None for a model without attention, as
    `models.prove` sees it. ``head_dtype`` is set by `harness.precision`: None runs the head as the encoder runs (under the
    caller's autocast, if any); a dtype switches autocast off around the head and casts its input, which is what makes an fp32
    head genuine.
    """

    def __init__(self, name: str, encoder: nn.Module, head: nn.Module, *, pooling: str | None) -> None:
        super().__init__()
        self.add_module(name, encoder)
        self.head = head
        self.encoder_name = name
        self.pooling = pooling
        self.attention: str | None = getattr(getattr(encoder, "config", None), "_attn_implementation", None)
        self.head_dtype: torch.dtype | None = None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, last_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``input_ids`` (B, L) int64; ``attention_mask`` None or a prebuilt 4-D bool mask;
        ``last_token`` (B,) int64. Returns logits (B, L, V), or (B, C) for classification."""
        encoded = getattr(self, self.encoder_name)(input_ids=input_ids, attention_mask=attention_mask)
        features = pool(encoded[0], self.pooling, last_token)
        if self.head_dtype is None:
            return self.head(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head_dtype))


def pool(hidden: torch.Tensor, pooling: str | None, last_token: torch.Tensor | None) -> torch.Tensor:
    """``hidden`` (B, L, D) -> (B, L, D) without pooling, else (B, D): the first token's vector or
    that of the last real one, whatever the padding after it holds."""
    if pooling is None:
        return hidden
    if pooling == "first":
        return hidden[:, 0]
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last_token]


class LibraryHead(nn.Module):
    """The head of a `transformers` language model: the model with its encoder passed through.

    Taking over the library's model cuts its encoder out; the caller keeps that.
    """

    def __init__(self, library_model: nn.Module) -> None:
        super().__init__()
        setattr(library_model, library_model.base_model_prefix, _PassThrough())
        self.model = library_model

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` (B, L, D) -> logits (B, L, V)."""
        return self.model(inputs_embeds=hidden).logits


class _PassThrough(nn.Module):
    """Stands where the encoder was and returns what it is given."""

    @property
    def decoder(self) -> _PassThrough:
        return self  # some causal models (OPT) call ``self.model.decoder``

    def forward(self, *_, inputs_embeds: torch.Tensor, **__) -> _PassedOutput:
        return _PassedOutput(last_hidden_state=inputs_embeds)


class _PassedOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Heads copy fields of their encoder's output (Mamba's ``cache_params``): what is not there is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class ClassificationHead(nn.Module):
    """(B, D) -> (B, C). ``deep`` is RoBERTa's (dense, tanh, projection with bias); otherwise
    GPT-2's (one projection without bias). With a ``prior`` of C numbers the projection has a bias that begins with it."""

    def __init__(self, width: int, outputs: int, *, deep: bool, std: float, prior: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width) if deep else None
        self.out_proj = nn.Linear(width, outputs, bias=deep or prior is not None)
        for layer in filter(None, (self.dense, self.out_proj)):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if prior is not None:
            with torch.no_grad():
                self.out_proj.bias.copy_(torch.tensor(prior))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.dense is not None:
            features = torch.tanh(self.dense(features))
        return self.out_proj(features)
