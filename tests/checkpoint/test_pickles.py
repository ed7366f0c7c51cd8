"""A checkpoint from a stranger: what is pickled in it does not run."""

import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from tests.training.small_runs import small
from tidar_megatron.checkpoint.contents import load_weights
from tidar_megatron.checkpoint.folder import checkpoint_folder
from tidar_megatron.checkpoint.integrity import FILE_NAME, Damaged, seal, write_manifest
from tidar_megatron.checkpoint.pickles import read_metadata
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(small(shards, checkpoint={"save": str(folder)}, training={"train_iters": 3}))
    return folder


@pytest.fixture
def stranger(run, tmp_path):
    """A copy to plant something in, and the file that a payload would make."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", tmp_path / "ran"


def reseal(checkpoint):
    """Whoever plants a payload writes its hashes too."""
    (checkpoint / FILE_NAME).unlink()
    write_manifest(checkpoint, 3, {path.name: seal(path) for path in checkpoint.iterdir()})


def replace_entry(checkpoint, choose, content):
    """Let an entry of a ``.distcp`` file have another content; its key."""
    metadata = read_metadata(checkpoint)
    index = next(i for i in metadata.storage_data if choose(metadata.state_dict_metadata[i.fqn], i.fqn))
    stored = metadata.storage_data[index]
    path = checkpoint / stored.relative_path
    stored.offset, stored.length = path.stat().st_size, len(content)
    with path.open("ab") as stream:
        stream.write(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(checkpoint)
    return index.fqn


def archive(value, path):
    torch.save(value, path)
    return path.read_bytes()


def load(shards, run):
    Trainer.build(small(shards, checkpoint={"load": str(run)}, training={"train_iters": 4})).close()


def refused(shards, run, marker, said):
    with pytest.raises(UserError, match=said) as error:
        load(shards, run)
    shut_down()
    assert not marker.exists()
    assert "\n" not in str(error.value)


def test_a_payload_in_the_metadata(shards, stranger):
    run, marker = stranger
    checkpoint = checkpoint_folder(run, 3)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    reseal(checkpoint)
    refused(shards, run, marker, r"\.metadata is refused: asks for posix.mkdir")


def test_a_payload_hidden_in_sound_metadata(shards, stranger):
    run, marker = stranger
    checkpoint = checkpoint_folder(run, 3)
    metadata = read_metadata(checkpoint)
    metadata.planner_data = Payload(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(checkpoint)
    refused(shards, run, marker, r"\.metadata is refused: asks for posix.mkdir")


@pytest.mark.parametrize("name", ["common.pt"])
def test_a_payload_in_the_common_state(shards, stranger, tmp_path, name):
    """megatron-core's common.pt (since 0.19 an entry of the archives: the next test)."""
    run, marker = stranger
    checkpoint = checkpoint_folder(run, 3)
    if not (checkpoint / name).exists():
        pytest.skip(f"this megatron-core writes no {name}")
    for content in (archive(Payload(marker), tmp_path / "x"), pickle.dumps(Payload(marker))):
        (checkpoint / name).write_bytes(content)
        reseal(checkpoint)
        refused(shards, run, marker, "is refused: ")


def test_a_payload_in_an_object_of_a_layer(shards, stranger, tmp_path):
    run, marker = stranger
    content = archive([Payload(marker)], tmp_path / "x")
    replace_entry(checkpoint_folder(run, 3), lambda e, name: isinstance(e, BytesStorageMetadata), content)
    refused(shards, run, marker, "is refused: ")


def test_a_payload_in_place_of_a_tensor(shards, stranger, tmp_path):
    run, marker = stranger
    content = archive(Payload(marker), tmp_path / "x")
    replace_entry(checkpoint_folder(run, 3), lambda e, name: isinstance(e, TensorStorageMetadata), content)
    refused(shards, run, marker, "is refused: ")


@pytest.mark.parametrize("path", ["../../secret", "/etc/hostname", "a/b"])
def test_metadata_that_leads_elsewhere(shards, stranger, path):
    run, marker = stranger
    checkpoint = checkpoint_folder(run, 3)
    metadata = read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = path
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(checkpoint)
    refused(shards, run, marker, "it names the file")


def test_the_payloads_do_run_where_nobody_looks(stranger, tmp_path):
    """The test can fail: torch's own reading runs them."""
    run, marker = stranger
    checkpoint = checkpoint_folder(run, 3)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    with (checkpoint / ".metadata").open("rb") as stream:
        pickle.load(stream)
    assert marker.exists()


def test_weights_alone_read_nothing_of_the_optimizer(shards, stranger, tmp_path):
    run, marker = stranger
    checkpoint = checkpoint_folder(run, 3)
    metadata = read_metadata(checkpoint)
    for index, stored in metadata.storage_data.items():
        if index.fqn.startswith("optimizer."):
            stored.offset, stored.length = 0, 7  # what lies there is no archive
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(checkpoint)
    trainer = Trainer.build(small(shards, training={"train_iters": 4}))
    load_weights(checkpoint, trainer.model)
    trainer.close()
    shut_down()
    refused(shards, run, marker, "is refused: ")  # whoever wants all of it meets the garbage


def test_not_a_pickle_at_all(stranger):
    run, _ = stranger
    checkpoint = checkpoint_folder(run, 3)
    for content in (b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(read_metadata(checkpoint))[:-9]):
        (checkpoint / ".metadata").write_bytes(content)
        with pytest.raises(Damaged, match=r"\.metadata"):
            read_metadata(checkpoint)
