#!/usr/bin/env python
"""Run ``tidar inspect-data`` from a file: python tools/inspect_data.py DIR"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("inspect-data")
