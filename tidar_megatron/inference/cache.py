"""Keys and values of the sequences being decoded: allocated once, never copied.

A forward writes the K/V of *all* its tokens behind the committed ones of their sequence and reads the whole in place,
as views. Keeping the first n of them moves one integer, the sequence's length; what lies behind is dead and the next
forward writes over it. So rejected drafts and masks cost nothing to drop, and bytes moved per step do not grow with the
context.
"""

import torch
from torch import Tensor

from tidar_megatron.attention_kernels import HIDDEN, hiding


class KVPool:
    """``slots`` sequences of up to ``capacity`` tokens, those of a forward that are not kept included.

    A layer, K and V ``[slots, N, capacity, D]``, is allocated by its first write, which is where its shape is known for
    certain, whatever the model family.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._bias: Tensor | None = None

    def write(self, layer: int, slot: int, length: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put ``[1, N, T, D]`` each behind a slot's first ``length`` tokens; views of its ``length + T`` tokens."""
        stop = length + key.shape[2]
        assert stop <= self.capacity
        keys, values = self._of(layer, key, value)
        keys, values = keys.narrow(0, slot, 1).narrow(2, 0, stop), values.narrow(0, slot, 1).narrow(2, 0, stop)
        keys.narrow(2, length, stop - length).copy_(key)
        values.narrow(2, length, stop - length).copy_(value)
        return keys, values

    def write_side_by_side(
        self, layer: int, slots: slice, places: Tensor, longest: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put ``[n, N, T, D]`` each at ``places``, int64 ``[n, T]``, of n slots whose longest holds so many tokens.

        Returns:
            Views of what was there before, ``[n, N, longest, D]``; what is behind a shorter one is not its own.
        """
        assert longest <= self.capacity
        rows = [tensor[slots] for tensor in self._of(layer, key, value)]
        where = places[:, None, :, None]
        for room, new in zip(rows, (key, value), strict=True):
            room.scatter_(2, where.expand(new.shape), new)
        keys, values = (room[:, :, :longest] for room in rows)
        return keys, values

    def hidden_behind(self, lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores over the first ``longest`` places, to hide those behind ``lengths``, int64 ``[n]``.

        ``[n, 1, 1, longest]``: 0, or next to minus infinity. One tensor for all calls, so the next one overwrites it.
        """
        if self._bias is None or self._bias.dtype != dtype or self._bias.device != lengths.device:
            self._bias = torch.zeros(self.slots, self.capacity, dtype=dtype, device=lengths.device)
            self._places = torch.arange(self.capacity, dtype=torch.float32, device=lengths.device)
        bias = self._bias[: len(lengths), :longest]
        torch.sub((lengths - 0.5)[:, None], self._places[:longest], out=bias)
        bias.clamp_(max=0).mul_(-4 * HIDDEN)
        return bias.clamp_(min=hiding(dtype))[:, None, None]

    def read(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of the first ``length`` tokens, each ``[N, length, D]``."""
        keys, values = self._layers[layer]
        return keys[slot, :, :length], values[slot, :, :length]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Of a sequence that failed, or may have: what is no number would be one in no sum, hidden or not."""
        for keys, values in self._layers.values():
            keys[slot].zero_()
            values[slot].zero_()

    @property
    def num_bytes(self) -> int:
        """What is allocated."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)

    def _of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = self._room(key), self._room(value)
        return self._layers[layer]

    def _room(self, like: Tensor) -> Tensor:
        _, heads, _, head_dim = like.shape
        # zeros: what is padded is multiplied by a weight of 0, and must be a number
        return torch.zeros(self.slots, heads, self.capacity, head_dim, dtype=like.dtype, device=like.device)
