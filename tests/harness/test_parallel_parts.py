"""The parts of a run on several ranks that need no second process."""

import json
import threading
import time

import pytest
import torch
from torch.distributed import HashStore

from harness.failure import failure_of
from harness.parallel.context import DistributedContext, RanksDiffer, facts_of_all, largest_peaks
from harness.parallel.failure_location import first_of_all, of_this_rank
from harness.parallel.rank_monitor import RankMonitor, place_of
from harness.parallel.ranks import Ranks
from harness.parallel.strategy import ParallelStrategy, takes_part
from harness.run.outcome import Outcome
from harness.run.signals import Stopped, StopTogether
from instrument.replay.ops import SUM_OVER_RANKS
from instrument.results.schemas import FirstNonfinite


class Scripted(DistributedContext):
    """A rank whose others say what the test makes them say."""

    def __init__(self, rank, *others):
        self.ranks, self.others = Ranks(rank, len(others) + 1, rank, len(others) + 1), others

    def gather(self, mine):
        values = list(self.others)
        values.insert(self.ranks.rank, mine)
        return values


def found(phase, microbatch, op="aten.mul"):
    first = FirstNonfinite.surfaced(3, phase, "output", "inf", module="m", microbatch=microbatch)
    return type(first)(**{name: getattr(first, name) for name in first.__struct_fields__} | {"op": op})


def test_a_finding_gets_its_rank_and_its_place_in_the_whole_step():
    mine = of_this_rank(found("forward", 1), ParallelStrategy(Scripted(2, None, None, None)), 8)
    assert (mine.rank, mine.microbatch) == (2, 5)
    assert of_this_rank(found("optimizer", None), ParallelStrategy(Scripted(1, None)), 4).microbatch is None
    summed = of_this_rank(found("backward", 1, SUM_OVER_RANKS), ParallelStrategy(Scripted(1, None)), 4)
    assert (summed.rank, summed.microbatch) == (None, None)
    assert of_this_rank(mine, ParallelStrategy(), 4) is mine


@pytest.mark.parametrize(
    ("findings", "winner"),
    [
        ([None, found("forward", 3)], 1),
        ([found("backward", 0), found("forward", 3)], 0),  # one process goes backward before its next micro-batch
        ([found("backward", 2), found("loss", 2)], 1),
        ([found("backward", 1), found("backward", 2)], 0),
        ([found("backward", 1, SUM_OVER_RANKS), found("backward", 2)], 1),
        ([found("backward", None, SUM_OVER_RANKS), found("optimizer", None)], 1),
        ([found("forward", 4), found("loss", 2)], 1),
        ([found("optimizer", None), found("optimizer", None)], 0),
    ],
)
def test_the_earliest_producer_is_the_one_that_one_process_would_blame(findings, winner):
    rank, first = first_of_all(ParallelStrategy(Scripted(0, *findings[1:])), findings[0])
    assert rank == winner and first.op == findings[winner].op and winner in first.replay["ranks"]


def test_nothing_found_anywhere_is_nothing():
    assert first_of_all(ParallelStrategy(Scripted(0, None)), None) is None


def test_ranks_that_must_be_alike_and_are_not_are_named():
    assert Scripted(0, "abc").same("weights", "abc") == "abc"
    with pytest.raises(RanksDiffer, match=r"weights of rank 1 are not those of rank 0 \(def and abc\)"):
        Scripted(0, "def").same("weights", "abc")


def test_what_was_dealt_comes_back_in_order():
    items = list("abcde")
    hands = [[item for mine, item in Scripted(rank, None).dealt(items) if mine] for rank in (0, 1)]
    assert hands == [["a", "c", "e"], ["b", "d"]]
    assert Scripted(0, hands[1]).collected(hands[0]) == items == Scripted(1, hands[0]).collected(hands[1])


def test_micro_batches_are_dealt_in_blocks():
    assert [list(ParallelStrategy(Scripted(rank, None)).of(range(6))) for rank in (0, 1)] == [[0, 1, 2], [3, 4, 5]]


