"""What to use and what to avoid: computed from the rows, within 24 lines of 80 characters."""

import dataclasses
import itertools
import shlex

import pytest

from bench_cases import CASES, DTYPE_CONFIGS
from instrument.results.contents import load
from report.tables.cell_text import cell_texts
from report.tables.choice import case_tables
from report.tables.trust import trust
from report.verdict import Price, verdict, verdict_text
from report.verdict.text import HEIGHT, WIDTH, command_lines

LM, MULTI = "gpt2_clm", "gpt2_multi_cls"
CONFIGS = ("fp32_true", "amp_bf16", "bf16_pure")
SPEEDS = {"amp_bf16": 2.0, "bf16_pure": 3.0}


def of(folder, case=LM, price=None):
    return {found.case: found for found in verdict(folder, price).cases}[case]


def planted(plant, cases=(LM,), configs=CONFIGS, seeds=(0, 1, 2), **of_config):
    return plant(
        cases, configs, seeds, lambda case, config, seed: {"speed": SPEEDS.get(config, 1.0)} | of_config.get(config, {})
    )


def test_the_fastest_good_configuration_is_recommended_with_its_numbers(plant):
    found = of(planted(plant))
    assert (found.use, found.runner_up, found.lossless, found.n) == ("bf16_pure", "amp_bf16", None, 3)
    assert found.relative_speed == pytest.approx(3.0, rel=0.01) and found.low < found.relative_speed < found.high
    assert found.relative_cost == pytest.approx(1 / found.relative_speed)
    assert found.hours_per_million_samples == pytest.approx(1e6 / 300 / 3600, rel=0.01)
    assert (found.peak_bytes, found.peak_kind) == (10**10, "allocated") and len(found.run_ids) == 3


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"gap": 4.0}, "+4.000 [+4.000, +4.000] nats"),
        ({"diverges_at": 55}, "NaN @ 55, optimizer in 3 of 3 seeds"),
        ({"status": "oom", "val_loss": None}, "oom in 3 of 3 seeds [0.29, 1.00]"),
    ],
)
def test_a_configuration_that_fails_is_avoided_with_its_reason_however_fast(plant, bad, says):
    found = of(planted(plant, bf16_pure=bad))
    assert found.use == "amp_bf16"
    assert len(found.avoid) == 1 and found.avoid[0].startswith("bf16_pure: ") and says in found.avoid[0]


def test_what_ended_a_run_from_outside_or_the_reference_too_is_no_reason_to_avoid(plant):
    def dead(status, cause):
        return {"status": status, "val_loss": None, "flags": {"death": {"cause": cause, "goes_on": False}}}

    assert of(planted(plant, bf16_pure=dead("error", "killed"))).avoid == ()
    assert of(planted(plant, bf16_pure={"status": "preempted", "val_loss": None})).avoid == ()
    assert of(planted(plant, fp32_true=dead("error", "segfault"), bf16_pure=dead("error", "segfault"))).avoid == ()
    folder = plant(
        (LM,),
        CONFIGS,
        change=lambda case, config, seed: (
            {} if config != "bf16_pure" or seed == 0 else dead(*[("hung", "hung"), ("oom", "cuda_oom")][seed - 1])
        ),
    )
    how = "bf16_pure: hung, oom in 2 of 3 seeds [0.09, 0.99]: it failed here; how often is not resolved"
    assert (of(folder).avoid, of(folder).failed) == ((), (how,))


def test_one_bad_seed_is_no_reason_to_avoid_and_none_to_recommend(plant):
    folder = plant(
        (LM,),
        CONFIGS,
        change=lambda case, config, seed: {
            "speed": SPEEDS.get(config, 1.0),
            "gap": 4.0 * (config == "bf16_pure" and seed == 2),
        },
    )
    assert of(folder).use == "amp_bf16" and of(folder).avoid == ()


def test_slower_than_fp32_is_avoided_when_the_seeds_resolve_it(plant):
    slow = of(planted(plant, amp_bf16={"speed": 0.8}))
    assert any(line.startswith("amp_bf16: slower than fp32_true: 0.799") for line in slow.avoid)
    assert of(plant((LM,), CONFIGS, (0,), lambda *_: {}, "one")).avoid == ()


def test_fp32_itself_is_recommended_when_nothing_beats_it(plant):
    found = of(planted(plant, amp_bf16={"speed": 0.8}, bf16_pure={"speed": 0.7}))
    assert found.use == "fp32_true" and found.relative_speed == pytest.approx(1.0) and found.quality == "the reference"


def test_a_reference_that_stands_alone_is_not_praised(plant):
    folder = plant(
        (LM,),
        ("fp32_true", "fp16_naive"),
        change=lambda case, config, seed: {"diverges_at": 3} if config == "fp16_naive" else {},
    )
    assert "no other configuration is shown to train as well" in of(
        folder
    ).reason and "use fp32_true: nothing as good is shown to be faster by 2 %" in verdict_text(folder)


