"""Transformers' own model of a folder, to compare with."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from tidar_megatron.hf_folder.model import check_folder, load_causal_lm
from tidar_megatron.inference.model import DecodeModel


def load_stock(folder: str | Path, model: DecodeModel, never_masks: bool = True) -> PreTrainedModel:
    """As ``AutoModelForCausalLM`` loads it, with its own attention; dtype and device are ``model``'s.

    Its ``generate`` is greedy and ends with no token; with ``never_masks`` it never emits the mask token, as ours.
    """
    causal_lm = load_causal_lm(folder, check_folder(folder), model.dtype)
    never = [model.mask_token_id] if never_masks and model.mask_token_id is not None else None
    causal_lm.generation_config = GenerationConfig(do_sample=False, suppress_tokens=never)
    return causal_lm.to(model.device).eval()
