"""The KV cache of the sequences being decoded: allocated once, never copied.

A forward writes the K/V of *all* its tokens after the committed tokens of their sequence and reads both in place, as
views. Committing the first n new tokens only advances the sequence's length; the entries after it are stale, and the
next forward overwrites them. Dropping rejected drafts and masks is therefore free, and the bytes moved per step do not
grow with the context.
"""

import torch
from torch import Tensor

BLOCK = 512  # torch's flash kernel for CPUs handles the keys in blocks of this size
SIZES = (64, 128, 192, 384, BLOCK)  # sizes of the last block that give a row the same bits; 256 is not one of them


def rounded_keys(length: int) -> int:
    """Return the number of keys to read for ``length`` visible ones, so that no bit depends on tokens after a row.

    The kernel adds up the values of a block in an order that depends on the size of the block, and so on how many
    tokens a plan adds. With these sizes, masked keys at the end add exact zeros in an order that stays.
    """
    blocks, rest = divmod(length, BLOCK)
    return blocks * BLOCK + (next(size for size in SIZES if size >= rest) if rest else 0)


class KVPool:
    """A KV cache for ``slots`` sequences of up to ``capacity`` tokens, the uncommitted tokens of a forward included.

    The capacity is rounded up (:func:`rounded_keys`).

    The K and V of a layer, ``[slots, N, capacity, D]`` each, are allocated by the layer's first write, when their shape
    is known whatever the model family.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, rounded_keys(capacity)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(
        self, layer: int, slot: int, length: int, key: Tensor, value: Tensor, read: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values, ``[1, N, T, D]`` each, after the first ``length`` tokens of a slot.

        Returns:
            Views of the slot's K and V, ``[1, N, read, D]`` each, by default ``length + T`` tokens; further ones are
            stale and must be masked.
        """
        tokens = key.shape[2]
        read = length + tokens if read is None else read
        assert length + tokens <= read <= self.capacity
        keys, values = (room[slot : slot + 1, :, :read] for room in self._of(layer, key, value))
        keys.narrow(2, length, tokens).copy_(key)
        values.narrow(2, length, tokens).copy_(value)
        return keys, values

    def rooms(self, layers: int, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the K and the V of each layer, ``[slots, N, capacity, D]``, for a caller that writes them itself.

        Args:
            layers: The number of layers.
            like: A tensor ``[1, N, T, D]`` that tells shape, dtype and device.
        """
        pairs = [self._of(layer, like, like) for layer in range(layers)]
        return [keys for keys, _ in pairs], [values for _, values in pairs]

    def write_side_by_side(
        self, layer: int, slots: slice, places: tuple[Tensor, Tensor], read: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of n adjacent slots, ``[n, N, T, D]`` each.

        Args:
            layer: The layer's index.
            slots: The n slots.
            places: The number of each token's slot among the n, int64 ``[n, 1]``, and its position there, ``[n, T]``.
            read: The number of tokens to read per slot, at least those of the longest sequence.
            key: The keys to write.
            value: The values to write.

        Returns:
            Views of the slots' K and V, ``[n, N, read, D]`` each; entries after the end of a sequence are stale and
            must be masked.
        """
        assert read <= self.capacity
        rows = [tensor[slots] for tensor in self._of(layer, key, value)]
        for room, new in zip(rows, (key, value), strict=True):
            room[places[0], :, places[1]] = new.transpose(1, 2)  # scatter_ takes milliseconds for it in bfloat16
        keys, values = (room[:, :, :read] for room in rows)
        return keys, values

    def read(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Return views of the K and V of a slot's first ``length`` tokens, ``[N, length, D]`` each."""
        keys, values = self._layers[layer]
        return keys[slot, :, :length], values[slot, :, :length]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Zero the slot of a sequence that may have failed: a NaN left there spreads even through masked scores."""
        for keys, values in self._layers.values():
            keys[slot].zero_()
            values[slot].zero_()

    @torch.inference_mode()
    def clear_all(self) -> None:
        """Zero all slots."""
        for keys, values in self._layers.values():
            keys.zero_()
            values.zero_()

    @property
    def num_bytes(self) -> int:
        """The number of bytes allocated for K and V."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)

    def _of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = self._room(key), self._room(value)
        return self._layers[layer]

    def _room(self, like: Tensor) -> Tensor:
        _, heads, _, head_dim = like.shape
        # zeros, not empty: padding is multiplied by a weight of 0 and must be finite
        return torch.zeros(self.slots, heads, self.capacity, head_dim, dtype=like.dtype, device=like.device)