def test_a_stop_requested_on_any_rank_stops_all():
    quiet = StopTogether(Scripted(0, None))
    quiet.check()
    asked = StopTogether(Scripted(1, None))
    asked.request("SIGTERM")
    assert asked.requested is None and asked.requested_here == "SIGTERM"  # nobody leaves a step in the middle
    with pytest.raises(Stopped, match="SIGTERM"):
        asked.check()
    with pytest.raises(Stopped, match="SIGINT"):
        StopTogether(Scripted(0, "SIGINT")).check()


def test_energy_adds_up_over_gpus_and_memory_does_not():
    mine, other = {"energy_j": 10.0, "peak_device_bytes": 7}, {"energy_j": 5.0, "peak_device_bytes": 9}
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert facts_of_all(Scripted(0, other), mine, cuda) == {"energy_j": 15.0, "peak_device_bytes": 9}
    assert facts_of_all(Scripted(0, other), mine, cpu)["energy_j"] == 10.0  # the same counter, read twice
    assert facts_of_all(Scripted(0, {**other, "energy_j": None}), mine, cuda)["energy_j"] is None
    ranks = [{"peak_allocated_bytes": 3, "peak_rss_bytes": 5}, {"peak_allocated_bytes": 4, "peak_rss_bytes": 2}]
    assert largest_peaks({"ranks": ranks}) == {"peak_allocated_bytes": 4, "peak_rss_bytes": 5} and largest_peaks({}) == {}


def test_a_parameter_that_takes_no_part_is_found():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    assert takes_part(model, model["used"](torch.ones(1, 2))) == {"used.weight", "used.bias"}


def test_a_reported_failure_and_a_silent_end_are_distinguished(tmp_path, monkeypatch):
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    store = HashStore()
    mine, other = RankMonitor(Ranks(0, 2, 0, 2), store, 60.0), RankMonitor(Ranks(1, 2, 1, 2), store, 60.0)
    try:
        assert mine._failed() is None
        other.stop()
        heartbeat = mine._get("heartbeat/1")
        mine._set("heartbeat/1", {**heartbeat, "began": heartbeat["began"] - 100})  # the process id is another's by now
        silent = mine._failed()
        assert "rank 1 (process " in str(silent) and silent.status == "error"
        assert silent.flags == {"death": {"cause": "killed", "goes_on": True}}  # as a single process that was killed
        error = torch.OutOfMemoryError("too much")
        other.report(error, failure_of(error))
        failed = mine.failed_rank(RuntimeError("gloo: connection closed by peer"))
        assert (failed.rank, failed.status, str(failed)) == (1, "oom", "rank 1: OutOfMemoryError: too much")
        assert "OutOfMemoryError: too much" in failed.traceback
        launchers = json.loads(error_file.read_text())["message"]  # what torchrun's summary is made of
        assert launchers["message"] == "OutOfMemoryError: too much"
        row = Outcome().failed_with(failed)
        assert row.flags["death"]["cause"] == "cuda_oom" and row.flags["failed_rank"] == 1
    finally:
        mine.stop()


def test_stopping_waits_for_a_monitor_whose_store_is_slow(monkeypatch):
    class Slow:
        store, entered = HashStore(), threading.Semaphore(0)

        def set(self, key, value):
            self.entered.release()
            time.sleep(0.5)
            self.store.set(key, value)

        def check(self, keys):
            return self.store.check(keys)

    monkeypatch.setattr("harness.parallel.rank_monitor.PERIOD_S", 0.01)
    slow = Slow()
    monitor = RankMonitor(Ranks(), slow, 60.0)
    for _ in range(2):  # by the constructor, and by the thread: now that is in the store
        assert slow.entered.acquire(timeout=60)
    monitor.stop()
    assert not monitor._thread.is_alive()


def test_a_thread_is_seen_where_it_is():
    assert place_of(threading.main_thread().ident).startswith("test_parallel_parts.py:")
    assert place_of(-5) == "its end"
