"""The file of results: one line of standard JSON for each section, on the disk before the next section begins."""

import json
import math
import os
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line to the file, and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the file; one that its writer did not finish is left out."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def keep(output: Path, found: dict[str, Any]) -> None:
    """Write what a section has found so far beside ``output``, for the case that its process ends."""
    part = _kept(output)
    part.with_suffix(".new").write_text(json.dumps(finite(found)), encoding="utf-8")
    os.replace(part.with_suffix(".new"), part)


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


def finite(value: Any) -> Any:
    """Return ``value`` with None for every number that is infinite or NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failed(number: int, name: str, error: str, seconds: float) -> dict[str, Any]:
    """Return the line of a section that gave no result."""
    return {"section": number, "name": name, "ok": False, "error": error, "seconds": round(seconds, 2)}


def skipped(number: int, name: str) -> dict[str, Any]:
    """Return the line of a section for which there is no time."""
    return failed(number, name, "skipped: the time is up", 0) | {"skipped": True}
