"""One run on several processes, over gloo: real launches by torchrun, held against the same run in one process."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from bench_cases import DTYPE_CONFIGS
from bench_cases.models import build_model, weights_sha256
from harness.cli import main
from harness.loss import training_loss
from harness.run.execute import load_run_data, make_batches, model_request
from instrument.results.claims import owner_of
from instrument.results.layout import RunFiles
from tests.harness.launched import FAULTY, LONGEST_S, ROOT, SMALL, ended, ids_of, launched, one_run, settled, several, torchrun

pytestmark = pytest.mark.process


def averaged_loss_of_step_1(settings):
    """What two ranks would report that each divide by their own targets."""
    data = load_run_data(settings)
    batch, model = make_batches(settings, data).step(1), build_model(model_request(settings, data))
    losses = []
    for half in batch.micro_batches(4):
        with torch.no_grad():
            logits = model(half.input_ids, half.attention_mask, half.last_token)
        losses.append(
            training_loss(
                logits,
                half.targets,
                loss=settings.case.task.loss,
                dtype=torch.float32,
                normalizer=half.n_targets,
                valid_vocab=data.valid_vocab,
            ).item()
        )
    return sum(losses) / 2


RUNS = [
    ("gpt2_clm", "fp32_true"),
    ("roberta_mlm", "fp32_true"),
    ("gpt2_multi_cls", "fp32_true"),
    ("roberta_single_cls", "amp_fp16"),
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Folders of the same runs by two processes and by one; the last of two processes hangs, which ends the launch."""
    folder = tmp_path_factory.mktemp("healthy")
    words = [["case", *run, *SMALL, "--eval-every", "3"] for run in RUNS]
    together = [[{}, [*w, "--out", str(folder / f"two-{w[1]}")]] for w in words]
    together.append([{}, [*words[0], "--parallel", "fsdp", "--keep-weights", "--out", str(folder / "fsdp-gpt2_clm")]])
    hang = ["case", FAULTY, "fp32_true", *SMALL, "--hang-after", "12", "--out", str(folder / "hang")]
    together.append([{"FAULT": "hang", "FAULT_SUM": ids_of(3, 2)}, hang])
    process = several(together)
    for w in words:
        assert main([*w, "--out", str(folder / f"one-{w[1]}")]) == 0
    code, _, err = ended(process)
    assert code != 0 and err.count("completed after 5 steps") == len(RUNS) + 1, err
    return folder, err


@pytest.mark.parametrize(("case", "config"), RUNS)
def test_two_ranks_train_as_one_process_with_the_same_global_batch(healthy, case, config):
    folder, _ = healthy
    (one, expected, scores), (two, steps, same_scores) = (one_run(folder / f"{n}-{case}") for n in ("one", "two"))
    assert two.status == "completed" and (two.config["world"], two.config["parallel"]) == (2, "ddp")
    assert two.run_id != one.run_id and "world" not in one.config
    tolerance = 1e-5 if config == "fp32_true" else 2e-3
    for a, b in zip(expected, steps, strict=True):
        assert (b.step, b.lr, b.samples, b.tokens, b.real_tokens, b.loss_scale) == (
            a.step,
            a.lr,
            a.samples,
            a.tokens,
            a.real_tokens,
            a.loss_scale,
        )
        for name in ("loss", "grad_norm", "grad_absmax", "logit_absmax"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=tolerance), (a.step, name)
        assert b.flops == a.flops
    assert [s.step for s in same_scores] == [0, 3, 5]
    assert same_scores[0].val_loss == scores[0].val_loss and same_scores[0].samples == scores[0].samples  # bit for bit
    assert same_scores[-1].val_loss == pytest.approx(scores[-1].val_loss, rel=tolerance)
    assert two.final_weights_sha256 is not None  # of both ranks, or the run would have ended otherwise


def test_a_loss_averaged_over_ranks_would_have_been_another(healthy):
    settings = settled("roberta_mlm")
    targets = [half.n_targets for half in make_batches(settings, load_run_data(settings)).step(1).micro_batches(4)]
    assert targets[0] != targets[1]
    loss = one_run(healthy[0] / "two-roberta_mlm")[1][0].loss
    assert abs(averaged_loss_of_step_1(settings) - loss) > 1e-4 * loss


