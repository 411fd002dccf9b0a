"""Imports go down only, and other libraries do not take our `kernels` for theirs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
        "import harness.commands.list",
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
    assert modules_after(everything, "report.cli", "report.tables", "report.export") == [
        "report.cli",
        "report.tables",
        "report.export",
    ]


@pytest.mark.process
def test_the_layers_hold():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


ROOMS = ("bench_cases", "ddbench", "harness", "instrument", "kernels", "report")


def imports_of(*rooms):
    """Who imports whom, with imports inside functions, without those for type checkers alone."""
    import grimp
    import networkx

    imports = grimp.build_graph(*rooms, exclude_type_checking_imports=True, cache_dir=None)
    return networkx.DiGraph((a, b) for a in imports.modules for b in imports.find_modules_directly_imported_by(a))


def outside_of_all_layers(modules, contracts):
    """The modules below a room with layers that no layer holds. A room and its `__main__` may import all of it."""
    layers = {module.strip() for contract in contracts for layer in contract.get("layers", ()) for module in layer.split("|")}
    layers = {layer for layer in layers if "." in layer}
    rooms = {layer.partition(".")[0] for layer in layers}
    packages = {module.rpartition(".")[0] for module in modules}

    def free(module):
        room, _, name = module.partition(".")
        return room not in rooms or name == "__main__" or module in packages

    return sorted(
        module for module in modules if not free(module) and not any(f"{module}.".startswith(f"{layer}.") for layer in layers)
    )


def test_every_module_has_a_layer():
    """Import-linter says nothing about a module that no layer names."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules = set(imports_of(*ROOMS).nodes)
    assert {module.partition(".")[0] for module in modules} == set(ROOMS)
    assert outside_of_all_layers(modules, contracts) == []
    planted = {"harness.upward", "harness.forensics.upward", "instrument.upward", "kernels.upward", "report.upward"}
    assert outside_of_all_layers(modules | planted, contracts) == sorted(planted), "a new module that no layer names"
    assert outside_of_all_layers(modules | {"harness.run.upward"}, contracts) == [], "a new module of a package is in its layer"


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
    import networkx

    graph = imports_of(*ROOMS)
    assert graph.number_of_edges() > 500
    assert not [circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]


def packages_in_a_circle(graph):
    """Groups of packages and modules directly in a room of which each reaches the others."""
    import networkx

    whole = networkx.DiGraph()
    for pair in graph.edges:
        ours, theirs = (".".join(module.split(".")[:2]) for module in pair)
        if ours != theirs and "." in ours and "." in theirs:
            whole.add_edge(ours, theirs)
    return [sorted(circle) for circle in networkx.strongly_connected_components(whole) if len(circle) > 1]


def test_no_package_reaches_itself_through_another():
    graph = imports_of(*ROOMS)
    assert packages_in_a_circle(graph) == []
    graph.add_edge("instrument.replay.replays", "instrument.watch.surface")
    assert packages_in_a_circle(graph) == [["instrument.replay", "instrument.watch"]]
