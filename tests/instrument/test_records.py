"""Records survive a round trip exactly, in strict JSON, and refuse what is not theirs."""

import ast
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instrument.results.schemas import (
    EVENTS,
    LONGEST,
    PHASES,
    SCHEMA,
    STATUSES,
    EvaluationRecord,
    EventRecord,
    FirstNonfinite,
    RecordError,
    RunRecord,
    StepRecord,
    decode,
    encode,
    is_safe,
    require_safe,
)

numbers = st.floats(width=64)
maybe = st.none() | numbers
counts = st.none() | st.integers(0, 2**60)
words = st.text(max_size=20)

steps = st.builds(
    StepRecord,
    step=st.integers(1, 10**6),
    loss=maybe,
    lr=numbers,
    grad_norm=maybe,
    grad_absmax=maybe,
    grad_nonfinite=counts,
    grad_underflow_frac=maybe,
    logit_absmax=maybe,
    logit_nonfinite=counts,
    logit_over_fp16=counts,
    loss_scale=maybe,
    step_skipped=st.booleans(),
    step_time_s=maybe,
    samples=st.integers(0, 9),
    tokens=st.integers(0, 9),
    real_tokens=st.integers(0, 9),
    seq_len=st.integers(1, 9),
)
firsts = st.builds(
    FirstNonfinite,
    step=st.integers(1, 9),
    microbatch=st.none() | st.integers(0, 9),
    phase=st.sampled_from(PHASES),
    phase_surfaced=st.sampled_from(PHASES),
    module=st.none() | words,
    op=st.none() | words,
    tensor=words,
    source_tensor=st.none() | words,
    kind=st.sampled_from(["nan", "inf", "-inf"]),
    dtype=st.none() | words,
    cause=st.sampled_from([None, "overflow", "invalid"]),
    input_absmax=maybe,
    headroom_bits=maybe,
    absorbed=st.lists(words, max_size=2),
    replay=st.none(),
)
nested = st.dictionaries(st.text("abc", min_size=1, max_size=3), numbers | words | st.booleans(), max_size=3)
run_ids = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True)
runs = st.builds(
    RunRecord,
    run_id=run_ids,
    case=words,
    scenario=words,
    arch=words,
    task=words,
    loss=words,
    loss_reduction=words,
    dtype_config=words,
    seed=st.integers(0, 9),
    preset=words,
    device=words,
    data_source=words,
    weights_source=words,
    status=st.sampled_from(STATUSES),
    divergence_step=st.integers(1, 9),
    first_nonfinite=st.none() | firsts,
    max_steps=st.integers(1, 9),
    batch_size=st.integers(1, 9),
    micro_batch=st.integers(1, 9),
    seq_len=st.integers(1, 9),
    val_loss=maybe,
    perplexity=maybe,
    flags=st.dictionaries(st.text("xyz", min_size=1), nested, max_size=2),
)


