"""Attention under the visibility rule of :mod:`tidar_megatron.attention_mask`: one call with several backends."""

from tidar_megatron.models.attention.hybrid import AttentionSchedule, choose_backend, hybrid_attention, make_schedule

__all__ = ["AttentionSchedule", "choose_backend", "hybrid_attention", "make_schedule"]
