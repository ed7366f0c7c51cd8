#!/usr/bin/env python
"""Turn a training run's checkpoint into an ordinary Hugging Face folder.

python tools/convert_checkpoint.py export --checkpoint runs/quickstart --hf runs/quickstart/hf
"""

from tidar_megatron.errors import OneLineParser, run_tool


def main() -> None:
    """Parse, then export."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    export = verbs.add_parser("export", help="a run's checkpoint -> a Hugging Face folder")
    export.add_argument("--checkpoint", required=True, metavar="RUN", help="folder that was --save in training")
    export.add_argument("--hf", required=True, metavar="DIR", help="folder to write")
    export.add_argument("--iteration", type=int, help="default: the newest")
    args = parser.parse_args()
    from tidar_megatron.checkpoint.export import export_run

    iteration = export_run(args.checkpoint, args.hf, args.iteration)
    print(f"{args.hf}: the model of iteration {iteration}; any Hugging Face program loads it, tools/generate.py drafts")


if __name__ == "__main__":
    run_tool(main)
