"""``python -m harness diff RUN RUN``: where two runs part, and what each of them costs; within 80 columns."""

from __future__ import annotations

import argparse
import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.diff import compare
from harness.exit_codes import OK
from instrument.results.read import load
from instrument.results.schemas import strict_json
from instrument.terminal import count, plain_table, print_section, rich_console

HASH = 12
"""Digits of a hash that are shown."""


def diff_command(options: argparse.Namespace) -> int:
    """Print the comparison; ``--json`` prints it as one object on standard output."""
    found = compare(load(options.runs, options.out))
    if options.json:
        print(strict_json(found))
    else:
        show(found)
    return OK


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Everything that differs, most telling first."""
    console = console or rich_console(markup=False)
    for side in "ab":
        run, style = found[side], "bold cyan" if side == "a" else "bold magenta"
        name = Text.assemble((side, style), "  ", (run["run_id"], "bold"), (f"  in {run['results_folder']}", "dim"))
        console.print(name, soft_wrap=True)
    console.print()
    for line, style in headline(found):
        console.print(Text(line, style=style))
    if found["same_run"]:
        return
    titles = {"outcome": "Outcome", "settings": "Settings that differ", "environment": "Environment that differs"}
    for key, title in titles.items():
        if found[key] and not (key == "outcome" and found["no_difference"]):
            print_section(console, title, _rows(found[key]))
    if not found["no_difference"]:
        print_section(console, "Where they part", *map(Text, parting_lines(found)))
        print_section(console, "Loss", *map(Text, loss_lines(found)))
    print_section(console, "Speed", *map(Text, speed_lines(found)))
    _kernels(console, found)
    _memory(console, found)


def headline(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The sentence to read first, with its style."""
    if found["same_run"]:
        return [("Both names mean the same run: no difference.", "green")]
    lines = []
    if not found["paired"]:
        rows = found["not_paired_because"]
        what = ", ".join(f"{row['name']} {value(row['name'], row['a'])} / {value(row['name'], row['b'])}" for row in rows)
        mixed = "their steps are no pairs, and differences of loss mix that with everything else"
        lines.append((f"Not the same experiment ({what}): {mixed}.", "yellow"))
    steps, beyond = found["common_steps"], found["first_beyond_rounding"]
    if found["no_difference"]:
        equal = f"all {steps} steps, {found['comparable_windows']:,} module readings and the outcome are equal"
        lines.append((f"No difference: settings, environment, {equal}.", "green"))
    elif not steps:
        lines.append(("They have no step in common.", "yellow"))
    elif beyond:
        first = beyond["fields"][0]["name"]
        lines.append((f"They differ beyond rounding from step {beyond['step']} on, first in {first}.", "bold"))
    elif found["first_difference"]:
        lines.append((f"They differ by no more than rounding over {steps} common steps.", "bold"))
    else:
        lines.append((f"All {steps} common steps are equal, number for number.", "bold"))
    return lines


def parting_lines(found: dict[str, Any]) -> list[str]:
    """First step and first module: at all, and beyond rounding; the rule."""
    rule = found["rounding"]
    lines = []
    for title, key in _once(found, ("at all", "first_difference"), ("beyond rounding", "first_beyond_rounding")):
        step = found[key]
        lines.append(f"{title}: " + (f"step {step['step']}" if step else "no step"))
        lines += [
            f"    {f['name']:<14} {value(f['name'], f['a'])} / {value(f['name'], f['b'])}  {_apart(f['relative'])}"
            for f in (step["fields"] if step else ())
        ]
    at_all, beyond = "first_module_difference", "first_module_beyond_rounding"
    for title, key in _once(found, ("first module at all", at_all), ("first module beyond rounding", beyond)):
        module = found[key]
        if module is None:
            n = found["comparable_windows"]
            none = f"none of {n:,} readings" if n else "unknown, no module was measured over the same steps"
            lines.append(f"{title}: {none}")
            continue
        first, last = module["first_step"], module["step"]
        steps = f"step {last}" if first == last else f"steps {first}-{last}"
        what = "gradient of " if module["direction"] == "bwd" else ""
        values = f"{module['a']:.6g} / {module['b']:.6g}  {_apart(module['relative'])}"
        lines += [f"{title}: {what}{module['module'] or 'the model'}", f"    largest |x|, {steps}: {values}"]
    lines.append(
        f"Beyond rounding: apart by more than {rule['epsilons']} epsilons of the coarsest dtype in use "
        f"({rule['relative']:.2g} relative); counts and skips exactly."
    )
    return lines


