"""The output of benchmarks: JSON files, tables and plots."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = {  # the columns of a table that would be too wide; the file has all
    "decode": {
        *("mode", "plan", "batch", "context", "tokens_per_forward", "tokens_per_second_spread", "spread"),
        *("joules_per_token", "computed_megabytes_per_token", "computed_gigaflops_per_token", "same_tokens"),
    },
}


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
            console.print(f"{name}: {', '.join(map(str, rows))}", markup=False)
            continue
        shown = [column for column in rows[0] if column in SHOWN.get(result["benchmark"], rows[0])]
        table = Table(*(column.replace("_", " ") for column in shown), title=name)
        for row in rows:
            table.add_row(*(_cell(row.get(column, "")) for column in shown))
        console.print(table)


def _cell(value: object) -> str:
    """Return the text of a cell; a spread is shown as its median and quartiles, None as nothing."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Plot the result of the ``training`` or ``slots`` benchmark: times, and their ratios."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    (_slots if result["benchmark"] == "slots" else _training)(result["rows"], left, right)
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _training(rows: list[dict[str, Any]], seconds: Any, ratio: Any) -> None:
    """Plot step time and its ratio to AR's against sequence length."""
    several = len({row["dtype"] for row in rows}) > 1
    for key in dict.fromkeys((row["dtype"], row["diffusion_block_fraction"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["diffusion_block_fraction"]) == key]
        lengths, dtype = [row["seq_length"] for row in own], f", {key[0]}" if several else ""
        if (label := f"AR{dtype}") not in [line.get_label() for line in seconds.lines]:
            seconds.plot(lengths, [row["ar_seconds"]["median"] for row in own], "--o", label=label)
        name = f"TiDAR, {key[1]:.0%} of the blocks{dtype}"
        seconds.plot(lengths, [row["tidar_seconds"]["median"] for row in own], "-o", label=name)
        _plot_spreads(ratio, lengths, [row["spread"] for row in own], label=name)
    for axes, title in ((seconds, "seconds per step"), (ratio, "step time over AR's")):
        axes.set(xscale="log", xlabel="S, clean tokens of a sequence", title=title)
        axes.set_xticks(lengths, [str(length) for length in lengths])
    seconds.set_yscale("log")
    ratio.set_ylim(bottom=1)


def _slots(rows: list[dict[str, Any]], milliseconds: Any, ratio: Any) -> None:
    """Plot forward time and its ratio to one token's against the tokens of the forward, with the bare products."""
    for number, key in enumerate(dict.fromkeys((row["dtype"], row["context"]) for row in rows)):
        own = [row for row in rows if (row["dtype"], row["context"]) == key]
        tokens, color, name = [row["tokens"] for row in own], f"C{number}", f"{key[0]}, after {key[1]} tokens"
        _plot_spreads(milliseconds, tokens, [row["milliseconds"] for row in own], label=name, color=color)
        _plot_spreads(ratio, tokens, [row["over_one_token"] for row in own], label=name, color=color)
        floor = [row["products_milliseconds"]["median"] for row in own if row["products_milliseconds"]]
        if floor:
            milliseconds.plot(tokens, floor, "--", color=color, label=f"{key[0]}, matrix products alone")
            ratio.plot(tokens, [value / floor[0] for value in floor], "--", color=color)
    for axes, title in ((milliseconds, "milliseconds of a forward"), (ratio, "over one token's; products dashed")):
        most = max(max(line.get_ydata()) for line in axes.lines)  # the quartiles of a busy machine are far beyond
        axes.set(xlabel="tokens of a forward", title=title, ylim=(0, 1.2 * most))


def _plot_spreads(axes: Any, x: list[int], spreads: list[dict[str, float]], **how: Any) -> None:
    (line,) = axes.plot(x, [spread["median"] for spread in spreads], "-o", markersize=4, **how)
    low, high = ([spread[name] for spread in spreads] for name in ("low", "high"))
    axes.fill_between(x, low, high, alpha=0.2, color=line.get_color())
