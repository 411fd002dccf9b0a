"""The watch in loops that are not ours."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from harness.optimizer import adamw_for
from instrument import NonfiniteError, Watch
from instrument.hooks import blocks, leaves, tensors_in
from instrument.results.measurements import TapReading
from instrument.watch.surface import innermost
from instrument.watch.taps import ModuleTaps

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two layers in a list, a head; spoils what ``spoil`` names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)
        self.spoil = None

    def forward(self, x):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.spoil == number:
                x = x / 0.0
        return {"logits": self.head(x), "hidden": (x,)}


class Loop:
    """A plain loop that can run any of its steps again. ``faults``: step -> what to do in it."""

    def __init__(self, scaled=False, **faults):
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
        self.faults = {int(name.removeprefix("at_")): fault for name, fault in faults.items()}
        self.watch = None

    def step(self, step):
        torch.manual_seed(step)
        fault = self.faults.get(step)
        self.model.spoil = 1 if fault == "forward" else None
        if fault == "scale":
            with torch.no_grad():
                self.model.layers[1].weight.fill_(2e38)
        loss = self.model(torch.randn(3, 4))["logits"].square().mean()
        if fault == "loss":
            loss = loss * math.inf
        if self.watch:
            self.watch.loss(loss)
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if fault == "clip":
            self.model.head.weight.grad.mul_(math.inf)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps=6, **options):
        self.watch = Watch(self.model, self.optimizer, scaler=self.scaler, **options)
        for step in range(1, steps + 1):
            with self.watch.step(step):
                self.step(step)
        return self.watch


def named(watch):
    found = watch.first_nonfinite
    return None if found is None else (found.step, found.phase, found.module)


@pytest.mark.parametrize("log_every", [1, 3, 20])
@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("forward", (4, "forward", "head")),
        ("loss", (4, "loss", None)),
        ("clip", (4, "unscale_or_clip", "head")),
        ("scale", (4, "forward", "layers.1")),
    ],
)
def test_counters_alone_name_the_exact_step_at_any_cadence(fault, place, log_every):
    watch = Loop(at_4=fault).run(every=1, log_every=log_every)
    assert named(watch) == place
    assert watch.first_nonfinite.op is None and watch.first_nonfinite.replay is None


@pytest.mark.parametrize("snapshot_every", [1, 2, 50])
@pytest.mark.parametrize(
    ("fault", "place", "op", "cause"),
    [
        ("forward", (4, "forward", ""), "aten.div", "invalid"),
        ("loss", (4, "loss", None), "aten.mul", "invalid"),
        ("clip", (4, "clip", "head"), "aten.mul_", "invalid"),
        ("scale", (4, "forward", "layers.1"), "aten.addmm", "overflow"),
    ],
)
def test_a_step_function_brings_op_and_cause_and_the_exact_place(fault, place, op, cause, snapshot_every):
    loop = Loop(at_4=fault)
    watch = loop.run(replay=loop.step, snapshot_every=snapshot_every, every=0)
    found = watch.first_nonfinite
    assert named(watch) == place and (found.op, found.cause) == (op, cause)
    assert found.replay["matched"] and found.replay["from_step"] == {1: 3, 2: 2, 50: 0}[snapshot_every]
    assert found.microbatch == (0 if found.phase in ("forward", "loss") else None)


def test_the_replay_leaves_the_run_as_it_was():
    plain, watched = Loop(at_3="clip"), Loop(at_3="clip")
    plain.run(steps=3)
    watched.run(steps=3, replay=watched.step)
    assert watched.watch.first_nonfinite.replay["matched"]
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_healthy_run_has_no_failure_and_its_headroom_is_known():
    watch = Loop().run(every=1)
    assert watch.first_nonfinite is None and watch.events == []
    rows = {(row.module, row.direction): row for row in watch.headroom()}
    assert {"embed", "layers.0", "layers.1", "head"} == {module for module, _ in rows}
    head = rows["head", "fwd"]
    assert head.bits == pytest.approx(math.log2(65504 / head.absmax)) and head.flush_frac == 0.0 and 1 <= head.step <= 6


def test_an_infinity_that_dies_out_is_no_failure():
    class Saturates(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            cube = self.inner(x).detach() * 3e38 * 1e3  # infinite
            return self.inner(x) * torch.sigmoid(cube.abs())

    model = Saturates()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer, every=1)
    with watch.step(1):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert watch.first_nonfinite is None


@pytest.mark.parametrize("implementation", ["foreach", "fused", "8bit"])
def test_an_optimizer_state_that_overflows_is_a_failure_though_the_parameters_stay_finite(implementation):
    """A thousandth of (1e21)^2 is beyond fp32, and m / inf = 0: the weights stand still from here on. 8-bit states show it in
    their scales."""
    if implementation == "8bit":
        pytest.importorskip("bitsandbytes")
    model = nn.Linear(128, 64, bias=False)
    optimizer = adamw_for(implementation, list(model.parameters()), lr=0.1, eps=1e-8, weight_decay=0.0, seed=0)
    watch = Watch(model, optimizer)
    for step in (1, 2):
        with watch.step(step):
            model(torch.ones(1, 128)).sum().mul(1e21 if step == 2 else 1.0).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = watch.first_nonfinite
    assert (found.step, found.phase, found.module, found.tensor) == (2, "optimizer", "", "exp_avg_sq")
    assert implementation == "8bit" or all(p.isfinite().all() for p in model.parameters())


class Zeroed(nn.Module):
    """Its layer gives 2 zeros, 1 value that fp16 flushes to zero and 1 that it holds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, scale):
        return self.layers[0](self.factor * scale * torch.tensor([0.0, 0.0, 2.0**-30, 1.0]))


