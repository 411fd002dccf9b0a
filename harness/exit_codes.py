"""What the command's exit code says. Torch-free."""

OK = 0
USAGE = 2
RUN_FAILED = 3
"""Some run ended ``oom``, ``error`` or ``hung``. A divergence is a result, and exits 0."""
BAD_DATA = 4
ENVIRONMENT = 5
INTERRUPTED = 75
