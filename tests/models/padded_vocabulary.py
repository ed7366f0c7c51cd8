"""Train one small model with different paddings of its vocabulary, and record what must not depend on them.

Imported by test_padded_vocabulary.py (one rank), and launched with two:

    torchrun --nproc-per-node 2 -m tests.models.padded_vocabulary OUTPUT_FOLDER
"""

import dataclasses
import sys
from pathlib import Path

import torch

MULTIPLES = (2, 128, 4096)  # of 97 ids: a column of padding; a part of the last rank's; all of the last rank's
LAYOUTS = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}
CASES = [("tp2", False), ("tp2sp", True), ("pp2", False)]


def measure(layout, multiple, untied):
    """Losses, draft metrics and gradients of the first weights; losses after two steps; what became of the padding."""
    from tidar_megatron.distributed.groups import initialize
    from tidar_megatron.models.gpt import build_model
    from tidar_megatron.models.initialize import initialize_weights
    from tidar_megatron.models.parameters import VOCABULARY, own_parameters
    from tidar_megatron.training.layout_check import Documents
    from tidar_megatron.training.layout_variants import variant_config
    from tidar_megatron.training.optimizer import build_optimizer, wrap_model
    from tidar_megatron.training.step import evaluate, forward_backward, train_step

    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "make_vocab_size_divisible_by": multiple,
        "untie_embeddings_and_output_weights": untied,
    }
    config = variant_config("packed", 1, LAYOUTS[layout], model)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=2))
    ranks = initialize(config.parallel, 0)
    chunks = build_model(config, config.model.vocab_size, ranks)
    initialize_weights(chunks, 0)
    ddp = wrap_model(chunks, config)
    optimizer, scheduler = build_optimizer(ddp, config)
    documents, block_size = Documents(config, 30), config.tidar.block_size

    def batches(step):
        return documents.batches(step, config, ranks, doubled=True, every_block=True)

    result = {"evaluation": evaluate(ddp, batches(0), block_size, ranks)}
    optimizer.zero_grad()
    sums, counts = forward_backward(ddp, batches(0), 0.8, ranks)
    result["losses"] = (sums / counts).tolist()
    grads = {name: parameter.main_grad.clone() for name, parameter, _ in own_parameters(chunks)}
    result["tp_rank"], result["grads"] = ranks.groups.tp.rank(), grads
    result["grad_norm"] = torch.cat([grad.flatten() for grad in grads.values()]).double().norm().item()
    steps = [train_step(ddp, optimizer, scheduler, batches(n), 0.8, ranks) for n in (1, 2)]
    result["later"] = [loss for step in steps for loss in (step.ar_loss, step.diffusion_loss, step.grad_norm)]
    result["rows"] = {name: p.detach().clone() for name, p, _ in own_parameters(chunks) if name in VOCABULARY}
    return result


def main():
    from tidar_megatron.distributed.groups import shut_down

    results = {}
    for layout, untied in CASES:
        for multiple in MULTIPLES:
            results[layout, untied, multiple] = measure(layout, multiple, untied)
    torch.save(results, Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
