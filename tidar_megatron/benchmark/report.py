"""The output of benchmarks: JSON files, tables and a plot."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def write(result: dict[str, Any], folder: str | Path) -> Path:
    """Write a result to ``FOLDER/NAME.json``, or ``FOLDER/NAME.cuda.json`` if a GPU was measured; return the path."""
    gpu = ".cuda" if "gpu" in result["machine"] else ""
    path = Path(folder) / f"{result['benchmark']}{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def show(result: dict[str, Any]) -> None:
    """Print the dtype of a model, each list of rows as a table, and each list of other values as a line."""
    console = Console()
    if "dtype" in result:
        console.print(f"dtype: {result['dtype']}")
    lists = {name: value for name, value in result.items() if isinstance(value, list)}
    if not lists:
        lists = {result["benchmark"]: [{k: v for k, v in result.items() if isinstance(v, float)}]}
    for name, rows in lists.items():
        if not rows:
            continue
        if not isinstance(rows[0], dict):
            console.print(f"{name}: {', '.join(map(str, rows))}")
            continue
        table = Table(*(column.replace("_", " ") for column in rows[0]), title=name)
        for row in rows:
            table.add_row(*(_cell(row.get(column, "")) for column in rows[0]))
        console.print(table)


def _cell(value: object) -> str:
    """Return the text of a cell; a spread is shown as its median and quartiles."""
    if not isinstance(value, dict):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Plot step time and its ratio to AR's against sequence length, from the result of the ``training`` benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (seconds, ratio) = plt.subplots(1, 2, figsize=(9, 3.5))
    fractions = sorted({row["diffusion_block_fraction"] for row in result["rows"]}, reverse=True)
    for number, fraction in enumerate(fractions):
        rows = [row for row in result["rows"] if row["diffusion_block_fraction"] == fraction]
        lengths = [row["seq_length"] for row in rows]
        if number == 0:
            seconds.plot(lengths, [row["ar_seconds"]["median"] for row in rows], "k--o", label="AR")
        name = f"TiDAR, {fraction:.0%} of the blocks"
        seconds.plot(lengths, [row["tidar_seconds"]["median"] for row in rows], "-o", label=name)
        spreads = [row["spread"] for row in rows]
        ratio.plot(lengths, [spread["median"] for spread in spreads], "-o", label=name)
        ratio.fill_between(lengths, [s["low"] for s in spreads], [s["high"] for s in spreads], alpha=0.2)
    for axes, title in ((seconds, "seconds per step"), (ratio, "step time over AR's")):
        axes.set(xscale="log", xlabel="S, clean tokens of a sequence", title=title)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    seconds.set_yscale("log")
    ratio.set_ylim(bottom=1)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
