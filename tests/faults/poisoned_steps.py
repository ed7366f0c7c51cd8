"""Steps poisoned on one rank: ``poisoned_steps.py TRAIN VALID FOLDER RANK``, alone or under torchrun.

Every layout and poison: two sound steps, two poisoned, one sound; each rank compares itself with itself. Last, a whole
run that is poisoned from step 3 on, which has to end with its own status.
"""

import copy
import math
import os
import sys
from pathlib import Path

import torch

from tests.training.small_runs import small
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.program import run_tool
from tidar_megatron.training import loop, step
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.optimizer import full_weights
from tidar_megatron.training.trainer import Trainer

SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    1: {"one": {}},
    2: {
        "DP2": {},
        "DP2 sharded": SHARDED,
        "TP2": {"tensor_model_parallel_size": 2},
        "PP2": {"pipeline_model_parallel_size": 2},
        "CP2": {"context_parallel_size": 2},
    },
}
poisoned = False  # on this rank, from now on


def poison_loss(trainer):
    """What is reported of the loss, the gradients stay."""
    real = step.joint_loss

    def joint_loss(*arguments):
        total, count, sums = real(*arguments)
        return total, count, sums * math.nan if poisoned else sums

    step.joint_loss = joint_loss
    return lambda: setattr(step, "joint_loss", real)


def poison_gradient(value):
    """One parameter's gradient, the loss stays."""

    def poison(trainer):
        parameter = next(p for name, p in trainer.model[0].named_parameters() if "layernorm" in name)
        return parameter.register_hook(lambda grad: grad * value if poisoned else grad).remove

    return poison


POISONS = {
    "NaN loss": poison_loss,
    "NaN gradient": poison_gradient(math.nan),
    "infinite gradient": poison_gradient(math.inf),
}


def state(trainer):
    """Everything that an update changes, copied."""
    with full_weights(trainer.ddp):
        weights = [p.detach().clone() for chunk in trainer.model for p in chunk.parameters()]
    chained = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    moments = [copy.deepcopy(list(one.optimizer.state.values())) for one in chained]
    rates = [(group["lr"], group.get("step")) for group in trainer.optimizer.param_groups]
    return {"weights": weights, "moments": moments, "rates": rates, "schedule": trainer.scheduler.state_dict()}


def same(one, other):
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def held(shards, layout, poison, whose):
    global poisoned
    trainer = Trainer.build(small(shards, parallel=layout, optimizer={"lr_warmup_iters": 0}))
    remove, troubles = poison(trainer), []
    trainer.health.on_trouble = troubles.append
    for _ in range(2):
        trainer.step()
    before, consumed = state(trainer), trainer.consumed_sequences
    poisoned = trainer.ranks.rank == whose
    for number in (1, 2):
        assert trainer.step()["skipped_iterations"] == number
    poisoned = False
    after = state(trainer)
    for name in before:
        assert same(before[name], after[name]), name
    assert before["moments"][0], "nothing to compare"
    assert trainer.consumed_sequences == consumed + 8
    assert [said.split(":")[0] for said in troubles] == ["step 3", "step 4"]
    values = trainer.step()
    assert math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    changed = state(trainer)
    assert not any(same(after[name], changed[name]) for name in ("weights", "moments", "schedule"))
    assert all(weights.isfinite().all() for weights in changed["weights"])
    remove()
    trainer.close()


def poisoned_run(shards, folder, whose):
    """From step 3 on, to the end."""
    real = Trainer.step

    def poisoned_step(self):
        global poisoned
        poisoned = self.ranks.rank == whose and self.iteration >= 2
        return real(self)

    Trainer.step = poisoned_step
    poison_loss(None)
    health = {"max_skipped_iterations_in_a_row": 4}
    pretrain(small(shards, checkpoint={"save": str(folder), "save_interval": 2, "async_save": True}, health=health))


def main():
    torch.set_num_threads(1)
    shards, folder, whose = (Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]), int(sys.argv[4])
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    layouts_end, loop.shut_down = loop.shut_down, lambda orderly=True: None  # torchrun's ranks meet once
    for layout, parallel in LAYOUTS[world_size].items():
        for name, poison in POISONS.items():
            held(shards, parallel, poison, whose)
            if rank == 0:
                print(f"held: {layout}, {name}", flush=True)
    loop.shut_down = layouts_end
    try:
        run_tool(lambda: poisoned_run(shards, folder, whose), rank)
    finally:
        shut_down(orderly=False)


if __name__ == "__main__":
    main()
