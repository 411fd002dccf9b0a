"""The system that the runs were made on, as completely as MLPerf's system description asks; "?" for what no row recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.tables.speed import disturbances
from report.text import clean, gigabytes, joined, number, objects

UNKNOWN = "?"
MOST_VALUES = 3
Facts = dict[str, Any]


def _listed(*parts: str | None) -> str | None:
    return ", ".join(filter(None, parts)) or None


def _known(facts: Facts, name: str, text: Callable[[float], str]) -> str | None:
    """A plain number of the facts as text, or None."""
    value = number(facts.get(name))
    return None if value is None else text(value)


def _plain(name: str, limit: int = 80, form: str = "{}") -> Callable[[Facts], str | None]:
    return lambda facts: None if facts.get(name) is None else form.format(clean(facts[name], limit))


def _cores(facts: Facts) -> str | None:
    """``2 sockets, 64 cores, 128 threads``, of what is known."""
    words = {"cpu_sockets": "socket", "cpu_cores": "core", "cpu_count": "thread"}
    return _listed(*(_known(facts, name, lambda n, word=word: count(int(n), word)) for name, word in words.items()))


def _kernel(facts: Facts) -> str | None:
    return _listed(_plain("system")(facts), {True: "virtual machine", False: "no hypervisor"}.get(facts.get("virtual")))


def _link(facts: Facts) -> str | None:
    lanes = _known(facts, "gpu_pcie_lanes", " x{:.0f}".format) or ""
    pcie = _known(facts, "gpu_pcie_generation", "PCIe {:.0f}".format)
    return _listed(pcie and pcie + lanes, _known(facts, "gpu_nvlinks", lambda n: count(int(n), "NVLink")))


def _gpu_state(facts: Facts) -> str | None:
    power = _known(facts, "gpu_power_limit_w", "{:.0f} W limit".format)
    mig = {True: "MIG on", False: "MIG off"}.get(facts.get("gpu_mig"))
    return _listed(power, mig, _plain("gpu_compute_mode", 24, "compute mode {}")(facts))


def _units(facts: Facts) -> str | None:
    units, capability = _plain("gpu_multiprocessors", 8, "{} multiprocessors"), _plain("gpu_capability", 8, "capability {}")
    return _listed(units(facts), capability(facts), _known(facts, "gpu_l2_bytes", lambda size: f"L2 {size / 1e6:.0f} MB"))


def _packages(facts: Facts) -> str | None:
    """Every version that has no line of its own."""
    own = ("torch_version", "cuda_version", "cudnn_version", "gpu_driver_version")
    return _listed(
        *(
            f"{clean(name.removesuffix('_version').replace('_', ' '), 40)} {clean(version, 40)}"
            for name, version in facts.items()
            if name.endswith("_version") and name not in own and version is not None
        )
    )


HOST: dict[str, Callable[[Facts], str | None]] = {
    "Processor": _plain("cpu"),
    "Sockets, cores": _cores,
    "Highest clock": lambda facts: _known(facts, "cpu_max_hz", lambda hertz: f"{hertz / 1e9:.2f} GHz"),
    "Caches": _plain("cpu_caches"),
    "Vector unit": _plain("cpu_capability"),
    "Memory": lambda facts: _known(facts, "memory_bytes", gigabytes),
    "Storage": _plain("storage"),
    "Operating system": _plain("operating_system"),
    "Kernel": _kernel,
}
GPU: dict[str, Callable[[Facts], str | None]] = {
    "Accelerator": _plain("gpu"),
    "Accelerators": _plain("gpu_count"),
    "Its memory": lambda facts: _known(facts, "gpu_memory_bytes", gigabytes),
    "Its units": _units,
    "Its links": _link,
    "Its state": _gpu_state,
    "Driver": _plain("gpu_driver_version"),
    "CUDA, cuDNN": lambda facts: _listed(*(_plain(name, 24)(facts) for name in ("cuda_version", "cudnn_version"))),
}
SOFTWARE: dict[str, Callable[[Facts], str | None]] = {
    "Python": _plain("python"),
    "torch": _plain("torch_version"),
    "Other libraries": _packages,
}


def system_block(folder: Folder) -> list[tuple[str, str]]:
    """Name and value, hardware first: where rows differ, every value with the number of rows that have it."""
    facts: list[Facts] = [run.env for run in folder.runs if run.env] or [folder.machine]
    on_gpu = any(fact.get("gpu") is not None for fact in facts) or any(run.peak_allocated_bytes for run in folder.runs)
    named = {**HOST, **(GPU if on_gpu else {}), **SOFTWARE}
    block = [(name, _values([value(fact) for fact in facts])) for name, value in named.items()]
    if not on_gpu:
        block.insert(len(HOST), ("Accelerator", "none: the runs are on the processor"))
    return [
        *block,
        ("Peak", _peaks(folder.runs)),
        ("Measured ceiling", _ceiling(folder.machine)),
        ("State", state_of(folder.runs)),
    ]


def _values(values: Sequence[str | None]) -> str:
    found = Counter(value or UNKNOWN for value in values)
    if len(found) == 1:
        return next(iter(found))
    shown = [f"{value} ({count(n, 'row')})" for value, n in found.most_common(MOST_VALUES)]
    return "; ".join(shown) + (f"; {len(found) - MOST_VALUES} more" if len(found) > MOST_VALUES else "")


def _peaks(runs: Sequence[RunRecord]) -> str:
    """The peaks that an MFU of these rows is divided by, each with its source."""
    known = Counter(
        f"{run.peak_flops_per_s / 1e12:,.1f} TFLOP/s, {clean(run.peak_flops_source or 'source not recorded', 80)}"
        for run in runs
        if run.peak_flops_per_s is not None
    )
    return "; ".join(known) or UNKNOWN


def _ceiling(machine: Facts) -> str:
    """The best measured matmul rate by dtype, and of a copy; with a warning where other work ran meanwhile."""
    measured = machine.get("measured") if isinstance(machine.get("measured"), dict) else {}
    best: dict[str, float] = {}
    for row in objects(measured.get("matmul")):
        rate = number(row.get("flops_per_s"))
        if rate is not None and isinstance(row.get("dtype"), str):
            best[clean(row["dtype"], 12)] = max(rate, best.get(clean(row["dtype"], 12), 0.0))
    parts = [f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in best.items()]
    copies = [rate for row in objects(measured.get("copy")) if (rate := number(row.get("bytes_per_s"))) is not None]
    parts += [f"copy {max(copies) / 1e9:,.0f} GB/s"] if copies else []
    busy = number(measured.get("cpu_busy_before_frac"))
    note = f" (other work took {100 * busy:.0f} % of the CPU: too low)" if parts and busy is not None and busy > 0.1 else ""
    return ", ".join(parts) + note if parts else UNKNOWN


def state_of(runs: Sequence[RunRecord]) -> str:
    """How many rows were throttled, and shared their device, of those that know."""
    parts = []
    for name in ("throttled", "contended"):
        found = Counter(disturbances(run)[name] for run in runs)
        known = found[True] + found[False]
        parts.append(f"{name} {found[True]} of {count(known, 'row')}" if known else f"{name} {UNKNOWN}")
        if known and found[None]:
            parts[-1] += f" ({found[None]} {UNKNOWN})"
    return joined(parts)
