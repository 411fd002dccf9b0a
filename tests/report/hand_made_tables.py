"""Tables with the columns of `report.tables`, made by hand: what the drawing is tested on."""

from __future__ import annotations

import numpy as np
import pandas as pd

from report.tables.table import Table

CASES = (
    ("gpt2_clm", "LM-Decoder", "gpt2", "mean"),
    ("roberta_mlm", "LM-Encoder", "roberta", "mean"),
    ("gpt2_multi_cls", "Cls-Multi", "gpt2", "mean"),
    ("roberta_multi_cls", "Cls-Multi", "roberta", "mean"),
    ("gpt2_single_cls", "Cls-Single", "gpt2", "mean"),
    ("roberta_single_cls", "Cls-Single", "roberta", "mean"),
)
CONFIGS = ("fp32_true", "amp_fp16", "amp_bf16", "fp16_naive", "bf16_pure", "amp_bf16_8bit", "amp_bf16_fp32_head")
MARKS = ("TINY PRESET", "EMBEDDED DATA", "CPU")
EXCLUDED = (("gpt2_clm-fp16_naive-s0-01234567", "4 timed steps of at least 50"),)
SPEED = dict(zip(CONFIGS, (1.0, 2.08, 2.2, np.nan, 2.5, 1.97, 2.11), strict=True))
STEPS = 160


def made(letter: str, **changes) -> Table:
    """The table of a figure, with fields changed."""
    name, data, summary = MAKE[letter]()
    return Table(
        **{
            "letter": letter,
            "name": name,
            "data": pd.DataFrame(data),
            "summary": pd.DataFrame(summary),
            "title": f"Finding {letter}: fp16_naive dies in every case, and everything else completes",
            "caption": "Data, n, what each mark means, method.",
            "excluded": EXCLUDED,
            "marks": MARKS,
            **changes,
        }
    )


def _cases():
    for case, column, arch, reduction in CASES:
        yield {
            "case": case,
            "column": column,
            "arch": arch,
            "loss_reduction": reduction,
            "kind": "LM" if column.startswith("LM") else "classification",
        }


def _runs(configs=CONFIGS, seeds=(0, 1)):
    for case in _cases():
        for config in configs:
            for seed in seeds:
                yield case | {"dtype_config": config, "seed": seed}


def _a():
    words = {
        "fp16_naive": ("diverged", "✗", "NaN @ 50", "optim 2/2"),
        "amp_bf16_8bit": ("poor", "!", "+0.31", "2/2 seeds"),
        "amp_fp16": ("unsupported", "–", "unsupported", ""),
    }
    cells = [
        case
        | {
            "dtype_config": config,
            "n_seeds": 2,
            "n_bad": 0,
            "step": None,
            "phase": None,
            "run_ids": "",
            **dict(
                zip(("state", "sign", "line1", "line2"), words.get(config, ("completed", "✓", "3.412", "F1 0.61")), strict=True)
            ),
        }
        for case in _cases()
        for config in CONFIGS
    ]
    return "a_stability_matrix", cells, []


def _b():
    rows = [
        case
        | {
            "dtype_config": config,
            "n": 2,
            "peak_bytes": (2.1e10 - 1e9 * i) * (1.3 if case["arch"] == "gpt2" else 1),
            "peak_kind": "allocated",
            "mfu_bf16_peak": 0.1 * speed,
            "y_kind": "bf16 peak",
            "mfu_own": 0.1 * speed * (2 if i == 0 else 1),
            "low": 0.098 * speed,
            "high": 0.103 * speed,
            "on_frontier": config == "bf16_pure",
        }
        for case in _cases()
        for i, (config, speed) in enumerate(SPEED.items())
        if np.isfinite(speed)
    ]
    return "b_efficiency_frontier", rows, []


def _c():
    rows = [
        case
        | {
            "dtype_config": config,
            "n": 2,
            "relative": speed,
            "low": speed * 0.95,
            "high": speed * 1.06,
            "samples_per_s": 37 * speed,
            "word": None if np.isfinite(speed) else "NaN @ 50",
        }
        for case in _cases()
        for config, speed in SPEED.items()
    ]
    return "c_throughput", rows, []


