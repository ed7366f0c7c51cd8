"""Wrap a model in memory for decoding, and refuse classes that compute more than the engine does."""

from typing import Any
from weakref import WeakSet

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tidar_megatron.errors import UserError
from tidar_megatron.inference.attention import ATTENTION_NAME
from tidar_megatron.inference.compatibility import check_compatible
from tidar_megatron.inference.lean import use_lean_forward
from tidar_megatron.inference.model import DecodeModel, fuse_norms
from tidar_megatron.mask_token import other_meaning
from tidar_megatron.tidar_section import check_tidar


def wrap_model(causal_lm: PreTrainedModel, tokenizer: Any = None) -> DecodeModel:
    """Wrap a model that is already in memory; this switches it to eval mode and the engine's attention, in place.

    Args:
        causal_lm: The model, with all weights on one device.
        tokenizer: Its tokenizer, or None.

    Raises:
        UserError: the class computes more than the engine does, the ``tidar`` section is broken, weights are offloaded,
            or autocast is on.
    """
    config = causal_lm.config
    if any(weight.is_meta for weight in causal_lm.parameters()):
        raise UserError(
            f"{type(causal_lm).__name__}: some of its weights are not in memory (device_map or accelerate offloads "
            "them); load the complete model on one device"
        )
    if torch.is_autocast_enabled(causal_lm.device.type):
        raise UserError("autocast is not supported: decode outside of it, with a model loaded in the wanted dtype")
    causal_lm.eval()
    causal_lm.set_attn_implementation(ATTENTION_NAME)
    if causal_lm.config._attn_implementation != ATTENTION_NAME:
        raise UserError(f"{type(causal_lm).__name__} fixes its own attention; use a Llama, Qwen or Mistral checkpoint")
    context_limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(context_limit, int) or context_limit < 1:
        raise UserError(
            f"{type(causal_lm).__name__}: its config has no max_position_embeddings, so the context limit is unknown; "
            "use a Llama, Qwen or Mistral checkpoint"
        )
    mask_token_id, block_size = _tidar_section(config)
    settings = [part.to_dict() for part in (config, getattr(causal_lm, "generation_config", None)) if part is not None]
    if mask_token_id is not None and (meaning := other_meaning(mask_token_id, tokenizer, *settings)):
        given = "config.json: tidar.mask_token_id" if config.tidar.get("trained", True) else "mask token"
        raise UserError(f"{given} {mask_token_id} is {meaning}; it must have no other meaning; choose another id")
    fuse_norms(causal_lm)
    model = DecodeModel(
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        mask_token_id=mask_token_id,
        block_size=block_size,
        context_limit=context_limit,
        eos_token_ids=_eos_token_ids(causal_lm),
        is_tidar=(getattr(config, "tidar", None) or {}).get("trained", mask_token_id is not None),
    )
    if causal_lm not in _CHECKED:
        check_compatible(model)
        _CHECKED.add(causal_lm)
    use_lean_forward(model)
    return model


_CHECKED: WeakSet[PreTrainedModel] = WeakSet()  # models that have passed check_compatible


def _tidar_section(config: PretrainedConfig) -> tuple[int | None, int | None]:
    """Return the mask token's id and the block size, or (None, None) without a ``tidar`` section."""
    section = getattr(config, "tidar", None)
    if section is None:
        return None, None
    check_tidar(section, config.vocab_size, "config.json")
    mask_token_id, block_size = section.get("mask_token_id"), section.get("block_size")
    if mask_token_id is None or block_size is None:
        raise UserError("config.json: tidar needs mask_token_id and block_size; export the checkpoint again")
    if block_size > config.max_position_embeddings:
        raise UserError(
            f"config.json: tidar.block_size {block_size} is more than max_position_embeddings "
            f"{config.max_position_embeddings}; correct it"
        )
    return mask_token_id, block_size


def _eos_token_ids(causal_lm: PreTrainedModel) -> frozenset[int]:
    ids = getattr(causal_lm.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(causal_lm.config, "eos_token_id", None)
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
