"""What tests of several folders share: shards of ragged documents, tiny Hugging Face folders, launching ranks."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# `make test` draws some examples, `make test-slow` many
settings.register_profile("quick", max_examples=60, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# the tests are of the CPU everywhere, also where there is a GPU; `make test-gpu` runs the few that are of the GPU
if not os.environ.get("TIDAR_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
# programs started by tests find the package of this checkout
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


APART = [ROOT / "tests" / name for name in ("faults", "launch/test_slurm.py", "test_smollm2.py")]


def pytest_ignore_collect(collection_path, config):
    """What takes minutes, or a model unpacked first, is run by its name: make test-faults, test-slurm, test-slow."""
    named = any(collection_path.name in given for given in config.args)
    return True if collection_path in APART and not named else None


@pytest.fixture(scope="session", autouse=True)
def _cache_of_costs(tmp_path_factory):
    """Forwards timed by tests are not what this machine costs."""
    os.environ["TIDAR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """(training, held-out) folders of byte-level documents of 1 to 90 tokens: several a window, and cut by windows."""
    from tidar_megatron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("shards")
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    texts = folder / "texts.jsonl"
    lines = [" ".join(draw.choices(words, k=draw.randint(1, 12)))[: draw.randint(1, 90)] for _ in range(120)]
    texts.write_text("".join(f'"{line}"\n' for line in lines))
    prepare(
        inputs=[texts],
        output=folder / "train",
        tokenizer_spec="byte",
        held_out_fraction=0.2,
        held_out_output=folder / "valid",
    )
    return folder / "train", folder / "valid"


def torchrun(processes, *arguments, timeout=300):
    """Run ``python -m torch.distributed.run``; its output on failure becomes the assertion's message."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done
