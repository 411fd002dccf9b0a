"""A team of several ranks: the process group, and who is told when one of them fails.

The wish to stop, of several ranks: heard by any, heeded by all behind the same step.
"""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from harness.parallel.context import DistributedContext, RankFailed
from harness.parallel.rank_monitor import RankMonitor
from harness.parallel.ranks import Ranks
from harness.precision import Unsupported
from harness.run.signals import Item, Stop, Stopped
from harness.settings import SettingsError
from harness.supervisor.failure import failure_of

TEAMS = itertools.count()
"""Of this process, one after the other."""
FOR_EVER_S = 30 * 86400.0
"""What stands for it where a library wants a number."""
ALIKE_ON_ALL = (Unsupported, Stopped)
"""What every rank raises by itself."""
OF_THE_CONNECTION = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


class ProcessGroupContext(DistributedContext):
    """One of several ranks; made by `joined`."""

    def __init__(self, ranks: Ranks, talk: dist.ProcessGroup | None, watchman: RankMonitor) -> None:
        self.ranks, self._talk, self.watchman = ranks, talk, watchman
        self.torn = False
        """A rank has failed: what is left of the group must not be talked to."""

    def gather(self, mine):
        told = [None] * self.ranks.world
        dist.all_gather_object(told, mine, group=self._talk)
        return told

    def broadcast(self, mine, source=0):
        box = [mine]
        dist.broadcast_object_list(box, src=source, group=self._talk, device=torch.device("cpu"))
        return box[0]

    def moved(self) -> None:
        self.watchman.moved()

    def in_turn(self, make):
        if not self.ranks.is_first:
            self.watchman.wait_for_rank_0()
            return make()
        made = make()
        self.watchman.rank_0_is_ready()
        return made

    @contextmanager
    def telling(self, if_lost: Callable[[RankFailed], None]) -> Iterator[None]:
        try:
            with self.watchman.watching(if_lost):
                yield
        except ALIKE_ON_ALL:
            raise
        except BaseException as error:
            self.torn = True
            if not is_about_others(error):
                self.tell(error)
                raise
            raise self.watchman.who_failed(error) from error

    def tell(self, error: BaseException) -> None:
        """Let the others know why this rank ends."""
        if isinstance(error, RankFailed):
            return
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, KeyboardInterrupt):
            self.watchman.say("preempted", "interrupted", trace)
            return
        death = failure_of(error)
        self.watchman.say(death.status, death.error, trace, death.flags)


def is_about_others(error: BaseException) -> bool:
    """Whether an error is a broken or silent connection to another rank."""
    words = str(error).lower()
    return isinstance(error, (dist.DistError, RuntimeError)) and any(word in words for word in OF_THE_CONNECTION)


@contextmanager
def joined(ranks: Ranks, device: torch.device, hang_after_s: float) -> Iterator[ProcessGroupContext]:
    """The team of this process' run, its process group made and taken down. On CUDA every rank has the GPU of its
    local rank. ``hang_after_s``: how long all ranks may be in a micro-batch before the run counts as hung; 0: for ever.
    Raises `SettingsError` where there are fewer GPUs, or the others cannot be reached."""
    cuda = device.type == "cuda"
    if cuda:
        if ranks.local_world > torch.cuda.device_count():
            raise SettingsError(
                f"torchrun started {ranks.local_world} processes on this machine, and torch sees "
                f"{torch.cuda.device_count()} GPUs; give --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(ranks.local_rank)
    timeout_s = hang_after_s or FOR_EVER_S
    longest = timedelta(seconds=2 * timeout_s)  # the watchman comes first, and says more
    number = next(TEAMS)
    try:
        store = connected(ranks, f"{number}/group")
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=longest
        )
        talk = dist.new_group(backend="gloo", timeout=longest) if cuda else None
        watchman = RankMonitor(ranks, connected(ranks, f"{number}/watch", is_open=True), timeout_s)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise SettingsError(
            f"rank {ranks.rank} cannot meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error
    team = ProcessGroupContext(ranks, talk, watchman)
    try:
        yield team
    except BaseException as error:
        team.torn = True
        if is_about_others(error):
            raise watchman.who_failed(error) from error
        team.tell(error)
        raise
    finally:
        watchman.stop()
        if not team.torn:
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


class StopTogether(Stop):
    """As `Stop`, but asked about at the log points only, where the ranks meet: ``requested`` stays None, so that no
    rank leaves its step at another place than the others."""

    def __init__(self, team: DistributedContext) -> None:
        super().__init__()
        self._team = team
        self._heard_here: str | None = None

    @property
    def heard(self) -> str | None:
        return self._heard_here

    def request(self, who: str) -> None:
        self._heard_here = self._heard_here or who

    def check(self) -> None:
        """Raise `Stopped` on every rank when any was asked to; all must call it."""
        heard = next((who for who in self._team.gather(self._heard_here) if who), None)
        if heard is not None:
            raise Stopped(heard)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``: an evaluation is finished first."""
        yield from items
