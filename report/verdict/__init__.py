"""What to use, what to avoid, what is open, and what to run next."""

from report.verdict.decision import Price, TaskVerdict, Verdict, verdict
from report.verdict.text import verdict_text

__all__ = ["Price", "TaskVerdict", "Verdict", "verdict", "verdict_text"]
