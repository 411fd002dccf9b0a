"""What the report's exit code says; the same numbers as the harness's, which the report may not import."""

OK = 0
USAGE = 2
BAD_DATA = 4
ENVIRONMENT = 5
INTERRUPTED = 75
