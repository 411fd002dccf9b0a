"""Settings: declared once, completed, checked, and hashed by what matters."""

import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from bench_cases import CASES, DTYPE_CONFIGS
from harness.optimizer import learning_rate
from harness.options import option_words, parser, request, settings_table
from harness.planning import choose_device, plan_run, sources_fingerprint
from harness.settings import SETTINGS, Request, RunSettings, SettingsError, resolve
from instrument.results.schemas import RunRecord
from report import harness_commands

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
        replace(plain, keep_weights=True),
        replace(plain, case=replace(CASE, scenario="Z")),
        replace(plain, config=replace(CONFIG, note="other words")),
    ]
    assert {s.settings_hash for s in same} == {plain.settings_hash}
    not_hashed = {"seed", "log_every", "instrument", "trace_steps", "memory_snapshot", "checkpoint_every", "mtbf_s"}
    not_hashed |= {"keep_weights"}
    assert {f.name for f in fields(RunSettings) if f.metadata.get("hashed") is False} == not_hashed
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
        "size": "n_layer=3",
        "compile": True,
        "bucket_by_length": True,
        "text_field": "t",
        "label_field": "l",
    }
    for field in fields(plain):
        if field.metadata.get("hashed") is False or field.name == "parallel":
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
        ({"size": "n_layers=3"}, "--size n_layers is no size of GPT-2; allowed: n_layer, n_head, n_embd, n_positions"),
        ({"size": "n_layer=0"}, "--size 'n_layer=0'; allowed: KEY=V with a whole number from 1, each key once"),
        ({"size": "n_layer=3,n_layer=4"}, "each key once"),
        ({"size": "n_positions=16"}, "longer than the 16 positions of GPT-2"),
        ({"size": "n_layer=3", "weights": "pretrained"}, "--size is for models from scratch"),
    ],
)
def test_bad_settings_say_what_was_given_and_what_is_allowed(asked, words):
    with pytest.raises(SettingsError, match=words):
        settle(**asked)


def test_sizes_are_part_of_the_run_id_however_they_are_spelled():
    words = ["case", "gpt2_clm", "fp32_true", "--size", "n_layer=3", "--size=n_embd=64"]
    assert parser().parse_args(words).size == "n_layer=3,n_embd=64"
    one, other = settle(size="n_layer=3,n_embd=64"), settle(size="n_embd=64, n_layer=3")
    assert one.run_id == other.run_id != settle().run_id and "size" not in settle().as_config()
    assert one.as_config()["size"] == "n_embd=64,n_layer=3"
    assert settle(size="n_positions=4096", seq_len=4_096).seq_len == 4_096


def test_a_batch_that_the_micro_batch_does_not_divide_gets_a_smaller_one():
    assert settle(batch_size=6).micro_batch == 2


def test_warm_up_scales_with_the_steps():
    assert settle(max_steps=1_000).warmup_steps == 100 and settle(max_steps=3).warmup_steps == 1


def test_the_schedule_rises_linearly_and_falls_to_a_tenth():
    rates = [learning_rate(s, peak=1.0, warmup_steps=10, max_steps=100) for s in range(1, 101)]
    assert rates[:10] == pytest.approx([s / 10 for s in range(1, 11)])
    assert rates[-1] == pytest.approx(0.1) and rates[54] == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


