"""Packing changes the cost, not the numbers: a document has the losses that it has alone."""

import numpy as np
import pytest
import torch

from tidar_megatron.data.doubled import make_batch
from tidar_megatron.data.packing import Piece, pack
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.models.gpt import build_model, run_model
from tidar_megatron.models.initialize import initialize_weights
from tidar_megatron.models.loss import token_losses
from tidar_megatron.training.layout_variants import MASK_TOKEN_ID, variant_config

B = 4


@pytest.fixture
def model():
    shut_down()  # an earlier test file's
    config = variant_config("packed", 1)
    (chunk,) = build_model(config, 97, initialize(config.parallel, 0))
    initialize_weights([chunk], 0)
    yield chunk
    shut_down()


def losses(model, pieces, documents, **options):
    """Of the clean tokens, and of the masks: [S] each."""
    batch = make_batch([pack(pieces, documents, 0)], B, MASK_TOKEN_ID, **options)
    with torch.no_grad():
        _, each = token_losses(model, batch, run_model(model, batch))
    return (each * batch.supervised)[0].chunk(2)


@pytest.mark.parametrize("longest", [10, 60])  # shorter than a chunk of attention, and longer
def test_documents_have_the_losses_they_have_alone(model, longest):
    draw = np.random.Generator(np.random.Philox(longest))
    documents = [draw.integers(0, MASK_TOKEN_ID, n) for n in draw.integers(1, longest + 1, 16)]
    pieces = [Piece(number, 0, -(-len(document) // B) * B) for number, document in enumerate(documents)]
    packed, place = losses(model, pieces, documents), 0
    for piece in pieces:
        for together, alone in zip(packed, losses(model, [piece], documents), strict=True):
            torch.testing.assert_close(together[place : place + piece.stop], alone, rtol=1e-5, atol=1e-5)
        place += piece.stop
    assert all(float(half.sum()) > 100 for half in packed)


def test_where_positions_begin_makes_no_difference_and_attention_across_documents_does(model):
    """Rotary attention knows differences of positions alone; what a token may see, it uses."""
    draw = np.random.Generator(np.random.Philox(3))
    documents = [draw.integers(0, MASK_TOKEN_ID, n) for n in draw.integers(5, 30, 6)]
    pieces = [Piece(number, 0, -(-len(document) // B) * B) for number, document in enumerate(documents)]
    first = pieces[0].stop
    for anew, on, across in zip(
        losses(model, pieces, documents),
        losses(model, pieces, documents, reset_positions=False),
        losses(model, pieces, documents, reset_positions=False, cross_document_attention=True),
        strict=True,
    ):
        torch.testing.assert_close(anew, on, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(across[:first], on[:first], rtol=1e-5, atol=1e-5)
        assert (across[first:] - on[first:]).abs().max() > 1e-3
