"""Every kernel compiles for every GPU generation, without spills, local memory or narrow streams.

Compilation runs in a subprocess: in this process Triton is an interpreter.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from kernels.compile import ARCHS, MODULES, read_sass

pytestmark = pytest.mark.slow

FIELDS = {"kernel", "arch", "dtype", "registers", "spills", "shared_bytes", "load_bits", "store_bits"}
WRITES_A_STREAM = {
    "scale_rows",
    "cross_entropy_rows",
    "bce_rows_dense",
    "bce_rows_sparse",
    "bce_rows_weighted",
    "bce_rows_gradient",
    "unscale_in_place",
    "scale",
}


def compiled(*arguments) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels", "compile", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def hold(rows: list[dict]) -> None:
    """No spill and no local memory anywhere; what streams is read 128 bits at a time, and written so where it is."""
    for row in rows:
        name = f"{row['kernel']} {row['dtype']} {row['arch']} {row['shape']}"
        assert row["spills"] == 0, f"{name}: {row['spills']} local-memory instructions"
        if row["streaming"]:
            assert row["load_bits"] >= 128, f"{name}: loads {row['loads']}"
        if row["kernel"] in WRITES_A_STREAM:
            assert row["store_bits"] >= 128, f"{name}: stores {row['stores']}"


@pytest.mark.process
def test_the_losses_on_hopper():
    rows = compiled("--arch", "sm_90", "--op", "cross_entropy", "logit_stats")
    assert set(rows[0]) >= FIELDS
    assert {row["arch"] for row in rows} == {"sm_90"}
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16"}
    hold(rows)
    fused = [row for row in rows if row["kernel"] == "cross_entropy_rows" and row["shape"] == "8192x50304"]
    assert fused and all(row["load_bits"] == row["store_bits"] == 128 for row in fused)


@pytest.mark.process
def test_scaling_on_ampere_and_hopper():
    rows = compiled("--arch", "sm_80", "sm_90", "--op", "scale")
    assert {(row["dtype"], row["arch"]) for row in rows} == {
        (dtype, arch) for dtype in ("fp32", "bf16", "fp16", "mixed") for arch in ("sm_80", "sm_90")
    }
    hold(rows)


@pytest.mark.soak
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_on_every_generation(arch):
    rows = compiled("--arch", arch)
    assert {row["arch"] for row in rows} == {arch}
    hold(rows)


def test_every_op_lists_its_kernels():
    assert list(MODULES) == [
        "logit_stats",
        "fused_loss_kernel",
        "cross_entropy",
        "bce_with_logits",
        "multi_tensor_stats",
        "unscale",
        "scale",
        "activation_stats",
        "resolvent_mix",
        "selective_scan",
    ]


def test_machine_code_is_read_instruction_by_instruction():
    sass = """
        /*0010*/                   S2R R0, SR_TID.X ;                        /* 0x0000000000007919 */
        /*00e0*/              @!P0 LDG.E.EF.128 R8, desc[UR4][R2.64] ;       /* 0x0000000402088981 */
        /*00f0*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0100*/             @!UP0 LDG.E.64.STRONG.SYS R8, [R2] ;
        /*0110*/                   LDGSTS.E.BYPASS.128 [R8], [R2.64] ;
        /*0120*/                   LDG.E R8, [R2.64] ;
        /*0150*/                   STG.E.128 desc[UR4][R4.64], R8 ;          /* 0x0000000804007986 */
        /*0160*/                   STL.64 [R1], R8 ;
        /*0170*/                   LDL R8, [R1] ;
        /*0180*/                   ATOMG.E.ADD.64.STRONG.GPU PT, R8, [R1] ;
    """
    loads, stores, local = read_sass(sass)
    assert loads == Counter({128: 2, 16: 1, 64: 1, 32: 1}) and stores == Counter({128: 1}) and local == 2


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--arch", "sm_10"], ["--op", "softmax"], ["--nonsense"], []])
def test_usage_errors_exit_2(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "kernels", *(["compile", *arguments] if arguments else [])], capture_output=True, text=True
    )
    assert done.returncode == 2 and "error:" in done.stderr


def test_an_interpreter_cannot_compile(monkeypatch):
    """Reached only without the command line, which unsets the variable: the message says what to do."""
    from kernels import compile

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for real in this process")
    with pytest.raises(compile.CompileError, match="TRITON_INTERPRET"):
        next(compile.compile_all(["sm_90"], ["logit_stats"]))
