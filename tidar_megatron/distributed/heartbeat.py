"""Which rank is it? When a collective times out or breaks, the ranks that are awake find out who is not.

The error of gloo names neither a rank nor a step. So every rank notes in the job's store (under torchrun: its agent's)
which step it has begun; and one whose collective fails signs there that it is awake, waits for the others to sign, and
names those that do not: they hang, or are dead. All that wait for a rank began to do so within one step, so they wake
within one step's time, and those that do not wait for it but for one of these with them.

NCCL's own watchdog ends a process without giving the program a say; its message names the rank and the collective.
"""

import contextlib
import threading
import time

import torch.distributed as dist

from tidar_megatron.errors import Stalled

GRACE = 5.0  # seconds that the others may sign later, beyond the time of a step


def failed_collective(error: BaseException) -> BaseException | None:
    """The failure of a collective that ``error`` is or comes from; None for other errors."""
    failed: BaseException | None = error
    while failed is not None:
        said = str(failed).strip().split("\n")[0].lower()
        if isinstance(failed, dist.DistError) or (isinstance(failed, RuntimeError) and "gloo" in said):
            return failed
        failed = failed.__cause__ or failed.__context__
    return None


class Heartbeat:
    """One rank's place in the job; does nothing in a job of one.

    The store is never worth a run: where it does not answer, nothing is noted.
    """

    def __init__(self) -> None:
        self._rank, self._world_size, self._step = dist.get_rank(), dist.get_world_size(), 0
        self._began, self._longest = time.monotonic(), 0.0
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("heartbeat", store) if self._world_size > 1 else None

    def beat(self, step: int) -> None:
        """This rank begins ``step``."""
        now = time.monotonic()
        self._step, self._began, self._longest = step, now, max(self._longest, now - self._began)
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"step of {self._rank}", str(step))

    def blame(self, error: BaseException) -> Stalled | None:
        """The error to end with after ``error``: it names who does not answer. None if no collective has failed."""
        failed = failed_collective(error)
        if self._store is None or failed is None:
            return None
        said = str(failed).strip().split("\n")[0]
        silent: list[str] = []
        asking = threading.Thread(target=self._ask, args=(silent,), daemon=True)
        asking.start()  # beside, because the store itself may be what hangs
        asking.join(2 * (GRACE + self._longest) + 1)
        who = "; ".join(silent) or "no rank is silent by now"
        return Stalled(f"rank {self._rank}, step {self._step}: a collective failed: {who} ({said})")

    def _ask(self, silent: list[str]) -> None:
        assert self._store is not None
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._rank} is awake", "")
            end = time.monotonic() + GRACE + self._longest
            others = [rank for rank in range(self._world_size) if rank != self._rank]
            while others and time.monotonic() < end:
                others = [rank for rank in others if not self._store.check([f"{rank} is awake"])]
                time.sleep(0.05)
            for rank in others:
                begun = self._store.check([f"step of {rank}"])
                step = self._store.get(f"step of {rank}").decode() if begun else "?"
                silent.append(f"rank {rank} does not answer, it hangs or is gone in step {step}")
