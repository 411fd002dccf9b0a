"""The largest batch: the search by its properties, the trials by planted memory, the command by planted trials."""

import json
import math
import os
import random
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import main
from harness.fit import command
from harness.fit.command import table
from harness.fit.search import BatchTrial, granularity, search
from harness.fit.trial import TrialProcesses, measure

GB = 10**9


def planted(limit, *, per_row=1, base=0):
    """A memory in which ``limit`` rows fit and no more."""

    def trial(batch):
        fits = batch <= limit
        return BatchTrial(batch, "fits" if fits else "oom", peak_bytes=base + per_row * batch if fits else None)

    return trial


@given(limit=st.integers(0, 6000), start=st.integers(1, 64), most=st.integers(1, 4096), known=st.booleans())
def test_the_answer_fits_the_next_does_not_and_trials_are_few(limit, start, most, known):
    found = search(planted(limit), start=start, most=most, limit_bytes=limit if known else None)
    tried = {t.batch: t.fits for t in found.trials}
    assert len(tried) == len(found.trials), "no batch is tried twice"
    assert all(1 <= batch <= most for batch in tried)
    if limit == 0:
        assert found.largest is None and found.fails == 1
        return
    assert tried[found.largest] and found.largest == max(batch for batch, fits in tried.items() if fits)
    if limit >= most:
        assert (found.largest, found.fails) == (most, None)
    else:
        assert not tried[found.fails] and found.fails - found.largest <= granularity(found.largest)
    assert len(found.trials) <= 3 + abs(math.log2(max(1, min(limit, most)) / min(start, most))) + math.log2(16) + 1


@given(limit=st.integers(33, 4000), base=st.integers(0, 1000))
def test_a_straight_line_saves_trials_and_a_wrong_one_costs_one(limit, base):
    straight = search(planted(limit, per_row=3, base=base), start=32, most=4096, limit_bytes=base + 3 * limit)
    blind = search(planted(limit), start=32, most=4096)
    wrong = search(planted(limit, per_row=3, base=base), start=32, most=4096, limit_bytes=base + 4 * limit)
    assert max(len(straight.trials), len(wrong.trials)) <= len(blind.trials) + 1
    for found in (straight, wrong, blind):
        assert found.largest <= limit and limit - found.largest < granularity(found.largest) + 1


@given(st.integers(0, 2**63), st.integers(1, 64))
def test_it_never_names_a_batch_that_failed_even_where_fitting_is_a_matter_of_luck(seed, start):
    luck = random.Random(seed).choices([True, False], k=4097)
    found = search(lambda batch: BatchTrial(batch, "fits" if luck[batch] else "oom"), start=start, most=4096)
    assert found.largest is None or luck[found.largest]
    assert found.fails is None or not luck[found.fails]


def crash(kind, reports):
    if kind == "exit":
        os._exit(7)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.fixture(scope="module")
def processes():
    return TrialProcesses(None, at_most_s=60.0)


@pytest.mark.process
def test_a_trial_that_dies_or_hangs_costs_only_itself(processes):
    assert processes._run(crash, "exit") == (None, "the run's process exited with code 7 without a result")
    assert "process was killed by SIGKILL" in processes._run(crash, "kill")[1]
    assert TrialProcesses(None, at_most_s=0.5)._run(crash, "hang") == (None, "it did not end within 0 s")
    slug, name, total = processes.facts()
    assert slug.startswith("cpu") == (name == "cpu") == (total is None)


@pytest.mark.process
def test_a_real_trial_fits_or_runs_out_of_memory(processes, plan, data_cache):
    settings = plan("gpt2_multi_cls", "amp_bf16", batch_size=6, micro_batch=6, max_steps=100, seq_len=128)
    trial = processes.trial(settings, timed=True)
    assert (trial.status, trial.batch) == ("fits", 6), trial.why
    assert trial.timed_steps >= 3 and 0 < trial.real_tokens_per_s < trial.tokens_per_s
    small = TrialProcesses(40_000_000, at_most_s=60.0).trial(settings, timed=False)
    assert small.status in ("oom", "crashed"), small  # some allocators give up without a word
    assert small.tokens_per_s is None


def test_the_longest_rows_come_first_and_the_batches_of_a_run_after(plan):
    from harness.fit.trial import LongestFirst
    from harness.run.execute import load_run_data, make_batches

    settings = plan("gpt2_multi_cls", "fp32_true", batch_size=4)
    batches = make_batches(settings, load_run_data(settings))
    longest = LongestFirst(batches)
    first = longest.step(1)
    assert first.seq_len == 32 and first.lengths.min() >= max(batches.step(s).lengths.max() for s in range(1, 40))
    assert longest.step(3).input_ids.equal(batches.step(3).input_ids)
    assert len(batches.longest().lengths) == 4


