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

F1_FIELDS = (
    *("f1_micro", "f1_macro", "f1_micro_tuned", "tuned_threshold", "labels_absent"),
    *("f1_micro_majority", "f1_macro_majority"),
)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable,
    case: Case,
    precision: Precision,
    *,
    valid_vocab: int | None,
    step: int,
    majority: np.ndarray | None = None,
    context: DistributedContext = SINGLE_PROCESS,
) -> EvaluationRecord:
    """Run ``model`` over ``batches`` and score it. ``step`` 0 is the start of training; ``majority``: the constant answer
    (`Batches.majority_answer`) that is scored beside it. Ranks are dealt batches and combine their results: the record is
    every rank's, and that of one process. No finite logit is too large for it; a loss beyond the range is recorded as Inf."""
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
        options = {"loss": case.task.loss, "dtype": torch.float32, "normalizer": 1, "valid_vocab": valid_vocab}
        losses.append(training_loss(logits.float(), on_device.targets, **options))
        if case.task.metric == "f1":
            scores.append(logits.float().cpu())
    model.train()
    losses, scores = context.collected(losses), context.collected(scores)
    loss = float(torch.stack(losses).double().sum()) / targets_seen
    quality = _quality(torch.cat(scores).numpy(), torch.cat(truths).numpy(), majority) if scores else {}
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


def _quality(scores: np.ndarray, truths: np.ndarray, majority: np.ndarray | None) -> dict[str, float | int | None]:
    """`F1_FIELDS` of logits (N, C) against truths: (N, C) multi-hot, or (N,) class indices; ``majority``: (C,) bool, the labels
    of the constant answer, or its one class."""
    present = np.unique(truths) if truths.ndim == 1 else np.flatnonzero(truths.any(axis=0))
    found: dict[str, float | int | None] = {"labels_absent": scores.shape[1] - len(present)}
    found["f1_micro"], found["f1_macro"] = _f1(scores, truths)
    if truths.ndim == 2:
        found |= tuned_micro_f1(scores, truths.astype(bool))
    if majority is not None:
        constant = np.broadcast_to(np.where(majority, 1.0, -1.0), scores.shape)
        found["f1_micro_majority"], found["f1_macro_majority"] = _f1(constant, truths)
    return found


def _f1(scores: np.ndarray, truths: np.ndarray) -> tuple[float, float]:
    """Micro and macro: a label is predicted where its logit is above 0 (a probability above 1/2), a class where its logit is
    the largest. Labels that no document of the split carries are left out of macro; where there is no other, macro is 0,
    as scikit-learn's is with ``zero_division=0``."""
    from sklearn.metrics import f1_score

    if truths.ndim == 1:
        predicted, present = scores.argmax(axis=1), np.unique(truths)
    else:
        if scores.shape[1] == 1:  # scikit-learn takes one column for a binary problem; an empty second one says what it is
            scores, truths = (np.pad(x, ((0, 0), (0, 1))) for x in (scores, truths))
        predicted, truths = scores > 0, truths.astype(bool)
        present = np.flatnonzero(truths.any(axis=0))
    macro = float(f1_score(truths, predicted, average="macro", labels=present, zero_division=0)) if len(present) else 0.0
    return float(f1_score(truths, predicted, average="micro", zero_division=0)), macro


def tuned_micro_f1(scores: np.ndarray, truths: np.ndarray) -> dict[str, float | None]:
    """The largest micro-F1 over all thresholds of the probability, and that threshold (float64; 0 or 1 where the logit is so
    large that its probability rounds to them).

    F1 = 2 TP / (predicted + positives), read off one sort of all scores; a threshold can only
    stand between two different scores. Scores that are not finite give no threshold.
    """
    from scipy.special import expit

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
    return {"f1_micro_tuned": float(f1[best]), "tuned_threshold": float(expit(np.float64(ranked[best])))}
