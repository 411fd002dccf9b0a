"""Simulated worlds whose truth is known: rows in memory, for the report's own verdicts to judge.

A world is a folder of one question (a case's table, or one claim) at one setting. The losses and speeds of every run scatter,
fp32_true's too, so that paired differences scatter by 1 %; a run that dies does so with the setting's rate, each on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bench_cases import CASES, DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import EvaluationRecord, RunRecord
from report.hypotheses import h1_to_h3, p1_to_p4
from report.hypotheses.evidence import REFUTED, SUPPORTED, EvidenceBase
from report.significance import RARE
from report.tables.choice import case_tables
from report.tables.judgement import MARGIN_LOSS, MARGIN_NATS, MARGIN_SPEED

SETTINGS = ("no effect", "at the margin", "3 x the margin", "deaths 10 %", "deaths 30 %", "deaths 50 %")
SCATTER = 0.01
"""Standard deviation of a paired difference: of log speeds, of nats, of a classifier's loss relative to fp32_true's."""
STEPS = 60
DEFAULT = tuple(config.id for config in DTYPE_CONFIGS.values() if config.in_default_matrix)
LM, MULTI, SINGLE = "gpt2_clm", "gpt2_multi_cls", "gpt2_single_cls"
ROBERTA_MULTI, ROBERTA_SINGLE = "roberta_multi_cls", "roberta_single_cls"
BATCH, TOKENS = 32, 32 * 512
WAVE = np.tile([1.0, -1.0], STEPS // 2)  # mean 0, so that a step's share of real tokens varies by exactly what is asked


class World(Folder):
    """A results folder that lies in memory."""

    def __init__(self, runs: list[RunRecord], steps: dict[str, dict[str, np.ndarray]]) -> None:
        self.path = Path("world")
        self.runs = tuple(runs)
        self.machine, self.kernels, self.overhead, self.fit, self.kernel_check = {}, None, None, None, None
        self._steps = steps

    def steps(self, run_id: str) -> dict[str, np.ndarray]:
        return self._steps[run_id]

    def evaluations(self, run_id: str) -> list[EvaluationRecord]:
        return []


def _template(case_id: str, config: str) -> RunRecord:
    case = CASES[case_id]
    return RunRecord(
        run_id="template",
        case=case_id,
        scenario=case.scenario,
        arch=case.architecture.id,
        task=case.task.id,
        loss=case.task.loss,
        loss_reduction=case.loss_reduction,
        dtype_config=config,
        seed=0,
        preset="full",
        device="simulated",
        data_source="hub",
        weights_source="scratch",
        status="completed",
        steps_done=STEPS,
        max_steps=STEPS,
        timed_steps=STEPS,
        batch_size=BATCH,
        micro_batch=BATCH,
        seq_len=512,
        loss_initial=10.0,
        train_loss_final=3.0,
        mfu_bf16_peak=0.4,
        peak_allocated_bytes=10**10,
        config=_CONFIG,
        flags={"simulated": True},
    )


_CONFIG = {"untimed_steps": 0, "device": "cuda"}
_TEMPLATES: dict[tuple[str, str], RunRecord] = {}


@dataclass
class Maker:
    """Collects the runs of one world. ``loss`` and ``log_speed``: the run's own, against fp32_true; both scatter."""

    random: np.random.Generator
    n: int

    def __post_init__(self) -> None:
        self.runs: list[RunRecord] = []
        self.logs: dict[str, dict[str, np.ndarray]] = {}

    def cell(
        self,
        case: str,
        config: str,
        *,
        loss: float = 0.0,
        log_speed: float = 0.0,
        death_rate: float = 0.0,
        overflow_rate: float = 0.0,
        log_mfu: float = 0.0,
        variation: float = 0.0,
    ) -> None:
        """n seeds of a case and configuration. Losses of classifiers are relative to fp32_true's, of language models in nats;
        ``log_mfu`` and ``variation`` are of the steps' MFU over real tokens."""
        template = _TEMPLATES.setdefault((case, config), _template(case, config))
        for seed in range(self.n):
            gap, speed, rate, spread = self.random.normal(0.0, (SCATTER / 2**0.5, SCATTER / 2**0.5, SCATTER, SCATTER / 4))
            dies = self.random.random() < death_rate
            run_id = f"{case}-{config}-s{seed}-0badcafe"
            final = 3.0 * (1 + loss + gap) if "cls" in case else 3.0 + loss + gap
            self.runs.append(
                msgspec.structs.replace(
                    template,
                    run_id=run_id,
                    seed=seed,
                    val_loss=None if dies else final,
                    status="diverged" if dies else "completed",
                    divergence_step=STEPS if dies else None,
                    samples_per_s=100.0 * math.exp(log_speed + speed),
                    final_weights_sha256=run_id,
                )
            )
            overflows = self.random.random() < overflow_rate
            mfu = 0.4 * math.exp(log_mfu + rate) * (1 + (variation + spread if variation else 0.0) * WAVE * _UNIT)
            self.logs[run_id] = _STEPS | {
                "grad_norm": np.array([gap, speed, rate, spread]),
                "logit_absmax": _LARGE if overflows else _SMALL,
                "mfu_bf16_peak_real_tokens": mfu,
            }

    def world(self) -> World:
        """The folder."""
        return World(self.runs, self.logs)


