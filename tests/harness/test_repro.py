"""``inspect --repro``: the failing op alone, in a fresh process, fails as it did in the run."""

import ast
import contextlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.forensics.evidence import METADATA_KEY, save_operands
from harness.inspect.repro_script import OURS, read_culprit, script_text, write_repro
from harness.run.execute import execute
from harness.settings import SettingsError
from instrument.replay.replays import examine
from instrument.replay.snapshot import Snapshot
from instrument.results.layout import RunFiles, locate
from instrument.results.measurements import ForensicsRecord
from instrument.results.read import RunUnreadable
from instrument.results.schemas import FirstNonfinite

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


class Op(torch.nn.Module):
    """One fp16 parameter and one op on it."""

    def __init__(self, op, start=4.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-start, start, 24).reshape(4, 6).half())
        self.op = op

    def forward(self):
        return self.op(self.weight)


def failure(op, *, start=4.0, factor=1.0, optimizer=None):
    """The examination of a step whose op fails."""
    model = Op(op, start)
    optimizer = optimizer(model.parameters()) if optimizer else torch.optim.SGD(model.parameters(), lr=1e-3)

    def run_step(step, recorder):
        loss = (model().float() * factor).sum()
        if recorder is not None:
            recorder.loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = examine(1, run_step, Snapshot(0, model, optimizer, None), model, optimizer)
    assert found is not None
    return found


def kept(found, tmp_path, **options):
    """A run's folder with the operands of ``found``, and the record that the script quotes."""
    run = RunFiles(tmp_path, "case-config-s0-00000000")
    save_operands(run.path / "culprit.safetensors", found, **options)
    first = FirstNonfinite(
        step=1,
        microbatch=0,
        phase=found.phase,
        phase_surfaced=found.phase,
        module=found.module,
        op=found.op,
        tensor=found.tensor,
        source_tensor=None,
        kind=found.kind,
        dtype="float16",
        cause=found.cause,
        input_absmax=None,
        headroom_bits=None,
    )
    return run, ForensicsRecord(run_id=run.run_id, sentence='step 1: "it" failed \\ here', matched=True, first_nonfinite=first)


def said(script, capsys):
    """What a script prints, run in this process; raises SystemExit when it does not fail as the run did."""
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out