def test_controls_are_never_recommended_nor_warned_of(plant):
    found = of(planted(plant, configs=(*CONFIGS, "fp16_naive_eps1e4"), fp16_naive_eps1e4={"speed": 9.0}))
    assert found.use == "bf16_pure" and found.avoid == ()


def test_ties_go_to_quality_then_memory_and_two_seeds_recommend_nothing(plant):
    def noisy(**bf16_pure):
        given = {"amp_bf16": lambda seed: {"speed": 2.9 + 0.1 * seed}, "bf16_pure": lambda seed: {"speed": 3.0} | bf16_pure}
        return lambda case, config, seed: given.get(config, lambda seed: {})(seed)

    tied = of(plant((LM,), CONFIGS, change=noisy()))
    assert (tied.use, tied.runner_up) == ("bf16_pure", "amp_bf16") and "by memory" in tied.reason
    tied = of(plant((LM,), CONFIGS, change=noisy(gap=0.01), name="worse"))
    assert tied.use == "amp_bf16" and tied.reason.endswith("by quality over bf16_pure")
    same = of(plant((LM,), CONFIGS, change=noisy(peak_allocated_bytes=15 * 10**9), name="same"))
    assert same.use == "amp_bf16" and "more conservative" in same.reason
    two = of(plant((LM,), CONFIGS, (0, 1), name="two"))
    assert two.use is None and "2 seeds" in two.reason


def test_an_unhealthy_case_is_left_out_of_recommendations_and_its_deaths_are_not(plant):
    found = of(planted(plant, fp32_true={"end": 9.9}, bf16_pure={"diverges_at": 20}))
    assert found.use is None and "unhealthy" in found.reason
    assert found.avoid == ("bf16_pure: NaN @ 20, optimizer in 3 of 3 seeds [0.29, 1.00]",)


def test_every_case_is_decided_on_its_own(plant):
    folder = plant(
        (MULTI, "roberta_multi_cls"),
        CONFIGS,
        change=lambda case, config, seed: (
            {"speed": SPEEDS.get(config, 1.0)} | ({"diverges_at": 9} if config == "bf16_pure" and "roberta" in case else {})
        ),
    )
    assert (of(folder, MULTI).use, of(folder, "roberta_multi_cls").use) == ("bf16_pure", "amp_bf16")


def test_open_questions_are_the_claims_not_decided(plant):
    decision = verdict(planted(plant))
    assert {outcome for name, outcome, _ in decision.claims if name in ("H1", "H2")} == {"not decided"}
    assert any(question.startswith("H1: ") and "seeds 0 1 2" in question for question in decision.open_questions)
    assert len(decision.open_questions) == sum(outcome == "not decided" for _, outcome, _ in decision.claims)


REAL = {"flags": {}}
STOPPED = {"status": "preempted", "val_loss": None}
ALL = f"--configs {' '.join(CONFIGS)} --seeds 0 1 2 --preset full"


@pytest.mark.parametrize(
    ("cases", "configs", "seeds", "given", "command"),
    [
        ((LM,), ("amp_bf16",), (0, 1, 2), REAL, "--cases gpt2_clm --configs fp32_true --seeds 0 1 2 --preset full"),
        (
            (LM,),
            ("fp32_true",),
            (0,),
            REAL | {"status": "preempted", "val_loss": None},
            "--cases gpt2_clm --configs fp32_true --seeds 0 --preset",
        ),
        ((LM,), CONFIGS, (0, 1, 2), REAL | {"end": 9.9}, "--seeds 0 1 2 3 --lr 0.00033 --preset full"),
        ((LM,), CONFIGS, (0,), REAL, f"--cases gpt2_clm {ALL}"),
        ((LM,), CONFIGS, (0, 1, 2), REAL, "--cases roberta_mlm gpt2_multi_cls"),
        (tuple(c.id for c in CASES.values() if c.in_default_matrix), CONFIGS, (0, 1, 2), REAL, ""),
        (
            tuple(c.id for c in CASES.values() if c.in_default_matrix),
            CONFIGS,
            (0, 1, 2),
            REAL | {"preset": "tiny"},
            "roberta_single_cls --seeds 0 1 2 --preset full",
        ),
        ((LM,), CONFIGS, (0,), {}, "python -m harness matrix --cases gpt2_clm --seeds 0 1 2 --preset full"),
    ],
)
def test_the_next_command_fills_the_largest_gap(plant, cases, configs, seeds, given, command):
    found = verdict(plant(cases, configs, seeds, lambda *_: dict(given))).next_command
    assert command in found and bool(command) == bool(found)


