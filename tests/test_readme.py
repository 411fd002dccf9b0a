"""What README shows works as shown."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/contributing.md", "instrument/README.md", "kernels/README.md")


@pytest.mark.process
@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", README, re.DOTALL), ids=["case", "configuration"])
def test_a_shown_diff_applies_and_its_entry_is_listed(diff, tmp_path):
    for room in ("bench_cases", "harness", "instrument"):
        shutil.copytree(ROOT / room, tmp_path / room)
    subprocess.run(["git", "apply", "-p1"], input=diff, text=True, cwd=tmp_path, check=True)
    new = re.search(r'^\+ .*?"(\w+)"', diff, re.MULTILINE).group(1)
    listed = subprocess.run(
        [sys.executable, "-m", "harness", "list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        check=True,
    ).stdout
    assert f"{new} *" in listed


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_file_exists(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_two_commands_open_it():
    assert README.index("make run") < README.index("make test") < 1_500
