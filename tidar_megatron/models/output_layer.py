"""The output layer of a GPTModel. It computes no logits: the loss multiplies by its weight, chunk by chunk."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from tidar_megatron.data.doubled import Batch


class OutputLayer(ColumnParallelLinear):
    """A replacement for a GPTModel's output layer, with the same weight under the same name, that computes no logits.

    It stays a module that the model calls, because DDP's pre-forward hook waits for weights still being gathered.
    """

    def __init__(self, layer: ColumnParallelLinear) -> None:
        """Adopt the weight of ``layer``, which is None if it is tied to the embedding of the same stage."""
        super().__init__(
            layer.input_size,
            layer.output_size,
            config=layer.config,
            init_method=layer.config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=layer.tp_group,
        )
        self.weight = layer.weight

    def forward(self, hidden: Tensor, *unused: Any, **unused_too: Any) -> tuple[Tensor, None]:
        """Return a view of ``hidden`` ``[t, b, h]`` as ``[b, t, h]``: GPTModel transposes it back, as if logits."""
        return hidden.transpose(0, 1), None


def output_weight(chunk: GPTModel) -> Tensor:
    """Return the weight ``[V / TP, h]`` of the last chunk's output layer: its own, or the embedding's if tied."""
    return chunk.shared_embedding_or_output_weight() if chunk.output_layer.weight is None else chunk.output_layer.weight


def full_states(chunk: GPTModel, hidden: Tensor) -> Tensor:
    """Return the hidden states of all tokens, for products with this rank's rows of the output layer's weight.

    Args:
        chunk: the last chunk of the model.
        hidden: the chunk's output ``[t, b, h]``; under sequence parallelism this rank's part of it, ``[t / TP, b, h]``.

    Returns:
        ``[t, b, h]``. The backward sums its gradient over the tensor-parallel ranks.
    """
    group = chunk.pg_collection.tp
    if chunk.config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(hidden, group=group)


def split_passes(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Split the output ``[t, b, h]`` of a chunk that ran in two passes, each sharded by itself: clean tokens, masks."""
    clean, masks = hidden.tensor_split([len(hidden) * batch.seq_length // batch.tokens.shape[1]])
    return clean, masks
