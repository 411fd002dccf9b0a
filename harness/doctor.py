"""The doctor's checks: what the device does, found out by trying and not by asking flags; and what the machine is (processor,
memory, disk, compilers, library versions)."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from bench_cases import DTYPE_CONFIGS, DtypeConfig
from harness.failure import sentence
from harness.fp16_products import cpu_flags, cpu_has_fp16_arithmetic
from harness.optimizer import OptimizerUnavailable, adamw_for
from harness.precision import ATTENTION, DTYPES, Unsupported, refuse_what_the_device_lacks
from instrument.environment import cpu_name, version
from instrument.mfu import capability_support, known_card
from instrument.nvml import Nvml
from instrument.terminal import count


def why_no_gpu(nvml: Nvml) -> str | None:
    """Why torch uses the CPU here; None when it has a GPU."""
    if torch.cuda.is_available():
        return None
    gpus = nvml.driver()["gpu_count"]
    if torch.version.cuda is None:
        seen = f"the driver sees {count(gpus, 'GPU')}" if gpus else nvml.unavailable or "the driver sees no GPU"
        return f"torch {torch.__version__} is built without CUDA; {seen}"
    if not gpus:
        return nvml.unavailable or "the driver sees no GPU"
    return (
        f"the driver sees {count(gpus, 'GPU')} and torch none: CUDA_VISIBLE_DEVICES hides "
        f"{'it' if gpus == 1 else 'them'}, or the driver is too old for CUDA {torch.version.cuda}"
    )


def gpus(nvml: Nvml) -> list[dict[str, object]]:
    """Every GPU that torch sees, in CUDA's order, with NVML's facts by UUID."""
    return [_gpu(index, nvml) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def _gpu(index: int, nvml: Nvml) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(index)
    capability, card = (properties.major, properties.minor), known_card(properties.name)
    uuid = getattr(properties, "uuid", None)
    return {
        "index": index,
        "name": properties.name,
        "capability": "{}.{}".format(*capability),
        "card": card and card.name,
        "reference_card": bool(card and card.reference),
        "supports": capability_support(*capability),
        "fp16_flops_per_s": card and card.peaks().get("fp16"),
        "bf16_flops_per_s": card and card.peaks().get("bf16"),
        "total_bytes": properties.total_memory,
        "has_code": has_code_for(capability, torch.cuda.get_arch_list()),
        "nvml": nvml.device(f"GPU-{uuid}"),
    }


def has_code_for(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a build for ``["sm_80", "compute_90", ...]`` runs on a card: machine code serves its own
    major capability from its minor on, and intermediate code every later card."""
    for kind, digits, exactly in re.findall(r"(\w+)_(\d+)([af]?)\b", " ".join(built_for)):
        there = int(digits[:-1]), int(digits[-1])
        if capability == there:
            return True
        if not exactly and capability > there and (kind == "compute" or capability[0] == there[0]):  # sm_90a: 9.0 alone
            return True
    return False


def products(device: torch.device) -> dict[str, str | None]:
    """Per dtype, null when a matrix product is right to its rounding, else what went wrong."""

    def trial(dtype: torch.dtype) -> None:
        left = torch.linspace(-1, 1, 64 * 64, dtype=torch.float64).view(64, 64)
        exact = left @ left.T
        got = (left.to(device, dtype) @ left.T.to(device, dtype)).double().cpu()
        error = float((got - exact).abs().max() / exact.abs().max())
        if not error <= 8 * torch.finfo(dtype).eps:
            raise ArithmeticError(f"a 64 x 64 product is off by {error:.1e}")

    return {name: _failure(lambda dtype=dtype: trial(dtype)) for name, dtype in DTYPES.items()}


def attention(device: torch.device) -> dict[str, dict[str, str | None]]:
    """Per SDPA backend and dtype, with and without a padding mask (``fp32``, ``fp32_masked``):
    null when a forward and backward pass runs, else the reason."""

    def trial(backend, dtype: torch.dtype, masked: bool) -> None:
        query = torch.randn(1, 2, 16, 32, device=device, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 1, 16, 16, device=device, dtype=torch.bool) if masked else None
        with sdpa_kernel([backend]):
            F.scaled_dot_product_attention(query, query, query, attn_mask=mask).sum().backward()

    table: dict[str, dict[str, str | None]] = {}
    for policy, backend in ATTENTION.items():
        if device.type == "cpu" and policy in ("efficient", "cudnn"):
            continue  # they exist on CUDA only
        table[policy] = {
            name + ("_masked" if masked else ""): _failure(lambda d=dtype, m=masked, b=backend: trial(b, d, m))
            for name, dtype in DTYPES.items()
            for masked in (False, True)
        }
    return table


def eight_bit_adamw(device: torch.device) -> str | None:
    """Null when bitsandbytes updates a parameter here and leaves it finite, else the reason."""

    def trial() -> None:
        parameter = torch.nn.Parameter(torch.ones(64, 128, device=device))
        parameter.grad = torch.full_like(parameter, 1e-2)
        optimizer = adamw_for("8bit", [parameter], lr=1e-2, eps=1e-8, weight_decay=0.0, seed=0)
        optimizer.step()
        moved = parameter.detach()
        if not bool((moved.isfinite() & (moved < 1)).all()):
            raise ArithmeticError("an 8-bit update did not move the parameter as it should")

    return _failure(trial)


