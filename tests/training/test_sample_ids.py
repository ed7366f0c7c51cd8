"""The log of sample ids: what each step trained on, cut where a run goes on, by whoever goes on with it."""

import json

import pytest

from tests.training.small_runs import STEPS, small
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.errors import UserError
from tidar_megatron.training import sample_ids
from tidar_megatron.training.loop import pretrain


def logged(run):
    return [json.loads(line) for line in (run / "sample_ids" / "dp-0000.jsonl").read_text().splitlines()]


def test_it_tells_what_each_step_trained_on_also_over_a_resume(shards, tmp_path):
    """Of a blend, whose second source begins anew meanwhile."""
    blend = {"train_data": ["3", str(shards[0]), "1", str(shards[1])]}
    run = {"save": str(tmp_path), "load": str(tmp_path)}
    changes = {"data": blend, "logging": {"log_sample_ids": True}}
    pretrain(small(shards, checkpoint=run, training={"exit_interval": 5}, **changes))
    with (tmp_path / "sample_ids" / "dp-0000.jsonl").open("a") as stream:  # of steps that were never saved
        stream.write('{"iteration": 6, "ids": [[9, 9, 9]]}\n{"iteration": 7, "id')
    (tmp_path / "sample_ids" / "dp-0001.jsonl").write_text('{"iteration": 6, "ids": []}\n')  # a rank of another layout
    pretrain(small(shards, checkpoint=run, **changes))
    data = TrainingData(blend["train_data"], SequenceSettings(32, 4, 257, seed=1234))
    expected = [[list(data.locate(4 * step + row)) for row in range(4)] for step in range(STEPS)]
    assert [(line["iteration"], line["ids"]) for line in logged(tmp_path)] == list(enumerate(expected, start=1))
    assert {sample[0] for ids in expected for sample in ids} == {0, 1}
    assert (tmp_path / "sample_ids" / "dp-0001.jsonl").read_text() == ""


def test_it_is_written_when_it_is_said(tmp_path):
    """A killed run has lost no line of a step that was taken."""
    log = sample_ids.SampleIds(tmp_path, 3)
    log.write(1, [(0, 0, 5), (1, 2, 7)])
    assert (
        tmp_path / "sample_ids" / "dp-0003.jsonl"
    ).read_text() == '{"iteration": 1, "ids": [[0, 0, 5], [1, 2, 7]]}\n'
    log.close()


def test_it_needs_a_folder(shards):
    with pytest.raises(UserError, match=r"--log-sample-ids: needs --save"):
        small(shards, logging={"log_sample_ids": True})


def test_nothing_is_written_unasked(whole):
    assert not (whole / "sample_ids").exists()
