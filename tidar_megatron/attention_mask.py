"""Who may attend to whom: the one place that knows.

Each token carries four integers, its *visibility metadata* ``[..., tokens, 4]`` (int32):

===============  =====================================================================================
``DOCUMENT``     the document the token belongs to; nothing crosses documents
``INDEX``        the token's place in its document
``HORIZON``      clean tokens with ``INDEX < HORIZON`` are visible: ``index + 1`` for a clean token (causal),
                 the index where its block starts for a mask token
``MASK_BLOCK``   the block of a mask token, ``-1`` for a clean token
===============  =====================================================================================

and one predicate over two tokens' metadata (:func:`sees`) decides. It commutes with any permutation of the
tokens, so the training mask, packed documents, shards of a sequence and every decode step use it as it is: they
differ only in the *layout*, the function that writes the metadata. Attention backends derive everything from it.

Source: TiDAR, arXiv 2511.08923, sections 3.1 (training mask) and 3.3 (decode mask).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DOCUMENT, INDEX, HORIZON, MASK_BLOCK = range(4)
CLEAN = -1  # MASK_BLOCK of a clean token


def sees(query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """The rule. The four columns of queries and of keys, which broadcast -> bool, True where the query sees the key.

    Same document, and either the key is a clean token before the query's horizon, or both are mask tokens of the
    same block (both directions).
    """
    key_is_clean = key[MASK_BLOCK] == CLEAN
    clean_before_horizon = key_is_clean & (key[INDEX] < query[HORIZON])
    same_mask_block = (key[MASK_BLOCK] == query[MASK_BLOCK]) & ~key_is_clean
    return (query[DOCUMENT] == key[DOCUMENT]) & (clean_before_horizon | same_mask_block)


def may_attend(query: Tensor, key: Tensor) -> Tensor:
    """The rule for all pairs: ``query [..., q, 4]``, ``key [..., k, 4]`` -> bool ``[..., q, k]``."""
    return sees(query.unsqueeze(-2).unbind(-1), key.unsqueeze(-3).unbind(-1))


def stretches(visibility: Tensor, edges: Sequence[int]) -> Tensor:
    """Cut tokens into stretches whose ends speak for all of them, as queries and as clean keys.

    A stretch lies in one document, is of one kind, and along it INDEX rises and HORIZON does not fall. So its last
    query sees every clean token that any of its queries sees, its first query sees none that another does not; and of
    its clean keys the first is the one seen by most, the last by fewest.

    Args:
        visibility: ``[t, 4]``.
        edges: places 0 .. t at which a stretch must end as well.

    Returns:
        int64, where each stretch starts, and t at the end.
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
    """Where the blocks of mask tokens stand: ``visibility [t, 4]`` -> int64 ``[blocks, 2]``, from and up to.

    Raises:
        ValueError: the tokens of a block do not stand side by side.
    """
    same = torch.zeros(len(visibility) + 1, dtype=torch.bool)
    same[1:-1] = (visibility[1:, [DOCUMENT, MASK_BLOCK]] == visibility[:-1, [DOCUMENT, MASK_BLOCK]]).all(-1)
    edges = (~same).nonzero().flatten()
    blocks = torch.stack([edges[:-1], edges[1:]], dim=-1)
    blocks = blocks[~is_clean(visibility[blocks[:, 0]])]
    names = visibility[blocks[:, 0]][:, [DOCUMENT, MASK_BLOCK]]
    if len(torch.unique(names, dim=0)) < len(names):
        raise ValueError("a block's mask tokens must stand side by side")
    return blocks


def is_clean(visibility: Tensor) -> Tensor:
    """``[..., 4]`` -> bool ``[...]``: clean tokens, not masks."""
    return visibility[..., MASK_BLOCK] == CLEAN


def leaps(visibility: Tensor) -> Tensor:
    """``[..., t, 4]`` -> bool ``[..., t]``: where a document's clean tokens do not go on with the next one."""
    before, after = visibility[..., :-1, :], visibility[..., 1:, :]
    leap = torch.zeros(visibility.shape[:-1], dtype=torch.bool)
    same = (before[..., DOCUMENT] == after[..., DOCUMENT]) & is_clean(before) & is_clean(after)
    leap[..., 1:] = same & (before[..., INDEX] + 1 != after[..., INDEX])
    return leap


def clean_tokens(document: Tensor, index: Tensor) -> Tensor:
    """Metadata of clean tokens. ``document``, ``index`` ``[..., s]`` -> int32 ``[..., s, 4]``."""
    return torch.stack([document, index, index + 1, torch.full_like(index, CLEAN)], dim=-1).int()


def mask_tokens(document: Tensor, index: Tensor, horizon: Tensor, block: Tensor) -> Tensor:
    """Metadata of mask tokens, each argument ``[..., s]`` -> int32 ``[..., s, 4]``."""
    return torch.stack([document, index, horizon, block], dim=-1).int()


def training_layout(document: Tensor, index: Tensor, block_size: int) -> Tensor:
    """The doubled sequence: S clean tokens, then one mask token for each of them.

    Args:
        document: int ``[..., S]``, the document of each clean token; fill tokens belong to the document they follow.
        index: int ``[..., S]``, each token's place in its document.
        block_size: B; block b of a document holds the mask tokens of its places b*B .. b*B + B - 1.

    Returns:
        int32 ``[..., 2S, 4]``.
    """
    block = index // block_size
    masks = mask_tokens(document, index, horizon=block * block_size, block=block)
    return torch.cat([clean_tokens(document, index), masks], dim=-2)


def training_area(seq_length: int, block_size: int) -> tuple[int, int]:
    """Pairs of query and key that the rule allows to one document of ``seq_length`` tokens, in whole blocks.

    Returns:
        In the doubled sequence; and in its clean half alone, plain AR training on the same tokens.
    """
    causal = seq_length * (seq_length + 1) // 2
    blocks = seq_length // block_size
    masks = block_size * block_size * (blocks * (blocks - 1) // 2 + blocks)  # the clean blocks before, and its own
    return causal + masks, causal


def decode_layout(prefix_length: int, num_drafts: int, branches: Sequence[int], draft_length: int) -> Tensor:
    """One draft/verify forward: the tokens after ``prefix_length`` committed ones whose K/V are cached.

    First ``num_drafts`` draft tokens at places P .. P + num_drafts - 1, causal. Then, for each r in ``branches``
    (1 <= r <= num_drafts), ``draft_length`` mask tokens at places P + r .. P + r + draft_length - 1: the pre-draft for
    "exactly r drafts accepted", which sees the prefix, the first r drafts and itself. A prefill is this layout with
    an empty prefix, the prompt as the drafts and one branch after the last; an AR step has one draft and no branch.

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
    """Metadata of the ``prefix_length`` committed tokens, whose K/V are cached: int32 ``[P, 4]``."""
    places = torch.arange(prefix_length)
    return clean_tokens(torch.zeros_like(places), places)
