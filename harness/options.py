"""The command line's grammar. Nothing here imports torch or numpy: ``--help`` is instant.

What the numbers of a command line may be: functions for argparse's ``type``. Torch-free, like all of the grammar.

The grammar of ``fit``. Torch-free, as all of the command line's.

The campaign's grammar. Torch-free, as all of the command line's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from bench_cases import PRESETS, TASKS
from harness.settings import ATTENTION_CHOICES, DEVICES, ENGINES, INSTRUMENT_LEVELS, PARALLEL, Request


def at_least_one(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: whole numbers from 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    return _within(text, "numbers above 0", lambda value: value > 0)


def seconds(text: str) -> float:
    """A duration, 0 included."""
    return _within(text, "seconds from 0", lambda value: value >= 0)


def share(text: str) -> float:
    """A share above 0, up to 1."""
    return _within(text, "above 0, up to 1", lambda value: 0 < value <= 1)


def _within(text: str, allowed: str, holds) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
    return value


FIT_DESCRIPTION = """\
The largest batch (rows in one forward pass, no accumulation) per configuration: doubling, then bisection, each trial a few
steps in a process of its own, optimizer states and the longest rows included, so that running out of memory costs only that
trial. Then tokens a second there and at 32 rows, and what 10^9 real (unpadded) tokens cost. Rows are kept in fit.json of the
results folder; the same command goes on where it was."""


def add_fit(command: argparse.ArgumentParser) -> None:
    """Options of ``fit``."""
    command.description = FIT_DESCRIPTION
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("case", metavar="CASE", help="a case id or path/to/file.py:NAME")
    command.add_argument("--configs", nargs="+", metavar="CONFIG", help="configuration ids or 'all'; default: the seven")
    command.add_argument("--price-per-hour", type=positive, metavar="X", help="of this machine, to give costs")
    command.add_argument("--most", type=at_least_one, default=4096, metavar="N", help="rows, more are not tried (default 4096)")
    command.add_argument(
        "--memory-limit",
        type=positive,
        metavar="GB",
        help="act as if the GPU had no more. On a CPU everything is unsupported without it: what a trial may "
        "take beside its libraries, to try the procedure",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="search in the memory model of `case --dry-run`: no trial, no speed"
    )
    command.add_argument("--rerun", action="store_true", help="measure again what fit.json has already")
    command.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="default: full on a GPU, else tiny")
    command.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU if there is one")
    command.add_argument("--data", metavar="embedded|hub|DIR|FILE", help="default: hub for full, embedded for tiny")
    command.add_argument("--weights", metavar="scratch|pretrained|DIR", help="default: pretrained with the hub, else scratch")
    for flag, dest in (("--seq-len", "seq_len"), ("--documents", "documents"), ("--threads", "threads")):
        command.add_argument(flag, type=at_least_one, dest=dest, metavar="N", help="as for case")
    command.add_argument("--sdpa", dest="attention", choices=ATTENTION_CHOICES, default="auto", help="attention backend")
    command.add_argument("--compile", action="store_true", help="torch.compile: another experiment")
    command.add_argument("--out", type=Path, metavar="DIR", help="results folder; default: results/<device>")
    command.add_argument("--json", action="store_true", help="JSON on standard output")


SKIPPABLE = ("doctor", "check", "bench", "overhead", "overflow", "fit")
OPS = (
    "cross_entropy",
    "multi_tensor_stats",
    "unscale",
    "scale",
    "bce_with_logits",
    "activation_stats",
    "logit_stats",
    "exponent_histogram",
)
"""The kernels, in the order in which their figures matter."""
CAMPAIGN_DESCRIPTION = """\
Doctor with measured ceilings, kernels against float64, kernel and overhead benchmarks (behind the matrix where the minutes
are few), a calibration of every case, the matrix at real size, what fits at most, and the dossier. Each stage is a process
of its own, and its outcome is recorded.
The same command goes on where it was cut, by a signal, SIGKILL or the end of its minutes: several calls make one campaign.
How many steps and seeds are run is planned once, behind the calibration, for --total-minutes, and printed."""


def add_campaign(command: argparse.ArgumentParser) -> None:
    """Options of ``campaign``. Those that make the campaign what it is default to None: a later call finds them in
    campaign.json."""
    command.description = CAMPAIGN_DESCRIPTION
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    time = command.add_argument_group("time")
    time.add_argument(
        "--minutes", type=positive, default=30.0, metavar="M", help="of this call, the dossier included (default 30)"
    )
    time.add_argument(
        "--total-minutes",
        type=positive,
        metavar="T",
        help="of all calls together, for which steps and seeds are planned; default: the first call's --minutes",
    )
    place = command.add_argument_group("folders")
    place.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the dossier and its data, small enough to commit; "
        "default: dossiers/<device>. Where results are missing, a campaign goes on from here",
    )
    place.add_argument("--results", type=Path, metavar="DIR", help="the working results folder; default: results/<device>")
    what = command.add_argument_group("what is measured")
    what.add_argument("--preset", choices=list(PRESETS), help="default: full on a GPU; on a CPU only tiny makes sense")
    what.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the GPU if there is one")
    what.add_argument(
        "--data", metavar="embedded|hub|DIR|FILE", help="default: hub for full, embedded for tiny; never another by itself"
    )
    what.add_argument("--weights", metavar="scratch|pretrained|DIR", help="default: pretrained with the hub, else scratch")
    what.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help="default: the six, and gpt2_clm at 512 tokens as the matched control (also: CASE@TOKENS)",
    )
    what.add_argument("--configs", nargs="+", metavar="CONFIG", help="default: the seven")
    what.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of as many as fit")
    what.add_argument("--max-steps", type=at_least_one, metavar="N", help="instead of as many as fit")
    for flag in ("--batch-size", "--micro-batch", "--seq-len", "--documents", "--validation-documents", "--threads"):
        what.add_argument(flag, type=at_least_one, metavar="N", help="as for matrix")
    what.add_argument(
        "--ops", nargs="+", choices=OPS, metavar="OP", help=f"kernels to check and bench; default: {', '.join(OPS)}"
    )
    what.add_argument("--pairs", type=at_least_one, metavar="N", help="pairs per ratio of both benchmarks; default: theirs")
    what.add_argument("--skip", nargs="+", choices=SKIPPABLE, metavar="STAGE", help=", ".join(SKIPPABLE))
    what.add_argument("--price-per-hour", type=positive, metavar="X", help="of this machine, for costs in dossier and fit")
    how = command.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print the plan, from estimates or from a calibration that is done")
    how.add_argument("--retry-failed", action="store_true", help="try stages again that failed in an earlier call")
    how.add_argument("--json", action="store_true", help="campaign.json on standard output at the end")


EPILOG = """\
examples:
  python -m harness case gpt2_multi_cls amp_fp16          one run
  python -m harness case gpt2_clm fp16_naive --data DIR   on real text
  python -m harness matrix --out results-tiny             every case x configuration, resumable
  python -m harness list                                  cases, configurations, presets
  python -m harness inspect gpt2_multi_cls-fp16_naive     what overflowed first, and the road to it
  python -m harness predict gpt2_multi_cls                what would fail in 16 bits, from the fp32 run, and did it
  python -m harness diff RUN_ID RUN_ID                    where two runs part, and what each costs
  python -m harness flops gpt2_clm --preset full          what a training step costs, with no GPU
  python -m harness fit gpt2_clm --price-per-hour 3.5     the largest batch per configuration, and what tokens cost
  python -m harness repair results/nvidia-h200            after a crash: what is intact, and the index rebuilt
  python -m harness doctor                                what this machine can and cannot do
  python -m harness campaign --minutes 30 --data DIR      doctor, kernels, matrix and dossier of a GPU, in one command

