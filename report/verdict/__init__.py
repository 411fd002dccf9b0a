"""What to use, what to avoid, what is open, and what to run next."""

from report.verdict.decision import CaseVerdict, Price, Verdict, verdict
from report.verdict.text import verdict_text

__all__ = ["CaseVerdict", "Price", "Verdict", "verdict", "verdict_text"]
