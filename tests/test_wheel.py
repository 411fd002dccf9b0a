"""The installed program is one package, `ddbench`, and works beside whoever else calls something `kernels` or `report`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddbench
from bench_cases import CASES

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("bench_cases", "harness", "instrument", "kernels", "report")
THEIRS = ("kernels", "report", "harness", "templates")
SITE_PACKAGES = next(path for path in sys.path if path.endswith("site-packages"))

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What the wheel holds, as it would lie in site-packages."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture
def their_project(tmp_path) -> Path:
    """A user's folder with packages and a template of the names of our rooms."""
    for room in THEIRS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text(f"raise ImportError('the {room} of somebody else')\n")
    (tmp_path / "templates" / "dossier.html.j2").write_text("somebody else's\n")
    return tmp_path


def trees(built: Path):
    for path in sorted(built.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_stands_at_the_top_but_the_package(built):
    assert [path.name for path in built.iterdir()] == ["ddbench"]
    package = built / "ddbench"
    assert {path.name for path in package.iterdir() if path.is_dir()} == {*ROOMS, "templates"}
    for room in ROOMS:
        in_clone = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
        assert in_clone == {path.relative_to(package) for path in (package / room).rglob("*.py")}
    assert (package / "py.typed").is_file() and (package / "templates" / "dossier.html.j2").is_file()


def test_every_import_of_a_room_goes_through_the_package(built):
    for path, tree in trees(built):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert not [name for name in names if name.split(".")[0] in (*ROOMS, "benchmarks", "tests")], (
                f"{path}:{node.lineno}"
            )


def test_no_string_names_a_module_or_a_command_of_the_clone(built):
    for path, tree in trees(built):
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            for command in ("python -m harness", "python -m report", "python -m kernels"):
                assert command not in node.value, f"{path}:{node.lineno}"
            room, _, rest = node.value.partition(":")[0].partition(".")
            module = built / "ddbench" / room / rest.replace(".", "/")
            if room in ROOMS and rest and node.value != CASES["gpt2_clm"].architecture.build:  # in every record
                assert not module.with_suffix(".py").is_file() and not module.is_dir(), f"{path}:{node.lineno}: {node.value}"


def ddb(built: Path, folder: Path, *words: str, code: str = "") -> str:
    """Standard output of the installed command in ``folder``."""
    script = "import sys; sys.path.remove(''); from ddbench.__main__ import main; sys.argv[0] = 'ddb'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code or script, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_works_where_other_packages_have_the_names_of_our_rooms(built, their_project):
    assert ddb(built, their_project, "--version") == f"ddb {ddbench.__version__}\n"
    assert "amp_bf16_fp32_head" in ddb(built, their_project, "list")
    for command in (["case"], ["matrix"], ["report", "build"], ["kernels", "bench"]):
        assert f"usage: ddb {' '.join(command)} [-h]" in ddb(built, their_project, *command, "--help")
    every_command = ddb(built, their_project, "--help")
    assert "inspect" in every_command and "report" in every_command and "ddb case gpt2_multi_cls" in every_command


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("wheel", "flops gpt2_clm --preset tiny --data embedded"),  # imports transformers, which looks for a package kernels
        ("clone", "kernels check --op exponent_histogram scale --dtype fp32 --device cpu --jobs 2"),  # starts processes
    ],
)
def test_the_module_does_what_the_command_does_in_a_folder_with_packages_of_our_names(
    built, tmp_path, their_project, words, layout
):
    """As `python -m ddbench`, which puts the folder before everything else."""
    place = built
    if layout == "clone":  # where an editable installation brings ddbench alone
        (place := tmp_path / "editable").mkdir()
        (place / "ddbench").symlink_to(ROOT / "ddbench")
    environment = {**os.environ, "PYTHONPATH": str(place), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "ddbench", *words.split()]
    done = subprocess.run(command, cwd=their_project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "somebody else" not in done.stderr, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_the_shells(built, tmp_path, shell):
    assert "_ARGCOMPLETE" in ddb(built, tmp_path, "completion", shell)


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("ddb mat", "matrix "),
        ("ddb report val", "validate "),
        ("ddb case --dev", "--device "),
        ("ddb kernels bench --dt", "--dtype "),
    ],
)
def test_a_shell_is_answered_from_the_parsers(built, tmp_path, monkeypatch, line, completed):
    answer = tmp_path / "answer"
    for name, value in {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }.items():
        monkeypatch.setenv(name, value)
    ddb(built, tmp_path)
    assert answer.read_text() == completed