RECORDED = [
    # words of `case`, run id, first digits of the SHA-256 of the row's ``config`` as JSON
    ("gpt2_multi_cls amp_fp16", "gpt2_multi_cls-amp_fp16-s0-6a809101", "f7806863"),
    ("gpt2_multi_cls amp_fp16 --device cuda", "gpt2_multi_cls-amp_fp16-s0-d4ad8c5f", "dda33e55"),
    ("gpt2_clm fp32_true --device cuda --seed 3", "gpt2_clm-fp32_true-s3-ff99921a", "25c9fe6f"),
    (
        "gpt2_clm fp16_naive --preset tiny --max-steps 5 --batch-size 2 --micro-batch 2 --seq-len 16 --documents 400 "
        "--validation-documents 2",
        "gpt2_clm-fp16_naive-s0-4facd42d",
        "9b7fb790",
    ),
    ("gpt2_single_cls amp_bf16 --lr 0.001 --threads 2 --eval-every 10", "gpt2_single_cls-amp_bf16-s0-30772602", "c7678b11"),
    ("roberta_mlm bf16_pure --data embedded --weights scratch --seq-len 64", "roberta_mlm-bf16_pure-s0-5d88b784", "7d25a992"),
    (
        "roberta_multi_cls amp_fp16 --device cuda --weights scratch --batch-size 64 --micro-batch 8",
        "roberta_multi_cls-amp_fp16-s0-5396269d",
        "941e8e22",
    ),
    (
        "roberta_single_cls fp32_tf32 --device cuda --data some/folder --sdpa math",
        "roberta_single_cls-fp32_tf32-s0-efb0a8d4",
        "d1cbb467",
    ),
    (
        "gpt2_multi_cls amp_fp16_unscaled --data ./data --text-field body --label-field tags",
        "gpt2_multi_cls-amp_fp16_unscaled-s0-bd2ffbb1",
        "e5fdc561",
    ),
    (
        "gpt2_clm amp_fp16 --device cuda --data hub --weights pretrained --sdpa flash --compile",
        "gpt2_clm-amp_fp16-s0-5683ddad",
        "ecb32629",
    ),
    ("gpt2_clm amp_fp16 --device cuda --sdpa cudnn --dropout 0.1", "gpt2_clm-amp_fp16-s0-4782c21c", "44e9d88c"),
    ("gpt2_clm amp_bf16 --bucket-by-length --log-every 7", "gpt2_clm-amp_bf16-s0-c77a04b7", "a992f994"),
    (
        "gpt2_multi_cls amp_fp16 --instrument full --trace 2 --memory-snapshot",
        "gpt2_multi_cls-amp_fp16-s0-6a809101",
        "f7806863",
    ),
    ("gpt2_multi_cls amp_fp16 --checkpoint-every 10", "gpt2_multi_cls-amp_fp16-s0-6a809101", "f7806863"),
    ("gpt2_multi_cls amp_fp16 --mtbf 3600", "gpt2_multi_cls-amp_fp16-s0-6a809101", "f7806863"),
    (
        "roberta_multi_cls fp32_true --weights weights/folder --device cuda",
        "roberta_multi_cls-fp32_true-s0-5eb6be9a",
        "586b3c39",
    ),
    ("gpt2_multi_cls fp32_true --threads 0", "gpt2_multi_cls-fp32_true-s0-b9912b46", "54e23632"),
    ("gpt2_clm amp_fp16 --device cuda --max-steps 200 --seed 1 --eval-every 50", "gpt2_clm-amp_fp16-s1-d53fce89", "4d8ca3dc"),
    ("gpt2_single_cls amp_fp16 --batch-size 6 --max_steps 11", "gpt2_single_cls-amp_fp16-s0-d0b86152", "310b2461"),
    ("roberta_mlm amp_fp16 --device cuda --preset tiny --documents 1000", "roberta_mlm-amp_fp16-s0-df5182e3", "6bc9ffc8"),
]
"""Rows in people's folders have these ids: a setting added or declared anew must not change them."""


def settings_from(words, **changes):
    options = parser().parse_args(["case", *shlex.split(words)])
    case, config = options.names
    device = "cuda" if options.device == "cuda" else "cpu"
    fingerprints = {"data_fingerprint": "f", "sources_fingerprint": "g"}
    found = resolve(CASES[case], DTYPE_CONFIGS[config], options.seed, request(options), device=device, **fingerprints)
    return replace(found, **changes)


def config_digest(settings):
    return hashlib.sha256(json.dumps(settings.as_config()).encode()).hexdigest()[:8]


@pytest.mark.parametrize(("words", "run_id", "config"), RECORDED)
def test_a_command_line_has_the_run_id_that_it_always_had(words, run_id, config):
    settings = settings_from(words)
    before = settings
    if settings.case.task.id == "multi_cls":  # which have a prior since, and in the tiny preset more steps on shorter documents
        case = replace(settings.case, head_prior="none", lr=replace(settings.case.lr, tiny=2e-3))
        tiny = {"max_steps": 60, "warmup_steps": 6, "seq_len": 128, "lr": 2e-3} if settings.preset == "tiny" else {}
        before = replace(settings, case=case, **tiny)
    assert (before.run_id, config_digest(before)) == (run_id, config)
    assert (settings.run_id == run_id) == (settings.case.task.id != "multi_cls")  # theirs begin with a prior since


def test_a_run_on_several_ranks_has_the_run_id_that_it_always_had():
    settings = settings_from(RECORDED[-1][0], world=4, parallel="fsdp")
    assert (settings.run_id, config_digest(settings)) == ("roberta_mlm-amp_fp16-s0-ce8d31cc", "f58f87c2")


