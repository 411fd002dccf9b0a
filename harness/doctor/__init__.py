"""``python -m harness doctor``: what this machine can do, and what will not work here and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from harness.doctor import device as device_facts
from harness.doctor import host
from harness.planning import choose_device, results_folder
from instrument.count import count
from instrument.environment import capture, version
from instrument.nvml import Nvml


def doctor_command(options: argparse.Namespace) -> int:
    """Examine and report; exit code 5 when torch cannot even multiply two matrices on the device."""
    from harness.doctor.terminal import show
    from harness.exit_codes import ENVIRONMENT, OK

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
            "why_no_gpu": device_facts.why_no_gpu(nvml),
            "driver": nvml.driver(),
            "gpus": device_facts.gpus(nvml),
        }
    findings |= {
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
            "triton": version("triton"),
        },
        "cpu": host.processor(),
        "memory": host.memory(),
        "disk": host.disk(_results_folder(out, device)),
        "compilers": host.compilers(),
        "versions": host.library_versions(),
        "products": device_facts.products(device),
        "attention": device_facts.attention(device),
        "eight_bit_adamw": device_facts.eight_bit_adamw(device),
    }
    findings["configurations"] = device_facts.configurations(device, findings["eight_bit_adamw"])
    findings["will_not_work"] = will_not_work(findings)
    return findings


def measure_into(out: Path | None) -> dict[str, object]:
    """Measure this machine's rates and keep them in ``machine.json`` of the results folder."""
    from harness.doctor.measure import measure
    from harness.doctor.measured import merge_measured, refuse_another_machine

    device = choose_device("auto")
    folder, machine = _results_folder(out, device), capture(device)
    refuse_another_machine(folder, machine)
    measured = measure(device)
    merge_measured(folder, machine, measured)
    return measured | {"file": str(folder / "machine.json")}


def _results_folder(out: Path | None, device: torch.device) -> Path:
    """Where results would go; ``results`` itself when a broken GPU does not even tell its name."""
    try:
        return results_folder(out, device)
    except RuntimeError:
        return Path("results")


def will_not_work(findings: dict) -> list[dict[str, str]]:
    """``{what, why}`` of everything that this machine cannot do, the gravest first."""
    rows = [_row(f"matrix products in {dtype}", why) for dtype, why in findings["products"].items() if why]
    if findings["why_no_gpu"]:
        rows.append(_row("runs on a GPU, --preset full in useful time", findings["why_no_gpu"]))
    for gpu in findings["gpus"]:
        rows += _gpu_rows(gpu)
    rows += [
        _row(f"configuration {row['config']}", row["reason"]) for row in findings["configurations"] if not row["supported"]
    ]
    rows += _attention_rows(findings["attention"])
    rows += _compile_rows(findings)
    if not findings["disk"]["writable"]:
        rows.append(_row("writing results", f"{findings['disk']['folder']} cannot be written; choose another with --out"))
    rows += [
        _row(f"what needs {row['library']}", "it is not installed")
        for row in findings["versions"]
        if row["installed"] is None and row["library"] != "triton"
    ]
    return rows


def _gpu_rows(gpu: dict) -> list[dict[str, str]]:
    who, rows, nvml = f"GPU {gpu['index']} ({gpu['name']})", [], gpu["nvml"]
    if not gpu["has_code"]:
        rows.append(_row(f"torch on {who}", f"this build holds no code for capability {gpu['capability']}"))
    if gpu["card"] is None:
        rows.append(_row(f"estimated time and MFU on {who}", "no published peak is known for this name, and none is guessed"))
    if nvml["compute_mode"] in ("exclusive_process", "prohibited"):
        rows.append(_row(f"two runs at a time on {who}", f"its compute mode is {nvml['compute_mode']}"))
    others = [process for process in nvml["processes"] or [] if process["used_bytes"]]
    if others and nvml["memory_free_bytes"] is not None and nvml["memory_free_bytes"] < 0.9 * gpu["total_bytes"]:
        rows.append(
            _row(
                f"all memory and fair timing on {who}", f"{count(len(others), 'process holds', 'processes hold')} memory there"
            )
        )
    return rows


def _attention_rows(table: dict[str, dict[str, str | None]]) -> list[dict[str, str]]:
    """One row per backend that refuses something, since ten rows of the same reason help nobody."""
    rows = []
    for policy, trials in table.items():
        refused = [name.replace("_masked", " with a mask") for name, why in trials.items() if why]
        if refused:
            rows.append(_row(f"--sdpa {policy} in {', '.join(refused)}", next(why for why in trials.values() if why)))
    return rows


def _compile_rows(findings: dict) -> list[dict[str, str]]:
    tools, rows, cuda = findings["compilers"], [], findings["device"] == "cuda"
    needed = "cc" if cuda else "cxx"
    if tools[needed] is None:
        rows.append(
            _row(
                "--compile",
                f"no {'C' if cuda else 'C++'} compiler is found "
                f"({'CC, gcc, clang' if cuda else 'CXX, g++, clang++'}); install g++",
            )
        )
    if cuda and findings["torch"]["triton"] is None:
        rows.append(_row("Triton kernels and --compile", "triton is not installed"))
    if cuda and not tools["python_headers"]:
        rows.append(_row("Triton kernels and --compile", "Python.h is missing (Debian, Ubuntu: install python3-dev)"))
    return rows


def _row(what: str, why: str) -> dict[str, str]:
    return {"what": what, "why": why}
