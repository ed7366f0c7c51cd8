"""Which blocks of a packed sequence have masks, where a step trains only some of them (``--diffusion-block-fraction``).

The window's n blocks are cut into m strata of neighbours, and of each stratum one block is drawn; the others have no
masks at all. A drawn block stands for its whole stratum: its losses count as often as the stratum has blocks, so every
block's loss has its full weight in expectation and the sum over the window is unbiased (Horvitz-Thompson). No block's
loss depends on which others are drawn, since masks of different blocks do not see each other.

The draw is a pure function of (seed, the packed sequence's number over all epochs): it knows no rank, micro-batch or
step, so another layout or a resumed run draws the same. Strata rather than m blocks out of n: every part of the window
has its share, so with m a multiple of 2 x CP each context-parallel chunk has as many masks as any other.
"""

import numpy as np
from numpy.typing import NDArray

from tidar_megatron.data.order import BLOCKS, draws


def strata(blocks: int, chosen: int) -> NDArray[np.int64]:
    """The edges of ``chosen`` strata of ``blocks`` blocks, int64 ``[chosen + 1]``: stratum i is edges i .. i + 1.

    Their sizes differ by one at the most.
    """
    assert 1 <= chosen <= blocks
    return np.arange(chosen + 1, dtype=np.int64) * blocks // chosen


def choose_blocks(blocks: int, chosen: int, seed: int, number: int) -> NDArray[np.int64]:
    """The blocks of packed sequence ``number`` that have masks: int64 ``[chosen]``, rising, one of each stratum.

    The same on every machine and numpy version, as all of ``order.py``.
    """
    edges = strata(blocks, chosen)
    drawn = draws(chosen, seed, number, BLOCKS) % np.diff(edges).astype(np.uint64)  # uniform to 1 in 2**64 / size
    return edges[:-1] + drawn.astype(np.int64)
