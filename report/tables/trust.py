"""Can you trust this? Fairness, reference health, seeds, exclusions, own overhead; the kernels where they were checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from instrument.results.contents import Folder
from instrument.terminal import count
from report.significance import FEWEST_SEEDS
from report.tables.judgement import is_unfinished, judge_runs
from report.tables.selection import REFERENCE, Selection, incomparable_reason, select
from report.tables.speed import disturbances, eligible
from report.text import bracketed, number, objects, shortened

DISTURBED = ("throttled", "contended")


@dataclass(frozen=True)
class Check:
    """``ok`` None: it could not be checked, and ``sentence`` says why."""

    name: str
    ok: bool | None
    sentence: str
    run_ids: tuple[str, ...] = ()


def trust(folder: Folder) -> tuple[Check, ...]:
    """The five checks, one of the kernels when they were compared with float64 here, and one when the files had defects."""
    selection = select(folder)
    checks = [_fairness(selection), _health(folder), _seeds(selection), _exclusions(folder, selection), _overhead(folder)]
    if rows := objects((folder.kernel_check or {}).get("rows")):
        checks.append(_kernels(rows))
    if defects := folder.defects:
        text = f"{count(len(defects), 'defect')} in the files, listed at the end; the first: {defects[0]}."
        checks.append(Check("files", False, text))
    return tuple(checks)


def _fairness(selection: Selection) -> Check:
    pairs = [
        (run, reference)
        for run in selection.runs
        if run.dtype_config != REFERENCE and (reference := selection.reference(run)) is not None
    ]
    wrong = [(run, reason) for run, reference in pairs if (reason := incomparable_reason(run, reference)) is not None]
    unknown = [run for run, _ in pairs if run.init_sha256 is None or run.data_sha256 is None]
    if not pairs:
        return Check("fairness", None, "No run stands beside an fp32_true run of its case and seed.")
    of_all = f"of {count(len(pairs), 'pair')}"
    if wrong:
        (run, reason), *_ = wrong
        text = f"{len(wrong)} {of_all} are not compared; the first: {run.run_id}: {reason}."
        return Check("fairness", False, text, tuple(run.run_id for run, _ in wrong))
    if unknown:
        text = f"{len(unknown)} {of_all} have no hashes of weights and batches: that they are the same is not verified."
        return Check("fairness", None, text, tuple(run.run_id for run in unknown))
    who, whose = ("The one run shares", "its") if len(pairs) == 1 else (f"All {len(pairs):,} runs share", "their")
    what = "initial weights, batches, switches and attention backend"
    return Check("fairness", True, f"{who} {what} with fp32_true of {whose} case and seed (hashes in every row).")


def _health(folder: Folder) -> Check:
    judgements = judge_runs(folder)
    references = [run for run in judgements.selection.runs if run.dtype_config == REFERENCE]
    ids = tuple(run.run_id for run in references if run.case in judgements.unhealthy)
    if not references:
        return Check("reference", None, "There is no fp32_true run: nothing can be judged.")
    if judgements.unhealthy:
        case, reason = next(iter(sorted(judgements.unhealthy.items())))
        text = f"The reference of {shortened(sorted(judgements.unhealthy))} is unhealthy and not judged by; {case}: {reason}."
        return Check("reference", False, text, ids)
    ended = sum(run.status == "completed" for run in references)
    if not ended:
        return Check("reference", None, "No fp32_true run has completed: nothing can be judged.")
    if ended == 1:
        return Check("reference", True, "The one fp32_true run that completed ends below its start.")
    return Check("reference", True, f"All {ended} fp32_true runs that completed end below their start.")


def _seeds(selection: Selection) -> Check:
    seeds = Counter((run.case, run.dtype_config) for run in selection.runs if not is_unfinished(run))
    low, high = min(seeds.values(), default=0), max(seeds.values(), default=0)
    span = count(low, "seed") if low == high else f"{low} to {high} seeds"
    if low >= FEWEST_SEEDS:
        return Check("seeds", True, f"{span} a cell; intervals are 95 % t-intervals over paired seeds.")
    why = "one seed has no interval" if low == 1 else "intervals are wide"
    return Check("seeds", False, f"{span} a cell: {why}, and no difference of speed or quality is shown below {FEWEST_SEEDS}.")


def _exclusions(folder: Folder, selection: Selection) -> Check:
    """Runs left out of speed and memory, and whether the device was throttled or shared; "?" for runs that do not know."""
    _, excluded = eligible(folder, selection)
    found = [(run_id, reason) for run_id, reason in excluded if reason.startswith(DISTURBED)]
    unknown = {
        name: sum(run.status == "completed" and disturbances(run)[name] is None for run in selection.runs) for name in DISTURBED
    }
    known = [f"{name}: ? for {count(n, 'completed run')}" for name, n in unknown.items() if n]
    runs = f"{count(len(excluded), 'run')} {'is' if len(excluded) == 1 else 'are'}" if excluded else "No run is"
    reasons = f": {shortened([f'{run_id} ({reason})' for run_id, reason in found or excluded], 2)}" if excluded else ""
    what = f"{len(found)} of them throttled or contended" if found else "" if known else "none was throttled or contended"
    text = "; ".join([f"{runs} left out of the figures of speed and memory{reasons}", *filter(None, [what]), *known])
    ok = False if found else None if known else True
    return Check("exclusions", ok, f"{text}.", tuple(run_id for run_id, _ in excluded))


def _overhead(folder: Folder) -> Check:
    """The benchmark's own rows with an aim; the check is that of the arm furthest beyond it."""
    rows = [
        row
        for row in objects((folder.overhead or {}).get("rows"))
        if row.get("unit") == "ratio" and number(row.get("median")) is not None and number(row.get("at_most")) is not None
    ]
    if not rows:
        return Check("overhead", None, "The instruments' own cost on this machine was not measured (no overhead.json).")
    worst = max(rows, key=lambda row: row["median"] / row["at_most"])
    interval = bracketed(number(worst.get("low95")), number(worst.get("high95")), ".3f")
    aim = f"({worst.get('name')}; aim: at most {worst['at_most']:g})"
    text = f"The instruments cost {worst['median']:.3f}{interval} times a step without them {aim}."
    return Check("overhead", all(row["median"] <= row["at_most"] for row in rows), text)


def _kernels(rows: list[dict]) -> Check:
    """What `python -m kernels check` found on this device."""
    wrong = [row for row in rows if row.get("status") != "right"]
    where = f"agree with float64 on this device ({rows[0].get('device')})"
    if not wrong:
        ops = {str(row.get("op")) for row in rows}
        judged = f"{count(len(rows), 'quantity', 'quantities')} of {count(len(ops), 'kernel')}"
        return Check("kernels", True, f"All {judged} {where}, within eager torch's own error.")
    first = wrong[0]
    what = f"{first.get('op')} {first.get('dtype')}, {first.get('case') or 'all'}: {first.get('note') or first.get('quantity')}"
    return Check("kernels", False, f"{len(wrong)} of {len(rows)} quantities do not {where}; the first: {what}.")
