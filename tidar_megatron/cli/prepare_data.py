"""Turn text into training shards.

    tidar prepare-data --input PATH [PATH ...] --output DIR --tokenizer byte|bpe:N|FOLDER

Inputs are files and folders:
- .jsonl, .ndjson: JSON lines, one document a line: an object with --text-key, or a string.
- .json: JSON lines, or one JSON array of such objects or strings. Other JSON is refused. But
  within a folder such a file (package.json), or an array without --text-key, is read as plain text like other source
  files, and named at the end.
- Any other file is plain text, one document. One that holds only JSON objects with --text-key is refused; name such a
  file .json.
Files compressed by gzip, bzip2 or xz are read as they are. A file that is named must be UTF-8; within a folder, what is
not (pictures, archives) is skipped, and named at the end.

The output holds webdataset shards of token ids, a manifest and the tokenizer. A special token's name in a text ("</s>")
is encoded as ordinary pieces. Only characters that the tokenizer does not know become its unknown token; they are
counted.
"""

import argparse

from tidar_megatron.program import OneLineParser


def main() -> None:
    """Parse the command line, then prepare the data."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files or folders of text")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the training shards")
    parser.add_argument(
        "--tokenizer", required=True, metavar="SPEC", help="byte, bpe:N (trained, N ids), or a Hugging Face folder"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in a JSON object [text]")
    parser.add_argument(
        "--skip-bad-rows", type=int, default=0, metavar="N", help="skip up to N rows of JSON that hold no text [0]"
    )
    parser.add_argument("--held-out-fraction", type=float, default=0.0, metavar="F", help="documents kept apart [0]")
    parser.add_argument("--held-out-output", metavar="DIR", help="folder of the held-out shards")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the held-out documents [0]")
    parser.add_argument("--shard-size-mb", type=float, default=64.0, metavar="X", help="MiB a shard, about [64]")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are already there")
    args = parser.parse_args()
    from tidar_megatron.data.prepare import prepare, summary  # heavy: after the command line is known to be sound

    manifests = prepare(
        inputs=args.input,
        output=args.output,
        tokenizer_spec=args.tokenizer,
        text_key=args.text_key,
        held_out_fraction=args.held_out_fraction,
        held_out_output=args.held_out_output,
        seed=args.seed,
        shard_size_mb=args.shard_size_mb,
        overwrite=args.overwrite,
        skip_bad_rows=args.skip_bad_rows,
    )
    print(summary([args.output, args.held_out_output][: len(manifests)], manifests))
