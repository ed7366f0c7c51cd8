#!/usr/bin/env python
"""Run ``tidar compile`` from a file: python tools/compile.py"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("compile")
