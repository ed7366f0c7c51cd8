#!/usr/bin/env python
"""Run ``tidar generate`` from a file: python tools/generate.py --model DIR --prompt TEXT"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("generate")
