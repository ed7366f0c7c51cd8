"""Attention under the rule of :mod:`tidar_megatron.attention_mask`: one call, several backends (``hybrid.py``)."""

from tidar_megatron.models.attention.hybrid import AttentionPlan, choose_backend, hybrid_attention, make_plan

__all__ = ["AttentionPlan", "choose_backend", "hybrid_attention", "make_plan"]