def test_slices_are_trained_as_whole_tensors_are_bit_for_bit(healthy):
    (ddp, expected, _), (fsdp, steps, _) = (one_run(healthy[0] / f"{how}-gpt2_clm") for how in ("two", "fsdp"))
    assert fsdp.config["parallel"] == "fsdp" and fsdp.final_weights_sha256 == ddp.final_weights_sha256
    assert [s.loss for s in steps] == [s.loss for s in expected] and fsdp.val_loss == ddp.val_loss
    assert [s.grad_norm for s in steps] == pytest.approx([s.grad_norm for s in expected], rel=1e-12)
    assert [s.grad_underflow_frac for s in steps] == [s.grad_underflow_frac for s in expected]
    assert fsdp.flags["optimizer_states"] == ddp.flags["optimizer_states"]
    kept = load_file(RunFiles(healthy[0] / "fsdp-gpt2_clm", fsdp.run_id).weights)  # gathered from both ranks
    assert sum(tensor.numel() for tensor in kept.values()) == fsdp.n_params and "weights" not in ddp.flags
    model = build_model(model_request(settled("gpt2_clm"), load_run_data(settled("gpt2_clm"))))
    model.load_state_dict(kept, strict=False)
    assert weights_sha256(model) == fsdp.final_weights_sha256
    assert fsdp.flags["exp_avg_sq_zero_frac"] == ddp.flags["exp_avg_sq_zero_frac"]


