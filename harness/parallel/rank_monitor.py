"""A thread in every rank that tells the others how it is, and notices what becomes of them.

Through a connection of its own to torchrun's key-value store, so that it works while the thread that trains is stuck
in a collective, which on a GPU nothing can interrupt. A rank leaves its *last words* when it fails; that a process is
gone is seen at once on the same machine, and elsewhere when its beats stop. Where nobody gets on for ``timeout_s``
the run hangs, and the sentence says where every rank is.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import DistError, Store

from harness.exit_codes import RUN_FAILED
from harness.parallel.context import RankFailed
from harness.parallel.ranks import Ranks
from harness.supervisor.failure import Failure
from instrument.results.claims import this_boot

PERIOD_S = 0.5
GRACE_S = 10.0
"""How long the thread that trains has to notice by itself that another rank is gone (gloo does at once)."""
STALE_S = 60.0
"""A rank on another machine that has not beaten for so long is dead."""
LIBRARIES = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])
INSTALLED = os.path.join(sysconfig.get_paths()["purelib"], "ddbench", "")


class RankMonitor:
    """Beats, last words, and the eye on the other ranks."""

    def __init__(self, ranks: Ranks, store: Store, timeout_s: float) -> None:
        self.ranks, self.timeout_s = ranks, timeout_s
        self._patience_s = timeout_s if ranks.is_first else timeout_s + 3 * GRACE_S  # rank 0 writes the row first
        self._store = store
        self._me = psutil.Process()
        self._main = threading.main_thread().ident
        self._moves, self._moved_s = 0, time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {}  # rank -> its last beat's number, when it was new
        self._beat_number = 0
        self._if_lost: Callable[[RankFailed], None] | None = None
        self._ending = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="ddb-watchman", daemon=True)
        self._thread.start()

    def moved(self) -> None:
        """This rank got on."""
        self._moves += 1

    def say(self, status: str, sentence: str, trace: str, flags: dict[str, Any] | None = None) -> None:
        """This rank's last words."""
        self._set(f"words/{self.ranks.rank}", {"status": status, "sentence": sentence, "traceback": trace, "flags": flags})

    def rank_0_is_ready(self) -> None:
        self._set("ready", {})

    def wait_for_rank_0(self) -> None:
        """Until rank 0 says so; raises `RankFailed` when it never will."""
        while self._get("ready") is None:
            if (failed := self._failed()) is not None:
                raise failed
            time.sleep(PERIOD_S / 5)

    @contextmanager
    def watching(self, if_lost: Callable[[RankFailed], None]) -> Iterator[None]:
        """Act on what becomes of the others: when the thread that trains does not within `GRACE_S`, ``if_lost`` is
        called, and the process ends."""
        self._moved_s, self._if_lost = time.monotonic(), if_lost
        try:
            yield
        finally:
            self._if_lost = None

    def who_failed(self, error: BaseException) -> RankFailed:
        """The rank behind a connection's error; waits a little for its last words."""
        until_s = time.monotonic() + GRACE_S
        while (failed := self._failed()) is None and time.monotonic() < until_s:
            time.sleep(PERIOD_S / 5)
        return failed or RankFailed(
            None,
            "error",
            f"the connection to another rank broke, and all seem to be alive ({self._places()}): {str(error).splitlines()[0]}",
        )

    def stop(self) -> None:
        """End the thread. An interpreter that ends while it talks to the store aborts the process."""
        self._ending.set()
        self._thread.join(timeout=GRACE_S)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        lost_since_s, moves = None, -1
        while not self._ending.wait(PERIOD_S):
            try:
                self._beat()
                failed = self._failed()
                if self._moves != moves:
                    moves, self._moved_s = self._moves, time.monotonic()
                now_s = time.monotonic()
                if failed is None and self._if_lost and now_s - self._moved_s > self._patience_s:
                    failed, lost_since_s = self._hung(), float("-inf")
                lost_since_s = None if failed is None else now_s if lost_since_s is None else lost_since_s
                if failed is not None and now_s - lost_since_s > GRACE_S and (act := self._if_lost) is not None:
                    self._end(failed, act)
            except DistError:  # the store is gone, and torchrun with it
                return

    def _end(self, failed: RankFailed, act: Callable[[RankFailed], None]) -> None:
        try:
            act(failed)
            if self.ranks.is_first:
                os.write(2, f"\nharness: {failed.status}: {failed}\n".encode())
        finally:
            os._exit(RUN_FAILED)

    def _beat(self) -> None:
        self._beat_number += 1
        self._set(
            f"beat/{self.ranks.rank}",
            {
                "pid": self._me.pid,
                "began": self._me.create_time(),
                "where": pid_namespace(),
                "number": self._beat_number,
                "place": place_of(self._main),
            },
        )

    def _failed(self) -> RankFailed | None:
        """The first rank that has left its last words, or else is dead."""
        others = [rank for rank in range(self.ranks.world) if rank != self.ranks.rank]
        for rank in others:
            if (words := self._get(f"words/{rank}")) is not None:
                return RankFailed(
                    rank, words["status"], f"rank {rank}: {words['sentence']}", words["traceback"], words["flags"]
                )
        for rank in others:
            beat = self._get(f"beat/{rank}")
            if beat is not None and self._is_dead(rank, beat):
                return RankFailed.of(
                    Failure("killed", f"rank {rank} (process {beat['pid']}) died without a word, last seen at {beat['place']}"),
                    rank,
                )
        return None

    def _is_dead(self, rank: int, beat: dict[str, Any]) -> bool:
        if beat["where"] == pid_namespace():
            try:
                process = psutil.Process(beat["pid"])
                return process.create_time() != beat["began"] or process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True
        number, since_s = self._beats.get(rank, (-1, 0.0))
        if beat["number"] != number:
            self._beats[rank] = beat["number"], time.monotonic()
            return False
        return time.monotonic() - since_s > STALE_S

    def _hung(self) -> RankFailed:
        return RankFailed.of(
            Failure("hung", f"no rank has got on for {self.timeout_s:g} s: {self._places()}", {"hang_after_s": self.timeout_s})
        )

    def _places(self) -> str:
        beats = {rank: self._get(f"beat/{rank}") for rank in range(self.ranks.world)}
        return ", ".join(f"rank {rank} is at {beat['place']}" for rank, beat in beats.items() if beat is not None)

    def _set(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def pid_namespace() -> str:
    """One kernel, and in it one container: elsewhere the same number is another process."""
    with suppress(OSError):
        return f"{this_boot()} {os.readlink('/proc/self/ns/pid')}"
    return this_boot()


def place_of(thread: int | None) -> str:
    """``file:line in function`` where a thread is, the innermost that is no library's."""
    frame = sys._current_frames().get(thread)
    innermost = frame
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_library(file: str) -> bool:
    """Python's own, an installed package's but this program's, or this package's: it watches the others."""
    return file.startswith(str(Path(__file__).parent)) or (file.startswith(LIBRARIES) and not file.startswith(INSTALLED))
