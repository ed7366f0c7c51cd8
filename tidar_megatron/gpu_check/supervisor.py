"""Keep the check going: a section that hangs, or takes its process down, must not stop the next.

The sections run in a process of their own (``worker.py``). If it ends early or a section does not end in time, its line
says so, and another process does the rest. This process imports no torch.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tidar_megatron
from tidar_megatron.gpu_check.lines import append, failed, read, skipped, take_kept
from tidar_megatron.gpu_check.sections import BROKEN_DEVICE, SECTIONS, limit

ROOT = Path(tidar_megatron.__file__).parent.parent
GRACE = 60.0  # seconds that a section may take beyond its share, for a row that it has begun, before it is ended
AFTER = 20.0  # seconds that it may take beyond the end of all
POLL = 0.1
WORKER = (sys.executable, "-m", "tidar_megatron.gpu_check.worker")


def supervise(
    sections: Sequence[int], seconds: float, output: Path, device: str | None, tiny: bool
) -> list[dict[str, Any]]:
    """Run the sections within ``seconds``, and return their lines, which are also in ``output``.

    Args:
        sections: The numbers of the sections, in order.
        seconds: The time after which no section begins.
        output: The file of the lines; it is written anew.
        device: The device's name; by default the GPU.
        tiny: Whether to use the smallest sizes.

    Raises:
        SystemExit: The device cannot be used; the worker has said why.
    """
    deadline = time.monotonic() + seconds
    earlier = output.read_text(encoding="utf-8") if output.exists() else ""
    output.write_text("", encoding="utf-8")
    take_kept(output)
    with tempfile.TemporaryDirectory(prefix="gpu_check_cache_") as cache:
        while remaining := list(sections)[len(read(output)) :]:
            if time.monotonic() >= deadline:
                append(output, skipped(remaining[0], SECTIONS[remaining[0]].name))
                continue
            asked = {"sections": remaining, "deadline": deadline, "output": str(output), "device": device, "tiny": tiny}
            try:
                error = _attend(asked, _environment(device, cache))
            except SystemExit:
                output.write_text(earlier, encoding="utf-8")
                raise
            if error is not None and (left := list(sections)[len(read(output)) :]):
                append(output, failed(left[0], SECTIONS[left[0]].name, *error) | take_kept(output))
    return read(output)


def _environment(device: str | None, cache: str) -> dict[str, str]:
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TIDAR_CACHE": cache,
    }
    return {**os.environ, **ours, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def _attend(asked: dict[str, Any], environment: dict[str, str]) -> tuple[str, float] | None:
    """Run a worker until it ends; return what went wrong with its present section and that section's seconds, or None.

    A worker that broke its device, and said so, is not an error: the next one goes on.
    """
    output, sections = Path(asked["output"]), asked["sections"]
    command = [*WORKER, json.dumps(asked)]
    worker = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    before, done, begun = len(read(output)), -1, time.monotonic()
    latest = begun
    try:
        while worker.poll() is None:
            now = time.monotonic()
            if (now_done := len(read(output)) - before) != done and now_done < len(sections):
                done, begun = now_done, now
                share = limit([SECTIONS[number] for number in sections[done:]], asked["deadline"] - now)
                latest = min(now + share + GRACE, max(asked["deadline"], now) + AFTER)
            if now > latest:
                return f"ended after {now - begun:.0f} seconds: it did not stop by itself", now - begun
            time.sleep(POLL)
    finally:
        _end(worker)
    if worker.returncode == 2:
        sys.exit(2)
    if worker.returncode in (0, BROKEN_DEVICE) and len(read(output)) > before:
        return None
    return f"the process ended with {_status(worker.returncode)}", time.monotonic() - begun


def _end(worker: subprocess.Popen) -> None:
    """End the worker and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
