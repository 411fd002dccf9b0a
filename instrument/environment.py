"""What a result depends on besides its settings: versions and machine, by an allow-list.

No environment variable is ever read into a record: tokens live there.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from instrument.nvml import Nvml

PACKAGES = "torch triton transformers tokenizers datasets bitsandbytes numpy scikit-learn nvidia-ml-py".split()
GPU_PROPERTIES = {"gpu_multiprocessors": "multi_processor_count", "gpu_l2_bytes": "L2_cache_size"}
"""Name in a record -> torch's field of a device's properties."""


def capture(device: torch.device) -> dict[str, object]:
    """Versions, processor, memory and, on CUDA, the GPU. Absent packages are null."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "operating_system": platform.freedesktop_os_release().get("PRETTY_NAME") if _has_os_release() else None,
        "libc": " ".join(platform.libc_ver()) or None,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        **host(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{f"{name}_version": version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "gpu_count": torch.cuda.device_count(),
            "cuda_version": torch.version.cuda,
            "cudnn_version": torch.backends.cudnn.version(),
            **{name: getattr(properties, field, None) for name, field in GPU_PROPERTIES.items()},
            **_of_driver(str(getattr(properties, "uuid", ""))),
        }
    return facts


def _has_os_release() -> bool:
    return any(Path(place).exists() for place in ("/etc/os-release", "/usr/lib/os-release"))


def _of_driver(uuid: str) -> dict[str, object]:
    """What NVML knows of the GPU's driver, power, partition and link; null where it does not."""
    with Nvml() as nvml:
        device, driver = nvml.device(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"), nvml.driver()
    names = ("power_limit_w", "mig", "compute_mode", "pcie_generation", "pcie_lanes", "nvlinks")
    return {"gpu_driver_version": driver.get("version"), **{f"gpu_{name}": device.get(name) for name in names}}


def host(cpuinfo: Path = Path("/proc/cpuinfo"), sys: Path = Path("/sys")) -> dict[str, object]:
    """Sockets, cores, highest clock and caches of the processor, the kinds of disks, and whether the machine is virtual, from
    Linux's own files; null what they do not say."""
    text = _read(cpuinfo) or ""
    ids = [dict(re.findall(r"^(physical id|core id)\s*:\s*(\d+)$", block, re.MULTILINE)) for block in text.split("\n\n")]
    sockets = {found["physical id"] for found in ids if "physical id" in found}
    cores = {(found.get("physical id"), found["core id"]) for found in ids if "core id" in found}
    highest = _read(sys / "devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    caches = [
        f"L{level}{'d' if kind == 'Data' else ''} {size}"
        for place in sorted((sys / "devices/system/cpu/cpu0/cache").glob("index*"))
        if (level := _read(place / "level"))
        and (size := _read(place / "size"))
        and (kind := _read(place / "type")) != "Instruction"
    ]
    disks = {
        name: {"0": "solid state", "1": "rotating"}.get(_read(place / "queue/rotational") or "")
        for place in sorted((sys / "block").glob("*"))
        if not (name := place.name).startswith(("loop", "ram", "zram", "dm-", "sr"))
    }
    return {
        "cpu_sockets": len(sockets) or None,
        "cpu_cores": len(cores) or None,
        "cpu_max_hz": int(highest) * 1000 if highest and highest.isdigit() else None,
        "cpu_caches": ", ".join(caches) or None,
        "storage": ", ".join(f"{name} {kind}" if kind else name for name, kind in disks.items()) or None,
        "virtual": " hypervisor" in text if text else None,
    }


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def device_slug(device: torch.device) -> str:
    """A folder name for a kind of device: ``nvidia-h200``, ``cpu-amd-epyc``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {cpu_name()}"
    name = re.sub(r"\((r|tm)\)|processor|\bcpu @.*", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
