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
