"""SmolLM2 before and after it learned to draft: AR loss on held-out text, acceptance, tokens per forward, what it says.

python examples/smollm2/measure.py --before FOLDER --after RUN --valid-data SHARDS --output FILE.json
"""

import json
import sys
from pathlib import Path

from tidar_megatron.errors import OneLineParser, run_tool

WINDOWS, WINDOW, PROMPT, NEW_TOKENS = 24, 512, 128, 64


def main() -> None:
    """Measure both, write JSON, print what came out."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0])
    for name in ("before", "after", "valid-data", "output"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    from tidar_megatron.benchmark.measuring import machine
    from tidar_megatron.data.shards import ShardedDocuments
    from tidar_megatron.evaluation.certificate import read_prompts
    from tidar_megatron.evaluation.decoding import compare_plans
    from tidar_megatron.inference.engine import generate
    from tidar_megatron.inference.model import load_model
    from tidar_megatron.inference.request import DecodeOptions
    from tidar_megatron.inference.scoring import score

    run, documents = Path(args.after), ShardedDocuments(args.valid_data)
    windows = [documents[n][:WINDOW].tolist() for n in range(len(documents)) if len(documents[n]) >= WINDOW][:WINDOWS]
    questions = read_prompts(Path(__file__).parent / "prompts.jsonl")
    sides, said = {}, {}
    models = {
        side: load_model(folder, dtype="float32") for side, folder in (("before", args.before), ("after", run / "hf"))
    }
    for side, model in models.items():
        scores = score(model, [(window[:1], window[1:]) for window in windows])
        sides[side] = {"ar_loss": -sum(s.logprob for s in scores) / sum(len(window) - 1 for window in windows)}
        answers = DecodeOptions("ar", max_new_tokens=32)
        said[side] = [
            model.tokenizer.decode(generate(model, model.tokenizer.encode(text), answers).token_ids)
            for text in questions
        ]
    plans = {
        "all:8": DecodeOptions("tidar", 8),
        "1:8": DecodeOptions("tidar", 8, 1),
        "2:8": DecodeOptions("tidar", 8, 2),
    }
    plans |= {"linear:8": DecodeOptions("linear", 8), "auto": DecodeOptions(), "lookup:8": DecodeOptions("lookup", 8)}
    figures = compare_plans(models["after"], [window[:PROMPT] for window in windows[:8]], plans, NEW_TOKENS)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {
        "benchmark": "smollm2",
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "clean_tokens_trained": [m["consumed_sequences"] for m in metrics if "loss" in m][-1] * WINDOW,
        **sides,
        "evaluations": [{"iteration": m["iteration"], **m["eval"]} for m in metrics if "eval" in m],
        "plans": {name: one.as_dict() for name, one in figures.items()},
        "generations": [
            {"prompt": prompt, "before": before, "after": after}
            for prompt, before, after in zip(questions, said["before"], said["after"], strict=True)
        ],
    }
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps({key: value for key, value in result.items() if key not in ("generations", "evaluations")}, indent=1)
    )


if __name__ == "__main__":
    run_tool(main)
