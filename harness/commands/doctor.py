"""``python -m harness doctor``: what this machine can do, and what will not work here and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness import doctor
from harness.exit_codes import ENVIRONMENT, OK
from harness.measured_rates import measure, merge_measured, refuse_another_machine, too_low
from harness.planning import choose_device, results_folder
from instrument.environment import capture, version
from instrument.nvml import Nvml
from instrument.terminal import count


def doctor_command(options: argparse.Namespace) -> int:
    """Examine and report; exit code 5 when torch cannot even multiply two matrices on the device."""
    findings = examine(options.out)
    if options.measure and findings["products"]["fp32"] is None:
        findings["measured"] = measure_into(options.out)
    show(findings)
    if options.json:
        sys.stdout.write(json.dumps(findings, allow_nan=False) + "\n")
    return OK if findings["products"]["fp32"] is None else ENVIRONMENT


def examine(out: Path | None) -> dict[str, object]:
    """All findings as plain data. What could not be found out is null, with a reason in ``unknown``."""
    device = choose_device("auto")
    with Nvml() as nvml:
        findings: dict[str, object] = {
            "device": device.type,
            "why_no_gpu": doctor.why_no_gpu(nvml),
            "driver": nvml.driver(),
            "gpus": doctor.gpus(nvml),
        }
    findings |= {
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
            "triton": version("triton"),
        },
        "cpu": doctor.processor(),
        "memory": doctor.memory(),
        "disk": doctor.disk(_results_folder(out, device)),
        "compilers": doctor.compilers(),
        "versions": doctor.library_versions(),
        "products": doctor.products(device),
        "attention": doctor.attention(device),
        "eight_bit_adamw": doctor.eight_bit_adamw(device),
    }
    findings["configurations"] = doctor.configurations(device, findings["eight_bit_adamw"])
    findings["will_not_work"] = will_not_work(findings)
    return findings


def measure_into(out: Path | None) -> dict[str, object]:
    """Measure this machine's rates and keep them in ``machine.json`` of the results folder."""
    device = choose_device("auto")
    folder, machine = _results_folder(out, device), capture(device)
    refuse_another_machine(folder, machine)
    measured = measure(device)
    merge_measured(folder, machine, measured)
    return measured | {"file": str(folder / "machine.json")}


def _results_folder(out: Path | None, device: torch.device) -> Path:
    """Where results would go; ``results`` itself when a broken GPU does not even report its name."""
    try:
        return results_folder(out, device)
    except RuntimeError:
        return Path("results")


def will_not_work(findings: dict) -> list[dict[str, str]]:
    """``{what, why}`` of everything that this machine cannot do, the gravest first."""
    return [{"what": what, "why": why} for what, why in _problems(findings)]


def _problems(findings: dict) -> Iterator[tuple[str, str]]:
    yield from ((f"matrix products in {dtype}", why) for dtype, why in findings["products"].items() if why)
    if findings["why_no_gpu"]:
        yield "runs on a GPU, --preset full in useful time", findings["why_no_gpu"]
    for gpu in findings["gpus"]:
        yield from _gpu_problems(gpu)
    for row in findings["configurations"]:
        if not row["supported"]:
            yield f"configuration {row['config']}", row["reason"]
    for policy, trials in findings["attention"].items():  # one per backend: ten rows of the same reason help nobody
        refused = [name.replace("_masked", " with a mask") for name, why in trials.items() if why]
        if refused:
            yield f"--sdpa {policy} in {', '.join(refused)}", next(why for why in trials.values() if why)
    yield from _compile_problems(findings)
    if not findings["disk"]["writable"]:
        yield "writing results", f"{findings['disk']['folder']} cannot be written; choose another with --out"
    for row in findings["versions"]:
        if row["installed"] is None and row["library"] != "triton":
            yield f"what needs {row['library']}", "it is not installed"


