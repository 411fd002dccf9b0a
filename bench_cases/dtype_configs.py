"""The dtype configurations: everything that differs between two of them is a field here.

Torch-free. `harness.precision` is the only place that turns a declaration into torch calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench_cases.lookup import check, check_choices, check_id, index

DTYPES = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("foreach", "fused", "fp32_states", "stochastic_rounding", "8bit")


@dataclass(frozen=True)
class DtypeConfig:
    """One floating-point configuration.

    weights   dtype of the stored parameters
    compute   dtype of the matrix products: autocast when it differs from ``weights``
    head      dtype of every module after the last encoder output
    loss      dtype of the per-row loss (the reduction always runs in fp32)
    optimizer AdamW implementation: ``foreach`` (states and arithmetic in the weights' dtype),
              ``fused`` (arithmetic in fp32, states in the weights' dtype), ``fp32_states``
              (fp32 arithmetic and states over 16-bit weights), ``stochastic_rounding`` (fp32
              arithmetic; weights and states stored in bf16 by stochastic rounding), ``8bit``
              (bitsandbytes, blockwise)
    eps       AdamW's epsilon
    scaler    dynamic loss scaling (``GradScaler``, first scale 65,536)
    clip      dtype in which the gradient norm is accumulated for clipping
    tf32      TensorFloat-32 allowed in fp32 matrix products
    controls  configurations that the matrix runs beside this one when it diverges
    """

    id: str
    weights: str
    compute: str
    head: str
    loss: str
    optimizer: str = "foreach"
    eps: float = 1e-8
    scaler: bool = False
    clip: str = "fp32"
    tf32: bool = False
    controls: tuple[str, ...] = ()
    note: str = ""
    in_default_matrix: bool = True

    def __post_init__(self) -> None:
        owner = f"dtype configuration {self.id!r}"
        check_id(self.id, owner)
        check_choices(
            self, owner, **dict.fromkeys(("weights", "compute", "head", "loss", "clip"), DTYPES), optimizer=OPTIMIZERS
        )
        check(self.eps > 0, owner, f"eps {self.eps} is not positive")
        weights, compute, full = self.weights, self.compute, self.weights == "fp32"
        mixed = f"{weights} weights cannot be computed in {compute}: autocast needs fp32 weights"
        check(full or weights == compute, owner, mixed)
        check(self.head in (compute, "fp32"), owner, f"the head runs in {compute} or in fp32, not in {self.head}")
        check(full or self.head == compute, owner, "an fp32 head needs fp32 weights")
        check(full or not self.scaler, owner, "the loss scaler refuses 16-bit gradients, so it needs fp32 weights")
        check(self.loss in ("fp32", compute), owner, f"a {self.loss} loss needs {self.loss} logits")
        check(self.clip in ("fp32", weights), owner, f"gradients are {weights}, not {self.clip}")
        check(not self.tf32 or compute == "fp32", owner, "tf32 concerns fp32 products only")
        stochastic = self.optimizer == "stochastic_rounding"
        check(not stochastic or weights == "bf16", owner, "stochastic rounding is defined for bf16 weights")
        check(full or self.optimizer != "8bit", owner, "8-bit AdamW needs fp32 weights")

    @property
    def autocast(self) -> str | None:
        """The autocast dtype, or None when the weights already have the compute dtype."""
        return self.compute if self.compute != self.weights else None


def _naive_fp16(id: str, **changes) -> DtypeConfig:
    """A variant of the fp16 stress test; ``changes`` are all that differs from it."""
    return DtypeConfig(id, weights="fp16", compute="fp16", head="fp16", loss="fp16", **changes)


def _amp(id: str, compute: str, **changes) -> DtypeConfig:
    """fp32 weights under autocast; the head runs in the autocast dtype unless ``changes`` says else."""
    return DtypeConfig(id, weights="fp32", compute=compute, loss="fp32", **{"head": compute, **changes})


EXTRA: dict[str, Any] = {"in_default_matrix": False}  # run by name, or with --configs all

DTYPE_CONFIGS: dict[str, DtypeConfig] = index(
    [
        DtypeConfig("fp32_true", "fp32", "fp32", "fp32", "fp32", note="the golden reference"),
        _amp("amp_fp16", "fp16", scaler=True),
        _amp("amp_bf16", "bf16"),
        _naive_fp16("fp16_naive", controls=("fp16_naive_eps1e4", "fp16_naive_fp32_states"), note="stress test"),
        DtypeConfig("bf16_pure", "bf16", "bf16", "bf16", "bf16"),
        _amp("amp_bf16_8bit", "bf16", optimizer="8bit"),
        _amp("amp_bf16_fp32_head", "bf16", head="fp32"),
        DtypeConfig("fp32_tf32", "fp32", "fp32", "fp32", "fp32", tf32=True, **EXTRA),
        _naive_fp16("fp16_naive_eps1e4", eps=1e-4, note="removes the division by zero, not the underflow", **EXTRA),
        _naive_fp16(
            "fp16_naive_fp32_states", optimizer="fp32_states", note="the clean control for what precision itself does", **EXTRA
        ),
        _naive_fp16("fp16_naive_clip16", clip="fp16", note="the gradient norm is accumulated in fp16 too", **EXTRA),
        _amp("amp_fp16_unscaled", "fp16", **EXTRA),
        DtypeConfig("bf16_pure_sr", "bf16", "bf16", "bf16", "bf16", optimizer="stochastic_rounding", **EXTRA),
        _amp("amp_bf16_fused_adamw", "bf16", optimizer="fused", **EXTRA),
    ]
)
