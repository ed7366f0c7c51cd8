"""The next steps' micro-batches are built by background threads while this step runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch

from tidar_megatron.data.doubled import Batch

Request = tuple


class Overdue(Exception):  # noqa: N818 - said of batches
    """Batches were not built within the time given."""


class Prefetcher:
    """Builds micro-batches ahead of their use: the same ones, since what is built depends on the request alone.

    The threads start with the first request and end with :meth:`close`.

    Args:
        build: a pure function of its arguments, the request; several threads call it at once.
        device: where the batches will go; for a CUDA device they are put into page-locked memory.
        workers: threads, and requests built ahead; with 0 nothing is built ahead.
        timeout: seconds that whoever asks waits for batches; None: for ever, and what nobody foresaw it builds itself.
    """

    def __init__(
        self,
        build: Callable[..., Sequence[Batch]],
        device: torch.device,
        workers: int = 1,
        timeout: float | None = None,
    ) -> None:
        self.workers = workers
        self._timeout, self._hangs = timeout, False
        self._build, self._pin = build, device.type == "cuda"
        # page-locked memory belongs to a device, and a new thread's is the first one
        ready = partial(torch.cuda.set_device, device) if self._pin else None
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="prefetch", initializer=ready)
        self._pending: dict[Request, Future[list[Batch]]] = {}
        self._forgotten: list[Future[list[Batch]]] = []

    def expect(self, requests: Sequence[Request]) -> None:
        """Begin to build the first ``workers`` of these, soonest first; what else was being built is forgotten."""
        requests = requests[: self.workers]
        for request in [request for request in self._pending if request not in requests]:
            forgotten = self._pending.pop(request)
            if not forgotten.cancel():  # it has begun
                self._forgotten.append(forgotten)
        for request in requests:
            if request not in self._pending:
                self._pending[request] = self._threads.submit(self._built, request)

    def get(self, *request: object) -> list[Batch]:
        """The micro-batches of a request: built, or waited for; built now where nobody foresaw it.

        Raises:
            Whatever ``build`` raised, as it is, also where that was long ago.
            Overdue: it is not done in time.
        """
        pending = self._pending.pop(request, None)
        if pending is None:
            if self._timeout is None:
                return self._built(request)
            pending = self._threads.submit(self._built, request)
        self._wait([pending])
        return pending.result()

    def settle(self) -> None:
        """Wait until nothing is being built: a process may be forked then.

        Raises:
            Overdue: it is not done in time.
        """
        self._wait([*self._pending.values(), *self._forgotten])
        self._forgotten.clear()

    def _wait(self, building: Sequence[Future]) -> None:
        if wait(building, self._timeout).not_done:
            self._hangs = True
            raise Overdue

    def close(self) -> None:
        """End the threads; what they are building is forgotten, and waited for unless it hangs."""
        self._threads.shutdown(wait=not self._hangs, cancel_futures=True)
        self._pending.clear()

    def _built(self, request: Request) -> list[Batch]:
        batches = self._build(*request)
        return [batch.pinned() for batch in batches] if self._pin else list(batches)
