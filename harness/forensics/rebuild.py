"""A finished run's settings and training again, from nothing but its own record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from bench_cases import Case, DtypeConfig
from bench_cases.data import fingerprint
from bench_cases.data.batches import Batches
from bench_cases.models import build_model, weights_sha256
from harness.forensics.stored import RebuildError
from harness.planning import choose_device, data_options, sources_fingerprint
from harness.precision import Precision
from harness.run.execute import load_run_data, make_batches, model_request
from harness.settings import RunSettings
from harness.training import Training
from instrument.environment import capture
from instrument.results.schemas import RunRecord

SAME_ENVIRONMENT = ("torch_version", "gpu", "cpu", "cpu_capability")
"""What of a record's ``env`` decides whether the same settings give the same bits."""


@dataclass(frozen=True)
class Rebuilt:
    """A run's parts. ``warnings`` say what of the machine differs: the run may then go another way."""

    settings: RunSettings
    model: torch.nn.Module
    batches: Batches
    valid_vocab: int | None
    warnings: tuple[str, ...]

    def training(self, config: DtypeConfig | None = None) -> Training:
        """A training under the run's configuration or a changed one, all of them over the one model: whoever is
        done with it closes its ``precision``, before the next is made."""
        settings = self.settings if config is None else replace(self.settings, config=config)
        precision = Precision(
            settings.config,
            torch.device(settings.device),
            attention=settings.attention,
            threads=settings.threads,
            compiled=False,
        )
        try:
            return Training.prepare(settings, self.model, self.batches, precision, self.valid_vocab)
        except BaseException:
            precision.close()
            raise


def settings_of(record: RunRecord) -> RunSettings:
    """The run's settings; raises `RebuildError` naming what is not as it was (data, weights, the declaration)."""
    try:
        config = dict(record.config)
        case = msgspec.convert(config.pop("case") | {"scenario": record.scenario}, Case)
        dtype_config = msgspec.convert(config.pop("config"), DtypeConfig)
        settings = RunSettings(
            case=case, config=dtype_config, seed=record.seed, log_every=1, instrument=record.instrument or "light", **config
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RebuildError(f"{record.run_id} was recorded by another version of this program: {error}") from error
    choose_device(settings.device)  # a GPU's run needs a GPU
    now = replace(
        settings,
        data_fingerprint=fingerprint(settings.data, **data_options(case, settings)),
        sources_fingerprint=sources_fingerprint(settings.weights, case.architecture.hub_id, case.architecture.build),
    )
    if now.run_id != record.run_id:
        changed = ", ".join(_differences(record.config, now.as_config())) or "how settings are hashed"
        raise RebuildError(f"{record.run_id} cannot be made again: it would be {now.run_id} now (differs: {changed})")
    return now


def rebuild(record: RunRecord) -> Rebuilt:
    """The run's model, batches and settings, proven to be the same by the hashes in its record; raises
    `RebuildError`, or what loading data and weights raises."""
    settings = settings_of(record)
    data = load_run_data(settings)
    model = build_model(model_request(settings, data))
    batches = make_batches(settings, data)
    for what, recorded, now in (
        ("initial weights", record.init_sha256, weights_sha256(model)),
        ("batches", record.data_sha256, batches.sha256(settings.max_steps)),
    ):
        if recorded is not None and recorded != now:
            raise RebuildError(
                f"{record.run_id} cannot be made again: its {what} differ (sha256 {recorded[:12]} then, "
                f"{now[:12]} now; the run was made with torch {record.env.get('torch_version')}, this is "
                f"{torch.__version__})"
            )
    vocabulary = data.valid_vocab if settings.case.task.head != "classification" else None
    return Rebuilt(settings, model, batches, vocabulary, tuple(_other_machine(record, settings)))


def _other_machine(record: RunRecord, settings: RunSettings) -> Iterator[str]:
    here = capture(torch.device(settings.device))
    for name in SAME_ENVIRONMENT:
        if name in record.env and record.env[name] != here.get(name):
            yield f"{name} was {record.env[name]} and is {here.get(name)}"
    if settings.compile:
        yield "the run was compiled, and replays are eager"


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of what differs between two plain trees, with both values where they are short."""
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} {str(a)[:12]!r} -> {str(b)[:12]!r}"
