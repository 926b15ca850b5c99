"""Finds ranks that hang: every rank tells the others now and then that it lives, and where it is.

    each rank ── beat ──> the ranks' store ── all beats ──> rank 0, which judges ── verdict ──> each rank
                                  └──────── rank 0's beat ────────────────────────────────────> each rank

Rank 0 may be the one that is stopped; its store, which then answers no more, is stopped with it. So each rank judges
rank 0. Whoever learns of a hang logs the stacks of all its threads and ends its process: what started the ranks then
ends the one that cannot, and starts all again.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

import torch.distributed as dist

from megatron_vl.device.processes import RankEnvironment
from megatron_vl.device.trail import TRAIL
from megatron_vl.train.watch import LEFT, Beat, Watch

EXIT_STATUS = 1
LAST_WORDS_SECONDS = 30.0  # for stacks and logs, on whatever file system
_VERDICT = "verdict"


class Heartbeat:
    """This rank's beat, and its share of watching. Use as a context manager, once the ranks have met.

    `hang_seconds` (0: nobody beats or watches) pass without a sign before a rank is given up. `log` gets the verdict,
    on one rank.
    """

    def __init__(self, environment: RankEnvironment, hang_seconds: float, log: Callable[[str], None]) -> None:
        self._environment, self._rank = environment, environment.rank
        self._hang_seconds, self._log = hang_seconds, log
        # The store answers each of the ranks twice in this time: some hundreds a second, of some 20 microseconds.
        self._interval = min(1.0 + environment.world_size / 1000, hang_seconds / 5)
        self._watch, self._lock = Watch(hang_seconds), threading.Lock()
        self._verdict = ""
        self._leaving = threading.Event()
        self._number = 0
        self._exchange = threading.Thread(target=self._exchange_beats, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._hang_seconds > 0:
            self._store = self._connect()
            self._exchange.start()
            threading.Thread(target=self._judge, name="heartbeat watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving.set()
        if self._hang_seconds > 0:
            self._exchange.join(self._interval)  # it may be stuck: rank 0 may be the one that hangs
            faulthandler.cancel_dump_traceback_later()

    def _connect(self) -> dist.PrefixStore:
        """A connection of its own: what waits in the other one must not hold it up."""
        client = dist.TCPStore(
            self._environment.master_addr,
            self._environment.master_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._hang_seconds),
        )
        # torchrun's store outlives its ranks: beats and verdicts of those before must not be taken for ours.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"megatron_vl/heartbeat/{start}", client)
        store.set(_key(self._rank), self._beat().to_json())
        if self._rank == 0:
            store.set(_VERDICT, "")
        return store

    def _beat(self, phase: str | None = None) -> Beat:
        self._number += 1
        beat = Beat.of(TRAIL, socket.gethostname(), os.getpid(), self._number)
        return beat if phase is None else Beat(**{**vars(beat), "phase": phase})

    def _exchange_beats(self) -> None:
        ranks = range(self._environment.world_size) if self._rank == 0 else range(1)
        keys = [_VERDICT, *(_key(rank) for rank in ranks)]
        while not self._leaving.wait(self._interval):
            with contextlib.suppress(dist.DistError):  # rank 0 does not answer: the watch misses its beats
                self._store.set(_key(self._rank), self._beat().to_json())
                if self._rank == 0:
                    self._store.set(_VERDICT, self._verdict)
                verdict, *beats = self._store.multi_get(keys)
                now = time.monotonic()
                with self._lock:
                    self._verdict = self._verdict or verdict.decode()
                    for rank, beat in zip(ranks, beats, strict=True):
                        self._watch.hear(rank, Beat.from_json(beat), now)
        with contextlib.suppress(dist.DistError):  # rank 0 has ended first
            self._store.set(_key(self._rank), self._beat(LEFT).to_json())

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._leaving.wait(self._interval):
            # A thread of C writes the stacks where this process hangs and lets no other thread of Python run.
            faulthandler.dump_traceback_later(0.8 * self._hang_seconds, file=sys.stderr)
            now = time.monotonic()
            with self._lock:
                if now - before > self._hang_seconds / 2:
                    self._watch.forgive(now)
                self._watch.hear(self._rank, self._beat(), now)
                told = self._verdict
                self._verdict = told or self._watch.silence(now) or ""
                if self._rank == 0 and not self._verdict:  # it alone knows where all are
                    self._verdict = self._watch.standstill(now) or ""
            before = now
            if self._verdict:
                self._end(judged_here=not told)

    def _end(self, judged_here: bool) -> None:
        # By the kernel, if a file system hangs that any of this is written to.
        signal.setitimer(signal.ITIMER_REAL, 3 * self._interval + LAST_WORDS_SECONDS)
        faulthandler.dump_traceback(file=sys.stderr)
        print(f"error: {self._verdict}", file=sys.stderr, flush=True)
        if judged_here and self._rank <= 1:  # where rank 0 is silent, all others judge: the next one logs
            with contextlib.suppress(OSError):  # a full disk, say; the verdict stands on the screen
                self._log(self._verdict)
        if self._rank == 0:
            # Until all have read the verdict, in the store that ends with this process.
            time.sleep(3 * self._interval)
        os._exit(EXIT_STATUS)


def _key(rank: int) -> str:
    return f"beat/{rank}"