def _gpu_problems(gpu: dict) -> Iterator[tuple[str, str]]:
    who, nvml = f"GPU {gpu['index']} ({gpu['name']})", gpu["nvml"]
    if not gpu["has_code"]:
        yield f"torch on {who}", f"this build holds no code for capability {gpu['capability']}"
    if gpu["card"] is None:
        yield f"estimated time and MFU on {who}", "no published peak is known for this name, and none is guessed"
    if nvml["compute_mode"] in ("exclusive_process", "prohibited"):
        yield f"two runs at a time on {who}", f"its compute mode is {nvml['compute_mode']}"
    others = [process for process in nvml["processes"] or [] if process["used_bytes"]]
    if others and nvml["memory_free_bytes"] is not None and nvml["memory_free_bytes"] < 0.9 * gpu["total_bytes"]:
        held = count(len(others), "process holds", "processes hold")
        yield f"all memory and fair timing on {who}", f"{held} memory there"


def _compile_problems(findings: dict) -> Iterator[tuple[str, str]]:
    tools, cuda = findings["compilers"], findings["device"] == "cuda"
    if tools["cc" if cuda else "cxx"] is None:
        language, tried = ("C", "CC, gcc, clang") if cuda else ("C++", "CXX, g++, clang++")
        yield "--compile", f"no {language} compiler is found ({tried}); install g++"
    if cuda and findings["torch"]["triton"] is None:
        yield "Triton kernels and --compile", "triton is not installed"
    if cuda and not tools["python_headers"]:
        yield "Triton kernels and --compile", "Python.h is missing (Debian, Ubuntu: install python3-dev)"


def show(findings: dict) -> None:
    """Print facts, configurations, and what will not work."""
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
    console.print(facts(findings))
    console.print()
    supported = sum(row["supported"] for row in findings["configurations"])
    console.print(f"[bold]{supported} of {len(findings['configurations'])} configurations run here[/]")
    console.print(configurations(findings["configurations"]))
    console.print()
    console.print("[bold]What will not work here, and why[/]")
    for row in findings["will_not_work"]:
        console.print(f"  {escape(row['what'])}: [dim]{escape(row['why'])}[/]")
    if not findings["will_not_work"]:
        console.print("  nothing that was tried")
    if "measured" in findings:
        console.print()
        console.print(f"[bold]Measured just now[/], into {escape(findings['measured']['file'])}")
        console.print(measured(findings["measured"]))
        if remark := too_low(findings["measured"]):
            console.print(f"[yellow]{remark}[/]")


