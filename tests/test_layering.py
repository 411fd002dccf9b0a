"""Imports go down only, and other libraries do not take our `kernels` for theirs."""

import subprocess
import sys

import pytest


def modules_after(statement: str, *watched: str) -> list[str]:
    code = f"import sys; {statement}; print(*[m for m in {watched!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.process
@pytest.mark.parametrize(
    "statement",
    [
        "import importlib, pkgutil, instrument.results as room; "
        "[importlib.import_module(f'instrument.results.{m.name}') for m in pkgutil.iter_modules(room.__path__)]",
        "import harness.cli, harness.settings",
        "import bench_cases.own, bench_cases.models, bench_cases.collate",
        "import harness.matrix.stability, harness.commands.list",
        "import kernels, kernels.float_formats",
        "import bench_cases.data",
    ],
)
def test_what_must_be_light_imports_no_torch(statement):
    assert modules_after(statement, "torch", "triton", "transformers", "datasets") == []


@pytest.mark.process
def test_the_whole_report_imports_no_torch():
    """Every module of it, each command's and each figure's."""
    everything = (
        "import importlib, pkgutil, report; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(report.__path__, 'report.') "
        "if not m.name.endswith('__main__')]"
    )
    assert modules_after(everything, "torch", "triton", "transformers", "datasets", "harness") == []
    of_the_kernels = "*[m for m in sys.modules if m.startswith('kernels.')]"
    code = f"import sys; {everything}; print({of_the_kernels})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["kernels.float_formats"]
    assert modules_after(everything, "report.cli", "report.tables", "report.export.trackers") == [
        "report.cli",
        "report.tables",
        "report.export.trackers",
    ]


@pytest.mark.process
def test_the_layers_hold():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_transformers_does_not_take_our_kernels_for_the_hubs():
    from transformers.utils.import_utils import is_kernels_available

    assert not is_kernels_available()


def test_our_kernels_define_no_get_kernel():
    import kernels

    assert not hasattr(kernels, "get_kernel")


@pytest.mark.process
def test_bitsandbytes_loads_without_a_warning_about_our_kernels():
    pytest.importorskip("bitsandbytes")
    code = (
        "import torch; from harness.optimizer import adamw_for;"
        "adamw_for('8bit', [torch.nn.Parameter(torch.zeros(2, 2))], lr=1e-3, eps=1e-8, weight_decay=0.0, seed=0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_no_module_reaches_itself_through_its_imports():
    """Imports inside functions count; those for type checkers alone do not."""
    import grimp
    import networkx

    rooms = ("bench_cases", "ddbench", "harness", "instrument", "kernels", "report")
    imports = grimp.build_graph(*rooms, exclude_type_checking_imports=True, cache_dir=None)
    graph = networkx.DiGraph((a, b) for a in imports.modules for b in imports.find_modules_directly_imported_by(a))
    assert graph.number_of_edges() > 500
    assert not [circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]