def test_a_rival_that_was_stopped_is_not_recommended(plant):
    folder = plant(
        (LM,),
        CONFIGS,
        change=lambda case, config, seed: (
            {"speed": SPEEDS.get(config, 1.0)} | (STOPPED if config == "bf16_pure" and seed == 1 else {})
        ),
    )
    cell = case_tables(folder)[0].cell("bf16_pure")
    assert of(folder).use == "amp_bf16" and (cell.verdict, cell.n) == ("not resolved", 2)


def test_what_was_stopped_is_asked_for_again_and_is_no_seed(plant):
    folder = plant((LM,), CONFIGS, change=lambda case, config, seed: REAL | (STOPPED if seed else {}))
    assert f"--cases gpt2_clm --configs {' '.join(CONFIGS)} --seeds 0 1 2" in verdict(folder).next_command
    (seeds,) = [check for check in trust(folder) if check.name == "seeds"]
    assert seeds.ok is False and seeds.sentence.startswith("1 seed a cell")


def test_other_cases_are_not_asked_for_with_what_is_one_case_s_own(plant):
    own = {"lr": 0.01, "seq_len": 1000, "max_steps": 77, "untimed_steps": 5, "device": "cuda"}
    command = verdict(plant((MULTI,), CONFIGS, change=lambda *_: REAL | {"config": own})).next_command
    assert "--max-steps 77" in command and "--lr" not in command and "--seq-len" not in command and MULTI not in command


def test_runs_on_several_gpus_are_not_asked_of_a_matrix(plant):
    command = verdict(plant((LM,), CONFIGS, (0,), lambda *_: REAL | {"config": {"world": 2, "untimed_steps": 5}})).next_command
    assert "--cases" not in command


MINE = {"case": "gpt2_clm_mine", "flags": {"case_spelled": ["my dir/mine.py:CASE"]}}
MODEL = {"case": "gpt_neo_clm", "flags": {"case_spelled": ["--model", "my model", "--task", "clm"]}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (MINE, ["--cases", "my dir/mine.py:CASE", "--configs"]),
        (MODEL, ["--model", "my model", "--task", "clm", "--configs"]),
        (MINE | {"flags": {}}, ["--cases", "gpt2_clm", "roberta_mlm"]),
    ],
)
def test_the_next_command_names_a_case_of_ones_own_as_the_command_line_knows_it(plant, given, words):
    """A case that nobody can name is passed over."""
    command = shlex.split(verdict(plant((LM,), CONFIGS, (0,), lambda *_: dict(given))).next_command)
    assert command[4 : 4 + len(words)] == words


def test_the_next_command_makes_runs_that_compare_with_those_there_are(plant):
    """Settings that the command line would not choose are said again; of cases that differ in them one is named."""

    def config(lr, data="my data"):
        return REAL | {
            "config": {
                "lr": lr,
                "data": data,
                "text_field": "body",
                "max_steps": 60,
                "attention": "math",
                "compile": True,
                "untimed_steps": 5,
                "device": "cuda",
            }
        }

    folder = plant((LM, MULTI), CONFIGS, (0,), lambda case, *_: config(0.5 if case == LM else 0.25))
    settings = "--lr 0.5 --data 'my data' --text-field body --max-steps 60 --sdpa math --compile"
    assert f"--cases gpt2_clm {ALL} {settings} --out" in verdict(folder).next_command
    assert "--lr 0.5 " in verdict(plant((LM,), CONFIGS, (0,), lambda *_: config(0.5), "same rate")).next_command


def test_a_long_command_is_broken_where_it_stays_one():
    command = shlex.join(
        [
            "python",
            "-m",
            "harness",
            "matrix",
            "--cases",
            *(f"folder {i}/my case.py:CASE" for i in range(5)),
            "--out",
            "results of -- mine" * 4,
        ]
    )
    text = "\n".join(command_lines(command))
    assert " \\\n" in text and shlex.split(text.replace("\\\n", ""))[1:] == shlex.split(command)


def fits(text):
    """The last screen holds the decision; the tables stand above it."""
    every = text.splitlines()
    decision = every[len(every) - every[::-1].index("") :]
    return len(decision) <= HEIGHT and all(len(line) <= WIDTH for line in decision)


def test_the_whole_matrix_with_everything_wrong_fits_a_terminal(plant):
    """All cases and configurations, every fourth cell dead or poor, long names, six tasks' worth of reasons."""
    wrong = itertools.cycle(
        [{}, {"diverges_at": 7}, {"gap": 9.0}, {}, {"status": "error", "error": "x" * 500, "val_loss": None}]
    )
    folder = plant(
        tuple(CASES),
        tuple(DTYPE_CONFIGS),
        (0, 1),
        lambda case, config, seed: {} if config == "fp32_true" else dict(next(wrong)),
    )
    text = verdict_text(folder)
    assert fits(text), text
    assert all(column in text for column in ("gpt2_clm", "roberta_single_cls", "claims", "next"))


