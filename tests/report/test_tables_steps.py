"""D, E, G and the cards of the failed: step logs as tables."""

import json
import math
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from instrument.results.contents import load
from instrument.results.schemas import FirstNonfinite, StepRecord, decode, encode
from report.errors import UsageError
from report.plots.style import TITLE_PT, wrap
from report.tables import TABLES, all_tables, d_grad_norm, e_logits, g_loss
from report.tables.failures import FAILURE_CAUSES, failures
from report.tables.headroom import headroom
from report.tables.machine import kernel_time
from report.tables.trust import trust
from tests.report.conftest import planted_run

CONFIGS = ("fp32_true", "amp_bf16", "fp16_naive")


def edit_log(folder, run_id, change):
    """Rewrite a run's steps: ``change(record)`` returns the fields to replace."""
    file = folder.path / "training_logs" / f"run_{run_id}.jsonl"
    records = [decode(line, StepRecord) for line in file.read_bytes().splitlines()]
    file.write_bytes(b"".join(encode(msgspec.structs.replace(r, **change(r))) + b"\n" for r in records))
    return load(folder.path)


def run_id(case, config, seed=0):
    return f"{case}-{config}-s{seed}-0badcafe"


def test_spikes_are_counted_relative_to_fp32_on_the_same_seed(plant):
    folder = plant(("gpt2_clm",), ("fp32_true", "amp_bf16"), (0,))
    folder = edit_log(folder, run_id("gpt2_clm", "amp_bf16"), lambda r: {"grad_norm": 9.0 if r.step in (20, 30, 40) else 1.0})
    folder = edit_log(folder, run_id("gpt2_clm", "fp32_true"), lambda r: {"grad_norm": 9.0 if r.step == 30 else 1.0})
    table = d_grad_norm.table(folder)
    summary = table.summary.set_index("dtype_config")
    assert summary.loc["amp_bf16", "spikes"] == 3 and summary.loc["amp_bf16", "relative_to_fp32"] == pytest.approx(3.0)
    assert table.data[table.data["spike"] & (table.data["dtype_config"] == "amp_bf16")]["step"].tolist() == [20, 30, 40]


def test_a_skipped_step_is_a_skip_and_no_spike(plant):
    folder = plant(("gpt2_clm",), ("fp32_true", "amp_bf16"), (0,))
    folder = edit_log(
        folder, run_id("gpt2_clm", "amp_bf16"), lambda r: {"step_skipped": True, "grad_norm": 99.0} if r.step == 30 else {}
    )
    data = d_grad_norm.table(folder).data
    row = data[(data["dtype_config"] == "amp_bf16") & (data["step"] == 30)].iloc[0]
    assert row["skipped"] and not row["spike"]


def test_the_last_finite_step_of_a_death_is_marked_also_at_step_two(plant):
    folder = plant(
        ("gpt2_clm",), CONFIGS, (0,), lambda case, config, seed: {"diverges_at": 2} if config == "fp16_naive" else {}
    )
    table = d_grad_norm.table(folder)
    assert table.data[table.data["last_finite"]][["dtype_config", "step"]].values.tolist() == [["fp16_naive", 1]]
    row = table.summary.set_index("dtype_config").loc["fp16_naive"]
    assert row["died_at"] == 2 and math.isnan(row["spikes_per_1000"])  # two steps have no rate


def test_logits_beyond_fp16_are_counted_and_said(plant):
    folder = plant(
        ("gpt2_multi_cls",),
        ("fp32_true", "amp_bf16"),
        (0,),
        lambda case, config, seed: {"logit": 70_000.0} if config == "amp_bf16" else {},
    )
    table = e_logits.table(folder)
    summary = table.summary.set_index("dtype_config")
    assert summary.loc["amp_bf16", "over_fp16_steps"] == 60 and summary.loc["fp32_true", "over_fp16_steps"] == 0
    assert "leave fp16's range in 1 of 2 runs" in table.title and "7e+04" in table.title


@pytest.mark.parametrize(("phase", "steps"), [("optimizer", 0), ("forward", 1)])
def test_logits_that_are_dead_because_a_parameter_is_are_no_overflow(plant, phase, steps):
    first = FirstNonfinite(
        step=1,
        microbatch=None,
        phase=phase,
        phase_surfaced=phase,
        module=None,
        op=None,
        tensor="param",
        source_tensor=None,
        kind="inf",
        dtype=None,
        cause=None,
        input_absmax=None,
        headroom_bits=None,
    )
    folder = plant(
        ("gpt2_multi_cls",),
        ("fp32_true", "fp16_naive"),
        (0,),
        lambda case, config, seed: {"diverges_at": 20, "first": first} if config == "fp16_naive" else {},
    )
    folder = edit_log(folder, run_id("gpt2_multi_cls", "fp16_naive"), lambda r: {"logit_nonfinite": 5} if r.step == 20 else {})
    table = e_logits.table(folder)
    row = table.summary.set_index("dtype_config").loc["fp16_naive"]
    assert row["nonfinite_steps"] == 1 and row["overflow_steps"] == steps
    assert ("No logit leaves" in table.title) is (steps == 0)


