"""Random masking: its expectation is total masking's loss, the draw knows no rank, and the batch says what it did."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_doubled import some_rows
from tidar_megatron.data.doubled import TokenCounts, make_batch, set_loss_weights
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.data.random_masks import EPSILON, random_masks
from tidar_megatron.errors import UserError

MASK, S, B = 257, 16, 4


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_block_has_one_share(block: int, blocks: int, seed: int, number: int) -> None:
    counts = random_masks(block * blocks, block, seed, number)
    assert counts.dtype == np.float32
    assert (counts == random_masks(block * blocks, block, seed, number)).all()
    for row in counts.reshape(blocks, block):
        weights = set(row[row > 0].tolist())
        assert len(weights) <= 1
        assert all(1 <= weight <= 1 / EPSILON for weight in weights)


@pytest.mark.slow
def test_every_place_counts_once_on_average() -> None:
    """E[1/t * masked] = 1 for every place; its variance is E[1/t] - 1, which the bound takes from the samples."""
    drawn = np.stack([random_masks(S, B, 7, n) for n in range(40_000)]).astype(np.float64)
    error = 5 * drawn.std(0) / len(drawn) ** 0.5
    assert (abs(drawn.mean(0) - 1) < error).all()
    assert abs((drawn > 0).mean() - 0.5) < 0.01  # the mean share
    together = (drawn[:, 0] > 0) & (drawn[:, 1] > 0)
    assert abs(together.mean() - 1 / 3) < 0.02  # E[t^2]: places of a block share their t
    apart = (drawn[:, 0] > 0) & (drawn[:, B] > 0)
    assert abs(apart.mean() - 1 / 4) < 0.02  # those of two blocks do not


def test_what_the_model_sees() -> None:
    rows = some_rows(3)[:3]
    masked = np.stack([random_masks(S, B, 1, n) for n in range(3)])
    batch, total = make_batch(rows, B, MASK, masked=masked), make_batch(rows, B, MASK)
    for name in ("visibility", "padding", "position_ids"):
        assert torch.equal(getattr(batch, name), getattr(total, name))
    assert (batch.ar_tokens, batch.diffusion_tokens) == (total.ar_tokens, total.diffusion_tokens)
    hidden = shown = 0
    for r in range(3):
        for p in range(S):
            counts, clean = float(masked[r, p]), int(batch.tokens[r, p])
            supervised = counts > 0 and bool(rows[r].diffusion_supervised[p])
            assert int(batch.tokens[r, S + p]) == (MASK if counts > 0 else clean)
            assert bool(batch.supervised[r, S + p]) == supervised
            assert int(batch.labels[r, S + p]) == (clean if supervised else 0)
            assert float(batch.stands_for[r, S + p]) == (np.float32(counts) if supervised else 0.0)
            hidden, shown = hidden + (counts > 0), shown + (counts == 0)
    assert hidden > 5
    assert shown > 5


@pytest.mark.slow
def test_the_loss_is_total_maskings_on_average() -> None:
    rows, draw = some_rows(5)[:2], torch.Generator().manual_seed(0)
    losses = torch.rand(2, 2 * S, generator=draw, dtype=torch.float64)

    def loss(batch) -> float:
        set_loss_weights(batch, TokenCounts.of([batch]), 1.0)
        return (batch.loss_weights.double() * losses).sum().item()

    should = loss(make_batch(rows, B, MASK))
    drawn = [
        loss(
            make_batch(rows, B, MASK, masked=np.stack([random_masks(S, B, 9, 2 * n), random_masks(S, B, 9, 2 * n + 1)]))
        )
        for n in range(1500)
    ]
    assert abs(np.mean(drawn) - should) < 5 * np.std(drawn) / len(drawn) ** 0.5


def test_training_data_draws_by_number_and_evaluation_masks_all(shards) -> None:
    def data(**settings) -> TrainingData:
        return TrainingData(str(shards), SequenceSettings(32, B, MASK, 3, **settings))

    (whole,) = data(random_masks=True).step_batches(8, 8, 8, 0, 1)
    again = [data(random_masks=True).step_batches(8, 8, 2, rank, 2) for rank in (0, 1)]
    rows = torch.cat([batch.tokens for pair in zip(*again, strict=True) for batch in pair])
    assert torch.equal(whole.tokens, rows)
    half = whole.tokens[:, 32:]
    assert 0.2 < (half == MASK).float().mean() < 0.8
    (total,) = data().step_batches(8, 8, 8, 0, 1)
    assert (total.tokens[:, 32:] == MASK).all()
    evaluation = data(random_masks=True).evaluation_batches(4, 4, 0, 1)[0]
    assert (evaluation.tokens[:, 32:] == MASK).all()


def test_a_mask_token_among_the_tokenizers_ids(shards) -> None:
    """Only one that no text has; if one has it all the same, that is told."""
    with pytest.raises(UserError, match="uses the ids"):
        TrainingData(str(shards), SequenceSettings(32, B, 255, 3))
    TrainingData(str(shards), SequenceSettings(32, B, 255, 3, reserved=[255])).step_batches(0, 4, 4, 0, 1)
    with pytest.raises(UserError, match=r"its text holds the mask token \(id 97\)"):
        TrainingData(str(shards), SequenceSettings(32, B, 97, 3, reserved=[97])).step_batches(0, 4, 4, 0, 1)
