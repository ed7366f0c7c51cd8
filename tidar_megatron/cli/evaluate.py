"""Score a model on lm-eval's tasks, local JSON lines or HumanEval, by draft/verify and by plain AR side by side.

tidar evaluate --model DIR --tasks FILE.jsonl [NAME ...] [--human-eval] [--json]
"""

import json
import sys

from tidar_megatron.errors import UserError
from tidar_megatron.inference.plans import plan_named
from tidar_megatron.program import OneLineParser, importing, keep_threads_awake


def main() -> None:
    """Parse the command line, evaluate with both, and report."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder with a tokenizer")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval's names or .yaml files, .json or .jsonl files"
    )
    parser.add_argument("--human-eval", action="store_true", help="write and RUN code, in a fence: see --help's end")
    parser.add_argument("--plan", default="auto", help="auto, linear:8, all:8, 2:8, .. [auto]")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="texts generated together [1]")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each document of lm-eval's tasks")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of HumanEval, local files [256]")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="draft with this where the model has no mask")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="default: auto, bfloat16 where it is faster, else float32")
    parser.add_argument("--adapter", metavar="DIR", help="draft weights for this model, from tidar convert export")
    parser.add_argument("--quantize", metavar="BITS", help="int8 or int4: decode with quantized weights, on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object, as the last line")
    parser.epilog = """A local file holds JSON lines of one kind, with the keys context, choices, answer (its place,
    from 0); or prompt, target, until (optional, a list of strings); or text (perplexity).
    HumanEval runs what the model wrote: without network and environment, with limits, but no wall."""
    args = parser.parse_args()
    keep_threads_awake()
    if not args.tasks and not args.human_eval:
        raise UserError("nothing to evaluate: give --tasks or --human-eval")
    for name in ("batch_size", "limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    plan_named(args.plan)  # refuses a wrong name before the imports
    with importing():
        from tidar_megatron.inference.dtype import dtype_name, dtype_note
        from tidar_megatron.inference.loading import load_model

    more = {"quantize": args.quantize, "adapter": args.adapter}
    model = load_model(args.model, args.device, args.dtype, args.mask_token_id, **more)
    if note := dtype_note(args.dtype, model.device, model.dtype):
        print(note, file=sys.stderr)
    rows = []
    if args.tasks:
        with importing():
            from tidar_megatron.evaluation.tasks import run_tasks

        rows += run_tasks(
            model, args.tasks, args.plan, args.batch_size, args.limit, args.num_fewshot, args.max_new_tokens
        )
    if args.human_eval:
        with importing():
            from tidar_megatron.evaluation.code import human_eval

        rows.append(human_eval(model, args.plan, args.batch_size, args.limit, args.max_new_tokens))
    dtype = dtype_name(model.dtype)
    show(rows, args.plan, dtype + (f" --quantize {args.quantize}" if args.quantize else ""))
    if args.json:
        settings = {"model": args.model, "dtype": dtype, "quantize": args.quantize, "plan": args.plan}
        print(json.dumps(settings | {"rows": rows}))


def number(value: float) -> str:
    """Return a score with four decimals, a large one with four digits: a perplexity has no upper bound."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def show(rows, plan, dtype) -> None:  # type: ignore[no-untyped-def]
    """Print the table, and what differs."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", plan, "ar", "tokens per forward", "tokens/s", "over AR")
    for row in rows:
        for name, value in row["scores"].items():
            speed = [f"{row[key]:.2f}" if key in row else "" for key in ("tokens_per_forward", "tokens_per_second")]
            over = f"{row['over_ar']:.2f}" if "over_ar" in row else ""
            table.add_row(row["task"], name, number(value), number(row["ar_scores"][name]), *speed, over)
    Console(width=120).print(table)
    for row in rows:
        if row["scores_differ"]:
            print(f"{row['task']}: the scores of {plan} and of AR DIFFER; tidar certify --dtype {dtype} tells where")
