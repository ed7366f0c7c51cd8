#!/usr/bin/env python
"""Train every variant of a study (variants.py) with every seed, and compare the variants with the base.

    python examples/study/study.py                         # the paper's orderings at small scale: make study
    python examples/study/study.py --study smollm2_study   # what helps a real AR model to draft

A run is complete when it has a result.json and a recipe.json with the same command, data and way of measuring, so a
study that was stopped resumes. Runs are parallel, with one core each. The results are benchmarks/STUDY.json (every run
with its command), benchmarks/STUDY.png and a table. Those of a part of a study go to runs/STUDY by default.
"""

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from corpora import prepare
from variants import BASE, STUDIES, Study

from tidar_megatron.benchmark.measuring import machine
from tidar_megatron.errors import UserError
from tidar_megatron.program import run_tool

ROOT = Path(__file__).parent.parent.parent
# the 97.5% quantiles of Student's t, by degrees of freedom
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def main() -> None:
    """Train the missing runs, then compare all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--study", choices=STUDIES, default="study")
    parser.add_argument("--full", action="store_true", help="use more steps and seeds (takes a night)")
    parser.add_argument("--steps", type=int, help="steps of the base")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--corpora", nargs="+", metavar="NAME", help="corpora to train on [all of the study]")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="variants to train [all of the study]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel runs [one per core]")
    parser.add_argument("--data", default=ROOT / "data/study", type=folder, help="[data/study]")
    parser.add_argument("--runs", type=folder, help="[runs/STUDY]")
    parser.add_argument("--output", type=folder, help="folder for the results [benchmarks; runs/STUDY for a part]")
    args = parser.parse_args()
    study = STUDIES[args.study]
    part = args.corpora or args.variants or args.steps or args.seeds
    args.runs = args.runs or ROOT / "runs" / args.study
    args.output = args.output or (args.runs if part else ROOT / "benchmarks")
    steps = args.steps or (study.full_steps if args.full else study.steps)
    seeds = args.seeds or (study.full_seeds if args.full else study.seeds)
    corpora, names = args.corpora or study.corpora, args.variants or list(study.variants)
    if unknown := {*corpora} - {*study.corpora} | {*names} - {*study.variants}:
        raise UserError(
            f"{', '.join(sorted(unknown))}: {args.study} has {', '.join((*study.corpora, *study.variants))}"
        )
    if not 1 <= seeds <= len(T_975) + 1:
        raise UserError(f"--seeds {seeds}: must be 1 to {len(T_975) + 1}, the numbers with a known confidence interval")
    prepare(args.data, corpora)
    # seed by seed, so that a study that is stopped can still be compared
    wanted = [(c, name, seed) for seed in range(seeds) for c in corpora for name in names]
    start, done = time.monotonic(), 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(train, args, study, *one, steps) for one in wanted]
        try:
            for future in concurrent.futures.as_completed(runs):
                future.result()
                done += 1
                print(f"{done}/{len(wanted)} runs, {(time.monotonic() - start) / 60:.0f} minutes", flush=True)
        except UserError:
            pool.shutdown(cancel_futures=True)  # waits for the runs in progress before the error is shown
            raise
    found = collect(args, study, wanted, steps)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.study}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, args.output / f"{args.study}.png")
    print(table(found), trust_table(found), sep="\n\n")


def folder(given: str) -> Path:
    """Return an absolute path for a flag's folder, because subprocesses run in the checkout's root."""
    return Path(given).absolute()


def folder_of(args: argparse.Namespace, corpus: str, name: str, seed: int, steps: int) -> Path:
    """Return the folder of a run."""
    slug = name.replace(" = ", "").replace(", ", "-").replace(" ", "-").replace("%", "")
    return args.runs / f"{steps}-steps" / corpus / slug / f"seed{seed}"


def recipe(args: argparse.Namespace, study: Study, corpus: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Return what a run's result depends on, except the code of training."""
    files = [args.data / corpus / part / "manifest.json" for part in ("train", "valid")]
    files.append(ROOT / "examples/study/measure.py")
    return {
        "command": study.command(name, steps, seed),
        "prompts": [study.prompts, study.prompt_tokens, study.new_tokens, *study.trust],
        "sha256": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
    }


