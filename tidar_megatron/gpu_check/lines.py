"""The file of results: one line of standard JSON for each section, on the disk before the next section begins."""

import json
import os
from pathlib import Path
from typing import Any

from tidar_megatron.files import replace_text
from tidar_megatron.json_files import finite


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line to the file, and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the file; one that its writer did not finish is left out."""
    finished = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in finished.splitlines()]


def keep(output: Path, found: dict[str, Any]) -> None:
    """Write what a section has found so far beside ``output``, for the case that its process ends."""
    replace_text(_kept(output), json.dumps(finite(found)))


def take_kept(output: Path) -> dict[str, Any]:
    """Return what was last kept beside ``output``, if anything, and remove it."""
    try:
        return json.loads(_kept(output).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    finally:
        _kept(output).unlink(missing_ok=True)


def _kept(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def failed(number: int, name: str, error: str, seconds: float) -> dict[str, Any]:
    """Return the line of a section that gave no result."""
    return {"section": number, "name": name, "ok": False, "error": error, "seconds": round(seconds, 2)}


def skipped(number: int, name: str) -> dict[str, Any]:
    """Return the line of a section for which there is no time."""
    return failed(number, name, "skipped: the time is up", 0) | {"skipped": True}