def test_the_number_of_logits_is_stated_where_it_is_known(plant):
    flags = {"simulated": True, "data": {"labels": 322, "classes": 26, "vocabulary": 1_000}}
    folder = plant(("gpt2_clm", "gpt2_multi_cls", "gpt2_single_cls"), ("fp32_true",), (0,), lambda *_: {"flags": flags})
    found = e_logits.table(folder).summary.set_index("case")["logits_per_step"].to_dict()
    assert found == {"gpt2_clm": 512_000, "gpt2_multi_cls": 8 * 322, "gpt2_single_cls": 8 * 26}


def test_of_masked_language_modelling_the_logits_of_targets_count_and_no_others(plant):
    flags = {"simulated": True, "data": {"vocabulary": 1_000}}
    folder = plant(("roberta_mlm",), ("fp32_true",), (0,), lambda *_: {"flags": flags})
    (unknown,) = e_logits.table(folder).summary["logits_per_step"]
    assert np.isnan(unknown)  # logs from before the targets were counted
    folder = edit_log(folder, run_id("roberta_mlm", "fp32_true"), lambda r: {"targets": 75 + r.step % 3})
    (known,) = e_logits.table(folder).summary["logits_per_step"]
    assert known == 76 * 1_000


def test_loss_minus_reference_is_taken_on_the_same_batch_only(plant):
    def change(case, config, seed):
        return {"end": 4.0} if config == "amp_bf16" else {"data_sha256": "others"} if config == "bf16_pure" else {}

    folder = plant(("gpt2_single_cls",), ("fp32_true", "amp_bf16", "bf16_pure"), (0,), change)
    data = g_loss.table(folder).data
    expected = [4.0 - 3.0] * 60 * np.arange(60) / 60
    found = data[data["dtype_config"] == "amp_bf16"]["minus_reference"].to_numpy()
    assert found == pytest.approx(expected) and found[0] == 0.0
    assert data[data["dtype_config"] == "bf16_pure"]["minus_reference"].isna().all()


def test_where_each_kind_diverges_is_the_title(plant):
    folder = plant(
        ("gpt2_single_cls", "gpt2_multi_cls"),
        ("fp32_true", "fp16_naive"),
        (0,),
        lambda case, config, seed: {"diverges_at": 9} if config == "fp16_naive" and "multi" in case else {},
    )
    table = g_loss.table(folder)
    assert table.title == "fp16_naive diverges in 0 of 1 single-label run and 1 of 1 multi-label run."
    assert table.summary.set_index(["case", "dtype_config"]).loc[("gpt2_multi_cls", "fp16_naive"), "death"] == "NaN @ 9"


def test_the_title_of_g_names_each_configuration_once_and_fits_two_lines(plant):
    dead = {"fp16_naive": 2, "fp16_naive_eps1e4": 1}
    configs = ("fp32_true", *dead, "fp16_naive_fp32_states")
    folder = plant(
        ("gpt2_single_cls", "gpt2_multi_cls"),
        configs,
        (0, 1),
        lambda case, config, seed: {"diverges_at": 9} if seed < dead.get(config, 0) else {},
    )
    title = g_loss.table(folder).title
    assert title == (
        "fp16_naive diverges in 2 of 2 single-label runs and 2 of 2 multi-label runs; fp16_naive_eps1e4 in 1 of 2 and "
        "1 of 2; fp16_naive_fp32_states does not diverge (4 runs)."
    )
    assert len(wrap(title, 6.9, TITLE_PT, 9)) <= 2


def test_the_heartbeat_takes_what_was_asked_for_and_refuses_what_is_not_there(plant):
    folder = plant(("gpt2_clm",), ("fp32_true", "amp_fp16", "bf16_pure"), (0,))
    assert set(d_grad_norm.table(folder).data["dtype_config"]) == {"fp32_true"}
    assert set(d_grad_norm.table(folder, ("bf16_pure",)).data["dtype_config"]) == {"fp32_true", "bf16_pure"}
    with pytest.raises(UsageError, match=r"no run of fp8.*this folder has fp32_true, amp_fp16 and bf16_pure"):
        d_grad_norm.table(folder, ("fp8",))


