#!/usr/bin/env python
"""Run ``tidar prepare-data`` from a file: python tools/prepare_data.py --input PATH --output DIR --tokenizer byte"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("prepare-data")
