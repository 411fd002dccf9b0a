"""The command line as a person meets it: quick help, one-line errors, exit codes, the old spelling."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from harness import options as arguments
from harness.cli import COMMANDS, main
from harness.commands.case import asked_case, asked_config
from harness.exit_codes import CODE_OF_ERROR
from tests.harness.commands import TWO_STEPS, Forked, harness

pytestmark = pytest.mark.slow


def parse(*words):
    return arguments.parser().parse_args(["case", *words])


def refused(capsys, *words) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = main(list(words))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.mark.process
def test_help_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from harness.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "exit codes: 0 ok" in done.stdout


def test_the_old_flags_mean_the_same():
    new = parse("gpt2_multi_cls", "amp_bf16", "--batch-size", "32", "--max-steps", "1000")
    old = parse(
        "--model_arch", "gpt2", "--task", "multi_cls", "--dtype_config", "amp_bf16", "--batch_size", "32", "--max_steps", "1000"
    )
    assert asked_case(new) == asked_case(old) and asked_config(new) == asked_config(old)
    assert arguments.request(new) == arguments.request(old)


@pytest.mark.parametrize("name", [*CODE_OF_ERROR])
def test_every_error_with_an_exit_code_is_there(name):
    module, _, kind = name.rpartition(".")
    found = getattr(import_module(module), kind)
    assert issubclass(found, Exception) and f"{found.__module__}.{found.__qualname__}" == name


@pytest.mark.parametrize("name", [*COMMANDS])
def test_every_command_has_its_function_and_its_options(name):
    module, _, function = COMMANDS[name].partition(":")
    assert callable(getattr(import_module(module), function))
    assert set(arguments.COMMANDS) == {name.partition(" ")[0] for name in COMMANDS}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["case", "gpt2_mult", "amp_fp16"], "unknown case 'gpt2_mult' (nearest: gpt2_multi_cls"),
        (["case", "gpt2_clm", "amp_fp61"], "unknown dtype configuration 'amp_fp61' (nearest: amp_fp16"),
        (["case", "gpt2_clm"], "one dtype configuration is needed; given: none; allowed: fp32_true"),
        (["case", "gpt2_clm", "amp_fp16", "amp_bf16"], "given: amp_fp16, amp_bf16"),
        (["case"], "no case: give CASE CONFIG"),
        (["case", "--model_arch", "gpt2", "amp_fp16"], "--model_arch needs --task"),
        (["case", "--model", "x", "amp_fp16"], "--model needs --task"),
        (["case", "gpt2_clm", "amp_fp16", "--preset", "tiny", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["case", "gpt2_clm", "amp_fp16", "--preset", "tiny", "--max-steps", "-1"], "max_steps is -1"),
        (["case", "gpt2_clm", "amp_fp16", "--preset", "tiny", "--seq-len", "9999"], "seq_len 9999 is longer than the 512"),
        (["case", "gpt2_clm", "amp_fp16", "--preset", "tiny", "--lr", "nan"], "lr is nan"),
        (["case", "no_such.py:CASE", "amp_fp16"], "no file 'no_such.py'"),
        (["matrix", "--cases", "gpt2_clmm", "--dry-run"], "unknown case 'gpt2_clmm'"),
        (["matrix", "--preset", "tiny", "--jobs", "0", "--dry-run"], "jobs is 0"),
        (["case", "gpt2_clm", "amp_fp16", "--task", "mlm"], "--task goes with --model"),
        (["case", "--model", "x", "--model_arch", "gpt2", "--task", "clm", "amp_fp16"], "both name the model"),
        (["matrix", "--cases", "gpt2_clm", "--task", "mlm"], "--task goes with --model"),
        (["case", "mycase.py", "amp_fp16"], "the form is path/to/file.py:NAME"),
        (["matrix", "--model", "x"], "--model goes with --task"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(capsys, words, message):
    code, line = refused(capsys, *words)
    assert code == 2 and message in line, line


def test_bad_data_exit_4_and_write_nothing(capsys, tmp_path):
    broken = tmp_path / "mine.jsonl"
    broken.write_text('{"text": "fine", "labels": ["a"]}\n{"text": 3}\n')
    out = tmp_path / "out"
    code, line = refused(capsys, "case", "gpt2_multi_cls", "fp32_true", *TWO_STEPS, "--data", str(broken), "--out", str(out))
    assert code == 4 and "mine.jsonl:2" in line and not out.exists()
    code, line = refused(
        capsys, "case", "gpt2_multi_cls", "fp32_true", *TWO_STEPS, "--data", str(tmp_path / "nothing"), "--out", str(out)
    )
    assert code == 4 and "nothing" in line and not out.exists()


def test_an_unwritable_folder_exits_5(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, line = refused(capsys, "case", "gpt2_clm", "fp32_true", *TWO_STEPS, "--out", str(tmp_path / "file" / "out"))
    assert code == 5 and "cannot write to" in line and "--out" in line


def test_an_unreachable_model_exits_5(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, line = refused(
        capsys, "case", "gpt2_clm", "fp32_true", *TWO_STEPS, "--weights", str(tmp_path / "none"), "--out", str(tmp_path / "out")
    )
    assert code == 5 and "--weights scratch" in line


def test_a_case_prints_its_row_on_stdout_and_words_on_stderr(capsys, tmp_path):
    assert main(["case", "gpt2_clm", "fp16_naive", *TWO_STEPS, "--json", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out)
    assert row["status"] == "diverged"
    assert "first non-finite value: step 1, optimizer, param of transformer.wte.weight, aten._foreach_addcdiv_: " in printed.err


def test_list_prints_every_id_and_json(capsys):
    assert main(["list"]) == 0
    words = capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert {"cases", "dtype_configs", "presets"} == set(tables)
    assert all(entry["id"] in words for table in tables.values() for entry in table)


def test_a_case_of_ones_own_runs_unchanged(capsys, tmp_path):
    own = tmp_path / "mycase.py"
    own.write_text(
        "from dataclasses import replace\nfrom bench_cases import CASES\n"
        "CASE = replace(CASES['gpt2_clm'], id='gpt2_clm_mine')\n"
    )
    assert main(["case", f"{own}:CASE", "fp32_true", *TWO_STEPS, "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["case"] == "gpt2_clm_mine"


@pytest.mark.process
@pytest.mark.parametrize("kind", ["llama", "opt", "distilbert"])
def test_any_model_and_ones_own_file_run_unchanged(capsys, tmp_path, kind):
    from transformers import DistilBertConfig, LlamaConfig, OPTConfig

    {
        "llama": LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
        ),
        "opt": OPTConfig(
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
        ),
        "distilbert": DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=32),
    }[kind].save_pretrained(tmp_path / "model")
    rows = [
        {"body": f"document {n} about {thing} and more words", "tags": [tag]}
        for n in range(60)
        for thing, tag in [("ships", "sea") if n % 2 else ("trains", "land")]
    ]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ("multi_cls", "single_cls", "mlm" if kind == "distilbert" else "clm"):
        words = [
            "case",
            "--model",
            str(tmp_path / "model"),
            "--task",
            task,
            "--text-field",
            "body",
            "--label-field",
            "tags",
            "amp_bf16",
            *TWO_STEPS,
            "--data",
            str(mine),
            "--json",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(words) == 0, capsys.readouterr().err
        row = json.loads(capsys.readouterr().out)
        assert (row["case"], row["status"]) == (f"{kind}_{task}", "completed")
    if kind != "llama":  # a matrix is made of the same runs, whatever the model
        return
    words = [
        "matrix",
        "--model",
        str(tmp_path / "model"),
        "--task",
        "single_cls",
        "--text-field",
        "body",
        "--label-field",
        "tags",
        "--configs",
        "amp_bf16",
        *TWO_STEPS,
        "--data",
        str(mine),
        "--json",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--rerun"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["status"] == "completed"


def without_a_reader(words):
    end, pipe = os.pipe()
    os.close(end)
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    return harness(words)


@pytest.mark.process
@pytest.mark.parametrize(
    "command", [["case", "gpt2_clm", "fp32_true"], ["matrix", "--cases", "gpt2_clm", "--configs", "fp32_true"]]
)
def test_a_run_outlives_the_reader_of_its_output(tmp_path, command):
    """`| head` ends neither a run nor a matrix: the row is that of a run to its end, and so is the exit status."""
    words = [*command, *TWO_STEPS, "--device", "cpu", "--json", "--out", str(tmp_path / "out")]
    done = Forked(words, tmp_path / "command", call=without_a_reader)
    done.communicate(timeout=300)
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert (done.returncode, row["status"], row["steps_done"]) == (0, "completed", 2)


def test_the_lists_tables_fit_a_small_terminal(capsys, monkeypatch):
    """A case is one line."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert [line.split()[1:] for line in lines if line.startswith("gpt2_multi_cls ")] == [
        ["C", "GPT-2", "multi-label", "BCE", "3e-3", "1e-4", "5e-5"]
    ]
    assert sum(line.endswith("5e-5") or line.endswith("3e-5") or line.endswith("1e-4") for line in lines) >= 8