def _d():
    random = np.random.default_rng(0)
    rows, summary = [], []
    for run in _runs(("fp32_true", "amp_bf16", "fp16_naive", "fp16_naive_eps1e4")):
        n = 2 if run["dtype_config"] == "fp16_naive" else STEPS
        norm = np.exp(random.normal(0, 0.3, n))
        norm[n // 2] *= 30 if n > 2 else 1
        rows += [
            run
            | {
                "step": i + 1,
                "grad_norm": norm[i],
                "skipped": i == 3,
                "spike": n > 2 and i == n // 2,
                "last_finite": n == 2 and i == 1,
            }
            for i in range(n)
        ]
        summary.append(
            run
            | {
                "n_steps": n,
                "spikes": int(n > 2),
                "spikes_per_1000": 2.5,
                "relative_to_fp32": 1.0,
                "died_at": 3 if n == 2 else None,
            }
        )
    return "d_grad_norm_heartbeat", rows, summary


def _e():
    random = np.random.default_rng(1)
    rows, summary = [], []
    for run in _runs():
        large = 3_000 if run["dtype_config"] == "amp_bf16_8bit" else 30
        values = large * np.exp(random.normal(0, 0.5, STEPS))
        rows += [run | {"step": i + 1, "logit_absmax": values[i], "nonfinite": False} for i in range(STEPS)]
        summary.append(
            run
            | {
                "max": values.max(),
                "over_fp16_steps": int((values > 65504).sum()),
                "nonfinite_steps": 3 * (run["dtype_config"] == "fp16_naive"),
                "logits_per_step": 32 * 500,
            }
        )
    return "e_logit_magnitude", rows, summary


def _f():
    random = np.random.default_rng(2)
    rows, summary = [], []
    for run in _runs(("amp_bf16",), seeds=(0,)):
        for bucketed in (False, True) if run["case"] == "gpt2_multi_cls" else (False,):
            share = np.sort(np.ones(STEPS) if run["kind"] == "LM" else random.uniform(0.3, 0.9, STEPS))
            rows += [
                run
                | {
                    "order": i,
                    "real_tokens": int(16384 * share[i]),
                    "tokens": 16384,
                    "mfu_all": 0.4,
                    "mfu_real": 0.4 * share[i],
                    "y_kind": "bf16 peak",
                    "bucketed": bucketed,
                }
                for i in range(STEPS)
            ]
            summary.append(
                run | {"tax": 1 - share.mean(), "cv_real": share.std() / share.mean(), "cv_all": 0.01, "bucketed": bucketed}
            )
    return "f_padding_tax", rows, summary


def _g():
    random = np.random.default_rng(3)
    rows, summary = [], []
    for run in _runs(("fp32_true", "amp_bf16", "fp16_naive", "fp16_naive_eps1e4")):
        if run["kind"] == "LM":
            continue
        run = run | {"kind": "Single-label" if run["column"] == "Cls-Single" else "Multi-label"}
        n = 2 if run["dtype_config"] == "fp16_naive" else STEPS
        loss = 0.1 + np.exp(-np.arange(n) / 60) + random.normal(0, 0.01, n)
        difference = random.normal(0, 0.002, n) * (run["dtype_config"] != "fp32_true")
        rows += [run | {"step": i + 1, "loss": loss[i], "minus_reference": difference[i]} for i in range(n)]
        summary.append(run | {"died_at": 3 if n == 2 else None, "final_minus_reference": difference[-1]})
    return "g_loss_scale_inversion", rows, summary


def _h():
    alive = [config for config in CONFIGS if np.isfinite(SPEED[config])]
    rows = [
        {
            "dtype_config": config,
            "side": side,
            "relative": SPEED[config] * (1 if side == "LM" else 0.9 + 0.04 * i),
            "low": SPEED[config] * 0.88,
            "high": SPEED[config] * 1.06,
            "n": 2,
            "rank": place + 1,
            "tie_group": {"amp_bf16": 1, "amp_bf16_fp32_head": 1, "amp_fp16": 1}.get(config, 10 + i),
        }
        for side, order in (("LM", (4, 2, 5, 1, 3, 0)), ("classification", (2, 4, 1, 5, 3, 0)))
        for place, i in enumerate(order)
        for config in [alive[i]]
    ]
    return "h_rank_correlation", rows, [{"tau": 0.6, "tau_low": -0.2, "tau_high": 1.0, "n_configs": 6, "note": ""}]


MAKE = {"A": _a, "B": _b, "C": _c, "D": _d, "E": _e, "F": _f, "G": _g, "H": _h}
