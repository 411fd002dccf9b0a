"""The dossier: every figure, verdict and row of a results folder on one page, and as a PDF."""

from report.dossier.build import BuildResult, build

__all__ = ["BuildResult", "build"]
