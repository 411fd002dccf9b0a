"""``python -m harness doctor``: what this machine can do, and what will not work here and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from harness import doctor
from harness.exit_codes import ENVIRONMENT, OK
from harness.measured_rates import measure, merge_measured, refuse_another_machine, too_low
from harness.planning import choose_device, results_folder
from instrument.environment import capture, version
from instrument.nvml import Nvml
from instrument.results.schemas import strict_json
from instrument.terminal import count, facts_table, plain_table, print_section, stderr_console


def doctor_command(options: argparse.Namespace) -> int:
    """Examine and report; exit code 5 when torch cannot even multiply two matrices on the device."""
    findings = examine(options.out)
    usable = findings["products"]["fp32"] is None
    if options.measure and usable:
        findings["measured"] = measure_into(options.out)
    show(findings)
    if options.json:
        print(strict_json(findings))
    return OK if usable else ENVIRONMENT


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
            "version": str(torch.__version__),
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
    console = stderr_console()
    console.print(facts_table(facts(findings)))
    rows = findings["configurations"]
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        answer = "[green]runs[/]" if row["supported"] else "[red]unsupported[/]"
        table.add_row(row["config"], answer, escape(row["reason"] or row["remark"] or ""))
    print_section(console, f"{sum(row['supported'] for row in rows)} of {len(rows)} configurations run here", table)
    lines = [f"{escape(row['what'])}: [dim]{escape(row['why'])}[/]" for row in findings["will_not_work"]]
    print_section(console, "What will not work here, and why", *(lines or ["nothing that was tried"]))
    if "measured" in findings:
        found = findings["measured"]
        print_section(console, "Measured just now", measured(found), note=f"into {found['file']}")
        if remark := too_low(found):
            console.print(f"[yellow]{remark}[/]")


def facts(findings: dict) -> list[tuple[str, str]]:
    """The findings as (name, text)."""
    driver, torch, cpu, ram = (findings[name] for name in ("driver", "torch", "cpu", "memory"))
    rows = [("device", findings["device"] + (f" ({findings['why_no_gpu']})" if findings["why_no_gpu"] else ""))]
    rows += [line for gpu in findings["gpus"] for line in gpu_lines(gpu)]
    version = f"{driver['version']}, CUDA up to {driver['cuda']}"
    quota = f" (quota {cpu['quota_cores']:g})" if cpu["quota_cores"] else ""
    bf16 = "in hardware" if cpu["bf16_instructions"] else "without instructions of its own"
    limit = f", container limit {_gb(ram['limit_bytes'])}" if ram["limit_bytes"] else ""
    tools, disk = findings["compilers"], findings["disk"]
    headers = "present" if tools["python_headers"] else "missing"
    cudnn, triton = torch["cudnn"] or "none", torch["triton"] or "none"
    rows += [
        ("driver", version if driver["version"] else f"unknown: {driver['unknown'].get('version')}"),
        ("torch", f"{torch['version']}, CUDA {torch['cuda'] or 'none'}, cuDNN {cudnn}, triton {triton}"),
        ("cpu", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores{quota}, {cpu['torch_capability']}"),
        ("cpu 16 bit", f"fp16 products {cpu['fp16_products']}; bf16 {bf16}"),
        ("memory", f"{_gb(ram['available_bytes'])} of {_gb(ram['total_bytes'])} available{limit}"),
        ("disk", f"{_gb(disk['free_bytes'])} free for {disk['folder']}"),
        ("compilers", f"C++ {tools['cxx'] or 'none'}, C {tools['cc'] or 'none'}, Python.h {headers}"),
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
        pids = "".join(f", pid {p['pid']} {_gb(p['used_bytes'])}" for p in nvml["processes"])
        company = count(len(nvml["processes"]), "process", "processes") + pids
    return [
        (f"gpu {gpu['index']}", f"{gpu['name']}, capability {gpu['capability']} ({able}); {standing}"),
        ("", f"{memory}; {company} (in a container these are the host's pids)"),
    ]


def measured(found: dict) -> Table:
    """A row for each dtype and number of threads, then the copies: median, and 10th to 90th percentile."""
    right = ("threads", "median", "p10 to p90")
    table = plain_table("products", *right, "", right=right)
    units = {True: (1e12, "TFLOP/s"), False: (1e9, "GFLOP/s")}
    rows = [(row, "flops_per_s", *units[row["flops_per_s"] >= 1e12]) for row in found["matmul"]]
    for row, name, scale, unit in [*rows, *((row, "bytes_per_s", 1e9, "GB/s") for row in found["copy"])]:
        low, median, high = (row[f"{prefix}{name}"] / scale for prefix in ("p10_", "", "p90_"))
        remark = "read and written"
        if "dtype" in row:
            remark = f"{row['size']} x {row['size']}" + ("" if row["how"] == "native" else f", {row['how']}")
        threads = "" if row["threads"] is None else str(row["threads"])
        table.add_row(row.get("dtype", "copy"), threads, f"{median:,.1f} {unit}", f"{low:,.1f} to {high:,.1f}", remark)
    return table


def _trials(trials: dict[str, str | None]) -> str:
    """``fp32, bf16; not fp16``."""
    good = [name.replace("_", " ") for name, why in trials.items() if why is None]
    bad = [name.replace("_", " ") for name, why in trials.items() if why is not None]
    return (", ".join(good) or "none") + (f"; not {', '.join(bad)}" if bad else "")


def _versions(rows: list[dict]) -> str:
    """What differs from the tested versions, or that nothing does."""
    noted = []
    for row in (row for row in rows if row["note"]):
        tested = "" if row["tested"] is None else f"{', ' if row['installed'] else '; tested: '}{row['tested']}"
        noted.append(" ".join(filter(None, (row["library"], row["installed"], f"({row['note']}{tested})"))))
    as_tested = sum(row["tested"] is not None and row["note"] is None for row in rows)
    return "; ".join([f"{as_tested} of {len(rows)} as tested", *noted])


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
