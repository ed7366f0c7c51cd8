"""The engine's attention function for Hugging Face models, registered with transformers."""

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tidar_megatron.inference.forward import Forward

# a folder's own copy of this module (custom_generate) registers its function under another name
ATTENTION_NAME = f"tidar_packed_{__name__.replace('.', '_')}"


class UnknownAttentionError(TypeError):
    """The error raised when a model needs attention that the engine does not implement; the message says what."""


# Arguments that transformers' models pass to attention and that have no effect here: the engine derives positions,
# lengths and the mask itself.
NO_EFFECT = frozenset({"dropout", "use_cache", "position_ids", "output_attentions", "output_hidden_states"})


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, arguments: dict[str, object]) -> None:
    if attention_mask is not None:
        raise UnknownAttentionError("it hands a mask of its own to attention")
    for name, value in arguments.items():
        if value is None or name in NO_EFFECT or (name == "is_causal" and value is True):
            continue
        limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        if name == "sliding_window" and isinstance(value, int) and isinstance(limit, int) and value >= limit:
            continue  # a window of at least the context limit hides nothing
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
    """Compute attention behind transformers' interface, which passes ``packed_forward`` on from the model's call.

    Args:
        module: The attention module; its ``layer_idx`` selects the layer's cache.
        query: ``[1, H, tokens, D]``.
        key: ``[1, N, tokens, D]``.
        value: ``[1, N, tokens, D]``.
        attention_mask: Must be None.
        scaling: The factor on the scores; None for ``D ** -0.5``.
        packed_forward: The forward that is running.
        arguments: The other arguments of transformers' interface.

    Returns:
        The output ``[1, tokens, H, D]``, and None in place of attention weights.

    Raises:
        UnknownAttentionError: an argument that would change the result is not implemented by the engine.
    """
    if packed_forward is None:
        raise UnknownAttentionError(
            "its attention is called without packed_forward (outside the engine, set_attn_implementation('sdpa') first)"
        )
    _refuse_unknown(module, attention_mask, arguments)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_forward.attend(module.layer_idx, query, key, value, scale)
    return out.contiguous(), None  # some classes call .view() on it; the others would make it contiguous themselves


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
