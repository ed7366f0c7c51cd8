"""Look into training data: shards and whether they are intact, some documents, and a packed sequence in colour.

    tidar inspect-data data/quickstart/train --seq-length 256 --block-size 8

The status is 1 where a shard is not what the manifest says.
"""

import argparse
import sys

from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser


def main() -> None:
    """Read the data, and print what it holds."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="folder of shards, or the prefix of a Megatron .bin/.idx pair")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="Hugging Face tokenizer folder, for a .bin/.idx pair")
    parser.add_argument("--seq-length", type=int, default=128, metavar="S", help="of the packed sequence [128]")
    parser.add_argument("--block-size", type=int, default=8, metavar="B", help="of the packed sequence [8]")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="documents to decode [3]")
    arguments = parser.parse_args()
    if arguments.samples < 0:
        raise UserError(f"--samples {arguments.samples}: must not be negative")
    length, block = arguments.seq_length, arguments.block_size
    if block < 1 or length < 1 or length % block:
        raise UserError(f"--seq-length {length}: must be a multiple of --block-size {block}, both at least 1")
    from rich.console import Console

    from tidar_megatron.data.preview import inspect_data  # heavy: after the command line is known to be sound
    from tidar_megatron.data.sources import is_pair

    if arguments.tokenizer and not is_pair(arguments.data):
        raise UserError(f"--tokenizer {arguments.tokenizer}: is for .bin/.idx pairs; shards carry their own")

    intact = inspect_data(
        arguments.data,
        arguments.tokenizer,
        arguments.seq_length,
        arguments.block_size,
        arguments.samples,
        Console(highlight=False),
    )
    sys.exit(0 if intact else 1)
