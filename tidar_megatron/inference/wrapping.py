"""Wrap a model that is in memory for decoding. A class that computes more than the engine does is refused."""

from typing import Any
from weakref import WeakSet

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tidar_megatron.errors import UserError
from tidar_megatron.inference.attention import ATTENTION_NAME
from tidar_megatron.inference.compatibility import check_compatible
from tidar_megatron.inference.model import DecodeModel, fuse_norms
from tidar_megatron.mask_token import other_meaning
from tidar_megatron.tidar_section import check_tidar


def wrap_model(causal_lm: PreTrainedModel, tokenizer: Any = None) -> DecodeModel:
    """Wrap a model that is already in memory; it is switched to evaluation and to our attention, in place.

    Raises:
        UserError: the class computes more than the engine does, or a broken ``tidar`` section.
    """
    config = causal_lm.config
    if any(weight.is_meta for weight in causal_lm.parameters()):
        raise UserError(
            f"{type(causal_lm).__name__}: some of its weights are not in memory (device_map or accelerate offloads "
            "them); load the whole model on one device"
        )
    if torch.is_autocast_enabled(causal_lm.device.type):
        raise UserError("autocast is not served: decode outside its block, with a model that was loaded in the dtype")
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
        raise UserError(f"{given} {mask_token_id} is {meaning}; it may mean nothing else; choose another id")
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
    return model


_CHECKED: WeakSet[PreTrainedModel] = WeakSet()  # models that were compared with what transformers computes


def _tidar_section(config: PretrainedConfig) -> tuple[int | None, int | None]:
    """Return the mask token's id and the block size; None twice without a section."""
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
