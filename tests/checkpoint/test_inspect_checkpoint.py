"""tools/inspect_checkpoint.py: what is in it, is it whole, of which run."""

import json
import os
import pickle

import pytest

from tests.programs import call
from tests.training.small_runs import small
from tidar_megatron.checkpoint.folder import checkpoint_folder
from tidar_megatron.checkpoint.integrity import FILE_NAME, seal, write_manifest
from tidar_megatron.checkpoint.summary import describe, inspect
from tidar_megatron.errors import UserError
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(small(shards, checkpoint={"save": str(folder), "save_interval": 4}))
    return folder


def test_what_is_in_it(run, shards):
    found = inspect(checkpoint_folder(run, 8), verify=True)
    trainer = Trainer.build(small(shards, checkpoint={"load": str(run)}))
    parameters = sum(p.numel() for p in trainer.model[0].parameters())
    trainer.close()
    (row,) = found["checkpoints"]
    assert row["intact"] and row["verified"] and row["optimizer"]
    assert row["parameters"] == parameters
    assert row["bytes"] == sum(p.stat().st_size for p in checkpoint_folder(run, 8).iterdir() if p.name != FILE_NAME)
    assert found["state"]["iteration"] == 8
    assert found["state"]["consumed_sequences"] == 32
    assert found["state"]["fingerprint"]["hidden_size"] == 32
    assert found["state"]["config"]["checkpoint"]["save"] == str(run)
    shapes = {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in found["tensors"]}
    assert shapes["embedding.word_embeddings.weight"] == ("float32", [264, 32])
    assert shapes["optimizer.state.exp_avg.embedding.word_embeddings.weight"] == ("float32", [264, 32])
    assert any("embedding.word_embeddings.weight  float32 [264, 32]" in line for line in describe(found))


def test_the_program(run, tmp_path):
    command = ["tools/inspect_checkpoint.py", run, "--verify"]
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert "the tracker names 8; a run resumes from 8" in done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()[1:]] == ["iter_0000004", "iter_0000008"]
    path = checkpoint_folder(run, 8) / "state.json"
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b'"iteration": 8', b'"iteration": 9'))
    try:
        done = call(*command, "--json")
    finally:
        path.write_bytes(sound)
    assert done.returncode == 1
    first, second = json.loads(done.stdout)["checkpoints"]
    assert first["intact"] and not second["intact"]
    assert "state.json was changed" in second["damage"]


def test_a_stranger_runs_nothing(tmp_path):
    checkpoint = checkpoint_folder(tmp_path, 1)
    checkpoint.mkdir()

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload()))
    (checkpoint / "state.json").write_text('{"iteration": "one"}')
    write_manifest(checkpoint, 1, {path.name: seal(path) for path in checkpoint.iterdir()})
    found = inspect(tmp_path, verify=True)
    assert "asks for posix.mkdir" in found["checkpoints"][0]["damage"]
    found = inspect(checkpoint, verify=False)
    assert "is not a run's state" in found["unreadable"]
    assert not (tmp_path / "ran").exists()


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        inspect(tmp_path, verify=False)
    with pytest.raises(UserError, match="there is no such folder"):
        inspect(tmp_path / "iter_0000001", verify=False)
