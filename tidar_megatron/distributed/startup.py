"""Detect ranks that are missing, hang or fail between the start of the program and the first step.

A rank that dies or fails while the others wait for it (to join, to make process groups, to load a checkpoint) leaves
them in gloo, which names no rank and waits for minutes. So each rank joins the job's store first, and a thread writes a
heartbeat into it every second, with what the rank is doing. Rank 0 watches the others; they watch rank 0. The first
rank that learns of a failure writes it into the store: its own failure, a rank that is silent, or one that never
joined. All others read it within a second, print it in one line and exit.

Once training has begun, the heartbeat of the steps (``heartbeat.py``) takes over.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from tidar_megatron.distributed.heartbeat import failed_collective
from tidar_megatron.errors import LocalError, Stalled, UserError

BEAT = 1.0  # seconds between two heartbeats
SILENT = 120.0  # seconds without a heartbeat after which a rank counts as dead; reading files can delay its thread
HELD_UP = 15.0  # seconds between two rounds from which a rank infers that it was suspended itself
GRACE = 5.0  # as SILENT, once a collective has failed on some rank
ALIKE = 10.0  # seconds that a rank's UserError waits for rank 0's: most of these errors occur on every rank

VERDICT, FAILED, ALL_HERE = "verdict", "a collective failed", "all are here"  # keys of the store
DONE = "training"
LONGER = "--distributed-timeout-minutes gives more time"


class Startup:
    """The startup of one rank, as a context manager that reports its exception to the other ranks.

    Only its thread talks to the store, so that a store that hangs blocks nobody.

    Args:
        store: The job's store; None in a job of one rank, which has no other rank to watch.
        rank: The rank of this process.
        world_size: The number of ranks in the job.
        patience: Seconds to wait for a rank that has not joined.
        keeps_store: Whether this process hosts the store; it then stays until the others have read a failure.
        end: A function that is called when another rank has failed, with a line to print (or None) and an exit status.
    """

    def __init__(
        self,
        store: Any,
        rank: int = 0,
        world_size: int = 1,
        patience: float = 300.0,
        keeps_store: bool = False,
        end: Callable[[str | None, int], None] | None = None,
    ) -> None:
        self.at_end: Callable[[], None] = lambda: None  # called before this process exits because another rank failed
        self.phase = "starting"
        self._store, self._rank, self._patience = store, rank, patience
        self._watched = range(1, world_size) if rank == 0 else range(1)
        self._keeps_store = keeps_store
        self._end = end or self._end_process
        self._began = self._round = time.monotonic()
        self._beats, self._to_tell = 0, list[tuple[str, str]]()  # keys and values
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last heartbeat, and when it was first seen
        self._met, self._over, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="startup")
        if store is not None:
            self._thread.start()

    def meet(self) -> None:
        """Wait until every rank has joined.

        Raises:
            Stalled: The store does not answer.
        """
        self.phase = "waiting for the other ranks"
        asked = time.monotonic()
        while self._store is not None and not self._met.wait(BEAT):
            before, asked = asked, time.monotonic()
            if asked - before < HELD_UP and asked - self._round > SILENT:
                raise Stalled(f"rank {self._rank}, {self.phase}: the job's store does not answer")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the startup, and report an exception to the other ranks.

        Raises:
            Stalled: A collective failed, and no rank is known to be the cause.
            LocalError: Only this rank raised a :class:`UserError`.
        """
        if self._store is None:
            return
        if error is not None and (failed := failed_collective(error)) is not None:
            self._to_tell.append((FAILED, "1"))
            self._thread.join(2 * GRACE + ALIKE + 3 * BEAT)  # if it learns which rank failed, it ends the process
            said = str(failed).strip().split("\n")[0]
            raise Stalled(
                f"rank {self._rank}, {self.phase}: a collective failed: no silent rank was found ({said})"
            ) from None
        refused = isinstance(error, UserError)
        if refused and self._rank:
            self._thread.join(ALIKE)  # if rank 0 raises it too, the thread ends this process
        where = f"rank {self._rank} ({socket.gethostname()}), {self.phase}"
        said = f"{where}: {error}" if refused else f"{where}: {type(error).__name__}: {error}"
        if isinstance(error, Exception):
            verdict = {"ranks": [self._rank], "said": " ".join(said.split()), "status": 2 if refused else 1}
            self._to_tell.append((VERDICT, json.dumps(verdict)))
            self._leaving.set()
        else:
            self.phase = DONE
        self._over.set()
        self._thread.join(ALIKE + BEAT if self._keeps_store else 2 * BEAT)
        if refused and self._rank:
            raise LocalError(said) from None

    # ---- the thread

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.is_set()  # if set, this is the last round
            try:
                self._tell()
                if self._store.check([VERDICT]):
                    self._store.set(f"{_key(self._rank)} has heard", "1")
                    verdict = json.loads(self._store.get(VERDICT))
                    self._linger(verdict["ranks"])
                    return self._leave(**verdict)
                if not over:
                    self._judge()
            except Exception as error:  # usually the store no longer exists
                if self._over.is_set():  # startup has ended, and this round was only to report that
                    return None
                said = str(error).split("\n")[0]
                return self._leave([0], f"rank 0, or the agent that keeps the job's store, has died ({said})", 1)
            self._round = time.monotonic()
            self._over.wait(BEAT)

    def _tell(self) -> None:
        self._beats += 1
        self._store.set(_key(self._rank), f"{self._beats} {self.phase}")
        while self._to_tell:
            key, value = self._to_tell.pop(0)
            self._store.compare_set(key, "", value)  # the first one counts

    def _judge(self) -> None:
        """Find the ranks that are missing or silent, and report them in the store."""
        now, silent, absent = time.monotonic(), list[int](), list[int]()
        allowed = GRACE if self._store.check([FAILED]) else SILENT
        if now - self._round > HELD_UP:  # the other ranks may have been suspended too: restart their clocks
            self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
        for rank in self._watched:
            if rank not in self._seen and not self._store.check([_key(rank)]):
                absent.append(rank)
                continue
            beat = self._store.get(_key(rank)).decode()
            if self._seen.get(rank, ("", 0.0))[0] != beat:
                self._seen[rank] = (beat, now)
            elif now - self._seen[rank][1] > allowed and beat.partition(" ")[2] != DONE:
                silent.append(rank)
        if silent:
            phases = sorted({self._seen[rank][0].partition(" ")[2] for rank in silent})
            self._accuse(silent, "no heartbeat, it hangs or has died", "while " + ", ".join(phases))
        elif absent and now - self._began > self._patience:
            self._accuse(
                absent, "has not joined", f"within {self._patience / 60:.2g} minutes; its own log may say why, {LONGER}"
            )
        elif not absent and self._rank == 0:
            self._store.set(ALL_HERE, "1")
        if not self._met.is_set() and self._store.check([ALL_HERE]):
            self._met.set()

    def _linger(self, gone: Sequence[int]) -> None:
        """Keep the store alive until the other ranks have read the verdict."""
        end = time.monotonic() + ALIKE
        waiting = [rank for rank in self._watched if self._keeps_store and rank not in gone]
        while waiting and time.monotonic() < end:
            waiting = [rank for rank in waiting if not self._store.check([f"{_key(rank)} has heard"])]
            time.sleep(BEAT / 10)

    def _accuse(self, ranks: Sequence[int], what: str, further: str) -> None:
        who = ", ".join(map(str, ranks[:8])) + (", .." if len(ranks) > 8 else "")
        said = f"{'rank' if len(ranks) == 1 else 'ranks'} {who}: {what} ({further})"
        self._store.compare_set(VERDICT, "", json.dumps({"ranks": list(ranks), "said": said, "status": 1}))

    def _leave(self, ranks: list[int], said: str, status: int) -> None:
        if self._leaving.is_set() or (self._over.is_set() and self._rank in ranks):
            return  # this rank exits with its own error
        if status == 2 and self._rank != 0:
            time.sleep(5 * BEAT)  # the launcher ends all ranks once one exits: let those that print exit first
            return self._end(None, status)
        self._end(said if status == 2 else f"rank {self._rank}, {self.phase}: {said}", status)

    def _end_process(self, line: str | None, status: int) -> None:
        """Print a line and exit at once: the main thread waits in a library, where no exception reaches it."""
        if line is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self.at_end()
            sys.stdout.flush()
        os._exit(status)


