"""The tracker is empty, garbage, gone, or names what is not there: the folders are scanned, and that is said."""

import shutil

import pytest

from tests.training.small_runs import small
from tidar_megatron.checkpoint.folder import TRACKER, checkpoint_folder, saved_iterations
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(small(shards, checkpoint={"save": str(folder), "save_interval": 4}))
    return folder


def build(shards, folder):
    trainer = Trainer.build(small(shards, checkpoint={"load": str(folder), "save": str(folder)}))
    trainer.close()
    shut_down()
    return trainer.iteration


@pytest.mark.parametrize("content", [b"", b"\n", b"latest", b"-4", b"4.0", b"\xff\xfe8", b"\xc2\xb2", b"999", None])
def test_a_bad_tracker(run, shards, tmp_path, capsys, content):
    """Fault 8: an empty, garbled, missing or wrong tracker: the folders are scanned and it is said, never step 0"""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / TRACKER).unlink()
    if content is not None:
        (folder / TRACKER).write_bytes(content)
    assert build(shards, folder) == 8
    said = capsys.readouterr().err
    assert TRACKER in said
    assert "resuming from iteration 8" in said


@pytest.mark.parametrize("content", [b"", b"8"])
def test_a_tracker_and_nothing_else(run, shards, tmp_path, content):
    """Fault 8: a tracker without a checkpoint is an error, not a start from step 0"""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / TRACKER).write_bytes(content)
    with pytest.raises(UserError, match=r"no checkpoint in it is intact: .*" + TRACKER):
        build(shards, folder)


def test_an_older_iteration_by_hand(run, shards, tmp_path):
    """Fault 8: a tracker that was set back is followed"""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / TRACKER).write_text("4\n")
    assert build(shards, folder) == 4
    assert saved_iterations(folder) == [4, 8]
    shutil.rmtree(checkpoint_folder(folder, 4))
    with pytest.raises(UserError, match="names iteration 4, which has no folder"):
        build(shards, folder)  # 8 is not what was asked for