ADAM = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-8, foreach=True)  # noqa: E731
FAILURES = {
    "exp": (lambda w: (w * 5).exp(), {}),
    "pow": (lambda w: (w * 100).pow(2), {}),
    "product with a transposed operand": (lambda w: (w * 90) @ w.mT * 10 @ torch.full((4, 3), 90.0).half(), {}),
    "division by zero": (lambda w: w / (w * 0), {}),
    "reciprocal": (lambda w: (w * 0).reciprocal(), {}),
    "logarithm of a negative number": (lambda w: w.log(), {}),
    "cast with a dtype": (lambda w: (w.float() * 1e5).to(torch.float16), {}),
    "sum over a dimension": (lambda w: (w.abs() * 8000).sum(dim=1), {}),
    "softmax": (lambda w: torch.softmax(w.log2().nan_to_num(0) * 0 - torch.inf, -1), {}),
    "in place": (lambda w: (w * 1).mul_(30000), {}),
    "backward": (lambda w: w * 30000, {"start": 1.0, "factor": 4.0}),
    "optimizer": (lambda w: w * 1e-4, {"optimizer": ADAM}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_script_says_what_the_replay_found(name, tmp_path, capsys):
    op, options = FAILURES[name]
    found = failure(op, **options)
    run, record = kept(found, tmp_path)
    script, _ = write_repro(run, None, record, tmp_path / "alone.py")
    out = said(script, capsys)
    d = found.diagnosis
    counts = read_culprit(run).failed.counts
    assert sum(counts.values()) == d.output.nonfinite and counts[d.kind]
    assert f"{d.output.nonfinite:,} of {d.output.numel:,} elements are not finite: " in out
    assert out.rstrip().endswith("The same as in the run, kind by kind.")
    assert ("Overflow: float64" in out) == (d.cause == "overflow")
    assert ("divides by exactly 0" in out) == bool(d.output.zero_denominators)
    if d.output.exact_absmax is not None:
        assert f"up to {d.output.exact_absmax:.6g};" in out
    assert re.search(r"-> float64 +float64 ", out), "the same op must have run in float64"


def test_forward_backward_and_optimizer_are_among_them():
    assert {failure(FAILURES[name][0], **FAILURES[name][1]).phase for name in ("exp", "backward", "optimizer")} == {
        "forward",
        "backward",
        "optimizer",
    }


def test_memory_layout_is_kept(tmp_path):
    found = failure(lambda w: torch.mm((w * 90), (w * 90).mT) * 1)
    run, record = kept(found, tmp_path)
    strides = read_culprit(run).strides
    originals = dict(zip(("self", "mat2"), found.captured[1], strict=True))
    assert strides == {n: t.stride() for n, t in originals.items() if not t.is_contiguous()} and strides
    script, tensors = write_repro(run, None, record, tmp_path / "alone.py")
    variables = runpy.run_path(str(script))
    for name, original in originals.items():
        assert torch.equal(variables["tensors"][name], original) and variables["tensors"][name].stride() == original.stride()


def test_a_script_whose_tensors_changed_does_not_claim_the_same(tmp_path):
    run, record = kept(failure(FAILURES["exp"][0]), tmp_path)
    script, tensors = write_repro(run, None, record, tmp_path / "alone.py")

    save_file({name: t * 0 for name, t in load_file(tensors).items()}, tensors)
    with pytest.raises(SystemExit, match="stays finite here"):
        runpy.run_path(str(script))


def test_what_is_too_large_is_left_out_and_said(tmp_path):
    run, record = kept(failure(FAILURES["exp"][0]), tmp_path, most_bytes=10)
    with safe_open(run.path / "culprit.safetensors", "pt") as file:
        assert list(file.keys()) == [] and "at most 10 are kept" in json.loads(file.metadata()[METADATA_KEY])["left_out"]
    with pytest.raises(SettingsError, match="48 bytes, and at most 10 are kept"):
        write_repro(run, None, record, tmp_path / "alone.py")


def test_a_value_from_before_the_step_has_no_op_to_run(tmp_path):
    run, record = kept(failure(lambda w: w * 1, start=float("nan")), tmp_path)
    with pytest.raises(SettingsError, match="there is no op of it to run again"):
        write_repro(run, None, record, tmp_path / "alone.py")


def test_broken_operands_are_named(tmp_path):
    run, record = kept(failure(FAILURES["exp"][0]), tmp_path)
    (run.path / "culprit.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(RunUnreadable, match="culprit.safetensors: not the operands"):
        write_repro(run, None, record, tmp_path / "alone.py")
    (run.path / "culprit.safetensors").unlink()
    with pytest.raises(SettingsError, match="run it again"):
        write_repro(run, None, record, tmp_path / "alone.py")


def test_every_op_of_ours_has_an_import():
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "kernels").rglob("*.py"))
    namespaces = set(re.findall(r'Library\("dtype_dynamics_(\w+)"', sources))
    assert namespaces == set(OURS)
    assert all((REPOSITORY / "kernels" / room / "__init__.py").is_file() for room in OURS.values())


@pytest.mark.parametrize(
    ("op", "device", "message"),
    [
        ("aten::exp", "cuda", "device = 'cuda'"),
        ("bitsandbytes::optimizer_update", "cpu", "import bitsandbytes"),
        ("dtype_dynamics_cross_entropy::forward", "cuda", "import kernels.cross_entropy"),
    ],
)
def test_scripts_for_gpus_and_for_other_libraries_are_python(op, device, message, tmp_path):
    run, record = kept(failure(FAILURES["exp"][0]), tmp_path)
    switches = {
        "threads": 2,
        "fp32_precision": "ieee",
        "fp16_reduced_precision_reduction": False,
        "bf16_reduced_precision_reduction": False,
        "fp16_accumulation": False,
    }
    made = SimpleNamespace(flags={"switches": switches}, env={"torch_version": "9.9"})
    text = script_text(run.run_id, made, record, msgspec.structs.replace(read_culprit(run), op=op, device=device))
    compile(text, "alone.py", "exec")
    assert message in text and "version = '9.9'" in text
    assert ("allow_fp16_accumulation = False" in text) == (device == "cuda")
    assert ("set_num_threads(2)" in text) == (device == "cpu")


CODE = "float16 if not __import__('os').system('touch ran') else None"


def damaged(run, change):
    """The culprit's facts after ``change(facts)``, its tensors as they were."""
    tensors = load_file(run.culprit)
    with safe_open(run.culprit, "pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
    change(facts)
    save_file(tensors, run.culprit, {METADATA_KEY: json.dumps(facts)})


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["failed"].update(dtype=CODE),
        lambda facts: facts["failed"].update(counts={"nan": CODE}),
        lambda facts: facts["failed"].update(shape=[CODE]),
        lambda facts: facts.update(op=f"aten::exp({CODE})"),
        lambda facts: facts.update(op="aten::exp\n"),
        lambda facts: facts.update(op="aten::no_such_op"),
        lambda facts: facts.update(op="aten::from_file", args=["x", True]),
        lambda facts: facts.update(op="antigravity::exp"),
        lambda facts: facts.update(overload=f"default({CODE})"),
        lambda facts: facts.update(device=CODE),
        lambda facts: facts.update(divisor=CODE),
        lambda facts: facts.update(strides={f"self'] + {CODE} + ['": [1]}),
        lambda facts: facts.update(strides={"other": [1]}),
        lambda facts: facts.update(overwritten=[CODE]),
        lambda facts: facts.update(kwargs={CODE: 1}),
        lambda facts: facts.update(args=[{"dtype": CODE}]),
        lambda facts: facts.update(args=[{"layout": CODE}]),
        lambda facts: facts.update(args=[{"float": f"nan') or {CODE}"}]),
        lambda facts: facts.update(args=[{"tensor": f"self'] or {CODE}"}]),
        lambda facts: facts.update(args=[{"tensor": "absent"}]),
        lambda facts: facts.update(args=[{"tensor": "self", "dtype": "float16"}]),
        lambda facts: facts.update(args=[{}]),
    ],
)
def test_no_string_of_a_received_folder_becomes_code(change, tmp_path):
    run, record = kept(failure(FAILURES["exp"][0]), tmp_path)
    damaged(run, change)
    with pytest.raises((RunUnreadable, SettingsError)):
        write_repro(run, None, record, tmp_path / "alone.py")
    assert not (tmp_path / "alone.py").exists()