def test_names_may_follow_options(capsys):
    options = parse("gpt2_clm", "--max-steps", "3", "amp_fp16", "--seed", "2")
    assert (asked_case(options).id, asked_config(options).id, options.max_steps, options.seed) == ("gpt2_clm", "amp_fp16", 3, 2)
    assert asked_config(parse("gpt2_clm", "--max-steps", "3", "--", "amp_fp16")).id == "amp_fp16"
    for words in (["case", "gpt2_clm", "amp_fp16", "--no-such", "x"], ["inspect", "a", "b"], ["list", "x"]):
        with pytest.raises(SystemExit):
            arguments.parser().parse_args(words)
        assert "unrecognized arguments" in capsys.readouterr().err
    assert main(["case", "gpt2_clm", "--max-steps", "3", "amp_fp16", "amp_bf16"]) == 2
    assert "given: amp_fp16, amp_bf16" in capsys.readouterr().err


@pytest.mark.process
def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    """After the runs, which are kept."""
    monkeypatch.setattr("harness.matrix.command.print_verdict", lambda out: None)
    (tmp_path / "file").write_text("mine")
    code = main(
        [
            "matrix",
            *TWO_STEPS,
            "--cases",
            "gpt2_clm",
            "--configs",
            "fp32_true",
            "--out",
            str(tmp_path / "out"),
            "--svg",
            str(tmp_path / "file" / "x.svg"),
        ]
    )
    assert code == 5 and f"harness: cannot use {tmp_path / 'file'}" in capsys.readouterr().err.splitlines()[-1]
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1