def configurations(device: torch.device, eight_bit: str | None) -> list[dict[str, object]]:
    """Every dtype configuration: whether it runs on ``device``, the reason if not, and what to know if so."""
    return [
        {
            "config": config.id,
            "in_default_matrix": config.in_default_matrix,
            "supported": (reason := refusal(config, device, eight_bit)) is None,
            "reason": reason,
            "remark": remark(config, device) if reason is None else None,
        }
        for config in DTYPE_CONFIGS.values()
    ]


def refusal(config: DtypeConfig, device: torch.device, eight_bit: str | None) -> str | None:
    """Why a configuration cannot run here; None when it can."""
    try:
        refuse_what_the_device_lacks(config, device)
    except Unsupported as error:
        return str(error)
    return eight_bit if config.optimizer == "8bit" else None


def remark(config: DtypeConfig, device: torch.device) -> str | None:
    """What a supported configuration does differently on a CPU."""
    if device.type != "cpu":
        return None
    remarks = []
    if "fp16" in (config.weights, config.compute) and not cpu_has_fp16_arithmetic():
        remarks.append("fp16 products run in fp32 and are rounded once")
    if config.autocast:
        remarks.append("CPU autocast has another op table than CUDA's")
    if config.optimizer == "8bit":
        remarks.append("on CUDA non-finite gradients are skipped, here they reach the weights")
    return "; ".join(remarks) or None


def _failure(trial: Callable[[], None]) -> str | None:
    """None when a trial runs, else its error in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial()
    except OptimizerUnavailable as error:
        return str(error)
    except Exception as error:
        return sentence(error)
    return None


LIBRARIES = (
    *("torch", "triton", "transformers", "tokenizers", "datasets", "bitsandbytes", "nvidia-ml-py"),
    *("numpy", "scikit-learn", "scipy", "msgspec", "psutil", "rich"),
)
PROJECT = Path(__file__).resolve().parents[1]
_BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
_CGROUP = Path("/sys/fs/cgroup")


def processor() -> dict[str, object]:
    """Model, cores, and the 16-bit arithmetic of the processor."""
    fp16 = cpu_has_fp16_arithmetic()
    return {
        "model": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "quota_cores": quota_cores(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fp16_instructions": fp16,
        "bf16_instructions": bool(cpu_flags() & _BF16_UNITS),
        "fp16_products": "in hardware" if fp16 else "computed in fp32 and rounded once to fp16",
    }


def quota_cores(file: Path = _CGROUP / "cpu.max") -> float | None:
    """Cores' worth of time that the container grants; None without a limit."""
    quota, _, period = _first_line(file).partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def memory(limit_file: Path = _CGROUP / "memory.max") -> dict[str, int | None]:
    """Bytes of RAM: installed, available now, and the container's limit (null without one)."""
    ram, limit = psutil.virtual_memory(), _first_line(limit_file)
    return {"total_bytes": ram.total, "available_bytes": ram.available, "limit_bytes": int(limit) if limit.isdigit() else None}


def disk(folder: Path) -> dict[str, object]:
    """Free bytes where ``folder`` is or would be made, and whether that place can be written."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    facts: dict[str, object] = {"folder": str(folder), "writable": place.is_dir() and os.access(place, os.W_OK | os.X_OK)}
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return facts | {"free_bytes": None, "total_bytes": None, "unknown": {"free_bytes": error.strerror}}
    return facts | {"free_bytes": usage.free, "total_bytes": usage.total, "unknown": {}}


def compilers() -> dict[str, object]:
    """What `torch.compile` on a CPU (C++) and Triton's launcher on a GPU (C) need at run time."""
    return {
        "cxx": _first_program(os.environ.get("CXX"), "g++", "clang++"),
        "cc": _first_program(os.environ.get("CC"), "gcc", "clang", "cc"),
        "python_headers": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }


def constraints_of(torch_version: str, folder: Path = PROJECT) -> Path:
    """The constraints file of a torch's generation (``constraints-torch2.11.txt``); of any other torch, the main one."""
    own = folder / f"constraints-torch{'.'.join(torch_version.split('.')[:2])}.txt"
    return own if own.is_file() else folder / "constraints.txt"


def library_versions(constraints: Path | None = None) -> list[dict[str, str | None]]:
    """Installed beside tested versions; ``note`` says what differs. Without the file, tested is null."""
    tested = pinned(constraints or constraints_of(torch.__version__))
    rows = []
    for name in LIBRARIES:
        installed, wanted = version(name), tested.get(name)
        note = "not installed" if installed is None else None
        if installed and wanted and installed.partition("+")[0] != wanted.partition("+")[0]:  # 2.13.0+cpu is 2.13.0
            note = "differs from the tested version"
        rows.append({"library": name, "installed": installed, "tested": wanted, "note": note})
    return rows


def pinned(constraints: Path) -> dict[str, str]:
    """Package to version from a constraints file; empty when there is none."""
    try:
        text = constraints.read_text(encoding="utf-8")
    except OSError:
        return {}
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE))


def _first_program(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name.split()[0]))), None)


def _first_line(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
