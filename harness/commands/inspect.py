"""``python -m harness inspect RUN``: why a run failed, or how far a healthy one stayed from failing. With ``--try CHANGE``
it runs the failed steps again with one thing changed, and prints which changes the run survives."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from harness.exit_codes import OK
from harness.inspect import tables
from harness.inspect.findings import UNFINISHED, gather
from harness.inspect.repro_script import write_repro
from harness.settings import SettingsError
from instrument.results.layout import locate
from instrument.results.read import failure_of, run_record
from instrument.results.schemas import strict_json
from instrument.terminal import STATUS_STYLES, count, print_section, rich_console
from kernels.float_formats import FP16, float_format

if TYPE_CHECKING:
    from harness.inspect.counterfactual import Counterfactual


def inspect_command(options: argparse.Namespace) -> int:
    """Print the findings; ``--json`` prints them as one object on standard output, ``--repro`` writes a script."""
    if options.steps is not None:
        raise SettingsError("--steps goes with --try")
    run = locate(options.run, options.out)
    if options.repro is not None:
        record = run_record(run)
        script, tensors = write_repro(run, record, failure_of(run, record), options.repro, trust=options.trust_run)
        row = strict_json({"run_id": run.run_id, "script": str(script), "tensors": str(tensors)})
        print(row if options.json else f"{script} and {tensors}: python {script}")
    elif options.json:
        print(strict_json(gather(run)))
    else:
        InspectScreen().show(gather(run))
    return OK


class InspectScreen:
    """Prints the findings of one run, section by section; a section without content is left out."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or rich_console(markup=False)

    def show(self, found: dict[str, Any]) -> None:
        self._head(found)
        if found.get("chain") is not None:
            self._failure(found)
        elif found["status"] in ("completed", UNFINISHED, "preempted"):
            self._smallest_headroom(found)
        if found.get("stack") is not None:
            self._stack(found["stack"])
        if found["events"]:
            self._section("Along the way", *map(Text, tables.event_lines(found["events"])))
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
        if found["weights_file"]:
            self.console.print(Text(f"final weights: {found['weights_file']}", style="dim", overflow="fold"))
        if found.get("matched") is False:
            near = "The replay did not fail in the same way as the run: what follows is a near case."
            self.console.print(Text(near, style="yellow"))

    def _stack(self, stack: dict[str, Any]) -> None:
        self._section("Where it failed", note="the model's and our own code, the innermost frame last")
        for frame in stack["frames"]:
            self._to_copy(f"{frame['file']}:{frame['line']} in {frame['function']}")
            if frame["code"]:
                code = Text(f"  {frame['code']}", style="dim", no_wrap=True, overflow="ellipsis")
                self.console.print(Padding.indent(code, 2))
        self._to_copy(f"the whole stack: {stack['whole']}")

    def _failure(self, found: dict[str, Any]) -> None:
        width = self.console.width
        if found["chain"]:
            table = tables.chain_table(found["chain"], width, found["first_nonfinite"]["kind"])
            self._section("The road of the value", table, note="first op of every module it reached")
            more = len(found["chain"]) - tables.MOST_LINKS
            if more > 0:
                self._line(f"and {more} more (--json has {'all' if len(found['chain']) < 64 else 'the first 64'})", style="dim")
        if found["absorbed"]:
            table = tables.chain_table(found["absorbed"], width)
            self._section("Absorbed", table, note="not finite, but it died out: not to blame")
        if found["operands"]:
            self._section(f"What {found['first_nonfinite']['op']} read", tables.operands_table(found))
            if found["output"] is not None:
                self._exact(found["output"])
        self._history(found)
        if found["histograms"]:
            lines = tables.histogram_lines(found["histograms"], width - 2)
            self._section("Exponents of what it read", *lines, note="how many values per power of two, heights logarithmic")
        if found["kernels"]:
            what = "Kernels" if found["device_type"] == "cuda" else "Ops"
            unseen = "; – where it saw no such op" if any(row["duration_s"] is None for row in found["kernels"]) else ""
            table = tables.kernel_table(found["kernels"], width)
            self._section(f"{what} around the failure", table, note="times from the profiled replay" + unseen)

    def _exact(self, output: dict[str, Any]) -> None:
        if output["exact_absmax"] is not None:
            limits = float_format(output["dtype"])
            ends = f"; {limits.name} ends at {tables.number(limits.max)}" if limits else ""
            self._line(f"float64 gives up to {tables.number(output['exact_absmax'])} where it failed{ends}")
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
        lines = tables.history_chart(history, self.console.width - 2, near)
        if not lines:
            return
        name = "fp16" if near == FP16.max else tables.dtype(found["first_nonfinite"]["dtype"])
        self._section(f"Largest |x| of {history[0]['module'] or 'the model'}", *lines)
        marks = f"{tables.FORWARD} output   {tables.BACKWARD} its gradient, at the loss scale   {tables.LIMIT} end of {name}"
        self._line(f"{marks}   log scale", style="dim")
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
        self._section("Smallest headroom", note="largest |x| of any measured module against the end of a dtype")
        own, fp16 = smallest["own_dtype"], smallest["float16"]
        self._line(f"of its own dtype: {_headroom(own, own['dtype'])}")
        if own["dtype"] != "float16":
            self._line(f"of fp16: {_headroom(fp16, 'float16')}")

    def _next(self, found: dict[str, Any]) -> None:
        if found.get("chain") is None:
            return
        command = f"python -m harness inspect {shlex.join([found['run_id'], '--out', found['results_folder']])}"
        self._section("Remedies", *([tables.remedy_table(found["remedies"])] if found["remedies"] else []))
        if not found["remedies"]:
            self._line("none tried yet; from the snapshot before the failure, each with one change:")
            self._to_copy(f"{command} --try all")
        self._section("Further")
        if found["trace_file"]:
            self._line("the failed step's trace, for https://ui.perfetto.dev:")
            self._to_copy(found["trace_file"])
        if found["repro_kept"]:
            self._line("the op alone, in a script that needs torch and nothing of ours:")
            self._to_copy(f"{command} --repro repro.py")

    def _section(self, title: str, *content: Any, note: str = "") -> None:
        print_section(self.console, title, *content, note=note)

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(Padding.indent(Text(text, style=style), 2))

    def _to_copy(self, text: str) -> None:
        """A command or a path: never broken by us, whatever the width."""
        self.console.print(Text("  " + text), soft_wrap=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _headroom(row: dict[str, Any], against: str) -> str:
    bits, largest, limits = row["headroom_bits"], tables.number(row["absmax"]), float_format(against)
    where = f"{'output' if row['direction'] == 'fwd' else 'gradient'} of {row['module'] or 'the model'}, {largest}"
    if bits < 0:
        return f"{-bits:.1f} bits beyond: {where} at step {row['step']}"
    in_dtype = f"in {tables.dtype(row['dtype'])} at step {row['step']}"
    return f"{bits:.1f} bits ({where} {in_dtype}; {limits.name} ends at {tables.number(limits.max)})"


CAUSES = {
    "overflow": "overflow",
    "underflow_then_divide": "underflow, then division by it",
    "invalid": "an invalid operation",
    "from_input": "a value that came in from outside the step",
}


def try_command(options: argparse.Namespace) -> int:
    """Try the changes, print a table; ``--json`` prints the result as one object on standard output."""
    from harness.inspect.changes import refuse_unknown
    from harness.inspect.counterfactual import try_changes

    if options.repro is not None:
        raise SettingsError("--try and --repro are two commands; give one of them")
    if options.steps is not None and options.steps < 1:
        raise SettingsError(f"--steps is {options.steps}; it must be at least 1")
    run = locate(options.run, options.out)
    refuse_unknown(options.changes)
    console = rich_console(stderr=True)
    with console.status("") as status:
        tried = try_changes(
            run.path,
            options.changes,
            options.steps,
            lambda what: status.update(f"replaying: {what}"),
            trust=options.trust_run,
        )
    row = msgspec.to_builtins(tried) | {"confirmed_by": tried.confirmed_by}
    if options.json:
        print(msgspec.json.encode(row).decode())
    else:
        _show_tried(console, tried, row["remedies"])
    return OK


def _show_tried(console: Console, tried: Counterfactual, remedies: list[dict[str, Any]]) -> None:
    """What failed, whether the unchanged replay failed again, a row for each change, and whether the cause is confirmed."""
    again = "[yellow]does not fail again[/]"
    if tried.control_failed_at is not None:
        how = "[green]fails again at" if tried.reproduced else "[yellow]fails in another way, at"
        again = f"{how} step {tried.control_failed_at}[/]"
    console.print(f"[bold]{escape(tried.run_id)}[/]\n{escape(tried.sentence)}")
    console.print(f"from the snapshot after step {tried.snapshot_step} up to step {tried.last_step}; unchanged, it {again}")
    for warning in tried.warnings:
        console.print(f"[yellow]another machine: {escape(warning)}[/]")
    console.print(tables.remedy_table(remedies))
    notes = [f"{escape(r.change)}: [dim]{escape(r.why)}[/]" for r in tried.remedies if r.why and r.survives is not None]
    if tried.time_noise is not None:
        noise = f"timed before and after each change; its own timings differ by up to {tried.time_noise:.0%}"
        notes.append(f"[dim]step time and memory: to the unchanged run, {noise}[/]")
    for note in notes:
        console.print(Padding(note, (0, 0, 0, 2)))
    cause = CAUSES.get(tried.first_nonfinite.cause, "an unknown cause")
    answer = f"[bold yellow]not confirmed[/]: no change that was tried removes {cause} and survives"
    if tried.confirmed_by:
        answer = f"[bold green]confirmed[/]: {cause}. Without it the run survives: {escape(', '.join(tried.confirmed_by))}"
    elif not tried.reproduced:
        answer = "[bold yellow]nothing is confirmed[/]: the unchanged run did not fail as it had, so survival proves nothing"
    console.print(answer)
