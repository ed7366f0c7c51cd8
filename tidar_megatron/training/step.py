"""Run an optimizer step or an evaluation with megatron-core's forward-backward schedule."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from tidar_megatron.data.doubled import Batch, TokenCounts, set_loss_weights
from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.models.draft_metrics import EvaluationSums, evaluation_sums
from tidar_megatron.models.experts import take_balancing_loss
from tidar_megatron.models.gpt import run_model, unwrap
from tidar_megatron.models.loss import draft_loss, joint_loss
from tidar_megatron.models.output_layer import full_states, output_weight, split_passes
from tidar_megatron.training.optimizer import full_weights, gradient_norm, update_weights


@dataclass(frozen=True)
class StepResult:
    """The result of a step. Losses are means over the supervised tokens of the global batch, in nats."""

    ar_loss: float | None  # None if only draft weights are trained
    diffusion_loss: float | None  # None in the AR warm-up
    loss: float  # the minimized loss: the AR loss in the warm-up, the diffusion loss of drafts, else a weighted mean
    grad_norm: float  # before clipping
    balancing_loss: float | None = None  # MoE: the unweighted mean over layers; 1 is perfect balance


Model = list[DistributedDataParallel]  # this rank's chunks: one, or VPP of them


def _run_schedule(model: Model, batches: list[Batch], forward_step: Callable, *, forward_only: bool) -> list[Tensor]:
    """Run the micro-batches, and return the loss function's reports on the last stage, an empty list on the others.

    The list is emptied, so that a micro-batch and the masks of its attention schedule are freed after its backward.
    """
    chunks = [unwrap(chunk) for chunk in model]
    micro_batch_size, length = batches[0].tokens.shape
    length *= chunks[0].pg_collection.cp.size()  # megatron-core divides it by the CP size
    interleaved, count = len(model) > 1, len(batches)
    iterators = [_taken(deque(batches)) for _ in model]
    batches.clear()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=model if interleaved else model[0],
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=length,
        forward_only=forward_only,
    )


def _taken(batches: deque[Batch]) -> Iterator[Batch]:
    while batches:
        yield batches.popleft()


def _training_forward(data_iterator: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, partial]:
    batch, chunk = next(data_iterator), unwrap(model)
    loss = joint_loss if chunk.draft_passes is None else draft_loss
    return run_model(model, batch), partial(loss, chunk, batch)


def forward_backward(
    model: Model,
    batches: list[Batch],
    ar_loss_weight: float,
    ranks: Ranks,
    on_start: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Fill the model's ``main_grad`` with the gradient of the joint loss over the global batch. Collective.

    The supervised tokens of all ranks and micro-batches are counted before the first forward, so that the loss is a
    mean over all of them, independently of how they are split.

    Args:
        model: This rank's model chunks.
        batches: This rank's micro-batches; the list is emptied.
        ar_loss_weight: The weight of the AR loss (alpha).
        ranks: The process groups of this rank.
        on_start: A function that is called when the tokens of all ranks have been counted.

    Returns:
        The sums of the AR and the diffusion losses, float64 ``[2]``, and their counts, int64 ``[2]``, both over the
        global batch and the same on every rank. If only some blocks are chosen, the second sum is an estimate of the
        sum over all blocks.
    """
    counts = torch.tensor(astuple(TokenCounts.of(batches)))
    counts = ranks.sum_over_data(counts.to(ranks.device))
    total = TokenCounts(*counts.tolist())
    at_hand = [batch.to(ranks.device) for batch in batches]
    batches.clear()
    for batch in at_hand:
        set_loss_weights(batch, total, ar_loss_weight)
    del batch
    for chunk in model:
        chunk.zero_grad_buffer()
    on_start()
    reports = _run_schedule(model, at_hand, _training_forward, forward_only=False)
    sums = torch.stack(reports).sum(0) if reports else torch.zeros(2, dtype=torch.float64, device=ranks.device)
    return ranks.sum_over_data(ranks.from_last_stage(sums)), counts[:2]


def train_step(
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: list[Batch],
    ar_loss_weight: float,
    ranks: Ranks,
    approve: Callable[[float, float], bool] = lambda loss, grad_norm: True,
    on_start: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run forward and backward over this rank's micro-batches, clip the gradient and update the weights. Collective.

    The list of micro-batches is emptied. The update and the step of the schedule are skipped if ``approve`` returns
    false for the loss and the gradient norm; the norm is computed for it before the update, because megatron-core's
    optimizer returns it only afterwards. ``on_start`` is as in :func:`forward_backward`.
    """
    optimizer.zero_grad()
    doubled, trains_drafts = batches[0].doubled, unwrap(model[0]).draft_passes is not None
    sums, counts = forward_backward(model, batches, ar_loss_weight, ranks, on_start)
    ar, diffusion = (sums / counts.clamp(min=1)).tolist()
    loss = (ar_loss_weight * ar + diffusion) / (1 + ar_loss_weight) if doubled else ar
    grad_norm = gradient_norm(optimizer, model)
    if approve(loss, grad_norm):
        update_weights(optimizer, grad_norm)
        scheduler.step(increment=1)
    return StepResult(
        ar_loss=None if trains_drafts else ar,
        diffusion_loss=diffusion if doubled else None,
        loss=loss,
        grad_norm=grad_norm,
        balancing_loss=_balancing_loss([unwrap(chunk) for chunk in model], ranks),
    )


def _balancing_loss(chunks: list[GPTModel], ranks: Ranks) -> float | None:
    if chunks[0].config.num_moe_experts is None or not chunks[0].config.moe_aux_loss_coeff:
        return None
    total, tokens = ranks.sum_over_all(take_balancing_loss(chunks).to(ranks.device)).tolist()
    return total / tokens


def evaluate(model: Model, batches: list[Batch], block_size: int, ranks: Ranks) -> dict[str, float | list[float]]:
    """Return both losses and the draft metrics over held-out batches, the same on every rank. Collective.

    Every rank must pass the same number of micro-batches (``data/loader.py`` pads with unsupervised rows); the list is
    emptied.
    """

    def forward(data_iterator: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, Callable]:
        batch = next(data_iterator)
        chunk = unwrap(model)

        def report(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if chunk.draft_passes is None:
                states = full_states(chunk, hidden)
            else:
                states = torch.cat([full_states(chunk, part) for part in split_passes(hidden, batch)])
            weight, vocab_size = output_weight(chunk), chunk.unpadded_vocab_size
            sums = evaluation_sums(states, weight, batch, block_size, ranks.groups.tp, vocab_size)
            return hidden.new_zeros(()), hidden.new_zeros((), dtype=torch.int32), sums.values

        return run_model(model, batch), report

    for chunk in model:
        chunk.eval()
    at_hand = [batch.to(ranks.device) for batch in batches]
    batches.clear()
    with torch.no_grad(), full_weights(model):  # megatron-core's forward_only alone still records the graph
        reports = _run_schedule(model, at_hand, forward, forward_only=True)
    for chunk in model:
        chunk.train()
    total = torch.stack(reports).sum(0) if reports else EvaluationSums.zeros(block_size, ranks.device).values
    return EvaluationSums(ranks.sum_over_data(ranks.from_last_stage(total))).means()
