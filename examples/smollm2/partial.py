#!/usr/bin/env python
"""Train only a part of a model's weights, as an experiment. Takes the flags of tools/pretrain.py, and one of:

--freeze-layers N   do not train the first N transformer layers
--low-rank R        train a low-rank update B A of rank R to the matrices of all layers (LoRA, arXiv 2106.09685), and
                    the mask token's row of the embeddings; checkpoints hold W + s B A, which any program can load

The experiment runs on one rank. It computes the full gradient and discards a part of it, so it shows the quality of the
model, not the speed of such training. B and A are not saved, so a run cannot resume.
"""

import argparse
import functools
import math

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tidar_megatron.config import Config, parse_config
from tidar_megatron.distributed.groups import world_size_from_environment
from tidar_megatron.errors import UserError
from tidar_megatron.program import run_tool
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.trainer import Trainer

SCALE = 2.0  # s


def freeze(weight: Tensor) -> None:
    """Replace the weight's gradient by zeros: without weight decay, Adam then does not change a single bit of it."""
    weight.register_hook(torch.zeros_like)


class LowRank:
    """A low-rank update ``W + s B A`` of W, ``[out, in]``: B ``[out, r]`` starts as zeros, A ``[r, in]`` as in LoRA."""

    def __init__(self, weight: torch.nn.Parameter, rank: int) -> None:
        self.weight, self.start = weight, weight.detach().float().clone()
        self.B = torch.zeros(weight.shape[0], rank)
        self.A = torch.empty(rank, weight.shape[1])
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B.grad, self.A.grad = torch.zeros_like(self.B), torch.zeros_like(self.A)
        weight.register_hook(self.take)

    def take(self, gradient: Tensor) -> Tensor:
        """Add the gradients of B and A, by the chain rule, and return zeros as the gradient of W."""
        whole = SCALE * gradient.float()
        self.B.grad += whole @ self.A.t()
        self.A.grad += self.B.t() @ whole
        return torch.zeros_like(gradient)

    def write(self) -> None:
        """Write ``W + s B A`` with the current B and A into the model."""
        self.weight.data.copy_(self.start + SCALE * self.B @ self.A)


class PartialTrainer(Trainer):
    """A trainer that trains only a part of the weights."""

    low_rank: tuple[LowRank, ...] = ()

    def step(self) -> dict:
        """Take a step of megatron-core's optimizer, with zero gradients for the rest, then one of B's and A's Adam."""
        skipped = self.health.log_values()["skipped_iterations"]
        values = super().step()
        if self.low_rank:
            if values["skipped_iterations"] == skipped:
                # these gradients are sums over the batch's tokens, not means, but Adam is invariant to their scale
                self.factors.param_groups[0]["lr"] = values["learning_rate"]
                self.factors.step()
            self.factors.zero_grad(set_to_none=False)
            for one in self.low_rank:
                one.write()
        return values

    def train_low_rank(self, model: GPTModel, rank: int) -> None:
        """Train low-rank updates of all layers' matrices and the mask token's embedding row, and freeze the rest."""
        torch.manual_seed(self.config.training.seed)
        matrices = [weight for layer in model.decoder.layers for weight in layer.parameters() if weight.ndim == 2]
        self.low_rank = tuple(LowRank(weight, rank) for weight in matrices)
        embeddings = model.embedding.word_embeddings.weight
        only = torch.zeros(len(embeddings), 1)
        only[self.config.tidar.mask_token_id] = 1.0
        embeddings.register_hook(lambda gradient: gradient * only.to(gradient.dtype))
        changing = {id(weight) for weight in (*matrices, embeddings)}
        for weight in model.parameters():
            if id(weight) not in changing:
                freeze(weight)
        opt = self.config.optimizer
        betas = (opt.adam_beta1, opt.adam_beta2)
        self.factors = torch.optim.Adam([f for one in self.low_rank for f in (one.B, one.A)], opt.lr, betas)


def build(args: argparse.Namespace, config: Config) -> Trainer:
    """Build the trainer that the flags select.

    Raises:
        UserError: there is weight decay, or more than one rank.
    """
    if config.optimizer.weight_decay or world_size_from_environment() > 1:
        raise UserError("--freeze-layers and --low-rank: need --weight-decay 0 and one rank")
    trainer = PartialTrainer.build(config)
    (model,) = trainer.model
    if args.low_rank:
        trainer.train_low_rank(model, args.low_rank)
    for layer in model.decoder.layers[: args.freeze_layers]:
        for weight in layer.parameters():
            freeze(weight)
    return trainer


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], add_help=False)
    parser.add_argument("--freeze-layers", type=int, default=0)
    parser.add_argument("--low-rank", type=int, default=0)
    args, rest = parser.parse_known_args()
    pretrain(parse_config(rest), functools.partial(build, args))


if __name__ == "__main__":
    run_tool(main)