_UNIT = 1 / float(np.std(WAVE, ddof=1))
_SMALL, _LARGE = np.full(STEPS, 20.0), np.full(STEPS, 1e5)
_STEPS = {
    "step": np.arange(1, STEPS + 1),
    "loss": np.full(STEPS, 3.0),
    "step_time_s": np.full(STEPS, 0.3),
    "logit_nonfinite": np.zeros(STEPS),
    "logit_over_fp16": np.zeros(STEPS),
    "real_tokens": np.full(STEPS, TOKENS),
    "tokens": np.full(STEPS, TOKENS),
    "mfu_bf16_peak": np.full(STEPS, 0.4),
}


@dataclass(frozen=True)
class Question:
    """``make(maker, effect, death_rate)`` fills a world, ``ask`` gives its answers. ``wrong``: setting -> answers that are
    false there; ``right``: setting -> the answer whose frequency is the power. ``effect`` counts margins."""

    make: Callable[[Maker, float, float], None]
    ask: Callable[[World], set[str]]
    wrong: dict[str, tuple[str, ...]]
    right: dict[str, str]


def _claim(judge: Callable) -> Callable[[World], set[str]]:
    return lambda world: {judge(EvidenceBase.of(world)).verdict}


def _answers(world: World) -> set[str]:
    (table,) = case_tables(world)
    rivals = [cell for cell in table.cells if cell.dtype_config != "fp32_true"]
    answers = {"avoid"} if any(cell.verdict == "avoid" for cell in rivals) else set()
    answers |= {"every avoid"} if all(cell.verdict == "avoid" for cell in rivals) else set()
    return answers | ({"recommended"} if table.use not in (None, "fp32_true") else set())


def _worse(maker: Maker, effect: float, deaths: float) -> None:
    for config in DEFAULT:
        rival = config != "fp32_true"
        maker.cell(
            LM, config, loss=effect * MARGIN_NATS * rival, log_speed=MARGIN_SPEED * 20 * rival, death_rate=deaths * rival
        )


def _slower(maker: Maker, effect: float, deaths: float) -> None:
    for config in DEFAULT:
        rival = config != "fp32_true"
        maker.cell(LM, config, log_speed=-effect * MARGIN_SPEED * rival, death_rate=deaths * rival)


def _one_dies(maker: Maker, effect: float, deaths: float) -> None:
    for config in DEFAULT:
        maker.cell(
            LM, config, log_speed=MARGIN_SPEED * 20 * (config != "fp32_true"), death_rate=deaths * (config == "fp16_naive")
        )


def _h1(maker: Maker, effect: float, deaths: float) -> None:
    for case in (SINGLE, MULTI):
        maker.cell(case, "fp32_true")
        maker.cell(case, "fp16_naive", death_rate=(deaths or RARE * effect) * (case == MULTI))


def _h2(maker: Maker, effect: float, deaths: float) -> None:
    for case in (MULTI, ROBERTA_MULTI):
        maker.cell(case, "fp32_true")
        gain = (1.0 if deaths else effect) * MARGIN_SPEED * (case == ROBERTA_MULTI)
        maker.cell(case, "bf16_pure", log_speed=gain, death_rate=deaths)


def _h3(maker: Maker, effect: float, deaths: float) -> None:
    for case in (SINGLE, ROBERTA_SINGLE):
        for config in ("fp32_true", "amp_bf16", "bf16_pure"):
            rival = config != "fp32_true"
            maker.cell(case, config, loss=effect * MARGIN_LOSS * rival * (case == SINGLE), death_rate=deaths * rival)


def _h3_power(maker: Maker, effect: float, deaths: float) -> None:
    for case in (SINGLE, ROBERTA_SINGLE):
        for config in ("fp32_true", "amp_bf16", "bf16_pure"):
            maker.cell(case, config, death_rate=deaths * (config == "bf16_pure") * (case == SINGLE))


def _p1(maker: Maker, effect: float, deaths: float) -> None:
    maker.cell(MULTI, "fp32_true", overflow_rate=deaths or RARE * effect)


def _p2(maker: Maker, effect: float, deaths: float) -> None:
    for config in DEFAULT:
        rival = config not in ("fp32_true", "bf16_pure")
        death_rate = deaths * (config == "bf16_pure")
        maker.cell(LM, config, log_speed=effect * MARGIN_SPEED * rival - (config == "fp32_true"), death_rate=death_rate)


def _p3(maker: Maker, effect: float, deaths: float) -> None:
    maker.cell(LM, "amp_bf16")
    maker.cell(MULTI, "amp_bf16", log_mfu=-effect * MARGIN_SPEED, variation=effect * p1_to_p4.SMALLEST_CV)


