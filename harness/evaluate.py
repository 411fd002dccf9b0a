"""Evaluation on held-out data: the same for every configuration (fp32 loss from upcast logits)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np
import torch

from bench_cases import Case
from harness.loss import training_loss
from harness.parallel.context import SINGLE_PROCESS, DistributedContext
from harness.precision import Precision
from instrument.results.schemas import EvaluationRecord

THRESHOLD = 0.5
F1_FIELDS = ("f1_micro", "f1_macro", "f1_micro_tuned", "tuned_threshold", "labels_absent")


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable,
    case: Case,
    precision: Precision,
    *,
    valid_vocab: int | None,
    step: int,
    context: DistributedContext = SINGLE_PROCESS,
) -> EvaluationRecord:
    """Run ``model`` over ``batches`` and score it. ``step`` 0 is the start of training. Ranks are dealt batches and
    combine their results: the record is every rank's, and that of one process."""
    started = time.perf_counter()
    model.eval()
    losses, targets_seen, samples = [], 0, 0
    scores, truths = [], []
    for mine, batch in context.dealt(batches):
        targets_seen += batch.n_targets
        samples += batch.samples
        if case.task.metric == "f1":
            truths.append(batch.targets)
        if not mine:
            continue
        on_device = batch.to(precision.device)
        with precision.forward():
            logits = model(on_device.input_ids, on_device.attention_mask, on_device.last_token)
        losses.append(
            training_loss(
                logits.float(),
                on_device.targets,
                loss=case.task.loss,
                dtype=torch.float32,
                normalizer=1,
                valid_vocab=valid_vocab,
            )
        )
        if case.task.metric == "f1":
            scores.append(logits.float().cpu())
    model.train()
    losses, scores = context.collected(losses), context.collected(scores)
    loss = float(torch.stack(losses).double().sum()) / targets_seen
    quality = _f1(torch.cat(scores).numpy(), torch.cat(truths).numpy()) if scores else {}
    return EvaluationRecord(
        step=step,
        val_loss=loss,
        perplexity=_perplexity(loss) if case.task.metric == "perplexity" else None,
        samples=samples,
        targets=targets_seen,
        duration_s=time.perf_counter() - started,
        **(dict.fromkeys(F1_FIELDS) | quality),
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _f1(scores: np.ndarray, truths: np.ndarray) -> dict[str, float | int | None]:
    """F1 of logits (N, C) against truths: (N, C) multi-hot, or (N,) class indices.

    Labels that no document of the split carries are left out of macro and counted.
    """
    from sklearn.metrics import f1_score

    n_labels = scores.shape[1]
    if truths.ndim == 1:
        predicted = scores.argmax(axis=1)
        present = np.unique(truths)
        tuned: dict[str, float | None] = {}
    else:
        if n_labels == 1:  # scikit-learn takes one column for a binary problem; an empty second one says what it is
            scores, truths = (np.pad(x, ((0, 0), (0, 1)), constant_values=v) for x, v in ((scores, -np.inf), (truths, 0)))
        truths = truths.astype(bool)
        predicted = scores > math.log(THRESHOLD / (1 - THRESHOLD))
        present = np.flatnonzero(truths.any(axis=0))
        tuned = tuned_micro_f1(scores[:, :n_labels], truths[:, :n_labels])
    options = {"zero_division": 0}
    return {
        "f1_micro": float(f1_score(truths, predicted, average="micro", **options)),
        "f1_macro": float(f1_score(truths, predicted, average="macro", labels=present, **options)),
        "labels_absent": int(n_labels - len(present)),
        **tuned,
    }


def tuned_micro_f1(scores: np.ndarray, truths: np.ndarray) -> dict[str, float | None]:
    """The largest micro-F1 over all thresholds of the probability, and that threshold.

    F1 = 2 TP / (predicted + positives), read off one sort of all scores; a threshold can only
    stand between two different scores. Scores that are not finite give no threshold.
    """
    flat = scores.ravel()
    positives = int(truths.sum())
    if not np.isfinite(flat).all() or positives == 0:
        return {"f1_micro_tuned": None, "tuned_threshold": None}
    order = np.argsort(-flat, kind="stable")
    ranked = flat[order]
    true_positives = np.cumsum(truths.ravel()[order])
    f1 = 2 * true_positives / (np.arange(1, flat.size + 1) + positives)
    cut_is_possible = np.append(ranked[:-1] != ranked[1:], True)
    best = int(np.argmax(np.where(cut_is_possible, f1, -1.0)))
    return {"f1_micro_tuned": float(f1[best]), "tuned_threshold": float(1 / (1 + math.exp(-float(ranked[best]))))}
