"""The command line's grammar. Nothing here imports torch or numpy: ``--help`` is instant.

Options of a run come from their declaration in `harness.settings`; options of a command are declared here.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench_cases import PRESETS, TASKS
from harness.settings import ENGINES, OWN_MODEL, PARALLEL, SETTINGS, THE_RUN, Request, Setting

FIT_SETTINGS = ("preset", "device", "data", "weights", "seq_len", "documents", "threads", "attention", "size", "compile")
FLOPS_SETTINGS = ("preset", "data", "weights", "batch_size", "seq_len", "attention", "size", "text_field", "label_field")
"""The settings that change FLOPs or their dtypes."""
CAMPAIGN_SETTINGS = (
    *("preset", "device", "data", "weights", "max_steps", "batch_size"),
    *("micro_batch", "seq_len", "documents", "validation_documents", "threads"),
)


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


def _within(text: str, allowed: str, holds) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
    return value


def add_settings(
    command: argparse._ActionsContainer,
    names: Iterable[str],
    *,
    strict: bool = False,
    defaults: bool = True,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """The options of the named settings. ``strict``: a number that is not allowed is refused while parsing, before `resolve`
    could. Without ``defaults`` an option that is not given is None. ``changes``: what a command has otherwise, by setting."""
    for name in names:
        declared = SETTINGS[name]
        option: dict[str, Any] = {"dest": name, "default": declared.default, "help": declared.help}
        if declared.parse is bool:
            option["action"] = "store_true"
        else:
            option |= {"type": declared.parse, "choices": declared.choices}
            option["metavar"] = declared.metavar or ("N" if declared.parse is int else None)
        if declared.joined:
            option["action"] = Joined
        if declared.const is not None:
            option |= {"nargs": "?", "const": declared.const}
        if strict and declared.least == 1:
            option["type"] = at_least_one
        if not defaults:
            option["default"] = None
        command.add_argument(flag_of(name, declared), **{**option, **(changes or {}).get(name, {})})


class Joined(argparse.Action):
    """Joins the values of an option that is given several times by commas."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def flag_of(name: str, declared: Setting) -> str:
    """``--batch-size`` of ``batch_size``, unless it is declared with a flag of its own."""
    return declared.flag or "--" + name.replace("_", "-")


def request(options: argparse.Namespace, names: Iterable[str] = SETTINGS) -> Request:
    """The settings that were asked for on the command line."""
    return Request(**{name: getattr(options, name) for name in names})


def option_words(asked: Mapping[str, Any], names: Iterable[str] = SETTINGS) -> list[str]:
    """The words of a command line that ask for these settings; what is missing, None or False is not asked for."""
    words: list[str] = []
    for name in names:
        value, flag = asked.get(name), flag_of(name, SETTINGS[name])
        if value is not None and value is not False:
            words += [flag] if value is True else [flag, str(value)]
    return words


