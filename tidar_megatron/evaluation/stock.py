"""Load a folder with transformers' own attention, as the reference for comparisons."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from tidar_megatron.hf_folder.model import check_folder, load_causal_lm
from tidar_megatron.inference.model import DecodeModel


def load_stock(folder: str | Path, model: DecodeModel, never_masks: bool = True) -> PreTrainedModel:
    """Load a folder as ``AutoModelForCausalLM`` does, with transformers' attention, in ``model``'s dtype and device.

    Its ``generate`` is greedy and has no end-of-sequence token.

    Args:
        folder: The Hugging Face folder.
        model: The engine's model of the same folder.
        never_masks: Whether to suppress the mask token in ``generate``, as the engine does.

    Raises:
        UserError: a file of the folder is missing or broken.
    """
    causal_lm = load_causal_lm(folder, check_folder(folder), model.dtype)
    never = [model.mask_token_id] if never_masks and model.mask_token_id is not None else None
    causal_lm.generation_config = GenerationConfig(do_sample=False, suppress_tokens=never)
    return causal_lm.to(model.device).eval()