def test_one_process_prints_and_writes(healthy):
    folder, errors = healthy
    assert errors.count("completed after 5 steps") == len(RUNS) + 1 and errors.count("\nharness: hung: no rank") == 1
    assert "Warning" not in errors[: errors.index("harness: hung: no rank")]
    assert [p.name for p in (folder / "two-gpt2_clm" / "runs").iterdir()] == [one_run(folder / "two-gpt2_clm")[0].run_id]
    modules = next((folder / "two-gpt2_clm").glob("runs/*/activations.jsonl")).read_text().splitlines()
    alone = next((folder / "one-gpt2_clm").glob("runs/*/activations.jsonl")).read_text().splitlines()
    for a, b in zip(map(json.loads, alone), map(json.loads, modules), strict=True):
        if not a["module"].startswith("head"):  # the logits themselves: seen once by each process, then left to the loss
            assert (a["module"], a["direction"], a["nan"]) == (b["module"], b["direction"], b["nan"])
            assert b["absmax"] == pytest.approx(a["absmax"], rel=1e-3)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Runs that diverge, by two processes and by one: an overflow in one micro-batch, and one of the ranks' sum. In the last of
    two processes the second is killed, which ends the launch."""
    folder = tmp_path_factory.mktemp("failures")
    runs = {"overflow": "fp32_true", "sum": "fp16_naive_fp32_states"}
    plans = {n: ({"FAULT": n, "FAULT_SUM": ids_of(2, 3)}, ["case", FAULTY, config, *SMALL]) for n, config in runs.items()}
    together = [[environment, [*words, "--out", str(folder / f"two-{n}")]] for n, (environment, words) in plans.items()]
    kill = ["case", FAULTY, "fp32_true", *SMALL, "--out", str(folder / "kill")]
    together.append([{"FAULT": "kill", "FAULT_SUM": ids_of(3, 2)}, kill])
    process = several(together)
    with pytest.MonkeyPatch.context() as patch:
        for n, (environment, words) in plans.items():
            for name, value in environment.items():
                patch.setenv(name, value)
            assert main([*words, "--out", str(folder / f"one-{n}")]) == 0
    code, _, err = ended(process)
    assert code != 0 and "Signal 9 (SIGKILL)" in err, err  # as torchrun says it
    return folder


def test_the_first_producer_is_named_with_its_rank(failures):
    (one, _, _), (two, _, _) = (one_run(failures / f"{n}-overflow") for n in ("one", "two"))
    a, b = one.first_nonfinite, two.first_nonfinite
    assert (a.rank, b.rank, b.replay["ranks"]) == (None, 1, [1]) and two.divergence_step == 2
    found = ("step", "microbatch", "phase", "module", "op", "cause", "kind", "dtype", "tensor")
    assert [getattr(b, name) for name in found] == [getattr(a, name) for name in found]
    assert (b.step, b.microbatch, b.phase, b.module, b.op) == (2, 3, "forward", "transformer.h.1.mlp", "aten.mul")
    assert b.replay["matched"] and "step 2, rank 1, micro-batch 3, forward, transformer.h.1.mlp" in two.error
    run = failures / "two-overflow" / "runs" / two.run_id
    assert json.loads((run / "forensics.json").read_text())["first_nonfinite"]["rank"] == 1
    assert (run / "culprit.safetensors").stat().st_size > 1_000 and (run / "snapshot" / "tensors.safetensors").exists()
    assert list((failures / "two-overflow" / "traces").iterdir())


def test_a_sum_over_ranks_that_overflows_is_named_as_such(failures):
    (one, _, _), (two, _, _) = (one_run(failures / f"{n}-sum") for n in ("one", "two"))
    assert (one.first_nonfinite.op, one.first_nonfinite.microbatch) == ("aten.add_", 3)  # four times 20,000 in fp16
    b = two.first_nonfinite
    assert (b.phase, b.op, b.cause, b.kind, b.rank) == ("backward", "ddb.sum_over_ranks_", "overflow", "inf", None)
    assert b.replay["parameter"] == "transformer.h.1.mlp.c_proj.bias" and "finite on every rank" in two.error


def test_a_killed_rank_ends_the_run_with_a_row_and_the_claim_is_free(failures):
    row, steps, _ = one_run(failures / "kill")
    assert (row.status, row.flags["failed_rank"], [s.step for s in steps]) == ("error", 1, [1, 2])
    assert "rank 1 (process " in row.error and "ended without reporting an error" in row.error
    assert row.flags["death"] == {"cause": "killed", "goes_on": True}
    assert owner_of(failures / "kill", row.run_id) is None


def test_a_rank_that_hangs_is_found_where_it_is(healthy):
    folder, errors = healthy
    row, steps, _ = one_run(folder / "hang")
    assert (row.status, len(steps)) == ("hung", 2) and "no rank has made progress for 12 s" in row.error
    assert row.flags["death"] == {"cause": "hung", "goes_on": True, "hang_after_s": 12.0}
    assert "rank 1 is at faulty_case.py:" in row.error and "rank 0 is at loop.py:" in row.error and row.error in errors


def failed_launch(fault, at, tmp_path, environment, *more):
    words = ["case", FAULTY, "fp32_true", *SMALL, "--out", str(tmp_path), *more]
    code, _, err = launched(words, environment, FAULT=fault, FAULT_SUM=at)
    assert code != 0
    return err


@pytest.mark.soak
@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [("raise", "error", "rank 1: ValueError: a bad value"), ("oom", "oom", "rank 1: OutOfMemoryError: CUDA out of memory")],
)
def test_an_error_on_one_rank_is_the_runs(tmp_path, command_environment, fault, status, words):
    err = failed_launch(fault, ids_of(3, 3), tmp_path, command_environment)
    row, steps, _ = one_run(tmp_path)
    assert (row.status, len(steps)) == (status, 2) and words in row.error
    assert row.flags["death"]["cause"] == {"raise": "exception", "oom": "cuda_oom"}[fault]
    assert "faulty_case.py" in row.flags["traceback"] and words.removeprefix("rank 1: ") in err  # torchrun's summary, too


@pytest.mark.soak
def test_the_others_end_when_rank_0_is_killed_and_the_same_command_starts_again(tmp_path, command_environment):
    failed_launch("kill", ids_of(3, 0), tmp_path, command_environment)
    assert not (tmp_path / "results.jsonl").exists()
    words = ["case", FAULTY, "fp32_true", *SMALL, "--out", str(tmp_path)]
    code, _, err = launched(words, command_environment, FAULT="none", FAULT_SUM="0")
    assert code == 0 and one_run(tmp_path)[0].status == "completed", err


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_stops_all_ranks_after_one_step_and_the_run_resumes_bit_for_bit(tmp_path, command_environment, parallel):
    words = ["case", "gpt2_clm", "bf16_pure_sr", *SMALL, "--parallel", parallel]
    words[words.index("--max-steps") + 1] = "60"
    process = torchrun(["-m", "harness", *words, "--out", str(tmp_path / "a")], command_environment)
    deadline_s = time.monotonic() + LONGEST_S
    while not any(p.stat().st_size > 2_000 for p in (tmp_path / "a").glob("training_logs/*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    row, steps, _ = one_run(tmp_path / "a")
    assert code != 0 and row.status == "preempted" and f"checkpoint-{len(steps)}" in row.error, err
    assert launched([*words, "--out", str(tmp_path / "a")], command_environment)[0] == 0
    assert launched([*words, "--out", str(tmp_path / "b")], command_environment)[0] == 0
    (again, all_steps, _), (whole, expected, _) = one_run(tmp_path / "a"), one_run(tmp_path / "b")
    assert again.final_weights_sha256 == whole.final_weights_sha256 and again.flags["resumed"]["behind_steps"] == [len(steps)]
    assert [(s.step, s.loss, s.grad_norm) for s in all_steps] == [(s.step, s.loss, s.grad_norm) for s in expected]


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_every_configuration_runs_on_two_ranks(tmp_path, command_environment, parallel):
    words = {config: ["case", "roberta_multi_cls", config, *SMALL] for config in DTYPE_CONFIGS}
    together = [[{}, [*w, "--parallel", parallel, "--out", str(tmp_path / f"two-{c}")]] for c, w in words.items()]
    process = several(together, command_environment)
    for config, w in words.items():
        assert main([*w, "--out", str(tmp_path / f"one-{config}")]) == 0
    code, _, err = ended(process, 3 * LONGEST_S)
    assert code == 0, err
    refused = {"fp32_tf32"} | ({"amp_bf16_8bit", "fp16_naive_clip16"} if parallel == "fsdp" else set())
    for config in DTYPE_CONFIGS:
        (one, expected, _), (two, steps, _) = (one_run(tmp_path / f"{n}-{config}") for n in ("one", "two"))
        if config in refused:
            assert two.status == "unsupported" and two.error, config
            continue
        assert (two.status, two.divergence_step) == (one.status, one.divergence_step), config
        assert steps[0].loss == pytest.approx(expected[0].loss, rel=1e-5 if config == "fp32_true" else 1e-2), config


@pytest.mark.soak
def test_a_sharded_runs_failure_has_its_rank_and_module(tmp_path, command_environment):
    words = ["case", FAULTY, "fp32_true", *SMALL, "--parallel", "fsdp", "--out", str(tmp_path)]
    code, _, err = launched(words, command_environment, FAULT="overflow", FAULT_SUM=ids_of(2, 3))
    first = one_run(tmp_path)[0].first_nonfinite
    assert code == 0 and (first.rank, first.step, first.microbatch, first.phase) == (1, 2, 3, "forward"), err
    assert first.module == "transformer.h.1" and first.op is None and first.replay is None


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, ["--parallel", "fsdp"], "this is one process: start it with `torchrun"),
        (
            {"WORLD_SIZE": "2"},
            [],
            "WORLD_SIZE is 2, and RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set",
        ),
        ({"WORLD_SIZE": "two"}, [], "WORLD_SIZE is 'two' in the environment"),
        (
            {
                "WORLD_SIZE": "3",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "3",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "1",
            },
            [],
            "8 rows in micro-batches of 2 make 4, which cannot be dealt equally to 3 ranks; give a --batch-size that 3 divides",
        ),
        (
            {
                "WORLD_SIZE": "8",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "8",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "1",
            },
            [],
            "give a --micro-batch that divides 1",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "1",
            },
            ["--parallel", "fsdp", "--trace", "2"],
            "--trace does not go with --parallel fsdp",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "1",
            },
            ["--mtbf", "100"],
            "--mtbf is chosen by each process' own clock",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, monkeypatch, environment, words, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["case", "gpt2_clm", "fp32_true", *SMALL, *words, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_matrix_is_not_started_by_torchrun_and_one_process_says_so(capsys, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["matrix", "--dry-run"]) == 2
    assert "matrix was started as 2 processes of one job" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["matrix", "--dry-run"]) == 2 and capsys.readouterr().err == ""
    monkeypatch.delenv("MASTER_ADDR")  # not torchrun's doing: who knows whether there is another
    assert main(["matrix", "--dry-run"]) == 2 and "MASTER_ADDR is not set" in capsys.readouterr().err


def test_a_world_of_one_is_the_same_run(monkeypatch, capsys, tmp_path):
    words = ["case", "gpt2_clm", "fp32_true", *SMALL, "--dry-run", "--json", "--out", str(tmp_path)]
    assert main(words) == 0
    alone = capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == json.loads(alone)["run_id"]


def test_a_rank_ends_without_finalising_its_interpreter():
    """Threads inside C++ that ask for the interpreter's lock while it finalises abort the process."""
    program = """
import atexit, threading
from harness.parallel.ranks import end_process
class Finalised:
    def __del__(self): print("finalised", flush=True)
kept = Finalised()
atexit.register(print, "temporary files deleted")
threading.Thread(target=threading.Event().wait).start()  # finalising would wait for it
print("row", end=" ")
end_process(3)
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr) == (3, "row temporary files deleted\n", "")
