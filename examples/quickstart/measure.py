"""Decode held-out prompts with every plan; print a table, and write ``summary.json`` and a plot to the run's folder.

python examples/quickstart/measure.py --run runs/quickstart --valid-data data/quickstart/valid
"""

import json
import platform
from pathlib import Path
from typing import Any

from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser, run_tool

PROMPTS_WRITTEN, PROMPTS_DECODED, NEW_TOKENS = 240, 24, 128
PROMPT_BYTES = 128
HEADLINE = "tidar, 2 branches, K=8"  # chosen before measuring, not after
EXAMPLE = '{"geonameid": 2950159, "name":'


def plans() -> dict[str, Any]:
    """Return the decoding plans of the table by name; they differ in mode, draft length and branches."""
    from tidar_megatron.inference.request import DecodeOptions

    return {
        "auto, the planner's choice": DecodeOptions(),
        "tidar, all branches, K=4": DecodeOptions("tidar", 4),
        "tidar, all branches, K=8": DecodeOptions("tidar", 8),
        "tidar, 1 branch, K=8": DecodeOptions("tidar", 8, 1),
        HEADLINE: DecodeOptions("tidar", 8, 2),
        "prompt-lookup, K=8": DecodeOptions(mode="lookup", draft_length=8),
    }


def heldout_prompts(folder: str, count: int) -> list[str]:
    """Return ``count`` prompts spread over the held-out documents, each the first 128 bytes of a row.

    Prompt and output together have 256 tokens, the sequence length of training, so no position is extrapolated.

    Raises:
        UserError: the held-out documents have too few rows.
    """
    from tidar_megatron.data.shards import ShardedDocuments

    documents = ShardedDocuments(folder)
    tokenizer = documents.load_tokenizer()
    prompts = []
    for number in range(len(documents)):
        rows = tokenizer.decode(documents[number][:].tolist(), skip_special_tokens=True).splitlines()
        prompts += [row.encode()[:PROMPT_BYTES].decode(errors="ignore") for row in rows]
    step = max(len(prompts) // count, 1)
    if len(prompts) < count:
        raise UserError(f"{folder}: has {len(prompts)} prompts, but {count} are needed; hold out more documents")
    return prompts[::step][:count]


def main() -> None:
    """Measure all plans, then write and print the results."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", required=True, help="the training run's folder, with its export in hf/")
    parser.add_argument("--valid-data", required=True, help="folder of held-out shards")
    args = parser.parse_args()
    from tidar_megatron.evaluation.decoding import compare_plans
    from tidar_megatron.inference.dtype import dtype_name
    from tidar_megatron.inference.loading import load_model
    from tidar_megatron.inference.text import encode_prompt

    run, folder = Path(args.run), str(Path(args.run) / "hf")
    prompts = heldout_prompts(args.valid_data, PROMPTS_WRITTEN)
    heldout = run / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")

    model = load_model(folder, dtype="float32")  # bfloat16 rounds logits to ties, where outputs may part from AR's
    decoded = [encode_prompt(model, prompt) for prompt in prompts[:: PROMPTS_WRITTEN // PROMPTS_DECODED]]
    print(f"decoding {len(decoded)} prompts with {len(plans()) + 2} plans ...", flush=True)
    figures = compare_plans(model, decoded, plans(), NEW_TOKENS, transformers_folder=folder)
    stock = figures["transformers generate"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = {
        "model": folder,
        "heldout": str(heldout),
        "prompts": len(decoded),
        "new_tokens": NEW_TOKENS,
        "dtype": dtype_name(model.dtype),
        "plan": HEADLINE,
        "identical_to_ar": all(f.identical_to_ar for f in figures.values()),  # every plan, and transformers
        "tokens_per_forward": figures[HEADLINE].tokens_per_forward,
        "speedup_over_ar": figures[HEADLINE].speedup_over_ar,
        "distinct_4grams": figures[HEADLINE].distinct_4grams,
        "lookup": figures["prompt-lookup, K=8"].as_dict(),
        "ar_over_transformers_generate": 1 / stock.speedup_over_ar,
        "evaluation": [m["eval"] for m in metrics if "eval" in m][-1],
        "plans": {name: f.as_dict() for name, f in figures.items()},
        "machine": machine(),
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_table(figures, summary)
    draw(run / "quickstart.png", metrics, figures)
    print(f"{run / 'summary.json'}, {run / 'quickstart.png'}")
    print(f"try it: . .venv/bin/activate; tidar generate --model {folder} --plan 2:8 --prompt '{EXAMPLE}'")
    if any(f.different for f in figures.values()):
        raise UserError(f"{run / 'summary.json'}: a plan's output differs from AR's; please report this file")


def machine() -> str:
    """Return the processor, threads and library versions, on which the figures depend."""
    import torch

    from tidar_megatron.inference.costs import processor

    name = processor()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{name}, {threads} threads, Python {platform.python_version()}, torch {torch.__version__}"


def print_table(figures: dict[str, Any], summary: dict[str, Any]) -> None:
    """Print the README's table."""
    from rich.console import Console
    from rich.table import Table

    title = f"{summary['prompts']} held-out prompts x {NEW_TOKENS} tokens, {summary['dtype']}, greedy, prefill excluded"
    table = Table(title=title, caption="speeds: medians over the prompts, plans interleaved prompt by prompt")
    for column in ("plan", "tokens/forward", "tokens/s", "speed-up over AR", "identical to AR", "distinct 4-grams"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, f in figures.items():
        same = "yes" if f.identical_to_ar else "NO" if f.different else f"except ties: {f.ties}"
        row = (f"{f.tokens_per_forward:.2f}", f"{f.tokens_per_second:.0f}", f"{f.speedup_over_ar:.2f}", same)
        table.add_row(name, *row, f"{f.distinct_4grams:.2f}")
    Console(width=120).print(table)
    print(f"machine: {summary['machine']}")


def draw(path: Path, metrics: list[dict[str, Any]], figures: dict[str, Any]) -> None:
    """Plot the training losses, acceptance by offset, and each plan's tokens per forward and speed-up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [m for m in metrics if "loss" in m]
    evaluation = [m["eval"] for m in metrics if "eval" in m][-1]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), width_ratios=[1, 0.8, 1.2], layout="constrained")
    left.plot([m["iteration"] for m in steps], [m["ar_loss"] for m in steps], label="next token (AR)")
    joint = [m for m in steps if m["diffusion_loss"] is not None]
    left.plot([m["iteration"] for m in joint], [m["diffusion_loss"] for m in joint], label="one-step diffusion")
    left.set(title="Training loss", xlabel="step", ylabel="nats per byte", ylim=(0, 3))
    left.legend(frameon=False)

    offsets = range(1, len(evaluation["acceptance_by_offset"]) + 1)
    middle.plot(offsets, evaluation["acceptance_by_offset"], "o-", label="sampling: sum of min(p, q)")
    middle.plot(offsets, evaluation["agreement_by_offset"], "s--", label="greedy: same argmax")
    middle.set(title="Draft acceptance (held-out)", xlabel="offset in the block", ylim=(0, 1.02))
    middle.legend(frameon=False, loc="lower left")

    names = list(figures)
    places = range(len(names))
    tpf = right.barh([p - 0.2 for p in places], [figures[n].tokens_per_forward for n in names], 0.38)
    speed = right.barh([p + 0.2 for p in places], [figures[n].speedup_over_ar for n in names], 0.38)
    for bars in (tpf, speed):
        right.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    right.set_yticks(list(places), names)
    right.invert_yaxis()
    right.set_title("Decoding, per plan")
    right.legend([tpf, speed], ["tokens per forward", "speed-up over AR"], frameon=False, loc="upper right")
    right.margins(x=0.08)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    run_tool(main)
