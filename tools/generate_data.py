#!/usr/bin/env python
"""Run ``tidar generate-data`` from a file: python tools/generate_data.py --model DIR --prompts FILE --output DIR"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("generate-data")
