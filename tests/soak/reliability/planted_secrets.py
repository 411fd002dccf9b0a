"""Tokens in the environment, and every byte of every artefact looked at: a matrix with a run that dies of NaN, its traces,
its snapshot, its dossier, and all that was said.
"""

from __future__ import annotations

import base64
import gzip
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.whole_runs import ROOT
from tests.soak.reliability.trials import Trial

SECRETS = {
    "HF_TOKEN": "hf_PlantedSecretOfTheHub00",
    "WANDB_API_KEY": "plantedsecretofwandb0123456789abcdef01234",
    "AWS_SECRET_ACCESS_KEY": "PlantedSecret/OfTheCloud",
    "PLANTED_NAME_ITSELF": "planted-value-77",
}
"""Neither a name nor a value may turn up."""
MATRIX = (
    "matrix",
    "--preset",
    "tiny",
    "--data",
    "embedded",
    "--device",
    "cpu",
    "--jobs",
    "1",
    "--cases",
    "gpt2_multi_cls",
    "--configs",
    "amp_bf16",
    "fp16_naive",
    "--no-follow-up",
    "--max-steps",
    "6",
    "--batch-size",
    "4",
    "--micro-batch",
    "2",
    "--seq-len",
    "32",
    "--documents",
    "400",
    "--validation-documents",
    "4",
    "--trace",
    "1",
)
EXPECTED = {
    "results.jsonl",
    "machine.json",
    "run.json",
    "output.log",
    "hardware.jsonl",
    "events.jsonl",
    "forensics.json",
    "tensors.safetensors",
    "culprit.safetensors",
    "index.html",
}
"""Without one of these the search has not seen what it is for."""


def secrets(share: float, folder: Path) -> Iterator[Trial]:
    """A trial an artefact: 4 names and 4 values are looked for in each, packed or not."""
    out = folder / "out"
    said = [_command("harness", *MATRIX, "--out", str(out), "--json"), _command("report", "build", str(out))]
    names = {path.name for path in out.rglob("*")}
    if missing := EXPECTED - names:
        raise RuntimeError(f"{', '.join(sorted(missing))} not written: {said[-1][-500:].decode(errors='replace')}")
    artefacts = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for name, content in {**artefacts, "what the matrix said": said[0], "what the report said": said[1]}.items():
        yield Trial(name, hits(content), {"bytes": len(content)})


def hits(content: bytes) -> list[str]:
    """The planted names and values in a file: as they are, in what is packed (gzip, PDF streams), in data URIs."""
    found = []
    for layer in (content, *unpacked(content)):
        found += [f"holds {name}" for name, value in SECRETS.items() if name.encode() in layer or value.encode() in layer]
    return found


def unpacked(content: bytes) -> Iterator[bytes]:
    """What lies packed in a file."""
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    if content.startswith(b"%PDF"):
        for packed in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL):
            try:
                yield zlib.decompress(packed)
            except zlib.error:
                continue
    for packed in re.findall(rb";base64,([A-Za-z0-9+/=]{32,})", content):
        yield base64.b64decode(packed + b"=" * (-len(packed) % 4))


def _command(*words: str) -> bytes:
    """A command of this program with the secrets in its environment; all it said. RuntimeError where it fails."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **SECRETS, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(
            f"python -m {words[0]} {words[1]} ended with exit code {done.returncode}: "
            f"{done.stderr[-2000:].decode(errors='replace')}"
        )
    return done.stdout + done.stderr
