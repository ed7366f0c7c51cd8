"""A file system that is really full, or read-only: one line, and the checkpoint before is whole."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.training.small_runs import losses, small
from tidar_megatron.checkpoint.folder import checkpoint_folder, latest_iteration, saved_iterations
from tidar_megatron.checkpoint.integrity import check_hashes
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer

SIZE = 4 * 2**20


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk, leave):
    """Leave so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"x" * (free - leave))


@pytest.mark.parametrize("leave", [200_000, 40_000])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_full_disk(disk, shards, asynchronous, leave):
    """Fault 15: the disk is full: one line that says so, nothing half published, the old checkpoint whole"""
    run = disk / "run"
    checkpoint = {"save": str(run), "load": str(run), "async_save": asynchronous}
    pretrain(small(shards, checkpoint=checkpoint, training={"exit_interval": 3}))
    fill(disk, leave)
    with pytest.raises(UserError) as refused:
        pretrain(small(shards, checkpoint=checkpoint, training={"exit_interval": 6}))
    shut_down()
    said = str(refused.value)
    assert "iteration 6 is not saved: No space left on device; iteration 3 is intact" in said
    assert "\n" not in said
    assert saved_iterations(run) == [latest_iteration(run)] == [3]
    check_hashes(checkpoint_folder(run, 3))
    assert not list(run.glob(".iter_*"))
    (disk / "filler").unlink()
    pretrain(small(shards, checkpoint=checkpoint))
    assert list(losses(run)) == list(range(1, 9))


def test_not_a_byte_left(disk, shards):
    """Fault 15: not a byte is left: torch does not say why its archive failed, the error does"""
    run = disk / "run"
    checkpoint = {"save": str(run), "load": str(run)}
    pretrain(small(shards, checkpoint=checkpoint, training={"exit_interval": 3}))
    trainer = Trainer.build(small(shards, checkpoint=checkpoint))
    trainer.step()
    fill(disk, 0)
    with pytest.raises(UserError, match="iteration 4 is not saved: No space left on device; iteration 3 is intact"):
        trainer.save()
    trainer.close()
    shut_down()
    check_hashes(checkpoint_folder(run, 3))


def test_the_log_of_a_run_on_a_full_disk(disk, shards):
    """Fault 15: what else a run writes on a full disk ends it with one line too"""
    run = disk / "run"
    pretrain(small(shards, checkpoint={"save": str(run)}, training={"exit_interval": 3}))
    (disk / "config.yaml").write_text(small(shards, checkpoint={"save": str(run), "load": str(run)}).to_yaml())
    fill(disk, 0)
    command = [sys.executable, "tools/pretrain.py", "--config", str(disk / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert "Traceback" not in done.stderr
    check_hashes(checkpoint_folder(run, 3))


def test_full_disk_with_two_ranks(disk, shards, tmp_path):
    """Fault 15: the disk is full under two ranks: the job ends, with one line of ours, in seconds"""
    run = disk / "run"
    flags = f"--train-data {shards[0]} --save {run} --load {run} --num-layers 2 --hidden-size 32 --ffn-hidden-size 48"
    flags += " --num-attention-heads 4 --seq-length 32 --block-size 4 --train-iters 8 --lr 1e-3 --save-interval 3"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tools/pretrain.py", *flags.split()]
    done = subprocess.run([*command, "--exit-interval", "3"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    fill(disk, 150_000)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "error: --save" in line]
    assert len(ours) == 1, done.stderr
    assert "iteration 6 is not saved: No space left on device; iteration 3 is intact" in ours[0]
    check_hashes(checkpoint_folder(run, 3))


def test_read_only(disk, shards):
    """Fault 15: a read-only folder: one line that names it, the old checkpoint whole"""
    run = disk / "run"
    checkpoint = {"save": str(run), "load": str(run)}
    pretrain(small(shards, checkpoint=checkpoint, training={"exit_interval": 3}))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"--save .*: Read-only file system"):
        pretrain(small(shards, checkpoint=checkpoint))
    shut_down()
    assert latest_iteration(run) == 3
    check_hashes(checkpoint_folder(run, 3))
