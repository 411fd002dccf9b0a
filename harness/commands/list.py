"""``python -m harness list``: the tables of what can be run. Torch-free."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS
from instrument.terminal import plain_table, rich_console

NOTES = """\
Language models read OpenWebText, the others EUR-Lex. CE: softmax cross-entropy. Learning rates: tiny, scratch, pretrained.
Attention's products (scores, and their use) run in the compute dtype on a GPU; on a CPU, whose backend is math, in fp32 under \
every configuration. A row's attention_dtype says which.
* not in the default matrix; run by name, or with --cases all / --configs all"""
LOSS_WORDS = {"cross_entropy": "CE", "bce_with_logits": "BCE"}


def list_command(options: argparse.Namespace) -> int:
    """Print the registries; ``--json`` prints every field of every declaration."""
    if options.json:
        print(json.dumps(listing(), indent=1))
    else:
        print_tables()
    return 0


def listing() -> dict[str, list[dict]]:
    """All declarations as plain data."""
    registries = {"cases": CASES, "dtype_configs": DTYPE_CONFIGS, "presets": PRESETS}
    return {name: [asdict(entry) for entry in registry.values()] for name, registry in registries.items()}


def print_tables() -> None:
    """The registries as tables on standard output: this command's result."""

    console = rich_console()
    for table in (_cases(), _configs(), _presets()):
        console.print(table, "")
    console.print(NOTES)


def _short(rate: float) -> str:
    """``2e-3``."""
    digits, _, exponent = f"{rate:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _star(entry) -> str:
    return entry.id + ("" if entry.in_default_matrix else " *")


def _table(title: str, *columns: str):
    """The first column (the id, to be copied) is never broken."""
    return plain_table(*columns, fold=columns[1:], title=title)


def _cases():
    table = _table("Cases", "id", "", "architecture and task", "loss", "learning rates")
    for case in CASES.values():
        table.add_row(
            _star(case),
            case.scenario,
            f"{case.architecture.name} {case.task.name}",
            LOSS_WORDS.get(case.task.loss, case.task.loss) + ("" if case.loss_reduction == "mean" else " sum"),
            " ".join(map(_short, (case.lr.tiny, case.lr.scratch, case.lr.pretrained))),
        )
    return table


def _configs():
    table = _table("Dtype configurations", "id", "weights", "compute", "head", "loss", "AdamW", "scaling")
    for config in DTYPE_CONFIGS.values():
        adamw = config.optimizer.replace("_", " ") + (f" eps {_short(config.eps)}" if config.eps != 1e-8 else "")
        compute = f"AMP {config.compute}" if config.autocast else config.compute + (" TF32" if config.tf32 else "")
        table.add_row(
            _star(config), config.weights, compute, config.head, config.loss, adamw, "dynamic" if config.scaler else "none"
        )
    return table


def _own(values: Mapping[str, int]) -> str:
    """``, gpt2_clm 1024``: the cases with a value of their own, those with the same one together."""
    cases = {value: [case for case in CASES if values.get(case) == value] for value in dict.fromkeys(values.values())}
    return "".join(f", {' '.join(names)} {value}" for value, names in cases.items())


def _presets():
    table = _table("Presets", "id", "batch (micro)", "sequence", "steps (warm-up)", "documents", "seeds")
    for preset in PRESETS.values():
        lengths, steps = (_own(values) for values in (preset.seq_len_of, preset.max_steps_of))
        table.add_row(
            preset.id,
            f"{preset.batch_size} ({preset.micro_batch})",
            f"{preset.seq_len}{lengths}",
            f"{preset.max_steps} ({preset.warmup_steps}){steps}",
            f"{preset.documents:,}",
            " ".join(map(str, preset.seeds)),
        )
    return table
