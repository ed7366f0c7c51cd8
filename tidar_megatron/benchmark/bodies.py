"""The same model in a larger body: it says the same and drafts the same, at a larger model's cost.

How fast a plan is depends on what forwards cost and on how often drafts are accepted. A model that drafts well takes
hours to train at each size; one can be grown instead. What is added - channels, heads, feed-forward width, layers -
takes part in every product and writes zeros to the residual stream, so logits are those of the small model up to
rounding.
"""

from copy import deepcopy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tidar_megatron.errors import UserError
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.wrapping import wrap_model

BODIES = {
    "11M": {"hidden_size": 384, "intermediate_size": 1200, "num_attention_heads": 6, "num_hidden_layers": 6},
    "88M": {"hidden_size": 768, "intermediate_size": 2400, "num_attention_heads": 12, "num_hidden_layers": 12},
}
INTO_STREAM = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")


def in_body(model: DecodeModel, body: str) -> DecodeModel:
    """``own``: the model; ``useless``: a copy :func:`with_useless_drafts`; else :func:`grown`."""
    if body == "own":
        return model
    return with_useless_drafts(model) if body == "useless" else grown(model, body)


def grown(model: DecodeModel, body: str) -> DecodeModel:
    """``model``, a Llama or Qwen without biases, in one of :data:`BODIES`; query heads per K/V head stay as they are.

    Raises:
        UserError: it does not fit into that body.
    """
    old = model.causal_lm.config
    sizes = dict(BODIES[body])
    if any(getattr(old, name) > size for name, size in sizes.items()):
        raise UserError(f"--bodies {body}: the model is larger; use a smaller one, or leave that body out")
    groups = old.num_attention_heads // old.num_key_value_heads
    config = deepcopy(old)
    config.update(sizes | {"num_key_value_heads": sizes["num_attention_heads"] // groups, "head_dim": old.head_dim})
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    config._attn_implementation = "eager"
    larger = AutoModelForCausalLM.from_config(config).to(model.device, model.dtype)
    small: dict[str, Tensor] = model.causal_lm.state_dict()
    narrower = (old.hidden_size / config.hidden_size) ** 0.5
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in larger.named_parameters():
            value = torch.randn(weight.shape, generator=generator) * 0.02
            if name.endswith(INTO_STREAM):
                value.zero_()
            if name in small:
                value[tuple(slice(size) for size in small[name].shape)] = small[name].cpu()
            if weight.dim() == 1 and ".self_attn." not in name:
                value *= narrower  # the mean square of the wider stream is smaller by its square
            weight.copy_(value)
    return wrap_model(larger, model.tokenizer)


def with_useless_drafts(model: DecodeModel) -> DecodeModel:
    """A copy whose mask token means something else than what it was trained to: it drafts, and nearly always wrong.

    Its autoregression is the same, for the mask token is never in a text.
    """
    assert model.mask_token_id is not None
    model = wrap_model(deepcopy(model.causal_lm), model.tokenizer)
    table = model.causal_lm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        row = torch.randn(table.shape[1], generator=generator) * table.float().std().cpu()
        table[model.mask_token_id] = row.to(table)
    return model
