"""Draft weights on a frozen model: low-rank pairs on its linear layers, which act on mask tokens alone.

With ``--train drafts`` the base model is not changed: clean tokens go through it without a graph, and the mask tokens
then go through the same layers, where a pair ``B A`` of low rank adds to each linear layer (gated LoRA, arXiv
2507.11851). The two passes are apart, so a pair needs no mask of rows, and the backward has mask tokens only. The keys
and values of the clean pass are kept for the mask pass of the same micro-batch.

Under tensor parallelism a pair is sharded as its layer: A replicated and B by rows beside a column-parallel layer, A by
columns and B replicated beside a row-parallel one. What crosses ranks has the pair's rank, not the layer's width.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from tidar_megatron.config import DraftConfig
from tidar_megatron.models.parameters import is_draft_weight


class DraftPasses:
    """The pass that runs on this rank, and the keys and values of clean passes in flight.

    megatron-core may start further micro-batches before the backward of one, and may recompute layers in the backward.
    So keys and values are found by the visibility metadata of their micro-batch, and live as long as those.
    """

    def __init__(self) -> None:
        self.is_clean = False
        self._kept: dict[tuple, dict[int, tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def clean(self, visibility: Tensor) -> Iterator[None]:
        """Run the clean pass of a micro-batch in this block, without a graph.

        Args:
            visibility: The metadata that the mask pass will receive, int32 ``[b, keys, 4]``.
        """
        key = _address(visibility)
        if key not in self._kept:  # a chunk of an interleaved pipeline adds its layers to those of the chunks before
            self._kept[key] = {}
            weakref.finalize(visibility, self._kept.pop, key, None).atexit = False
        self.is_clean = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.is_clean = False

    def keep(self, visibility: Tensor, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values of a layer; ``visibility`` is a view of the micro-batch's metadata."""
        self._kept[_address(visibility)][layer] = key, value

    def kept(self, visibility: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a layer has kept for a micro-batch."""
        return self._kept[_address(visibility)][layer]


def _address(visibility: Tensor) -> tuple:
    return visibility.device, visibility.data_ptr()


class LowRankPair(nn.Module):
    """The product of two weights, ``alpha / rank * B A``, for the rows of mask tokens.

    Args:
        inputs, outputs: The widths of this rank's part of the linear layer.
        config: megatron-core's configuration.
        drafts: The configuration of the draft weights.
        group: The tensor-parallel ranks.
        sharded: Which weight is sharded over them: ``a`` beside a row-parallel layer, else ``b``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: TransformerConfig,
        drafts: DraftConfig,
        group: dist.ProcessGroup,
        sharded: str,
    ) -> None:
        super().__init__()
        self.scale = drafts.draft_alpha / drafts.draft_rank
        self.sequence_parallel, self.group, self.sharded = config.sequence_parallel, group, sharded
        self.a = nn.Parameter(torch.empty(drafts.draft_rank, inputs, dtype=config.params_dtype))
        self.b = nn.Parameter(torch.zeros(outputs, drafts.draft_rank, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.a, sharded == "a", 1, 1)
        set_tensor_model_parallel_attributes(self.b, sharded == "b", 0, 1)
        # the replicated weight sees this rank's part of the sequence, so its gradient is summed over the ranks
        (self.b if sharded == "a" else self.a).sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output ``[t, b, outputs]`` and what the pair adds to it.

        Args:
            x: The input of the layer, ``[t, b, inputs]``; of a column-parallel layer under sequence parallelism this
                rank's part, ``[t / TP, b, inputs]``.
            output: The output of the layer.
        """
        inner = F.linear(x, self.a) * self.scale
        if self.sharded == "a" and self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.group)
        elif self.sharded == "a":
            inner = reduce_from_tensor_model_parallel_region(inner, group=self.group)
        elif self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self.group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.group)
        return torch.addmm(output.flatten(0, 1), inner.flatten(0, 1), self.b.t()).view_as(output)


class _Paired:
    """A linear layer of megatron-core with a pair; it stays under its name, and its weight too."""

    draft: LowRankPair
    passes: DraftPasses

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        return (output if self.passes.is_clean else self.draft(input_, output)), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        names = {f"draft.{self.draft.sharded}": 1 if self.draft.sharded == "a" else 0}
        weights = {f"draft.{name}": weight for name, weight in self.draft.named_parameters()}
        made = make_sharded_tensors_for_checkpoint(
            weights,
            prefix,
            names,
            sharded_offsets,
            tp_group=self.draft.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.is_gated and (name := f"{prefix}draft.b") in made:
            made[name] = apply_swiglu_sharded_factory(made[name], sharded_offsets)
        return {**found, **made}

    is_gated = False


class PairedColumnParallelLinear(_Paired, ColumnParallelLinear):
    """A column-parallel linear layer with a pair.

    Args:
        args, kwargs: Those of megatron-core's layer.
        drafts: The configuration of the draft weights.
        passes: Which pass runs.
        is_gated: Whether the outputs are the gate and the up projection of a gated linear unit.
    """

    def __init__(
        self, *args: Any, drafts: DraftConfig, passes: DraftPasses, is_gated: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.passes, self.is_gated = passes, is_gated
        sizes = self.input_size, self.output_size_per_partition
        self.draft = LowRankPair(*sizes, self.config, drafts, self.tp_group, sharded="b")


class PairedRowParallelLinear(_Paired, RowParallelLinear):
    """A row-parallel linear layer with a pair; the arguments are those of :class:`PairedColumnParallelLinear`."""

    def __init__(self, *args: Any, drafts: DraftConfig, passes: DraftPasses, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes = passes
        sizes = self.input_size_per_partition, self.output_size
        self.draft = LowRankPair(*sizes, self.config, drafts, self.tp_group, sharded="a")


class MaskEmbedding(nn.Module):
    """The input of mask tokens: one trained row, apart from the frozen embedding table."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
        # each rank of a sequence-parallel group has a part of the tokens
        self.weight.sequence_parallel = config.sequence_parallel
        self._shards = config.tensor_model_parallel_size if config.sequence_parallel else 1

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings ``[t, b, h]`` of ``[b, t]`` masks; under sequence parallelism ``[t / TP, b, h]``."""
        b, t = tokens.shape
        return self.weight.expand(t // self._shards, b, -1)


def freeze_base(model: nn.Module) -> None:
    """Exclude all weights but the draft weights from training: they get no gradient, buffer or optimizer state."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_draft_weight(name))