def test_the_statistics_of_a_module_are_over_all_micro_batches_and_its_flush_share_over_nonzero_values():
    model = Zeroed()
    watch = Watch(model, every=1)
    with watch.step(1):
        for scale in (8.0, math.inf, 0.5):  # of infinity times 0 is NaN
            model(torch.tensor(scale)).nan_to_num(0.0, 0.0, 0.0).sum().backward()
    (row,) = [r for r in watch.headroom() if (r.module, r.direction) == ("layers.0", "fwd")]
    assert (row.absmax, row.nonfinite, row.step) == (8.0, 4, 1)
    assert row.flush_frac == 2 / 8  # nonzero are 2 values of three micro-batches and 2 NaN: those are not zero


@pytest.mark.parametrize(("scale", "kind"), [(math.inf, "inf"), (math.nan, "nan")])
def test_the_kind_of_a_module_s_output_is_what_prevails(scale, kind):
    """Infinity times its two zeros is NaN: as many as the infinities, so these prevail."""
    model = Zeroed()
    watch = Watch(model)
    with watch.step(1):
        watch.loss(model(torch.tensor(scale)).sum()).backward()
    found = watch.first_nonfinite
    assert (found.phase, found.module, found.kind) == ("forward", "layers.0", kind)


def test_gradients_that_fail_in_a_named_phase_are_that_phases():
    model = nn.Linear(2, 2)
    watch = Watch(model)
    with watch.step(1):
        model(torch.ones(1, 2)).sum().backward()
        with watch.phase("clip"):
            model.weight.grad.mul_(math.inf)
        with watch.phase("optimizer"), torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad)
    assert (watch.first_nonfinite.phase, watch.first_nonfinite.tensor) == ("clip", "grad")


def test_of_modules_inside_one_another_the_inner_one_is_named():
    """Backward the outer module's gradient comes first."""

    def reading(module, called):
        return TapReading(1, module, 0, "bwd", "float32", 1.0, 1, 0, None, called)

    outer, inner, later, whole = reading("h.0", 1), reading("h.0.mlp", 2), reading("h.01", 3), reading("", 0)
    assert innermost([outer, inner, later, whole]).module == "h.0.mlp"
    assert innermost([outer, later]).module == "h.0" and innermost([whole, later]).module == "h.01"
    assert innermost([whole]).module == ""