def shape_of(script):
    """The script's syntax with every literal, and the kept arguments, replaced by a mark."""
    tree = ast.parse(script)
    for line in tree.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]).split(",")[0].strip("(") in FREE:
            literals_only(line.value)
            line.value = ast.Constant(0)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = 0
        elif isinstance(node, ast.List) and all(LISTED.fullmatch(ast.unparse(item)) for item in node.elts):
            node.elts = []
    return ast.dump(tree)


FREE = ("args", "kwargs", "shape", "divisor")
LISTED = re.compile(r"'[a-z0-9_.]+'|(kw)?args\[('\w+'|-?\d+)\]|returned")
"""What a list of tensors' names, or of what an op writes, consists of."""
LITERALS = (
    ast.Tuple,
    ast.List,
    ast.Dict,
    ast.Constant,
    ast.Subscript,
    ast.Call,
    ast.Name,
    ast.Attribute,
    ast.Load,
    ast.UnaryOp,
)
LITERALS += (ast.USub,)


def literals_only(node):
    """Of an argument: tuples, lists, dictionaries and numbers; ``tensors[...]``, ``float(...)``, ``device``, ``torch.NAME``."""
    for one in ast.walk(node):
        assert isinstance(one, LITERALS)
        assert not isinstance(one, ast.Name) or one.id in ("tensors", "float", "device", "torch")
        assert not isinstance(one, ast.Call) or (one.func.id == "float" and isinstance(one.args[0], ast.Constant))
        assert not isinstance(one, ast.Attribute) or (one.value.id == "torch" and one.attr.isidentifier())