exit codes: 0 ok (a divergence is a result), 2 usage, 3 some run ended oom, error or hung,
4 bad data, 5 environment, 75 interrupted and resumable"""


class Grammar(argparse.ArgumentParser):
    """Names may stand behind options too (``case CASE --max-steps 3 CONFIG``), where argparse would not look for them."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As `argparse.ArgumentParser.parse_args`."""
        options, rest = self.parse_known_args(args, namespace)
        at = rest.index("--") if "--" in rest else len(rest)  # behind it a name may begin with a dash
        if rest and (not hasattr(options, "names") or any(word.startswith("-") for word in rest[:at])):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            options.names = [*options.names, *rest[:at], *rest[at + 1 :]]
        return options


def parser() -> argparse.ArgumentParser:
    """The whole grammar: `command` names the subcommand."""
    top = Grammar(
        prog="python -m harness",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Which floating-point configuration to train with on this GPU, and why one failed.",
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    _case(commands.add_parser("case", help="run one case under one dtype configuration"))
    _matrix(commands.add_parser("matrix", help="run cases x configurations x seeds, each in its own process"))
    listing = commands.add_parser("list", help="the cases, configurations and presets")
    _json(listing)
    _flops(commands.add_parser("flops", help="what a training step costs, counted with no GPU for any size"))
    _inspect(commands.add_parser("inspect", help="why a run failed: the first non-finite value and the road to it"))
    predict = commands.add_parser("predict", help="from an fp32 run: what would fail under which configuration, and did it")
    predict.add_argument("case", metavar="CASE", help="a case id or path/to/file.py:NAME")
    _out(predict)
    _json(predict)
    _diff(commands.add_parser("diff", help="two runs side by side: where they part, and what each costs"))
    repair = commands.add_parser("repair", help="rebuild a results folder's index, cut torn lines, merge shards")
    repair.add_argument("folder", type=Path, metavar="DIR", help="a results folder, such as results/nvidia-h200")
    repair.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR2",
        help="copy the finished runs of these folders that DIR lacks, first",
    )
    _json(repair)
    add_campaign(commands.add_parser("campaign", help="everything there is to measure on a GPU, resumable, and its dossier"))
    add_fit(commands.add_parser("fit", help="the largest batch per configuration, and what tokens cost there"))
    doctor = commands.add_parser("doctor", help="what this machine can do, and what will not work here")
    doctor.add_argument(
        "--measure",
        action="store_true",
        help="measure matmul rates and copy bandwidth, into machine.json of the results folder",
    )
    _json(doctor)
    _out(doctor)
    bench = commands.add_parser("bench", help="measure the harness itself")
    bench.add_argument(
        "what",
        nargs="*",
        metavar="what",
        help="help, run, matrix, trainer, forensics, overhead (default: all of these), reliability",
    )
    bench.add_argument("--repeats", type=int, default=5, help="repetitions of each measurement (default 5)")
    bench.add_argument("--trials", type=at_least_one, default=500, metavar="N", help="forensics: faults (default 500)")
    bench.add_argument("--pairs", type=at_least_one, default=48, metavar="N", help="overhead: rounds of the arms (default 48)")
    bench.add_argument(
        "--trials-share",
        type=share,
        default=1.0,
        metavar="X",
        help="reliability: make this share of the trials (default 1: all, about an hour on two cores)",
    )
    bench.add_argument("--only", nargs="+", default=[], metavar="KIND", help="reliability: only these kinds of trials")
    bench.add_argument("--at-most", type=float, metavar="SECONDS", help="overhead: no other round behind so many seconds")
    bench.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="overhead: write DIR/overhead.json for the dossier, too; reliability: DIR/reliability.json",
    )
    _json(bench)
    return top


