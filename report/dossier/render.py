"""Context in, page out. Autoescape is on for every template: no value of a run is ever markup."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from report.dossier.inline_svg import font_faces
from report.dossier.theme import dark_rules

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"


@cache
def environment() -> Environment:
    """Jinja with autoescape always on (`select_autoescape` is off for ``*.html.j2``), and an error
    for a name that the context lacks."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def page(context: dict[str, Any]) -> str:
    """The whole dossier as one HTML file that loads nothing."""
    script = (TEMPLATES / "sort.js").read_text()
    styles = "\n".join((TEMPLATES / name).read_text() for name in ("screen.css", "print.css"))
    dark = f"@media screen and (prefers-color-scheme: dark){{\n{dark_rules()}\n}}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template("dossier.html.j2")
        .render(
            context,
            script=Markup(script),
            styles=Markup("\n".join((font_faces(), styles, dark))),
            policy=f"default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        )
    )
