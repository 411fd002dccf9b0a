"""What the fork server of the trials has imported, so that a process costs a third of a second."""

from __future__ import annotations

import sklearn.metrics

from harness.commands import case
from harness.run import terminal
from harness.supervisor import worker_without_gpu
from tests.soak.reliability import processes

__all__ = ["case", "processes", "sklearn", "terminal", "worker_without_gpu"]