def train(args: argparse.Namespace, study: Study, corpus: str, name: str, seed: int, steps: int) -> None:
    """Train, export and measure one run, unless its result exists.

    Raises:
        UserError: one of the commands failed.
    """
    run = folder_of(args, corpus, name, seed, steps)
    made = json.dumps(recipe(args, study, corpus, name, seed, steps), indent=1) + "\n"
    kept = run / "recipe.json"
    if (run / "result.json").exists() and kept.exists() and kept.read_text() == made:
        return
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    kept.write_text(made)
    data = [str(args.data / corpus / part) for part in ("train", "valid")]
    commands = [
        [*study.command(name, steps, seed), "--train-data", data[0], "--valid-data", data[1], "--save", str(run)],
        ["tools/convert_checkpoint.py", "export", "--checkpoint", str(run), "--hf", str(run / "hf")],
        ["examples/study/measure.py", str(run), data[1], args.study, str(study.block_size(name))],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for command in commands:
        with (run / "log").open("a") as log:
            ended = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        if ended.returncode:
            said = (run / "log").read_text().strip().splitlines()[-1]
            raise UserError(f"{command[0]} of {corpus}, {name}, seed {seed}: {said} (full log: {run / 'log'})")
    for checkpoint in run.glob("iter_*"):
        shutil.rmtree(checkpoint)  # the export is enough to inspect the model


def collect(args: argparse.Namespace, study: Study, wanted: list[tuple[str, str, int]], steps: int) -> dict[str, Any]:
    """Return every run's figures, and each variant's means and differences from the base with 95% intervals."""
    runs = []
    for corpus, name, seed in wanted:
        result = json.loads((folder_of(args, corpus, name, seed, steps) / "result.json").read_text())
        command = " ".join(["python", *study.command(name, steps, seed)])
        runs.append({"corpus": corpus, "variant": name, "seed": seed, "command": command, **result})
    rows = []
    for corpus in dict.fromkeys(run["corpus"] for run in runs):
        of_corpus = [run for run in runs if run["corpus"] == corpus]
        for name in dict.fromkeys(run["variant"] for run in of_corpus):
            mine = {run["seed"]: figures(run) for run in of_corpus if run["variant"] == name}
            base = {run["seed"]: figures(run) for run in of_corpus if run["variant"] == BASE}
            row: dict[str, Any] = {"corpus": corpus, "variant": name, "question": study.variants[name].question}
            for what in next(iter(mine.values())):
                row[what] = interval([one[what] for one in mine.values()])
                pairs = [mine[seed][what] - base[seed][what] for seed in mine if seed in base]
                if pairs and name != BASE:
                    row[f"{what}, over base"] = interval(pairs)
            rows.append(row)
    return {
        "benchmark": args.study,
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "steps": steps,
        "rows": rows,
        "runs": runs,
    }


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a run that are compared."""
    flat = {name: run[name] for name in ("ar_loss", "diffusion_loss", "expected_tokens_per_forward")}
    for name, decoded in run.items():
        if name.startswith("trust "):
            flat |= {what if name == "trust 1" else f"{what}, {name}": value for what, value in decoded.items()}
    return flat


def interval(values: list[float]) -> dict[str, float | None]:
    """Return the mean, and half the width of its 95% confidence interval (Student's t; None for one value)."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return {"mean": mean, "half": None, "n": 1}
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return {"mean": mean, "half": T_975[n - 1] * deviation / math.sqrt(n), "n": n}


def show(value: dict[str, Any], digits: int = 2) -> str:
    """Return an interval as text, such as ``1.23 ± 0.04``."""
    half = "" if value["half"] is None else f" ± {value['half']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def table(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/README.md; "tokens" are tokens per forward, expected and in decoding."""
    columns = {"ar_loss": "AR loss", "expected_tokens_per_forward": "expected tokens", "tokens_per_forward": "tokens"}
    lines = [f"| corpus | variant | {' | '.join(f'{title} | over base' for title in columns.values())} |"]
    lines.append(f"|---|---|{'---|' * 2 * len(columns)}")
    for row in found["rows"]:
        cells = [row["corpus"], row["variant"]]
        for what in columns:
            digits, over = 3 if what == "ar_loss" else 2, row.get(f"{what}, over base")
            cells += [show(row[what], digits), show(over, digits) if over else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trust_table(found: dict[str, Any]) -> str:
    """Return the table of the base's output for each beta, the weight of AR's logits in verification (1: only AR's)."""
    lines = [
        "| corpus | beta | tokens per forward | nats per token, to its AR | distinct 4-grams |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        betas = [name.split("trust ")[1] for name in row if name.startswith("tokens_per_forward, trust ")]
        if row["variant"] != BASE:
            continue
        for beta in dict.fromkeys(["1", *(b for b in betas if "over" not in b)]):
            of_beta = "" if beta == "1" else f", trust {beta}"
            names = ("tokens_per_forward", "ar_nats_per_token", "distinct_4grams")
            cells = [show(row[f"{name}{of_beta}"]) for name in names]
            lines.append(f"| {row['corpus']} | {beta} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Plot the differences from the base with their intervals; a positive value is larger than the base's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = (
        ("ar_loss", "AR loss, nats"),
        ("expected_tokens_per_forward", "expected tokens per forward"),
        ("tokens_per_forward", "tokens per forward, decoded"),
    )
    corpora = list(dict.fromkeys(row["corpus"] for row in found["rows"]))
    names = [name for name in dict.fromkeys(row["variant"] for row in found["rows"]) if name != BASE]
    fig, axes = plt.subplots(1, len(shown), figsize=(15, 0.4 * len(names) + 1.6), sharey=True, layout="constrained")
    for axis, (what, title) in zip(axes, shown, strict=True):
        for n, corpus in enumerate(corpora):
            rows = {row["variant"]: row for row in found["rows"] if row["corpus"] == corpus}
            values = [rows[name].get(f"{what}, over base") if name in rows else None for name in names]
            places = [place + 0.16 * (n - (len(corpora) - 1) / 2) for place, value in enumerate(values) if value]
            there = [value for value in values if value]
            axis.errorbar(
                [value["mean"] for value in there], places, xerr=[value["half"] or 0 for value in there],
                fmt="o", capsize=3, label=corpus,
            )  # fmt: skip
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=f"{title}: over the base's", yticks=range(len(names)), yticklabels=names)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    run_tool(main)
