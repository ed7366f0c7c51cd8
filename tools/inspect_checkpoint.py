#!/usr/bin/env python
"""Run ``tidar inspect-checkpoint`` from a file: python tools/inspect_checkpoint.py RUN"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("inspect-checkpoint")