def test_the_watch_is_imported_from_the_package_without_the_rooms_at_the_top(built, their_project):
    code = "import sys; sys.path.remove(''); from ddbench import Watch; print(Watch.__module__, 'instrument' in sys.modules)"
    module, at_the_top = ddb(built, their_project, code=code).split()
    assert module.startswith("ddbench.instrument.") and at_the_top == "False"


def run_in(folder: Path, *command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_run_has_the_same_id_and_settings_in_a_clone_and_installed(built, tmp_path):
    code = """
from {0}bench_cases import CASES, DTYPE_CONFIGS
from {0}harness.settings import Request, resolve
run = resolve(CASES["gpt2_clm"], DTYPE_CONFIGS["amp_bf16"], 0, Request(), device="cpu", data_fingerprint="")
print(run.run_id, run.as_config())
"""
    in_clone = subprocess.run([sys.executable, "-c", code.format("")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ddb(built, tmp_path, code=code.format("ddbench.")) == in_clone.stdout != ""


def test_stages_of_a_campaign_are_started_as_parts_of_the_package(built, tmp_path):
    code = "from ddbench.harness.campaign.plan import PACKAGE; print(PACKAGE)"
    assert ddb(built, tmp_path, code=code) == "ddbench.\n"


def in_a_clean_environment(folder: Path, *packages: str) -> Path:
    """A virtual environment that sees the heavy dependencies of this one; returns its ``bin``."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(SITE_PACKAGES + "\n")
    run_in(folder, folder / "bin" / "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", *packages)
    return folder / "bin"


@pytest.mark.soak
def test_the_wheel_works_beside_hugging_faces_kernels(their_project, tmp_path_factory):
    """Needs a package registry: the build's setuptools, and `kernels`."""
    wheels = tmp_path_factory.mktemp("wheels")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.iterdir()
    bin_ = in_a_clean_environment(tmp_path_factory.mktemp("clean") / "venv", str(wheel), "kernels")
    (site,) = bin_.parent.glob("lib/python*/site-packages")
    assert {"ddbench", "kernels"} <= {path.name for path in site.iterdir()}
    assert {path.name for path in site.iterdir()} & {"harness", "instrument", "report", "bench_cases", "templates"} == set()

    tiny = ("--preset", "tiny", "--data", "embedded", "--max-steps", "3")
    assert run_in(their_project, bin_ / "ddb", "--version") == f"ddb {ddbench.__version__}\n"
    assert "completed after 3 steps" in run_in(
        their_project, bin_ / "ddb", "case", "gpt2_multi_cls", "fp32_true", *tiny, "--out", "case"
    )
    two = ("--cases", "gpt2_multi_cls", "--configs", "fp32_true", "amp_bf16")
    assert "2 runs in " in run_in(their_project, bin_ / "ddb", "matrix", *two, *tiny, "--out", "matrix")
    run_in(their_project, bin_ / "ddb", "report", "build", "matrix", "--no-pdf")
    page = (their_project / "matrix" / "dossier" / "index.html").read_text(encoding="utf-8")
    assert "ddb case gpt2_multi_cls" in page and "python -m" not in page
    run_in(their_project, bin_ / "python", "-P", "-c", "from ddbench import Watch; from kernels import get_kernel")


@pytest.mark.soak
def test_an_editable_installation_brings_the_package_alone(tmp_path):
    """What `make` installs: `ddb` and `ddbench` from anywhere, and no room at the top of site-packages."""
    bin_ = in_a_clean_environment(tmp_path / "venv", "-e", str(ROOT))
    assert "amp_bf16_fp32_head" in run_in(tmp_path, bin_ / "ddb", "list")
    code = (
        "import importlib.util as u; import sys; print([u.find_spec(r) for r in sys.argv[1:]]); import ddbench; ddbench.Watch"
    )
    assert run_in(tmp_path, bin_ / "python", "-c", code, *ROOMS) == f"{[None] * len(ROOMS)}\n"
    run_in(tmp_path, bin_ / "python", "-c", "from ddbench import Watch")
