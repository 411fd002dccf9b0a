"""Launches by torchrun for the tests: commands and what came of them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from harness.planning import plan_run
from harness.run.execute import load_run_data, make_batches
from harness.settings import Request
from instrument.results.lines import read
from instrument.results.schemas import EvaluationRecord, RunRecord, StepRecord, decode
from tests.harness.commands import Forked, ForkedCommand, end_all

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAULTY = f"{HERE / 'faulty_case.py'}:CASE"
SIZES = {
    "preset": "tiny",
    "data": "embedded",
    "batch_size": 8,
    "micro_batch": 2,
    "seq_len": 32,
    "max_steps": 5,
    "documents": 400,
    "validation_documents": 12,
}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
LONGEST_S = 240


def settled(case, config="fp32_true", **asked):
    """The settings of a small run, on one process."""
    return plan_run(CASES[case], DTYPE_CONFIGS[config], 0, Request(**{**SIZES, **asked}), torch.device("cpu"))


def ids_of(step, place, case="gpt2_clm", **asked):
    """What `faulty_case` knows a micro-batch by."""
    settings = settled(case, **asked)
    return str(int(make_batches(settings, load_run_data(settings)).step(step).micro_batches(2)[place].input_ids.sum()))


def torchrun(program, environment, *, processes=2, fork=True, **more):
    """Start it, on so many processes, which are forked with everything imported, or else executed; `ended` removes what
    torchrun, and who is killed, leave among temporary files."""
    temporary = tempfile.mkdtemp(prefix="ddb-torchrun-")
    words = ["--standalone", "--nproc-per-node", str(processes), *program]
    environment = {**environment, **more, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": temporary}
    if fork:
        process = Forked(words, Path(temporary) / "launch", environment, launch)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    process.temporary = temporary
    return process


def launch(words):
    """torchrun's command; it forks its ranks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.run import main

    tempfile.tempdir = None  # that of this process' environment
    subprocess_handler.SubprocessHandler._popen = lambda handler, command, environment: ForkedCommand(command, environment)
    main(words)
    return 0


def ended(process, timeout_s=LONGEST_S):
    """What a launch printed and its exit code; the whole of it is killed where it hangs."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(psutil.NoSuchProcess):
            end_all(process.pid)
        raise
    finally:
        shutil.rmtree(process.temporary, ignore_errors=True)
    return process.returncode, out, err


def launched(words, environment, **more):
    """A command of the harness on two processes, executed as torchrun executes them."""
    return ended(torchrun(["-m", "harness", *words], environment, fork=False, **more))


def several(runs, environment=os.environ, **more):
    """Start several commands of the harness, one after the other, in the same processes; see `several_runs`."""
    return torchrun([str(HERE / "several_runs.py"), json.dumps(runs)], environment, **more)


def one_run(out):
    """The only run of a results folder: its row, steps and evaluations."""
    (line,) = (out / "results.jsonl").read_bytes().splitlines()
    row = decode(line, RunRecord)
    steps = list(read(out / "training_logs" / f"run_{row.run_id}.jsonl", StepRecord))
    return row, steps, list(read(out / "runs" / row.run_id / "evaluations.jsonl", EvaluationRecord))
