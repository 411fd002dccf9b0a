"""What `next` proposes changes the verdict when it is run, until nothing is left: planted rows here, real runs in the soak."""

import shlex
import subprocess
import sys

import pytest

from harness import options as arguments
from instrument.results.contents import load
from report.verdict import verdict, verdict_text
from tests.report.conftest import noise

LM, MULTI = "gpt2_clm", "gpt2_multi_cls"
CONFIGS = ("fp32_true", "amp_bf16", "fp16_naive")


def own(case, config, seed):
    """A run of this harness, whose loss scatters so that few seeds leave it open."""
    found = {"flags": {}, "gap": 0.0 if config == "fp32_true" else 0.01 * noise(case, config, seed)}
    return found | ({"diverges_at": 1} if config == "fp16_naive" else {})


def asked(command):
    """A command's cases, configurations and seeds as the harness understands them."""
    options = arguments.parser().parse_args(shlex.split(command)[3:])
    return options.cases, options.configs or CONFIGS, options.seeds, options


def said(folder):
    """All that the verdict says beside what is next."""
    found = verdict(folder)
    return found.tables, found.claims, found.cases


def test_every_next_command_changes_the_verdict_until_none_is_left(plant):
    """Commands are carried out with planted rows: the first folder is that of `make run`, cut to its lone seed."""
    folder, seen = plant((MULTI,), CONFIGS, (0,), own), []
    for _ in range(12):
        command = verdict(folder).next_command
        if not command:
            break
        assert command not in seen and "harness matrix" in command and str(folder.path) in command
        seen.append(command)
        cases, configs, seeds, _ = asked(command)
        before = said(folder)
        folder = plant(cases, configs, seeds, own)
        assert said(folder) != before, command
    assert not verdict(folder).next_command and len(seen) >= 2
    assert "\nnext " not in verdict_text(folder)  # and nothing breaks where nothing is left to run


def test_a_reference_that_is_missing_is_asked_for_alone_with_the_seeds_that_need_it(plant):
    folder = plant((LM,), ("amp_bf16",), (3, 5), own)
    cases, configs, seeds, _ = asked(verdict(folder).next_command)
    assert (cases, configs, seeds) == ([LM], ["fp32_true"], [3, 5])
    assert said(plant(cases, configs, seeds, own)) != said(folder)


def test_an_unhealthy_reference_is_tried_with_another_rate_and_becomes_the_variant_that_counts(plant):
    folder = plant((LM,), CONFIGS[:2], (0, 1, 2), lambda *_: {"flags": {}, "end": 9.9})
    cases, configs, seeds, options = asked(verdict(folder).next_command)
    mended = {"config": {"lr": options.lr, "untimed_steps": 5, "device": "cuda", "bucket_by_length": False}}

    def change(case, config, seed):
        return own(case, config, seed) | mended | {"run_id": f"{case}-{config}-s{seed}-0000beef"}

    again = plant(cases, configs, seeds, change)
    assert verdict(folder).tables[0].unhealthy and not verdict(again).tables[0].unhealthy


def test_times_that_others_disturbed_are_measured_again(plant):
    busy = {"system_cpu_percent_median": 100.0, "process_cpu_percent_median": 29.0}
    config = {"untimed_steps": 5, "lr": 1e-3, "device": "cpu", "threads": 1, "bucket_by_length": False}
    folder = plant((LM,), CONFIGS[:2], change=lambda *_: {"flags": {"hardware": busy}, "config": config})
    assert "--rerun" in verdict(folder).next_command
    again = plant(
        (LM,),
        CONFIGS[:2],
        (0, 1, 2),
        lambda *_: {"flags": {"hardware": {**busy, "process_cpu_percent_median": 99.0}}, "config": config},
    )
    assert said(again) != said(folder) and "--rerun" not in verdict(again).next_command


def test_a_model_of_ones_own_is_kept_and_no_case_of_others_asked_for(plant):
    spelled = {"case": "gpt_neo_clm", "flags": {"case_spelled": ["--model", "my model", "--task", "clm"]}}
    options = asked(verdict(plant((LM,), CONFIGS[:2], (0,), lambda *_: dict(spelled))).next_command)[3]
    assert (options.model, options.task, options.seeds) == ("my model", "clm", [0, 1, 2])
    assert "--cases" not in verdict(plant((LM,), CONFIGS[:2], (0, 1, 2), lambda *_: dict(spelled), name="all")).next_command


@pytest.mark.soak
@pytest.mark.process
def test_on_a_processor_the_next_command_changes_the_verdict(tmp_path):
    """The runs of `make run`, shortened; then what is next, as a shell runs it."""
    harness = [sys.executable, "-m", "harness", "matrix"]
    short = ["--max-steps", "12", "--documents", "96", "--validation-documents", "16"]
    made = ["--cases", MULTI, "--configs", *CONFIGS, "--preset", "tiny", "--data", "embedded", *short]
    subprocess.run([*harness, *made, "--out", str(tmp_path / "r")], check=True, capture_output=True)
    before = load(tmp_path / "r")
    command = shlex.split(verdict(before).next_command)
    assert command[:2] == ["python", "-m"] and "--max-steps" in command
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    after = load(tmp_path / "r")
    assert said(after) != said(before) and {run.seed for run in after.runs} == {0, 1, 2}
