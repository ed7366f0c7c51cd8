"""Run one small model in a layout and record everything that must not depend on the layout.

Imported by tests (a layout of one rank, in the test's own process), and launched with several ranks:

    torchrun --nproc-per-node 2 -m tests.layouts SETUP.json OUTPUT_FOLDER tp2 pp2 ...

Many layouts run in one launch: the import of megatron-core takes longer than they do.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = {
    "one": {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},  # of a model with experts
    "dp2sharded": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}
STEPS = 2


class Waits(TorchDispatchMode):
    """Count where the host reads a tensor's value; on a GPU it waits there for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def run_layout(setup, name, folder):
    """The first step's token losses and this rank's gradients, then losses and gradient norms of two steps."""
    from tidar_megatron.config import build_config
    from tidar_megatron.models.initialize import initialize_drafts
    from tidar_megatron.models.loss import token_losses
    from tidar_megatron.models.parameters import own_parameters
    from tidar_megatron.training.layout_check import gather_gradients
    from tidar_megatron.training.optimizer import gradient_norm
    from tidar_megatron.training.step import forward_backward
    from tidar_megatron.training.trainer import Trainer

    torch.set_num_threads(1)
    config = build_config({**setup, "parallel": LAYOUTS[name], "checkpoint": {"save": str(folder / name)}})
    trainer = Trainer.build(config)
    ranks, alpha, drafts = trainer.ranks, config.ar_loss_weight, config.trains_drafts
    if drafts:
        initialize_drafts(trainer.model, config.training.seed, output_std=0.05)  # so that every weight matters
        trainer.optimizer.reload_model_params()
    before = trainer.evaluate() if drafts else None
    last, hidden = trainer.model[-1], []
    handle = last.register_forward_hook(lambda module, args, out: hidden.append(out.detach().clone()))
    sums, counts = forward_backward(trainer.ddp, trainer.step_batches(), alpha, ranks)
    handle.remove()
    batches = trainer.step_batches() if ranks.is_last_stage and not drafts else []
    hidden = hidden if batches else []
    losses = [token_losses(last, batch, states)[1] for batch, states in zip(batches, hidden, strict=bool(batches))]
    base = {n: p.detach().clone() for n, p, _ in own_parameters(trainer.model)} if drafts else {}
    with Waits() as waits:
        norm = gradient_norm(trainer.optimizer, trainer.ddp)
    gather_gradients(trainer.ddp)
    result = {
        "norm": norm,
        "waits": waits.count,
        "tp_rank": ranks.groups.tp.rank(),
        "dp_rank": ranks.groups.dp.rank(),
        "first_losses": (sums / counts).tolist(),
        "supervised": [(b.ar_tokens, b.diffusion_tokens) for b in trainer.step_batches()],
        "token_losses": losses,
        "grads": {n: p.main_grad.detach().clone() for n, p, _ in own_parameters(trainer.model, drafts)},
        "weights": {n: p.detach().clone() for n, p, _ in own_parameters(trainer.model, drafts)} | base,
    }
    steps = [trainer.step() for _ in range(STEPS)]
    result["losses"] = [(s["ar_loss"], s["diffusion_loss"]) for s in steps]
    result["grad_norms"] = [s["grad_norm"] for s in steps]
    trainer.write_run_folder()
    trainer.save()  # right after a step: under overlap the weights are still to be gathered
    result["evaluation"], result["before"] = trainer.evaluate(), before
    result["next"] = [trainer.step() for _ in range(STEPS)]
    return result


def main():
    from tidar_megatron.distributed.groups import shut_down

    setup = json.loads(Path(sys.argv[1]).read_text())
    for name in sys.argv[3:]:
        result = run_layout(setup, name, Path(sys.argv[2]))
        torch.save(result, Path(sys.argv[2]) / f"{name}-{torch.distributed.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
