"""Which places of the diffusion half are masked where not all are (``--masking random``): the paper's ablation.

Each block draws its own share t, uniformly from EPSILON to 1, and each of its places is a mask token with probability t
and else the clean token; the loss of those that are masked counts 1 / t times, so its expectation is the sum over all
places (the masked diffusion models' objective; arXiv 2511.08923 compares total masking with it).

As in ``blocks.py`` the draw is a pure function of (seed, the packed sequence's number over all epochs).
"""

import numpy as np
from numpy.typing import NDArray

from tidar_megatron.data.order import MASKS, draws

EPSILON = 1e-3
_UNIT = 2.0**-53


def random_masks(seq_length: int, block_size: int, seed: int, number: int) -> NDArray[np.float32]:
    """Of each place of packed sequence ``number``: 1 / t where it is masked, 0 where it shows its token.

    Returns:
        float32 ``[S]``.
    """
    blocks = seq_length // block_size
    uniform = (draws(blocks + seq_length, seed, number, MASKS) >> np.uint64(11)).astype(np.float64) * _UNIT
    share = np.repeat(EPSILON + (1 - EPSILON) * uniform[:blocks], block_size)
    return np.where(uniform[blocks:] < share, 1 / share, 0.0).astype(np.float32)
