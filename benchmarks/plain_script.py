"""The yardstick: the same eight figures as one would write them in an afternoon, json, pandas, seaborn.

    python plain_script.py RESULTS_FOLDER OUT_FOLDER

Straightforward on purpose and not slow on purpose: defaults of the libraries, each log read once,
every row drawn. It checks nothing, marks nothing and writes no page.
"""

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

matplotlib.use("Agg")


IDENTITY = ["run_id", "case", "arch", "dtype_config", "seed"]
HEARTBEAT = ["fp16_naive", "amp_bf16", "fp32_true"]


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of runs, and rows of steps joined to them."""
    runs = pd.DataFrame([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()])
    logs = []
    for run in runs.to_dict("records"):
        path = folder / "training_logs" / f"run_{run['run_id']}.jsonl"
        log = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
        logs.append(log.assign(**{name: run[name] for name in IDENTITY}))
    return runs, pd.concat(logs, ignore_index=True)


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sns.set_theme(style="ticks", context="paper")
    runs, steps = read(folder)
    reference = runs[runs["dtype_config"] == "fp32_true"].set_index(["case", "seed"])
    runs["relative"] = [
        run["samples_per_s"] / reference.loc[(run["case"], run["seed"]), "samples_per_s"] for run in runs.to_dict("records")
    ]

    def save(name: str, figure=None) -> None:
        (figure or plt.gcf()).savefig(out / f"{name}.svg")
        (figure or plt.gcf()).savefig(out / f"{name}.png", dpi=300)
        plt.close("all")

    alive = runs.assign(ok=(runs["status"] == "completed").astype(float))
    plt.figure(figsize=(7, 4))
    sns.heatmap(alive.pivot_table(index="dtype_config", columns="case", values="ok"), annot=True)
    save("a")
    save(
        "b",
        sns.relplot(
            runs,
            x="peak_allocated_bytes",
            y="mfu_bf16_peak",
            hue="dtype_config",
            style="arch",
            col="task",
            col_wrap=2,
            height=2.5,
        ).figure,
    )
    save(
        "c",
        sns.catplot(
            runs, x="relative", y="dtype_config", hue="dtype_config", col="case", col_wrap=2, kind="bar", height=1.8
        ).figure,
    )
    grid = sns.relplot(
        steps[steps["dtype_config"].isin(HEARTBEAT)],
        x="step",
        y="grad_norm",
        hue="dtype_config",
        row="case",
        kind="line",
        units="run_id",
        estimator=None,
        height=1.5,
        aspect=4,
    )
    grid.set(yscale="log")
    save("d", grid.figure)
    save(
        "e",
        sns.catplot(
            steps,
            x="dtype_config",
            y="logit_absmax",
            hue="seed",
            row="case",
            kind="violin",
            height=1.5,
            aspect=4,
            log_scale=True,
        ).figure,
    )
    amp = steps[steps["dtype_config"] == "amp_bf16"].copy()
    amp["order"] = amp.groupby("run_id")["real_tokens"].rank(method="first")
    long = amp.melt(["order", "case"], ["mfu_bf16_peak", "mfu_bf16_peak_real_tokens"])
    save(
        "f",
        sns.relplot(
            long, x="order", y="value", hue="variable", col="case", col_wrap=2, kind="line", errorbar=None, height=2
        ).figure,
    )
    classes = steps[steps["case"].str.contains("cls")]
    save(
        "g",
        sns.relplot(
            classes,
            x="step",
            y="loss",
            hue="dtype_config",
            col="case",
            col_wrap=2,
            kind="line",
            errorbar=None,
            height=2,
            facet_kws={"sharey": False},
        ).figure,
    )
    runs["side"] = runs["case"].str.contains("cls").map({True: "classification", False: "LM"})
    plt.figure(figsize=(5, 3))
    ranks = runs.groupby(["side", "dtype_config"])["relative"].mean().groupby("side").rank(ascending=False).reset_index()
    sns.pointplot(ranks, x="side", y="relative", hue="dtype_config")
    save("h")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
