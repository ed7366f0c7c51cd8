#!/usr/bin/env python
"""Run ``tidar certify`` from a file: python tools/certify.py --model DIR --prompts FILE.jsonl"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("certify")
