"""Log-likelihoods of texts under the autoregressive model, several texts at a time, in plain causal forwards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tidar_megatron.errors import UserError
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import check_token_ids

CHUNK = 512  # tokens of a text per forward
TOKENS = 4096  # total tokens of the texts that are scored together


class Score(NamedTuple):
    """The total log-probability (natural log) of the scored tokens, and whether greedy decoding would choose all."""

    logprob: float
    greedy: bool


def score(model: DecodeModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """Score continuations of contexts.

    Args:
        model: The model that :func:`~tidar_megatron.inference.loading.load_model` returned.
        texts: (context, continuation) token ids, at least one each. Together they have at most
            ``model.context_limit + 1`` tokens, because the last one is not an input.

    Returns:
        One score per text, in order.

    Raises:
        UserError: a part is empty, an id is outside the vocabulary, or a text exceeds the model's context.
    """
    for context, continuation in texts:
        _check(model, context, continuation)
    found: dict[int, Score] = {}
    by_length = sorted(range(len(texts)), key=lambda n: -sum(map(len, texts[n])))
    while by_length:
        longest = sum(map(len, texts[by_length[0]]))
        together = by_length[: max(1, TOKENS // longest)]
        by_length = by_length[len(together) :]
        found |= zip(together, _score_together(model, [texts[n] for n in together], longest), strict=True)
    return [found[n] for n in range(len(texts))]


@torch.inference_mode()
def _score_together(
    model: DecodeModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]], capacity: int
) -> list[Score]:
    pool = KVPool(len(texts), capacity)
    sequences = [[*context, *continuation] for context, continuation in texts]
    logprobs, greedy = [0.0] * len(texts), [True] * len(texts)
    for start in range(0, capacity - 1, CHUNK):
        pieces = [(n, ids[start : min(start + CHUNK, len(ids) - 1)]) for n, ids in enumerate(sequences)]
        pieces = [(n, piece) for n, piece in pieces if piece]
        packed = PackedForward(pool, [Part(n, start, piece, ForwardLayout(len(piece))) for n, piece in pieces])
        hidden = model.forward(packed)
        for (n, piece), row in zip(pieces, packed.starts, strict=True):
            first = max(start, len(texts[n][0]) - 1)  # the position that predicts the first scored token
            last = start + len(piece)
            if first >= last:
                continue
            # with the mask token's own logit, so that scores agree with other tools
            logits = model.logits(hidden[row + first - start : row + len(piece)], emitted=False)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            targets = torch.tensor(sequences[n][first + 1 : last + 1], device=logits.device)
            logprobs[n] += logits.log_softmax(-1).gather(-1, targets[:, None]).double().sum().item()
            greedy[n] &= bool((logits.argmax(-1) == targets).all())
    return [Score(*pair) for pair in zip(logprobs, greedy, strict=True)]


def _check(model: DecodeModel, context: Sequence[int], continuation: Sequence[int]) -> None:
    if not context or not continuation:
        raise UserError("a text to score needs a context and a continuation of at least one token each")
    if len(context) + len(continuation) > model.context_limit + 1:
        raise UserError(
            f"the text to score has {len(context) + len(continuation)} tokens and the model's context holds "
            f"{model.context_limit}: shorten it"
        )
    check_token_ids(model, (*context, *continuation))
