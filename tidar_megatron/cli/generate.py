"""Continue a prompt with an exported checkpoint, as it streams.

    tidar generate --model DIR --prompt TEXT [--mode tidar|linear|ar|lookup] [--temperature T] ...

In a terminal each colour is what one forward committed. Ends with tokens per forward, tokens per second and the
share of distinct 4-grams (1.0: nothing repeats). ``--json`` prints one JSON object instead and nothing else.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable

from tidar_megatron.errors import UserError
from tidar_megatron.inference.plans import Mode, Plan, plan_named
from tidar_megatron.program import OneLineParser, importing, keep_threads_awake

COLOURS = ("green", "cyan", "yellow")


def parse_branches(text: str) -> int | str:
    """Return ``all`` or a number as it was given; the engine checks it."""
    try:
        return int(text)
    except ValueError:
        return text


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(description="Continue a prompt, drafting and verifying in one forward (TiDAR).")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder of an exported checkpoint")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="-: what standard input holds")
    parser.add_argument(
        "--plan", metavar="NAME", help="auto (default), ar, linear:K, lookup:K, all:K, or 2:K, 2 branches"
    )
    parser.add_argument("--explain-plan", action="store_true", help="end with what plan auto chose")
    parser.add_argument("--mode", choices=["auto", "tidar", "linear", "ar", "lookup"], help="instead of --plan")
    parser.add_argument("--draft-length", type=int, metavar="K", help="for --mode; default: the model's block size")
    parser.add_argument(
        "--branches", type=parse_branches, metavar="all|N", help="for --mode tidar; N: the N likeliest; default: all"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="strings that end the output")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="from the likeliest that make up P")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="from those P times as likely as the first"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: less of the same")
    parser.add_argument("--min-new-tokens", type=int, default=0, metavar="N", help="no end-of-sequence token before")
    parser.add_argument("--seed", type=int, metavar="N", help="the same tokens again, with a --plan that is named")
    parser.add_argument(
        "--trust-ratio", type=float, default=1.0, metavar="B", help="below 1 trusts drafts; no longer AR's output"
    )
    parser.add_argument("--logprobs", action="store_true", help="with --json: log-probability of each token")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="default: auto, bfloat16 where it is faster, else float32")
    parser.add_argument("--adapter", metavar="DIR", help="draft weights for this model, from tidar convert export")
    parser.add_argument("--quantize", metavar="BITS", help="int8 or int4: decode with quantized weights, on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args()


def plan_of(args: argparse.Namespace) -> Plan:
    """Return the plan that the flags name.

    Raises:
        UserError: the flags contradict each other.
    """
    single = args.mode, args.draft_length, args.branches
    if args.plan is not None:
        if single != (None, None, None):
            raise UserError(f"--plan {args.plan}: names it all; leave --mode, --draft-length and --branches out")
        return plan_named(args.plan)
    fixed = args.draft_length is not None or args.branches is not None or args.trust_ratio < 1
    mode: Mode = args.mode or ("tidar" if fixed else "auto")
    if mode != "tidar" and args.branches is not None:  # options cannot tell "all" from their default
        raise UserError(f"--mode {mode}: takes no --branches; leave them out, or use --mode tidar")
    return Plan(mode, args.draft_length, "all" if args.branches is None else args.branches)


def read_standard_input() -> str:
    """Return standard input unchanged, the end of its last line included."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is not UTF-8: {error}") from None


def of_a_draw(args: argparse.Namespace) -> dict[str, bool]:
    """Return the flags that only affect sampling, and whether each was given."""
    given = {"--top-k": args.top_k is not None, "--top-p": args.top_p != 1, "--min-p": args.min_p != 0}
    return given | {"--seed": args.seed is not None}


def main() -> None:
    args = parse_args()
    keep_threads_awake()
    if "" in args.stop:
        raise UserError("--stop '': give strings of at least one character")
    plan = plan_of(args)
    # After parsing, so that --help does not wait for torch.
    from transformers.utils import logging

    with importing():
        from tidar_megatron.inference.dtype import dtype_note
        from tidar_megatron.inference.engine import generate
        from tidar_megatron.inference.loading import load_model
        from tidar_megatron.inference.planner import planner_of
        from tidar_megatron.inference.request import DecodeOptions
        from tidar_megatron.inference.sampling import SamplingOptions
        from tidar_megatron.inference.text import TextStream, continuation, encode_prompt

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_model(args.model, args.device, args.dtype, quantize=args.quantize, adapter=args.adapter)
    prompt = encode_prompt(model, read_standard_input() if args.prompt == "-" else args.prompt)
    trained = (getattr(model.causal_lm.config, "tidar", None) or {}).get("seq_length")
    if trained and len(prompt) + args.max_new_tokens > trained:
        total = len(prompt) + args.max_new_tokens
        print(f"note: up to {total} tokens; the model was trained on sequences of {trained}", file=sys.stderr)
    options = DecodeOptions(
        *plan,
        max_new_tokens=args.max_new_tokens,
        ignore_eos=args.ignore_eos,
        stop=tuple(args.stop),
        sampling=SamplingOptions(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            min_new_tokens=args.min_new_tokens,
            seed=args.seed,
        ),
        trust_ratio=args.trust_ratio,
        logprobs=args.logprobs,
    )
    if idle := [name for name, value in of_a_draw(args).items() if value and not args.temperature]:
        print(f"note: {', '.join(idle)}: of no effect at temperature 0, which is greedy", file=sys.stderr)
    if args.logprobs and not args.json:
        print("note: --logprobs: printed with --json alone", file=sys.stderr)
    K, B = options.draft_length or 1, model.block_size
    if options.mode in ("tidar", "linear") and B and model.is_tidar and K > B:
        print(f"note: {K} drafts at once; the model has learned blocks of {B}", file=sys.stderr)
    if options.mode == "auto" and model.mask_token_id is None:
        print("note: the model's config.json has no tidar section: plain autoregression", file=sys.stderr)
    if args.explain_plan and (options.mode != "auto" or model.mask_token_id is None):
        raise UserError("--explain-plan: needs --plan auto and a model that drafts")

    def say_dtype() -> None:  # after decoding, so that an error stays the only line
        if note := dtype_note(args.dtype, model.device, model.dtype):
            print(note, file=sys.stderr)

    if args.json:
        generation = generate(model, prompt, options)
        text = continuation(model.tokenizer, prompt, generation.token_ids)
        say_dtype()
        print(json.dumps({"text": text} | generation.summary()))
        return

    write = make_writer()
    pieces = TextStream(model.tokenizer, prompt)
    generation = generate(model, prompt, options, on_step=lambda step: write(pieces.push(step.tokens)))
    write(pieces.flush())
    if generation.stop == "context":
        print(f"\nstopped: prompt and output fill the model's context of {model.context_limit} tokens", file=sys.stderr)
    print(
        f"\n\n{generation.tokens_per_forward:.2f} tokens per forward, {generation.tokens_per_second:.1f} tokens/s, "
        f"distinct 4-grams {generation.distinct_4grams:.2f}"
    )
    say_dtype()
    if args.explain_plan:
        print(f"\n{planner_of(model).explain()}")


def make_writer() -> Callable[[str], None]:
    """Return a function that writes a piece of text at once; in a terminal each forward has its own colour."""
    if not sys.stdout.isatty():
        return lambda piece: print(piece, end="", flush=True)

    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    colours = itertools.cycle(COLOURS)

    def write(piece: str) -> None:
        console.print(Text(piece, style=next(colours)), end="", soft_wrap=True)

    return write
