"""K/V cache that is allocated once and never copied.

One forward writes the K/V of *all* its tokens behind the committed ones and reads the whole in place, as views.
Afterwards :meth:`PreallocatedCache.commit` keeps the first ``n`` of them by moving one integer; what lies behind is
dead and the next forward writes over it. So rejected drafts and mask tokens cost nothing to drop, and bytes moved
per step do not grow with the context.
"""

import torch
from torch import Tensor
from transformers import Cache


class PreallocatedCache(Cache):
    """Batch 1. Per layer K and V ``[1, kv_heads, capacity, head_dim]``, in the dtype and on the device of the model.

    ``length`` counts the committed tokens; ``capacity`` must hold them and every token of one forward. A layer is
    allocated by its first write, which is where its shape is known for certain, whatever the model family.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.length = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new K/V ``[1, kv_heads, T, head_dim]`` at ``[length, length + T)``; views ``[0, length + T)``."""
        if layer_idx not in self._keys:
            batch, heads, _, head_dim = key_states.shape
            self._keys[layer_idx] = key_states.new_empty(batch, heads, self.capacity, head_dim)
            self._values[layer_idx] = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        new = key_states.shape[2]
        keys = self._keys[layer_idx].narrow(2, 0, self.length + new)
        values = self._values[layer_idx].narrow(2, 0, self.length + new)
        keys.narrow(2, self.length, new).copy_(key_states)
        values.narrow(2, self.length, new).copy_(value_states)
        return keys, values

    def commit(self, count: int) -> None:
        """Keep the first ``count`` tokens of the last forward; the rest is dropped."""
        assert self.length + count <= self.capacity
        self.length += count

    def committed(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Views of the committed K and V of one layer, each ``[1, kv_heads, length, head_dim]``."""
        return self._keys[layer_idx][:, :, : self.length], self._values[layer_idx][:, :, : self.length]

    # What transformers may ask of any cache.

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"PreallocatedCache(length={self.length}, capacity={self.capacity}, layers={len(self)})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else int(torch.as_tensor(query_length).numel())
        return self.length + new, 0

    def reset(self) -> None:
        self.length = 0
