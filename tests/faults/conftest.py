"""The faults' own report: one line a fault, above pytest's summary. ``make test-faults`` runs this folder.

The first paragraph of a test's docstring names its fault ("Fault 9: SIGTERM to one rank, ..."). A fault holds only if
all of its tests pass; the words of its first test stand for it, those of tests that fail or are skipped are added.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest

NAMED = re.compile(r"(Fault \d+|Kills): (.*)")
_named = {}  # node id -> (fault, line)


def pytest_collection_modifyitems(items):
    """Learn what each test is about."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker("process")
        match = NAMED.match(" ".join((item.function.__doc__ or "").split("\n\n")[0].split()))
        if match is None:
            raise pytest.UsageError(f"{item.nodeid}: its docstring must begin with 'Fault N: '")
        _named[item.nodeid] = match.groups()


def pytest_terminal_summary(terminalreporter):
    """Print the lines."""
    lines, outcomes = {}, defaultdict(lambda: defaultdict(dict))  # fault -> outcome -> {its line: why}, in order
    counts = defaultdict(int)
    for outcome in ("error", "failed", "skipped", "passed"):
        for report in terminalreporter.getreports(outcome):
            if report.nodeid in _named:
                fault, line = _named[report.nodeid]
                why = report.longrepr[2] if outcome == "skipped" else ""
                outcomes[fault]["failed" if outcome == "error" else outcome][line] = why
                counts[fault] += 1
    for fault, line in _named.values():
        lines.setdefault(fault, line)
    if not outcomes:
        return
    terminalreporter.section("faults")
    for fault in sorted(outcomes, key=lambda name: int("0" + re.sub(r"\D", "", name)) or 99):
        failed, skipped = outcomes[fault]["failed"], outcomes[fault]["skipped"]
        verdict = "DOES NOT HOLD" if failed else "holds" if outcomes[fault]["passed"] else "skipped"
        tests = f"{counts[fault]} test{'s' * (counts[fault] > 1)}"
        terminalreporter.line(f"{fault:<8} {verdict} ({tests}): {lines[fault]}", red=bool(failed))
        for line in failed:
            terminalreporter.line(f"{'':<8} failed: {line}", red=True)
        for line, why in skipped.items():
            terminalreporter.line(f"{'':<8} skipped: {line} ({why.removeprefix('Skipped: ')})", yellow=True)