def test_damaged_files_and_a_price_are_said(plant):
    folder = planted(plant)
    (folder.path / "machine.json").write_text("{")
    text = verdict_text(load(folder.path), Price(2.0, "EUR"))
    assert "1 defect in the files" in text and "1.85 EUR per million samples" in text and fits(text)


def test_a_price_makes_hours_money_and_changes_nothing_else(plant):
    folder = planted(plant, bf16_pure={"real_tokens_per_s": 30_000.0})
    free, priced = of(folder), of(folder, price=Price(2.0, "EUR"))
    assert free.hours_per_billion_real_tokens == pytest.approx(1e9 / 30_000 / 3600)
    assert "hours per million samples" in free.cost and "EUR" not in free.cost
    assert priced.cost == "0.33 of fp32_true's, 1.85 EUR per million samples, 18.5 EUR per 10⁹ real tokens"
    assert priced == dataclasses.replace(free, cost=priced.cost)
    assert "18.5 EUR per 10^9 real tokens" in " ".join(verdict_text(folder, Price(2.0, "EUR")).split())
    assert of(planted(plant)).hours_per_billion_real_tokens is None  # nobody counted tokens: nothing is said


def test_a_long_command_can_be_copied_as_it_is():
    command = "python -m harness matrix --cases " + " ".join(CASES) + " --seeds 0 1 2 --out 'results/a folder'"
    lines = command_lines(command)
    joined = " ".join(line.removesuffix("\\").strip() for line in lines).removeprefix("next").strip()
    assert " ".join(joined.split()) == command
    assert all(line.endswith("\\") for line in lines[:-1]) and not lines[-1].endswith("\\")
    assert all(len(line) <= WIDTH for line in lines) and len(lines) > 3


def test_escape_sequences_in_the_files_do_not_reach_the_terminal(plant):
    folder = plant(
        (LM,),
        ("fp32_true", "amp_bf16"),
        (0,),
        lambda case, config, seed: (
            {"device": "\x1b[2J\x07\u202egpu"} | ({"status": "error", "error": "\x1b]0;x", "val_loss": None} if seed else {})
        ),
    )
    (folder.path / "runs" / "x").mkdir()
    (folder.path / "runs" / "x" / "run.json").write_text('{"schema":1,"\x1b[31m":2}')
    folder = load(folder.path)
    assert all(line.isprintable() for line in verdict_text(folder).splitlines())
    assert all(str(defect).isprintable() for defect in folder.defects) and folder.defects


def test_the_terminal_prints_the_table_of_the_page(plant):
    folder = planted(plant, amp_bf16={"gap": 0.1}, bf16_pure={"diverges_at": 9})
    text = verdict_text(folder)
    for table in case_tables(folder):
        for cell in table.cells:
            texts = cell_texts(cell)
            (row,) = [line for line in text.splitlines() if line[2:].startswith(cell.dtype_config + " ")]
            assert all(texts[head] in row for head in ("state", "speed", "peak memory", "verdict"))
            assert all(texts[head] in " ".join(text.split()) for head in ("quality", "why"))
    assert "> fp32_true" in text and "headroom 12.7 bits (largest logit 10)" in " ".join(text.split())


def test_open_claims_say_how_many_seeds_would_decide(plant):
    folder = plant(
        ("gpt2_single_cls", MULTI),
        ("fp32_true", "fp16_naive", "bf16_pure"),
        change=lambda case, config, seed: {"speed": (1.0, 1.3, 1.9)[seed]} if config == "bf16_pure" else {},
    )
    assert "H1 (about 36 seeds)" in " ".join(verdict_text(folder).split())
    (question,) = [q for q in verdict(folder).open_questions if q.startswith("H1")]
    assert question.endswith("were all as measured, about 36 seeds would decide.")


def test_what_the_tables_leave_out_is_named_with_its_reason(plant):
    """Runs of another batch size or GPU beside those that are compared: silence would read as if they had not been run."""

    def change(case, config, seed):
        return (
            {"batch_size": 16} if config == "amp_bf16" else {"device": "another"} if (config, seed) == ("bf16_pure", 2) else {}
        )

    folder = plant((LM,), ("fp32_true", "bf16_pure", "amp_bf16"), change=change)
    found = [text.partition(":")[0] for text in verdict(folder).left_out]
    assert found == [f"3 runs of {LM} (amp_bf16)", "1 defect in the files"]
    said = " ".join(verdict_text(folder).split())
    assert "batch_size 16 instead of 8" in said and "device is 'another'" in said
