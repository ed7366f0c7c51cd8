"""A byte flipped, a file cut or gone: found, the file named, and the checkpoint before is taken."""

import shutil

import pytest

from tests.faults.checkpoint_jobs import tensors
from tests.training.small_runs import losses, small
from tidar_megatron.checkpoint.folder import checkpoint_folder, restart_points, saved_iterations
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import export_run
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer

OLD, NEW = 4, 8


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(small(shards, checkpoint={"save": str(folder), "save_interval": OLD}))
    assert saved_iterations(folder) == [OLD, NEW]
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def build(shards, folder, **checkpoint):
    """Load, and leave; the iteration gone on from."""
    trainer = Trainer.build(small(shards, checkpoint={"load": str(folder), **checkpoint}))
    trainer.close()
    shut_down()
    return trainer.iteration


def files(run):
    return sorted(path.name for path in checkpoint_folder(run, NEW).iterdir())


def test_every_file_and_every_damage(run, shards, tmp_path, capsys):
    """Fault 7: a flipped byte, a cut or deleted file of a checkpoint: found, named, the one before is taken"""
    assert {".metadata", "manifest.json", "state.json", "random_00000.json"} < set(files(run))
    for name in files(run):
        for damage in (flip, truncate, lambda path: path.unlink()):
            folder = tmp_path / "damaged"
            shutil.copytree(run, folder)
            damage(checkpoint_folder(folder, NEW) / name)
            capsys.readouterr()
            assert build(shards, folder) == OLD, name
            said = capsys.readouterr().err
            assert f"{checkpoint_folder(folder, NEW) / name} " in said
            assert f"resuming from iteration {OLD}" in said
            shutil.rmtree(folder)


def test_none_is_whole(run, shards, tmp_path):
    """Fault 7: all checkpoints damaged: refused with the files named, never a start from step 0"""
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    (checkpoint_folder(folder, OLD) / "state.json").unlink()
    flip(checkpoint_folder(folder, NEW) / "__0_0.distcp")
    with pytest.raises(UserError, match=r"no checkpoint in it is intact: .*__0_0.distcp was changed"):
        build(shards, folder)
    truncate(checkpoint_folder(folder, NEW) / "__0_0.distcp")
    with pytest.raises(UserError, match=r"__0_0.distcp has \d+ bytes, its manifest says \d+; .* is missing"):
        build(shards, folder, save=str(folder))


def test_the_run_goes_on_to_the_same_end(run, shards, tmp_path):
    """Fault 7: after falling back the run ends as it did before, its new checkpoint in the damaged one's place"""
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    flip(checkpoint_folder(folder, NEW) / "__0_0.distcp")
    pretrain(small(shards, checkpoint={"save": str(folder), "load": str(folder)}))
    assert losses(folder) == losses(run)
    assert restart_points(folder) == ([NEW, OLD], [])
    before, after = tensors(checkpoint_folder(run, NEW)), tensors(checkpoint_folder(folder, NEW))
    assert all((before[name] == after[name]).all() for name in before)


def test_sizes_are_always_compared(run, shards, tmp_path):
    """Fault 7: --no-verify-checkpoint leaves the hashes out, not the sizes"""
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    state = checkpoint_folder(folder, NEW) / "state.json"
    state.write_bytes(state.read_bytes().replace(b"\n", b" ", 1))  # means the same
    assert build(shards, folder) == OLD
    assert build(shards, folder, verify_checkpoint=False) == NEW
    flip(checkpoint_folder(folder, NEW) / "metadata.json")
    with pytest.raises(UserError, match="iter_0000008 is refused"):
        build(shards, folder, verify_checkpoint=False)
    shut_down()
    truncate(checkpoint_folder(folder, NEW) / "__0_0.distcp")
    assert build(shards, folder, verify_checkpoint=False) == OLD


def test_export_refuses_a_damaged_one(run, tmp_path):
    """Fault 7: a damaged checkpoint is not exported"""
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    flip(checkpoint_folder(folder, NEW) / "__0_0.distcp")
    with pytest.raises(UserError, match=r"__0_0.distcp was changed.*--iteration"):
        export_run(folder, tmp_path / "hf")
    assert export_run(folder, tmp_path / "hf", OLD) == OLD
    shut_down()
