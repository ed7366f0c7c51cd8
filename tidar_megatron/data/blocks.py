"""The choice of blocks that have masks when a step trains only some of them, or blocks that start anywhere.

**Some of the aligned blocks** (``--diffusion-block-fraction``, or ``--blocks-per-sequence``).

The choice is a stratified sample: the n blocks of a packed sequence are cut into m strata of neighbouring blocks, and
one block is drawn from each stratum; the other blocks have no masks. A drawn block represents its stratum: its loss is
multiplied by the number of blocks there, so the sum over the sequence is an unbiased estimate of the sum over all
blocks (Horvitz-Thompson). A block's loss does not depend on which other blocks are drawn, because masks of different
blocks do not see each other.

The draw is a pure function of (seed, the packed sequence's number over all epochs). It does not depend on rank,
micro-batch or step, so another layout or a resumed run draws the same blocks. Strata spread the masks evenly over the
sequence: if m is a multiple of 2 x CP, each context-parallel chunk has the same number of masks.

**Blocks that start anywhere** (``--block-starts anywhere``). Decoding begins a block after any token, not at multiples
of B. So the S places are cut into as many strata as there are blocks, and one start is drawn from each. Blocks may
overlap, and there may be more of them than S / B: a place then has several masks, each with another horizon. Where only
some tokens are supervised, blocks start at those alone.
"""

import numpy as np
from numpy.typing import NDArray

from tidar_megatron.data.order import BLOCKS, draws


def strata(blocks: int, chosen: int) -> NDArray[np.int64]:
    """Return the edges of ``chosen`` strata of ``blocks`` blocks; their sizes differ by at most one.

    Returns:
        int64 ``[chosen + 1]``: stratum i holds the blocks from edge i to edge i + 1, exclusive.
    """
    assert 1 <= chosen <= blocks
    return np.arange(chosen + 1, dtype=np.int64) * blocks // chosen


def choose_blocks(blocks: int, chosen: int, seed: int, number: int) -> NDArray[np.int64]:
    """Return the blocks of packed sequence ``number`` that have masks, one from each stratum.

    The result is the same on every machine and with every numpy version (``order.py``).

    Returns:
        int64 ``[chosen]``, ascending.
    """
    edges = strata(blocks, chosen)
    # the modulo's bias is below stratum size / 2**64
    drawn = draws(chosen, seed, number, BLOCKS) % np.diff(edges).astype(np.uint64)
    return edges[:-1] + drawn.astype(np.int64)


def choose_starts(supervised: NDArray[np.bool_], count: int, seed: int, number: int) -> NDArray[np.int64]:
    """Return the places at which the blocks of packed sequence ``number`` start, one from each stratum of places.

    If there are fewer supervised places than blocks, the others start at places that are not supervised.

    The result is the same on every machine and with every numpy version (``order.py``).

    Args:
        supervised: The places whose tokens are supervised, ``[S]``.
        count: The number of blocks, at most S.
        seed: The seed of the data.
        number: The packed sequence's number over all epochs.

    Returns:
        int64 ``[count]``, ascending and distinct.
    """
    places, rest = np.flatnonzero(supervised), np.flatnonzero(~supervised)
    if len(places) >= count:
        return places[choose_blocks(len(places), count, seed, number)]
    return np.sort(np.append(places, rest[choose_blocks(len(rest), count - len(places), seed, number)]))