def _p4(maker: Maker, effect: float, deaths: float) -> None:
    for case in (LM, MULTI):
        maker.cell(case, "fp32_true")
        faster = effect * MARGIN_SPEED
        maker.cell(case, "amp_bf16", log_speed=0.7 + faster * (case == MULTI) * (not deaths))
        ahead = 3 * MARGIN_SPEED if deaths else faster * (case == LM)
        maker.cell(case, "bf16_pure", log_speed=0.7 + ahead, death_rate=deaths * (case == MULTI))


NONE, MARGIN, CLEAR, RARELY, SOMETIMES, OFTEN = SETTINGS
BOTH = (SUPPORTED, REFUTED)
RATE = {NONE: (SUPPORTED,), MARGIN: BOTH, CLEAR: (REFUTED,), RARELY: BOTH, SOMETIMES: (REFUTED,), OFTEN: (REFUTED,)}
"""What is false of a claim about a rate, of which 1 in 10 is the margin."""
QUESTIONS = {
    "worse": Question(
        _worse,
        _answers,
        {NONE: ("avoid",), MARGIN: ("avoid", "recommended"), CLEAR: ("recommended",), RARELY: ("avoid",)},
        {NONE: "recommended", CLEAR: "avoid", SOMETIMES: "avoid", OFTEN: "avoid"},
    ),
    "slower": Question(
        _slower,
        _answers,
        {NONE: ("avoid",), MARGIN: ("avoid", "recommended"), CLEAR: ("recommended",), RARELY: ("avoid",)},
        {CLEAR: "avoid"},
    ),
    "one dies": Question(_one_dies, _answers, {RARELY: ("avoid",)}, {SOMETIMES: "avoid", OFTEN: "avoid"}),
    "H1": Question(
        _h1, _claim(h1_to_h3.judge_h1), RATE, {NONE: REFUTED, CLEAR: SUPPORTED, SOMETIMES: SUPPORTED, OFTEN: SUPPORTED}
    ),
    "H2": Question(
        _h2,
        _claim(h1_to_h3.judge_h2),
        {NONE: (SUPPORTED,), CLEAR: (REFUTED,)} | dict.fromkeys((MARGIN, RARELY, SOMETIMES, OFTEN), BOTH),
        {NONE: REFUTED, CLEAR: SUPPORTED},
    ),
    "H3": Question(
        _h3,
        _claim(h1_to_h3.judge_h3),
        {NONE: (SUPPORTED,), CLEAR: (REFUTED,)} | dict.fromkeys((MARGIN, RARELY, SOMETIMES, OFTEN), BOTH),
        {NONE: REFUTED, CLEAR: SUPPORTED},
    ),
    "H3, only GPT-2 dies": Question(
        _h3_power,
        _claim(h1_to_h3.judge_h3),
        dict.fromkeys((RARELY, SOMETIMES, OFTEN), (REFUTED,)),
        dict.fromkeys((SOMETIMES, OFTEN), SUPPORTED),
    ),
    "P1": Question(
        _p1, _claim(p1_to_p4.judge_p1), RATE, {NONE: REFUTED, CLEAR: SUPPORTED, SOMETIMES: SUPPORTED, OFTEN: SUPPORTED}
    ),
    "P2": Question(
        _p2,
        _claim(p1_to_p4.judge_p2),
        {NONE: (REFUTED,), MARGIN: BOTH, CLEAR: (SUPPORTED,), RARELY: (REFUTED,)},
        {NONE: SUPPORTED, CLEAR: REFUTED, SOMETIMES: REFUTED, OFTEN: REFUTED},
    ),
    "P3": Question(
        _p3,
        _claim(p1_to_p4.judge_p3),
        {NONE: (SUPPORTED,), MARGIN: BOTH, CLEAR: (REFUTED,)},
        {NONE: REFUTED, CLEAR: SUPPORTED},
    ),
    "P4": Question(
        _p4,
        _claim(p1_to_p4.judge_p4),
        {NONE: (SUPPORTED,), MARGIN: BOTH, CLEAR: (REFUTED,), RARELY: (SUPPORTED,)},
        {NONE: REFUTED, CLEAR: SUPPORTED, SOMETIMES: SUPPORTED, OFTEN: SUPPORTED},
    ),
}
EFFECTS = {
    NONE: (0.0, 0.0),
    MARGIN: (1.0, 0.0),
    CLEAR: (3.0, 0.0),
    RARELY: (0.0, 0.1),
    SOMETIMES: (0.0, 0.3),
    OFTEN: (0.0, 0.5),
}


def frequencies(name: str, setting: str, n: int, worlds: int, seed: int) -> dict[str, float]:
    """How often each answer is given to a question in ``worlds`` worlds of n seeds."""
    question = QUESTIONS[name]
    random = np.random.default_rng([seed, [*QUESTIONS].index(name), SETTINGS.index(setting), n])
    counted: dict[str, int] = {}
    for _ in range(worlds):
        maker = Maker(random, n)
        question.make(maker, *EFFECTS[setting])
        for answer in question.ask(maker.world()):
            counted[answer] = counted.get(answer, 0) + 1
    return {answer: hits / worlds for answer, hits in sorted(counted.items())}
