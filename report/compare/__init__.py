"""GPU types side by side."""

from report.compare.table import Comparison, compare
from report.compare.terminal import show

__all__ = ["Comparison", "compare", "show"]
