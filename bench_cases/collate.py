"""One collator for the four tasks: rows of stored documents become a `Batch`.

``multi_cls`` and ``single_cls`` read the same documents; only the targets are made differently, at the
moment a batch is made. torch is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from bench_cases.data.tokenized import TokenizedData

IGNORE = -100
MASKED_SHARE, MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Batch:
    """One (micro-)batch of B rows and L positions.

    ``input_ids`` (B, L) int64. ``targets``: clm and mlm (B, L) int64, -100 ignored, already shifted for clm; multi_cls (B, C)
    float32 multi-hot; single_cls (B,) int64. ``label_lists``: multi_cls also as (flat label indices int64, offsets (B + 1,)
    int64), else None. ``attention_mask``: None when nothing is padded and always for causal models (right padding is never seen
    by a real token), else bool (B, 1, 1, L), True where a key may be attended to. ``last_token`` (B,) int64: index of the last
    real token. ``lengths`` (B,) int64: real tokens of each row.

    ``tokens`` counts all positions, ``real_tokens`` the unpadded ones; ``n_targets`` is what the loss of the step is divided
    by: targets that count (clm, mlm), documents (single_cls, or multi_cls under ``label_sum``), documents times labels
    (multi_cls under ``mean``).
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    label_lists: tuple[torch.Tensor, torch.Tensor] | None
    attention_mask: torch.Tensor | None
    last_token: torch.Tensor
    lengths: torch.Tensor
    tokens: int
    real_tokens: int
    samples: int
    seq_len: int
    n_targets: int

    def micro_batches(self, size: int) -> list[Batch]:
        """The rows in order, ``size`` at a time; each part counts its own tokens and targets and keeps L."""
        if size >= self.samples:
            return [self]
        return [self._rows(start, min(start + size, self.samples)) for start in range(0, self.samples, size)]

    def _rows(self, start: int, stop: int) -> Batch:
        rows = slice(start, stop)
        targets, lists = self.targets[rows], self.label_lists
        if lists is not None:
            flat, offsets = lists
            lists = (flat[offsets[start] : offsets[stop]], offsets[start : stop + 1] - offsets[start])
        per_position = targets.ndim == 2 and not targets.is_floating_point()
        n_targets = int((targets != IGNORE).sum()) if per_position else self.n_targets // self.samples * (stop - start)
        return replace(
            self,
            input_ids=self.input_ids[rows],
            targets=targets,
            label_lists=lists,
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
            last_token=self.last_token[rows],
            lengths=self.lengths[rows],
            tokens=(stop - start) * self.seq_len,
            real_tokens=int(self.lengths[rows].sum()),
            samples=stop - start,
            n_targets=n_targets,
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on a device, through pinned memory (and so without a host sync) to CUDA."""
        import torch

        device = torch.device(device)
        if device.type == "cpu":
            return self

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if device.type == "cuda" and value.device.type == "cpu" and non_blocking:
                    value = value.pin_memory()
                return value.to(device, non_blocking=non_blocking)
            return tuple(map(move, value)) if isinstance(value, tuple) else value

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Rows:
    """What a collator is given. ``chosen``: (B, width) token ids of packed text, or (B,) document indices.
    ``random`` draws the masks of MLM, row after row."""

    data: TokenizedData
    seq_len: int
    causal: bool
    loss_reduction: str
    chosen: np.ndarray
    random: np.random.Generator


@dataclass(frozen=True)
class Collator:
    """``make`` turns rows into a batch. ``packed``: its rows are blocks of packed text, ``seq_len`` plus
    ``extra`` tokens wide, less the frame where ``framed`` says that ``make`` puts <s> and </s> around."""

    make: Callable[[Rows], Batch]
    packed: bool
    extra: int = 0
    framed: bool = False
    single_label: bool = False


def _packed_batch(input_ids: np.ndarray, targets: np.ndarray, n_targets: int) -> Batch:
    import torch

    samples, length = input_ids.shape
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        label_lists=None,
        attention_mask=None,
        last_token=torch.full((samples,), length - 1, dtype=torch.int64),
        lengths=torch.full((samples,), length, dtype=torch.int64),
        tokens=samples * length,
        real_tokens=samples * length,
        samples=samples,
        seq_len=length,
        n_targets=n_targets,
    )


def clm(rows: Rows) -> Batch:
    """Blocks of L + 1 tokens: the targets are the inputs shifted by one, so every position has one."""
    blocks = rows.chosen.astype(np.int64)
    return _packed_batch(np.ascontiguousarray(blocks[:, :-1]), np.ascontiguousarray(blocks[:, 1:]), blocks[:, 1:].size)


def mlm(rows: Rows) -> Batch:
    """``<s> block </s>`` with 15 % of the ordinary tokens as targets: 80 % of them <mask>, 10 % a random
    ordinary token, 10 % unchanged. Every row has a target."""
    special = rows.data.special
    blocks = rows.chosen.astype(np.int64)
    if special.bos is not None:
        blocks = np.pad(blocks, ((0, 0), (1, 1)))
        blocks[:, 0], blocks[:, -1] = special.bos, special.eos
    # Two numbers a position, drawn row by row: a row's masks do not depend on the rows around it.
    drawn = rows.random.random((*blocks.shape, 2), dtype=np.float32)
    choice = np.where(rows.data.is_special[blocks], np.float32(2), drawn[..., 0])
    chosen = choice < MASKED_SHARE
    empty = np.flatnonzero(~chosen.any(1))
    chosen[empty, choice[empty].argmin(1)] = choice[empty].min(1) < 1
    at = np.nonzero(chosen)
    action = drawn[at][:, 1]
    ordinary = rows.data.ordinary_ids
    spread = (action - MASK_TOKEN_SHARE) / RANDOM_TOKEN_SHARE * len(ordinary)
    random_ids = ordinary[np.clip(spread.astype(np.int64), 0, len(ordinary) - 1)]
    original = blocks[at]
    targets = np.full(blocks.shape, IGNORE, np.int64)
    targets[at] = original
    put = np.where(action < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE, random_ids, original)
    blocks[at] = np.where(action < MASK_TOKEN_SHARE, special.mask, put)
    return _packed_batch(blocks, targets, len(original))


def multi_cls(rows: Rows) -> Batch:
    """Multi-hot targets over all labels of the training split."""
    import torch

    data, documents = rows.data, rows.chosen
    starts = data.label_offsets[documents]
    counts = data.label_offsets[documents + 1] - starts
    offsets = np.concatenate([[0], np.cumsum(counts)])
    flat = data.labels[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)].astype(np.int64)
    targets = np.zeros((len(documents), data.n_labels), np.float32)
    targets[np.repeat(np.arange(len(documents)), counts), flat] = 1
    per_document = 1 if rows.loss_reduction == "label_sum" else data.n_labels
    lists = (torch.from_numpy(flat), torch.from_numpy(offsets))
    return _documents_batch(rows, torch.from_numpy(targets), lists, per_document * len(documents))


def single_cls(rows: Rows) -> Batch:
    """The class of each document's most frequent label."""
    import torch

    targets = rows.data.single_targets[rows.chosen].astype(np.int64)
    return _documents_batch(rows, torch.from_numpy(targets), None, len(targets))


def _documents_batch(rows: Rows, targets: torch.Tensor, lists, n_targets: int) -> Batch:
    """Documents cut to ``seq_len``, framed where the tokenizer frames, padded on the right to the longest."""
    import torch

    data, special = rows.data, rows.data.special
    framed = special.bos is not None
    starts = data.offsets[rows.chosen]
    body = np.minimum(data.offsets[rows.chosen + 1] - starts, rows.seq_len - 2 * framed)
    lengths = body + 2 * framed
    width = int(lengths.max())
    column = np.arange(width) - framed
    # Positions after a document's end read some other token, which the padding then overwrites.
    index = np.minimum(starts[:, None] + np.maximum(column, 0), len(data.tokens) - 1)
    input_ids = np.where(column < body[:, None], data.tokens[index], special.pad).astype(np.int64)
    if framed:
        input_ids[:, 0] = special.bos
        input_ids[np.arange(len(lengths)), lengths - 1] = special.eos
    padded = int(lengths.min()) < width
    mask = None
    if padded and not rows.causal:
        mask = torch.from_numpy((np.arange(width) < lengths[:, None])[:, None, None, :])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=targets,
        label_lists=lists,
        attention_mask=mask,
        last_token=torch.from_numpy(lengths - 1),
        lengths=torch.from_numpy(lengths),
        tokens=len(lengths) * width,
        real_tokens=int(lengths.sum()),
        samples=len(lengths),
        seq_len=width,
        n_targets=n_targets,
    )


# By the ``collate`` name of a task. A new task is one entry here and one in architectures.py.
COLLATORS: dict[str, Collator] = {
    "clm": Collator(clm, packed=True, extra=1),
    "mlm": Collator(mlm, packed=True, framed=True),
    "multi_cls": Collator(multi_cls, packed=False),
    "single_cls": Collator(single_cls, packed=False, single_label=True),
}
