"""The map from a dtype configuration to torch: the process-wide switches that change numerics (set, proven by computation,
recorded) and what the loop calls.

`Precision` is made once per run: it refuses what the device cannot do (`Unsupported`, with the
reason; never an approximation under the same name), sets and proves the global switches, and
then gives the loop its verbs: `prepare`, `forward`, `measure_gradients`, `clip`, `update`.
Everything it decided stands in ``flags``, which goes into the run's record.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench_cases import DtypeConfig
from bench_cases.ops_seen import OpsSeen
from harness import fp16_products
from harness.loss import MeasuringGradScaler, gradients_of
from harness.optimizer import OptimizerUnavailable, adamw_for
from harness.settings import RunSettings
from kernels import TensorStats, multi_tensor_stats, scale_
from kernels.dispatch import DTYPES


class SwitchError(RuntimeError):
    """A switch that was set and did not take effect."""


def set_switches(device: torch.device, *, tf32: bool, threads: int) -> dict[str, object]:
    """Set every global switch explicitly and return the record of them.

    Off everywhere: TF32 (unless ``tf32``), reduced-precision reductions and fp16 accumulation
    in matrix products, cuDNN autotuning. Raises `SwitchError` when a product shows otherwise.
    """
    precision = "tf32" if tf32 else "ieee"
    torch.backends.fp32_precision = precision
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        backend.fp32_precision = precision
    # oneDNN could round fp32 products to bf16; a CPU run must never do that.
    for backend in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn):
        backend.fp32_precision = "ieee"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)  # the math backend multiplies 16-bit queries in fp32
    torch.backends.cudnn.benchmark = False
    if device.type == "cpu" and threads:
        torch.set_num_threads(threads)
    return {
        "fp32_precision": precision,
        "fp16_reduced_precision_reduction": False,
        "bf16_reduced_precision_reduction": False,
        "fp16_accumulation": False,
        "math_attention_in_16_bits": False,
        "cudnn_benchmark": False,
        "threads": torch.get_num_threads(),
        "verified": verify(device, tf32=tf32),
    }


def verify(device: torch.device, *, tf32: bool) -> list[str]:
    """Prove the switches by products whose results differ between the settings.

    Returns what was proven; raises `SwitchError` otherwise.
    """
    checks = {"fp32_products": tf32_rounds(device) == tf32}
    if device.type == "cuda":
        checks["fp16_accumulates_in_fp32"] = accumulates_in_fp32(device, torch.float16)
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise SwitchError(f"set but not in effect on {device}: {', '.join(wrong)} (tf32 wanted: {tf32})")
    return list(checks)


def tf32_rounds(device: torch.device) -> bool:
    """Whether an fp32 product rounds its operands: 1 + 2^-12 survives fp32 and not TF32."""
    value = 1.0 + 2.0**-12
    left = torch.full((256, 256), value, device=device)
    product = left @ torch.eye(256, device=device)
    return not bool((product == value).all())


def accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether partial sums may exceed the dtype's range: 300 x 300 added 8,192 times, then subtracted as often, is
    finite in fp32 (0, where a tensor core's alignment drops no bits) and not when a partial sum is kept in fp16."""
    depth = 16_384
    left = torch.full((64, depth), 300.0, device=device, dtype=dtype)
    left[:, depth // 2 :] = -300.0
    right = torch.full((depth, 64), 300.0, device=device, dtype=dtype)
    return bool((left @ right).isfinite().all())


ATTENTION = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DEFAULT_ATTENTION = {"cuda": "efficient", "cpu": "math"}
"""The backends that take every dtype and every mask, so that all configurations run the same one."""
FIRST_LOSS_SCALE = 65_536.0


class Unsupported(Exception):
    """A configuration that this device cannot run; the reason is the message."""


class Precision:
    """One configuration on one device."""

    def __init__(
        self, config: DtypeConfig, device: torch.device, *, attention: str = "auto", threads: int = 0, compiled: bool = False
    ) -> None:
        refuse_what_the_device_lacks(config, device)
        self.config = config
        self.device = device
        self.weights_dtype = DTYPES[config.weights]
        self.logits_dtype = DTYPES[config.head]
        self.loss_dtype = DTYPES[config.loss]
        self.attention = DEFAULT_ATTENTION[device.type] if attention == "auto" else attention
        self.scaler = MeasuringGradScaler(device.type, init_scale=FIRST_LOSS_SCALE) if config.scaler else None
        self.flags: dict[str, object] = {
            "switches": set_switches(device, tf32=config.tf32, threads=threads),
            "attention": self.attention,
            "optimizer": config.optimizer,
            "eps": config.eps,
        }
        self.over_ranks: Callable[[TensorStats], TensorStats] = lambda mine: mine
        self.head_product_dtype: torch.dtype | None = None
        """As observed, None before."""
        self.returned_dtype: str | None = None
        """Of the last logits as the model returned them, by its name."""
        self._fp16_override = None
        if "fp16" in (config.weights, config.compute) and device.type == "cpu":
            in_hardware = fp16_products.cpu_has_fp16_arithmetic()
            if compiled and not in_hardware:
                why = "compiled code does not call the products that stand in for it"
                raise Unsupported(f"this CPU has no fp16 arithmetic, and {why}; run without --compile")
            self._fp16_override = None if in_hardware else fp16_products.install()
            self.flags["fp16_products"] = "hardware" if in_hardware else "fp32, rounded once to fp16"

    @classmethod
    def of(cls, settings: RunSettings) -> Precision:
        """As a run of these settings has it."""
        s = settings
        return cls(s.config, torch.device(s.device), attention=s.attention, threads=s.threads, compiled=s.compile)

    def close(self) -> None:
        """Take back the process-wide override, for callers that outlive the run (tests)."""
        if self._fp16_override is not None:
            self._fp16_override._destroy()
            self._fp16_override = None

    @property
    def autocast_name(self) -> str | None:
        """``cpu`` or ``cuda`` when autocast is on: their op tables differ, so rows say which."""
        return self.device.type if self.config.autocast else None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to the device in the weights' dtype and set the head's."""
        model.head_dtype = torch.float32 if self.config.head != self.config.compute else None
        model = model.to(device=self.device, dtype=self.weights_dtype)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if self.scaler is not None:
            self.scaler.measured = self.parameters
        return model

    def make_optimizer(self, *, lr: float, weight_decay: float, seed: int) -> torch.optim.Optimizer:
        """AdamW in the configuration's implementation over the prepared model's trainable parameters."""
        try:
            options = {"lr": lr, "eps": self.config.eps, "weight_decay": weight_decay, "seed": seed}
            return adamw_for(self.config.optimizer, self.parameters, **options)
        except OptimizerUnavailable as error:
            raise Unsupported(str(error)) from error

    @contextmanager
    def forward(self):
        """Around every forward pass: autocast (or none) and the pinned attention backend."""
        name = self.config.autocast
        autocast = torch.autocast(self.device.type, dtype=DTYPES[name]) if name else nullcontext()
        try:
            with autocast, sdpa_kernel([ATTENTION[self.attention]]):
                yield
        except RuntimeError as error:  # with one backend allowed, torch says so when it cannot serve
            if "No available kernel" not in str(error):
                raise
            what = f"the {self.attention} attention backend cannot run {self.config.compute} on this device"
            raise Unsupported(f"{what}; choose another with --sdpa") from error

    def observe_head(self, model: nn.Module) -> None:
        """See, in a forward pass of four tokens, in which dtype the head's product runs; before anything watches the model."""
        tokens = torch.zeros(1, 4, dtype=torch.int64, device=self.device)
        with torch.no_grad(), self.forward(), OpsSeen() as seen:
            model(tokens, None, tokens[:, 0])
        self.head_product_dtype = seen.product_dtype

    def check_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits in the dtype that the configuration declares; raises `SwitchError` where the head ran in another.

        A model may widen them to fp32 after a product in the declared dtype (Mamba-2 does): narrowed again, they are what the
        product gave, and the loss reads the dtype that the configuration declares for it."""
        self.returned_dtype = next((name for name, dtype in DTYPES.items() if dtype == logits.dtype), str(logits.dtype))
        if logits.dtype == self.logits_dtype:
            return logits
        if logits.dtype == torch.float32 and self.head_product_dtype == self.logits_dtype:
            return logits.to(self.logits_dtype)
        product = f" of a product in {self.head_product_dtype}" if self.head_product_dtype else ""
        raise SwitchError(f"{self.config.id}: logits are {logits.dtype}{product}, declared {self.logits_dtype}")

    def loss_scale(self) -> torch.Tensor | None:
        """The scale that the gradients of this step are multiplied by: a device scalar, read without a
        sync, or None without a scaler."""
        return None if self.scaler is None else self.scaler.scale_now(self.device)

    def measure_gradients(self, optimizer: torch.optim.Optimizer) -> TensorStats:
        """Statistics of the true gradients, which are unscaled in the same pass where there is a scale.
        Underflow is counted at the scale at which backward ran."""
        if self.scaler is None:
            return self.over_ranks(multi_tensor_stats(gradients_of(self.parameters), counts="underflow"))
        self.scaler.unscale_(optimizer)
        return self.scaler.gradient_stats

    def clip(self, norm: torch.Tensor, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their global norm is at most ``max_norm``; returns the norm used.

        ``norm`` is accumulated so that it cannot overflow, and the factor stays fp32 whatever the gradients'
        dtype. A configuration that clips in fp16 computes its own norm, as a plain fp16 loop would.
        """
        if self.config.clip == "fp16":
            return nn.utils.clip_grad_norm_(self.parameters, max_norm)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        if self.device.type == "cpu" and factor == 1:  # reading it costs nothing here, and multiplying does
            return norm
        # On CUDA _foreach_mul_ rounds an fp32 factor to 16 bits when the gradients have 16, tensor by tensor.
        multiply = torch._foreach_mul_ if self.weights_dtype == torch.float32 else scale_
        multiply([p.grad for p in self.parameters if p.grad is not None], factor)
        return norm

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step; with a scaler, only when the gradients are finite."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()


def refuse_what_the_device_lacks(config: DtypeConfig, device: torch.device) -> None:
    """Raise `Unsupported` with the reason, or return."""
    dtypes = {config.weights, config.compute, config.head}
    if device.type == "cpu":
        if config.tf32:
            raise Unsupported("TF32 is a mode of NVIDIA tensor cores; this run is on a CPU")
        return
    capability = torch.cuda.get_device_capability(device)
    card = f"{torch.cuda.get_device_name(device)} (capability {capability[0]}.{capability[1]})"
    asked = {"bf16 arithmetic": "bf16" in dtypes, "TF32": config.tf32, "fp16 arithmetic": "fp16" in dtypes}
    for what, wanted in asked.items():
        first = (5, 3) if what == "fp16 arithmetic" else (8, 0)
        if wanted and capability < first:
            raise Unsupported(f"{card} has no {what}; it begins with {first[0]}.{first[1]}")
