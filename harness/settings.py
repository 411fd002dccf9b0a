"""A run's settings: the one declaration from which everything else about a setting follows. Torch-free.

A field of `RunSettings` made by `setting` is an option of ``case`` and ``matrix`` (`harness.options`), a field of `Request`,
part of the run id unless it says otherwise, of ``--dry-run`` and of the row. `resolve` completes what was asked by case,
preset and device. Two runs with the same `run_id` are the same experiment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from bench_cases import PRESETS, Case, DtypeConfig, lookup

ENGINES = ("local", "ray")
PARALLEL = ("ddp", "fsdp")
MAX_NORM = 1.0
SHORTEST_SEQUENCE = 4
"""<s>, a token, another, </s>."""
THE_RUN, OWN_MODEL = "the run", "your own model and data"
"""Groups of options in ``--help``."""
Hashed = bool | Literal["when changed"]
"""Whether a setting is part of the run id and of the row's ``config``. A setting added later is, when it is not at its
default: runs that were made before keep their ids."""


class SettingsError(ValueError):
    """Settings that contradict themselves, the case or the device."""


@dataclass(frozen=True)
class Setting:
    """How a setting is spelled on the command line, what may be asked, and whether it is part of the run id. ``least``: the
    smallest number allowed. ``const``: what the option means without a number. ``of_preset``: None stands for the preset's.
    ``joined``: values of an option that is repeated are joined by commas."""

    default: Any
    parse: Callable[[str], Any]
    help: str
    flag: str | None = None
    metavar: str | None = None
    choices: Sequence[str] | None = None
    const: Any = None
    least: int | None = None
    of_preset: bool = False
    joined: bool = False
    group: str = THE_RUN
    hashed: Hashed = "when changed"


def setting(default: Any, parse: Callable[[str], Any], help: str, **rest: Any) -> Any:
    """A field of `RunSettings` that can be asked for; the arguments are those of `Setting`."""
    declared = Setting(default, parse, help, **rest)
    return field(default=default, metadata={"setting": declared, "hashed": declared.hashed})


def chosen(parse: Callable[[str], Any], help: str, *, default: Any = None, hashed: bool = True, **rest: Any) -> Any:
    """A setting that `resolve` completes where nothing (or ``default``) was asked: by preset, case or device."""
    return field(metadata={"setting": Setting(default, parse, help, hashed=hashed, **rest), "hashed": hashed})


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run, fully decided. Fields without `setting` are derived, or say which experiment this is.

    ``eval_every`` 0 evaluates at the start and at the end only; ``log_every`` is the number of steps between two reads of
    the device; ``trace_steps`` is how many of the last steps are run again under the profiler. ``checkpoint_every`` 0 and
    ``mtbf_s`` None: a checkpoint on a signal only. ``world``: processes that share the run, in the manner of ``parallel``,
    one of `PARALLEL`; None for one process."""

    case: Case
    config: DtypeConfig
    seed: int = field(metadata={"hashed": False})
    preset: str = chosen(str, "default: full on a GPU, else tiny", default="auto", choices=("auto", *PRESETS))
    device: str = chosen(str, "default: the GPU if there is one", default="auto", choices=("auto", "cpu", "cuda"))
    data: str = chosen(str, "default: hub for full, embedded for tiny", metavar="embedded|hub|DIR|FILE")
    data_fingerprint: str
    sources_fingerprint: str
    weights: str = chosen(str, "default: pretrained with the hub, else scratch", metavar="scratch|pretrained|DIR")
    lr: float = chosen(float, "peak learning rate; default: the case's")
    batch_size: int = chosen(int, "rows per step; default: the preset's", least=1, of_preset=True)
    micro_batch: int = chosen(int, "rows per forward pass; must divide the batch size", least=1)
    seq_len: int = chosen(int, "tokens per row; default: the preset's", least=1)
    max_steps: int = chosen(int, "optimizer steps; default: the preset's", least=1, of_preset=True)
    warmup_steps: int
    untimed_steps: int
    eval_every: int = setting(0, int, "default: at the start and at the end only", least=0, hashed=True)
    log_every: int = chosen(int, "steps between two reads of the device", least=1, hashed=False)
    threads: int = chosen(int, "CPU threads; 0: all cores", least=0, of_preset=True)
    documents: int = chosen(int, "at most this many training documents", least=1, of_preset=True)
    validation_documents: int = chosen(int, "documents of an evaluation", least=1, of_preset=True)
    dropout: float = setting(0.0, float, "default 0: the same for every configuration", hashed=True)
    attention: str = setting(
        "auto",
        str,
        "attention backend; default: the one that takes every dtype",
        flag="--sdpa",
        choices=("auto", "math", "efficient", "flash", "cudnn"),
        hashed=True,
    )
    size: str | None = setting(
        None,
        str,
        "sizes of a model from scratch other than the preset's (n_layer=4); may be repeated",
        metavar="KEY=V[,KEY=V]",
        joined=True,
    )
    compile: bool = setting(False, bool, "torch.compile: another experiment, recorded", hashed=True)
    bucket_by_length: bool = setting(False, bool, "batches of documents of like length", hashed=True)
    text_field: str = setting("text", str, "the text's field in a .jsonl file", metavar="NAME", group=OWN_MODEL, hashed=True)
    label_field: str = setting("labels", str, "the labels' field", metavar="NAME", group=OWN_MODEL, hashed=True)
    instrument: str = setting(
        "light", str, "how much is measured; default: light", choices=("off", "light", "full"), hashed=False
    )
    trace_steps: int = setting(
        0,
        int,
        "run N steps (default 3) again under torch.profiler when training is over, into traces/",
        flag="--trace",
        const=3,
        least=0,
        hashed=False,
    )
    memory_snapshot: bool = setting(
        False,
        bool,
        "write the CUDA allocator's history at the end (on running out of memory it is written anyway)",
        hashed=False,
    )
    keep_weights: bool = setting(
        False, bool, "write the final weights of a completed run into its folder, weights.safetensors", hashed=False
    )
    checkpoint_every: int = setting(
        0,
        int,
        "write a checkpoint after every N steps; default 0: only when a signal (Ctrl-C, SIGTERM) stops the run",
        least=0,
        hashed=False,
    )
    mtbf_s: float | None = setting(
        None,
        float,
        "the machine lasts this long on average: a checkpoint every sqrt(2 x cost of one x SECONDS) seconds (Young/Daly), "
        "the cost as measured",
        flag="--mtbf",
        metavar="SECONDS",
        hashed=False,
    )
    world: int = field(default=1, metadata={"hashed": "when changed"})
    parallel: str | None = field(default=None, metadata={"hashed": "when changed"})

    @property
    def run_id(self) -> str:
        """``{case}-{config}-s{seed}-{8 hex of the settings}``: a safe file name by construction."""
        return f"{self.case.id}-{self.config.id}-s{self.seed}-{self.settings_hash}"

    @property
    def settings_hash(self) -> str:
        """First 8 hex digits of the SHA-256 of everything but the seed and the logging."""
        numerics = self.as_config()
        # A path can be spelled in several ways; its content is in the fingerprints.
        if self.data != "embedded" and not self.data.startswith("hub"):
            numerics["data"] = "files"
        if self.weights not in ("scratch", "pretrained"):
            numerics["weights"] = "files"
        text = json.dumps(numerics, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def as_config(self) -> dict[str, Any]:
        """The settings as plain data, for the record's ``config`` and for the hash."""
        plain = dataclasses.asdict(self)
        for declared in fields(self):
            hashed = declared.metadata.get("hashed", True)
            if hashed is False or (hashed == "when changed" and plain[declared.name] == declared.default):
                del plain[declared.name]
        for description in ("scenario", "in_default_matrix", "spelled"):
            del plain["case"][description]
        if plain["case"]["head_prior"] == "none":  # runs from before there was one keep their ids
            del plain["case"]["head_prior"]
        for description in ("note", "controls", "in_default_matrix"):
            del plain["config"][description]
        return plain

    def unhashed(self) -> dict[str, Any]:
        """The settings that can be asked for and are in no run id, for the row: its command needs them, too."""
        return {name: getattr(self, name) for name, declared in SETTINGS.items() if declared.hashed is False}


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(RunSettings) if "setting" in f.metadata}
"""Every setting that can be asked for, by name, in their order."""
if TYPE_CHECKING:
    Request = Any  # its fields are made of the settings, which no checker can follow
