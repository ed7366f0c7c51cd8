"""Section 2: the tests of the GPU, then a run with asynchronous saves, and a run that resumes from one of them."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tidar_megatron
from tidar_megatron.config import Config, build_config
from tidar_megatron.data.prepare import prepare
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.training.loop import pretrain

ROOT = Path(tidar_megatron.__file__).parent.parent
STEPS, SAVED = 8, 4
LARGEST_ERROR = 1e-2  # of the losses after resuming; FlexAttention's backward adds in no fixed order


def check(setting: Setting) -> None:
    """Find the results of the tests, and the losses of a run with and without an interruption."""
    with setting.guard("a run with --async-save"):
        _resume(setting)
    setting.found["tests"] = tests = _tests(setting)
    setting.summary.append(f"tests/test_gpu.py: {tests}")


def _tests(setting: Setting) -> str:
    tests = ROOT / "tests" / "test_gpu.py"
    if not setting.on_gpu:
        return NOT_ON_A_CPU
    if not tests.exists():
        return "is not in this installation"
    if not setting.in_time():
        return "skipped: the time is up"
    left = max(30.0, setting.deadline - time.monotonic())
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TIDAR_TEST_GPU": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        setting.stopped_early = True
        return f"ended after {left:.0f} seconds: the time is up"
    print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    last = (done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
    setting.require(done.returncode == 0, f"tests/test_gpu.py: {last}")
    return last


def _resume(setting: Setting) -> None:
    train, valid = _shards(setting.folder)
    whole, cut = setting.folder / "whole", setting.folder / "cut"
    pretrain(_config(setting, train, valid, whole, async_save=False))
    start = time.perf_counter()
    pretrain(_config(setting, train, valid, cut, async_save=True, exit_interval=SAVED))
    pretrain(_config(setting, train, valid, cut, async_save=True))
    seconds = time.perf_counter() - start
    expected, resumed = _losses(whole), _losses(cut)
    apart = max(abs(resumed.get(n, float("inf")) - expected[n]) / abs(expected[n]) for n in expected)
    setting.found["async_save"] = {
        "losses": list(expected.values()),
        "resumed_losses": list(resumed.values()),
        "largest_error": apart,
        "identical": resumed == expected,
        "seconds": seconds,
    }
    setting.require(apart <= LARGEST_ERROR, f"the resumed run's losses differ by {apart:.2g} of the loss")
    same = "identical" if resumed == expected else f"within {apart:.1g}"
    setting.summary.append(f"--async-save and resume: {STEPS} steps, losses {same}")


def _shards(folder: Path) -> tuple[Path, Path]:
    draw = random.Random(0)
    texts = folder / "texts.jsonl"
    lines = [" ".join(draw.choices(["alpha", "beta", "gamma", "delta"], k=draw.randint(1, 12))) for _ in range(120)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([texts], folder / "train", "byte", held_out_fraction=0.2, held_out_output=folder / "valid")
    return folder / "train", folder / "valid"


def _config(setting: Setting, train: Path, valid: Path, save: Path, async_save: bool, **training: Any) -> Config:
    width = setting.size(256, 32)
    return build_config(
        {
            "tidar": {"block_size": 8, "ar_warmup_fraction": 0.25},
            "model": {
                "num_layers": 2,
                "hidden_size": width,
                "ffn_hidden_size": 2 * width,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "kv_channels": 16,
            },
            "data": {"train_data": str(train), "valid_data": str(valid), "seq_length": setting.size(256, 64)},
            "training": {
                "train_iters": STEPS,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "eval_interval": STEPS,
                "eval_sequences": 4,
                "bf16": setting.on_gpu,
                **training,
            },
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 2},
            "checkpoint": {"save": str(save), "load": str(save), "save_interval": 2, "async_save": async_save},
            "logging": {"log_interval": 1},
        }
    )


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row["loss"] for row in rows if "loss" in row}
