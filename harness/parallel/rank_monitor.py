"""A thread in every rank that publishes heartbeats, notices a rank that failed, is gone or hangs, and names it in the row.

torchrun ends all ranks when one fails, and names it in its summary from the error file that `report` writes. It does so on its
own standard error and when all are gone; the row is rank 0's to write before that, also while its main thread is stuck in a
collective, which on a GPU nothing can interrupt. Error files are one machine's, exit codes are the launcher's alone, and a hang
is neither. Hence this thread, with a connection of its own to torchrun's key-value store.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import DistError, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from harness.exit_codes import RUN_FAILED
from harness.failure import Failure
from harness.parallel.context import RankFailed
from harness.parallel.ranks import Ranks
from instrument.results.claims import pid_namespace

PERIOD_S = 0.5
GRACE_S = 10.0
"""How long the thread that trains has to notice by itself that another rank is gone (gloo does at once)."""
STALE_S = 60.0
"""A rank on another machine that has sent no heartbeat for so long is gone."""
LIBRARIES = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])
INSTALLED = os.path.join(sysconfig.get_paths()["purelib"], "ddbench", "")


class RankMonitor:
    """Publishes heartbeats and monitors the other ranks. ``timeout_s``: how long no rank may make progress."""

    def __init__(self, ranks: Ranks, store: Store, timeout_s: float) -> None:
        self.ranks, self.timeout_s = ranks, timeout_s
        self._patience_s = timeout_s if ranks.is_first else timeout_s + 3 * GRACE_S  # rank 0 writes the row first
        self._store = store
        self._me = psutil.Process()
        self._main = threading.main_thread().ident
        self._progress, self._progressed_s = 0, time.monotonic()
        self._heartbeats: dict[int, tuple[int, float]] = {}
        """Of ranks on other machines: the last heartbeat's number, and when it was new."""
        self._number = 0
        self._write_row: Callable[[RankFailed], None] | None = None
        self._stopping = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="ddb-rank-monitor", daemon=True)
        self._thread.start()

    def progressed(self) -> None:
        """This rank has got to another micro-batch."""
        self._progress += 1

    def report(self, error: BaseException, failure: Failure | None) -> None:
        """This rank fails: tell the other ranks, and the launcher. ``failure`` is None for an interruption."""
        if failure is not None:
            get_error_handler().record_exception(error)  # the file at TORCHELASTIC_ERROR_FILE, as `@record` would
        message = {
            "status": failure.status if failure else "preempted",
            "sentence": failure.error if failure else "interrupted",
            "traceback": "".join(traceback.format_exception(error)),
            "flags": failure.flags if failure else {},
        }
        self._set(f"failure/{self.ranks.rank}", message)

    def rank_0_is_ready(self) -> None:
        self._set("ready", {})

    def wait_for_rank_0(self) -> None:
        """Until rank 0 is ready; raises `RankFailed` when it never will be."""
        while self._get("ready") is None:
            if (failed := self._failed()) is not None:
                raise failed
            time.sleep(PERIOD_S / 5)

    @contextmanager
    def watching(self, write_row: Callable[[RankFailed], None]) -> Iterator[None]:
        """Act on the others' failures: when the thread that trains does not within `GRACE_S`, ``write_row`` is called, and the
        process ends."""
        self._progressed_s, self._write_row = time.monotonic(), write_row
        try:
            yield
        finally:
            self._write_row = None

    def failed_rank(self, error: BaseException) -> RankFailed:
        """The rank that caused a connection's error; waits a little for its report."""
        until_s = time.monotonic() + GRACE_S
        while (failed := self._failed()) is None and time.monotonic() < until_s:
            time.sleep(PERIOD_S / 5)
        alive = f"the connection to another rank broke, and all seem to be alive ({self._places()})"
        return failed or RankFailed(None, "error", f"{alive}: {str(error).splitlines()[0]}")

    def stop(self) -> None:
        """End the thread. An interpreter that ends while it talks to the store aborts the process."""
        self._stopping.set()
        self._thread.join(timeout=GRACE_S)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        failed_since_s, progress = None, -1
        while not self._stopping.wait(PERIOD_S):
            try:
                self._publish()
                failed, now_s = self._failed(), time.monotonic()
                if self._progress != progress:
                    progress, self._progressed_s = self._progress, now_s
                if failed is None and self._write_row and now_s - self._progressed_s > self._patience_s:
                    error = f"no rank has made progress for {self.timeout_s:g} s: {self._places()}"
                    failed = RankFailed.of(Failure("hung", error, {"hang_after_s": self.timeout_s}))
                    failed_since_s = float("-inf")
                failed_since_s = None if failed is None else now_s if failed_since_s is None else failed_since_s
                if failed is not None and now_s - failed_since_s > GRACE_S and (write_row := self._write_row) is not None:
                    self._end(failed, write_row)
            except DistError:  # the store is gone, and torchrun with it
                return

    def _end(self, failed: RankFailed, write_row: Callable[[RankFailed], None]) -> None:
        try:
            write_row(failed)
            if self.ranks.is_first:
                os.write(2, f"\nharness: {failed.status}: {failed}\n".encode())
        finally:
            os._exit(RUN_FAILED)

    def _publish(self) -> None:
        self._number += 1
        heartbeat = {"pid": self._me.pid, "began": self._me.create_time(), "where": pid_namespace(), "number": self._number}
        self._set(f"heartbeat/{self.ranks.rank}", heartbeat | {"place": place_of(self._main)})

    def _failed(self) -> RankFailed | None:
        """The first other rank that has reported its failure, or else is gone."""
        others = [rank for rank in range(self.ranks.world) if rank != self.ranks.rank]
        for rank in others:
            if (reported := self._get(f"failure/{rank}")) is not None:
                sentence = f"rank {rank}: {reported['sentence']}"
                return RankFailed(rank, reported["status"], sentence, reported["traceback"], reported["flags"])
        for rank in others:
            heartbeat = self._get(f"heartbeat/{rank}")
            if heartbeat is not None and self._is_gone(rank, heartbeat):
                end = f"ended without reporting an error, last seen at {heartbeat['place']}"
                return RankFailed.of(Failure("killed", f"rank {rank} (process {heartbeat['pid']}) {end}"), rank)
        return None

    def _is_gone(self, rank: int, heartbeat: dict[str, Any]) -> bool:
        """Seen at once on the same machine, and elsewhere when its heartbeats stop."""
        if heartbeat["where"] == pid_namespace():
            try:
                process = psutil.Process(heartbeat["pid"])
                return process.create_time() != heartbeat["began"] or process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True
        number, since_s = self._heartbeats.get(rank, (-1, 0.0))
        if heartbeat["number"] != number:
            self._heartbeats[rank] = heartbeat["number"], time.monotonic()
            return False
        return time.monotonic() - since_s > STALE_S

    def _places(self) -> str:
        heartbeats = {rank: self._get(f"heartbeat/{rank}") for rank in range(self.ranks.world)}
        return ", ".join(f"rank {rank} is at {one['place']}" for rank, one in heartbeats.items() if one is not None)

    def _set(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def place_of(thread: int | None) -> str:
    """``file:line in function`` where a thread is, the innermost that is no library's."""
    innermost = frame = sys._current_frames().get(thread)
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if (frame := frame or innermost) is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_library(file: str) -> bool:
    """Python's own, an installed package's but this program's, or this package's: it monitors the others."""
    return file.startswith(str(Path(__file__).parent)) or (file.startswith(LIBRARIES) and not file.startswith(INSTALLED))
