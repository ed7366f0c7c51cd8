#!/usr/bin/env python
"""Run ``tidar pretrain`` from a file: torchrun --nproc-per-node 2 tools/pretrain.py --config FILE.yaml"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("pretrain")
