"""Import a Hugging Face folder as a run, export a run's checkpoint, or verify that both are one model.

tidar convert import --hf runs/smollm2/hf --output runs/smollm2/imported
tidar convert export --checkpoint runs/quickstart --hf runs/quickstart/hf
tidar convert verify --hf runs/quickstart/hf --checkpoint runs/quickstart
"""

import argparse
import json
import os
from pathlib import Path

from tidar_megatron.config import Config, ParallelConfig, flag
from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser, importing

LAYOUT = [f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline", "expert")]


def main() -> None:
    """Parse the command line, then convert."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    to_run = verbs.add_parser("import", help="a Hugging Face folder -> a run's folder, for --init-from")
    to_run.add_argument("--hf", required=True, metavar="DIR", help="config.json and safetensors, a tokenizer or none")
    to_run.add_argument("--output", required=True, metavar="RUN", help="folder to write")
    for name in LAYOUT:
        text = "refuse now what would not fit (checkpoints know no layout)"
        to_run.add_argument(flag(name), type=int, metavar="N", help=text)
    text = "give the model a mask token, its embedding started as the others' mean, like them, or left as it is"
    to_run.add_argument("--init-mask-token", choices=["mean", "normal", "keep"], help=text + "; default: change no row")
    text = "default: a row that the tokenizer does not use, a reserved id, or one more"
    to_run.add_argument("--mask-token-id", type=int, metavar="ID", help=text)
    export = verbs.add_parser("export", help="a run's checkpoint -> a Hugging Face folder")
    export.add_argument("--checkpoint", required=True, metavar="RUN", help="folder that was --save in training")
    export.add_argument("--hf", required=True, metavar="DIR", help="folder to write")
    export.add_argument("--base", metavar="DIR", help="copy the model of draft weights beside them, into one folder")
    export.add_argument("--draft-rank", type=int, metavar="N", help="of exported draft weights [that in training]")
    export.add_argument("--max-shard-size-gb", type=float, default=5.0, metavar="GB", help="of one file [5]")
    verify = verbs.add_parser("verify", help="compare the logits of both in float32")
    verify.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    verify.add_argument("--checkpoint", required=True, metavar="RUN", help="a run's folder")
    verify.add_argument("--json", action="store_true", help="print JSON")
    for verb in (export, verify):
        verb.add_argument("--iteration", type=int, help="default: the newest")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tensors go from file to file
    if args.verb == "import":
        _import(args)
    elif args.verb == "export":
        _export(args)
    else:
        _verify(args)


def _import(args: argparse.Namespace) -> None:
    with importing():
        from tidar_megatron.huggingface.convert import import_run

    layout = {name: getattr(args, name) for name in LAYOUT if getattr(args, name) is not None}
    for name, size in layout.items():
        if size < 1:
            raise UserError(f"{flag(name)} {size}: must be at least 1")
    if args.mask_token_id is not None and args.init_mask_token is None:
        raise UserError("--mask-token-id: add --init-mask-token, which says how its row starts")
    config = import_run(args.hf, args.output, ParallelConfig(**layout), args.init_mask_token, args.mask_token_id)
    mask = "no mask token" if config.tidar.mask_token_id is None else f"mask token {config.tidar.mask_token_id}"
    print(
        f"{args.output}: {_shape(config, args.hf)}, {mask}; "
        f"start a run from it with tidar pretrain --init-from {args.output}"
    )


def _shape(config: Config, hf: str) -> str:
    from tidar_megatron.huggingface.families import read_json

    model = config.model
    new = (model.vocab_size or 0) - read_json(Path(hf) / "config.json")["vocab_size"]
    grown = f" ({new} of them new)" if new else ""
    return f"{model.num_layers} layers, hidden size {model.hidden_size}, {model.vocab_size} ids{grown}"


def _export(args: argparse.Namespace) -> None:
    with importing():
        from tidar_megatron.adapter import CONFIG as ADAPTER_CONFIG
        from tidar_megatron.huggingface.convert import export_run

    shard_bytes = args.max_shard_size_gb * 10**9
    if not 1 <= shard_bytes < float("inf"):
        raise UserError(f"--max-shard-size-gb {args.max_shard_size_gb}: must be a number above 0")
    more = {"base": args.base, "draft_rank": args.draft_rank}
    iteration = export_run(args.checkpoint, args.hf, args.iteration, int(shard_bytes), **more)
    if args.base is not None:
        print(f"{args.hf}: {args.base} and draft weights of iteration {iteration}; any Hugging Face program loads it")
        return
    if (Path(args.hf) / ADAPTER_CONFIG).exists():
        print(f"{args.hf}: the draft weights of iteration {iteration}; tidar generate --model BASE --adapter {args.hf}")
        return
    drafts = "tidar" in json.loads((Path(args.hf) / "config.json").read_text(encoding="utf-8"))
    ours = "tidar generate drafts" if drafts else "it has no mask token, so tidar generate decodes it plainly"
    print(f"{args.hf}: the model of iteration {iteration}; any Hugging Face program loads it, {ours}")


def _verify(args: argparse.Namespace) -> None:
    with importing():
        from tidar_megatron.huggingface.convert import TOLERANCE, verify

    found = verify(args.hf, args.checkpoint, args.iteration)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        left_out = found["left_out"]
        but = "" if left_out is None else f"; left out: the mask token {left_out}, which only the run has"
        but += f"; rows of the vocabulary that are new in the run: {found['new_rows']}" if found["new_rows"] else ""
        print(
            f"iteration {found['iteration']}: logits differ by {found['max_logit_difference']:.1e} at most "
            f"(the largest is {found['largest_logit']:.1f}); {found['same_choice']:.1%} of {found['positions']} "
            f"positions prefer the same id{but}"
        )
    if not found["max_logit_difference"] <= TOLERANCE:  # nor NaN
        raise UserError(f"--hf {args.hf}: is not the model in {args.checkpoint}; export or import it again")
