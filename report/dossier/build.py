"""A results folder in, a dossier out: figures with their CSV, summary.json, index.html and dossier.pdf."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from instrument.results.files import replace, sweep
from instrument.terminal import rich_console
from report.dossier.context import context
from report.dossier.page import page, require_pdf, write_pdf
from report.dossier.prediction import predicted
from report.hypotheses import judge
from report.plots.draw import draw_all
from report.tables import SECTION_TABLES, all_tables
from report.tables.failures import failure_groups
from report.tables.trust import trust
from report.text import plain_json
from report.verdict import Price, verdict


@dataclass(frozen=True)
class BuildResult:
    """``paths``: every file written, in order; ``seconds``: wall-clock time by stage; ``defects``: of
    the folder, as `instrument.results.contents` found them; ``open_claims``: what each claim that is not decided needs."""

    paths: tuple[Path, ...]
    seconds: dict[str, float]
    defects: tuple
    open_claims: tuple[str, ...] = ()


def build(
    folder,
    out: Path | None = None,
    *,
    pdf: bool = True,
    formats: tuple[str, ...] = ("svg", "png"),
    dpi: int = 300,
    progress: bool = False,
    heartbeat: tuple[str, ...] = (),
    price: Price | None = None,
) -> BuildResult:
    """Write ``plots/``, ``summary.json`` and ``dossier/`` under ``out`` (default: the results folder).

    ``formats`` are of `report.plots.write.FORMATS`. ``progress`` shows a bar on standard error. ``heartbeat``: configurations
    that figure D shows beside its own. ``price`` of an hour gives costs in money. Raises, before anything is written,
    `report.dossier.page.PdfUnavailable` when ``pdf`` is asked for and WeasyPrint is not installed, and `UsageError` for a
    heartbeat that the folder does not hold."""
    out = folder.path if out is None else Path(out)
    if pdf:
        require_pdf()
    clock = _Clock()
    for place in (out, out / "plots", out / "dossier"):
        sweep(place)  # what a build that was killed left
    with _bar(progress) as bar:
        task = bar.add_task("tables", total=None)
        tables = all_tables(folder, heartbeat) | {key: table(folder) for key, table in SECTION_TABLES.items()}
        findings, decision, checks, cards = judge(folder), verdict(folder, price), trust(folder), failure_groups(folder)
        forecast = predicted(folder)
        clock.lap("tables")
        bar.update(task, total=len(tables) + 1 + pdf)
        drawn = draw_all(
            tables, out / "plots", formats, dpi, lambda letter: bar.update(task, advance=1, description=f"figure {letter}")
        )
        clock.lap("figures")
        bar.update(task, advance=1, description="page")
        html = page(context(folder, drawn, tables, findings, decision, checks, cards, forecast))
        paths = [out / "plots" / file for figure in drawn.values() for file in figure.files]
        paths += [out / "summary.json", out / "dossier" / "index.html"]
        replace(paths[-1], html.encode())
        replace(paths[-2], _summary(folder, tables, findings, decision, checks, forecast).encode())
        clock.lap("page")
        if pdf:
            bar.update(task, advance=1, description="pdf")
            paths.append(out / "dossier" / "dossier.pdf")
            write_pdf(html, paths[-1])
            clock.lap("pdf")
    asked = tuple(f"{finding.id} needs {finding.would_decide}" for finding in findings if finding.would_decide)
    return BuildResult(tuple(paths), clock.seconds, folder.defects, asked)


def _bar(enabled: bool) -> Progress:
    """What a person sees while a dossier is built: a bar on standard error, on a terminal only."""
    console = rich_console(stderr=True)
    columns = (
        BarColumn(30),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def _summary(folder, tables: dict, findings, decision, checks, forecast) -> str:
    """The page's claims as strict JSON, for programs: a non-finite number is null."""
    content = {
        "schema": 1,
        "device": folder.device,
        "marks": folder.marks,
        "runs": len(folder.runs),
        "verdict": decision,
        "findings": findings,
        "checks": checks,
        "predictions": {"counts": forecast.counts, "not_predicted": forecast.missing},
        "figures": {
            key: {name: getattr(table, name) for name in ("name", "title", "caption", "empty", "excluded")}
            for key, table in tables.items()
        },
        "defects": [str(defect) for defect in folder.defects],
    }
    return json.dumps(plain_json(content), indent=1, allow_nan=False) + "\n"
