"""A sharded run's checkpoints: whole, as those of a run whose ranks have everything, and resumed from bit for bit."""

import os

import pytest
from safetensors.torch import load_file

from bench_cases import DTYPE_CONFIGS
from instrument.results.claims import owner_of
from tests.harness.launched import FAULTY, HERE, LONGEST_S, SMALL, ended, ids_of, one_run, several, torchrun
from tests.soak.reliability import same_run

pytestmark = pytest.mark.process
CONFIGS = ("fp32_true", "amp_fp16", "bf16_pure_sr")
SHARDED = ["--parallel", "fsdp", "--dropout", "0.1", "--eval-every", "2"]
INTERRUPTED = 75


def plan(out, config, fault="none", *more):
    """A run of `several`; its fault is in the second rank's last micro-batch of step 3."""
    return [{"FAULT": fault, "FAULT_SUM": ids_of(3, 3)}, ["case", FAULTY, config, *SMALL, *more, "--out", str(out)]]


def checkpoints(out):
    return {path.name: path for path in out.glob("runs/*/checkpoint-*")}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Whole runs, stopped and resumed ones, and ones that end at their checkpoint, sharded and not; and one that
    resumes after a rank's failure while a checkpoint is made, from the last but one, since the last is damaged."""
    folder = tmp_path_factory.mktemp("sharded")
    died = plan(folder / "died", "fp32_true", "kill in a checkpoint", *SHARDED, "--checkpoint-every", "1")
    code, _, err = ended(several([died]))
    assert code != 0
    kept = one_run(folder / "died"), sorted(checkpoints(folder / "died")), err
    damaged = checkpoints(folder / "died")["checkpoint-2"] / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    runs = [plan(folder / "died", "fp32_true", "none", *SHARDED, "--checkpoint-every", "1")]
    for config in CONFIGS:
        runs += [
            plan(folder / f"whole-{config}", config, "none", *SHARDED),
            [*plan(folder / f"parts-{config}", config, "stop", *SHARDED), INTERRUPTED],
            plan(folder / f"parts-{config}", config, "none", *SHARDED),
        ]
    for how in ("ddp", "fsdp"):
        runs.append([*plan(folder / f"left-{how}", "fp32_true", "stop", "--parallel", how), INTERRUPTED])
    code, _, err = ended(several(runs))
    assert code == 0, err
    return folder, kept


@pytest.mark.parametrize("config", CONFIGS)
def test_stopped_and_continued_a_sharded_run_equals_the_one_that_was_not(sharded, config):
    parts, whole = sharded[0] / f"parts-{config}", sharded[0] / f"whole-{config}"
    (row, steps, _), (expected, _, _) = one_run(parts), one_run(whole)
    assert same_run.differences(row.run_id, parts, whole) == [] and len(steps) == 5
    assert row.status == "completed" and row.flags["resumed"]["behind_steps"] == [3] and row.final_weights_sha256
    for fact in ("optimizer_states", "exp_avg_sq_zero_frac"):
        assert row.flags[fact] == expected.flags[fact]
    assert not checkpoints(parts), "there is nothing left to resume from"


def test_a_sharded_runs_checkpoint_has_what_that_of_whole_tensors_has(sharded):
    ddp, fsdp = (
        load_file(checkpoints(sharded[0] / f"left-{how}")["checkpoint-3"] / "tensors.safetensors") for how in ("ddp", "fsdp")
    )
    more = {name for name in fsdp if name.startswith("random/rank1/")}
    assert fsdp.keys() == ddp.keys() | more and more
    held = {name for name in ddp if not name.startswith("random/")}
    assert len(held) > 50 and any(name.endswith("/exp_avg_sq") for name in held)
    for name in held:
        assert fsdp[name].dtype == ddp[name].dtype and fsdp[name].equal(ddp[name]), name


def test_a_rank_that_is_killed_while_a_checkpoint_is_made_ends_the_run_and_the_one_before_counts(sharded):
    folder, ((row, steps, _), kept, err) = sharded
    assert (row.status, row.flags["failed_rank"], [s.step for s in steps]) == ("error", 1, [1, 2, 3]), err
    assert "rank 1 (process " in row.error and row.flags["death"] == {"cause": "killed", "goes_on": True}
    assert kept == ["checkpoint-1", "checkpoint-2"] and owner_of(folder / "died", row.run_id) is None


def test_a_damaged_checkpoint_is_skipped_by_all_ranks(sharded):
    row, _, _ = one_run(sharded[0] / "died")
    assert same_run.differences(row.run_id, sharded[0] / "died", sharded[0] / "whole-fp32_true") == []
    (why,) = row.flags["resumed"]["skipped"]
    assert row.flags["resumed"]["behind_steps"] == [1] and why.startswith("checkpoint-2: ") and "checksum differs" in why
    assert row.flags["checkpoints"]["written"] == 3


def test_slices_of_any_size_are_gathered_and_sharded_again(tmp_path):
    """Without elements, of tied weights, under every optimizer: see `sharded_state`."""
    code, out, err = ended(torchrun([str(HERE / "sharded_state.py"), str(tmp_path)], os.environ))
    assert (code, out.count("all is well")) == (0, 2), err


@pytest.mark.soak
@pytest.mark.parametrize("case", ["gpt2_multi_cls", "roberta_mlm"])
def test_every_configuration_resumes_on_three_ranks_that_divide_nothing(tmp_path, case):
    runs, words = [], ["--batch-size", "6", *SHARDED, "--checkpoint-every", "2"]
    own = tmp_path / "case.py"
    own.write_text(f"from tests.harness.faulty_case import of\nCASE = of({case!r})\n")
    at = ids_of(3, 2, case, batch_size=6)
    for config in DTYPE_CONFIGS:
        command = ["case", f"{own}:CASE", config, *SMALL, *words, "--out"]
        for fault, out in (("none", "whole"), ("stop", "parts"), ("none", "parts")):
            runs.append([{"FAULT": fault, "FAULT_SUM": at}, [*command, str(tmp_path / f"{out}-{config}")], 0, INTERRUPTED])
    code, _, err = ended(several(runs, processes=3), 3 * LONGEST_S)
    assert code == 0, err
    resumed = set()
    for config in DTYPE_CONFIGS:
        row, _, _ = one_run(tmp_path / f"parts-{config}")
        assert same_run.differences(row.run_id, tmp_path / f"parts-{config}", tmp_path / f"whole-{config}") == [], config
        resumed |= {config} if "resumed" in row.flags else set()
    assert resumed >= {c for c, d in DTYPE_CONFIGS.items() if d.in_default_matrix} - {"amp_bf16_8bit", "fp16_naive"}
