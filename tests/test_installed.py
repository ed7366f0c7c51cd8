"""The wheel, installed without its dependencies beside those that are there, outside of the checkout; the command."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT, THOROUGH
from tidar_megatron.cli.main import COMMANDS

TINY = (
    "--seq-length 32 --block-size 4 --num-layers 1 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 "
    "--train-iters 2 --global-batch-size 2 --micro-batch-size 2"
)
pytestmark = pytest.mark.process
WITHOUT = ("PYTHONPATH", "RANK", "WORLD_SIZE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Run a line of a shell outside of the checkout, in an environment into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("installed")
    source, elsewhere, venv = (folder / name for name in ("source", "elsewhere", "venv"))
    elsewhere.mkdir()
    nothing_built = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tidar_megatron", source / "tidar_megatron", ignore=nothing_built)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {name: value for name, value in os.environ.items() if name not in WITHOUT}
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

    def run(*command):
        done = subprocess.run(
            list(map(str, command)), cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", venv / "bin/python", "install", "--no-deps", "--no-index", wheel)
    # the dependencies, after what was installed; .pth files of this folder, such as the checkout's own, are not read
    (own,) = venv.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"
    run.folder, run.venv = elsewhere, venv
    return run


def test_from_text_to_a_checkpoint(installed):
    """Torchrun trains by the command that pip installs, and finds no file of the checkout."""
    (installed.folder / "texts.jsonl").write_text('{"text": "as it was said"}\n' * 40)
    installed(*shlex.split("tidar prepare-data --input texts.jsonl --output data --tokenizer byte"))
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 1 --no-python tidar pretrain"
    assert "iteration" in installed(*shlex.split(f"{torchrun} --train-data data --save run {TINY}"))


@pytest.mark.skipif(not THOROUGH, reason="takes 10 s, to start two programs: .ci/run runs it")
def test_from_a_checkpoint_to_generation(installed):
    installed(*shlex.split("tidar convert export --checkpoint run --hf hf"))
    generate = "python -m tidar_megatron generate --model hf --prompt 'as it' --max-new-tokens 4 --ignore-eos"
    assert "tokens per forward" in installed(*shlex.split(generate))
    assert (installed.folder / "hf/custom_generate/generate.py").is_file()


def test_the_wheel_is_what_runs(installed):
    program = "import tidar_megatron, pathlib; print(pathlib.Path(tidar_megatron.__file__).parent)"
    package = Path(installed("python", "-c", program).strip())
    assert package.is_relative_to(installed.venv)

    def files(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".typed")}

    assert files(package) == files(ROOT / "tidar_megatron")


def test_help_imports_nothing_heavy(installed):
    """So it answers at once: 0.05 s of a core, most of them Python's own start."""
    program = "import sys; sys.argv[1:] = ['--help']\nfrom tidar_megatron.cli.main import main\ntry: main()\n"
    program += "except SystemExit: print(*{name.split('.')[0] for name in sys.modules})"
    said = installed("python", "-c", program)
    assert all(re.search(rf"\n    {command}\s", said) for command in COMMANDS)
    assert not {"torch", "numpy", "transformers", "yaml", "pydantic", "rich"} & set(said.splitlines()[-1].split())
    assert said.startswith("usage: tidar ") and installed("tidar", "--version") == "tidar-megatron 0.1.0\n"
    assert installed("tidar", "inspect-data", "--help").startswith("usage: tidar inspect-data [-h]")
    said = installed("python", "-m", "tidar_megatron", "inspect-data", "--help")
    assert said.startswith("usage: python -m tidar_megatron inspect-data [-h]")
