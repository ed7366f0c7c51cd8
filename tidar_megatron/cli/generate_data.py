"""Continue prompts with a model, many at once, and write its own text as shards to train drafts on.

tidar generate-data --model DIR --prompts FILE.jsonl --output SHARDS [--held-out 40 --held-out-output SHARDS]
"""

import sys
from pathlib import Path

from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser, importing, keep_threads_awake


def main() -> None:
    """Parse the command line, generate what is missing, and write the shards."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder with a tokenizer")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help='JSON lines: strings, or objects with a "prompt"'
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of shards; DIR.jsonl records the texts")
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="the last N prompts are held out [0]")
    parser.add_argument("--held-out-output", metavar="DIR", help="folder of their shards")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts to continue [all]")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="of each text [160]")
    parser.add_argument("--max-prompt-tokens", type=int, default=128, metavar="N", help="the last N of a prompt [128]")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts generated together [64]")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="[0: greedy]")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws [0]")
    parser.add_argument(
        "--min-distinct",
        type=float,
        default=0.0,
        metavar="F",
        help="cut a text where it has fewer distinct 4-grams [0]",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="default: auto, bfloat16 where it is faster, else float32")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    args = parser.parse_args()
    keep_threads_awake()
    for name, least in (
        ("max_new_tokens", 1),
        ("max_prompt_tokens", 1),
        ("batch_size", 1),
        ("held_out", 0),
        ("limit", 1),
    ):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if not 0 <= args.min_distinct <= 1:
        raise UserError(f"--min-distinct {args.min_distinct:g}: is a fraction of a text's 4-grams; give 0 to 1")
    if (args.held_out > 0) != (args.held_out_output is not None):
        raise UserError("--held-out and --held-out-output go together: give both or neither")
    if args.held_out_output and Path(args.held_out_output).resolve() == Path(args.output).resolve():
        raise UserError(f"--held-out-output {args.held_out_output}: is the same folder as --output; choose another")
    from transformers.utils import logging

    with importing():
        from tidar_megatron.data.shard_writer import check_output
        from tidar_megatron.evaluation.certificate import read_prompts
        from tidar_megatron.inference.loading import load_model
        from tidar_megatron.inference.request import DecodeOptions
        from tidar_megatron.inference.sampling import SamplingOptions
        from tidar_megatron.inference.text import encode_prompt
        from tidar_megatron.own_text import write_own_shards, write_own_text

    logging.disable_progress_bar()
    folders = [args.output] if args.held_out_output is None else [args.output, args.held_out_output]
    for folder in folders:
        check_output(folder, args.overwrite)
    texts = read_prompts(args.prompts)[: args.limit]
    if args.held_out >= len(texts):
        raise UserError(f"--held-out {args.held_out}: leaves none of {len(texts)} prompts to train on; add prompts")
    model = load_model(args.model, args.device, args.dtype)
    if getattr(model.tokenizer, "eos_token_id", None) is None:
        raise UserError(f"--model {args.model}: its tokenizer has no end-of-sequence token, which shards need; set one")
    prompts = [encode_prompt(model, text)[-args.max_prompt_tokens :] for text in texts]
    sampling = SamplingOptions(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    options = DecodeOptions("ar", max_new_tokens=args.max_new_tokens, sampling=sampling)
    record = Path(f"{args.output.rstrip('/')}.jsonl")
    found = write_own_text(model, args.model, prompts, options, record, args.batch_size, say)
    manifests = write_own_shards(model, args.model, found, folders, args.held_out, args.overwrite, args.min_distinct)
    for folder, manifest in zip(folders, manifests, strict=True):
        part, own_tokens = manifest.source["part"], manifest.source["own_tokens"]
        own = f"{own_tokens:,} tokens of the model's own among {manifest.tokens:,}"
        print(f"{folder}: {part} data: {manifest.documents:,} texts, {own}")


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)
