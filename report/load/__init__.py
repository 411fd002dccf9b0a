"""Results folders in: validated rows, numpy columns, and a list of what was wrong."""

from report.load.defect import Defect, NoResults
from report.load.folder import Folder, load
from report.load.marks import is_cpu, marks_of

__all__ = ["Defect", "Folder", "NoResults", "is_cpu", "load", "marks_of"]
