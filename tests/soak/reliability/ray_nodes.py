"""A real Ray cluster of two nodes on this machine: its rows are those of the sequential runner, and a node that is
killed in the middle loses nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from harness.matrix.ray_cluster import OBJECT_STORE_BYTES, bind_to_loopback, connected
from harness.planning import plan_run
from harness.settings import Request, RunSettings
from harness.supervisor.pool import Pool
from instrument.environment import device_slug
from instrument.results.folder import finished_run, indexed_rows
from instrument.results.layout import INDEX
from instrument.results.lines import read
from instrument.results.schemas import RunRecord, StepRecord
from tests.soak.reliability.trials import Trial, share_of

SMALL = Request(preset="tiny", data="embedded", batch_size=2, micro_batch=2, seq_len=16, validation_documents=2, documents=400)
CPU = torch.device("cpu")
RUNS = 42
STEPS, LONGER_STEPS = 3, 200
"""The longer: for a node to be killed while both execute a run, though one of them began seconds later."""
TIMES = {
    "samples_per_s",
    "tokens_per_s",
    "real_tokens_per_s",
    "step_time_p50_s",
    "step_time_p95_s",
    "peak_rss_bytes",
    "step_time_s",
    "timings_s",
    "hardware",
    "mfu_measured_peak",
    "mfu_measured_peak_real_tokens",
}
"""What two executions of one run may differ in, in rows and in their flags."""
QUICK_TO_NOTICE = {"health_check_period_ms": 1000, "health_check_timeout_ms": 30_000, "health_check_failure_threshold": 4}
"""A dead node refuses connections at once; one on a busy machine is only slow to answer."""


def trial(out: Path, n_runs: int, *, kill: bool) -> dict[str, Any]:
    """``n_runs`` (at most 84) tiny runs, one after the other and on two nodes; with ``kill`` a node and all of its processes
    are killed by SIGKILL while both are in the middle of a run. Returns ``trials`` (runs), ``lost`` (run ids without
    exactly one settled row), ``differing`` (run ids whose rows or steps are not the sequential runner's) and ``run_again``
    (times that a run was started on another node)."""
    max_steps = LONGER_STEPS if kill else STEPS
    runs = tiny_runs(n_runs, max_steps)
    for _ in Pool(list(runs), out / "sequential", jobs=1).run(lambda: None):
        pass
    run_again: list[str] = []
    with two_nodes() as (address, kill_a_node), connected(address):
        from harness.matrix.ray_pool import RayPool

        pool, ended, killed = RayPool(list(runs), out / "nodes", None, device_slug(CPU), say=run_again.append), [], []

        def kill_one_in_the_middle() -> None:
            nodes = {run.progress.node for run in pool.running if run.last_step is not None}
            if kill and not killed and len(ended) >= n_runs // 3 and len(nodes) == 2:
                killed.append(kill_a_node())

        for one in pool.run(kill_one_in_the_middle, seconds_between_ticks=0.05):
            ended.append(one.settings.run_id)
    lost = [run.run_id for run in runs if ended.count(run.run_id) != 1 or not _one_row(out / "nodes", run.run_id)]
    differing = [
        run.run_id
        for run in runs
        if run.run_id not in lost and comparable(out / "nodes", run.run_id) != comparable(out / "sequential", run.run_id)
    ]
    return {"trials": n_runs, "lost": lost, "differing": differing, "run_again": len(run_again), "nodes_killed": len(killed)}


def alike(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a run; lost where it has not one settled row, or another than the sequential runner's."""
    yield _tried(trial(folder, share_of(RUNS, share), kill=False))


def one_killed(share: float, folder: Path) -> Iterator[Trial]:
    """The same with a node killed in the middle, from four runs on; a kill that no run felt tried nothing: a loss too."""
    found = trial(folder, max(4, share_of(RUNS, share)), kill=True)
    in_vain = [] if found["nodes_killed"] and found["run_again"] else ["no node died in the middle of a run"]
    yield _tried(found, in_vain)


def _tried(found: dict[str, Any], losses: Sequence[str] = ()) -> Trial:
    lost = [f"{run_id} is lost" for run_id in found["lost"]] + [f"{run_id} differs" for run_id in found["differing"]]
    return Trial(
        "two nodes",
        [*losses, *lost],
        {"run again": found["run_again"], "nodes killed": found["nodes_killed"]},
        stands_for=found["trials"],
    )


def tiny_runs(count: int, max_steps: int) -> list[RunSettings]:
    """Runs of the default cases and configurations, then of further seeds."""
    cases = [case for case in CASES.values() if case.in_default_matrix]
    configs = [config for config in DTYPE_CONFIGS.values() if config.in_default_matrix]
    every = itertools.product((0, 1), cases, configs)
    asked = dataclasses.replace(SMALL, max_steps=max_steps)
    return [plan_run(case, config, seed, asked, CPU) for seed, case, config in itertools.islice(every, count)]


@contextmanager
def two_nodes() -> Iterator[tuple[str, Callable[[], int]]]:
    """A cluster of two nodes of one processor each; yields its address and what kills the second node with all of its
    processes (their number)."""
    bind_to_loopback()
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster as LocalNodes

    ray_constants.ENABLE_RAY_CLUSTER = False  # as `bind_to_loopback` asks, where Ray was imported before
    sizes = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    nodes = LocalNodes(initialize_head=True, connect=False, head_node_args=sizes | {"_system_config": QUICK_TO_NOTICE})
    second = nodes.add_node(**sizes)

    def kill_second() -> int:
        raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        for process in processes:
            process.kill()
        nodes.remove_node(second, allow_graceful=False)
        return len(processes)

    try:
        yield nodes.address, kill_second
    finally:
        nodes.shutdown()


def comparable(out: Path, run_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's row and step rows without their times."""
    row = _without_times(finished_run(out, run_id))
    row["flags"] = {name: value for name, value in row["flags"].items() if name not in TIMES}
    return row, [_without_times(step) for step in read(out / "training_logs" / f"run_{run_id}.jsonl", StepRecord)]


def _without_times(record: RunRecord | StepRecord) -> dict[str, Any]:
    return {name: value for name, value in msgspec.to_builtins(record).items() if name not in TIMES}


def _one_row(out: Path, run_id: str) -> bool:
    row = finished_run(out, run_id)
    ids = [msgspec.json.decode(line)["run_id"] for line in (out / INDEX).read_bytes().splitlines()]
    return (
        row is not None
        and row.status in ("completed", "diverged")
        and ids.count(run_id) == 1
        and indexed_rows(out)[run_id] == row
    )
