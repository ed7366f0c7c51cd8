#!/usr/bin/env python
"""Train a TiDAR model, in one process or under torchrun.

torchrun --nproc-per-node 2 tools/pretrain.py --config examples/quickstart/config.yaml --save runs/quickstart

SIGTERM or SIGUSR1 to any rank: all ranks save and leave with status 75 (training/signals.py).
"""

import os

from tidar_megatron.program import run_tool
from tidar_megatron.training import signals


def main() -> None:
    """Parse, then train."""
    from tidar_megatron.config import parse_config

    config = parse_config(description="Train a TiDAR model on megatron-core.")
    from tidar_megatron.training.loop import pretrain  # heavy: after the command line is known to be sound

    pretrain(config)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a rank that is gone have forty lines
    signals.install()  # before anything heavy is imported: a signal that comes meanwhile must not end the process
    run_tool(main, rank=int(os.environ.get("RANK", "0")))
