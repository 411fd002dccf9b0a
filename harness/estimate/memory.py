"""Estimated peak memory of a run, part by part, in bytes."""

from __future__ import annotations

import psutil

from harness.estimate.model import Trace
from harness.settings import RunSettings

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4_096, 256
"""bitsandbytes keeps tensors below this many elements in 32 bits, and one fp32 scale a block."""
LATER_BYTES = {"perplexity": 60_000_000, "f1": 150_000_000}
"""What a CPU run's process comes to hold besides, by its metric: scratch of the product library and the
allocator, and for F1 scikit-learn. Measured on tiny runs, 55 to 66 and 130 to 155 MB."""
RULE = (
    "weights, gradients and optimizer states by the configuration's dtypes; activations and logits as autograd "
    "keeps them for one micro-batch of the longest sequences; the larger of those and the optimizer's own "
    "temporaries"
)


def memory(settings: RunSettings, traced: Trace) -> dict[str, object]:
    """``parts_bytes``, ``peak_bytes`` (on a CPU with what this process holds already, which is what a run's
    process holds when it begins; on CUDA what the allocator hands out, without the context) and ``rule``."""
    weight_bytes = BYTES[settings.config.weights]
    parts = {
        "weights": traced.n_params * weight_bytes,
        "gradients": traced.n_params * weight_bytes,
        "optimizer_states": optimizer_state_bytes(settings.config.optimizer, weight_bytes, traced),
        "activations": traced.activation_bytes,
        "logits": traced.logit_bytes,
        "optimizer_temporaries": temporary_bytes(settings.config.optimizer, weight_bytes, traced.n_params),
    }
    lasting = parts["weights"] + parts["gradients"] + parts["optimizer_states"]
    peak = lasting + max(parts["activations"] + parts["logits"], parts["optimizer_temporaries"])
    if settings.device == "cpu":
        parts["process"] = psutil.Process().memory_info().rss
        parts["libraries_later"] = LATER_BYTES[settings.case.task.metric]
        return {
            "parts_bytes": parts,
            "peak_bytes": peak + parts["process"] + parts["libraries_later"],
            "rule": RULE + "; plus this process as it is now and what libraries take later",
        }
    return {"parts_bytes": parts, "peak_bytes": peak, "rule": RULE + "; without the CUDA context"}


def optimizer_state_bytes(optimizer: str, weight_bytes: int, traced: Trace) -> int:
    """Both moments of AdamW."""
    if optimizer == "8bit":
        return sum(2 * (4 * n if n < EIGHT_BIT_FROM else n + 4 * -(-n // EIGHT_BIT_BLOCK)) for n, _ in traced.parameters)
    element = {"fp32_states": 4, "stochastic_rounding": 2}.get(optimizer, weight_bytes)
    return 2 * element * traced.n_params


def temporary_bytes(optimizer: str, weight_bytes: int, n_params: int) -> int:
    """What a step holds at its height: foreach the denominators; the wide ones fp32 copies of weights,
    gradients and both moments, and the denominators."""
    return {"foreach": weight_bytes, "fp32_states": 20, "stochastic_rounding": 20}.get(optimizer, 0) * n_params
