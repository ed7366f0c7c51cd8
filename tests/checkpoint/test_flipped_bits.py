"""One flipped bit in any file of the newest checkpoint: it is named and passed over, and the older one is used."""

import random
import shutil

import pytest
from hypothesis import settings

from tests.training.small_runs import small
from tidar_megatron.checkpoint.contents import STATE_FILE, intact_checkpoint
from tidar_megatron.checkpoint.folder import checkpoint_folder, saved_iterations
from tidar_megatron.checkpoint.integrity import FILE_NAME
from tidar_megatron.checkpoint.summary import inspect
from tidar_megatron.config import ParallelConfig
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.resolve import run_fingerprint, starting_point
from tidar_megatron.training.trainer import Trainer

OLD, NEW = 1, 2


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(small(shards, checkpoint={"save": str(folder), "save_interval": OLD}, training={"exit_interval": NEW}))
    assert saved_iterations(folder) == [OLD, NEW]
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def build(shards, **changes):
    trainer = Trainer.build(small(shards, **changes))
    trainer.close()
    shut_down()
    return trainer


@pytest.mark.parametrize("name", [STATE_FILE, FILE_NAME])
def test_any_byte_that_is_read_before_there_are_process_groups(shards, copy, name):
    trainer = build(shards, checkpoint={"load": str(copy)})
    fingerprint = run_fingerprint(trainer.config, trainer.train_data)
    path = checkpoint_folder(copy, NEW) / name
    content = path.read_bytes()
    assert starting_point(trainer.config, fingerprint) == NEW
    thorough = settings.get_current_profile_name() == "thorough"
    for place in range(len(content)) if thorough else random.Random(0).sample(range(len(content)), 60):
        flip(path, place, place % 8)
        assert starting_point(trainer.config, fingerprint) == OLD, place
        path.write_bytes(content)


def test_a_bit_of_every_file(shards, copy, capsys):
    trainer = build(shards, checkpoint={"load": str(copy)})
    fingerprint = run_fingerprint(trainer.config, trainer.train_data)
    initialize(ParallelConfig(), 0)
    draw = random.Random(0)
    for path in sorted(checkpoint_folder(copy, NEW).iterdir()):
        content = path.read_bytes()
        flip(path, draw.randrange(len(content)), draw.randrange(8))
        (old, new) = inspect(copy, verify=True)["checkpoints"]
        assert old["intact"] and new["damage"].startswith(f"{path} "), path.name
        capsys.readouterr()
        starting_point(trainer.config, fingerprint)
        assert intact_checkpoint(copy) == checkpoint_folder(copy, OLD), path.name
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {path} ") and said.endswith(f"; resuming from iteration {OLD}\n")
        path.write_bytes(content)
    shut_down()


def test_a_run_and_init_from_pass_over_it(shards, copy, capsys):
    flip(checkpoint_folder(copy, NEW) / STATE_FILE, 300, 0)
    assert build(shards, checkpoint={"load": str(copy)}).iteration == OLD
    build(shards, training={"init_from": str(copy)})
    assert f"resuming from iteration {OLD}" in capsys.readouterr().err


def test_inspecting_believes_no_flipped_bit(copy):
    checkpoint = checkpoint_folder(copy, NEW)
    flip(checkpoint / STATE_FILE, 20, 0)
    found = inspect(checkpoint, verify=False)
    assert "state" not in found and f"{STATE_FILE} was changed" in found["unreadable"]
    flip(checkpoint / ".metadata", 300, 0)
    assert ".metadata was changed" in inspect(checkpoint, verify=False)["checkpoints"][0]["damage"]
