"""The two generations of libraries that are supported: their pins, and what we lean on in them, by name.

What has moved between generations, or belongs to nobody's promise, stands in `LEANED_ON`: in a third generation this
test says which name is gone before a run does.
"""

import ast
import re
import shutil
import subprocess
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from harness.doctor import constraints_of, pinned

ROOT = Path(__file__).resolve().parents[1]
MAIN, EARLIER = ROOT / "constraints.txt", ROOT / "constraints-torch2.11.txt"
GENERATIONS = {
    MAIN: {"torch": "2.13", "triton": "3.9", "transformers": "5.23"},
    EARLIER: {"torch": "2.11", "triton": "3.6", "transformers": "5.17"},
}
ONLY_IN_ONE = {"httpcore", "httpx", "httpcore2", "httpx2", "truststore"}
"""What huggingface_hub 1 and 2 fetch with."""
LEANED_ON = [
    "torch:OutOfMemoryError",
    "torch:AcceleratorError",
    "torch.backends:fp32_precision",
    "torch.backends.cuda:matmul.fp32_precision",
    "torch.backends.cuda:matmul.allow_fp16_accumulation",
    "torch.backends.cuda:matmul.allow_fp16_reduced_precision_reduction",
    "torch.backends.cudnn:rnn.fp32_precision",
    "torch.backends.mkldnn:matmul.fp32_precision",
    "torch.backends.cuda:allow_fp16_bf16_reduction_math_sdp",
    "torch.nn.attention:SDPBackend.CUDNN_ATTENTION",
    "torch.amp:GradScaler._unscale_grads_",
    "torch.optim.adamw:adamw",
    "torch.cuda.memory:_dump_snapshot",
    "torch.cuda.memory:_record_memory_history",
    "torch.utils.flop_counter:register_flop_formula",
    "torch.library:register_fake",
    "torch.library:register_autograd",
    "torch._C:_len_torch_dispatch_stack",
    "torch._C:_current_autograd_node",
    "torch._C._autograd:_get_sequence_nr",
    "torch._C._functorch:is_functorch_wrapped_tensor",
    "torch.autograd.graph:increment_version",
    "torch.multiprocessing.reductions:StorageWeakRef",
    "torch.distributed.fsdp:fully_shard",
    "torch.distributed.fsdp:FSDPModule.set_gradient_divide_factor",
    "torch.distributed.fsdp:FSDPModule.set_force_sum_reduction_for_comms",
    "torch.distributed.tensor:distribute_tensor",
    "torch.distributed.tensor:DTensor.from_local",
    "torch.distributed.tensor:DTensor.full_tensor",
    "triton.compiler:ASTSource",
    "triton.backends.compiler:GPUTarget",
    "triton.runtime.interpreter:_patch_lang_tensor",
    "transformers:AttentionMaskInterface.register",
    "transformers.masking_utils:find_packed_sequence_indices",
    "transformers.masking_utils:sdpa_mask",
    "transformers.debug_utils:DebugUnderflowOverflow",
]


def requirements() -> set[str]:
    """Every package that setup.py asks for, extras too, by its bare name in lower case."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    asked = {
        word.arg: ast.literal_eval(word.value)
        for call in calls
        for word in call.keywords
        if word.arg in ("install_requires", "extras_require")
    }
    lists = [asked["install_requires"], *asked["extras_require"].values()]
    return {re.match(r"[A-Za-z0-9._-]+", name)[0].lower() for names in lists for name in names}


@pytest.mark.parametrize("file", GENERATIONS, ids=lambda file: file.stem)
def test_a_generation_pins_everything_that_is_asked_for(file):
    pins = {name.lower(): pin for name, pin in pinned(file).items()}
    for name, minor in GENERATIONS[file].items():
        assert pins[name].startswith(f"{minor}."), name
    assert len(requirements()) > 30 and requirements() <= set(pins)


def test_the_generations_differ_in_what_they_must_and_in_nothing_else():
    main, earlier = pinned(MAIN), pinned(EARLIER)
    assert {name for name in main.keys() & earlier.keys() if main[name] != earlier[name]} == {
        "torch",
        "triton",
        "transformers",
        "huggingface_hub",
    }
    assert main.keys() ^ earlier.keys() == ONLY_IN_ONE


def test_a_torch_is_compared_with_its_own_generation():
    assert constraints_of("2.11.0+cu130") == EARLIER
    assert constraints_of("2.13.0+cpu") == constraints_of("2.14.0") == MAIN


@pytest.mark.parametrize("place", LEANED_ON)
def test_what_we_lean_on_is_there(place):
    module, _, path = place.partition(":")
    found = import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{place} is gone (torch {torch.__version__}, transformers {version('transformers')})"
        found = getattr(found, name)


@pytest.mark.process
def test_another_constraints_file_is_taken_and_one_that_is_not_there_refused(tmp_path):
    """`make CONSTRAINTS=...` reaches the installer, which names the files there are."""
    shutil.copy(ROOT / "install.sh", tmp_path)
    for file in GENERATIONS:
        shutil.copy(file, tmp_path)
    refused = subprocess.run(
        ["sh", "install.sh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CONSTRAINTS": "constraints-torch9.txt"},
    )
    assert refused.returncode == 1 and refused.stderr == (
        "install: there is no file constraints-torch9.txt; CONSTRAINTS is one of: constraints-torch2.11.txt constraints.txt\n"
    )
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@" >> calls\ncase "$*" in *" -m venv "*) exit 0;; esac\n')
    fake.chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    shutil.copy(fake, tmp_path / "venv" / "bin" / "python")
    taken = subprocess.run(
        ["sh", "install.sh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CONSTRAINTS": EARLIER.name, "VENV": "venv", "PYTHON": str(fake)},
    )
    assert taken.returncode == 0 and f"-c {EARLIER.name} -e .[dev]" in (tmp_path / "calls").read_text()
