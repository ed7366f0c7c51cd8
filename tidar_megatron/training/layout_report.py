"""Run the layout check (``tidar check-layout``): a one-rank reference, every layout that fits, and the report."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tidar_megatron.distributed.groups import shut_down, world_size_from_environment
from tidar_megatron.errors import UserError
from tidar_megatron.precision import full_float32
from tidar_megatron.training.layout_check import Comparison, Measured, compare, measure
from tidar_megatron.training.layout_variants import VARIANTS, Layout, layouts_for, variant_config

LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def report(names: list[str] | None, *, list_only: bool, as_json: bool) -> None:
    """Run the layouts on all ranks, compare them on the main rank, and print the report. Collective.

    Args:
        names: The names of the layouts to run; all that fit if None or empty.
        list_only: Whether to print only the names of the layouts.
        as_json: Whether to print JSON instead of a table.

    Raises:
        UserError: No layout that fits has one of the names.
        SystemExit: A layout differs; the status is 1.
    """
    world_size = world_size_from_environment()
    layouts = layouts_for(world_size)
    names = [next((x.name for x in layouts if same(x.name, name)), name) for name in names or []]
    for name in names:
        if name not in [layout.name for layout in layouts]:
            raise UserError(
                f"--layout {name!r}: does not fit {world_size} processes or does not exist; --list names all"
            )
    layouts = [layout for layout in layouts if not names or layout.name in names]
    is_main = os.environ.get("RANK", "0") == "0"
    if list_only:
        if is_main:
            print("\n".join(layout.name for layout in layouts))
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        comparisons = run(layouts, world_size, Console(stderr=True), is_main)
    finally:
        shut_down()
    if is_main:
        ok = all(comparison.ok for comparison in comparisons)
        if as_json:
            print(json.dumps({"layouts": [dataclasses.asdict(c) for c in comparisons], "ok": ok}))
        else:
            Console().print(as_table(comparisons, layouts, world_size))
        if not ok:
            sys.exit(1)


def same(name: str, given: str) -> bool:
    """Return whether two names are equal up to spaces and case: "CP 2" is CP2."""
    return name.replace(" ", "").lower() == given.replace(" ", "").lower()


def run(layouts: list[Layout], world_size: int, console: Console, is_main: bool) -> list[Comparison]:
    """Return the comparisons on the main process, and an empty list on the others. Collective."""
    with tempfile.TemporaryDirectory() as folder, full_float32(tell=is_main):
        reference = Path(folder) / "one_rank.pt"
        variants = list(dict.fromkeys(layout.variant for layout in layouts))
        process = start_reference(reference, world_size, variants) if is_main else None
        comparisons = []
        gathered: list[tuple[Layout, list[Measured]]] = []
        for layout in layouts:
            mine = measure(layout.config(world_size), VARIANTS[layout.variant])
            ranks: list[Measured] | None = [mine] * world_size if is_main else None
            dist.gather_object(mine, ranks)
            if ranks is not None:
                gathered.append((layout, ranks))
                console.print(f"{layout.name}: done", highlight=False)
        if process is not None:
            if process.wait() != 0:
                raise RuntimeError("the one-rank reference failed; its traceback is above")
            one = torch.load(reference, weights_only=False)
            comparisons = [compare(layout, ranks, one[layout.variant]) for layout, ranks in gathered]
    return comparisons


def start_reference(path: Path, world_size: int, variants: list[str]) -> subprocess.Popen:
    """Start a process outside of the launcher's job that trains the models of ``variants`` on one rank."""
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    command = [sys.executable, "-m", "tidar_megatron", "check-layout", "--one-rank", str(path)]
    command += ["--sequences-for", str(world_size), "--variants", *variants]
    return subprocess.Popen(command, env=alone, stdout=sys.stderr)


@full_float32(tell=False)
def write_reference(path: str, world_size: int, variants: list[str]) -> None:
    """Train ``variants`` on one rank, with the same batches as ``world_size`` ranks get, and save the measurements."""
    torch.set_num_threads(1)
    results = {name: measure(variant_config(name, world_size), VARIANTS[name]) for name in variants}
    shut_down()
    torch.save(results, path)


def as_table(comparisons: list[Comparison], layouts: list[Layout], world_size: int) -> Table:
    """Return the comparisons as a table for the console."""
    table = Table(title=f"{world_size} processes against one")
    for column in ("layout", "loss: relative error", "gradients: relative error", "allowed", ""):
        table.add_column(column)
    for comparison, layout in zip(comparisons, layouts, strict=True):
        variant = VARIANTS[layout.variant]
        allowed = f"{variant.loss_tolerance:.0e}, {variant.grad_tolerance:.0e}"
        errors = f"{comparison.loss_rel_err:.1e}", f"{comparison.grad_rel_err:.1e}"
        table.add_row(comparison.name, *errors, allowed, "ok" if comparison.ok else "DIFFERS")
    return table
