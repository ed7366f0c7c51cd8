"""Attention of the engine's forwards inside a Hugging Face model, registered with transformers."""

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tidar_megatron.inference.forward import Forward

ATTENTION_NAME = "tidar_packed"


class UnknownAttentionError(TypeError):
    """A model asks for attention that the engine does not compute; the message says what."""


# What transformers' models hand to attention beside queries, keys and values, and what changes nothing here: the
# engine knows positions, lengths and who may attend to whom by itself.
NO_EFFECT = frozenset({"dropout", "use_cache", "position_ids", "output_attentions", "output_hidden_states"})


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, arguments: dict[str, object]) -> None:
    if attention_mask is not None:
        raise UnknownAttentionError("it hands a mask of its own to attention")
    for name, value in arguments.items():
        if value is None or name in NO_EFFECT or (name == "is_causal" and value is True):
            continue
        limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        if name == "sliding_window" and isinstance(value, int) and isinstance(limit, int) and value >= limit:
            continue  # a window that no context fills hides nothing
        raise UnknownAttentionError(f"it asks for {name} in attention")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_forward: Forward | None = None,
    **arguments: object,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface, which hands ``packed_forward`` through from the call of the model.

    Raises:
        UnknownAttentionError: an argument that would change the result and that the engine does not know.
    """
    if packed_forward is None:
        raise UnknownAttentionError(
            "its attention is called without packed_forward (outside the engine, set_attn_implementation('sdpa') first)"
        )
    _refuse_unknown(module, attention_mask, arguments)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_forward.attend(module.layer_idx, query, key, value, scale)
    return out.contiguous(), None  # some classes take a view of it, all others would copy it themselves


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
