"""From the files of a results folder to tables, verdicts and a dossier. Imports no torch.

One way down: commands, dossier and exports; verdict; hypotheses; plots; tables; text and statistics. What is computed is
computed in `report.tables` and `report.hypotheses`; what is drawn, in `report.plots` and the templates, computes nothing.
"""

from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