def _once(found: dict[str, Any], at_all: tuple[str, str], beyond: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Both, or one line for both when they say the same."""
    same = found[at_all[1]] == found[beyond[1]] and found[beyond[1]] is not None
    return ((f"{at_all[0]}, and beyond rounding", beyond[1]),) if same else (at_all, beyond)


def loss_lines(found: dict[str, Any]) -> list[str]:
    """b minus a over the common steps, and how both ended."""
    loss = found["loss"]
    lines = []
    if loss["mean"] is not None:
        kind = "paired difference b - a" if found["paired"] else "difference b - a (not paired)"
        left_out = f"; without {count(loss['left_out'], 'step')} whose loss is not finite" if loss["left_out"] else ""
        interval = _interval(loss, "+.4g")
        method = f", 95 % t-interval over {loss['blocks']} block means" if loss["blocks"] else ""
        lines.append(f"{kind}: {loss['mean']:+.4g}{interval} over {count(loss['n'], 'step')}{method}{left_out}")
    else:
        lines.append("no common step has a finite loss in both")
    for name, when in (("final", "at the end of training"), ("val_loss", "held out")):
        x, y = loss[f"{name}_a"], loss[f"{name}_b"]
        if x is not None or y is not None:
            change = f" ({y - x:+.4g})" if x is not None and y is not None and math.isfinite(y - x) else ""
            lines.append(f"{when}: {value('loss', x)} / {value('loss', y)}{change}")
    return lines


def speed_lines(found: dict[str, Any]) -> list[str]:
    """Ratios of b to a."""
    speed = found["speed"]
    lines = []
    for key, what in (("step_time_ratio", "step time b / a"), ("real_tokens_per_s_ratio", "real tokens a second b / a")):
        ratio = speed[key]
        if ratio["mean"] is not None:
            lines.append(f"{what}: {ratio['mean']:.3f}{_interval(ratio, '.3f')} over {count(ratio['n'], 'timed step')}")
    if not lines:
        return ["no timed step in common"]
    if speed["step_time_p50_s_a"] and speed["step_time_p50_s_b"]:
        lines.append(f"step p50: {speed['step_time_p50_s_a'] * 1e3:,.1f} / {speed['step_time_p50_s_b'] * 1e3:,.1f} ms")
    drift = "The two ran one after the other: a drift of the machine is part of the ratio."
    return [*lines, f"Geometric means; 95 % t-intervals over block means. {drift}"]


def _kernels(console: Console, found: dict[str, Any]) -> None:
    times = found["time_by_kernel"]
    if times["missing_in"]:
        who = " and ".join(found[side]["run_id"] for side in times["missing_in"])
        print_section(console, "Time by kernel", Text(f"not recorded in {who}: run it with --trace"))
        return
    counted = all(times["steps"])
    columns = ("a", "b", "b - a", *(("a, ms/step", "b, ms/step") if counted else ()))
    table = plain_table("class", *columns, right=columns)
    for row in times["rows"]:
        cells = [f"{row['share_a']:.1%}", f"{row['share_b']:.1%}", f"{100 * (row['share_b'] - row['share_a']):+.1f} pp"]
        if counted:
            cells += [f"{(row[f's_per_step_{side}'] or 0) * 1e3:,.2f}" for side in "ab"]
        table.add_row(row["class"], *cells)
    note = "" if counted else "shares of the traced steps; their number is not recorded, so seconds are not compared"
    print_section(console, "Time by kernel", table, *([Text(note, style="dim")] if note else []))


def _memory(console: Console, found: dict[str, Any]) -> None:
    memory = found["memory"]
    table = plain_table("", "a", "b", "b / a", right=("a", "b", "b / a"))
    for row in memory["rows"]:
        ratio = f"{row['b'] / row['a']:.2f}x" if row["a"] and row["b"] is not None else "–"
        table.add_row(row["name"].removesuffix("_bytes").replace("_", " "), _bytes(row["a"]), _bytes(row["b"]), ratio)
    missing = [f"no split in {side}: it ran with --instrument off, or ended before" for side in memory["split_missing_in"]]
    if table.rows or missing:
        print_section(console, "Memory", *([table] if table.rows else []), *(Text(line, style="dim") for line in missing))


def value(name: str, x: Any) -> str:
    """A value in few characters: hashes shortened, absent as a dash."""
    if isinstance(x, str) and ("sha256" in name or "fingerprint" in name):
        return x[:HASH] or "none"
    if isinstance(x, int) and not isinstance(x, bool):
        return str(x) if name == "seed" else f"{x:,}"
    if isinstance(x, float):
        return f"{x:g}" if name == "lr" or name.endswith("eps") else f"{x:.6g}"
    return "–" if x is None else str(x)


def _interval(found: dict[str, Any], style: str) -> str:
    low, high = found["low95"], found["high95"]
    return " (too few for an interval)" if low is None else f" [{low:{style}}, {high:{style}}]"


def _apart(relative: float) -> str:
    return "" if not math.isfinite(relative) else "equal" if relative == 0 else f"{relative:.1e} apart"


def _bytes(n: int | None) -> str:
    if n is None:
        return "–"
    size, unit = next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if n >= size), (1, "B"))
    return f"{n / size:,.2f} {unit}" if size > 1 else f"{n} B"


def _rows(rows: list[dict[str, Any]]) -> Table:
    table = plain_table("", "a", "b", fold=("", "a", "b"))
    for row in rows:
        x, y = value(row["name"], row["a"]), value(row["name"], row["b"])
        table.add_row(Text(row["name"]), Text(x), Text(y), style=None if row["a"] != row["b"] else "dim")
    return table
