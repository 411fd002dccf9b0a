"""The command line: which command, and which exit code an error gets."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence

from harness import arguments
from harness.exit_codes import BAD_DATA, ENVIRONMENT, INTERRUPTED, OK, USAGE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line on standard error."""
    options = arguments.parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: rows written, exit 75
    try:
        return _command(options.command)(options)
    except KeyboardInterrupt:
        print("interrupted: give the same command again", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return OK
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"harness: {error}", file=sys.stderr)
        return code


def _command(name: str):
    """The function behind a subcommand; imported late, since most of them need torch."""
    if name == "list":
        from harness.listing import list_command

        return list_command
    if name == "case":
        from harness.case import case_command

        return case_command
    if name == "matrix":
        from harness.matrix import matrix_command

        return matrix_command
    if name == "doctor":
        from harness.doctor import doctor_command

        return doctor_command
    from harness.bench import bench_command

    return bench_command


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that a person can mend; None for a defect of ours."""
    from bench_cases.data.errors import DataError, DataUnavailable
    from bench_cases.lookup import BadDeclaration, UnknownId
    from bench_cases.models import ModelError
    from bench_cases.reach import WeightsUnavailable
    from harness.run_folder import OutputError
    from harness.settings import SettingsError

    codes = {UnknownId: USAGE, BadDeclaration: USAGE, SettingsError: USAGE, ModelError: USAGE,
             DataError: BAD_DATA, DataUnavailable: ENVIRONMENT, WeightsUnavailable: ENVIRONMENT,
             OutputError: ENVIRONMENT}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), None)
