"""Claims judged by the data shown: H1 to H3 of the benchmark, P1 to P4 of the plots."""

from instrument.results.contents import Folder
from report.hypotheses.evidence import EvidenceBase, Finding
from report.hypotheses.h1_to_h3 import judge_h1, judge_h2, judge_h3
from report.hypotheses.p1_to_p4 import judge_p1, judge_p2, judge_p3, judge_p4

__all__ = ["Finding", "judge"]

CLAIMS = (judge_h1, judge_h2, judge_h3, judge_p1, judge_p2, judge_p3, judge_p4)


def judge(folder: Folder) -> tuple[Finding, ...]:
    """The findings, in order H1, H2, H3, P1, P2, P3, P4."""
    base = EvidenceBase.of(folder)
    return tuple(claim(base) for claim in CLAIMS)