def request(options: argparse.Namespace) -> Request:
    """The settings that were asked for on the command line."""
    return Request(**{name: getattr(options, name) for name in Request.__dataclass_fields__})


def _case(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names", nargs="*", metavar="CASE CONFIG", help="a case id or path/to/file.py:NAME, and a dtype configuration"
    )
    _both(command, "--model-arch", metavar="ARCH", help="with --task: the case, the long way")
    _both(command, "--dtype-config", metavar="CONFIG", help="the dtype configuration, the long way")
    command.add_argument("--seed", type=int, default=0, help="default 0")
    _fresh(command)
    _hang_after(command)
    _both(command, "--dry-run", action="store_true", help="print the resolved run and stop")
    command.add_argument(
        "--parallel",
        choices=PARALLEL,
        help="under torchrun: every GPU has the whole model (ddp, the default there) or a share of it (fsdp)",
    )
    _budget(command)
    _own_model(command)
    _sizes(command)
    _out(command)
    _json(command)


def _matrix(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cases", nargs="+", metavar="CASE", help="case ids, file.py:NAME, or 'all'; default: the six")
    command.add_argument("--configs", nargs="+", metavar="CONFIG", help="configuration ids or 'all'; default: the seven")
    command.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: the preset's")
    command.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time; default: cores / threads "
        "on a CPU, 1 on a GPU; with --engine ray as many as the cluster has room for",
    )
    _both(command, "--no-follow-up", action="store_true", help="do not run the control configurations of a run that diverged")
    command.add_argument(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="only the I-th of N parts of the plan, one a machine; `repair --merge` puts their folders together",
    )
    command.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="where runs are executed: processes of this machine (default), or a Ray cluster's nodes, one run a GPU",
    )
    command.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="with --engine ray: the cluster's head, at a loopback or "
        "private address; default: a cluster of this machine alone, bound to 127.0.0.1",
    )
    _budget(command)
    command.add_argument("--svg", type=Path, metavar="FILE", help="draw the stability matrix into a picture, too")
    command.add_argument("--rerun", action="store_true", help="run again what is already done")
    _fresh(command)
    _hang_after(command)
    _both(command, "--dry-run", action="store_true", help="print the plan and stop")
    _own_model(command)
    _sizes(command)
    _out(command)
    _json(command)


