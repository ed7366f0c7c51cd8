#!/usr/bin/env python
"""Run ``tidar gpu-check`` from a file: python tools/gpu_check.py --seconds 540 --output gpu_check.jsonl"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("gpu-check")