def test_every_table_stands_on_a_folder_with_a_single_dead_run(plant):
    folder = plant(("gpt2_multi_cls",), ("fp16_naive",), (0,), lambda *_: {"diverges_at": 1})
    tables = all_tables(folder)
    assert list(tables) == list("ABCDEFGH") == list(TABLES)
    assert all(table.title and table.caption and table.marks == ("SIMULATED",) for table in tables.values())
    assert {letter for letter, table in tables.items() if table.empty} >= {"B", "F", "H"}


def test_every_table_stands_on_hostile_names(plant):
    hostile = "<script>alert(1)</script>$\\frac{$\u202e=cmd"
    folder = plant(
        ("gpt2_clm",),
        ("fp32_true",),
        (0,),
        lambda *_: {"error": hostile, "status": "error", "data_source": hostile, "weights_source": "javascript:1" * 1_000},
    )
    assert all(table.title for table in all_tables(folder).values()) and failures(folder)[0].run.status == "error"
    assert [check.name for check in trust(folder)][:5] == ["fairness", "reference", "seeds", "exclusions", "overhead"]


def test_a_failure_is_described_from_its_row_and_from_its_forensics(plant):
    folder = plant(
        ("gpt2_clm",),
        ("fp32_true", "fp16_naive"),
        (0,),
        lambda case, config, seed: {"diverges_at": 3} if config == "fp16_naive" else {},
    )
    (card,) = failures(folder)
    assert card.sentence == "NaN @ 3: h.0.param became nan (float16) in the optimizer, from exp_avg_sq."
    assert "division" in card.cause and card.chain == () and card.trace_file is None
    file = folder.path / "runs" / card.run.run_id / "forensics.json"
    file.write_text(
        json.dumps(
            {"sentence": "Found.", "chain": [{"module": "h.0"}, 7], "remedies": "none", "kernels": [3, "text"], "trace_file": 5}
        )
    )
    (card,) = failures(load(folder.path))
    assert (
        card.sentence == "Found."
        and card.chain == ({"module": "h.0"},)
        and card.remedies == card.kernels == ()
        and card.trace_file is None
    )
    file.write_text("{torn")
    folder = load(folder.path)
    assert failures(folder)[0].sentence.startswith("NaN @ 3") and "forensics.json" in folder.defects[0].file


def test_headroom_is_in_bits_of_the_dtype_it_ran_in(plant):
    folder = plant(("gpt2_clm",), ("fp32_true",), (0,))
    name = folder.runs[0].run_id
    assert headroom(folder, name) is None
    rows = [
        {"step": 2, "module": "b", "order": 1, "direction": "fwd", "dtype": "fp16", "absmax": 65_504 / 8},
        {"step": 1, "module": "a", "order": 0, "direction": "bwd", "dtype": "torch.float16", "absmax": 65_504.0},
        {"step": 1, "module": "z", "order": 2, "direction": "fwd", "dtype": "int4", "absmax": 1.0},
    ]
    (folder.path / "runs" / name / "activations.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{torn\n[]\n{}")
    folder = load(folder.path)
    found = headroom(folder, name)
    assert [defect.line for defect in folder.defects] == [4, 5]
    assert found["module"].tolist() == ["a", "z", "b"] and found["headroom_bits"].tolist()[::2] == [0.0, 3.0]
    assert math.isnan(found["headroom_bits"][1])


def test_trust_tells_health_seeds_and_exclusions(plant):
    good = {check.name: check for check in trust(plant(("gpt2_clm",), ("fp32_true", "amp_bf16"), name="good"))}
    assert [good[name].ok for name in ("fairness", "reference", "seeds", "exclusions", "overhead")] == [True] * 3 + [None] * 2
    assert "throttled: ? for 6 completed runs; contended: ? for" in good["exclusions"].sentence
    folder = plant(
        ("gpt2_clm",),
        ("fp32_true", "amp_bf16"),
        (0, 1),
        lambda case, config, seed: {"end": 9.5, "flags": {"simulated": True, "hardware": {"throttled": config == "amp_bf16"}}},
        name="ill",
    )
    ill = {check.name: check for check in trust(folder)}
    assert [ill[name].ok for name in ("reference", "seeds", "exclusions")] == [False] * 3
    assert "; 2 of them throttled or contended" in ill["exclusions"].sentence and len(ill["exclusions"].run_ids) == 2
    assert "none was" not in good["exclusions"].sentence and "of them" not in good["exclusions"].sentence


