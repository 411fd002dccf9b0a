"""The runs of a matrix in their order, and ``--shard i/n``: the part of them that one of n machines runs.

Shards are neighbours in the planned order, cut where the tokens to train on are split evenly: the configurations
of a case and seed stay on one machine as far as they can, so that their speeds are compared on one machine, and a
machine prepares few data sets. Every machine cuts the same plan in the same places, without asking another.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS, Case
from bench_cases.own import case_for_model, find_case
from harness import options as arguments
from harness.planning import asked_configs, plan_run
from harness.settings import RunSettings, SettingsError, choose_preset


def plan_matrix(options: argparse.Namespace, device: torch.device) -> list[RunSettings]:
    """All runs, configurations of a case next to each other in a rotating order, so that a warming
    machine favours none of them."""
    cases, configs = asked_cases(options), asked_configs(options.configs)
    preset = PRESETS[choose_preset(options.preset, device.type)]
    seeds = options.seeds if options.seeds is not None else preset.seeds
    asked = arguments.request(options)
    runs = []
    for round_number, (seed, case) in enumerate((seed, case) for seed in seeds for case in cases):
        turn = round_number % len(configs)
        runs += [plan_run(case, config, seed, asked, device) for config in configs[turn:] + configs[:turn]]
    return distinct(runs)


def asked_cases(options: argparse.Namespace) -> list[Case]:
    """The cases to run: those named, or one for ``--model``, or the default six."""
    if options.model:
        if not options.task or options.cases:
            raise SettingsError("--model goes with --task and without --cases")
        return [case_for_model(options.model, options.task)]
    if options.task:
        raise SettingsError("--task goes with --model; a case id has its task in it")
    if not options.cases:
        return [case for case in CASES.values() if case.in_default_matrix]
    if options.cases == ["all"]:
        return list(CASES.values())
    return [find_case(name) for name in options.cases]


def distinct(runs: list[RunSettings]) -> list[RunSettings]:
    """Each run once, in order: two runs with one id would write into each other's files."""
    return list({settings.run_id: settings for settings in runs}.values())


def controls_of(settings: RunSettings) -> list[RunSettings]:
    """The runs that tell a diverged run's cause: same case and seed, one thing changed."""
    return [replace(settings, config=DTYPE_CONFIGS[name]) for name in settings.config.controls]


@dataclass(frozen=True)
class Shard:
    """The ``index``-th (from 1) of ``count`` shards."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/4``; raises `SettingsError`."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None:
            raise SettingsError(f"--shard {text!r}; allowed: i/n, such as 2/4, with i from 1 to n")
        shard = cls(int(found[1]), int(found[2]))
        if not 1 <= shard.index <= shard.count:
            n = max(1, shard.count)
            raise SettingsError(f"--shard {text}: there is no such shard; allowed: 1/{n} to {n}/{n}")
        return shard

    def of(self, runs: Sequence[RunSettings]) -> list[RunSettings]:
        """The runs of this shard, in their order. A run belongs to the shard in which its middle token lies, so every
        run is in one shard, and a shard has its even share of all tokens to within one run's."""
        total, before, mine = sum(tokens(run) for run in runs), 0, []
        for run in runs:
            middle_doubled = 2 * before + tokens(run)
            if middle_doubled * self.count // (2 * total) == self.index - 1:
                mine.append(run)
            before += tokens(run)
        return mine

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def tokens(run: RunSettings) -> int:
    """Tokens a run trains on, padding included: what its cost goes with."""
    return run.max_steps * run.batch_size * run.seq_len
