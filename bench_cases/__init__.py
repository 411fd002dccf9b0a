"""What is benchmarked: cases, dtype configurations, presets, models, data. No training code.

Importing this package imports neither torch nor numpy: declarations only.
"""

from bench_cases.architectures import ARCHITECTURES, PRESETS, TASKS, Architecture, Preset, Task
from bench_cases.cases import CASES, Case, LearningRates
from bench_cases.dtype_configs import DTYPE_CONFIGS, DtypeConfig
from bench_cases.lookup import BadDeclaration, UnknownId, lookup

__all__ = [
    "ARCHITECTURES",
    "CASES",
    "DTYPE_CONFIGS",
    "PRESETS",
    "TASKS",
    "Architecture",
    "BadDeclaration",
    "Case",
    "DtypeConfig",
    "LearningRates",
    "Preset",
    "Task",
    "UnknownId",
    "lookup",
]
