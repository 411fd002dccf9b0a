"""The batches of a run: a pure function of (data, task, seed, step), so that a run resumes by its step number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from bench_cases.collate import COLLATORS, Batch, Rows
from bench_cases.data.documents import DataError
from bench_cases.data.tokenized import TokenizedData

# Streams of random numbers that must not meet: keys of the generators.
_ORDER, _MASKS, _EVALUATION = 1, 2, 3
_BUCKET_WINDOW = 50  # batches that are sorted by length together


class Batches:
    """Training batches by step number and evaluation batches in a fixed order.

    A row is a block of packed text (clm, mlm; documents end in an end-of-text token, the rest of the
    last block is dropped) or a document (classification). Each epoch visits every training row once, in
    an order drawn from (seed, epoch); a batch that reaches over the end of an epoch takes the rest from
    the next one, so no batch is short. MLM masks are drawn from (seed, step), row by row of the global
    batch. ``causal`` says whether the model can see padding at all (see `Batch.attention_mask`).
    """

    def __init__(
        self,
        data: TokenizedData,
        task: str,
        *,
        causal: bool,
        seq_len: int,
        batch_size: int,
        seed: int,
        loss_reduction: str = "mean",
        bucket_by_length: bool = False,
    ) -> None:
        if task not in COLLATORS:
            raise DataError(f"no collator {task!r}; there are {', '.join(COLLATORS)}")
        self.data, self.task, self.causal, self.seed = data, task, causal, seed
        self.seq_len, self.batch_size, self.loss_reduction = seq_len, batch_size, loss_reduction
        self.collator = COLLATORS[task]
        self._train = self._all_rows("train")
        self._validation = self._all_rows("validation")
        self.bucket_by_length = bucket_by_length and not self.collator.packed
        self._orders: dict[int, np.ndarray] = {}

    def step(self, step: int) -> Batch:
        """The batch of step ``step`` (from 1). Any order of calls gives the same batches."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, _MASKS, step))))
        return self._make(self._train, self._order(step, step), random)

    def longest(self) -> Batch:
        """A batch of the longest training rows, each again where there are too few: what takes the most memory."""
        rows = np.arange(len(self._train))
        if not self.collator.packed:
            rows = np.argsort(-self._lengths(self._train), kind="stable")
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, _MASKS, 0))))
        return self._make(self._train, np.resize(rows, self.batch_size), random)

    def evaluation(self, documents: int | None, batch_size: int) -> Iterator[Batch]:
        """The first ``documents`` validation rows (all when None) in stored order, the last batch maybe short.

        Rows and MLM masks depend on neither the seed nor ``batch_size``.
        """
        source = self._validation
        count = len(source) if documents is None else min(documents, len(source))
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((_EVALUATION,))))
        for start in range(0, count, batch_size):
            yield self._make(source, np.arange(start, min(start + batch_size, count)), random)

    def majority_answer(self) -> np.ndarray | None:
        """(outputs,) bool: the constant answer that the training rows alone give. Single-label: the most frequent class.
        Multi-label: the k most frequent labels, with the k of the best micro-F1 on those rows. None for language models."""
        data, documents = self.data, self._train
        if self.collator.packed:
            return None
        if self.collator.single_label:
            uses = np.bincount(data.single_targets[documents], minlength=data.n_classes)
            return np.arange(data.n_classes) == uses.argmax()
        uses = data.label_uses
        order = np.argsort(-uses, kind="stable")
        hits = np.cumsum(uses[order])
        f1 = 2 * hits / (np.arange(1, len(uses) + 1) * len(documents) + hits[-1])
        answer = np.zeros(len(uses), bool)
        answer[order[: int(f1.argmax()) + 1]] = True
        return answer

    def sha256(self, max_steps: int) -> str:
        """Pins every batch of a run of ``max_steps`` steps: the data, the rows of each step, and all
        tensors of the first and the last step (which show a change of the collator)."""
        digest = hashlib.sha256(self.data.fingerprint.encode())
        digest.update(f"{self.task} {self.seq_len} {self.batch_size} {self.loss_reduction} {max_steps}".encode())
        digest.update(np.ascontiguousarray(self._order(1, max_steps), np.int64).data)
        for step in (1, max_steps):
            batch = self.step(step)
            for tensor in (batch.input_ids, batch.targets, batch.lengths):
                array = np.ascontiguousarray(tensor.numpy())
                digest.update(f"{array.dtype.str} {array.shape}".encode())
                digest.update(array.data)
        return digest.hexdigest()

    def _make(self, source: np.ndarray, rows: np.ndarray, random: np.random.Generator) -> Batch:
        return self.collator.make(Rows(self.data, self.seq_len, self.causal, self.loss_reduction, source[rows], random))

    def _order(self, first: int, last: int) -> np.ndarray:
        """Training rows of steps ``first`` to ``last``, flat int64."""
        n = len(self._train)
        start, stop = (first - 1) * self.batch_size, last * self.batch_size
        parts = []
        for epoch in range(start // n, (stop - 1) // n + 1):
            order = self._epoch(epoch)
            parts.append(order[max(start - epoch * n, 0) : min(stop - epoch * n, n)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            random = np.random.default_rng((self.seed, _ORDER, epoch))
            order = random.permutation(len(self._train))
            if self.bucket_by_length:
                order = self._bucketed(order, epoch, random)
            while len(self._orders) >= 4:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = order
        return self._orders[epoch]

    def _bucketed(self, order: np.ndarray, epoch: int, random: np.random.Generator) -> np.ndarray:
        """Rows of like length in one batch: sorted within windows, then whole batches shuffled. The
        batches of an epoch begin where the last one of the epoch before has taken its rest."""
        head = -epoch * len(order) % self.batch_size
        whole = (len(order) - head) // self.batch_size * self.batch_size
        body, lengths = order[head : head + whole], self._lengths(self._train)
        window = _BUCKET_WINDOW * self.batch_size
        pieces = [body[i : i + window] for i in range(0, whole, window)]
        pieces = [piece[np.argsort(lengths[piece], kind="stable")] for piece in pieces]
        if pieces:
            groups = np.concatenate(pieces).reshape(-1, self.batch_size)
            body = groups[random.permutation(len(groups))].ravel()
        return np.concatenate([order[:head], body, order[head + whole :]])

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        frame = 0 if self.data.special.bos is None else 2
        return np.minimum(self.data.offsets[documents + 1] - self.data.offsets[documents] + frame, self.seq_len)

    def _all_rows(self, split: str) -> np.ndarray:
        """(rows, width) blocks of packed text, or (rows,) document indices."""
        documents = self.data.splits[split]
        if self.collator.packed:
            rows = self._blocks(documents)
        elif self.data.n_labels == 0:
            raise DataError(f"task {self.task} needs labels, and these data have none")
        elif self.collator.single_label:
            rows = documents[self.data.single_targets[documents] >= 0]
        else:
            rows = documents
        if not len(rows):
            tokens = int((self.data.offsets[documents + 1] - self.data.offsets[documents]).sum())
            raise DataError(
                f"the {split} split ({len(documents)} documents, {tokens} tokens) holds no row for {self.task} "
                f"at sequence length {self.seq_len}; give more documents or a shorter sequence"
            )
        return rows

    def _blocks(self, documents: np.ndarray) -> np.ndarray:
        data, special = self.data, self.data.special
        stride = self.seq_len - (2 if self.collator.framed and special.bos is not None else 0)
        lengths = data.offsets[documents + 1] - data.offsets[documents]
        stream = np.full(int(lengths.sum()) + len(documents), special.eos, data.tokens.dtype)
        place = 0
        for document, length in zip(documents.tolist(), lengths.tolist(), strict=True):
            start = data.offsets[document]
            stream[place : place + length] = data.tokens[start : start + length]
            place += length + 1
        count = (len(stream) - self.collator.extra) // stride
        width = stride + self.collator.extra
        if count < 1:
            return np.empty((0, width), stream.dtype)
        # Views, not copies: with a shifted target neighbouring blocks share a token.
        return np.lib.stride_tricks.sliding_window_view(stream, width)[::stride][:count]
