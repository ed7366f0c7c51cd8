"""Measure SmolLM2 with its drafts: tokens per forward and tokens/s by plan and kind of text; its own output untouched.

python examples/smollm2/measure_drafts.py --model FOLDER --adapter FOLDER --prompts FILE.jsonl --output FILE.json
"""

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tidar_megatron.program import OneLineParser, keep_threads_awake, run_tool

PLANS = ("ar", "lookup:8", "linear:8", "1:4", "1:8", "2:8", "all:8", "auto")
FREE = "auto, free slots"  # what auto chooses where further tokens of a forward cost nothing: most tokens per forward
BATCH, OF_BATCHES = 4, ("ar", "lookup:8", "1:4", "1:8", "auto")
# the share of distinct 4-grams, and the number of tokens, from which a text counts: looping text is easy to draft
VARIED, LEAST = 0.7, 16
OTHER = (  # prompts of kinds that no draft was trained on
    "Once upon a time, in a village by the sea, there lived a girl who",
    "To make a simple vegetable soup, first",
    "Dear Sir or Madam,\n\nI am writing to",
    "The history of the bicycle begins",
    "In this paper we study",
    "A: How was your holiday?\nB: It was",
    "The water cycle describes how",
    "Breaking news: scientists have discovered",
    "To be, or not to be, that is the question:",
    "Chapter 1\n\nThe train was late, and",
    "SELECT name, COUNT(*) FROM orders",
    "<html>\n<head>\n<title>My page</title>",
    "Le chat est assis sur",
    "The three laws of motion are:\n1.",
    "Shopping list:\n- milk\n-",
    "Photosynthesis is the process by which",
    "Roses are red,\nviolets are blue,\n",
    "From: anna@example.com\nSubject: Meeting on Friday\n\nHi Tom,",
    "Der Hund lief durch den Wald und",
    "Today's weather: in the morning",
    "\\begin{theorem}\nLet $n$ be a prime number. Then",
    "date,product,price\n2021-03-01,apple,1.20\n",
    "I bought these headphones two months ago, and",
    "Dr. Watson: What do you make of it, Holmes?\nHolmes:",
    "A train leaves the station at 8 am at 60 km/h. A second train",
    "The heart is a muscular organ that",
    "In the year 2150, humans",
    "Abstract. We present a new method for",
    "El sol sale por la mañana y",
    "My grandmother always told me that",
    "Instructions for the parents:\n\n1. Before you",
    "The company reported on Tuesday that",
)


