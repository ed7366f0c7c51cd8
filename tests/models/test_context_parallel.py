"""Context parallelism: which rank holds what, how much it works, how much it sends, and that it computes the same."""

import json

import pytest
import torch

from tests.ranks import run_ranks
from tidar_megatron.attention_mask import clean_tokens, may_attend, training_layout
from tidar_megatron.context_parallel import key_tokens, own_positions, own_tokens, query_slices
from tidar_megatron.data.blocks import choose_blocks
from tidar_megatron.models.attention.tiles import make_tilings


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("doubled", [True, False])
def test_every_token_is_on_one_rank(size, doubled):
    S, block = 96, 2
    shards = [own_tokens(S, rank, size, doubled) for rank in range(size)]
    assert sorted(torch.cat(shards).tolist()) == list(range(2 * S if doubled else S))
    for rank, own in enumerate(shards):
        clean = own_positions(S, rank, size)
        assert own[: len(clean)].tolist() == clean.tolist()
        if doubled:  # a mask lives with its clean token
            assert (own[len(clean) :] - S).tolist() == clean.tolist()
        for start in clean.reshape(-1, block).tolist():  # no block is cut
            assert start[0] % block == 0 and start == list(range(start[0], start[0] + block))
        keys = key_tokens(S, rank, size, doubled)
        assert sorted(keys[:S].tolist()) == list(range(S))
        rows = query_slices(len(own), len(keys), rank, size)
        assert torch.cat([keys[part] for part in rows]).tolist() == own.tolist()


def some_blocks(blocks, chosen, seed):
    """Of two rows: int64 [2, chosen]."""
    return torch.stack([torch.from_numpy(choose_blocks(blocks, chosen, seed, row)) for row in (0, 1)])


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("fraction", [0, 0.25, 0.5, 1])
def test_the_work_is_shared_evenly(size, fraction):
    """Of the pairs that the rule allows, and of those that the chunked backend computes: busiest <= 1.1 x mean."""
    S, block, doubled = 4096, 16, fraction > 0
    document, index = torch.zeros(1, S, dtype=torch.long), torch.arange(S)[None]
    visibility = training_layout(document, index, block) if doubled else clean_tokens(document, index)
    masks = int(S * fraction)
    if doubled:
        chosen = some_blocks(S // block, masks // block, 0)[:1]
        places = S + (chosen.unsqueeze(-1) * block + torch.arange(block)).flatten(1)
        visibility = torch.cat([visibility[:, :S], visibility[:, places[0]]], dim=1)
    allowed, computed, held = [], [], set()
    for rank in range(size):
        keys = visibility[:, key_tokens(S, rank, size, doubled, masks)]
        rows = query_slices(len(own_tokens(S, rank, size, doubled, masks)), keys.shape[1], rank, size)
        held.add(tuple(part.stop - part.start for part in rows))
        queries = torch.cat([keys[:, part] for part in rows], dim=1)
        allowed.append(sum(int(may_attend(part, keys).sum()) for part in queries.split(512, dim=1)))
        (tiling,) = make_tilings(keys, rows, 128)
        computed.append(tiling.area)
    whole = sum(int(may_attend(part, visibility).sum()) for part in visibility.split(512, dim=1))
    assert sum(allowed) == whole  # divided, nothing repeated
    assert held == {(S // size, masks // size)}  # as many clean tokens, and as many masks, on every rank
    for work in (allowed, computed):
        assert max(work) <= 1.1 * sum(work) / size
    assert sum(computed) <= (1.2 if fraction in (0, 1) else 1.3) * whole


@pytest.fixture(scope="module")
def traffic():
    return [json.loads(line) for line in run_ranks(4, "-m", "tests.cp_traffic").stdout.splitlines() if line[:1] == "{"]


@pytest.mark.process
def test_only_clean_keys_and_values_travel(traffic):
    """Bytes sent in attention per layer are plain AR training's of the same S: S / CP clean tokens, once each way."""
    assert len(traffic) == 8
    for line in traffic:
        clean, kv_channels = 64 // line["cp"], 4 * 8  # of layout_check's tiny model
        gathered = 4 * 2 * clean * kv_channels * (line["cp"] - 1)  # float32 keys and values to each other rank
        assert line["per_layer"] == 2 * gathered  # forward, and as much back
        assert line["other"] == 0
