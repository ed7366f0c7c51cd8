"""Name the rank that hangs or has died when a collective fails.

gloo's error names neither a rank nor a step. So every rank records in the job's store (under torchrun: the agent's)
which step it has begun. A rank whose collective fails signs in the store that it is alive, waits for the others to
sign, and names those that do not. All ranks that wait for the missing one, directly or through another rank, began to
wait within the same step, so their timeouts expire within the duration of one step.

NCCL's watchdog ends the process before the program can act; its message names the rank and the collective.
"""

import contextlib
import threading
import time

import torch.distributed as dist

from tidar_megatron.errors import Stalled

GRACE = 5.0  # seconds to wait for the other ranks' signatures, beyond the longest step


def failed_collective(error: BaseException) -> BaseException | None:
    """Return the collective failure in the exception chain of ``error``, or None if no collective failed."""
    failed: BaseException | None = error
    while failed is not None:
        said = str(failed).strip().split("\n")[0].lower()
        if isinstance(failed, dist.DistError) or (isinstance(failed, RuntimeError) and "gloo" in said):
            return failed
        failed = failed.__cause__ or failed.__context__
    return None


class Heartbeat:
    """The heartbeat of one rank in the job's store; a no-op in a job of one rank.

    A store that does not answer never ends a run: the beat is dropped.
    """

    def __init__(self) -> None:
        self._rank, self._world_size, self._step = dist.get_rank(), dist.get_world_size(), 0
        self._began, self._longest = time.monotonic(), 0.0
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("heartbeat", store) if self._world_size > 1 else None

    def beat(self, step: int) -> None:
        """Record that this rank begins ``step``."""
        now = time.monotonic()
        self._step, self._began, self._longest = step, now, max(self._longest, now - self._began)
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"step of {self._rank}", str(step))

    def blame(self, error: BaseException) -> Stalled | None:
        """Return the error that names the ranks that do not answer after ``error``; None if no collective failed.

        It waits up to the longest step plus :data:`GRACE` seconds for the other ranks, twice that if the store hangs.
        """
        failed = failed_collective(error)
        if self._store is None or failed is None:
            return None
        said = str(failed).strip().split("\n")[0]
        silent: list[str] = []
        asking = threading.Thread(target=self._ask, args=(silent,), daemon=True)
        asking.start()  # in a thread, because the store itself may hang
        asking.join(2 * (GRACE + self._longest) + 1)
        who = "; ".join(silent) or "no silent rank was found"
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
                silent.append(f"rank {rank} does not answer, it hangs or has died in step {step}")
