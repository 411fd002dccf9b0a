"""From what was asked to resolved runs: the device, the data's identity, the results folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from bench_cases import DTYPE_CONFIGS, Case, DtypeConfig, lookup
from bench_cases.data import fingerprint
from harness.settings import Request, RunSettings, SettingsError, resolve
from instrument.environment import device_slug

ROOMS = ("bench_cases", "harness", "instrument", "kernels")


class OtherFiles(Exception):
    """This machine has other data, weights or model files than the one that planned a run."""


def choose_device(asked: str) -> torch.device:
    """``auto`` is the GPU if there is one."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device cuda: torch sees no GPU here; allowed: cpu (`python -m harness doctor` says more)")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def asked_configs(names: list[str] | None) -> list[DtypeConfig]:
    """The configurations to run: those named, or the default seven."""
    if not names:
        return [config for config in DTYPE_CONFIGS.values() if config.in_default_matrix]
    if names == ["all"]:
        return list(DTYPE_CONFIGS.values())
    return [lookup("dtype configuration", name, DTYPE_CONFIGS) for name in names]


def plan_run(case: Case, config: DtypeConfig, seed: int, asked: Request, device: torch.device) -> RunSettings:
    """A resolved run; raises `SettingsError`, `DataError` or `DataUnavailable`."""
    draft, model = resolve(case, config, seed, asked, device=device.type, data_fingerprint=""), case.architecture
    data = fingerprint(draft.data, **data_options(case, draft))
    return replace(
        draft,
        data_fingerprint=data,
        sources_fingerprint=sources_fingerprint(draft.weights, model.hub_id, model.build),
    )


@cache
def sources_fingerprint(weights: str, model: str, build: str) -> str:
    """SHA-256 over the files from outside that a run is made of: folders of weights and configuration, and
    the caller's own builder. Empty when there are none. Read once a process."""
    files = [
        file
        for folder in (weights, model)
        if Path(folder).is_dir()
        for file in sorted(Path(folder).iterdir())
        if file.suffix in (".json", ".safetensors", ".bin")
    ]
    files += [Path(build.rpartition(":")[0])] if ".py:" in build else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest() if files else ""


def require_planned_files(settings: RunSettings) -> None:
    """Raise `OtherFiles` where this machine's data, weights or model files are not those the run was planned with."""
    model, other = settings.case.architecture, "is not here what it is on the machine that planned the run"
    if fingerprint(settings.data, **data_options(settings.case, settings)) != settings.data_fingerprint:
        raise OtherFiles(f"--data {settings.data} {other}; put the same files on every node")
    if sources_fingerprint(settings.weights, model.hub_id, model.build) != settings.sources_fingerprint:
        raise OtherFiles(f"a file of the weights or the model {other}; put the same files on every node")


def project_sha256() -> str:
    """SHA-256 over this program's sources: a run means the same on every machine only where they are the same."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def data_options(case: Case, sizes: RunSettings) -> dict[str, object]:
    """The arguments by which a case's data are found."""
    return {
        "arch": case.architecture.id,
        "task": case.task.id,
        "text": case.task.text,
        "tokenizer": case.architecture.tokenizer,
        "max_documents": sizes.documents,
        "validation_documents": sizes.validation_documents,
        "text_field": sizes.text_field,
        "label_field": sizes.label_field,
        "seq_len": sizes.seq_len,
    }


def results_folder(asked: Path | None, device: torch.device) -> Path:
    """``--out`` names the device folder itself; the default is ``results/<device>``."""
    return asked if asked is not None else Path("results") / device_slug(device)
