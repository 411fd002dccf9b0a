"""The same folder gives the same tables, words and verdicts in every process."""

import os
import subprocess
import sys

import pytest

CODE = """
import hashlib, sys
from pathlib import Path
from report.hypotheses import judge
from instrument.results.contents import load
from report.tables import all_tables
from report.tables.trust import trust
from report.verdict import verdict_text
folder = load(Path(sys.argv[1]))
said = [(t.title, t.caption, t.data.to_csv(), t.summary.to_csv(), t.excluded) for t in all_tables(folder).values()]
print(hashlib.sha256(repr((said, judge(folder), trust(folder), verdict_text(folder))).encode()).hexdigest())
"""


@pytest.mark.soak
def test_the_order_of_sets_changes_nothing(small):
    command = [sys.executable, "-c", CODE, str(small.path)]
    said = {
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True).stdout
        for seed in "012"
    }
    assert len(said) == 1 and len(said.pop()) > 60
