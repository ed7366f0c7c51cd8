"""Transformers' own model of a folder, to compare with."""

from pathlib import Path

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tidar_megatron.inference.model import DecodeModel


def load_stock(folder: str | Path, model: DecodeModel, never_masks: bool = True) -> PreTrainedModel:
    """As ``AutoModelForCausalLM`` loads it, with its own attention; dtype and device are ``model``'s.

    Its ``generate`` is greedy and ends with no token; with ``never_masks`` it never emits the mask token, as ours.
    """
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False)
    never = [model.mask_token_id] if never_masks and model.mask_token_id is not None else None
    causal_lm.generation_config = GenerationConfig(do_sample=False, suppress_tokens=never)
    return causal_lm.to(model.device).eval()
