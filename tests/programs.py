"""Programs called in this process: what ``python tools/x.py ...`` prints, and its exit status, without the imports.

A program leaves nothing behind here: arguments, environment, standard streams, threads and process group are those of
before. The same program as a process of its own is ``tests.ranks.run``; as a new interpreter, that of test_streams.py.
"""

import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from unittest import mock

import torch

from tests.ranks import ROOT
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.training import signals

# what libraries say of a machine, such as a CUDA build of torch where there is no GPU: glog's lines, Python's warnings
NOTICE = re.compile(r"\[?[IW]\d{4,8} |\S.*: \w*Warning: |  \S")


def own_lines(text):
    """The lines that a program itself has written to its standard error, without the notices of libraries."""
    return [line for line in text.splitlines() if not NOTICE.match(line)]


def call(program, *arguments, stdin=b"", **variables):
    """Run ``program``, a path below the checkout, and return a ``subprocess.CompletedProcess`` with its text.

    Args:
        program: such as ``tools/plan.py``.
        arguments: of its command line; any objects.
        stdin: what it reads.
        variables: added to the environment.
    """
    command = [program, *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    threads, folder = torch.get_num_threads(), os.getcwd()
    shut_down()  # an earlier test's
    with (
        mock.patch.multiple(sys, argv=command, stdin=given, stdout=out, stderr=err),
        mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}),
        mock.patch.object(signals, "install"),  # pytest keeps its own
        warnings.catch_warnings(),
    ):
        try:
            os.chdir(ROOT)
            runpy.run_path(str(ROOT / program), run_name="__main__")
            status = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        finally:
            shut_down()
            torch.set_num_threads(threads)
            os.chdir(folder)
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(command, status, *texts)
