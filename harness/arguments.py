"""The command line's grammar. Nothing here imports torch or numpy: ``--help`` is instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench_cases import PRESETS, TASKS
from harness.campaign.arguments import add_campaign
from harness.fit.arguments import add_fit
from harness.option_types import at_least_one, seconds, share
from harness.settings import ATTENTION_CHOICES, DEVICES, ENGINES, INSTRUMENT_LEVELS, PARALLEL, Request

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
