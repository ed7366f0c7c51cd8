"""Fixtures and hooks that tests of several folders share: profiles, tiers, and shards of ragged documents."""

import gc
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# `make test` draws some examples, `make test-slow` many
settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
THOROUGH = PROFILE == "thorough"
settings.load_profile(PROFILE)

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


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_is_collected():
    """Leave what is alive before a file's tests out of their garbage collections: the end of each run collects twice.

    That is what was imported; collecting it takes longer than most runs.
    """
    gc.collect()
    gc.freeze()


# files that take longest, the longest first: begun last, one of them would keep one core busy alone
HEAVY = """
training/test_layout_check training/test_parity launch/test_signals launch/test_two_nodes inference/test_sampling
checkpoint/test_own_parts models/test_padded_vocabulary checkpoint/test_convert inference/test_static
planning/test_plan_measured models/test_attention evaluation/test_certificate inference/test_decoding
training/test_resume checkpoint/test_init_from training/test_dashboards evaluation/test_tasks models/test_gpu_packages
benchmark/test_benchmark inference/test_serving inference/test_model_benchmarks inference/test_planner
""".split()


gc.disable()  # until the tests are collected: imports leave no garbage, and collecting takes a fifth of their time


def pytest_collection_finish():
    gc.enable()


def pytest_collection_modifyitems(items):
    """Begin with the heavy files; the rest stays in order."""
    order = {ROOT / "tests" / f"{name}.py": number for number, name in enumerate(HEAVY)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_runtest_setup(item):
    """Note whether the test may start a process."""
    _running["marked"] = item.get_closest_marker("process") is not None


_running = {"marked": True}


def _watch(event, arguments):
    """Fail a test that starts a program or a rank and is not marked so; make test-fast relies on the mark."""
    if event in ("subprocess.Popen", "tests.ranks.Process") and not _running["marked"]:
        raise AssertionError(f"@pytest.mark.process is missing: the test starts {arguments[:2]}")


sys.addaudithook(_watch)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_costs(tmp_path_factory):
    """Forwards timed by tests are not what this machine costs."""
    os.environ["TIDAR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _auto_is_float32():
    """Let dtype ``auto`` be float32 on every machine; test_dtype.py, which tests it, undoes this."""
    if "torch" not in sys.modules:  # then no test loads a model in this process
        yield
        return
    from tidar_megatron.inference import dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtype, "has_bfloat16", lambda: False)
        yield


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