@pytest.mark.parametrize("words", [words for words, *_ in RECORDED])
def test_option_words_ask_for_the_same_settings(words):
    options = parser().parse_args(["case", *shlex.split(words)])
    asked = {name: getattr(options, name) for name in SETTINGS}
    assert request(parser().parse_args(["case", *option_words(asked)])) == request(options)


def test_the_documentation_lists_every_setting():
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert settings_table() in page.read_text(), "write harness.options.settings_table() into docs/settings.md"


OTHERWISE = {"preset": "full", "data": "my data", "weights": "my weights", "attention": "math", "lr": 0.5, "dropout": 0.25}
OTHERWISE |= {"instrument": "full"}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "device"])
def test_the_report_spells_every_setting_of_a_row_as_the_command_line_reads_it(name):
    """Only where it is not as the command line would choose; a setting that the report does not know fails here."""
    settings = settings_from("gpt2_clm fp32_true --preset tiny --data embedded")
    value = OTHERWISE.get(name) or (True if SETTINGS[name].parse is bool else SETTINGS[name].parse(3))
    row = SimpleNamespace(case="gpt2_clm", preset="tiny", batch_size=settings.batch_size, max_steps=settings.max_steps)
    row.config, row.flags, row.instrument = settings.as_config(), {"unhashed": settings.unhashed()}, settings.instrument
    assert not harness_commands.unusual_options([row])
    (row.config if SETTINGS[name].hashed else row.flags["unhashed"])[name] = value
    options = parser().parse_args(["case", *shlex.split(harness_commands.unusual_options([row]))])
    assert getattr(options, name) == value
    others = SETTINGS.keys() - {name, "lr"}  # the usual rate depends on the weights
    assert all(getattr(options, other) == SETTINGS[other].default for other in others)


WITH_A_NEW_SETTING = """
import json, sys, types
from pathlib import Path
from types import SimpleNamespace
import harness

source = (Path(harness.__path__[0]) / "settings.py").read_text()
line, anchor = '    warm_start: float = setting(0.5, float, "what a test adds", least=0)\\n', "    world: int = field("
assert source.count(anchor) == 1
changed = types.ModuleType("harness.settings")
sys.modules["harness.settings"] = harness.settings = changed
exec(compile(source.replace(anchor, line + anchor), "settings.py", "exec"), changed.__dict__)

from harness import options
from harness.cli import main

commands = options.parser()._subparsers._group_actions[0].choices
print(json.dumps([options.settings_table(), commands["case"].format_help(), commands["matrix"].format_help()]))
case = ["case", "gpt2_clm", "fp32_true", *sys.argv[1:]]
codes = [main([*case, *more]) for more in (
    ["--dry-run"], ["--dry-run", "--warm-start", "0.25"], ["--warm_start", "0.25"], ["--warm-start", "-1"]
)]
assert codes == [0, 0, 0, 2], codes
"""


@pytest.mark.process
def test_a_setting_declared_in_one_place_is_everywhere(tmp_path):
    """In the help, the documentation, the dry run, the run id and the row; and runs without it keep their ids."""
    small = "--preset tiny --data embedded --max-steps 1 --batch-size 2 --seq-len 16 --validation-documents 2 --documents 400"
    words = [*small.split(), "--json", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", WITH_A_NEW_SETTING, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (table, *helps), default, changed, row = [json.loads(line) for line in done.stdout.splitlines()]
    assert "| `--warm-start` | `warm_start` | `0.5` | when changed | what a test adds |" in table
    assert all("--warm-start" in text and "what a test adds" in text for text in helps)
    assert (default["warm_start"], changed["warm_start"]) == (0.5, 0.25)
    assert "--warm-start 0.25" in done.stderr and "warm_start is -1.0; it must be at least 0" in done.stderr
    assert "--warm-start 0.25" in harness_commands.command(msgspec.convert(row, RunRecord))
    assert row["config"]["warm_start"] == 0.25 and row["run_id"] == changed["run_id"] != default["run_id"]
    options = parser().parse_args(["case", "gpt2_clm", "fp32_true", *words])
    case, config = (CASES["gpt2_clm"], DTYPE_CONFIGS["fp32_true"])
    assert plan_run(case, config, 0, request(options), choose_device("cpu")).run_id == default["run_id"]
