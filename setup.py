"""Package metadata. Versions that are tested together stand in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="datatype-dynamics-bench",
    version="0.1.0",
    description="Which floating-point configuration to train with on this GPU, and why one failed",
    python_requires=">=3.11",
    packages=[*find_packages(include=["harness*", "kernels*", "instrument*", "bench_cases*", "report*"]), "templates"],
    package_data={"templates": ["*", "*/*"]},
    install_requires=[
        "torch", "triton; platform_system == 'Linux'", "transformers", "datasets", "bitsandbytes",
        "nvidia-ml-py", "rich", "matplotlib", "seaborn", "jinja2", "msgspec", "psutil", "scipy",
        "scikit-learn", "adjustText", "numpy", "pandas", "tokenizers", "safetensors",
    ],
    extras_require={
        "pdf": ["weasyprint>=70"],
        "ray": ["ray>=2.60"],
        "track": ["tensorboard", "wandb"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "import-linter", "accelerate", "weasyprint>=70", "pypdf",
                "tensorboard", "perfetto", "viztracer", "ray>=2.60"],
    },
)
