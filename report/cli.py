"""The command line: which command, and which exit code an error gets. Words on standard error, JSON on standard output."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instrument.terminal import count, printable, reader_may_leave, rich_console, sentence_of
from report import arguments
from report.errors import BAD_DATA, ENVIRONMENT, INTERRUPTED, OK, USAGE

MAKING = ("build", "import", "export")
"""Commands that finish although nobody reads their output any more: what they make goes into files."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line on standard error."""
    with reader_may_leave() as reader:
        options = arguments.parser().parse_args(argv)
        reader.needed = options.command not in MAKING
        return _main(options)


def _main(options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("interrupted: give the same command again", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from bench_cases.lookup import missing_package

        code = _exit_code(error)
        if code is None:
            raise
        print(f"report: {printable(missing_package(error) or sentence_of(error) or error)}", file=sys.stderr)
        return code


def _build(options: argparse.Namespace) -> int:
    from instrument.results.contents import load
    from report.dossier import build

    folder = load(options.folder)
    result = build(
        folder,
        options.out,
        pdf=_pdf_possible(options),
        formats=options.format,
        dpi=options.dpi,
        progress=not options.json and sys.stderr.isatty(),
        heartbeat=tuple(options.heartbeat),
        price=_price(options),
    )
    if options.json:
        _print(
            {
                "paths": [str(path) for path in result.paths],
                "seconds": result.seconds,
                "defects": result.defects,
                "open": result.open_claims,
            }
        )
        return OK
    for claim in result.open_claims:
        print(f"not decided: {claim}", file=sys.stderr)
    pages = [path for path in result.paths if path.suffix == ".html" or path.name == "dossier.pdf"]
    for path in pages:
        print(path, file=sys.stderr)
    if result.defects:
        print(
            f"{count(len(result.defects), 'defect')} in the files, listed in the dossier and by: "
            f"python -m report validate {shlex.quote(str(options.folder))}",
            file=sys.stderr,
        )
    return OK


def _pdf_possible(options: argparse.Namespace) -> bool:
    """Whether a PDF is wanted and can be made. Without its engine the dossier is the page alone, and a line says so."""
    from report.dossier.page import PdfUnavailable, require_pdf

    if options.no_pdf:
        return False
    try:
        require_pdf()
    except PdfUnavailable as why:
        print(f"report: no dossier.pdf: {why}", file=sys.stderr)
        return False
    return True


def _verdict(options: argparse.Namespace) -> int:
    from instrument.results.contents import load
    from report.verdict import verdict, verdict_text

    folder = load(options.folder)
    if options.json:
        _print(verdict(folder, _price(options)))
    else:
        print(verdict_text(folder, _price(options)))
    return OK


def _price(options: argparse.Namespace):
    """The price of an hour, or None. Raises `UsageError` for a currency without one."""
    from report.errors import UsageError
    from report.verdict import Price

    if options.price_per_hour is None:
        if options.currency:
            raise UsageError(f"--currency {options.currency} says nothing without --price-per-hour")
        return None
    return Price(options.price_per_hour, options.currency or "")


def _validate(options: argparse.Namespace) -> int:
    from instrument.results.contents import NoResults, load

    try:
        folder = load(options.folder)
        runs, defects, refusal = len(folder.runs), folder.defects, None
    except NoResults as error:
        if error.missing:
            raise
        runs, defects, refusal = 0, error.defects, str(error)
    if options.json:
        _print({"runs": runs, "defects": defects})
    else:
        for defect in defects:
            print(defect, file=sys.stderr)
        print(
            f"{count(runs, 'valid run')}, {count(len(defects), 'defect')}" + ("" if runs else f": {refusal}"), file=sys.stderr
        )
    return BAD_DATA if defects or not runs else OK


def _import(options: argparse.Namespace) -> int:
    from report.import_dtype_bench import import_dtype_bench

    records, defects = import_dtype_bench(options.folder, options.out, options.gpu)
    if options.json:
        _print({"out": str(options.out), "runs": [record.run_id for record in records], "defects": defects})
        return OK
    for defect in defects:
        print(defect, file=sys.stderr)
    print(
        f"{count(len(records), 'run')} imported into {options.out}, {count(len(defects), 'defect')}; "
        f"the card is taken to be {options.gpu}, which the logs do not say",
        file=sys.stderr,
    )
    if all(record.peak_flops_source is None for record in records):
        print(f"no peak is known for {options.gpu!r}, and none is guessed: no MFU", file=sys.stderr)
    return OK


def _compare(options: argparse.Namespace) -> int:
    from instrument.results.contents import load
    from report.compare import compare, show
    from report.errors import UsageError

    if options.currency and not options.price_per_hour:
        raise UsageError(f"--currency {options.currency} says nothing without --price-per-hour")
    comparison = compare([load(path) for path in options.folders], options.price_per_hour, options.currency or "")
    if options.json:
        rows = comparison.data.astype(object).where(comparison.data.notna(), None).to_dict("records")
        names = ("devices", "rows", "differences", "notes", "currency")
        _print({name: rows if name == "rows" else getattr(comparison, name) for name in names})
        return OK

    show(comparison, rich_console())
    return OK


def _export(options: argparse.Namespace) -> int:
    from instrument.results.contents import load
    from report.export import EXPORTERS

    paths = EXPORTERS[options.to](load(options.folder), options.out or options.folder / "export" / options.to)
    if options.json:
        _print({"paths": [str(path) for path in paths]})
    else:
        print(f"{count(len(paths), 'file')} in {paths[0].parent if paths else Path()}", file=sys.stderr)
    return OK


COMMANDS = {
    "build": _build,
    "verdict": _verdict,
    "validate": _validate,
    "import": _import,
    "compare": _compare,
    "export": _export,
}


def _print(content: Any) -> None:
    from report.text import plain_json

    print(json.dumps(plain_json(content), ensure_ascii=False, allow_nan=False))


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that a person can mend; None for a defect of ours."""
    from bench_cases.lookup import missing_package

    if missing_package(error):
        return ENVIRONMENT
    from instrument.results.contents import NoResults
    from report.errors import ImportRefused, MissingTool, UsageError

    if isinstance(error, NoResults):
        return USAGE if error.missing else BAD_DATA
    if isinstance(error, (UsageError, ImportRefused)):
        return USAGE
    return ENVIRONMENT if isinstance(error, MissingTool) or sentence_of(error) else None
