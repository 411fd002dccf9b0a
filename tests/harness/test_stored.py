"""The snapshot on disk: a fresh process' training resumes from it bit for bit, and damage is noticed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from bench_cases.lookup import BadDeclaration
from bench_cases.models import build_model, weights_sha256
from harness.forensics import stored
from harness.forensics.stored import NothingToReplay, RebuildError, SnapshotError
from harness.inspect.rerun import rebuild, settings_of
from harness.precision import Precision
from harness.run.execute import execute, load_run_data, make_batches, model_request
from harness.training import Training
from instrument.results.measurements import ForensicsRecord
from instrument.results.schemas import RunRecord, decode, encode

pytestmark = pytest.mark.slow


@pytest.fixture
def fresh():
    """``fresh(settings)``: a training as a new process would build it."""
    made = []

    def make(settings):
        data = load_run_data(settings)
        precision = Precision(settings.config, torch.device("cpu"), threads=1)
        made.append(precision)
        return Training.prepare(settings, build_model(model_request(settings, data)), make_batches(settings, data), precision)

    yield make
    for precision in made:
        precision.close()


def records(training, steps):
    """Step records without their times."""
    return [msgspec.structs.replace(training.again(step).steps[-1], step_time_s=None) for step in steps]


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("gpt2_clm", "amp_fp16"),
        ("roberta_mlm", "amp_bf16_8bit"),
        ("gpt2_multi_cls", "bf16_pure_sr"),
        ("gpt2_single_cls", "fp16_naive_fp32_states"),
    ],
)
def test_a_fresh_training_resumes_from_the_file_bit_for_bit(plan, fresh, tmp_path, monkeypatch, case, config):
    settings = plan(case, config, max_steps=6, dropout=0.1)  # dropout: the random state counts, too
    with monkeypatch.context() as another_scale:
        another_scale.setattr("harness.precision.FIRST_LOSS_SCALE", 2.0**12)
        original = fresh(settings)
    records(original, (1, 2, 3))
    kept = stored.store(original.snapshot(3), tmp_path, settings.run_id)
    assert kept.file == "snapshot" and kept.why is None
    expected = records(original, (4, 5, 6))
    original.precision.close()
    other = fresh(settings)
    records(other, (1,))  # a state of its own, to be replaced
    stored.load(tmp_path, other).restore()
    assert records(other, (4, 5, 6)) == expected
    assert weights_sha256(other.model) == weights_sha256(original.model)


def test_tied_weights_and_shared_tables_are_stored_once(plan, fresh, tmp_path):
    settings = plan("gpt2_clm", "amp_bf16_8bit")
    training = fresh(settings)
    records(training, (1,))
    stored.store(training.snapshot(1), tmp_path, settings.run_id)
    state = stored.read_state(tmp_path, settings.run_id)
    rows = [
        name
        for name, t in state.tensors.items()
        if name.startswith("model/") and t.shape[0] == training.model.head.model.lm_head.weight.shape[0]
    ]
    assert rows == ["model/transformer.wte.weight"]
    assert state.aliases and all(first in state.tensors for first in state.aliases.values())


def test_a_run_that_fails_keeps_its_snapshot_and_a_healthy_one_keeps_none(plan, tmp_path):
    failed, healthy = (execute(plan("gpt2_single_cls", config), tmp_path) for config in ("fp16_naive", "amp_bf16"))
    folder = tmp_path / "runs" / failed.run_id
    forensics = decode((folder / "forensics.json").read_bytes(), ForensicsRecord)
    assert forensics.snapshot_file == failed.flags["snapshot"]["file"] == "snapshot"
    assert sorted(p.name for p in (folder / "snapshot").iterdir()) == ["snapshot.json", "tensors.safetensors"]
    assert {p.stat().st_mode & 0o777 for p in (folder / "snapshot").iterdir()} == {0o644}
    assert stored.read_state(folder, failed.run_id).step == 0
    with pytest.raises(NothingToReplay, match="has no stored snapshot"):
        stored.read_state(tmp_path / "runs" / healthy.run_id, healthy.run_id)


def test_a_snapshot_that_is_too_large_or_meets_a_full_disk_is_left_out_with_the_reason(plan, fresh, tmp_path, monkeypatch):
    training = fresh(plan("gpt2_single_cls", "fp32_true"))
    snapshot = training.snapshot(0)
    kept = stored.store(snapshot, tmp_path, "x", most_bytes=1000)
    assert kept.file is None and "larger than" in kept.why and kept.nbytes == snapshot.nbytes

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", full)
    assert "No space left" in stored.store(snapshot, tmp_path, "x").why
    assert list(tmp_path.iterdir()) == []


def test_damage_is_noticed(plan, fresh, tmp_path):
    settings = plan("gpt2_single_cls", "fp32_true")
    training = fresh(settings)
    stored.store(training.snapshot(0), tmp_path, settings.run_id)
    with pytest.raises(SnapshotError, match="the snapshot of"):
        stored.read_state(tmp_path, "another")
    with pytest.raises(SnapshotError, match="another model"):
        stored.load(
            tmp_path,
            SimpleNamespace(
                settings=settings,
                model=torch.nn.Linear(2, 2),
                precision=training.precision,
                optimizer=torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()),
            ),
        )
    tensors = tmp_path / "snapshot" / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(SnapshotError, match="checksum"):
        stored.read_state(tmp_path, settings.run_id)
    (tmp_path / "snapshot" / "snapshot.json").write_text('{"schema": 1')
    with pytest.raises(SnapshotError, match="cannot be read"):
        stored.read_state(tmp_path, settings.run_id)


def test_settings_come_back_from_the_record_alone(plan, tmp_path):
    settings = plan("roberta_multi_cls", "amp_fp16", seed=3, lr=0.004, max_steps=1, bucket_by_length=True)
    record = execute(settings, tmp_path)
    again = settings_of(record)
    assert again.run_id == record.run_id and again.as_config() == settings.as_config()
    made = rebuild(record)
    assert weights_sha256(made.model) == record.init_sha256 and made.warnings == ()


def test_what_is_not_as_it_was_is_named(plan, tmp_path, monkeypatch):
    record = execute(plan("gpt2_single_cls", "fp32_true", max_steps=1), tmp_path)
    with pytest.raises(RebuildError, match="initial weights differ"):
        rebuild(msgspec.structs.replace(record, init_sha256="0" * 64))
    with pytest.raises(RebuildError, match="another version"):
        settings_of(msgspec.structs.replace(record, config=record.config | {"unheard_of": 1}))
    other = rebuild(msgspec.structs.replace(record, env=record.env | {"torch_version": "1.0"}))
    assert other.warnings == (f"torch_version was 1.0 and is {record.env['torch_version']}",)
    monkeypatch.setattr("harness.inspect.rerun.fingerprint", lambda *_, **__: "changed")
    with pytest.raises(RebuildError, match=r"differs: data_fingerprint '.*' -> 'changed'"):
        settings_of(record)


def test_a_case_of_the_callers_own_comes_back_as_well(plan, tmp_path):
    own = plan("gpt2_single_cls", "fp32_true", max_steps=1)
    own = replace(own, case=replace(own.case, weight_decay=0.5))  # in no registry
    record = execute(own, tmp_path)
    assert settings_of(record).case.weight_decay == 0.5
    assert json.loads((tmp_path / "runs" / own.run_id / "run.json").read_text())["config"]["case"]["weight_decay"] == 0.5


@pytest.fixture
def received(plan, tmp_path, monkeypatch):
    """``received(changes of the settings)``: the row of a run that somebody else made, with a run id that fits it; here no
    socket connects."""
    settings = plan("gpt2_single_cls", "fp32_true", max_steps=1)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "theirs"))
    record = execute(settings, tmp_path / "results")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))

    def make(**changes):
        theirs = replace(settings, **{name: change(settings) for name, change in changes.items()})
        return msgspec.structs.replace(record, run_id=theirs.run_id, config=theirs.as_config())

    return make


def test_a_received_run_of_a_registered_case_is_made_again(received):
    assert rebuild(received()).settings.case.id == "gpt2_single_cls"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"case": lambda s: replace(s.case, architecture=replace(s.case.architecture, build="{evil}:build"))},
            r"evil\.py:build",
        ),
        ({"case": lambda s: replace(s.case, architecture=replace(s.case.architecture, hub_id="some/model"))}, "'some/model'"),
        (
            {"case": lambda s: replace(s.case, architecture=replace(s.case.architecture, tokenizer="/a/pipe"))},
            "no case of this",
        ),
        ({"data": lambda s: "hub:some/data"}, "data from 'hub:some/data'"),
        ({"data": lambda s: "/a/pipe"}, "data from '/a/pipe'"),
        ({"weights": lambda s: "pretrained"}, "weights from 'openai-community/gpt2'"),
        ({"weights": lambda s: "some/folder"}, "weights from 'some/folder'"),
    ],
)
def test_a_received_run_loads_nothing_from_outside_before_it_is_trusted(received, tmp_path, changes, named):
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef build(request): raise SystemExit(1)\n")
    record = received(**changes)
    record = decode(encode(record).replace(b"{evil}", str(evil).encode()), RunRecord)
    with pytest.raises(RebuildError, match=named) as refused:
        rebuild(record)
    assert "--trust-run" in str(refused.value) and not (tmp_path / "ran").exists()


def test_a_received_runs_code_is_loaded_when_it_is_trusted(received, tmp_path):
    evil = tmp_path / "theirs.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ImportError('seen')\n")
    record = received(case=lambda s: replace(s.case, architecture=replace(s.case.architecture, build=f"{evil}:build")))
    with pytest.raises((RebuildError, BadDeclaration)):
        rebuild(record, trust=True)


def test_only_one_place_turns_a_rows_words_into_a_case():
    """A second one would need the question of trust, too."""
    root = Path(__file__).parents[2]
    rooms = ("bench_cases", "harness", "instrument", "kernels", "report", "ddbench")
    sources = [path for room in rooms for path in (root / room).rglob("*.py")]
    converts = [path.relative_to(root).as_posix() for path in sources if re.search(r"convert\(.*, Case\)", path.read_text())]
    assert converts == ["harness/inspect/rerun.py"]
