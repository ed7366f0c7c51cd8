"""One optimizer step, and one evaluation: megatron-core's forward-backward schedule over our batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from tidar_megatron.data.doubled import Batch, set_loss_weights
from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.models.draft_metrics import EvaluationSums, evaluation_sums
from tidar_megatron.models.loss import joint_loss


@dataclass(frozen=True)
class StepResult:
    """What a step did. Losses are means over the supervised tokens of the global batch, in nats."""

    ar_loss: float
    diffusion_loss: float | None  # None in the AR warm-up
    grad_norm: float  # before clipping


def _run_schedule(
    model: DistributedDataParallel, batches: list[Batch], forward_step: Callable, *, forward_only: bool
) -> list[Tensor]:
    """One pass over the micro-batches; the loss function's reports on the last stage, nothing on the others."""
    micro_batch_size, length = batches[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=length,
        forward_only=forward_only,
    )


def _training_forward(data_iterator: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, partial]:
    batch = next(data_iterator)
    losses = model(batch.tokens, batch.position_ids, batch.visibility, labels=batch.labels)
    return losses, partial(joint_loss, batch)


def forward_backward(
    model: DistributedDataParallel, batches: list[Batch], ar_loss_weight: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Fill the model's ``main_grad`` with the gradient of the joint loss over the whole global batch.

    The supervised tokens of all ranks and micro-batches are counted before the first forward, so that the loss is a
    mean over all of them however they are split.

    Returns:
        The sums of the AR and the diffusion losses, float64 ``[2]``, and their counts, int64 ``[2]``, both over the
        global batch and the same on every rank.
    """
    counts = torch.tensor([[batch.ar_tokens, batch.diffusion_tokens] for batch in batches]).sum(0)
    counts = ranks.sum_over_data(counts.to(ranks.device))
    ar_tokens, diffusion_tokens = counts.tolist()
    for batch in batches:
        set_loss_weights(batch, ar_tokens, diffusion_tokens, ar_loss_weight)
    model.zero_grad_buffer()
    batches = [batch.to(ranks.device) for batch in batches]
    reports = _run_schedule(model, batches, _training_forward, forward_only=False)
    sums = torch.stack(reports).sum(0) if reports else torch.zeros(2, dtype=torch.float64, device=ranks.device)
    return ranks.sum_over_data(ranks.from_last_stage(sums)), counts


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: list[Batch],
    ar_loss_weight: float,
    ranks: Ranks,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, clip, update."""
    optimizer.zero_grad()
    sums, counts = forward_backward(model, batches, ar_loss_weight, ranks)
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    ar, diffusion = (sums / counts.clamp(min=1)).tolist()
    return StepResult(ar_loss=ar, diffusion_loss=diffusion if batches[0].doubled else None, grad_norm=float(grad_norm))


def evaluate(
    model: DistributedDataParallel, batches: list[Batch], block_size: int, ranks: Ranks
) -> dict[str, float | list[float]]:
    """Both losses and the draft metrics over held-out batches, the same on every rank.

    Every rank brings the same number of micro-batches (``data/loader.py`` pads with unsupervised rows).
    """

    def forward(data_iterator: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, Callable]:
        batch = next(data_iterator)
        logits = model(batch.tokens, batch.position_ids, batch.visibility)

        def report(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            sums = evaluation_sums(logits, batch, block_size, ranks.groups.tp)
            return logits.new_zeros(()), logits.new_zeros((), dtype=torch.int32), sums.values

        return logits, report

    model.eval()
    with torch.no_grad():  # megatron-core's forward_only alone still records the graph
        reports = _run_schedule(model, [batch.to(ranks.device) for batch in batches], forward, forward_only=True)
    model.train()
    total = torch.stack(reports).sum(0) if reports else EvaluationSums.zeros(block_size, ranks.device).values
    return EvaluationSums(ranks.sum_over_data(ranks.from_last_stage(total))).means()