def test_a_configuration_that_dies_is_timed_all_the_same(plan):
    trial = measure(plan("gpt2_clm", "fp16_naive", max_steps=100), timed=True)
    assert trial.status == "fits" and trial.tokens_per_s > 0


class PlantedTrials:
    """Trials in a made-up memory: as many rows as ``rows`` says, at rates that grow with the batch."""

    rows = {"fp32_true": 100, "amp_bf16": 150, "bf16_pure": 5000, "fp16_naive": 0}  # noqa: RUF012

    def __init__(self, memory_limit_bytes=None):
        self.asked = []

    def facts(self):
        return "nvidia-x", "NVIDIA X", 140 * GB

    def trial(self, settings, *, timed):
        self.asked.append((settings.config.id, settings.batch_size, timed))
        assert settings.micro_batch == settings.batch_size, "without accumulation"
        if settings.config.id == "amp_bf16_8bit":
            return BatchTrial(settings.batch_size, "unsupported", "bitsandbytes is not installed")
        if settings.config.id == "amp_fp16":
            return BatchTrial(settings.batch_size, "crashed", "killed by SIGSEGV")
        if settings.batch_size > self.rows[settings.config.id]:
            return BatchTrial(settings.batch_size, "oom", "OutOfMemoryError: CUDA out of memory")
        rate = (
            {
                "tokens_per_s": 2000.0 * settings.batch_size,
                "real_tokens_per_s": 1000.0 * settings.batch_size,
                "step_s": 0.1,
                "timed_steps": 5,
            }
            if timed
            else {}
        )
        return BatchTrial(settings.batch_size, "fits", peak_bytes=GB * settings.batch_size, **rate)


@pytest.fixture
def trials(monkeypatch):
    """The command with planted trials; the planted objects as they were made."""
    from harness.fit import trial

    made = []
    monkeypatch.setattr(trial, "TrialProcesses", lambda limit: made.append(PlantedTrials()) or made[-1])
    return made


def fit(tmp_path, *more):
    return main(
        ["fit", "gpt2_clm", "--preset", "tiny", "--data", "embedded", "--memory-limit", "140", "--out", str(tmp_path), *more]
    )