def mutated(value, random):
    """``value`` with some of its leaves or keys replaced by hostile ones."""
    hostile = [
        CODE,
        "'",
        '"""',
        "\\",
        "\n",
        "\x00",
        "self\n",
        "\u2028import os",
        "{}",
        "$op",
        -1,
        1 << 70,
        1e400,
        None,
        True,
        [],
        {},
    ]
    if random.random() < 0.04:
        return random.choice(hostile)
    if isinstance(value, dict):
        keys = {key: random.choice(hostile[:10]) if random.random() < 0.02 else key for key in value}
        return {keys[key]: mutated(item, random) for key, item in value.items()}
    return [mutated(item, random) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("trials", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_scripts_of_mutated_folders_have_the_nodes_of_a_script_and_no_others(trials, tmp_path):
    run, record = kept(failure(FAILURES["cast with a dtype"][0]), tmp_path)
    with safe_open(run.culprit, "pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    row = {"flags": {"switches": {"threads": 2}}, "env": {"torch_version": "2.0"}}
    expected = shape_of(script_text(run.run_id, SimpleNamespace(**row), record, read_culprit(run)))
    random, written = Random(0), 0
    for _ in range(trials):
        save_file(tensors, run.culprit, {METADATA_KEY: json.dumps(mutated(facts, random))})
        changed = mutated(row, random)
        found = msgspec.structs.replace(record, sentence=str(mutated("it failed", random)))
        with contextlib.suppress(RunUnreadable, SettingsError):
            culprit = read_culprit(run)
            if culprit.left_out is None and isinstance(changed, dict):
                flags, env = (part if isinstance(part := changed.get(key), dict) else {} for key in ("flags", "env"))
                switches = flags.get("switches")
                flags = (
                    {"switches": switches}
                    if isinstance(switches, dict) and type(switches.get("threads")) is int and switches["threads"] > 0
                    else row["flags"]
                )
                text = script_text(run.run_id, SimpleNamespace(flags=flags, env=env), found, culprit)
                compile(text, "alone.py", "exec")
                assert re.sub(r"attr='\w+'", "", shape_of(text)) == re.sub(r"attr='\w+'", "", expected)
                written += 1
    assert trials / 20 < written < trials


@pytest.mark.process
@pytest.mark.parametrize(
    ("case", "config", "asked", "op"),
    [
        ("gpt2_multi_cls", "fp16_naive", {}, "aten._foreach_addcdiv_"),
        ("roberta_mlm", "amp_fp16_unscaled", {"lr": 300.0, "max_steps": 8}, None),
    ],
)
def test_a_run_fails_again_in_a_process_of_its_own(case, config, asked, op, plan, tmp_path, capsys):
    record = execute(plan(case, config, **asked), tmp_path)
    assert record.status == "diverged"
    first = record.first_nonfinite
    assert op is None or first.op == op
    assert main(["inspect", record.run_id, "--out", str(tmp_path), "--repro", str(tmp_path / "alone.py")]) == 0
    assert str(tmp_path / "alone.safetensors") in capsys.readouterr().out
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    output = json.loads((locate(record.run_id, tmp_path).path / "forensics.json").read_bytes())["output"]
    assert f"{output['nonfinite']:,} of {output['numel']:,} elements are not finite: " in done.stdout
    assert {"nan": " NaN", "inf": " +Inf", "-inf": " -Inf"}[first.kind] in done.stdout and first.op in done.stdout
