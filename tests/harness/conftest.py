"""Small runs for the harness's tests."""

from __future__ import annotations

import os

import pytest
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from harness.planning import plan_run
from harness.settings import Request

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def plan():
    """``plan("gpt2_clm", "fp32_true", seed=0, max_steps=2, ...)``: resolved settings of a small CPU run."""

    def make(case: str, config: str, seed: int = 0, **asked):
        asked = {
            "preset": "tiny",
            "data": "embedded",
            "max_steps": 2,
            "batch_size": 4,
            "micro_batch": 2,
            "seq_len": 32,
            "validation_documents": 4,
            "documents": 400,
            **asked,
        }
        return plan_run(CASES[case], DTYPE_CONFIGS[config], seed, Request(**asked), CPU)

    return make


@pytest.fixture
def command_environment():
    """The environment for ``python -m harness`` in a process of its own."""
    return {**os.environ, "COLUMNS": "200"}
