"""Rows of an input embedding, read from the model's folder when they are needed.

Where input and output embedding are one weight, laying the output layer out for decoding would leave a second copy of
it, a fifth of a small model. A forward needs only the rows of its tokens, so they are read from the file.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidar_megatron.hf_folder.weights import open_safetensors, stored_tensors
from tidar_megatron.inference.products import can_pack

WORTH = 16 * 2**20  # bytes of an embedding from which on memory matters more than the time to read a row


def stored_embedding(folder: str | Path, causal_lm: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """Return a function from token ids, int64 ``[tokens]``, to their embedding, ``[tokens, hidden]``.

    It reads safetensors' memory map of the file, which must not change while the model is used.

    Returns:
        None if input and output embedding are two weights; if they are small, or the output layer is not laid out; or
        if the file does not hold them as they are.
    """
    weight = causal_lm.get_input_embeddings().weight
    if causal_lm.get_output_embeddings().weight is not weight or weight.nbytes < WORTH or not can_pack(weight):
        return None
    name = next(name for name, parameter in causal_lm.named_parameters() if parameter is weight)
    stored = stored_tensors(folder, other_names=True).get(name)
    if stored is None or stored.shape != tuple(weight.shape):
        return None
    table = open_safetensors(stored.file).get_slice(name)
    dtype = weight.dtype

    def rows(ids: Tensor) -> Tensor:
        return torch.cat([table[token : token + 1] for token in ids.tolist()]).to(dtype)

    some = torch.linspace(0, len(weight) - 1, 5).long()
    return rows if torch.equal(rows(some), weight[some]) else None
