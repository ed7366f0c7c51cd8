"""W&B and TensorBoard beside a run, and the samples they show; none of them can stop it."""

import json
import os

import numpy as np

from tests.training.small_runs import losses, metrics, small
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.samples import Samples


def test_wandb_is_kept_offline_and_never_stops_a_run(shards, tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    short = {"train_iters": 2, "eval_interval": 2}
    board = {"wandb_project": "test", "tensorboard_dir": str(tmp_path / "board"), "log_interval": 1}
    run = tmp_path / "run"
    pretrain(
        small(shards, checkpoint={"save": str(run)}, training=short, optimizer={"lr_warmup_iters": 0}, logging=board)
    )
    assert "kept offline" in capsys.readouterr().out
    assert list(run.glob("wandb/offline-run-*"))
    assert list((tmp_path / "board").glob("events*"))

    def broken(**unused):
        raise RuntimeError("no such\nserver")

    monkeypatch.setattr(wandb, "init", broken)
    run = tmp_path / "broken"
    pretrain(
        small(shards, checkpoint={"save": str(run)}, training=short, optimizer={"lr_warmup_iters": 0}, logging=board)
    )
    said = capsys.readouterr().out
    assert "W&B is left out: RuntimeError: no such server" in said
    assert max(losses(run)) == 2
    monkeypatch.undo()
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", lambda *args, **kwargs: broken())
    run = tmp_path / "broken at the end"
    pretrain(
        small(shards, checkpoint={"save": str(run)}, training=short, optimizer={"lr_warmup_iters": 0}, logging=board)
    )
    assert "WandB is left out from here on" in capsys.readouterr().out
    monkeypatch.undo()
    wandb.finish()  # one that is open would be what the next init returns


def test_wandb_goes_on_as_the_same_run_and_shows_what_was_asked_for(shards, tmp_path):
    """Read back from the offline run's own record: the chart by offset, the samples' table, a checkpoint's artifact."""
    run = tmp_path / "run"
    board = {
        "wandb_project": "test",
        "wandb_log_checkpoints": True,
        "log_samples": 2,
        "tensorboard_dir": str(tmp_path / "board"),
    }
    again = {"save": str(run), "load": str(run)}
    pretrain(small(shards, checkpoint=again, training={"exit_interval": 4}, logging=board))
    identity = (run / "wandb_run_id").read_text()
    pretrain(small(shards, checkpoint=again, logging=board))
    assert (run / "wandb_run_id").read_text() == identity
    folders = list(run.glob("wandb/offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    record = b"".join(file.read_bytes() for folder in folders for file in folder.rglob("*.wandb"))
    for said in (b"draft acceptance by offset in the block", b"run-checkpoint", b"memory_gib"):
        assert said in record, said
    tables = [
        json.loads(file.read_text()) for file in run.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    ]
    assert sorted(row[0] for table in tables for row in table["data"]) == [4, 4, 8, 8]
    assert all(table["columns"][:3] == ["iteration", "prompt", "text"] for table in tables)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in samples] == [4, 4, 8, 8]
    assert all(row["tokens_per_forward"] >= 1 and row["prompt"] for row in samples)
    assert all(row["memory_gib"] > 0.05 for row in metrics(run) if "loss" in row)


class Documents:
    """As many held-out documents as a test wants."""

    def __init__(self, count):
        self.sources = [[np.arange(97, 122)] * count]


def test_samples_arrive_and_what_failed_is_said(shards, tmp_path, monkeypatch):
    """However much their process says: a pipe would be full, and both sides wait."""
    run, chatty = tmp_path / "run", tmp_path / "chatty"
    pretrain(small(shards, checkpoint={"save": str(run)}))
    chatty.mkdir()
    (chatty / "sitecustomize.py").write_text(
        "import sys\nfor file in sys.stdout, sys.stderr: print('x' * 200000, file=file)"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(chatty), os.environ["PYTHONPATH"]]))
    samples = Samples(run, Documents(3), 3)
    samples.start(8)
    said = samples.poll(wait=True)
    assert (said.iteration, said.problem) == (8, None)
    assert [row["prompt"] for row in said.rows] == ["abcdefghijklmnopqrstuvwx"] * 3
    samples.start(99)
    said = samples.poll(wait=True)
    assert (said.iteration, said.rows) == (99, [])
    assert "99" in said.problem
    assert samples.poll() is None
