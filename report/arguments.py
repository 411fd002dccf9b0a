"""The command line's grammar. Nothing here imports pandas or matplotlib: ``--help`` is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = ("svg", "png", "pdf", "eps")
EXPORTS = ("csv", "latex", "appendix", "tensorboard", "wandb", "bencher")

EPILOG = """\
examples:
  python -m report build results/nvidia-h200              figures, HTML and PDF
  python -m report verdict results/nvidia-h200            what to use and what to avoid
  python -m report compare results/*                      GPU types side by side
  python -m report import dtype-bench LOGS --out results/rtx-a6000

exit codes: 0 ok, 2 usage, 4 bad data (validate: any defect; others: no valid run), 5 environment"""


def parser() -> argparse.ArgumentParser:
    """The whole grammar: ``command`` names the subcommand."""
    top = argparse.ArgumentParser(
        prog="python -m report",
        epilog=EPILOG,
        description="From a results folder to a dossier. Reads files only: needs no GPU and no torch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    _build(commands.add_parser("build", help="figures A to H, the HTML and the PDF dossier"))
    verdict = commands.add_parser("verdict", help="per task what to use and what to avoid, within 24 x 80 characters")
    _folder(verdict)
    _priced(verdict)
    _json(verdict)
    validate = commands.add_parser("validate", help="list what is wrong with the files; exits 4 when anything is")
    _folder(validate)
    _json(validate)
    compare = commands.add_parser("compare", help="two devices or more side by side")
    compare.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="results folders, one a device")
    compare.add_argument("--price-per-hour", type=_price, nargs="+", metavar="P", help="one a folder, in their order")
    compare.add_argument("--currency", type=_currency, metavar="WORD", help="the word after prices, such as EUR")
    _json(compare)
    _import(commands.add_parser("import", help="bring another program's logs in, marked IMPORTED"))
    export = commands.add_parser("export", help="the results in another tool's format")
    _folder(export)
    export.add_argument(
        "--to",
        choices=EXPORTS,
        required=True,
        help="appendix: a TeX folder with figures; "
        "wandb: a replay, offline unless WANDB_MODE is set; bencher: Bencher Metric Format",
    )
    export.add_argument("--out", type=Path, metavar="DIR", help="default: DIR/export/<format>")
    _json(export)
    return top


def _build(command: argparse.ArgumentParser) -> None:
    _folder(command)
    command.add_argument("--out", type=Path, metavar="DIR", help="default: the results folder itself")
    command.add_argument("--no-pdf", action="store_true", help="skip dossier.pdf")
    command.add_argument(
        "--format",
        type=_pictures,
        default=("svg", "png"),
        metavar="svg,png,pdf,eps",
        help="picture formats, comma-separated (default svg,png)",
    )
    command.add_argument("--dpi", type=_positive, default=300, help="of PNG pictures (default 300)")
    command.add_argument(
        "--heartbeat",
        nargs="+",
        default=(),
        metavar="CONFIG",
        help="configurations that figure D shows beside fp16_naive, its controls, amp_bf16 and fp32_true",
    )
    _priced(command)
    _json(command)


def _import(command: argparse.ArgumentParser) -> None:
    sources = command.add_subparsers(dest="source", metavar="source", required=True)
    bench = sources.add_parser("dtype-bench", help="an earlier benchmark of this matrix (ParkerWilliams/dtype-bench)")
    bench.add_argument("folder", type=Path, metavar="DIR", help="holds results.jsonl and training_logs/, perhaps in folders")
    bench.add_argument("--out", type=Path, required=True, metavar="DIR", help="the results folder to write")
    bench.add_argument(
        "--gpu",
        default="RTX A6000",
        metavar="NAME",
        help="the card, which the logs do not name (default RTX A6000, whose peak their MFU assumes)",
    )
    _json(bench)


def _folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="DIR", help="a results folder, such as results/nvidia-h200")


def _priced(command: argparse.ArgumentParser) -> None:
    command.add_argument("--price-per-hour", type=_price, metavar="P", help="of this machine, to give the cost in money")
    command.add_argument("--currency", type=_currency, metavar="WORD", help="the word after prices, such as EUR")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="JSON on standard output")


def _pictures(text: str) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [part for part in asked if part not in PICTURES]
    if wrong or not asked:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong) or text!r} is none of {', '.join(PICTURES)}")
    return asked


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price above 0")
    return value


def _currency(text: str) -> str:
    if not 0 < len(text) <= 8 or not text.isprintable() or any(c.isdigit() or c.isspace() for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} is no currency's word or sign of at most 8 characters, such as EUR")
    return text
