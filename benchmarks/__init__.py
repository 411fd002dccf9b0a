"""Benchmarks of the harness and of the report: run from a clone, never installed."""
