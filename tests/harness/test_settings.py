"""Settings: completed, checked, and hashed by what matters."""

from dataclasses import fields, replace

import pytest

from bench_cases import CASES, DTYPE_CONFIGS
from harness.optimizer import learning_rate
from harness.settings import Request, SettingsError, resolve

CASE, CONFIG = CASES["gpt2_multi_cls"], DTYPE_CONFIGS["amp_fp16"]


def settle(case=CASE, config=CONFIG, seed=0, device="cpu", **asked):
    return resolve(case, config, seed, Request(**asked), device=device, data_fingerprint="f")


def test_presets_choose_the_defaults():
    tiny, full = settle(), settle(device="cuda")
    assert (tiny.preset, tiny.data, tiny.weights, tiny.log_every) == ("tiny", "embedded", "scratch", 1)
    assert (full.preset, full.data, full.weights, full.log_every) == ("full", "hub", "pretrained", 10)
    assert full.lr == CASE.lr.pretrained and tiny.lr == CASE.lr.tiny
    assert settle(device="cuda", weights="scratch").lr == CASE.lr.scratch
    assert settle(device="cuda", data="some/folder").weights == "scratch"
    assert settle(CASES["gpt2_clm"], device="cuda").seq_len == 1_024


def test_the_run_id_is_a_safe_name_of_case_config_seed_and_settings():
    run_id = settle(seed=3).run_id
    assert run_id.startswith("gpt2_multi_cls-amp_fp16-s3-")
    assert all(c.isalnum() or c in "-_" for c in run_id) and len(run_id.rsplit("-", 1)[1]) == 8


def test_the_hash_changes_with_every_setting_but_seed_and_logging():
    plain = settle()
    same = [
        replace(plain, seed=9),
        replace(plain, log_every=7),
        replace(plain, checkpoint_every=3),
        replace(plain, mtbf_s=9.0),
        replace(plain, case=replace(CASE, scenario="Z")),
        replace(plain, config=replace(CONFIG, note="other words")),
    ]
    assert {s.settings_hash for s in same} == {plain.settings_hash}
    changed = {
        "case": CASES["gpt2_single_cls"],
        "config": DTYPE_CONFIGS["amp_bf16"],
        "preset": "full",
        "device": "cuda",
        "data": "d",
        "data_fingerprint": "g",
        "sources_fingerprint": "h",
        "weights": "w",
        "lr": 1.0,
        "dropout": 0.5,
        "attention": "flash",
        "compile": True,
        "bucket_by_length": True,
        "text_field": "t",
        "label_field": "l",
    }
    for field in fields(plain):
        if field.name in (
            "seed",
            "log_every",
            "instrument",
            "trace_steps",
            "memory_snapshot",
            "checkpoint_every",
            "mtbf_s",
            "parallel",
        ):
            continue
        value = changed.get(field.name, getattr(plain, field.name))
        value = value + 1 if field.name not in changed else value
        assert replace(plain, **{field.name: value}).settings_hash != plain.settings_hash, field.name
    assert replace(plain, world=2, parallel="ddp").settings_hash != replace(plain, world=2, parallel="fsdp").settings_hash


def test_a_path_is_hashed_by_its_content_and_not_by_its_spelling():
    one, other = settle(data="./data"), settle(data="data/")
    assert one.settings_hash == other.settings_hash != settle().settings_hash
    assert replace(one, data_fingerprint="changed").settings_hash != one.settings_hash


def test_files_from_outside_are_part_of_the_identity(tmp_path):
    from harness.planning import sources_fingerprint

    assert sources_fingerprint("scratch", "hub/id", "module:function") == ""
    (tmp_path / "config.json").write_text("{}")
    before = sources_fingerprint.__wrapped__("scratch", str(tmp_path), "module:function")
    (tmp_path / "config.json").write_text('{"n_layer": 3}')
    assert before != sources_fingerprint.__wrapped__("scratch", str(tmp_path), "module:function") != ""


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"max_steps": -3}, "max_steps is -3"),
        ({"micro_batch": 3}, "micro_batch 3 does not divide batch_size 8"),
        ({"seq_len": 4_096}, "longer than the 512 positions of GPT-2.*allowed: 4 to 512"),
        ({"seq_len": 3}, "seq_len is 3; allowed: 4 to 512"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"attention": "efficient"}, "exists on CUDA only"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_say_what_was_given_and_what_is_allowed(asked, words):
    with pytest.raises(SettingsError, match=words):
        settle(**asked)


def test_a_batch_that_the_micro_batch_does_not_divide_gets_a_smaller_one():
    assert settle(batch_size=6).micro_batch == 2


def test_warm_up_scales_with_the_steps():
    assert settle(max_steps=1_000).warmup_steps == 100 and settle(max_steps=3).warmup_steps == 1


def test_the_schedule_rises_linearly_and_falls_to_a_tenth():
    rates = [learning_rate(s, peak=1.0, warmup_steps=10, max_steps=100) for s in range(1, 101)]
    assert rates[:10] == pytest.approx([s / 10 for s in range(1, 11)])
    assert rates[-1] == pytest.approx(0.1) and rates[54] == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
