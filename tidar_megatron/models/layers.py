"""The modules that TiDAR plugs into megatron-core's GPTModel: core attention, rotary positions, RMSNorm."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from tidar_megatron.config import ModelConfig
from tidar_megatron.context_parallel import own_clean_tokens
from tidar_megatron.models.attention import AttentionSchedule, hybrid_attention
from tidar_megatron.models.attention.schedules import AttentionSchedules
from tidar_megatron.models.draft_layers import DraftPasses


class HybridCoreAttention(MegatronModule):
    """The core attention of the layer spec. Its ``attention_mask`` is the visibility metadata, not a mask.

    megatron-core passes ``attention_mask`` from the model's forward to every layer, through pipeline stages and
    activation recomputation, as long as it is a tensor. So the metadata travel as that argument.

    Under context parallelism the clean keys and values of all ranks are gathered (and their gradients reduce-scattered)
    a few K/V heads at a time; attention over one gather is computed before the next gather starts. The keys and values
    of mask tokens never leave their rank, so the traffic equals that of plain AR training.

    When only draft weights are trained, clean tokens and mask tokens arrive in two passes (``draft_layers.py``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        schedules: AttentionSchedules,
        heads_per_gather: int,
        passes: DraftPasses | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.schedules, self.heads_per_gather = schedules, heads_per_gather
        self.layer_number, self.passes = layer_number, passes
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **unused: Any
    ) -> Tensor:
        """Compute attention over this rank's queries.

        Args:
            query: ``[t, b, h, d]``.
            key, value: ``[t, b, g, d]``.
            attention_mask: the visibility metadata, int32 ``[b, keys, 4]``.

        Returns:
            ``[t, b, h * d]``.
        """
        size, groups = self.cp_group.size(), key.shape[2]
        masks_alone = self.passes is not None and not self.passes.is_clean
        schedule = self.schedules.find(attention_mask, len(query), masks_alone)
        if self.passes is not None and masks_alone:
            clean_key, clean_value = self.passes.kept(attention_mask, self.layer_number)
            mask_key, mask_value = key, value
        else:
            clean = own_clean_tokens(len(query), attention_mask.shape[1], size)
            (clean_key, mask_key), (clean_value, mask_value) = (x.tensor_split([clean]) for x in (key, value))
            if self.passes is not None:
                self.passes.keep(attention_mask, self.layer_number, key, value)
            if size == 1:
                return self._attend(query, key, value, schedule)
        outputs = []
        step = self.heads_per_gather if size > 1 else groups
        for first in range(0, groups, step):
            heads = slice(first, min(first + step, groups))
            queries = slice(*(query.shape[2] // groups * edge for edge in (heads.start, heads.stop)))
            clean_pair = torch.stack([clean_key[:, :, heads], clean_value[:, :, heads]], dim=1)
            if size > 1:
                clean_pair = gather_from_sequence_parallel_region(
                    clean_pair,
                    tensor_parallel_output_grad=True,  # the backward reduce-scatters: all ranks used these keys
                    group=self.cp_group,
                )
            all_keys = torch.cat([clean_pair[:, 0], mask_key[:, :, heads]])
            all_values = torch.cat([clean_pair[:, 1], mask_value[:, :, heads]])
            outputs.append(self._attend(query[:, :, queries], all_keys, all_values, schedule))
        return torch.cat(outputs, dim=-1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, schedule: AttentionSchedule) -> Tensor:
        q_bhtd, k_bgkd, v_bgkd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out_bhtd = hybrid_attention(q_bhtd, k_bgkd, v_bgkd, schedule, self.softmax_scale)
        return out_bhtd.permute(2, 0, 1, 3).flatten(2)


class PositionRotaryEmbedding(nn.Module):
    """Rotary angles for the positions in the batch: 0..S-1 for the clean tokens, and again for their mask tokens.

    The frequencies come from megatron-core's RotaryEmbedding. The module replaces the one that GPTModel calls with
    ``position_ids`` (its "mrope" path), so no method of GPTModel needs an override. The angles are cached for as many
    positions as the longest batch so far has tokens, and for ``positions`` at least, because a pass over masks alone
    may have fewer tokens than positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        device: torch.device | str = "cpu",
        positions: int = 0,
    ) -> None:
        super().__init__()
        rotary = RotaryEmbedding(
            config.kv_channels, rotary_percent=1.0, rotary_base=model.rotary_base, use_cpu_initialization=True
        )
        # neither is a buffer: both must stay float32 in a bfloat16 model
        self.inv_freq = scaled_frequencies(rotary.inv_freq, model).to(device)
        self.angles = self.inv_freq.new_empty(0, config.kv_channels)
        self.cp_size, self.positions = config.context_parallel_size, positions

    def forward(self, position_ids: Tensor, mrope_section: Any = None, cp_group: Any = None) -> Tensor:
        """Return the float32 angles ``[t, b, 1, d]`` of int64 ``position_ids`` ``[b, t]``.

        For one row that is expanded over the batch (stride 0), the shape is ``[t, 1, 1, d]``.
        """
        if position_ids.stride(0) == 0:
            position_ids = position_ids[:1]
        longest = max(
            position_ids.shape[1] * self.cp_size, self.positions
        )  # a bound: reading the largest position would synchronize
        if len(self.angles) < longest:
            half = torch.arange(longest, device=self.inv_freq.device).float().unsqueeze(-1) * self.inv_freq
            self.angles = torch.cat([half, half], dim=-1)
        return self.angles[position_ids.t()].unsqueeze(2)


def scaled_frequencies(inv_freq: Tensor, model: ModelConfig) -> Tensor:
    """Scale rotary frequencies ``[d/2]`` for texts longer than the original context length, as transformers does.

    ``linear`` divides all frequencies by the factor. ``llama3`` keeps high frequencies, divides low ones by the factor,
    and interpolates between the two.
    """
    kind, factor = model.rope_scaling_type, model.rope_scaling_factor
    if kind == "none":
        return inv_freq
    if kind == "linear":
        return inv_freq / factor
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    waves = model.rope_original_max_position_embeddings * inv_freq / (2 * math.pi)  # periods in the original length
    kept = ((waves - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


class RMSNorm(nn.Module):
    """RMSNorm whose weight gradient is summed over tensor-parallel ranks under sequence parallelism.

    megatron-core's wrapper of torch's norms refuses sequence parallelism. This module marks its weight the way
    ``finalize_model_grads`` expects.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., hidden_size]`` over the last dimension; shape and dtype stay the same."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
