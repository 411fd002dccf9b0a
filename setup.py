"""Package metadata, and how a clone's rooms become one package. Versions that are tested together: constraints.txt.

A wheel holds nothing at its top but `ddbench`: `harness`, `report`, `kernels` would be names in somebody's site-packages that
other projects use too. The rooms are copied below it, and what names them (imports, dotted names in strings, commands that
are printed) is rewritten on the way. `pip install -e .` brings the dependencies, and of the clone `ddbench` alone.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ROOMS = ("bench_cases", "harness", "instrument", "kernels", "report")
BESIDE = ("templates", "constraints.txt", "constraints-torch2.11.txt")
"""What the rooms look for beside themselves."""
ROOM = rf"(?:{'|'.join(ROOMS)})"
DOTTED = re.compile(rf"""(?<=["'])({ROOM}(?:\.\w+)+)(?=(?::\w+)?["']|\.\{{)""")
BUILDER = re.compile(r"(?<=build: str = \")ddbench\.")
"""An architecture's builder is a part of a run's settings, and so of its id: `bench_cases.models` reads it as it is."""


def installed(text: str) -> str:
    """A room's source as a part of ``ddbench``."""
    text = re.sub(rf"(?m)^(\s*(?:>>> )?from )(?={ROOM}(?:\.[\w.]+)? import )", r"\1ddbench.", text)
    text = re.sub(rf"(?m)^(\s*import )(?={ROOM}\.[\w.]+ as )", r"\1ddbench.", text)
    text = re.sub(rf"(?m)^(\s*)(import {ROOM}(?: as \w+)?)$", r"\1from ddbench \2", text)
    text = DOTTED.sub(lambda found: f"ddbench.{found[0]}" if _is_module(found[0]) else found[0], text)
    text = BUILDER.sub("", text)
    text = re.sub(r"python -m harness\b", "ddb", text)
    text = re.sub(r"python -m (report|kernels)\b", r"ddb \1", text)
    text = re.sub(r"-m harness\b", "-m ddbench", text)
    return re.sub(rf"""(["']-m["'], ["'])(?={ROOM}["'])""", r"\1ddbench.", text)


def _is_module(name: str) -> bool:
    """Whether it names a module of the rooms, or something in one."""
    path = ROOT / name.replace(".", "/")
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in (path, path.parent) if place != ROOT)


def sources() -> dict[Path, Path]:
    """Every file of the package, from its place in it to its place in the clone."""
    rooms = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    beside = [path for name in BESIDE for path in (ROOT / name, *(ROOT / name).rglob("*")) if path.is_file()]
    return {path.relative_to(ROOT / "ddbench"): path for path in (ROOT / "ddbench").glob("*.*")} | {
        path.relative_to(ROOT): path for path in rooms + beside
    }


class BuildOnePackage(build_py):
    """Puts the rooms into ``ddbench``."""

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier version built would be in the wheel too
        for place, source in sources().items():
            target = Path(self.build_lib) / "ddbench" / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix in (".py", ".j2"):
                target.write_text(installed(source.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copyfile(source, target)

    def get_source_files(self) -> list[str]:
        """What a source distribution holds."""
        return [str(path.relative_to(ROOT)) for path in sources().values()]


setup(
    name="datatype-dynamics-bench",
    version=re.search(r'(?m)^__version__ = "(.+)"', (ROOT / "ddbench" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="Which floating-point configuration to train with on this GPU, and why one failed",
    python_requires=">=3.11",
    packages=["ddbench"],
    cmdclass={"build_py": BuildOnePackage},
    entry_points={"console_scripts": ["ddb = ddbench.__main__:main"]},
    install_requires=[
        "torch",
        "triton; platform_system == 'Linux'",
        "transformers",
        "datasets",
        "bitsandbytes",
        "nvidia-ml-py",
        "rich",
        "matplotlib",
        "seaborn",
        "jinja2",
        "msgspec",
        "psutil",
        "filelock>=3.30",
        "scipy",
        "scikit-learn",
        "numpy",
        "pandas",
        "tokenizers",
        "safetensors",
        "argcomplete",
    ],
    extras_require={
        "pdf": ["weasyprint>=70"],
        "ray": ["ray>=2.60"],
        "track": ["tensorboard", "wandb"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "import-linter",
            "accelerate",
            "weasyprint>=70",
            "pypdf",
            "tensorboard",
            "perfetto",
            "viztracer",
            "ray>=2.60",
            "mypy",
            "setuptools",
        ],
    },
)