def main() -> None:
    """Decode every prompt with every plan, in turns, then batches of them; write the JSON file and print the table."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0])
    for name in ("model", "adapter", "prompts", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--run", help="the run that trained the adapter, for its minutes and its AR loss")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the figure; needs --run")
    parser.add_argument("--limit", type=int, help="prompts [all]")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="tokens to generate for each prompt [96]")
    parser.add_argument("--dtype", default="auto", help="[auto]")
    parser.add_argument("--quantize", help="int8 or int4 [the weights as they are]")
    parser.add_argument("--llama", action="store_true", help="llama.cpp's plain decoding beside; needs the extra llama")
    args = parser.parse_args()
    if args.plot and not args.run:
        parser.error("--plot: needs --run, the run that trained the adapter")
    keep_threads_awake()
    from tidar_megatron.benchmark.measuring import machine
    from tidar_megatron.inference.costs import Costs
    from tidar_megatron.inference.dtype import dtype_name
    from tidar_megatron.inference.engine import generate
    from tidar_megatron.inference.loading import load_model
    from tidar_megatron.inference.planner import Planner, longest_draft
    from tidar_megatron.inference.request import parse_plan
    from tidar_megatron.inference.text import encode_prompt

    lines = [json.loads(line) for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()][: args.limit]
    asked = [(line["prompt"], line["kind"]) for line in lines] + [(text, "other") for text in OTHER]
    model = load_model(args.model, dtype=args.dtype, adapter=args.adapter, quantize=args.quantize)
    plans = {name: replace(parse_plan(name), max_new_tokens=args.max_new_tokens) for name in PLANS}
    free = Planner(Costs([1, 2], [1], [[1.0], [1.0]]), longest_draft(model))
    free.clock.observe = lambda step: None  # type: ignore[method-assign]
    llama = LlamaWays(model, args.model, args.max_new_tokens) if args.llama else None
    rows = []
    for number, (text, kind) in enumerate(asked):
        prompt = encode_prompt(model, text)[-128:]
        row: dict[str, Any] = {"kind": kind, "plans": {}}
        for name in list(plans)[:: -1 if number % 2 else 1]:
            done = generate(model, prompt, plans[name])
            row["plans"][name] = [done.tokens_per_forward, done.tokens_per_second]
            if name == "ar":
                row["distinct_4grams"], expected = done.distinct_4grams, done.token_ids
                row["tokens"] = len(expected)
            row.setdefault("outputs", {})[name] = done.token_ids
        done = generate_following(free, model, prompt, plans["auto"])
        row["plans"][FREE], row["outputs"][FREE] = [done.tokens_per_forward, done.tokens_per_second], done.token_ids
        if llama is not None:
            row["llama"] = llama.speeds(prompt)
        row["identical"] = sum(output == expected for output in row.pop("outputs").values())
        rows.append(row)
        print(f"{number + 1} of {len(asked)} prompts", file=sys.stderr, flush=True)
    assert model.drafts is not None
    result = {
        "benchmark": "smollm2_drafts",
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "new_tokens": args.max_new_tokens,
        "dtype": dtype_name(model.dtype),
        "quantize": args.quantize,
        "draft_rank": model.drafts.rank,
        "llama_bits": llama.bits if llama else None,
        "training": training(Path(args.run)) if args.run else None,
        "rows": rows,
        "batches": in_batches(model, [encode_prompt(model, line["prompt"])[-128:] for line in lines], plans),
    }
    result["summary"] = summary(result)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    if args.plot:
        plot(result, args.plot)


class LlamaWays:
    """llama.cpp with the weights of a folder, as they are and quantized: its plain greedy decoding."""

    def __init__(self, model: Any, folder: str, max_new_tokens: int) -> None:
        from tidar_megatron.benchmark.energy import Sizes
        from tidar_megatron.benchmark.llama import LlamaCpp, missing
        from tidar_megatron.errors import UserError
        from tidar_megatron.evaluation.stock import load_stock

        stock = load_stock(folder, model)
        if (reason := missing(stock)) is not None:
            raise UserError(f"--llama: {reason}")
        self._files = LlamaCpp(stock, Sizes.of(model))
        ways = self._files.ways(128 + max_new_tokens, max_new_tokens, 1)
        self._ways = {name: way for name, way in ways.items() if not name.endswith("lookup")}
        self.bits = self._files.bits_per_weight

    def speeds(self, prompt: list[int]) -> dict[str, float]:
        """Return the tokens/s of each file, without the prompt's time."""
        found = {}
        for name, way in self._ways.items():
            start = time.perf_counter()
            run = way([prompt])
            found[name] = (len(run.tokens[0]) - 1) / (time.perf_counter() - start - run.first_token_seconds)
        return found


def generate_following(planner: Any, model: Any, prompt: list[int], options: Any) -> Any:
    """Generate in mode ``auto`` with a planner of one's own."""
    from tidar_megatron.inference.engine import Engine
    from tidar_megatron.inference.request import Generation
    from tidar_megatron.inference.sequence import Sequence

    sequence, done = Sequence(model, prompt, options), Generation.of(model, options)
    engine = Engine(model, 1, sequence.room, planner=planner)
    engine.enqueue(sequence)
    while not engine.is_idle:
        for _, step in engine.step():
            done.add(step)
    return done