else:
    Request = make_dataclass("Request", [(name, Any, s.default) for name, s in SETTINGS.items()], frozen=True)
    Request.__module__, Request.__doc__ = __name__, "What a person asked for; None means the preset's or the case's own value."


def resolve(
    case: Case,
    config: DtypeConfig,
    seed: int,
    asked: Request,
    *,
    device: str,
    data_fingerprint: str,
    sources_fingerprint: str = "",
) -> RunSettings:
    """Complete a request; raises `SettingsError` naming what was given and what is allowed.

    ``device`` is ``cpu`` or ``cuda``, already decided; ``data_fingerprint`` identifies the content of the data and
    ``sources_fingerprint`` that of files from outside (weights, a model's configuration, a case's own file), so that a
    changed file is a new experiment.
    """
    preset = lookup("preset", choose_preset(asked.preset, device), PRESETS)
    values = {name: getattr(asked, name) for name in SETTINGS}
    _check(values, seed, device)
    for name, declared in SETTINGS.items():
        if declared.of_preset and values[name] is None:
            values[name] = preset.steps(case.id) if name == "max_steps" else getattr(preset, name)
    data = choose_data(asked.data, preset.id)
    weights = asked.weights or ("pretrained" if preset.id == "full" and data.startswith("hub") else "scratch")
    batch_size, max_steps = values["batch_size"], values["max_steps"]
    micro_batch = asked.micro_batch or math.gcd(batch_size, preset.micro_batch)
    if batch_size % micro_batch:
        raise SettingsError(f"micro_batch {micro_batch} does not divide batch_size {batch_size}")
    seq_len = asked.seq_len or preset.sequence_length(case.id)
    sizes = asked_sizes(asked.size)
    _check_sizes(sizes, case, weights)
    _check_length(seq_len, case, preset.id, weights, sizes)
    lr = asked.lr if asked.lr is not None else case.lr.of(preset.id, weights)
    if not (math.isfinite(lr) and lr > 0):
        raise SettingsError(f"lr is {lr}; it must be a positive number")
    values |= {"preset": preset.id, "device": device, "data": data, "weights": weights, "lr": lr, "seq_len": seq_len}
    values |= {"micro_batch": micro_batch, "eval_every": asked.eval_every or 0}
    values["size"] = ",".join(f"{key}={sizes[key]}" for key in sorted(sizes)) or None
    values["log_every"] = min(max_steps, asked.log_every or (1 if device == "cpu" else 10))
    return RunSettings(
        case=case,
        config=config,
        seed=seed,
        data_fingerprint=data_fingerprint,
        sources_fingerprint=sources_fingerprint,
        warmup_steps=max(1, round(max_steps * preset.warmup_steps / preset.max_steps)),
        untimed_steps=min(preset.untimed_steps, max_steps // 2),
        **values,
    )


def _check(values: Mapping[str, Any], seed: int, device: str) -> None:
    """What can be refused without the case: each setting's own limits, and settings that exclude each other."""
    for name, declared in SETTINGS.items():
        value = values[name]
        if value is not None and declared.least is not None and value < declared.least:
            raise SettingsError(f"{name} is {value}; it must be at least {declared.least}")
        if declared.choices and value not in declared.choices:
            raise SettingsError(f"{name} is {value!r}; allowed: {', '.join(declared.choices)}")
    if seed < 0:
        raise SettingsError(f"seed is {seed}; it must be at least 0")
    mtbf_s = values["mtbf_s"]
    if mtbf_s is not None and not (math.isfinite(mtbf_s) and mtbf_s > 0):
        raise SettingsError(f"mtbf is {mtbf_s:g} s; it must be a positive number of seconds")
    if mtbf_s is not None and values["checkpoint_every"]:
        raise SettingsError("--checkpoint-every and --mtbf both say how often to write a checkpoint; give one of them")
    if not 0 <= values["dropout"] < 1:
        raise SettingsError(f"dropout is {values['dropout']}; allowed: 0 up to but not including 1")
    if device == "cpu" and values["attention"] in ("efficient", "cudnn"):
        raise SettingsError(f"sdpa policy {values['attention']!r} exists on CUDA only; allowed here: auto, math, flash")


def asked_sizes(text: str | None) -> dict[str, int]:
    """``n_layer=4,n_embd=64`` as a dict; raises `SettingsError`."""
    found: dict[str, int] = {}
    for part in (text or "").split(",") if text else ():
        key, _, value = (word.strip() for word in part.partition("="))
        if not key or not value.isdecimal() or int(value) < 1 or key in found:
            raise SettingsError(f"--size {part!r}; allowed: KEY=V with a whole number from 1, each key once")
        found[key] = int(value)
    return found


def _check_sizes(sizes: Mapping[str, int], case: Case, weights: str) -> None:
    allowed = case.architecture.size_keys
    if sizes and weights != "scratch":
        raise SettingsError(f"--size is for models from scratch, and the weights are {weights}; add --weights scratch")
    for key in sizes:
        if allowed and key not in allowed:
            raise SettingsError(f"--size {key} is no size of {case.architecture.name}; allowed: {', '.join(allowed)}")


def _check_length(seq_len: int, case: Case, preset: str, weights: str, sizes: Mapping[str, int]) -> None:
    positions = case.architecture.positions(preset if weights == "scratch" else "full", sizes)
    allowed = f"allowed: {SHORTEST_SEQUENCE} to {positions}"
    if seq_len < SHORTEST_SEQUENCE:
        raise SettingsError(f"seq_len is {seq_len}; {allowed}")
    if seq_len > positions:
        who = f"the {positions} positions of {case.architecture.name} ({preset})"
        raise SettingsError(f"seq_len {seq_len} is longer than {who}; {allowed}")


def choose_preset(asked: str, device: str) -> str:
    """``auto`` is ``full`` on a GPU and ``tiny`` on a CPU."""
    return asked if asked != "auto" else "full" if device == "cuda" else "tiny"


def choose_data(asked: str | None, preset: str) -> str:
    """The default data of a preset: the hub's for ``full``, the embedded ones for ``tiny``."""
    return asked or ("hub" if preset == "full" else "embedded")
