"""The fork server's imports leave CUDA alone: a child of a process that asked for a GPU cannot use one."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

COUNT = """
import torch
asked = []
def watched(name):
    real = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *arguments: (asked.append(name), real(*arguments))[1])
for name in ("is_available", "device_count", "_lazy_init", "current_device"):
    watched(name)
"""


def asked(statement: str) -> list[str]:
    """The calls by which torch binds a process to a GPU's driver; asking how many there are is enough."""
    found = subprocess.run(
        [sys.executable, "-c", f"{COUNT}\n{statement}\nprint(*asked)"], capture_output=True, text=True, check=True
    )
    return found.stdout.split()


def test_the_worker_imports_without_asking_for_a_gpu():
    assert asked("import harness.supervisor.worker") == []


def test_the_counter_sees_who_asks():
    assert asked("from torch import cuda; cuda.is_available()") == ["is_available"]
