"""Comparisons in float32 do not round to TF32, whatever the environment or the caller has set."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT
from tidar_megatron.benchmark import decode
from tidar_megatron.evaluation import certificate, decoding
from tidar_megatron.huggingface import convert
from tidar_megatron.inference import compatibility
from tidar_megatron.precision import full_float32
from tidar_megatron.training import layout_report

MODEL = SimpleNamespace(context_limit=100, dtype=torch.float32, causal_lm=None, mask_token_id=None, block_size=None)
COMPARISONS = {  # what compares -> the first function that it calls, and the call
    "certify": (certificate, "Stock", lambda: certificate.certify(MODEL, "folder", [[1]], 1, {}, 0)),
    "evaluate": (decoding, "TransformersGenerate", lambda: decoding.compare_plans(MODEL, [[1]], {}, 2, "folder")),
    "benchmark": (decode, "Transformers", lambda: decode.decode(MODEL, "folder", [[1]], [1], [1], 2, 1)),
    "convert verify": (convert, "_intact_checkpoint", lambda: convert.verify("folder", "run")),
    "check_layout": (layout_report, "start_reference", lambda: layout_report.run([], 1, None, True)),
    "its reference": (layout_report, "measure", lambda: layout_report.write_reference("file", 1, ["long"])),
    "loading": (compatibility, "_lengths", lambda: compatibility.check_compatible(MODEL)),
}
SILENT = ("its reference", "loading")  # a part of another program's work


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_are_in_full_precision(name, tf32, monkeypatch, capsys):
    class Reached(Exception):  # noqa: N818 - said of a call
        pass

    def see(*arguments):
        raise Reached(torch.get_float32_matmul_precision())

    module, callee, compare = COMPARISONS[name]
    monkeypatch.setattr(module, callee, see)
    with pytest.raises(Reached, match=r"^highest$"):
        compare()
    assert torch.get_float32_matmul_precision() == "high"  # the caller's, again
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (name not in SILENT) and all("full float32" in line for line in lines)


def test_nothing_is_said_where_nothing_changes(capsys):
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
    assert capsys.readouterr().err == ""


@pytest.mark.process
def test_the_environment_of_a_container():
    code = (
        "import torch; from tidar_megatron.precision import full_float32; p = torch.get_float32_matmul_precision\n"
        "print(p())\nwith full_float32():\n    print(p(), torch.backends.cuda.matmul.allow_tf32)"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["high", "highest False"]
    assert sum("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" in line for line in done.stderr.splitlines()) == 1
