"""``python -m harness inspect RUN_ID``: why a run failed, or how far a healthy one stayed from failing."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from harness.exit_codes import OK
from harness.inspect.findings import UNFINISHED, gather
from harness.inspect.repro_script import write_repro
from harness.inspect.tables import (
    BACKWARD,
    FORWARD,
    LIMIT,
    MOST_LINKS,
    chain_table,
    dtype,
    event_lines,
    histogram_lines,
    history_chart,
    kernel_table,
    number,
    operands_table,
    remedy_table,
)
from harness.settings import SettingsError
from instrument.results.layout import locate
from instrument.results.read import failure_of, run_record
from instrument.results.schemas import strict_json
from instrument.terminal import STATUS_STYLES, count
from kernels.float_formats import FP16, float_format


def inspect_command(options: argparse.Namespace) -> int:
    """Print the findings; ``--json`` prints them as one object on standard output, ``--repro`` writes a script."""
    if options.steps is not None:
        raise SettingsError("--steps goes with --try")
    run = locate(options.run, options.out)
    if options.repro is not None:
        record = run_record(run)
        script, tensors = write_repro(run, record, failure_of(run, record), options.repro)
        if options.json:
            print(strict_json({"run_id": run.run_id, "script": str(script), "tensors": str(tensors)}))
        else:
            print(f"{script} and {tensors}: python {script}")
    elif options.json:
        print(strict_json(gather(run)))
    else:
        InspectScreen().show(gather(run))
    return OK


class InspectScreen:
    """Prints the findings of one run, section by section; a section without content is left out."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def show(self, found: dict[str, Any]) -> None:
        self._head(found)
        if found.get("chain") is not None:
            self._failure(found)
        elif found["status"] in ("completed", UNFINISHED, "preempted"):
            self._smallest_headroom(found)
        if found.get("stack") is not None:
            self._stack(found["stack"])
        if found["events"]:
            self._section("Along the way")
            for line in event_lines(found["events"]):
                self._line(line)
        self._next(found)

    def _head(self, found: dict[str, Any]) -> None:
        status = found["status"]
        style = STATUS_STYLES.get(status, "yellow")
        diverged = found.get("divergence_step")
        at = f" at step {diverged}" if diverged else f" after {count(found['steps_done'], 'step')}"
        of = f" of {found['max_steps']}" if found.get("max_steps") else ""
        self.console.print(Text(found["run_id"], style="bold"))
        where = "".join(f"  ·  {found[name]}" for name in ("preset", "device") if found.get(name))
        self.console.print(Text.assemble((f"{status}{at}{of}", style), (where, "dim")))
        self.console.print()
        self.console.print(Text(_sentence(found["verdict"]), style="green" if status == "completed" else style))
        if found.get("matched") is False:
            near = "The replay did not fail in the same way as the run: what follows is a near case."
            self.console.print(Text(near, style="yellow"))

    def _stack(self, stack: dict[str, Any]) -> None:
        self._section("Where it failed", "the model's and our own code, the innermost frame last")
        for frame in stack["frames"]:
            self._to_copy(f"{frame['file']}:{frame['line']} in {frame['function']}")
            if frame["code"]:
                self._indented(Text(f"  {frame['code']}", style="dim", no_wrap=True, overflow="ellipsis"))
        self._to_copy(f"the whole stack: {stack['whole']}")

    def _failure(self, found: dict[str, Any]) -> None:
        width = self.console.width
        if found["chain"]:
            self._section("The road of the value", "first op of every module it reached")
            self._indented(chain_table(found["chain"], width, found["first_nonfinite"]["kind"]))
            more = len(found["chain"]) - MOST_LINKS
            if more > 0:
                self._line(f"and {more} more (--json has {'all' if len(found['chain']) < 64 else 'the first 64'})", style="dim")
        if found["absorbed"]:
            self._section("Absorbed", "not finite, but it died out: not to blame")
            self._indented(chain_table(found["absorbed"], width))
        if found["operands"]:
            self._section(f"What {found['first_nonfinite']['op']} read")
            self._indented(operands_table(found))
            self._exact(found["output"])
        self._history(found)
        if found["histograms"]:
            self._section("Exponents of what it read", "how many values per power of two, heights logarithmic")
            for line in histogram_lines(found["histograms"], width - 2):
                self._indented(line)
        if found["kernels"]:
            unseen = any(row["duration_s"] is None for row in found["kernels"])
            self._section(
                f"{'Kernels' if found['device_type'] == 'cuda' else 'Ops'} around the failure",
                "times from the profiled replay" + ("; – where it saw no such op" if unseen else ""),
            )
            self._indented(kernel_table(found["kernels"], width))

    def _exact(self, output: dict[str, Any] | None) -> None:
        if output is None:
            return
        if output["exact_absmax"] is not None:
            limits = float_format(output["dtype"])
            ends = f"; {dtype(output['dtype'])} ends at {number(limits.max)}" if limits else ""
            self._line(f"float64 gives up to {number(output['exact_absmax'])} where it failed{ends}")
        elif output["zero_denominators"]:
            elements = count(output["zero_denominators"], "element")
            self._line(f"divided by exactly 0 in {elements}; float64 cannot save that either")
        else:
            self._line("float64 gives nothing finite there either")

    def _history(self, found: dict[str, Any]) -> None:
        history = [*found.get("earlier_history", []), *found["history"]]
        limit = (float_format(found["first_nonfinite"]["dtype"]) or FP16).max
        largest = max((row[key] or 0 for row in history for key in ("absmax_fwd", "absmax_bwd")), default=0)
        near = limit if largest and limit / largest < 2**8 else FP16.max
        lines = history_chart(history, self.console.width - 2, near)
        if not lines:
            return
        name = "fp16" if near == FP16.max else dtype(found["first_nonfinite"]["dtype"])
        self._section(f"Largest |x| of {history[0]['module'] or 'the model'}")
        for line in lines:
            self._indented(line)
        self._line(
            f"{FORWARD} output   {BACKWARD} its gradient, at the loss scale   {LIMIT} end of {name}   log scale", style="dim"
        )
        if found.get("earlier_history"):
            self._line(f"before step {found['history'][0]['step']}: the largest of a log window, at its step", style="dim")
        since = found.get("headroom_since_step")
        if since is not None:
            self._line(f"less than one bit of headroom since step {since}")

    def _smallest_headroom(self, found: dict[str, Any]) -> None:
        smallest = found["smallest_headroom"]
        if smallest is None:
            if found["status"] == "completed":
                self._line(f"no module was measured (instrument level {found['instrument']}), so its headroom is unknown")
            return
        self._section("Smallest headroom", "largest |x| of any measured module against the end of a dtype")
        own, fp16 = smallest["own_dtype"], smallest["float16"]
        self._line(f"of its own dtype: {_headroom(own, own['dtype'])}")
        if own["dtype"] != "float16":
            self._line(f"of fp16: {_headroom(fp16, 'float16')}")

    def _next(self, found: dict[str, Any]) -> None:
        if found.get("chain") is None:
            return
        command = f"python -m harness inspect {shlex.join([found['run_id'], '--out', found['results_folder']])}"
        self._section("Remedies")
        if found["remedies"]:
            self._indented(remedy_table(found["remedies"]))
        else:
            self._line("none tried yet; from the snapshot before the failure, each with one change:")
            self._to_copy(f"{command} --try all")
        self._section("Further")
        if found["trace_file"]:
            self._line("the failed step's trace, for https://ui.perfetto.dev:")
            self._to_copy(found["trace_file"])
        if found["repro_kept"]:
            self._line("the op alone, in a script that needs torch and nothing of ours:")
            self._to_copy(f"{command} --repro repro.py")

    def _section(self, title: str, note: str = "") -> None:
        self.console.print()
        self.console.print(Text.assemble((title, "bold"), (f"  {note}" if note else "", "dim")))

    def _line(self, text: str, style: str = "") -> None:
        self._indented(Text(text, style=style))

    def _indented(self, what) -> None:
        self.console.print(Padding.indent(what, 2))

    def _to_copy(self, text: str) -> None:
        """A command or a path: never broken by us, whatever the width."""
        self.console.print(Text("  " + text), soft_wrap=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _headroom(row: dict[str, Any], against: str) -> str:
    where = "output" if row["direction"] == "fwd" else "gradient"
    name = row["module"] or "the model"
    if row["headroom_bits"] < 0:
        return f"{-row['headroom_bits']:.1f} bits beyond: {where} of {name}, {number(row['absmax'])} at step {row['step']}"
    return (
        f"{row['headroom_bits']:.1f} bits ({where} of {name}, {number(row['absmax'])} in {dtype(row['dtype'])} at step "
        f"{row['step']}; {dtype(against)} ends at {number(float_format(against).max)})"
    )
