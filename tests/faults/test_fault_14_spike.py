"""A loss a hundred times too large: told, or skipped; also right after a restart, because the last losses are kept."""

import pytest
import torch

from tests.training.small_runs import metrics, small
from tidar_megatron.training import step
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer

AT = 7  # joint steps are 3 to 8


@pytest.fixture
def spike(monkeypatch):
    """Loss and gradient of step ``AT`` are a hundred times what they are; its weights before and after."""
    real_step, real_loss, seen, now = Trainer.step, step.joint_loss, [], []

    def weights(trainer):
        chained = trainer.optimizer.chained_optimizers
        moments = [
            value.clone() for one in chained for state in one.optimizer.state.values() for value in state.values()
        ]
        return [p.detach().clone() for p in trainer.model[0].parameters()] + moments

    def watched(trainer):
        now[:] = [trainer.iteration + 1]
        if now == [AT]:
            seen.append(weights(trainer))
        values = real_step(trainer)
        if now == [AT]:
            seen.append(weights(trainer))
        return values

    def joint_loss(*arguments):
        total, count, sums = real_loss(*arguments)
        return (100 * total, count, 100 * sums) if now == [AT] else (total, count, sums)

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(step, "joint_loss", joint_loss)
    return seen


@pytest.mark.parametrize("action", ["flag", "skip"])
@pytest.mark.parametrize("restart", [False, True], ids=["in one go", "after a restart"])
def test_a_spike(shards, tmp_path, spike, capsys, action, restart):
    """Fault 14: a 100x loss spike is flagged or skipped before it changes a weight; the window survives a resume"""
    health = {"loss_spike_action": action, "loss_spike_window": 6}
    checkpoint = {"save": str(tmp_path), "load": str(tmp_path)}
    if restart:
        pretrain(small(shards, checkpoint=checkpoint, health=health, training={"exit_interval": AT - 1}))
    pretrain(small(shards, checkpoint=checkpoint, health=health))
    before, after = spike
    assert all(map(torch.equal, before, after)) == (action == "skip")
    rows = {row["iteration"]: row for row in metrics(tmp_path) if "loss" in row}
    assert rows[AT]["loss"] > 50 * rows[AT - 1]["loss"]
    assert [row["loss_spikes"] for row in rows.values()] == [0] * (AT - 1) + [1, 1]
    assert [row["skipped_iterations"] for row in rows.values()][-1] == (action == "skip")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"step {AT}: ")]
    assert len(said) == 1 and "is a spike, the median of the last 4 is" in said[0]
    assert said[0].endswith("skipped, 1 in a row") == (action == "skip")
