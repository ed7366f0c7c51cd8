"""Run sections one after the other in this process, and write the line of each; ``supervisor.py`` starts this."""

import gc
import json
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tidar_megatron.errors import UserError
from tidar_megatron.gpu_check.lines import append, keep, skipped, take_kept
from tidar_megatron.gpu_check.sections import BROKEN_DEVICE, SECTIONS, limit
from tidar_megatron.gpu_check.setting import Setting, one_line
from tidar_megatron.precision import full_float32
from tidar_megatron.program import run_tool


def main() -> None:
    """Run the sections that the JSON object in ``sys.argv[1]`` names."""
    run_sections(**json.loads(sys.argv[1]))


def run_sections(
    sections: Sequence[int], deadline: float, output: str, device: str | None = None, tiny: bool = False
) -> None:
    """Run sections in order. One that raises is recorded with its error, and the next begins.

    Args:
        sections: The numbers of the sections.
        deadline: The time, by ``time.monotonic``, after which no section begins; those left are recorded as skipped.
        output: The file that gets the lines.
        device: The device's name; by default the GPU.
        tiny: Whether to use the smallest sizes.

    Raises:
        UserError: The device cannot be used.
        SystemExit: The CUDA context is broken; the section that broke it has its line.
    """
    where = _device(device)
    for place, number in enumerate(sections):
        section, now = SECTIONS[number], time.monotonic()
        if now >= deadline:
            append(Path(output), skipped(number, section.name))
            continue
        print(f"gpu-check {number}: {section.about}", file=sys.stderr, flush=True)
        remaining = [SECTIONS[n] for n in sections[place:]]
        own_deadline = now + limit(remaining, deadline - now)
        append(Path(output), run_section(number, where, tiny, own_deadline, partial(keep, Path(output))))
        take_kept(Path(output))
        gc.collect()
        if where.type == "cuda":
            try:
                torch.cuda.synchronize(where)
                torch.cuda.empty_cache()
            except RuntimeError:
                sys.exit(BROKEN_DEVICE)


def _device(name: str | None) -> torch.device:
    if (name is None or name.startswith("cuda")) and not torch.cuda.device_count():
        raise UserError("torch sees no CUDA device; to check the programs themselves, add --tiny --device cpu")
    try:
        return torch.empty(0, device=name or "cuda").device
    except RuntimeError as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def run_section(
    number: int,
    device: torch.device,
    tiny: bool,
    deadline: float,
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Run one section and return its line; an exception becomes the line's ``error``.

    Args:
        number: The number of the section.
        device: The device to check.
        tiny: Whether to use the smallest sizes.
        deadline: The time, by ``time.monotonic``, after which the section begins nothing new.
        keep: A function that is given the results so far between two rows.
    """
    section, start = SECTIONS[number], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as folder:
        setting = Setting(device, tiny, Path(folder), deadline, keep)
        try:
            with full_float32(tell=False):
                import_module(section.module).check(setting)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            traceback.print_exc()
            setting.problems.append(one_line(error))
            traceback.clear_frames(error.__traceback__)  # they hold tensors
    line = {"section": number, "name": section.name, "ok": not setting.problems}
    line |= {"error": "; ".join(setting.problems)} if setting.problems else {}
    line |= {"seconds": round(time.monotonic() - start, 2)}
    line |= {"device": device.type, "stopped_early": setting.stopped_early, "summary": setting.summary}
    return line | setting.found


if __name__ == "__main__":
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    run_tool(main)
