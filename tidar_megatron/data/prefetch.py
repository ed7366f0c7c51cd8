"""Prefetching: background threads build the micro-batches of the next steps while the current step runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch

from tidar_megatron.data.doubled import Batch

Request = tuple


class Overdue(Exception):  # noqa: N818 - said of batches
    """Batches were not built within the timeout."""


class Prefetcher:
    """A builder of micro-batches ahead of their use; the result depends only on the request, not on the prefetching.

    The threads start with the first request and end with :meth:`close`.

    Args:
        build: A pure function of its arguments, the request; several threads call it at once.
        device: The device of the batches; for a CUDA device they are built in page-locked memory.
        workers: The number of threads, and of requests built ahead; 0 disables prefetching.
        timeout: Seconds that a caller waits for batches. None: no limit, and a request that was not prefetched is built
            in the caller's thread.
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
        # page-locked memory belongs to the thread's current device, which is device 0 in a new thread
        ready = partial(torch.cuda.set_device, device) if self._pin else None
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="prefetch", initializer=ready)
        self._pending: dict[Request, Future[list[Batch]]] = {}
        self._forgotten: list[Future[list[Batch]]] = []

    def expect(self, requests: Sequence[Request]) -> None:
        """Start building the first ``workers`` of these requests, given in order of use; drop all other requests."""
        requests = requests[: self.workers]
        for request in [request for request in self._pending if request not in requests]:
            forgotten = self._pending.pop(request)
            if not forgotten.cancel():  # it has begun
                self._forgotten.append(forgotten)
        for request in requests:
            if request not in self._pending:
                self._pending[request] = self._threads.submit(self._built, request)

    def get(self, *request: object) -> list[Batch]:
        """Return the micro-batches of a request; wait for them, or build them now if they were not prefetched.

        An exception of ``build`` is raised here, even if the thread met it earlier.

        Raises:
            Overdue: They are not ready within the timeout.
        """
        pending = self._pending.pop(request, None)
        if pending is None:
            if self._timeout is None:
                return self._built(request)
            pending = self._threads.submit(self._built, request)
        self._wait([pending])
        return pending.result()

    def settle(self) -> None:
        """Wait until nothing is being built, so that the process can be forked safely.

        Raises:
            Overdue: The builds are not finished within the timeout.
        """
        self._wait([*self._pending.values(), *self._forgotten])
        self._forgotten.clear()

    def _wait(self, building: Sequence[Future]) -> None:
        if wait(building, self._timeout).not_done:
            self._hangs = True
            raise Overdue

    def close(self) -> None:
        """End the threads and drop their results; wait for running builds unless one has exceeded the timeout."""
        self._threads.shutdown(wait=not self._hangs, cancel_futures=True)
        self._pending.clear()

    def _built(self, request: Request) -> list[Batch]:
        batches = self._build(*request)
        return [batch.pinned() for batch in batches] if self._pin else list(batches)
