"""Decode forwards of a few static shapes, as CUDA graphs: on a GPU, kernel launches take longer than small kernels run.

The inputs of a step - token ids, positions, positions in the pool, lengths, masks - are written into static buffers,
and sizes are rounded up to a few values. One CUDA graph therefore serves every step of a :class:`Shape`, whatever plans
the sequences follow, and nothing is recompiled or recaptured as texts grow.

Prompt chunks are large and vary in size; they go through :class:`PackedForward`, as on a CPU.
"""

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.forward import (
    Forward,
    PackedForward,
    Part,
    SharedCall,
    padded_mask,
    position_offsets,
)
from tidar_megatron.inference.model import DecodeModel

# The sizes of a sequence's part. Plans with K = 2, 4, 8 or 16 and one, two or all branches need no padding: all
# branches are 6, 20, 72 and 272 tokens.
TOKENS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 72, 96, 128, 192, 272, 320)
MARGIN = max(larger - size for size, larger in pairwise(TOKENS)) - 1  # tokens that rounding up may add to a part


class Shape(NamedTuple):
    """The shape of a forward: ``sequences`` of ``tokens`` each, which read ``keys`` of the pool; all rounded up."""

    sequences: int
    tokens: int
    keys: int

    @staticmethod
    def of(parts: Sequence[Part], pool: KVPool) -> "Shape | None":
        """Return the shape for these parts, or None if they are too large or the pool has no room for the rounding."""
        most = max(part.layout.num_tokens for part in parts)
        tokens = next((size for size in TOKENS if size >= most), None)
        if tokens is None or any(part.length + tokens > pool.capacity for part in parts):
            return None
        sequences = min(_power_of_two(1 + max(part.slot for part in parts)), pool.slots)
        keys = rounded_prefix(max(part.length for part in parts)) + -(-tokens // 64) * 64
        return Shape(sequences, tokens, min(keys, pool.capacity))


def rounded_prefix(length: int) -> int:
    """Return the prefix size for ``length`` tokens: 64 more than 256, 384, 512, 768, 1024, 1536, ...

    All are multiples of 64, as kernels prefer. The 64 are for the tokens that follow a prompt of a round length.
    """
    power = _power_of_two(max(length - 64, 256))
    return 64 + (power * 3 // 4 if power > 256 and length - 64 <= power * 3 // 4 else power)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


class Capturing(NamedTuple):
    """The stream and memory pool in which all graphs of an engine are captured, on the model's GPU.

    The graphs share memory, because the output of one is consumed before another runs.
    """

    stream: torch.cuda.Stream
    memory: object

    @staticmethod
    def on(device: torch.device) -> "Capturing":
        """Create a stream and a graph memory pool on a GPU, which need not be the current device."""
        with torch.cuda.device(device):
            return Capturing(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


class StaticForward:
    """A :class:`Forward` of one static shape; slots without a sequence in the forward hold padding tokens."""

    def __init__(self, pool: KVPool, shape: Shape, device: torch.device, capturing: "Capturing | None" = None) -> None:
        self._pool, self._shape, self._capturing = pool, shape, capturing
        count = shape.sequences * shape.tokens
        self._numbers = torch.zeros(2, count, dtype=torch.int64, device=device)  # token ids, positions
        self._lengths = torch.zeros(shape.sequences, dtype=torch.int64, device=device)
        self._visible = torch.zeros(shape.sequences, shape.tokens, shape.tokens, dtype=torch.bool, device=device)
        self._call: SharedCall | None = None
        self._uses = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None
        self.mask_rows = torch.zeros(count, dtype=torch.bool, device=device)
        self.starts: list[int] = []
        self.num_tokens = count

    def load(self, parts: Sequence[Part], mask_token_id: int | None) -> None:
        """Write the parts of the sequences to the static buffers."""
        sequences, tokens, _ = self._shape
        ids, positions = torch.zeros(2, sequences, tokens, dtype=torch.int64)
        lengths, masks = torch.zeros(sequences, dtype=torch.int64), torch.zeros(sequences, tokens, dtype=torch.bool)
        for part in parts:
            assert part.length + tokens <= self._pool.capacity
            row, brought = [*part.tokens, *[mask_token_id] * part.layout.num_masks], part.layout.num_tokens
            ids[part.slot, :brought] = torch.tensor(row)
            positions[part.slot, :brought] = part.length + torch.tensor(position_offsets(part.layout))
            lengths[part.slot] = part.length
            masks[part.slot, part.layout.num_drafts : brought] = True
            self._visible[part.slot].copy_(padded_mask(part.layout, tokens, self._visible.device))
        self._numbers.copy_(torch.stack([ids, positions]).flatten(1))
        self._lengths.copy_(lengths)
        self.mask_rows.copy_(masks.flatten())
        self.starts = [part.slot * tokens for part in parts]

    def inputs(self, mask_token_id: int | None, device: torch.device) -> Tensor:
        """Return token ids and position ids; see :meth:`Forward.inputs`. Every forward calls this first."""
        self._call = None
        return self._numbers[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write K/V and compute attention; see :meth:`Forward.attend`."""
        if self._call is None:
            self._call = self._as_call(query.shape[1] // key.shape[1], query.dtype)
        return self._call.attend(self._pool, layer, query, key, value, scale)

    def _as_call(self, groups: int, dtype: torch.dtype) -> SharedCall:
        slots = slice(0, self._shape.sequences)
        return SharedCall.of(slots, self._lengths, self._visible, self._shape.keys, groups, dtype)

    def run(self, model: DecodeModel) -> Tensor:
        """Run the forward and return hidden states ``[tokens, hidden]``, which the next run overwrites."""
        self._uses += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._uses <= WARM_UP or self._numbers.device.type != "cuda":
            return model.forward(self)
        else:
            assert self._capturing is not None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._numbers.device):
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, pool=self._capturing.memory, stream=self._capturing.stream):
                    self._hidden = model.forward(self)
            self._graph = graph
            self._graph.replay()  # capturing does not run the kernels
        assert self._hidden is not None
        return self._hidden


WARM_UP = 3  # eager runs before capture: libraries choose kernels in the first, and rare shapes do not pay off


class Forwards:
    """The runner of an engine's forwards, which owns the KV pool.

    Args:
        model: The model that decodes.
        slots: The number of slots in the pool.
        capacity: The size of a slot in tokens.
        static: Whether decode steps use a few static shapes (on a GPU, as CUDA graphs); by default on a GPU only.
    """

    def __init__(self, model: DecodeModel, slots: int, capacity: int, static: bool | None = None) -> None:
        model.check_attention()
        self.is_static = is_static(model, static)
        self.shapes: dict[Shape, StaticForward] = {}
        self.pool = KVPool(slots, rounded_prefix(capacity + MARGIN) if self.is_static else capacity)
        self._model = model
        self._capturing = Capturing.on(model.device) if model.device.type == "cuda" else None

    def run(self, parts: Sequence[Part], reads_prompt: bool = False) -> tuple[Tensor, Forward]:
        """Run one forward over the parts.

        Args:
            parts: The parts, in the order of their slots.
            reads_prompt: Whether any part is a chunk of a prompt; such forwards are never static.

        Returns:
            Hidden states ``[tokens, hidden]``, and the forward, whose ``starts`` are the first rows of the parts.
        """
        shape = Shape.of(parts, self.pool) if self.is_static and not reads_prompt else None
        if shape is None:
            packed = PackedForward(self.pool, parts)
            return self._model.forward(packed), packed
        if shape not in self.shapes:
            self.shapes[shape] = StaticForward(self.pool, shape, self._model.device, self._capturing)
        forward = self.shapes[shape]
        forward.load(parts, self._model.mask_token_id if self._model.drafts is None else 0)
        return forward.run(self._model), forward


def is_static(model: DecodeModel, static: bool | None) -> bool:
    """Return whether decode steps use static shapes: ``static``, or by default whether the model is on a GPU."""
    return model.device.type == "cuda" if static is None else static


KEPT = 2  # idle runners that a model keeps; each holds a KV pool


def borrow(model: DecodeModel, slots: int, capacity: int, static: bool | None, borrower: object) -> Forwards:
    """Return a runner of forwards that is ``borrower``'s alone until it is garbage-collected.

    With static shapes the model keeps the runner then, with its CUDA graphs, stream and memory, for the next borrower
    that needs as many slots of the same rounded size. Otherwise each request would pay for warm-up and capture.
    """
    if not is_static(model, static):
        return Forwards(model, slots, capacity, static)
    key = slots, rounded_prefix(capacity + MARGIN)
    forwards: Forwards | None = model.idle_forwards.pop(key, None)
    if forwards is None:
        forwards = Forwards(model, slots, capacity, static)
    else:
        model.check_attention()
        forwards.pool.clear_all()
    weakref.finalize(borrower, _keep, model, key, forwards).atexit = False
    return forwards


def _keep(model: DecodeModel, key: tuple[int, int], forwards: Forwards) -> None:
    model.idle_forwards.pop(key, None)
    model.idle_forwards[key] = forwards
    while len(model.idle_forwards) > KEPT:
        del model.idle_forwards[next(iter(model.idle_forwards))]  # the one that was given back first
