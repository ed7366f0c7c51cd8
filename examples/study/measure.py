"""One trained model of the study: its losses, and how it decodes held-out prompts. Writes result.json beside it.

python examples/study/measure.py RUN VALID_DATA STUDY BLOCK_SIZE
"""

import json
import sys
from pathlib import Path

from variants import STUDIES, Study


def main(run: Path, valid: str, study: Study, block_size: int) -> None:
    """AR loss, diffusion loss, expected and real tokens per forward, loops, and what trusting the drafts does."""
    import torch

    from tidar_megatron.data.shards import ShardedDocuments
    from tidar_megatron.evaluation.decoding import spread_pieces
    from tidar_megatron.inference.engine import generate
    from tidar_megatron.inference.loading import load_model
    from tidar_megatron.inference.request import DecodeOptions
    from tidar_megatron.inference.scoring import score

    torch.set_num_threads(1)
    evaluation = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluation = [line["eval"] for line in evaluation if "eval" in line][-1]
    result = {
        "ar_loss": evaluation["ar_loss"],
        "diffusion_loss": evaluation["diffusion_loss"],
        "expected_tokens_per_forward": evaluation["tokens_per_forward"],
        "acceptance_by_offset": evaluation["acceptance_by_offset"],
    }
    documents, model = ShardedDocuments(valid), load_model(run / "hf", dtype="float32")
    prompts = spread_pieces(documents, study.prompts, study.prompt_tokens)
    for trust in study.trust:
        options = DecodeOptions(
            "tidar", block_size, max_new_tokens=study.new_tokens, ignore_eos=True, trust_ratio=trust
        )  # every branch: the paper's plan, and the only one that can trust its drafts
        made = [generate(model, prompt, options) for prompt in prompts]
        forwards = sum(one.forwards for one in made)
        logprobs = [one.logprob for one in score(model, [(p, g.token_ids) for p, g in zip(prompts, made, strict=True)])]
        result[f"trust {trust:g}"] = {
            "tokens_per_forward": sum(sum(one.emitted) for one in made) / forwards,
            "distinct_4grams": sum(one.distinct_4grams for one in made) / len(made),
            "ar_nats_per_token": -sum(logprobs) / sum(len(one.token_ids) for one in made),
        }
    (run / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], STUDIES[sys.argv[3]], int(sys.argv[4]))
