"""Train a TiDAR model, in one process or under torchrun.

torchrun --nproc-per-node 2 tools/pretrain.py --config examples/quickstart/config.yaml --save runs/quickstart
torchrun --nproc-per-node 2 -m tidar_megatron pretrain --config FILE.yaml --save DIR  # without a checkout

SIGTERM or SIGUSR1 to any rank: all ranks save and leave with status 75 (training/signals.py).
"""

import os

from tidar_megatron.program import importing
from tidar_megatron.training import signals


def main() -> None:
    """Parse the command line, then train."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a rank that is gone have forty lines
    signals.install()  # before anything heavy is imported: a signal that comes meanwhile must not end the process
    from tidar_megatron.config import parse_config

    config = parse_config(description="Train a TiDAR model on megatron-core.")
    with importing():
        from tidar_megatron.training.loop import pretrain  # heavy: after the command line is known to be sound

    pretrain(config)
