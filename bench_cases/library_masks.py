"""Keeps `transformers` from looking for, and from building, attention masks that would hide nothing.

A row of ours is one sequence, and a batch without a mask is a batch without padding (`collate.Batch`). The library
cannot know that. Its causal models look at the positions for several sequences packed into a row, and in every eager
forward pass read the answer back: a wait for the device in every micro-batch. Under `torch.compile`, where nothing can
be read, they attend through a mask of (1, 1, L, L) instead of ``is_causal`` (transformers 5.23 for those positions,
5.17 always, and its encoders as well): that costs twice the attention and another kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def leave_out_idle_masks() -> None:
    """Once a process, before a model of the library runs."""
    from transformers import AttentionMaskInterface, masking_utils

    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    AttentionMaskInterface.register("sdpa", mask_if_it_hides)


def mask_if_it_hides(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> torch.Tensor | None:
    """The library's own `sdpa_mask`, but None at once where it may be left out and nothing is padded or out of reach.

    For None a causal model's attention runs with ``is_causal``, an encoder's over everything. The arguments are the
    library's; a prebuilt mask does not come here.
    """
    from transformers.masking_utils import sdpa_mask

    may_be_left_out = allow_is_causal_skip or allow_is_bidirectional_skip
    if may_be_left_out and attention_mask is None and local_size is None and q_length == kv_length:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **options,
    )
