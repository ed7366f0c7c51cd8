"""Say what is in a checkpoint, whether it is intact, and which run it is from; nothing in it is executed.

tidar inspect-checkpoint runs/quickstart [--verify] [--json]
tidar inspect-checkpoint runs/quickstart/iter_0000100 --verify

Exit status 1: a checkpoint is damaged.
"""

import json
import sys

from tidar_megatron.program import OneLineParser, importing


def main() -> None:
    """Read the checkpoint, and print what it holds."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", help="folder that was --save in training: all checkpoints; or one of its iter_..")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its hash")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with importing():
        from tidar_megatron.checkpoint.summary import describe, inspect

    found = inspect(args.folder, args.verify)
    print(json.dumps(found) if args.json else "\n".join(describe(found)))
    if not all(row["intact"] for row in found["checkpoints"]):
        sys.exit(1)