def settings_table() -> str:
    """The settings of a run as a table in Markdown, for the documentation."""
    rows = ["| option | setting | default | part of the run id | what it is |", "|---|---|---|---|---|"]
    for name, declared in SETTINGS.items():
        values = "\\|".join(declared.choices or ()) or (declared.metavar or "").replace("|", "\\|")
        hashed = {True: "yes", False: "no", "when changed": "when changed"}[declared.hashed]
        default = "" if declared.default is None or declared.parse is bool else f"`{declared.default}`"
        option = f"`{flag_of(name, declared)}{' ' + values if values else ''}`"
        rows.append(f"| {option} | `{name}` | {default} | {hashed} | {declared.help} |")
    return "\n".join(rows) + "\n"


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
    """Names may follow options too (``case CASE --max-steps 3 CONFIG``), where argparse would not look for them; an option may
    be spelled with underscores, as people used to."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse.ArgumentParser.parse_args`."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)  # after it a name may begin with a dash
        words[:end] = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words[:end]]
        options, rest = self.parse_known_args(words, namespace)
        at = rest.index("--") if "--" in rest else len(rest)
        if rest and (not hasattr(options, "names") or any(word.startswith("-") for word in rest[:at])):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            options.names = [*options.names, *rest[:at], *rest[at + 1 :]]
        return options


def parser() -> argparse.ArgumentParser:
    """The whole grammar: `command` names the subcommand."""
    raw = argparse.RawDescriptionHelpFormatter
    what = "Which floating-point configuration to train with on this GPU, and why one failed."
    top = Grammar(prog="python -m harness", epilog=EPILOG, formatter_class=raw, description=what)
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, (add_options, help_line) in COMMANDS.items():
        how: dict[str, Any] = {"description": DESCRIPTIONS[name], "formatter_class": raw} if name in DESCRIPTIONS else {}
        add_options(commands.add_parser(name, help=help_line, **how))
    return top


def _case(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("names", nargs="*", metavar="CASE CONFIG", help="a case id or path/to/file.py:NAME, and a dtype configuration")
    add("--model-arch", metavar="ARCH", help="with --task: the case, the long way")
    add("--dtype-config", metavar="CONFIG", help="the dtype configuration, the long way")
    add("--seed", type=int, default=0, help="default 0")
    _fresh(command)
    _hang_after(command)
    add("--dry-run", action="store_true", help="print the resolved run and stop")
    parallel = "under torchrun: every GPU has the whole model (ddp, the default there) or a shard of it (fsdp)"
    add("--parallel", choices=PARALLEL, help=parallel)
    _budget(command)
    _run(command)


def _matrix(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--cases", nargs="+", metavar="CASE", help="case ids, file.py:NAME, or 'all'; default: the six")
    _configs(command)
    add("--seeds", nargs="+", type=int, metavar="N", help="default: the preset's")
    jobs = "default: cores / threads on a CPU, 1 on a GPU; with --engine ray as many as the cluster has room for"
    add("--jobs", type=int, metavar="N", help=f"runs at a time; {jobs}")
    add("--no-follow-up", action="store_true", help="do not run the control configurations of a run that diverged")
    shard = "only the I-th of N parts of the plan, one per machine; `repair --merge` merges their folders"
    add("--shard", default="1/1", metavar="I/N", help=shard)
    engine = "processes of this machine (default), or a Ray cluster's nodes, one run a GPU"
    add("--engine", choices=ENGINES, default="local", help=f"where runs are executed: {engine}")
    address = "at a loopback or private address; default: a cluster of this machine alone, bound to 127.0.0.1"
    add("--address", metavar="HOST:PORT", help=f"with --engine ray: the cluster's head, {address}")
    _budget(command)
    add("--svg", type=Path, metavar="FILE", help="draw the stability matrix into a picture, too")
    add("--rerun", action="store_true", help="run again what is already done")
    _fresh(command)
    _hang_after(command)
    add("--dry-run", action="store_true", help="print the plan and stop")
    _run(command)


def _configs(command: argparse._ActionsContainer, allowed: str = "configuration ids or 'all'; ") -> None:
    command.add_argument("--configs", nargs="+", metavar="CONFIG", help=f"{allowed}default: the seven")


def _budget(command: argparse.ArgumentParser) -> None:
    budget = command.add_argument_group(
        "the budget of this call (not of the folder)",
        "A matrix prints a forecast, and begins no run that does not fit. What runs is stopped after a checkpoint before the "
        "budget is spent: exit 75, and the same command resumes, with as much again.",
    )
    budget.add_argument("--max-gpu-hours", type=float, metavar="H", help="hours, of all GPUs in use together")
    budget.add_argument("--budget-usd", type=float, metavar="X", help="dollars; goes with --price-per-hour")
    of = "of this machine (with --engine ray: of one of its GPUs, or on CPUs of one node; under torchrun: of each machine)"
    budget.add_argument("--price-per-hour", type=float, metavar="Y", help=f"dollars for an hour {of}")


def _fresh(command: argparse.ArgumentParser) -> None:
    what = "what was stopped does not resume from its checkpoint (in a matrix: what is done runs again, too)"
    command.add_argument("--fresh", action="store_true", help=f"start over: {what}")


def _hang_after(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hang-after",
        dest="hang_after_s",
        type=seconds,
        default=900.0,
        metavar="SECONDS",
        help="a run that shows no sign of life for so long (four times as long until its first step is done; or four times "
        "its longest step) is asked to stop, then killed, and its row is `hung`; default 900; 0: never",
    )


def _run(command: argparse.ArgumentParser) -> None:
    """Every setting of a run, and where its results go."""
    _own_model(command)
    add_settings(command.add_argument_group(THE_RUN), [name for name, s in SETTINGS.items() if s.group == THE_RUN])
    _out_and_json(command)


def _own_model(command: argparse.ArgumentParser) -> None:
    own = command.add_argument_group(OWN_MODEL)
    own.add_argument("--model", metavar="DIR|HUB_ID", help="any transformers model; needs --task")
    own.add_argument("--task", choices=list(TASKS), help="what to train it for")
    add_settings(own, [name for name, s in SETTINGS.items() if s.group == OWN_MODEL])


def _fit(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _case_id(command)
    _configs(command)
    add("--price-per-hour", type=positive, metavar="X", help="of this machine, to give costs")
    add("--most", type=at_least_one, default=4096, metavar="N", help="rows, more are not tried (default 4096)")
    limit = (
        "On a CPU everything is unsupported without it: what a trial may allocate besides its libraries, to try the procedure"
    )
    add("--memory-limit", type=positive, metavar="GB", help=f"act as if the GPU had no more. {limit}")
    add("--dry-run", action="store_true", help="search in the memory model of `case --dry-run`: no trial, no speed")
    add("--rerun", action="store_true", help="measure again what fit.json has already")
    add_settings(command, FIT_SETTINGS, strict=True)
    _out_and_json(command)


SKIPPABLE = ("doctor", "check", "bench", "overhead", "overflow", "fit")
OPS = (
    *("cross_entropy", "multi_tensor_stats", "unscale", "scale", "bce_with_logits"),
    *("activation_stats", "logit_stats", "resolvent_mix", "selective_scan", "exponent_histogram"),
)
"""The kernels, in the order in which their figures matter."""
NOT_TIMED = ("exponent_histogram",)
"""Plain torch, and only after a failure: it is checked, and not benched."""
DESCRIPTIONS = {
    "fit": """\
