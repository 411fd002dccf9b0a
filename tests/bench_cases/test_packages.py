"""A package that is not installed is one sentence and exit code 5, whichever command finds out."""

import subprocess
import sys

import pytest

from bench_cases.lookup import missing_package


@pytest.mark.process
@pytest.mark.parametrize(
    ("program", "package", "command"),
    [
        ("harness", "msgspec", ["case", "gpt2_multi_cls", "fp32_true", "--preset", "tiny"]),
        ("harness", "safetensors", ["matrix", "--preset", "tiny"]),
        ("report", "pandas", ["verdict", "results"]),
        ("report", "matplotlib", ["build", "FOLDER", "--no-pdf"]),
    ],
)
def test_it_is_named_in_one_line(program, package, command, tmp_path):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from {program}.cli import main; "
        f"sys.exit(main({[str(tmp_path) if word == 'FOLDER' else word for word in command]!r}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 5 and found.stdout == ""
    assert found.stderr.startswith(f"{program}: the package {package} is not installed in this Python; install")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'x' from 'torch'", name="torch"),
        ModuleNotFoundError("no name"),
        ValueError("msgspec"),
        ModuleNotFoundError("No module named 'harness.nothing'", name="harness.nothing"),
    ],
)
def test_other_errors_and_our_own_modules_are_not_explained_away(error):
    assert missing_package(error) is None