def _key(rank: int) -> str:
    return f"rank {rank}"


# ---- the startup of this process

current = Startup(None)
_count = itertools.count()
_joined: dist.Store | None = None


def join(timeout_minutes: float) -> Startup:
    """Join the job's store that torchrun describes in the environment; a no-op in a job of one rank.

    Args:
        timeout_minutes: The timeout of collectives, and of ranks that have not joined.

    Raises:
        Stalled: The process that keeps the store does not answer.
        UserError: The store's port is taken.
    """
    global current, _joined
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    current, _joined = Startup(None), None
    if "RANK" not in os.environ or world_size == 1:
        return current
    patience = 60 * timeout_minutes
    keeps_store = rank == 0 and not _agents_keep_it()
    stores = [_connect(rank, world_size, patience, keeps_store) for _ in range(2)]  # one per thread
    number = next(_count)
    _joined = dist.PrefixStore(f"job {number}", stores[0])
    current = Startup(dist.PrefixStore(f"startup {number}", stores[1]), rank, world_size, patience, keeps_store)
    return current


def store() -> dist.Store | None:
    """Return the job's store, for the process group; None if :func:`join` has not joined one."""
    return _joined


def _agents_keep_it() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(rank: int, world_size: int, patience: float, keeps_store: bool) -> dist.Store:
    """Return a connection to the store that ``torch.distributed`` would use: torchrun's, else one on rank 0."""
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    if not keeps_store:
        _await(host, port, rank, patience)
    try:
        made = dist.TCPStore(
            host, port, world_size, keeps_store, timedelta(seconds=patience), wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        said = str(error).split("\n")[0]
        raise UserError(
            f"MASTER_ADDR {host}, MASTER_PORT {port}: {said}; choose a free port of rank 0's node"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"/worker/attempt_{attempt}", made) if _agents_keep_it() else made


def _await(host: str, port: int, rank: int, patience: float) -> None:
    """Wait until the store's port answers; torch waits too, but fills the log when it times out."""
    end, said = time.monotonic() + patience, "no time"
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError as error:
            said = error.strerror or str(error)
            time.sleep(0.1)
    whose = "torchrun's agent" if _agents_keep_it() else "rank 0"
    raise Stalled(
        f"rank {rank}, joining: {whose} at {host}:{port} (MASTER_ADDR, MASTER_PORT) does not answer within "
        f"{patience / 60:.2g} minutes ({said}; {LONGER})"
    )