def strict(line: bytes) -> dict:
    def refuse(name):
        raise AssertionError(f"bare {name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def same(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@given(steps | runs)
def test_round_trip_is_exact_and_strict(record):
    line = encode(record)
    row = strict(line)
    assert row["schema"] == SCHEMA
    back = decode(line, type(record))
    assert encode(back) == line
    for name in record.__struct_fields__:
        if name not in ("nonfinite", "first_nonfinite"):
            assert same(getattr(back, name), getattr(record, name)), name
    if getattr(record, "first_nonfinite", None) is not None:
        for name in record.first_nonfinite.__struct_fields__:
            assert same(getattr(back.first_nonfinite, name), getattr(record.first_nonfinite, name)), name


def a_step(**changes) -> StepRecord:
    plain = dict(
        step=1,
        loss=1.0,
        lr=0.1,
        grad_norm=1.0,
        grad_absmax=1.0,
        grad_nonfinite=0,
        grad_underflow_frac=0.0,
        logit_absmax=1.0,
        logit_nonfinite=0,
        logit_over_fp16=0,
        loss_scale=None,
        step_skipped=False,
        step_time_s=0.1,
        samples=1,
        tokens=4,
        real_tokens=3,
        seq_len=4,
    )
    return StepRecord(**{**plain, **changes})


def test_nonfinite_numbers_are_null_and_named():
    row = strict(encode(a_step(loss=math.nan, grad_norm=math.inf, grad_absmax=-math.inf)))
    assert row["loss"] is None and row["grad_norm"] is None
    assert row["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "grad_absmax": "-inf"}


def test_the_rows_have_the_fields_of_the_design():
    step_fields = """schema step loss lr grad_norm grad_absmax grad_nonfinite grad_underflow_frac logit_absmax logit_nonfinite
        logit_over_fp16 loss_scale step_skipped step_time_s samples tokens real_tokens seq_len flops mfu
        mfu_bf16_peak mfu_measured_peak mfu_real_tokens mfu_bf16_peak_real_tokens
        mfu_measured_peak_real_tokens allocated_bytes targets nonfinite""".split()
    assert list(strict(encode(a_step()))) == step_fields
    run_fields = """schema run_id case scenario arch task loss loss_reduction dtype_config seed preset device data_source
        weights_source status divergence_step first_nonfinite steps_done max_steps timed_steps batch_size
        micro_batch seq_len n_params loss_initial train_loss_final val_loss perplexity f1_micro f1_macro
        f1_micro_tuned f1_micro_majority f1_macro_majority samples_per_s tokens_per_s real_tokens_per_s
        step_time_p50_s step_time_p95_s
        flops_per_step mfu mfu_bf16_peak mfu_measured_peak mfu_real_tokens mfu_bf16_peak_real_tokens
        mfu_measured_peak_real_tokens peak_flops_per_s peak_flops_source peak_allocated_bytes
        peak_reserved_bytes peak_device_bytes peak_rss_bytes energy_j scaler_skips attention_backend attention_dtype
        logits_dtype autocast instrument init_sha256 data_sha256 final_weights_sha256 env config flags error
        nonfinite""".split()
    assert list(RunRecord.__struct_fields__) == run_fields


@dataclass
class Broken:
    line: bytes
    reason: str


@pytest.mark.parametrize(
    "broken",
    [
        Broken(b"", "not JSON"),
        Broken(b"[1]", "a record is a JSON object, and this is a list"),
        Broken(b'{"step": 1}', "schema None"),
        Broken(b'{"schema": 99, "step": 1}', "schema 99"),
        Broken(b'{"schema": 1, "step": 1}', "missing required field"),
        Broken(encode(a_step()).replace(b'"step":1', b'"step":"1"'), "Expected `int`"),
        Broken(encode(a_step()).replace(b'"lr"', b'"learning_rate"'), "unknown field"),
        Broken(encode(a_step()).replace(b'"nonfinite":{}', b'"nonfinite":{"loss":"nan"}'), "not there"),
        Broken(encode(a_step()).replace(b'"nonfinite":{}', b'"nonfinite":{"nothing":"nan"}'), "not there"),
        Broken(encode(a_step(loss=math.nan)).replace(b'"nan"', b'"huge"'), "not there"),
        Broken(b'{"loss": NaN}', "not JSON"),
    ],
)
def test_a_broken_line_is_refused_with_the_reason(broken):
    with pytest.raises(RecordError, match=broken.reason):
        decode(broken.line, StepRecord)


def test_values_outside_their_lists_are_refused():
    with pytest.raises(ValueError, match="status is 'fine'"):
        RunRecord(
            run_id="x",
            case="c",
            scenario="A",
            arch="a",
            task="t",
            loss="l",
            loss_reduction="mean",
            dtype_config="d",
            seed=0,
            preset="tiny",
            device="cpu",
            data_source="e",
            weights_source="s",
            status="fine",
            max_steps=1,
            batch_size=1,
            micro_batch=1,
            seq_len=1,
        )
    line = encode(EventRecord(step=1, kind="scaler_skip", detail={"loss_scale": 1.0}))
    assert decode(line, EventRecord).detail == {"loss_scale": 1.0}
    evaluation = EvaluationRecord(
        step=0,
        val_loss=1.0,
        perplexity=math.inf,
        f1_micro=None,
        f1_macro=None,
        f1_micro_tuned=None,
        tuned_threshold=None,
        labels_absent=None,
        samples=1,
        targets=1,
        duration_s=0.1,
    )
    assert decode(encode(evaluation), EvaluationRecord).perplexity == math.inf


def test_events_are_of_the_kinds_that_the_code_writes_and_no_others():
    """Every ``EventRecord(kind=...)`` of the code, and the schema's list."""
    root, kinds = Path(__file__).resolve().parents[2], set()
    for path in (path for room in ("harness", "instrument") for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "EventRecord":
                kinds.add(ast.literal_eval(next(word.value for word in node.keywords if word.arg == "kind")))
    assert kinds == set(EVENTS) and all(f"``{kind}``" in EventRecord.__doc__ for kind in EVENTS)
    with pytest.raises(RecordError, match="an event is 'news'; allowed: scaler_skip, "):
        encode(EventRecord(step=1, kind="news", detail={}))
    assert decode(b'{"schema":1,"step":1,"kind":"news","detail":{}}', EventRecord).kind == "news"  # another version's


UNSAFE = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "-rf", ".claim", "a b", "ä"]


@pytest.mark.parametrize("run_id", [*UNSAFE, "x" * (LONGEST + 1), None, 7])
def test_unsafe_run_ids_are_refused_in_one_sentence(run_id):
    assert not is_safe(run_id)
    with pytest.raises(ValueError, match="no safe file name; allowed") as raised:
        require_safe(run_id)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_our_own_run_ids_are_safe():
    assert is_safe("gpt2_multi_cls-amp_bf16_fp32_head-s0-0badcafe") and is_safe("x" * LONGEST)
