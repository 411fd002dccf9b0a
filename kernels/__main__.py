"""Command line of the kernels: compile them for GPUs that are not here, check and bench them on the one that is.

    python -m kernels compile [--arch sm_75 ...] [--op NAME ...] [--json]
    python -m kernels check   [--op NAME ...] [--dtype bf16 ...] [--device auto|cuda|cpu] [--impl auto] [--jobs N] [--out FILE]
    python -m kernels bench   [--op NAME ...] [--dtype bf16 ...] [--device auto|cuda|cpu] [--shape 8192x50304 ...] [--out FILE]

Results for machines go to stdout as JSON with --json; tables for people go to stderr.
Exit codes: 0 ok, 2 usage, 3 a check that came out wrong, 5 environment (a package, tool or device is missing).
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from typing import TextIO

from kernels import bench, compile

USAGE, WRONG, ENVIRONMENT = 2, 3, 5


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if argv is None and getattr(args, "out", None):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # the file is completed, whoever stops reading the table
    try:
        return {"compile": _compile, "check": _check, "bench": _bench}[args.command](args)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return USAGE
    except OSError as e:
        if e.filename is None:
            raise
        print(f"error: cannot use {e.filename}: {e.strerror}", file=sys.stderr)
        return ENVIRONMENT
    except (compile.CompileError, ImportError, RuntimeError) as e:
        print(f"error: {str(e).splitlines()[0] if str(e) else type(e).__name__}", file=sys.stderr)
        return ENVIRONMENT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels", description="Compile, check and bench the Triton kernels.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, ops: list[str], on_a_device: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.add_argument("--op", nargs="+", choices=ops, metavar="NAME", help=", ".join(ops))
        added.add_argument("--json", action="store_true", help="the rows as JSON on stdout")
        if on_a_device:
            added.add_argument("--dtype", nargs="+", choices=bench.DTYPES, help="default: all three")
            added.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
            added.add_argument("--out", metavar="FILE", help="write the JSON there too")
        return added

    compiling = command("compile", "compile every kernel for every GPU generation, without a GPU", list(compile.MODULES), False)
    compiling.add_argument("--arch", nargs="+", choices=compile.ARCHS, metavar="ARCH", help=", ".join(compile.ARCHS))
    checked = [*bench.MODULES, "exponent_histogram"]  # as in kernels.check, which imports torch
    checking = command("check", "compare every op with float64 on the device that is here", checked)
    checking.add_argument(
        "--impl", choices=("auto", "triton", "torch"), default="auto", help="default: what runs on that device"
    )
    checking.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, each with an op of its own; default 1")
    benching = command("bench", "time every op against eager torch, torch.compile and a copy", list(bench.MODULES))
    benching.add_argument("--shape", nargs="+", metavar="SHAPE", help="8192x50304, gpt2-124m, ...; default: all")
    benching.add_argument("--pairs", type=int, default=bench.PAIRS, help=f"pairs per ratio, default {bench.PAIRS}")
    return parser


def _compile(args) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # set for tests; an interpreter has no machine code
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    rows = []
    form = "{:<26} {:<7} {:<5} {:<14} {:>5} {:>6} {:>7} {:>6} {:>6}"
    print(form.format("kernel", "arch", "dtype", "shape", "regs", "spills", "shared", "load", "store"), file=sys.stderr)
    for row in compile.compile_all(args.arch, args.op):
        rows.append(asdict(row))
        values = (row.registers, row.spills, row.shared_bytes, row.load_bits, row.store_bits)
        print(form.format(row.kernel, row.arch, row.dtype, row.shape, *values), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    return 0


def _check(args) -> int:
    from kernels import check

    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    device, _ = _device(args.device)
    judge = check.run if args.jobs == 1 else partial(check.run_apart, jobs=args.jobs)
    form = "{:<19} {:<5} {:<36} {:<21} {:<6} {}"
    _say(form.format("op", "dtype", "case", "quantity", "", "error (allowed)"))
    document = {"schema": check.SCHEMA, "machine": bench.machine(device), "judged": 0, "not_right": 0, "rows": []}
    for row in judge(device, args.impl, args.op, args.dtype):
        document["judged"] += 1
        document["not_right"] += row.status != "right"
        document["rows"].append(asdict(row))
        _write(args, document)  # as it grows: a crash on an unknown device leaves what came before
        error = row.note if row.error is None else f"{row.error:.3g} ({row.allowed:.3g}) {row.unit}"
        _say(form.format(row.op, row.dtype, row.case, row.quantity, row.status, error))
    _say(f"{document['judged']} quantities judged against float64 on {device}, {document['not_right']} not right")
    if args.json:
        _say(json.dumps(document, indent=1, allow_nan=False), sys.stdout)
    return WRONG if document["not_right"] else 0


def _bench(args) -> int:
    if args.pairs < 1:
        raise ValueError(f"--pairs must be at least 1, got {args.pairs}")
    device, has_cuda = _device(args.device)
    asked = {"ops": args.op, "dtypes": args.dtype, "shapes": args.shape}
    cases = bench.collect(device, **asked)
    document = {
        "schema": bench.SCHEMA,
        "machine": bench.machine(device),
        "protocol": {"pairs": args.pairs, "order": "ABBA", "interval": "95 % of the median, by order statistics",
                     "l2_flushed": device == "cuda"},
        "complete": False,
        "rows": [],
    }  # fmt: skip
    _say(_line("op", "case", "arm", "device", "time us", "x ours", "interval", "GB/s", "of copy"))
    there = _measured_before(args.out, document)
    for arms in cases:
        rows = [row for row in there if (row.op, row.case) == (arms[0].op, arms[0].case)]
        measured = rows if {arm.name for arm in arms} <= {row.arm for row in rows} else bench.run([arms], device, args.pairs)
        for row in measured:
            document["rows"].append(asdict(row))
            _write(args, document)  # as it grows: what is cut has the rows that it had, and the same command resumes
            _say(_bench_line(row))
    if not has_cuda and not args.shape:
        for row in bench.unmeasured("cuda", **asked):
            document["rows"].append(asdict(row))
            _say(_bench_line(row))
    document["complete"] = True
    _write(args, document)
    if args.json:
        _say(json.dumps(document, indent=1, allow_nan=False), sys.stdout)
    return 0


def _measured_before(out: str | None, document: dict) -> list["bench.BenchRow"]:
    """The rows of a bench of this machine, by this protocol, that was cut; none of a file that is complete or damaged."""
    try:
        before = json.loads(pathlib.Path(out).read_bytes()) if out else document
        same = not before["complete"] and all(before[name] == document[name] for name in ("schema", "machine", "protocol"))
        return [bench.BenchRow(**row) for row in before["rows"]] if same else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def _device(asked: str) -> tuple[str, bool]:
    """The device to run on, and whether there is a GPU at all."""
    import torch

    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise RuntimeError("no CUDA device here; --device cpu takes the CPU path")
    return ("cuda" if has_cuda and asked != "cpu" else "cpu"), has_cuda


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print on standard error or another stream, as long as anybody reads it."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write(args, document: dict) -> None:
    """Replace the JSON file that was asked for: readers see the old one or the new one, never half of it."""
    if not args.out:
        return
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", suffix=".ddb-tmp", delete=False) as file:
        file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _line(*cells) -> str:
    widths = (21, 27, 18, 6, 10, 8, 15, 7, 20)
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)).rstrip()


def _bench_line(row: "bench.BenchRow") -> str:
    head = (row.op, row.case, row.arm, row.device)
    if row.status != "measured":
        return _line(*head, row.status, row.note)
    ratio = interval = share = rate = ""
    if row.time_over_ours is not None:
        ratio = f"{row.time_over_ours:.3f}"
        interval = f"{row.time_over_ours_low:.3f}..{row.time_over_ours_high:.3f}"
    if row.bytes_per_s is not None:
        rate = f"{row.bytes_per_s / 1e9:.0f}"
    if row.share_of_copy is not None:
        share = f"{row.share_of_copy:.3f} ({row.share_of_copy_low:.3f}..{row.share_of_copy_high:.3f})"
    return _line(*head, f"{row.time_s * 1e6:.1f}", ratio, interval, rate, share)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that goes away (`| head`) ends it, quietly
    sys.exit(main())
