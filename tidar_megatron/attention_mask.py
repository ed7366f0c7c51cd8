"""The attention mask: which tokens may attend to which, defined in this module alone.

Each token carries four integers, its *visibility metadata* ``[..., tokens, 4]`` (int32):

===============  =====================================================================================
``DOCUMENT``     the token's document; attention never crosses documents
``INDEX``        the token's position in its document
``HORIZON``      clean tokens with ``INDEX < HORIZON`` are visible: ``index + 1`` for a clean token (causal),
                 the index where its block starts for a mask token
``MASK_BLOCK``   the block of a mask token, ``-1`` for a clean token
===============  =====================================================================================

One predicate over the metadata of two tokens, :func:`sees`, decides visibility. It commutes with any permutation of the
tokens, so the training mask, packed documents, shards of a sequence and every decode step all use it unchanged. They
differ only in the *layout*, the function that writes the metadata. All attention backends derive their masks from it.

Source: TiDAR, arXiv 2511.08923, sections 3.1 (training mask) and 3.3 (decode mask).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DOCUMENT, INDEX, HORIZON, MASK_BLOCK = range(4)
CLEAN = -1  # MASK_BLOCK of a clean token


def sees(query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Return whether each query sees each key (bool, True where visible): the visibility predicate.

    A query sees a key if both are in the same document and either the key is a clean token before the query's horizon,
    or both are mask tokens of the same block (bidirectional).

    Args:
        query: The four metadata columns of the queries.
        key: The four metadata columns of the keys; they broadcast with the queries'.
    """
    key_is_clean = key[MASK_BLOCK] == CLEAN
    clean_before_horizon = key_is_clean & (key[INDEX] < query[HORIZON])
    same_mask_block = (key[MASK_BLOCK] == query[MASK_BLOCK]) & ~key_is_clean
    return (query[DOCUMENT] == key[DOCUMENT]) & (clean_before_horizon | same_mask_block)


def may_attend(query: Tensor, key: Tensor) -> Tensor:
    """Return the mask of all pairs, bool ``[..., q, k]``, for ``query [..., q, 4]`` and ``key [..., k, 4]``."""
    return sees(query.unsqueeze(-2).unbind(-1), key.unsqueeze(-3).unbind(-1))


def stretches(visibility: Tensor, edges: Sequence[int]) -> Tensor:
    """Cut tokens into stretches whose visibility of clean tokens is bounded by their first and last token.

    A stretch lies in one document, is all clean or all masks, and along it INDEX increases and HORIZON does not
    decrease. Among its queries, the last therefore sees the most clean tokens and the first sees the fewest, as nested
    sets. Among its clean keys, the first is seen by the most queries and the last by the fewest.

    Args:
        visibility: The metadata, int32 ``[t, 4]``.
        edges: Positions in 0 .. t at which a stretch must also end.

    Returns:
        The start of each stretch, then t, int64 ``[stretches + 1]``.
    """
    before, after = visibility[:-1], visibility[1:]
    cut = before[:, DOCUMENT] != after[:, DOCUMENT]
    cut |= is_clean(before) != is_clean(after)
    cut |= (before[:, INDEX] >= after[:, INDEX]) | (before[:, HORIZON] > after[:, HORIZON])
    inner = [edge for edge in edges if 0 < edge < len(visibility)]
    cut[torch.tensor(inner, dtype=torch.int64) - 1] = True
    ends = torch.tensor([0, len(visibility)])
    return torch.cat([ends[:1], cut.nonzero().flatten() + 1, ends[1:]])


def mask_blocks(visibility: Tensor) -> Tensor:
    """Return the spans of the blocks of mask tokens in ``visibility [t, 4]``: int64 ``[blocks, 2]``, start and end.

    Raises:
        ValueError: the tokens of a block are not contiguous.
    """
    same = torch.zeros(len(visibility) + 1, dtype=torch.bool)
    same[1:-1] = (visibility[1:, [DOCUMENT, MASK_BLOCK]] == visibility[:-1, [DOCUMENT, MASK_BLOCK]]).all(-1)
    edges = (~same).nonzero().flatten()
    blocks = torch.stack([edges[:-1], edges[1:]], dim=-1)
    blocks = blocks[~is_clean(visibility[blocks[:, 0]])]
    names = visibility[blocks[:, 0]][:, [DOCUMENT, MASK_BLOCK]]
    if len(torch.unique(names, dim=0)) < len(names):
        raise ValueError("a block's mask tokens must be contiguous")
    return blocks


def is_clean(visibility: Tensor) -> Tensor:
    """Return which tokens of ``visibility [..., 4]`` are clean, not masks: bool ``[...]``."""
    return visibility[..., MASK_BLOCK] == CLEAN


