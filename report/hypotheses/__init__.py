"""Claims judged by the data shown: H1 to H3 of the benchmark, P1 to P4 of the plots."""

from instrument.results.contents import Folder
from report.hypotheses import (
    h1_loss_scale,
    h2_architecture,
    h3_bottleneck,
    p1_heads_overflow,
    p2_top_left,
    p3_padding,
    p4_task,
)
from report.hypotheses.evidence_base import EvidenceBase
from report.hypotheses.finding import Finding

__all__ = ["Finding", "judge"]

CLAIMS = (h1_loss_scale, h2_architecture, h3_bottleneck, p1_heads_overflow, p2_top_left, p3_padding, p4_task)


def judge(folder: Folder) -> tuple[Finding, ...]:
    """The findings, in order H1, H2, H3, P1, P2, P3, P4."""
    base = EvidenceBase.of(folder)
    return tuple(claim.judge(base) for claim in CLAIMS)
