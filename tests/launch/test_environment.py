"""The variables that examples/launch.sh sets for CUDA, unless the user did; torchrun is a stub."""

import os
import subprocess

import pytest

from tests.conftest import ROOT

SET = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
SEGMENTS = "expandable_segments:True"


@pytest.mark.process
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("1", SEGMENTS, None)),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, ("8", SEGMENTS, None)),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ("1", "max_split_size_mb:64", None)),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, ("1", "", None)),  # torch's own default
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ("1", None, "max_split_size_mb:64")),
    ],
)
def test_cuda_is_set_up_unless_the_user_did(given, expected, tmp_path):
    (tmp_path / "torchrun").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "torchrun").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in SET} | given
    environment["PATH"] = os.pathsep.join([str(tmp_path), environment["PATH"]])
    done = subprocess.run(["examples/launch.sh"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ours = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith(SET))
    assert tuple(ours.get(name) for name in SET) == expected
