"""Shards of a matrix: every run in one of them, evenly, the same on every machine; merged they are the whole."""

import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import cli
from harness import options as arguments
from harness.exit_codes import OK, USAGE
from harness.matrix import command
from harness.matrix.plan import Shard, plan_matrix, tokens
from harness.settings import SettingsError
from instrument.results.folder import finished_runs, indexed_rows
from tests.harness.commands import TWO_STEPS
from tests.soak.reliability.ray_nodes import comparable

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Sized:
    name: int
    max_steps: int
    batch_size: int = 1
    seq_len: int = 1


runs_of_any_size = st.lists(st.integers(1, 1000), max_size=150).map(lambda sizes: [Sized(*pair) for pair in enumerate(sizes)])


@given(runs_of_any_size, st.integers(1, 40))
def test_shards_are_disjoint_cover_everything_in_order_and_share_evenly(runs, n):
    shards = [Shard(i, n).of(runs) for i in range(1, n + 1)]
    assert [run for shard in shards for run in shard] == runs
    total, longest = sum(map(tokens, runs)), max(map(tokens, runs), default=0)
    assert all(abs(sum(map(tokens, shard)) - total / n) <= longest for shard in shards)


@given(st.integers(0, 200), st.integers(1, 40))
def test_runs_of_equal_size_are_split_to_within_one(count, n):
    sizes = [len(Shard(i, n).of([Sized(k, 60) for k in range(count)])) for i in range(1, n + 1)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n", range(1, 8))
def test_the_union_of_the_shards_is_the_default_matrix(n):
    options = arguments.parser().parse_args(["matrix", *TWO_STEPS])
    whole = plan_matrix(options, torch.device("cpu"))
    union = [run.run_id for i in range(1, n + 1) for run in Shard(i, n).of(whole)]
    assert union == [run.run_id for run in whole] and len(union) == 42


def test_the_cut_is_the_same_everywhere():
    whole = plan_matrix(arguments.parser().parse_args(["matrix", *TWO_STEPS]), torch.device("cpu"))
    first = [f"{run.case.id} {run.config.id}" for run in (Shard(i, 4).of(whole)[0] for i in range(1, 5))]
    assert first == ["gpt2_clm fp32_true", "roberta_mlm bf16_pure", "roberta_multi_cls fp16_naive", "gpt2_single_cls fp32_true"]


@pytest.mark.parametrize("text", ["0/3", "4/3", "x", "1/0", "1", "-1/3", "1/3/5", "1.0/2", ""])
def test_a_shard_that_does_not_exist_is_refused(text, tmp_path, capsys):
    with pytest.raises(SettingsError):
        Shard.parse(text)
    assert cli.main(["matrix", *TWO_STEPS, f"--shard={text}", "--out", str(tmp_path / "out")]) == USAGE
    said = capsys.readouterr().err
    assert "--shard" in said and "allowed" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_shard_without_a_run_says_so_and_leaves_nothing(tmp_path, capsys):
    words = [
        "matrix",
        *TWO_STEPS,
        "--cases",
        "gpt2_clm",
        "--configs",
        "fp32_true",
        "amp_bf16",
        "--shard",
        "9/9",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == OK
    assert capsys.readouterr() == ("", "shard 9/9: nothing to do here: 2 runs of the plan are in other shards\n")
    assert cli.main([*words, "--dry-run", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["todo"] == [] and not (tmp_path / "out").exists()


@pytest.mark.process
def test_two_shards_merged_are_the_unsharded_matrix(tmp_path, monkeypatch, capsys):
    """fp16_naive diverges: its controls come along in its shard, but for the one that is planned in the other shard."""
    monkeypatch.setattr(command, "print_verdict", lambda out: None)
    monkeypatch.setattr(command, "store_all", lambda cases, out: None)
    words = ["matrix", *TWO_STEPS, "--cases", "gpt2_clm", "--configs", "fp16_naive", "fp32_true", "fp16_naive_eps1e4", "--out"]
    whole, parts = tmp_path / "whole", [tmp_path / "1", tmp_path / "2"]
    assert cli.main([*words, str(whole)]) == OK
    for number, part in enumerate(parts, start=1):
        assert cli.main([*words, str(part), "--shard", f"{number}/2"]) == OK
    ids = [{row.run_id for row in finished_runs(part)} for part in parts]
    assert len(ids[0]) == 2 and len(ids[1]) == 2 and not ids[0] & ids[1]
    assert "shard 1/2: 1 run," in capsys.readouterr().err
    assert cli.main(["repair", str(tmp_path / "all"), "--merge", *map(str, parts)]) == OK
    assert indexed_rows(tmp_path / "all").keys() == indexed_rows(whole).keys() == ids[0] | ids[1]
    for run_id in indexed_rows(whole):
        assert comparable(tmp_path / "all", run_id) == comparable(whole, run_id), run_id
    capsys.readouterr()
    assert cli.main([*words, str(tmp_path / "all")]) == OK
    said = capsys.readouterr().err
    assert f"nothing to do: all 4 runs are done in {tmp_path / 'all'}" in said
    assert "0 runs" not in said and "report:" not in said
    assert cli.main([*words, str(tmp_path / "all"), "--dry-run", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["todo"] == []
    assert cli.main([*words, str(tmp_path / "all"), "--rerun", "--dry-run", "--json"]) == OK
    assert len(json.loads(capsys.readouterr().out)["todo"]) == 3, "what was planned; the control comes when its parent diverges"
