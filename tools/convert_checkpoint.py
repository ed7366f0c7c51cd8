#!/usr/bin/env python
"""Run ``tidar convert`` from a file: python tools/convert_checkpoint.py export --checkpoint RUN --hf DIR"""

from tidar_megatron.cli.main import launch

if __name__ == "__main__":
    launch("convert")
