"""The router of a mixture of experts, whose load-balancing loss does not depend on the layout.

Clean and mask tokens are both routed and counted; fill is routed but not counted (megatron-core's ``padding_mask``).
megatron-core weights a micro-batch's balancing loss by the tokens of one *rank*. Up to 0.16.1 that is too small by the
number of ranks that share the micro-batch, and the weights are uneven where the amount of fill differs. Here every rank
uses the tokens of the full micro-batch. After the division by the global token count, the loss is then the mean over
the tokens of the global batch, like the other losses.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


class BalancedRouter(TopKRouter):
    """megatron-core's top-k router, with a load-balancing loss weighted by the tokens of the micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balancing_loss = torch.zeros(2, dtype=torch.float64)  # [sum over tokens, tokens] since the last report

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Route the tokens with megatron-core's router, and store the number of tokens that count."""
        tokens = logits.new_tensor(logits.shape[:-1].numel()) if padding_mask is None else (~padding_mask).sum()
        # megatron-core's own count is of no use here: its all-reduce overwrites it with the count of all ranks
        self.own_tokens = tokens.float()
        return super().routing(logits, padding_mask=padding_mask, **kwargs)

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: dist.ProcessGroup,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attach ``aux_loss``, this rank's share of the micro-batch's loss, to the backward of ``activation``."""
        tokens = self.own_tokens.clone()
        dist.all_reduce(tokens, group=self.tp_cp_group)
        if self.training:
            share = aux_loss.detach() / aux_loss_coeff * tokens
            report = torch.stack([share, self.own_tokens]).double()
            self.balancing_loss = self.balancing_loss.to(report.device) + report
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens)


def use_balanced_router(layer: ModuleSpec) -> None:
    """Put :class:`BalancedRouter` into a layer spec whose feed-forward is a mixture of experts."""
    mlp = layer.submodules.mlp
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # 0.19.x, 0.16.1
    submodules.router = BalancedRouter
    # a backward outside of megatron-core's schedules leaves a tensor of another shape here, into which the next
    # schedule could not copy its scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def keep_experts_apart(model: GPTModel) -> None:
    """Mark experts so that data parallelism reduces them over the ranks that hold the same experts, also for EP = 1.

    megatron-core marks them only for EP > 1. Without the mark, gradients are silently wrong: experts that each
    tensor-parallel rank holds in full (ETP 1) are not summed over those ranks, whose tokens differ, and parts of
    different experts (ETP > TP) are added up. The mark also makes a checkpoint's optimizer state the same for every EP.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def take_balancing_loss(chunks: Iterable[GPTModel]) -> Tensor:
    """Return and reset this rank's balancing losses since the last call, summed over its layers.

    Returns:
        float64 ``[2]``: the sum over tokens, and the number of tokens. After summing both over all ranks, their
        quotient is the unweighted mean over layers and over the tokens of the global batch; 1 is perfect balance.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            router = layer.mlp.router
            total = total.to(router.balancing_loss.device) + router.balancing_loss
            router.balancing_loss = torch.zeros_like(router.balancing_loss)
    return total
