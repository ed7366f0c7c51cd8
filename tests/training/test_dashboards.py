"""W&B and TensorBoard beside a run, and the samples they show; none of them can stop it."""

import json
import os
import re
import shutil
import tempfile
import time

import numpy as np
import pytest
from rich.console import Console

from tests.ranks import ForkedSubprocess
from tests.training.small_runs import losses, metrics, small
from tidar_megatron.errors import UserError
from tidar_megatron.training import generations as samples_of_runs
from tidar_megatron.training.dashboards import WandB
from tidar_megatron.training.generations import Samples
from tidar_megatron.training.loop import pretrain

pytestmark = pytest.mark.process


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
    assert "W&B is disabled: RuntimeError: no such server" in said
    assert max(losses(run)) == 2
    monkeypatch.undo()
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", lambda *args, **kwargs: broken())
    run = tmp_path / "broken at the end"
    pretrain(
        small(shards, checkpoint={"save": str(run)}, training=short, optimizer={"lr_warmup_iters": 0}, logging=board)
    )
    assert "WandB is disabled from here on" in capsys.readouterr().out
    monkeypatch.undo()
    wandb.finish()  # one that is open would be what the next init returns


def records(file):
    """Kind and content of what an offline run's file holds by now, laid out as a LevelDB log is."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # nothing begins in the end of a block
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several pieces
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            kind = record.WhichOneof("record_type")
            found.append((kind, getattr(record, kind)))
    return found


def history(file):
    """The rows of a run that has finished; W&B's own process may write on when finish() has returned."""
    deadline = time.monotonic() + 60
    while "exit" not in dict(records(file)):
        assert time.monotonic() < deadline, "the run's file has no end"
        time.sleep(0.05)
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for kind, row in records(file)
        if kind == "history"
    ]


def test_wandb_goes_on_as_the_same_run_and_shows_what_was_asked_for(shards, tmp_path, monkeypatch):
    """Read back from the offline run's own record: the chart by offset, the samples' table, a checkpoint's artifact."""
    monkeypatch.setattr(samples_of_runs, "subprocess", ForkedSubprocess)
    run = tmp_path / "the run"
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
    # W&B appends a number to the name of a folder that is there already: its names have whole seconds
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{identity}(-\d+)?", folder.name) for folder in folders)
    assert all((folder / f"run-{identity}.wandb").is_file() for folder in folders)
    files = [file for folder in folders for file in folder.rglob("*.wandb")]
    assert all(history(file) for file in files)
    record = b"".join(file.read_bytes() for file in files)
    for said in (b"draft acceptance by offset in the block", b"the-run-checkpoint", b"memory_gib"):
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


def test_wandb_keeps_what_is_logged_of_a_step_after_its_samples(shards, tmp_path):
    row = {"prompt": "a", "text": "b", "tokens_per_forward": 1.0, "distinct_4grams": 1.0}
    config = small(shards, checkpoint={"save": str(tmp_path)}, logging={"wandb_project": "test"})
    board = WandB(config, tmp_path, Console(quiet=True))
    for step in (1, 2):
        board.write(step, {"loss": 1.0})
        board.samples(step, [row])
        board.write(step, {"eval": {"ar_loss": 2.0}})
    board.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = {one["_step"]: one for one in history(file) if "loss" in one}
    assert rows.keys() == {1, 2}
    for step, one in rows.items():
        assert one["eval/ar_loss"] == 2.0
        assert one["samples/nrows"] == step


class Documents:
    """As many held-out documents as a test wants."""

    def __init__(self, count):
        self.sources = [[np.arange(97, 122)] * count]


def test_samples_arrive_and_what_failed_is_said(shards, tmp_path, monkeypatch):
    """However much their process says: a pipe would be full, and both sides wait."""
    run, chatty, work = tmp_path / "run", tmp_path / "chatty", tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    pretrain(small(shards, checkpoint={"save": str(run)}))
    chatty.mkdir()
    (chatty / "sitecustomize.py").write_text(
        "import sys\nfor file in sys.stdout, sys.stderr: print('x' * 200000, file=file)"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(chatty), os.environ["PYTHONPATH"]]))
    samples = Samples(run, Documents(3), 3)
    samples.start(8)
    monkeypatch.setattr(samples_of_runs, "subprocess", ForkedSubprocess)  # the others need not import anything
    samples.start(8)  # it is under way: passed over, and made at the end
    (said, last) = samples.poll(wait=True)
    assert said == last
    assert (said.iteration, said.problem) == (8, None)
    assert [row["prompt"] for row in said.rows] == ["abcdefghijklmnopqrstuvwx"] * 3
    samples.start(99)
    samples._process.wait()
    samples.start(8)  # what has ended meanwhile is kept
    failed, said = samples.poll(wait=True)
    assert (failed.iteration, failed.rows) == (99, [])
    assert "99" in failed.problem
    assert (said.iteration, len(said.rows)) == (8, 3)
    assert samples.poll() == []
    samples.start(8)
    samples.close()
    assert list(work.iterdir()) == []


def test_samples_that_cannot_be_made_end_nothing(tmp_path, monkeypatch):
    samples = Samples(tmp_path, Documents(1), 1)
    with monkeypatch.context() as context:
        context.setattr(tempfile, "mkdtemp", lambda **unused: str(tmp_path / "nowhere"))
        samples.start(1)
    (said,) = samples.poll()
    assert "did not start" in said.problem
    with monkeypatch.context() as context:
        context.setattr(samples_of_runs.sys, "executable", shutil.which("true"))
        samples.start(2)
    (said,) = samples.poll(wait=True)
    assert "cannot be read" in said.problem


def test_a_held_out_shard_that_is_damaged_is_what_is_said(shards, tmp_path, monkeypatch):
    def broken(*unused):
        raise UserError("the shard is damaged")

    monkeypatch.setattr(samples_of_runs.Samples, "__init__", broken)
    with pytest.raises(UserError, match="the shard is damaged"):
        pretrain(small(shards, checkpoint={"save": str(tmp_path)}, logging={"log_samples": 1}))
