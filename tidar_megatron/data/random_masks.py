"""Random masking of the diffusion half (``--masking random``), the paper's ablation.

Each block draws a share t, uniformly from EPSILON to 1. Each of its places is a mask token with probability t, and the
clean token otherwise. The loss of a masked place is multiplied by 1 / t, so its expectation is the sum over all places.
This is the objective of masked diffusion models; arXiv 2511.08923 compares it with total masking.

As in ``blocks.py``, the draw is a pure function of (seed, the packed sequence's number over all epochs).
"""

import numpy as np
from numpy.typing import NDArray

from tidar_megatron.data.order import MASKS, draws

EPSILON = 1e-3
_UNIT = 2.0**-53


def random_masks(seq_length: int, block_size: int, seed: int, number: int) -> NDArray[np.float32]:
    """Return the loss factor of each place of packed sequence ``number``.

    Args:
        seq_length: S.
        block_size: B.
        seed: The seed of the data.
        number: The packed sequence's number over all epochs.

    Returns:
        float32 ``[S]``: 1 / t if the place is masked, 0 if it has the clean token.
    """
    blocks = seq_length // block_size
    uniform = (draws(blocks + seq_length, seed, number, MASKS) >> np.uint64(11)).astype(np.float64) * _UNIT
    share = np.repeat(EPSILON + (1 - EPSILON) * uniform[:blocks], block_size)
    return np.where(uniform[blocks:] < share, 1 / share, 0.0).astype(np.float32)
