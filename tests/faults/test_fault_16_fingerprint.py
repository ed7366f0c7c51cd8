"""A resume with other data, another tokenizer or model is refused by the name of the part, unless overridden."""

import json

import pytest

from tests.training.small_runs import losses, small
from tidar_megatron.data.prepare import prepare
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(small(shards, checkpoint={"save": str(folder)}, training={"exit_interval": 3}))
    return folder


@pytest.fixture(scope="module")
def other(shards, tmp_path_factory):
    """The same texts and one more, and the same texts with another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    texts = shards[0].parent / "texts.jsonl"
    (folder / "more.jsonl").write_text(texts.read_text() + json.dumps("one more") + "\n")
    prepare([folder / "more.jsonl"], folder / "more", "byte")
    prepare([texts], folder / "bpe", "bpe:257")
    return {"data": folder / "more", "tokenizer": folder / "bpe"}


def build(shards, run, override=(), **sections):
    checkpoint = {"load": str(run), "override_fingerprint": override}
    trainer = Trainer.build(small(shards, checkpoint=checkpoint, **sections))
    trainer.close()
    shut_down()
    return trainer


@pytest.mark.parametrize(
    ("part", "sections", "said"),
    [
        ("rotary_base", {"model": {"rotary_base": 5000.0}}, r"--rotary-base 5000.0: the run in .* has 10000.0"),
        ("seed", {"training": {"seed": 7}}, r"--seed 7: the run in .* has 1234"),
        ("seq_length", {"data": {"seq_length": 64}}, r"--seq-length 64: the run in .* has 32"),
        ("block_size", {"tidar": {"block_size": 8}}, r"--block-size 8: the run in .* has 4"),
        ("norm_epsilon", {"model": {"norm_epsilon": 1e-5}}, r"--norm-epsilon 1e-05"),
    ],
)
def test_changed_settings(run, shards, part, sections, said):
    """Fault 16: a changed model, seed or sequence is refused by name; overridden by name it works"""
    with pytest.raises(UserError, match=said + rf".*--override-fingerprint {part}$"):
        build(shards, run, **sections)
    assert build(shards, run, (part,), **sections).iteration == 3


def test_changed_data(run, shards, other):
    """Fault 16: changed data is refused by name; overridden by name it works"""
    data = {"data": {"train_data": str(other["data"]), "valid_data": None}}
    with pytest.raises(UserError, match=r"data \w+\.\.: the run in .* another data.*--override-fingerprint data$"):
        build(shards, run, **data)
    with pytest.raises(UserError, match="another data"):
        build(shards, run, ("seed",), **data)
    assert build(shards, run, ("data",), **data).iteration == 3


def test_changed_tokenizer(run, shards, other):
    """Fault 16: another tokenizer is refused by name; overridden by name it works"""
    data = {"data": {"train_data": str(other["tokenizer"]), "valid_data": None}}
    with pytest.raises(UserError, match=r"another tokenizer.*--override-fingerprint data tokenizer$"):
        build(shards, run, **data)
    assert build(shards, run, ("data", "tokenizer"), **data).iteration == 3


def test_overriding_what_does_not_exist(run, shards):
    """Fault 16: the name of a part that does not exist is refused, with those that do"""
    with pytest.raises(UserError, match=r"--override-fingerprint sed: there is no such part; there are: .*seed"):
        build(shards, run, ("sed",))


def test_what_may_change(run, shards, tmp_path):
    """Fault 16: a longer run, another rate or batch is no other run"""
    changes = {"training": {"train_iters": 5, "global_batch_size": 8}, "optimizer": {"lr": 1e-3, "lr_warmup_iters": 0}}
    pretrain(small(shards, checkpoint={"load": str(run), "save": str(tmp_path)}, **changes))
    assert list(losses(tmp_path)) == [4, 5]