def in_batches(model: Any, prompts: list[list[int]], plans: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens/s of batches of prompts, plans in turns."""
    from tidar_megatron.inference.engine import generate_batch

    rows = []
    for first in range(0, len(prompts) - BATCH + 1, BATCH):
        row = {}
        for name in OF_BATCHES[:: -1 if first // BATCH % 2 else 1]:
            begin = time.perf_counter()
            done = generate_batch(model, prompts[first : first + BATCH], plans[name], BATCH)
            row[name] = sum(len(one.token_ids) for one in done) / (time.perf_counter() - begin)
        rows.append(row)
    return rows


def training(run: Path) -> dict[str, Any]:
    """Return the minutes of a run, its masks, and its evaluations.

    A step's time is the median of the run's, because a run may have been stopped, or other programs have run beside it.
    """
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    config = yaml.safe_load((run / "resolved_config.yaml").read_text())
    minutes = statistics.median(line["step_seconds"] for line in steps) / 60
    sequences = steps[-1]["consumed_sequences"] // steps[-1]["iteration"]
    masks = sequences * config["tidar"]["blocks_per_sequence"] * config["tidar"]["block_size"]
    return {
        "minutes": round(minutes * steps[-1]["iteration"], 1),
        "iterations": steps[-1]["iteration"],
        "mask_tokens": masks * steps[-1]["iteration"],
        "evaluations": [
            {
                "iteration": line["iteration"],
                "minutes": round(minutes * line["iteration"], 1),
                "mask_tokens": masks * line["iteration"],
                **line["eval"],
            }
            for line in metrics
            if "eval" in line
        ],
    }


def of(rows: list[dict[str, Any]], plan: str) -> tuple[float, float]:
    """Return the mean tokens per forward of a plan, and the median of its tokens/s over AR's."""
    forward = statistics.mean(row["plans"][plan][0] for row in rows)
    return forward, statistics.median(row["plans"][plan][1] / row["plans"]["ar"][1] for row in rows)


def in_all(rows: list[dict[str, Any]], plan: str) -> float:
    """Return the tokens/s of all prompts together."""
    return sum(row["tokens"] for row in rows) / sum(row["tokens"] / row["plans"][plan][1] for row in rows)


def llama_speeds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median tokens/s of llama.cpp, by its file."""
    names = rows[0].get("llama", {})
    return {name: round(statistics.median(row["llama"][name] for row in rows), 1) for name in names}


def is_varied(row: dict[str, Any]) -> bool:
    """Return whether the AR output of a prompt is long and varied enough to count."""
    return row["distinct_4grams"] >= VARIED and row["tokens"] >= LEAST


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures in short, over the prompts whose AR output is varied."""
    counted = [row for row in found["rows"] if is_varied(row)]
    trained = [row for row in counted if row["kind"] != "other"]
    other = [row for row in counted if row["kind"] == "other"]
    losses = [one["ar_loss"] for one in (found["training"] or {}).get("evaluations", [])]
    return {
        "tokens_per_forward": round(of(trained, FREE)[0], 3),
        "drafts_alone": round(of(trained, "all:8")[0], 3),
        "auto_tokens_per_forward": round(of(trained, "auto")[0], 3),
        "auto_over_ar": round(of(trained, "auto")[1], 3),
        "auto_over_ar_in_all": round(in_all(trained, "auto") / in_all(trained, "ar"), 3),
        "lookup_over_ar": round(of(trained, "lookup:8")[1], 3),
        "auto_tokens_per_second": round(in_all(trained, "auto"), 1),
        "llama_tokens_per_second": llama_speeds(trained),
        "other_tokens_per_forward": round(of(other, "all:8")[0], 3) if other else None,
        "ar_loss_difference": max(losses) - min(losses) if losses else None,
        "distinct_4grams": round(statistics.mean(row["distinct_4grams"] for row in trained), 3),
        "prompts": len(trained),
        "identical_to_ar": sum(row["identical"] for row in found["rows"]),
        "outputs": sum(len(row["plans"]) for row in found["rows"]),
        "dtype": found["dtype"],
        "draft_rank": found["draft_rank"],
        "train_minutes": (found["training"] or {}).get("minutes"),
    }


def table(found: dict[str, Any]) -> str:
    """Return the tables: plans by kind of text, batches, and evaluations in training."""
    plans = [*PLANS[1:], FREE]
    lines = ["| prompts | varied | AR tokens/s | " + " | ".join(plans) + " |", "|---|---|---|" + "---|" * len(plans)]
    kinds = dict.fromkeys(row["kind"] for row in found["rows"])
    groups = {kind: [row for row in found["rows"] if row["kind"] == kind] for kind in kinds}
    groups = {"all but other": [row for row in found["rows"] if row["kind"] != "other"], **groups}
    for kind, rows in groups.items():
        varied = [row for row in rows if is_varied(row)]
        if not varied:
            continue
        cells = [f"{forward:.2f} ({over:.2f})" for forward, over in (of(varied, plan) for plan in plans)]
        cells[-1] = cells[-1].split()[0]
        ar = statistics.median(row["plans"]["ar"][1] for row in varied)
        lines.append(f"| {kind} | {len(varied)} of {len(rows)} | {ar:.0f} | {' | '.join(cells)} |")
    names = [name for name in OF_BATCHES if name != "ar"]
    batches = found["batches"]
    over = [f"{name} {statistics.median(row[name] / row['ar'] for row in batches):.2f}" for name in names if batches]
    identical, outputs = found["summary"]["identical_to_ar"], found["summary"]["outputs"]
    lines += ["", f"Batches of {BATCH}, all prompts, tokens/s over AR's: {', '.join(over)}."]
    short = found["summary"]
    lines += [f"{identical:,} of {outputs:,} outputs are AR's own; {found['dtype']}.", ""]
    lines += [f"All varied prompts but other together: auto {short['auto_over_ar_in_all']:.2f} times AR."]
    if short["llama_tokens_per_second"]:
        theirs = [
            f"{name} ({found['llama_bits'][name.split()[-1]]:g} bits) {speed:.0f}"
            for name, speed in short["llama_tokens_per_second"].items()
        ]
        lines += [f"Tokens/s: auto {short['auto_tokens_per_second']:.0f}; {', '.join(theirs)}.", ""]
    if found["training"] is not None:
        lines += ["| step | minutes | mask tokens | AR loss | greedy tokens per forward |", "|---|---|---|---|---|"]
        for one in found["training"]["evaluations"]:
            shown = f"{one['ar_loss']:.4f} | {one['greedy_tokens_per_forward']:.2f}"
            lines.append(f"| {one['iteration']} | {one['minutes']:.0f} | {one['mask_tokens']:,} | {shown} |")
    machine = found["machine"]
    lines += ["", f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}."]
    return "\n".join(lines)


def plot(found: dict[str, Any], path: str) -> None:
    """Draw tokens per forward over training, and tokens/s over AR's by plan, for prompts of trained and other kinds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    evaluations = found["training"]["evaluations"]
    masks = [one["mask_tokens"] / 1e6 for one in evaluations]
    left.plot(masks, [one["greedy_tokens_per_forward"] for one in evaluations], "o-")
    left.set(xlabel="mask tokens, millions", ylabel="greedy tokens per forward, held out", ylim=(1, None))
    minutes = left.twiny()
    minutes.set(xlabel="minutes", xlim=[edge * evaluations[-1]["minutes"] / masks[-1] for edge in left.get_xlim()])
    counted = [row for row in found["rows"] if is_varied(row)]
    for shift, name, rows in (
        (-0.2, "trained kinds", [row for row in counted if row["kind"] != "other"]),
        (0.2, "other", [row for row in counted if row["kind"] == "other"]),
    ):
        heights = [of(rows, plan)[1] for plan in PLANS]
        right.bar([place + shift for place in range(len(PLANS))], heights, 0.4, label=name)
    right.set_xticks(range(len(PLANS)), PLANS, rotation=45)
    right.set(ylabel="tokens/s over AR's")
    right.axhline(1, color="grey", linewidth=0.8)
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_tool(main)
