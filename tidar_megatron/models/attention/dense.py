"""The reference backend: one call of torch's attention with the full mask."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_megatron.attention_mask import may_attend


class DenseSchedule:
    """The schedule of one batch: its full mask, bool ``[b, 1, t, k]``."""

    def __init__(self, visibility: Tensor, queries: tuple[slice, ...], device: str) -> None:
        rows = torch.cat([visibility[:, part] for part in queries], dim=1)
        self.mask = may_attend(rows, visibility).unsqueeze(1).to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Compute :func:`tidar_megatron.models.attention.hybrid_attention` with the full mask."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, self.mask, scale=scale, enable_gqa=grouped)
