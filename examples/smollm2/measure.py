"""Measure SmolLM2 before and after it learned to draft: held-out AR loss, acceptance, tokens per forward, samples.

python examples/smollm2/measure.py --before FOLDER --after RUN --valid-data SHARDS --output FILE.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tidar_megatron.program import OneLineParser, run_tool

WINDOW, PROMPT = 512, 128  # tokens per held-out window (for the AR loss) and per prompt (for the speed)


def main() -> None:
    """Measure both models, write the JSON file and print the tables."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0])
    for name in ("before", "after", "valid-data", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--windows", type=int, default=48, help=f"windows of {WINDOW} tokens, for the AR loss [48]")
    parser.add_argument("--prompts", type=int, default=24, help=f"prompts of {PROMPT} tokens, for the speed [24]")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to generate for each prompt [64]")
    args = parser.parse_args()
    from tidar_megatron.benchmark.measuring import machine
    from tidar_megatron.data.shards import ShardedDocuments
    from tidar_megatron.evaluation.certificate import read_prompts
    from tidar_megatron.evaluation.decoding import compare_plans, spread_pieces
    from tidar_megatron.inference.dtype import dtype_name
    from tidar_megatron.inference.engine import generate
    from tidar_megatron.inference.loading import load_model
    from tidar_megatron.inference.request import DecodeOptions, parse_plan
    from tidar_megatron.inference.scoring import score
    from tidar_megatron.inference.text import continuation

    run, documents = Path(args.after), ShardedDocuments(args.valid_data)
    windows = spread_pieces(documents, args.windows, WINDOW)
    questions = read_prompts(Path(__file__).parent / "prompts.jsonl")
    models = {"before": load_model(args.before, dtype="float32"), "after": load_model(run / "hf", dtype="float32")}
    losses, said = {}, {}
    for side, model in models.items():
        scores = score(model, [(window[:1], window[1:]) for window in windows])
        losses[side] = -sum(one.logprob for one in scores) / sum(len(window) - 1 for window in windows)
        ar = DecodeOptions("ar", max_new_tokens=32)
        asked = [model.tokenizer.encode(text) for text in questions]
        said[side] = [continuation(model.tokenizer, ids, generate(model, ids, ar).token_ids) for ids in asked]
    after = models["after"]
    plans = {name: parse_plan(name) for name in ("auto", "all:8", "2:8", "1:8", "1:4", "linear:8", "lookup:8")}
    prompts = spread_pieces(documents, args.prompts, PROMPT)
    figures = compare_plans(after, prompts, plans, args.max_new_tokens, transformers_folder=str(run / "hf"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    result = {
        "benchmark": "smollm2",
        "command": " ".join(["python", *sys.argv]),
        "training": "examples/smollm2/study.sh",
        "machine": machine(),
        "iterations": steps[-1]["iteration"],
        "clean_tokens": steps[-1]["consumed_sequences"] * WINDOW,
        "seconds_per_step": statistics.median(line["step_seconds"] for line in steps),
        "ar_loss": losses,
        "evaluations": [{"iteration": line["iteration"], **line["eval"]} for line in metrics if "eval" in line],
        "prompts": len(prompts),
        "new_tokens": args.max_new_tokens,
        "dtype": dtype_name(after.dtype),
        "plans": {name: one.as_dict() for name, one in figures.items()},
        "generations": [
            {"prompt": prompt, "before": before, "after": after}
            for prompt, before, after in zip(questions, said["before"], said["after"], strict=True)
        ],
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def table(found: dict[str, Any]) -> str:
    """Return the tables that benchmarks/README.md shows."""
    last, losses = found["evaluations"][-1], found["ar_loss"]
    lines = [
        f"AR loss of held-out text: {losses['before']:.3f} before, {losses['after']:.3f} after "
        f"{found['iterations']} steps, {found['clean_tokens'] / 1e3:.0f}k clean tokens.",
        "",
        f"| offset in the block | {' | '.join(str(n) for n, _ in enumerate(last['acceptance_by_offset'], start=1))} |",
        f"|---|{'---|' * len(last['acceptance_by_offset'])}",
    ]
    for name, title in (
        ("agreement_by_offset", "greedy drafts that agree"),
        ("acceptance_by_offset", "sampled, accepted"),
    ):
        lines.append(f"| {title} | {' | '.join(f'{value:.2f}' for value in last[name])} |")
    lines += [
        "",
        "| plan | tokens per forward | tokens/s | speed-up over AR | identical to AR |",
        "|---|---|---|---|---|",
    ]
    for name, one in found["plans"].items():
        cells = f"{one['tokens_per_forward']:.2f} | {one['tokens_per_second']:.1f} | {one['speedup_over_ar']:.2f}"
        same = "yes" if one["identical_to_ar"] else "no" if one["different"] else f"except ties: {one['ties']}"
        lines.append(f"| {name} | {cells} | {same} |")
    box = found["machine"]
    lines += [
        "",
        f"{found['prompts']} held-out prompts x {found['new_tokens']} tokens; {box['processor']}, {box['threads']} "
        f"threads, torch {box['torch']}; training took {found['seconds_per_step']:.1f} s a step.",
        "",
        "| prompt | before | after |",
        "|---|---|---|",
    ]
    for one in found["generations"]:
        lines.append("| " + " | ".join(_cell(one[side]) for side in ("prompt", "before", "after")) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return text escaped for a cell of a Markdown table."""
    return "`" + text.replace("\n", "\u21b5").replace("`", "'").replace("|", "\\|").strip() + "`"


if __name__ == "__main__":
    run_tool(main)