def test_trust_says_of_how_many_runs_it_speaks_and_that_none_was_disturbed(plant):
    quiet = {"flags": {"simulated": True, "hardware": {"throttled": False, "contended": False}}}
    for seeds, who in (((0,), "The one run shares"), ((0, 1), "All 2 runs share")):
        folder = plant(("gpt2_clm",), ("fp32_true", "amp_bf16"), seeds, lambda *_: dict(quiet), name=f"of {len(seeds)}")
        checks = {check.name: check for check in trust(folder)}
        assert checks["fairness"].sentence.startswith(who) and checks["exclusions"].ok is True
        assert checks["exclusions"].sentence.endswith("; none was throttled or contended.")


def test_one_step_with_one_logit_that_is_not_finite_counts():
    steps = {"logit_nonfinite": np.array([0, 1, 2, np.nan]), "logit_absmax": np.array([1.0, 1.0, 1.0, np.inf])}
    found = e_logits.nonfinite_logits(SimpleNamespace(steps=lambda _: steps), SimpleNamespace(run_id=""))
    assert found.tolist() == [False, True, True, True]


def test_five_kernels_of_a_profile_are_listed():
    top = [{"name": str(k), "total_s": 9.0 - k, "count": 2} for k in range(7)]
    flags = {"time_by_kernel": {"seconds": {"matmul": {"forward": 9.0}}, "top": top}, "trace": {"steps": 2}}
    record = planted_run("gpt2_clm", "fp32_true", 0, flags=flags)[0]
    assert kernel_time(SimpleNamespace(runs=[record], device="x", marks=())).summary["name"].tolist() == list("01234")


@pytest.mark.parametrize(("median", "ok"), [(1.005, True), (1.2, False)])
def test_own_overhead_is_held_against_its_aim(plant, median, ok):
    folder = plant(("gpt2_clm",), ("fp32_true",))
    (folder.path / "overhead.json").write_text(
        json.dumps(
            {
                "rows": [
                    {
                        "bench": "overhead",
                        "name": "everything on",
                        "unit": "ratio",
                        "median": median,
                        "low95": 1.0,
                        "high95": 1.3,
                        "at_most": 1.01,
                        "met": ok,
                    }
                ]
            }
        )
    )
    check = trust(load(folder.path))[4]
    assert check.ok is ok and f"{median:.3f}" in check.sentence


@pytest.mark.parametrize(
    "content, ok, says",
    [
        ('{"rows": 5}', None, None),
        ('{"rows": [7]}', None, None),
        ("[]", None, None),
        (
            '{"rows": [{"op": "a", "status": "right", "device": "cuda"}, {"op": "a", "status": "right", "device": "cuda"}]}',
            True,
            "All 2 quantities of 1 kernel agree with float64 on this device (cuda)",
        ),
        (
            '{"rows": [{"op": "a", "status": "right"}, {"op": "b", "dtype": "bf16", "status": "failed", "note": "no code"}]}',
            False,
            "1 of 2 quantities do not agree with float64 on this device (None); the first: b bf16, all: no code.",
        ),
    ],
)
def test_the_kernels_speak_where_they_were_checked(plant, content, ok, says):
    folder = plant(("gpt2_clm",), ("fp32_true",), (0,))
    (folder.path / "kernel_check.json").write_text(content)
    check = {check.name: check for check in trust(load(folder.path))}.get("kernels")
    assert (check and check.ok) is ok and (says is None or says in check.sentence)


@pytest.mark.parametrize(
    ("status", "death", "says", "cause"),
    [
        ("oom", {"cause": "cuda_oom"}, "ran out of memory after 1 step: CUDA", "the GPU's memory ran out"),
        ("hung", {"cause": "hung"}, "hung after 1 step: CUDA", "no heartbeat"),
        ("error", {"cause": "killed"}, "stopped from outside after 1 step: CUDA", "the process was killed from outside"),
        ("error", None, "failed after 1 step: CUDA", None),
    ],
)
def test_a_run_without_a_result_says_what_ended_it(plant, status, death, says, cause):
    folder = plant(
        ("gpt2_clm",),
        ("amp_fp16",),
        (0,),
        lambda *_: {
            "status": status,
            "val_loss": None,
            "steps_done": 1,
            "error": "CUDA",
            "flags": {"death": death} if death else {},
        },
    )
    (card,) = failures(folder)
    assert card.sentence.startswith(says) and card.cause == cause


def test_every_cause_of_death_has_its_words():
    from harness.failure import CAUSES

    assert set(FAILURE_CAUSES) == set(CAUSES)
