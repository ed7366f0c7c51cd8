"""Fault 2: stopped mid-shard and beyond an epoch's edge, the samples trained on are those of the uninterrupted run."""

import json
from collections import Counter
from pathlib import Path

from tests.faults.data_runs import SAVE_EVERY, finish, ids_of, kill_after
from tidar_megatron.data.loader import SequenceSettings, TrainingData

STEPS = 40


def test_killed_mid_shard_and_beyond_the_edge_of_an_epoch(shards, tmp_path):
    """Fault 2: SIGKILL mid-shard, mid-document and beyond an epoch's edge, resumed on another number of ranks: the log
    of sample ids is that of the uninterrupted run, every sample of an epoch once, none repeated, none lost."""
    data, batch = shards[0], 4
    loader = TrainingData(data, SequenceSettings(32, 4, 300, seed=1234))
    epoch = len(loader.sequences[0])
    edge = epoch // batch
    assert edge + 3 < STEPS - SAVE_EVERY and epoch % batch  # a step lies on the edge
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finish(whole, data, tmp_path / "whole.log", 1, "--train-iters", STEPS)
    kill_after(resumed, data, tmp_path / "first.log", 6, "--train-iters", STEPS)
    left = sorted(ids_of(resumed))[-1]
    assert left >= 6
    kill_after(resumed, data, tmp_path / "second.log", edge + 2, "--train-iters", STEPS)
    finish(resumed, data, tmp_path / "third.log", 2, "--train-iters", STEPS)

    ids = ids_of(whole)
    assert list(ids) == list(range(1, STEPS + 1))
    assert dict(sorted(ids_of(resumed).items())) == ids
    ordered = [sample for iteration in ids for sample in ids[iteration]]
    counts = Counter(ordered)
    assert set(counts.values()) == {1}
    assert [(0, 0, n) for n in range(epoch)] == sorted(sample for sample in counts if sample[1] == 0)
    # the stops lay within documents and within a shard: their next sequences begin with a document's continuation
    assert len(loader.sources[0].manifest.shards) == 1
    assert any(loader.sequences[0].pieces(0, n)[0].start for n in range(6 * batch, 7 * batch))
    # two ranks wrote the end of the log, one the beginning
    for rank in (0, 1):
        lines = (Path(resumed) / "sample_ids" / f"dp-{rank:04d}.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["iteration"] == STEPS and len(json.loads(lines[-1])["ids"]) == batch // 2
