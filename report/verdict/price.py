"""What an hour costs, and what training by the hour then costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Price:
    """``per_hour`` of the whole machine, above 0, in ``currency`` (a word such as ``EUR``, or empty)."""

    per_hour: float
    currency: str = ""

    def of(self, hours: float) -> str:
        """The price of so many hours: ``1.85 EUR``."""
        return f"{plain(self.per_hour * hours)} {self.currency}".rstrip()


def cost_words(
    relative_cost: float, hours_per_million_samples: float, hours_per_billion_real_tokens: float | None, price: Price | None
) -> str:
    """Cost against fp32_true's, and per million samples and 10^9 real tokens: in money where a price is known,
    else in hours."""
    words = f"{relative_cost:.2f} of fp32_true's"
    say = price.of if price else lambda hours: f"{plain(hours)} hours"
    tokens = f", {say(hours_per_billion_real_tokens)} per 10⁹ real tokens" if hours_per_billion_real_tokens else ""
    return f"{words}, {say(hours_per_million_samples)} per million samples{tokens}"


def plain(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"