@pytest.mark.parametrize("every", [1, 0])
def test_non_finite_values_of_all_steps_are_counted_in_headroom(every):
    """With every count (``every`` 1) and where only the range is taken."""
    model = Zeroed()
    watch = Watch(model, every=every)
    for step, scale in enumerate((math.nan, 3.0, math.inf, 2.0), start=1):
        with watch.step(step):
            for micro in (scale, 1.0):
                model(torch.tensor(micro)).nan_to_num(0.0, 0.0, 0.0).sum().backward()
    (row,) = [r for r in watch.headroom() if (r.module, r.direction) == ("layers.0", "fwd")]
    assert (row.nonfinite, row.absmax, row.step) == (8, 3.0, 2)
    assert (row.flush_frac is None) == (every == 0)


def test_a_scalers_skip_is_an_event_with_its_place():
    loop = Loop(scaled=True, at_2="forward")
    watch = Watch(loop.model, loop.optimizer, scaler=loop.scaler, every=1)
    for step in range(1, 4):
        with watch.step(step):
            loop.step(step)  # the loss is not reported: only gradients show it
    assert watch.first_nonfinite is None
    (event,) = watch.events
    assert (event.step, event.kind, event.detail["phase"], event.detail["module"]) == (2, "scaler_skip", "forward", "head")
    assert event.detail["loss_scale"] == 4.0


def test_a_skip_is_explained_by_a_replay_and_training_continues_as_if_nothing_had_happened():
    plain, watched = Loop(scaled=True, at_2="forward"), Loop(scaled=True, at_2="forward")
    for step in range(1, 5):
        plain.step(step)
    watch = Watch(watched.model, watched.optimizer, scaler=watched.scaler, replay=watched.step, snapshot_every=1)
    for step in range(1, 5):
        with watch.step(step):
            watched.step(step)
    (event,) = watch.events
    first = event.detail["first_nonfinite"]
    assert (first["step"], first["phase"], first["op"], first["cause"]) == (2, "forward", "aten.div", "invalid")
    assert watch.first_nonfinite is None
    assert all(map(torch.equal, plain.model.parameters(), watched.model.parameters()))
    assert plain.scaler.get_scale() == watched.scaler.get_scale()


def test_off_leaves_no_hook_and_closing_neither():
    loop = Loop(scaled=True)
    watch = loop.run(granularity="off")
    assert watch.headroom() == []
    watch.close()
    other = Loop(scaled=True)
    other.run(every=1).close()
    for closed in (loop, other):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in closed.model.modules())
        assert not closed.optimizer._optimizer_step_pre_hooks and not closed.optimizer._optimizer_step_post_hooks
        assert "unscale_" not in vars(closed.scaler)


def test_it_raises_where_it_is_asked_to():
    loop = Loop(at_2="forward")
    with pytest.raises(NonfiniteError, match=r"step 2, forward, head: output is nan") as caught:
        loop.run(every=1, raise_on_nonfinite=True)
    assert caught.value.record.step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "op"}, "granularity is 'op'; allowed: off, block, module"),
        ({"every": -1}, "every is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"snapshot_every": 0}, "snapshot_every is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Loop().run(**options)


def test_an_unknown_phase_is_refused():
    loop = Loop()
    watch = Watch(loop.model, loop.optimizer)
    with watch.step(1), pytest.raises(ValueError, match="phase is 'clipping'"), watch.phase("clipping"):
        pass


@dataclass
class Output:
    logits: torch.Tensor
    extras: dict


def test_tensors_are_found_in_nested_outputs():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    found = list(tensors_in(Output(a, {"x": [b, (c, torch.tensor([1]), None, "word")]})))
    assert [t.numel() for t in found] == [1, 2, 3]


def test_blocks_are_the_layers_and_what_stands_beside_them():
    model = Net()
    assert list(blocks(model)) == ["embed", "layers.0", "layers.1", "head"]
    assert list(leaves(model)) == ["embed", "layers.0", "layers.1", "head"]
    shared = nn.Module()
    shared.inner = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))])
    assert list(blocks(shared)) == ["inner.0"]  # the outermost list only


