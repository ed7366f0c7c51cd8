#!/usr/bin/env python
"""Run ``tidar benchmark`` from a file: python tools/benchmark.py training"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("benchmark")
