#!/usr/bin/env python
"""Run ``tidar evaluate`` from a file: python tools/evaluate.py --model DIR --tasks FILE.jsonl"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("evaluate")
