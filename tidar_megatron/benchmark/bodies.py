"""Larger bodies for a model: it generates and drafts the same tokens, at the cost of a larger model.

The speed of a decoding plan depends on the cost of forwards and on the acceptance rate of drafts. Training a model that
drafts well takes hours for each size, so this module grows one instead. The added channels, heads, feed-forward width
and layers take part in every product and write zeros to the residual stream, so the logits are those of the small model
up to rounding.
"""

from copy import deepcopy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tidar_megatron.errors import UserError
from tidar_megatron.inference.lean import use_lean_forward
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.quantizing import quantize_model
from tidar_megatron.inference.wrapping import wrap_model

BODIES = {
    "11M": {"hidden_size": 384, "intermediate_size": 1200, "num_attention_heads": 6, "num_hidden_layers": 6},
    "88M": {"hidden_size": 768, "intermediate_size": 2400, "num_attention_heads": 12, "num_hidden_layers": 12},
}
INTO_STREAM = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")


def in_body(model: DecodeModel, body: str, quantize: str | None = None) -> DecodeModel:
    """Return a copy of ``model`` in a body (``own``, ``useless``, or one of :data:`BODIES`), laid out for decoding.

    ``useless`` is :func:`with_useless_drafts`, a larger body is :func:`grown`. ``quantize`` is as in
    :func:`~tidar_megatron.inference.loading.load_model`.
    """
    if body == "own":
        made = wrap_model(deepcopy(model.causal_lm), model.tokenizer)
    else:
        made = with_useless_drafts(model) if body == "useless" else grown(model, body)
    if quantize is not None:
        quantize_model(made, quantize)
    else:
        use_lean_forward(made, take=True)
    return made


def grown(model: DecodeModel, body: str) -> DecodeModel:
    """Return ``model``, a Llama or Qwen without biases, grown to one of :data:`BODIES`.

    The number of query heads per K/V head does not change.

    Raises:
        UserError: the model is larger than that body.
    """
    old = model.causal_lm.config
    sizes = dict(BODIES[body])
    if any(getattr(old, name) > size for name, size in sizes.items()):
        raise UserError(f"--bodies {body}: the model is larger; use a smaller one, or leave out this body")
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
                value *= narrower  # the mean square of the wider stream is smaller by this factor squared
            weight.copy_(value)
    return wrap_model(larger, model.tokenizer)


def with_useless_drafts(model: DecodeModel) -> DecodeModel:
    """Return a copy with a random embedding for the mask token, whose drafts are nearly always wrong.

    Its AR output is the same, because the mask token never occurs in a text.
    """
    assert model.mask_token_id is not None
    model = wrap_model(deepcopy(model.causal_lm), model.tokenizer)
    table = model.causal_lm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        row = torch.randn(table.shape[1], generator=generator) * table.float().std().cpu()
        table[model.mask_token_id] = row.to(table)
    return model