def leaps(visibility: Tensor) -> Tensor:
    """Return where a document's clean tokens skip an index, given ``visibility [..., t, 4]``: bool ``[..., t]``.

    A token is marked if it and the token before it are clean and of the same document, but their indices are not
    consecutive.
    """
    before, after = visibility[..., :-1, :], visibility[..., 1:, :]
    leap = torch.zeros(visibility.shape[:-1], dtype=torch.bool)
    same = (before[..., DOCUMENT] == after[..., DOCUMENT]) & is_clean(before) & is_clean(after)
    leap[..., 1:] = same & (before[..., INDEX] + 1 != after[..., INDEX])
    return leap


def clean_tokens(document: Tensor, index: Tensor) -> Tensor:
    """Return the metadata of clean tokens, int32 ``[..., s, 4]``; ``document`` and ``index`` are ``[..., s]``."""
    return torch.stack([document, index, index + 1, torch.full_like(index, CLEAN)], dim=-1).int()


def mask_tokens(document: Tensor, index: Tensor, horizon: Tensor, block: Tensor) -> Tensor:
    """Return the metadata of mask tokens, int32 ``[..., s, 4]``; each argument is ``[..., s]``."""
    return torch.stack([document, index, horizon, block], dim=-1).int()


def training_layout(document: Tensor, index: Tensor, block_size: int) -> Tensor:
    """Return the metadata of the doubled sequence: S clean tokens, then one mask token for each of them.

    Args:
        document: The document of each clean token, int ``[..., S]``; fill tokens belong to the document they follow.
        index: The position of each clean token in its document, int ``[..., S]``.
        block_size: B; block b of a document holds the mask tokens of its positions b*B .. b*B + B - 1.

    Returns:
        int32 ``[..., 2S, 4]``.
    """
    block = index // block_size
    masks = mask_tokens(document, index, horizon=block * block_size, block=block)
    return torch.cat([clean_tokens(document, index), masks], dim=-2)


def anywhere_layout(document: Tensor, index: Tensor, starts: Tensor, block_size: int) -> Tensor:
    """Return the metadata of the masks of blocks that start anywhere; a block sees its document before its start.

    Args:
        document: The document of each clean token, int64 ``[b, S]``.
        index: The position of each clean token in its document, int64 ``[b, S]``.
        starts: The places at which the blocks of each row start, int64 ``[b, n]``, distinct in a row.
        block_size: B.

    Returns:
        int32 ``[b, n * B, 4]``, block after block.
    """
    first = starts.repeat_interleave(block_size, dim=1)
    offset = torch.arange(block_size).repeat(starts.shape[1])
    horizon = index.gather(1, first)
    return mask_tokens(document.gather(1, first), horizon + offset, horizon, block=horizon)


def training_area(seq_length: int, block_size: int) -> tuple[int, int]:
    """Count the visible query-key pairs of one document of ``seq_length`` tokens, a multiple of ``block_size``.

    Returns:
        The pairs in the doubled sequence, and those in its clean half alone (plain AR training on the same tokens).
    """
    causal = seq_length * (seq_length + 1) // 2
    blocks = seq_length // block_size
    masks = block_size * block_size * (blocks * (blocks - 1) // 2 + blocks)  # earlier clean blocks, own block
    return causal + masks, causal


def decode_layout(prefix_length: int, num_drafts: int, branches: Sequence[int], draft_length: int) -> Tensor:
    """Return the metadata of a draft/verify forward, whose tokens follow ``prefix_length`` committed, cached tokens.

    With P = ``prefix_length``, the layout begins with ``num_drafts`` draft tokens at positions P .. P + num_drafts - 1,
    which are causal. Then, for each r in ``branches`` (1 <= r <= num_drafts), it has ``draft_length`` mask tokens at
    positions P + r .. P + r + draft_length - 1: the pre-draft for "exactly r drafts accepted", which sees the prefix,
    the first r drafts and itself. A prefill has an empty prefix, the prompt as the drafts and one branch after the
    last; an AR step has one draft and no branch.

    Returns:
        int32 ``[num_drafts + len(branches) * draft_length, 4]``; its ``INDEX`` column is the position ids.
    """
    places = torch.arange(prefix_length, prefix_length + num_drafts)
    parts = [clean_tokens(torch.zeros_like(places), places)]
    for block, r in enumerate(branches):
        horizon = torch.full((draft_length,), prefix_length + r)
        index = horizon + torch.arange(draft_length)
        parts.append(mask_tokens(torch.zeros_like(index), index, horizon, torch.full_like(index, block)))
    return torch.cat(parts)


def prefix_layout(prefix_length: int) -> Tensor:
    """Return the metadata of the ``prefix_length`` (P) committed tokens, whose K/V are cached: int32 ``[P, 4]``."""
    places = torch.arange(prefix_length)
    return clean_tokens(torch.zeros_like(places), places)