def test_the_command(tmp_path, trials, capsys):
    configs = ("--configs", "fp32_true", "amp_bf16", "bf16_pure", "fp16_naive", "amp_bf16_8bit", "amp_fp16")
    assert fit(tmp_path, *configs, "--price-per-hour", "3.6", "--most", "512", "--json") == 0
    said = capsys.readouterr()
    rows = {row["config"]: row for row in json.loads(said.out)["rows"]}
    assert [row["status"] for row in rows.values()] == ["found", "found", "at_least", "none_fits", "unsupported", "none_fits"]
    fp32 = rows["fp32_true"]
    assert 100 - granularity(100) < fp32["largest_batch"] <= 100 and fp32["limited_by"].startswith("oom: OutOfMemoryError")
    assert fp32["within_rows"] <= granularity(100) and fp32["peak_bytes"] == GB * fp32["largest_batch"]
    # 3.6 an hour is 0.001 a second; 10^9 tokens at 1,000 a row and second take 10^6 / rows seconds.
    assert fp32["cost_per_1e9_real_tokens"] == pytest.approx(1000 / fp32["largest_batch"])
    assert fp32["cost_per_1e9_real_tokens_at_32"] == pytest.approx(1000 / 32)
    assert rows["bf16_pure"]["largest_batch"] == 512 and rows["bf16_pure"]["next_batch_fails"] is None
    assert rows["fp16_naive"]["largest_batch"] is None and rows["fp16_naive"]["cost_per_1e9_real_tokens"] is None
    assert rows["amp_bf16_8bit"]["limited_by"] == "unsupported: bitsandbytes is not installed"
    assert rows["amp_fp16"]["limited_by"] == "crashed: killed by SIGSEGV"
    assert "≥ 512" in said.err and "not even one row fits" in said.err
    asked = trials[0].asked
    assert len(asked) == len(set(asked)) and sum(config == "amp_bf16_8bit" for config, *_ in asked) == 1

    assert fit(tmp_path, *configs, "--json") == 0, "what is known is not measured again"
    again = {row["config"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert trials[1].asked == [] and again["fp32_true"]["largest_batch"] == fp32["largest_batch"]
    assert again["fp32_true"]["cost_per_1e9_real_tokens"] is None, "costs are this call's"
    assert fit(tmp_path, "--configs", "fp32_true", "--rerun") == 0 and trials[2].asked
    assert fit(tmp_path, "--configs", "fp32_true", "--seq-len", "64") == 0 and trials[3].asked
    kept = json.loads((tmp_path / "fit.json").read_text())["rows"]
    assert len(kept) == 7 and sum(row["config"] == "fp32_true" for row in kept) == 2


def wide_row(config, **found):
    """A row of the table, of a card with room for very much."""
    return {
        "config": config,
        "status": "found",
        "largest_batch": 1_760,
        "within_rows": 160,
        "peak_bytes": 133 * GB,
        "tokens_per_s": 1_234_567.0,
        "real_tokens_per_s": 912_345.0,
        "at_32": {"real_tokens_per_s": 801_234.0},
        "limited_by": None,
        "cost_per_1e9_real_tokens": 12.34,
        "cost_per_1e9_real_tokens_at_32": 14.05,
    } | found


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_is_whole_on_a_small_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    nothing = dict.fromkeys(
        (
            "largest_batch",
            "within_rows",
            "peak_bytes",
            "tokens_per_s",
            "real_tokens_per_s",
            "at_32",
            "cost_per_1e9_real_tokens",
            "cost_per_1e9_real_tokens_at_32",
        )
    )
    table(
        "gpt2_multi_cls",
        [
            wide_row("fp16_naive_fp32_states"),
            wide_row("bf16_pure", status="at_least"),
            wide_row("amp_fp16", within_rows=1),
            wide_row("fp32_true", status="none_fits", **nothing),
        ],
        3.5,
    )
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    cells = {line.split()[0]: line.split()[1:] for line in lines if "_" in line}
    assert cells["fp16_naive_fp32_states"] == ["1760–1919", "133.0", "1,234.6", "912.3", "801.2", "12.34", "14.05"]
    assert cells["bf16_pure"][:2] == ["≥", "1760"] and cells["amp_fp16"][0] == "1760"
    assert cells["fp32_true"] == ["none", "fits", *"–" * 6]
    assert "1760–1919: 1760 rows fit, 1920 do not" in " ".join(" ".join(lines).split())


def test_a_batch_that_does_not_fit_twice_is_none(tmp_path, trials, monkeypatch, capsys):
    honest = PlantedTrials.trial

    def stricter(self, settings, *, timed):
        if timed and settings.batch_size > 80:
            return BatchTrial(settings.batch_size, "oom", "at the second try")
        return honest(self, settings, timed=timed)

    monkeypatch.setattr(PlantedTrials, "trial", stricter)
    assert fit(tmp_path, "--configs", "fp32_true", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["largest_batch"] <= 80 < row["next_batch_fails"] and row["tokens_per_s"] is not None
    assert row["limited_by"] == "oom: at the second try"


@pytest.mark.process
def test_on_a_cpu_it_is_unsupported_but_as_a_dry_run(tmp_path, capsys):
    small = (
        "--preset",
        "tiny",
        "--data",
        "embedded",
        "--documents",
        "400",
        "--seq-len",
        "32",
        "--device",
        "cpu",
        "--json",
        "--out",
        str(tmp_path),
    )
    assert main(["fit", "gpt2_clm", "--configs", "fp32_true", *small]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["status"] == "unsupported" and "a CPU has no memory of its own" in row["limited_by"]
    assert (
        main(
            [
                "fit",
                "gpt2_clm",
                "--configs",
                "fp32_true",
                "bf16_pure",
                "--dry-run",
                "--memory-limit",
                "2",
                "--most",
                "2000",
                *small,
            ]
        )
        == 0
    )
    rows = {row["config"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["fp32_true"]["largest_batch"] < rows["bf16_pure"]["largest_batch"] and rows["fp32_true"]["dry_run"]
    assert rows["fp32_true"]["peak_bytes"] <= 2 * GB and "the memory model" in rows["fp32_true"]["limited_by"]
    assert [row["status"] for row in json.loads((tmp_path / "fit.json").read_text())["rows"]] == ["unsupported"]


def test_a_damaged_file_is_written_anew_and_bad_options_are_one_sentence(tmp_path, trials, capsys):
    (tmp_path / "fit.json").write_text('{"rows"')
    assert fit(tmp_path, "--configs", "fp32_true") == 0 and "is damaged, and is written anew" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "fit.json").read_text())["rows"]) == 1
    assert main(["fit", "gpt3_clm"]) == 2 and "gpt3_clm" in capsys.readouterr().err
    assert fit(tmp_path, "--configs", "fp4") == 2
    with pytest.raises(SystemExit):
        fit(tmp_path, "--price-per-hour", "-1")
    assert command.START == 32