The largest batch (rows in one forward pass, no accumulation) per configuration: doubling, then bisection, each trial a few
steps in a process of its own, optimizer states and the longest rows included, so that running out of memory costs only that
trial. Then tokens a second there and at 32 rows, and what 10^9 real (unpadded) tokens cost. Rows are kept in fit.json of the
results folder; the same command resumes.""",
    "campaign": """\
Doctor with measured ceilings, the kernels' speed, the matrix at real size, kernels against float64, what the instruments
cost, what fits at most, and the dossier. Each stage is a process of its own, and its outcome is recorded.
The same command resumes where it was cut, by a signal, SIGKILL or the end of its minutes: several calls make one campaign,
and each leaves a dossier of what there is by then. The matrix begins with one seed of at least 80 steps for every case and
configuration; what these took plans more seeds and steps for --total-minutes, once.""",
}


def _campaign(command: argparse.ArgumentParser) -> None:
    """Those that make the campaign what it is default to None: a later call finds them in campaign.json."""
    add = command.add_argument_group("time").add_argument
    add("--minutes", type=positive, default=30.0, metavar="M", help="of this call, the dossier included (default 30)")
    total = "of all calls together, for which steps and seeds are planned; default: the first call's --minutes"
    add("--total-minutes", type=positive, metavar="T", help=total)
    add = command.add_argument_group("folders").add_argument
    where = "default: dossiers/<device>. Where results are missing, a campaign resumes from here"
    add("--out", type=Path, metavar="DIR", help=f"the dossier and its data, small enough to commit; {where}")
    add("--results", type=Path, metavar="DIR", help="the working results folder; default: results/<device>")
    what = command.add_argument_group("what is measured")
    add = what.add_argument
    changes: dict[str, dict[str, Any]] = {
        "preset": {"choices": list(PRESETS), "help": "default: full on a GPU; on a CPU only tiny makes sense"},
        "max_steps": {"help": "instead of as many as fit"},
    }
    add_settings(what, CAMPAIGN_SETTINGS, strict=True, defaults=False, changes=changes)
    cases = "default: the six, and gpt2_clm at 512 tokens as the matched control (also: CASE@TOKENS)"
    add("--cases", nargs="+", metavar="CASE", help=cases)
    _configs(what, allowed="")
    add("--seeds", nargs="+", type=int, metavar="N", help="instead of as many as fit")
    add("--ops", nargs="+", choices=OPS, metavar="OP", help=f"kernels to check and bench; default: {', '.join(OPS)}")
    add("--pairs", type=at_least_one, metavar="N", help="pairs per ratio of both benchmarks; default: theirs")
    add("--skip", nargs="+", choices=SKIPPABLE, metavar="STAGE", help=", ".join(SKIPPABLE))
    add("--price-per-hour", type=positive, metavar="X", help="of this machine, for costs in dossier and fit")
    add = command.add_argument_group("how").add_argument
    add("--dry-run", action="store_true", help="print the plan, from estimates or from the runs that are there")
    add("--retry-failed", action="store_true", help="try stages again that failed in an earlier call")
    add("--json", action="store_true", help="campaign.json on standard output at the end")


def _flops(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("names", nargs="*", metavar="CASE", help="a case id or path/to/file.py:NAME")
    add("--model-arch", metavar="ARCH", help="with --task: the case, the long way")
    config = "the dtype configuration that says which product runs in which dtype; default fp32_true"
    add("--config", default="fp32_true", metavar="CONFIG", help=config)
    changes = {
        "data": {"help": "where vocabulary and labels come from"},
        "weights": {"help": "whose sizes; default: the preset's"},
        "device": {"help": "where it would run; default: a GPU for full"},
        "attention": {"help": "attention backend: math multiplies in fp32, whatever the configuration"},
    }
    names = [name for name in FLOPS_SETTINGS if SETTINGS[name].group == THE_RUN]
    add_settings(command, [*names, "device"], changes=changes)
    _own_model(command)
    _json(command)


def _inspect(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("run", metavar="RUN_ID", help="a run id, the beginning of one, or the path of a run's folder")
    repro = "write a script that runs the failing op with torch alone, its tensors beside it"
    add("--repro", type=Path, metavar="FILE.py", help=repro)
    changes = "fp32_head, eps, fp32_states, scaler, fp32:MODULE or all"
    does = "says whether the run survives, what it costs, and whether the cause is confirmed"
    again = f"replay from the snapshot with one change: {changes}; {does}"
    add("--try", dest="changes", nargs="+", action="extend", default=[], metavar="CHANGE", help=again)
    steps = "with --try: up to K steps from the snapshot; default 20, or 5 beyond the failure"
    add("--steps", type=int, metavar="K", help=steps)
    trust = "with --try or --repro: load the code, data and weights that a run names which somebody else made"
    add("--trust-run", action="store_true", help=trust)
    _out_and_json(command)


def _diff(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs=2, metavar="RUN_ID", help="run ids, beginnings of them, or paths of run folders")
    _out_and_json(command)


def _predict(command: argparse.ArgumentParser) -> None:
    _case_id(command)
    _out_and_json(command)


def _repair(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="DIR", help="a results folder, such as results/nvidia-h200")
    merge = "copy the finished runs of these folders that DIR lacks, first"
    command.add_argument("--merge", type=Path, nargs="+", default=[], metavar="DIR2", help=merge)
    _json(command)


def _doctor(command: argparse.ArgumentParser) -> None:
    measure = "measure matmul rates and copy bandwidth, into machine.json of the results folder"
    command.add_argument("--measure", action="store_true", help=measure)
    _out_and_json(command)


def _bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("what", nargs="*", metavar="overhead", help="what the instruments cost a training step")
    add("--pairs", type=at_least_one, default=48, metavar="N", help="rounds of the arms (default 48)")
    add("--at-most", type=float, metavar="SECONDS", help="no other round after so many seconds")
    add("--out", type=Path, metavar="DIR", help="write DIR/overhead.json for the dossier, too")
    _json(command)


def _case_id(command: argparse.ArgumentParser) -> None:
    command.add_argument("case", metavar="CASE", help="a case id or path/to/file.py:NAME")


def _out_and_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, metavar="DIR", help="results folder; default: results/<device>")
    _json(command)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="JSON on standard output")


COMMANDS = {
    "case": (_case, "run one case under one dtype configuration"),
    "matrix": (_matrix, "run cases x configurations x seeds, each in its own process"),
    "list": (_json, "the cases, configurations and presets"),
    "flops": (_flops, "what a training step costs, counted with no GPU for any size"),
    "inspect": (_inspect, "why a run failed: the first non-finite value and the road to it"),
    "predict": (_predict, "from an fp32 run: what would fail under which configuration, and did it"),
    "diff": (_diff, "two runs side by side: where they part, and what each costs"),
    "repair": (_repair, "rebuild a results folder's index, cut torn lines, merge shards"),
    "campaign": (_campaign, "everything there is to measure on a GPU, resumable, and its dossier"),
    "fit": (_fit, "the largest batch per configuration, and what tokens cost there"),
    "doctor": (_doctor, "what this machine can do, and what will not work here"),
    "bench": (_bench, "what the instruments cost: bench overhead"),
}
"""Subcommand -> what adds its options, and its line of help."""
