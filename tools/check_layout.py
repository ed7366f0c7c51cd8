#!/usr/bin/env python
"""Run ``tidar check-layout`` from a file: torchrun --nproc-per-node 4 tools/check_layout.py"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("check-layout")
