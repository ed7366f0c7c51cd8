"""The results in a form to read."""

from collections.abc import Sequence
from typing import Any


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Return a verdict for each section, with its own lines below it, as plain text."""
    shown = []
    for line in lines:
        verdict = "ok" if line["ok"] else "skipped" if line.get("skipped") else "FAILED"
        early = ", stopped early" if line.get("stopped_early") else ""
        shown.append(f"{line['section']} {line['name']}: {verdict} ({line['seconds']:.1f} s{early})")
        shown += [f"    {said}" for said in line.get("summary", [])]
        shown += [f"    error: {line['error']}"] if not line["ok"] else []
    good = sum(line["ok"] for line in lines)
    return "\n".join([*shown, f"{good} of {len(lines)} sections are ok"])