def readings(taps, model, steps=1, grad=True):
    for step in range(1, steps + 1):
        taps.begin_step(step)
        with torch.set_grad_enabled(grad):
            out = model(torch.full((3, 4), 2.0))["logits"]
        if grad:
            out.sum().backward()
        taps.end_step()
    return taps.read()


def test_taps_measure_what_a_hook_by_hand_sees():
    torch.manual_seed(0)
    model = Net()
    seen = {}

    def look(name, out):
        seen[name, "fwd"] = out
        out.register_hook(lambda gradient: seen.update({(name, "bwd"): gradient}))

    for name, module in leaves(model).items():
        module.register_forward_hook(lambda m, a, out, name=name: look(name, out))
    got = readings(ModuleTaps(model, CPU, every=1), model)
    assert {(r.module, r.direction) for r in got} == set(seen)
    for r in got:
        assert r.absmax == pytest.approx(seen[r.module, r.direction].abs().max().item()) and (r.nan, r.inf) == (0, 0)


def test_leaves_are_measured_at_their_cadence_and_blocks_at_every_step():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh())])

        def forward(self, x):
            return {"logits": self.layers[0](x)}

    model = Deep()
    taps = ModuleTaps(model, CPU, every=3)
    got = readings(taps, model, steps=7)
    assert {r.step for r in got if r.module == "layers.0"} == set(range(1, 8))
    assert {r.step for r in got if r.module == "layers.0.1"} == {1, 4, 7}
    assert {r.step for r in got if r.module == "layers.0" and r.flush_frac is not None} == {1, 4, 7}
    assert taps.read() == []
    taps.close()
    assert not any(m._forward_hooks for m in model.modules())


def test_evaluation_and_what_lies_between_steps_is_not_measured():
    model = Net()
    taps = ModuleTaps(model, CPU, every=1)
    assert readings(taps, model, grad=False) == []
    model(torch.ones(1, 4))["logits"].sum().backward()
    assert taps.read() == []


def test_the_models_own_output_is_left_to_the_loss_where_asked():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    taps = ModuleTaps(model, CPU, every=1, skip_output=True)
    for step in (1, 2):
        taps.begin_step(step)
        model(torch.ones(3, 4)).sum().backward()
        taps.end_step()
    got = taps.read()
    assert {r.step for r in got if r.module == "1"} == {1} and {r.step for r in got if r.module == "0"} == {1, 2}


class Reused(nn.Module):
    """Its first layer's output is gone by the time the last one's is made, which may get the same memory."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Identity(), nn.Linear(64, 64)

    def forward(self, x):
        y = self.first(x * 1.0)
        y = y.sum() * x  # saves x and the sum, not y
        return self.last(y)


def test_a_module_whose_output_s_memory_is_used_again_is_not_taken_for_the_model_s(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 4096)  # as the allocator may do, and here always does
    model = Reused()
    taps = ModuleTaps(model, CPU, every=1, skip_output=True)
    for step in (1, 2):
        taps.begin_step(step)
        model(torch.ones(64, 64, requires_grad=True)).sum().backward()
        taps.end_step()
    monkeypatch.undo()
    got = taps.read()
    assert {r.step for r in got if r.module == "first"} == {1, 2} and {r.step for r in got if r.module == "last"} == {1}


def test_half_a_ring_is_nearly_full_and_a_read_one_empty():
    taps = ModuleTaps(Net(), CPU, every=0, kept_steps=4)
    for pending in (1, 2, 3):
        taps.begin_step(pending)
        taps.end_step()
        assert (taps.pending_steps, taps.nearly_full) == (pending, pending >= 2)
    taps.read()
    assert (taps.pending_steps, taps.nearly_full) == (0, False)


def test_more_steps_than_the_ring_keeps_lose_the_oldest_only():
    model = Net()
    got = readings(ModuleTaps(model, CPU, every=0, kept_steps=4), model, steps=10)
    assert {r.step for r in got} == {7, 8, 9, 10}