def _budget(command: argparse.ArgumentParser) -> None:
    budget = command.add_argument_group(
        "the budget of this call (not of the folder)",
        "A matrix prints a forecast, and begins no run that does not fit. What runs is stopped behind a checkpoint before the "
        "budget is spent: exit 75, and the same command goes on, with as much again.",
    )
    _both(budget, "--max-gpu-hours", type=float, metavar="H", help="hours, of all GPUs in use together")
    _both(budget, "--budget-usd", type=float, metavar="X", help="dollars; goes with --price-per-hour")
    _both(
        budget,
        "--price-per-hour",
        type=float,
        metavar="Y",
        help="dollars for an hour of this machine (with --engine ray: "
        "of one of its GPUs, or on CPUs of one node; under torchrun: of each machine)",
    )


def _fresh(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fresh",
        action="store_true",
        help="start over: what was stopped does not go on from its checkpoint (in a matrix: nor is what is done taken as done)",
    )


def _hang_after(command: argparse.ArgumentParser) -> None:
    _both(
        command,
        "--hang-after",
        dest="hang_after_s",
        type=seconds,
        default=900.0,
        metavar="SECONDS",
        help="a run that shows no sign of life for so long (four times as long until its first step is done; or four times "
        "its longest step) is asked to stop, then killed, and its row is `hung`; default 900; 0: never",
    )


def _flops(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", metavar="CASE", help="a case id or path/to/file.py:NAME")
    _both(command, "--model-arch", metavar="ARCH", help="with --task: the case, the long way")
    command.add_argument(
        "--config",
        default="fp32_true",
        metavar="CONFIG",
        help="the dtype configuration that says which product runs in which dtype; default fp32_true",
    )
    command.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="default: full on a GPU, else tiny")
    command.add_argument("--data", metavar="embedded|hub|DIR|FILE", help="where vocabulary and labels come from")
    command.add_argument("--weights", metavar="scratch|pretrained|DIR", help="whose sizes; default: the preset's")
    command.add_argument("--device", choices=DEVICES, default="auto", help="where it would run; default: a GPU for full")
    command.add_argument(
        "--sdpa",
        dest="attention",
        choices=ATTENTION_CHOICES,
        default="auto",
        help="attention backend: math multiplies in fp32, whatever the configuration",
    )
    _both(command, "--batch-size", type=int, metavar="N", help="rows a step")
    _both(command, "--seq-len", type=int, metavar="N", help="tokens a row")
    _own_model(command)
    _json(command)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN_ID", help="a run id, the beginning of one, or the path of a run's folder")
    command.add_argument(
        "--repro",
        type=Path,
        metavar="FILE.py",
        help="write a script that runs the failing op with torch alone, its tensors beside it",
    )
    command.add_argument(
        "--try",
        dest="changes",
        nargs="+",
        action="extend",
        default=[],
        metavar="CHANGE",
        help="replay from the snapshot with one change: fp32_head, eps, fp32_states, scaler, fp32:MODULE "
        "or all; says whether the run survives, what it costs, and whether the cause is confirmed",
    )
    command.add_argument(
        "--steps",
        type=int,
        metavar="K",
        help="with --try: up to K steps from the snapshot; default 20, or 5 beyond the failure",
    )
    _out(command)
    _json(command)


