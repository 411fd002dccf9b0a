"""How fast the report is: simulated runs, measured in fresh processes against a plain script."""

from report.bench.command import bench_command

__all__ = ["bench_command"]
