"""The next step's micro-batches are built by one background thread while this step runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch

from tidar_megatron.data.doubled import Batch


class Prefetcher:
    """Builds micro-batches ahead of their use: the same ones, since what is built depends on the request alone.

    The thread starts with the first request and ends with :meth:`close`. It builds one request after the other, also
    those that nobody foresaw, so ``build`` is never run twice at a time.

    Args:
        build: a pure function of its arguments, the request.
        device: where the batches will go; for a CUDA device they are put into page-locked memory.
    """

    def __init__(self, build: Callable[..., Sequence[Batch]], device: torch.device) -> None:
        self._build, self._pin = build, device.type == "cuda"
        # page-locked memory belongs to a device, and a new thread's is the first one
        ready = partial(torch.cuda.set_device, device) if self._pin else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=ready)
        self._request: tuple = ()
        self._pending: Future[list[Batch]] | None = None

    def start(self, *request: object) -> None:
        """Begin to build; whoever gets the same request next finds it built, or waits for the rest."""
        if self._pending is not None:
            self._pending.cancel()  # if it has not begun
        self._request, self._pending = request, self._thread.submit(self._built, request)

    def get(self, *request: object) -> list[Batch]:
        """The micro-batches of a request.

        Raises:
            Whatever ``build`` raised, as it is, also where that was long ago.
        """
        if self._pending is None or self._request != request:
            self.start(*request)
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending.result()

    def settle(self) -> None:
        """Wait until nothing is being built: a process may be forked then."""
        if self._pending is not None:
            wait([self._pending])

    def close(self) -> None:
        """End the thread; what it is building is waited for and forgotten."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending = None

    def _built(self, request: tuple) -> list[Batch]:
        batches = self._build(*request)
        return [batch.pinned() for batch in batches] if self._pin else list(batches)