def _diff(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs=2, metavar="RUN_ID", help="run ids, beginnings of them, or paths of run folders")
    _out(command)
    _json(command)


def _own_model(command: argparse.ArgumentParser) -> None:
    own = command.add_argument_group("your own model and data")
    own.add_argument("--model", metavar="DIR|HUB_ID", help="any transformers model; needs --task")
    own.add_argument("--task", choices=list(TASKS), help="what to train it for")
    _both(own, "--text-field", default="text", metavar="NAME", help="the text's field in a .jsonl file")
    _both(own, "--label-field", default="labels", metavar="NAME", help="the labels' field")


def _sizes(command: argparse.ArgumentParser) -> None:
    run = command.add_argument_group("the run")
    run.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="default: full on a GPU, else tiny")
    run.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU if there is one")
    run.add_argument("--data", metavar="embedded|hub|DIR|FILE", help="default: hub for full, embedded for tiny")
    run.add_argument("--weights", metavar="scratch|pretrained|DIR", help="default: pretrained with the hub, else scratch")
    run.add_argument("--lr", type=float, help="peak learning rate; default: the case's")
    _both(run, "--batch-size", type=int, metavar="N")
    _both(run, "--micro-batch", type=int, metavar="N", help="rows per forward pass; must divide the batch size")
    _both(run, "--seq-len", type=int, metavar="N", help="tokens per sequence")
    _both(run, "--max-steps", type=int, metavar="N")
    _both(run, "--eval-every", type=int, metavar="N", help="default: at the start and at the end only")
    _both(run, "--log-every", type=int, metavar="N", help="steps between two reads of the device")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads; 0: all cores")
    run.add_argument("--documents", type=int, metavar="N", help="at most this many training documents")
    _both(run, "--validation-documents", type=int, metavar="N", help="documents of an evaluation")
    run.add_argument("--dropout", type=float, default=0.0, help="default 0: the same for every configuration")
    run.add_argument(
        "--sdpa",
        dest="attention",
        choices=ATTENTION_CHOICES,
        default="auto",
        help="attention backend; default: the one that takes every dtype",
    )
    _both(
        run,
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="N",
        help="write a checkpoint behind every N steps; default 0: only when a signal (Ctrl-C, SIGTERM) stops the run",
    )
    run.add_argument(
        "--mtbf",
        dest="mtbf_s",
        type=float,
        metavar="SECONDS",
        help="the machine lasts this long on average: a checkpoint every sqrt(2 x cost of one x SECONDS) "
        "seconds (Young/Daly), the cost as measured",
    )
    run.add_argument(
        "--instrument", choices=INSTRUMENT_LEVELS, default="light", help="how much is measured: off, light (default), full"
    )
    run.add_argument(
        "--trace",
        dest="trace_steps",
        type=int,
        nargs="?",
        const=3,
        default=0,
        metavar="N",
        help="run N steps (default 3) again under torch.profiler when training is over, into traces/",
    )
    _both(
        run,
        "--memory-snapshot",
        action="store_true",
        help="write the CUDA allocator's history at the end (on running out of memory it is written anyway)",
    )
    run.add_argument("--compile", action="store_true", help="torch.compile: another experiment, recorded")
    _both(run, "--bucket-by-length", action="store_true", help="batches of documents of like length")


def _out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, metavar="DIR", help="results folder; default: results/<device>")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="JSON on standard output")


def _both(command, flag: str, **options) -> None:
    """An option that can be spelled with dashes or, as people used to, with underscores."""
    command.add_argument(flag, "--" + flag[2:].replace("-", "_"), **options)
