"""The setting of a section of the check: the device, the sizes to use, a folder and the time left."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tidar_megatron.benchmark.timing import peak_gpu_bytes

NOT_ON_A_CPU = "not on a CPU"


@dataclass
class Setting:
    """The conditions of one section.

    Attributes:
        device: The device to check.
        tiny: Whether to use the smallest sizes, which only show that the programs run.
        folder: An empty folder for what the section writes.
        deadline: The time, by ``time.monotonic``, after which the section begins nothing new.
        keep: A function that is given the results so far between two rows.
        found: The results so far, which are kept if the section raises.
        problems: What was found wrong; the section goes on, and fails at its end.
        summary: Lines for the summary at the end of the check.
        stopped_early: Whether something was left out because the time was up.
    """

    device: torch.device
    tiny: bool
    folder: Path
    deadline: float
    keep: Callable[[dict[str, Any]], object] = lambda found: None
    found: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def on_gpu(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device.type == "cuda"

    def size(self, full: Any, tiny: Any) -> Any:
        """Return the size to use."""
        return tiny if self.tiny else full

    def in_time(self) -> bool:
        """Return whether a further row may begin; a section asks before each, and ends when there is no time left."""
        self.keep(self.found)
        if time.monotonic() < self.deadline:
            return True
        self.stopped_early = True
        return False

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Allow only a share of the time that is left, for one of several parts of a section."""
        before, now = self.deadline, time.monotonic()
        self.deadline = now + share * max(0.0, before - now)
        try:
            yield
        finally:
            self.deadline = before

    def peak_extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Return the peak of memory during ``run`` beyond what was allocated before; None on a CPU."""
        return peak_gpu_bytes(run, self.device) if self.on_gpu else None

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return a new list of rows among the results."""
        rows: list[dict[str, Any]] = []
        self.found[name] = rows
        return rows

    @contextmanager
    def guard(self, row: str) -> Iterator[None]:
        """Record an exception in this block as a problem of ``row``, and free the memory that it held."""
        try:
            yield
            return
        except Exception as error:
            traceback.print_exc()
            self.problems.append(f"{row}: {one_line(error)}")
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize(self.device)  # raises if the device is broken: the section ends
            torch.cuda.empty_cache()

    def require(self, holds: bool, problem: str) -> None:
        """Record ``problem`` unless it ``holds``."""
        if not holds:
            self.problems.append(problem)


LONGEST = 400  # characters


def one_line(error: BaseException) -> str:
    """Return what a traceback ends with, the exception's type and message, in one line."""
    said = " ".join("".join(traceback.format_exception_only(error)).split())
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
