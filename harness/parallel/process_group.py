"""The ranks of a run that `torchrun` started: the process group that they train and exchange objects in, and how an error of
one of them reaches the others."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from harness.failure import failure_of
from harness.parallel.context import DistributedContext, RankFailed
from harness.parallel.rank_monitor import RankMonitor
from harness.parallel.ranks import Ranks
from harness.settings import SettingsError

GROUPS = itertools.count()
"""Of this process, one after the other."""
FOREVER_S = 30 * 86400.0
"""What stands for it where a library wants a number."""
CONNECTION_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
"""In the message of a broken or silent connection to another rank."""


class ProcessGroupContext(DistributedContext):
    """One of several ranks; made by `joined`. ``objects``: the group that exchanges objects; None for the default one."""

    def __init__(self, ranks: Ranks, objects: dist.ProcessGroup | None, monitor: RankMonitor) -> None:
        self.ranks, self._objects, self.monitor = ranks, objects, monitor
        self.broken = False
        """A rank has failed: nothing may be sent to what is left of the group."""

    def gather(self, mine):
        gathered = [None] * self.ranks.world
        dist.all_gather_object(gathered, mine, group=self._objects)
        return gathered

    def broadcast(self, mine, source=0):
        box = [mine]
        dist.broadcast_object_list(box, src=source, group=self._objects, device=torch.device("cpu"))
        return box[0]

    def progressed(self) -> None:
        self.monitor.progressed()

    def in_turn(self, make):
        if not self.ranks.is_first:
            self.monitor.wait_for_rank_0()
            return make()
        made = make()
        self.monitor.rank_0_is_ready()
        return made

    @contextmanager
    def reporting_failures(self, write_row, describe):
        try:
            with self.monitor.watching(write_row):
                yield
        except BaseException as error:
            self._raise_for_all(error, describe)

    def _raise_for_all(self, error: BaseException, describe=failure_of):
        """Report this rank's error to the others, or raise the `RankFailed` of the rank that broke the connection."""
        self.broken = True
        message = str(error).lower()
        if isinstance(error, (dist.DistError, RuntimeError)) and any(words in message for words in CONNECTION_ERRORS):
            raise self.monitor.failed_rank(error) from error
        if not isinstance(error, RankFailed):
            self.monitor.report(error, None if isinstance(error, KeyboardInterrupt) else describe(error))
        raise error


@contextmanager
def joined(ranks: Ranks, device: torch.device, hang_after_s: float) -> Iterator[ProcessGroupContext]:
    """The context of this process' run; its process group is made, and destroyed at the end. On CUDA every rank has the GPU of
    its local rank. ``hang_after_s``: how long all ranks may be in a micro-batch before the run counts as hung; 0: for ever.
    Raises `SettingsError` where there are fewer GPUs, or the others cannot be reached."""
    cuda = device.type == "cuda"
    if cuda:
        if ranks.local_world > (gpus := torch.cuda.device_count()):
            started = f"torchrun started {ranks.local_world} processes on this machine"
            raise SettingsError(f"{started}, and torch sees {gpus} GPUs; give --nproc-per-node {gpus}")
        torch.cuda.set_device(ranks.local_rank)
    timeout_s = hang_after_s or FOREVER_S
    longest = timedelta(seconds=2 * timeout_s)  # the monitor comes first, and says more
    number = next(GROUPS)
    try:
        store = connected(ranks, f"{number}/group")
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=longest
        )
        objects = dist.new_group(backend="gloo", timeout=longest) if cuda else None
        monitor = RankMonitor(ranks, connected(ranks, f"{number}/monitor", is_open=True), timeout_s)
    except (dist.DistError, RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = f"rank {ranks.rank} cannot meet the others at {place}: {str(error).splitlines()[0]}"
        raise SettingsError(why) from error
    context = ProcessGroupContext(ranks, objects, monitor)
    try:
        yield context
    except BaseException as error:
        context._raise_for_all(error)
    finally:
        monitor.stop()
        if not context.broken:
            dist.destroy_process_group()


def connected(ranks: Ranks, prefix: str, *, is_open: bool = False) -> dist.Store:
    """A connection to the key-value store at ``MASTER_ADDR``: torchrun's own, or else the one that rank 0 opens,
    unless it ``is_open`` already. A restarted run and a process' next one find no keys of those before."""
    is_open = is_open or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks.world,
        is_master=ranks.is_first and not is_open,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"ddb/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{prefix}", store)
