"""The router of a mixture of experts, whose load-balancing loss does not depend on the layout.

Clean and mask tokens are both routed and both counted; fill is routed and not counted (megatron-core's
``padding_mask``). megatron-core weights a micro-batch's balancing loss with the tokens of one *rank*: too little by the
number of ranks that share the micro-batch (up to 0.16.1), and unevenly where their fill differs. Here every rank uses
the tokens of the whole micro-batch, so that after the division by the global token count the loss is the mean over the
tokens of the global batch, as the other losses are.
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
    """megatron-core's top-k router with a load-balancing loss in units of the global batch's tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balancing_loss = torch.zeros(2, dtype=torch.float64)  # sum over tokens, tokens; since the last report

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Which experts each token goes to; remembers how many of the tokens count."""
        tokens = logits.new_tensor(logits.shape[:-1].numel()) if padding_mask is None else (~padding_mask).sum()
        # not megatron-core's own count, which its all-reduce overwrites with that of all ranks
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
        """Let ``aux_loss`` (this rank's share of the micro-batch's) join the backward of ``activation``."""
        tokens = self.own_tokens.clone()
        dist.all_reduce(tokens, group=self.tp_cp_group)
        if self.training:
            share = aux_loss.detach() / aux_loss_coeff * tokens
            report = torch.stack([share, self.own_tokens]).double()
            self.balancing_loss = self.balancing_loss.to(report.device) + report
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens)


def use_balanced_router(layer: ModuleSpec) -> None:
    """Put the router into a layer spec whose feed-forward is a mixture of experts."""
    mlp = layer.submodules.mlp
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # 0.19.x, 0.16.1
    submodules.router = BalancedRouter
    # a backward outside of a schedule leaves this in a shape that the next schedule's scale cannot be copied into
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def keep_experts_apart(model: GPTModel) -> None:
    """Let data parallelism reduce experts over the ranks that hold the same ones, also with EP = 1.

    megatron-core marks them so only for EP > 1. Without the mark, experts that tensor-parallel ranks hold whole (ETP
    1) are never summed over those ranks, whose tokens differ, and parts of different experts (ETP > TP) are added up:
    wrong gradients, without a word. It also makes a checkpoint's optimizer state the same for every EP.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def take_balancing_loss(chunks: Iterable[GPTModel]) -> Tensor:
    """This rank's balancing losses since the last call, summed over its layers: float64 ``[2]``, sum and tokens.

    Summed over all ranks, their quotient is the mean over layers and over the tokens of the global batch, unweighted;
    1 is perfect balance.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            router = layer.mlp.router
            total = total.to(router.balancing_loss.device) + router.balancing_loss
            router.balancing_loss = torch.zeros_like(router.balancing_loss)
    return total
