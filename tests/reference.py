"""An independent TiDAR in plain PyTorch: the dense mask written out from the table of the paper, the loss as a formula.

It shares no code with the package. Its weights are megatron-core's by name, shape and layout, because a gradient is
then compared with its parameter without any mapping in between.
"""

import torch
import torch.nn.functional as F


def training_mask(document, index, block_size):
    """``document``, ``index``: lists of S ints. -> bool [2S, 2S], one pair of tokens at a time."""
    S = len(index)
    mask = torch.zeros(2 * S, 2 * S, dtype=torch.bool)
    for q in range(2 * S):
        for k in range(2 * S):
            i, j = q % S, k % S
            if document[i] != document[j]:
                continue
            block = index[i] // block_size
            if q < S:  # a clean token: clean tokens up to itself
                mask[q, k] = k < S and index[j] <= index[i]
            elif k < S:  # a mask token on clean tokens: the blocks strictly before its own
                mask[q, k] = index[j] < block * block_size
            else:  # a mask token on mask tokens: its own block, both directions
                mask[q, k] = index[j] // block_size == block
    return mask


def anywhere_mask(document, index, starts, block_size):
    """The same for blocks that start at the places ``starts``: bool [S + M, S + M], M = len(starts) * block_size."""
    S, M = len(index), len(starts) * block_size
    mask = torch.zeros(S + M, S + M, dtype=torch.bool)
    mask[:S, :S] = training_mask(document, index, block_size)[:S, :S]
    for q in range(M):
        start = starts[q // block_size]
        for k in range(S):  # the clean tokens of its document before its block
            mask[S + q, k] = document[k] == document[start] and k < start
        for k in range(M):
            mask[S + q, S + k] = q // block_size == k // block_size
    return mask


def rotate(x, positions, base):
    """``x`` [b, heads, t, d], rotary embedding of the half-split kind."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def token_losses(weights, shape, tokens, labels, mask, positions, clean=None, scale=0.0):
    """Cross-entropy of each token, ``tokens``/``labels`` [b, t], ``mask`` [b, t, t] -> [b, t].

    Of a padded vocabulary the ids alone: its logits are cut off before the softmax. With draft weights, the tokens
    after the first ``clean`` ones have an input of their own, and ``scale`` times the product of a pair in each linear.
    """
    h, g, d, eps = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels, shape.norm_epsilon
    batch, length = tokens.shape
    x = weights["embedding.word_embeddings.weight"][tokens]
    if clean is not None:
        x = torch.cat([x[:, :clean], weights["mask_embedding.weight"].expand(batch, length - clean, -1)], dim=1)
    for layer in range(shape.num_layers):

        def w(name, layer=layer):
            return weights.get(f"decoder.layers.{layer}.{name}")

        def linear(y, name, w=w):
            out = y @ w(f"{name}.weight").T
            if clean is None or w(f"{name}.draft.a") is None:
                return out
            added = scale * y[:, clean:] @ w(f"{name}.draft.a").T @ w(f"{name}.draft.b").T
            return torch.cat([out[:, :clean], out[:, clean:] + added], dim=1)

        y = rms_norm(x, w("input_layernorm.weight"), eps)
        qkv = linear(y, "self_attention.linear_qkv")
        if (bias := w("self_attention.linear_qkv.bias")) is not None:
            qkv = qkv + bias
        qkv = qkv.view(batch, length, g, h // g + 2, d)  # each group: its queries, its key, its value
        q = qkv[..., : h // g, :].reshape(batch, length, h, d).transpose(1, 2)
        k, v = (qkv[..., h // g + n, :].repeat_interleave(h // g, dim=2).transpose(1, 2) for n in (0, 1))
        if (norm := w("self_attention.q_layernorm.weight")) is not None:
            q = rms_norm(q, norm, eps)
            k = rms_norm(k, w("self_attention.k_layernorm.weight"), eps)
        q, k = rotate(q, positions, shape.rotary_base), rotate(k, positions, shape.rotary_base)
        scores = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(~mask[:, None], float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, h * d)
        x = x + linear(attended, "self_attention.linear_proj")
        y = rms_norm(x, w("pre_mlp_layernorm.weight"), eps)
        gate, up = linear(y, "mlp.linear_fc1").chunk(2, dim=-1)
        x = x + linear(F.silu(gate) * up, "mlp.linear_fc2")
    x = rms_norm(x, weights["decoder.final_layernorm.weight"], eps)
    logits = x @ weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"]).T
    logits = logits[..., : shape.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(batch, length)


def joint_loss(losses, supervised, alpha):
    """The formula, over the whole global batch at once: ``losses``, ``supervised`` [sequences, 2S] -> scalar."""
    S = losses.shape[1] // 2
    ar = losses[:, :S][supervised[:, :S]].mean()
    diffusion = losses[:, S:][supervised[:, S:]].mean()
    return (alpha * ar + diffusion) / (1 + alpha)
