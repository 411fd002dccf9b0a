"""What the machine is, for the doctor: processor, memory, disk, compilers, library versions."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path

import psutil
import torch

from harness.fp16_products import cpu_has_fp16_arithmetic
from instrument.environment import cpu_name, version

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "datasets",
    "bitsandbytes",
    "nvidia-ml-py",
    "numpy",
    "scikit-learn",
    "scipy",
    "msgspec",
    "psutil",
    "rich",
)
PROJECT = Path(__file__).resolve().parents[2]
_BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
_CGROUP = Path("/sys/fs/cgroup")


def processor() -> dict[str, object]:
    """Model, cores, and the 16-bit arithmetic of the processor."""
    fp16 = cpu_has_fp16_arithmetic()
    return {
        "model": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "quota_cores": quota_cores(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fp16_instructions": fp16,
        "bf16_instructions": bool(_cpu_words() & _BF16_UNITS),
        "fp16_products": "in hardware" if fp16 else "computed in fp32 and rounded once to fp16",
    }


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
        note = None
        if installed is None:
            note = "not installed"
        elif wanted is not None and _public(installed) != _public(wanted):
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


def _public(text: str) -> str:
    """A version without its build tag: ``2.13.0+cpu`` is ``2.13.0``."""
    return text.partition("+")[0]


def _first_program(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name.split()[0]))), None)


def _first_line(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _cpu_words() -> set[str]:
    text = _first_line(Path("/proc/cpuinfo"))
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return {word for line in lines for word in line.split()}
