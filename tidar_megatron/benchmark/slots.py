"""The free-slot curve: the time of a forward by its number of tokens and dtype, and of its bare matrix products.

A forward of few tokens waits for the weights to be read, so further tokens cost little up to some number. What draft
tokens cost decides how many of them pay off.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tidar_megatron.benchmark.measuring import Timings, rounded
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.lean import LeanForward
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.static import Forwards

TOKENS = (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 72)  # 16, 24, 72: 1:8, 2:8, all:8
MOST_ROWS = 32  # of the output layer: those of the drafts, and of the masks of one branch


@torch.inference_mode()
def slots(models: Mapping[str, DecodeModel], contexts: list[int], repeats: int) -> dict[str, Any]:
    """Time forwards of 1 to 72 tokens of one sequence, and their bare matrix products, interleaved.

    Both include the output layer, on as many rows as there are tokens, at most :data:`MOST_ROWS`. The products are
    those of the engine, in the layout in which it keeps the weights.

    Args:
        models: the same model by the name of its dtype.
        contexts: cached tokens before those of the forward.
        repeats: rounds of measurements.

    Returns:
        ``rows``: ``over_one_token`` is the ratio of a forward's time to that of one token, ``over_products`` that to
        its bare products, both paired by round; the latter is None where the engine runs transformers' modules.
        ``skipped``: the contexts that do not fit.
    """
    rows, skipped = [], []
    for context in contexts:
        if any(context + TOKENS[-1] > model.context_limit for model in models.values()):
            skipped.append(context)
            continue
        functions: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            runner = Forwards(model, 1, context + TOKENS[-1])
            token = next(id for id in range(2) if id != model.mask_token_id)
            for tokens in TOKENS:
                part = Part(0, context, [token] * tokens, ForwardLayout(tokens))
                functions[f"{name} {tokens}"] = partial(_forward, model, runner, part)
                if isinstance(model.lean, LeanForward):
                    functions[f"{name} products {tokens}"] = _products(model, model.lean, tokens)
        times = Timings(functions, repeats, warm=True)
        for name in models:
            for tokens in TOKENS:
                own, bare = f"{name} {tokens}", f"{name} products {tokens}"
                row = {"dtype": name, "context": context, "tokens": tokens}
                row |= {"milliseconds": _milliseconds(times, own), "over_one_token": _ratio(times, own, f"{name} 1")}
                known = bare in functions
                row |= {"products_milliseconds": _milliseconds(times, bare) if known else None}
                rows.append(row | {"over_products": _ratio(times, own, bare) if known else None})
    return {"rows": rows, "skipped": skipped}


def _forward(model: DecodeModel, runner: Forwards, part: Part) -> None:
    hidden, _ = runner.run([part])
    model.logits(hidden[:MOST_ROWS])


def _products(model: DecodeModel, lean: LeanForward, tokens: int) -> Callable[[], None]:
    layers = lean.bare_products(tokens)
    width = model.causal_lm.config.hidden_size
    hidden = torch.ones(min(tokens, MOST_ROWS), width, dtype=model.dtype, device=model.device)

    def run() -> None:
        layers()
        model.logits(hidden)

    return run


def _milliseconds(times: Timings, name: str) -> dict[str, float]:
    return {key: round(1e3 * value, 4) for key, value in vars(times.of(name)).items()}


def _ratio(times: Timings, name: str, other: str) -> dict[str, float]:
    return rounded(times.ratio(name, other))
