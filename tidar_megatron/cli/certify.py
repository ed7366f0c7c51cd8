"""Prove for a checkpoint, dtype and machine that drafting changes nothing but the speed.

tidar certify --model DIR --prompts FILE.jsonl [--json]
"""

import json
import sys

from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser, importing, keep_threads_awake


def main() -> None:
    """Decode with every plan, compare, and report; exit with status 1 if the certificate does not hold."""
    parser = OneLineParser(description="Greedy output against transformers' generate; the sampled distribution.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines: strings, or with a prompt")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each prompt [128]")
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[2, 4, 8, 16], metavar="K", help="[2 4 8 16]")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="drawn with each plan [2000]; 0: none")
    parser.add_argument(
        "--mask-token-id", type=int, metavar="ID", help="draft with this token where the model has none"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", default="float32", help="default: float32, also on a GPU: narrower types make ties; or auto"
    )
    parser.add_argument(
        "--bitwise", action="store_true", help="compare the logits of all plans, batches and chunkings, bit by bit"
    )
    parser.add_argument("--adapter", metavar="DIR", help="draft weights for this model, from tidar convert export")
    parser.add_argument(
        "--quantize", metavar="BITS", help="int8 or int4, on a CPU: --bitwise, as transformers cannot run these weights"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, as the last line")
    args = parser.parse_args()
    keep_threads_awake()
    for name, value, least in (
        ("--limit", args.limit, 1),
        ("--max-new-tokens", args.max_new_tokens, 1),
        ("--samples", args.samples, 0),
        *(("--draft-lengths", K, 1) for K in args.draft_lengths),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} {value}: must be at least {least}")
    with importing():
        from tidar_megatron.evaluation import bitwise, certificate  # heavy: after the command line is known to be sound
        from tidar_megatron.inference.dtype import dtype_name, dtype_note
        from tidar_megatron.inference.loading import load_model
        from tidar_megatron.inference.text import encode_prompt

    texts = certificate.read_prompts(args.prompts)[: args.limit]
    more = {"quantize": args.quantize, "adapter": args.adapter}
    model = load_model(args.model, args.device, args.dtype, args.mask_token_id, **more)
    if note := dtype_note(args.dtype, model.device, model.dtype):
        say(note)
    prompts = [encode_prompt(model, text) for text in texts]
    runs = certificate.plans(args.draft_lengths, drafts=model.mask_token_id is not None)
    if args.quantize:
        say(f"quantize {args.quantize}: transformers cannot run it; compared bit by bit with the engine's own AR")
    if args.bitwise or args.quantize:
        report = bitwise.check_bitwise(model, prompts, args.max_new_tokens, runs, say)
        if args.json:
            print(json.dumps(report.as_dict()))
        else:
            show_bitwise(report)
        sys.exit(0 if report.holds else 1)
    found = certificate.certify(model, args.model, prompts, args.max_new_tokens, runs, args.samples, say)
    if args.json:
        print(json.dumps({"dtype": dtype_name(model.dtype), **found.as_dict()}))
    else:
        show(found)
    sys.exit(0 if found.holds else 1)


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def show_bitwise(report) -> None:  # type: ignore[no-untyped-def]
    """Print the table of bitwise comparisons and the verdict."""
    from rich.console import Console
    from rich.table import Table

    from tidar_megatron.inference.costs import processor

    table = Table("plan", "batch", "prompt chunk", "equal logits", "equal tokens", "first difference")
    for run in report.runs:
        first = f"prompt {run.first['prompt']}, token {run.first['position']}" if run.first else ""
        numbers = (run.batch, run.prompt_chunk, run.equal, run.same_tokens)
        table.add_row(run.plan, *map(str, numbers), first)
    Console(width=100).print(table)
    verdict = "are equal in every bit" if report.holds else "DIFFER in some bits"
    print(f"{report.prompts} prompts, {report.weights}, {processor()}: the logits of all runs {verdict}")


def show(found) -> None:  # type: ignore[no-untyped-def]
    """Print the table and the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table("plan", "batch", "identical", "ties", "different", title=f"{found.prompts} prompts, greedy")
    for run in found.runs:
        table.add_row(run.plan, str(run.batch), *(str(n) for n in (run.identical, len(run.ties), len(run.differences))))
    console = Console(width=100)
    console.print(table)
    if found.sampled:
        table = Table("plan", "samples", "p-value", title="sampled: chi-square against the model's distribution")
        for test in found.sampled:
            table.add_row(test["plan"], str(test["samples"]), f"{test['p_value']:.3f}")
        console.print(table)
    verdict = "holds" if found.holds else "does NOT hold"
    same = f"{found.identical} of {found.prompts} prompts identical in every run, {found.ties} tied"
    print(f"{same}: the certificate {verdict}")