def facts(findings: dict) -> Table:
    """Two columns: what, and the finding."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines(findings):
        table.add_row(name, escape(text))
    return table


def lines(findings: dict) -> list[tuple[str, str]]:
    """The facts as (name, text)."""
    driver, torch, cpu, ram = (findings[name] for name in ("driver", "torch", "cpu", "memory"))
    rows = [("device", findings["device"] + (f" ({findings['why_no_gpu']})" if findings["why_no_gpu"] else ""))]
    rows += [line for gpu in findings["gpus"] for line in gpu_lines(gpu)]
    rows += [
        (
            "driver",
            f"{driver['version']}, CUDA up to {driver['cuda']}"
            if driver["version"]
            else f"unknown: {driver['unknown'].get('version')}",
        ),
        (
            "torch",
            f"{torch['version']}, CUDA {torch['cuda'] or 'none'}, cuDNN {torch['cudnn'] or 'none'}, "
            f"triton {torch['triton'] or 'none'}",
        ),
        (
            "cpu",
            f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores"
            + (f" (quota {cpu['quota_cores']:g})" if cpu["quota_cores"] else "")
            + f", {cpu['torch_capability']}",
        ),
        (
            "cpu 16 bit",
            f"fp16 products {cpu['fp16_products']}; bf16 "
            f"{'in hardware' if cpu['bf16_instructions'] else 'without instructions of its own'}",
        ),
        (
            "memory",
            f"{_gb(ram['available_bytes'])} of {_gb(ram['total_bytes'])} available"
            + (f", container limit {_gb(ram['limit_bytes'])}" if ram["limit_bytes"] else ""),
        ),
        ("disk", f"{_gb(findings['disk']['free_bytes'])} free for {findings['disk']['folder']}"),
        (
            "compilers",
            f"C++ {findings['compilers']['cxx'] or 'none'}, C {findings['compilers']['cc'] or 'none'}, "
            f"Python.h {'present' if findings['compilers']['python_headers'] else 'missing'}",
        ),
        ("products", _trials(findings["products"])),
        ("8-bit AdamW", findings["eight_bit_adamw"] or "updates a parameter"),
    ]
    rows += [(f"sdpa {policy}", _trials(trials)) for policy, trials in findings["attention"].items()]
    return [*rows, ("libraries", _versions(findings["versions"]))]


def gpu_lines(gpu: dict) -> list[tuple[str, str]]:
    """What it is, then memory and company."""
    nvml = gpu["nvml"]
    standing = "a reference card" if gpu["reference_card"] else "not a reference card (A6000, A40), and fine"
    able = ", ".join(name for name, yes in gpu["supports"].items() if yes)
    if nvml["memory_free_bytes"] is None:
        memory = f"{_gb(gpu['total_bytes'])}; free unknown: {nvml['unknown'].get('memory_free_bytes')}"
    else:
        memory = f"{_gb(nvml['memory_free_bytes'])} of {_gb(gpu['total_bytes'])} free"
    if nvml["processes"] is None:
        company = f"processes unknown: {nvml['unknown'].get('processes')}"
    else:
        company = f"{count(len(nvml['processes']), 'process', 'processes')}" + "".join(
            f", pid {p['pid']} {_gb(p['used_bytes'])}" for p in nvml["processes"]
        )
    return [
        (f"gpu {gpu['index']}", f"{gpu['name']}, capability {gpu['capability']} ({able}); {standing}"),
        ("", f"{memory}; {company} (in a container these are the host's pids)"),
    ]


def configurations(rows: list[dict]) -> Table:
    """Configuration, whether it runs, and the reason or the remark."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 2))
    for row in rows:
        verdict = "[green]runs[/]" if row["supported"] else "[red]unsupported[/]"
        table.add_row(row["config"], verdict, escape(row["reason"] or row["remark"] or ""))
    return table


def measured(found: dict) -> Table:
    """A row for each dtype and number of threads, then the copies: median, and 10th to 90th percentile."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for name in ("products", "threads", "median", "p10 to p90", ""):
        table.add_column(name, justify="right" if name in ("threads", "median", "p10 to p90") else "left")

    def add(what: str, row: dict, name: str, scale: float, unit: str, remark: str) -> None:
        low, median, high = (row[f"{prefix}{name}"] / scale for prefix in ("p10_", "", "p90_"))
        table.add_row(
            what,
            "" if row["threads"] is None else str(row["threads"]),
            f"{median:,.1f} {unit}",
            f"{low:,.1f} to {high:,.1f}",
            remark,
        )

    for row in found["matmul"]:
        scale, unit = (1e12, "TFLOP/s") if row["flops_per_s"] >= 1e12 else (1e9, "GFLOP/s")
        how = "" if row["how"] == "native" else f", {row['how']}"
        add(row["dtype"], row, "flops_per_s", scale, unit, f"{row['size']} x {row['size']}{how}")
    for row in found["copy"]:
        add("copy", row, "bytes_per_s", 1e9, "GB/s", "read and written")
    return table


def _trials(trials: dict[str, str | None]) -> str:
    """``fp32, bf16; not fp16``."""
    good = [name.replace("_", " ") for name, why in trials.items() if why is None]
    bad = [name.replace("_", " ") for name, why in trials.items() if why is not None]
    return (", ".join(good) or "none") + (f"; not {', '.join(bad)}" if bad else "")


def _versions(rows: list[dict]) -> str:
    """What differs from the tested versions, or that nothing does."""
    noted = [
        " ".join(filter(None, (row["library"], row["installed"], f"({row['note']}{_wanted(row)})")))
        for row in rows
        if row["note"]
    ]
    tested = sum(row["tested"] is not None and row["note"] is None for row in rows)
    return f"{tested} of {len(rows)} as tested" + ("; " + "; ".join(noted) if noted else "")


def _wanted(row: dict) -> str:
    """The tested version, after the note that it is another or none."""
    return "" if row["tested"] is None else f", {row['tested']}" if row["installed"] else f"; tested: {row['tested']}"


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
