#!/usr/bin/env python
"""Run ``tidar gpu-check`` from a file, installed or not: python tools/gpu_check.py --seconds 540 --output FILE.jsonl"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("gpu-check")
