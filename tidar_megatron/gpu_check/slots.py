"""Section 4, the slot curve: what a forward costs by its number of tokens. It decides how many drafts are free.

A forward of few tokens waits for the weights to be read, so further tokens cost nothing up to some number: the free
slots of the paper. Times are of the engine's own forwards, on a GPU therefore of CUDA graphs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tidar_megatron.benchmark.timing import median_seconds
from tidar_megatron.gpu_check.models import random_model, random_prompt
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.static import WARM_UP, Forwards, StaticForward

SIZES = (1, 2, 4, 8, 16, 20, 24, 32, 48, 72, 96, 128, 192, 272)  # 20, 72, 272: K = 4, 8, 16 with all branches
CONTEXTS = (256, 1024, 4096)
FREE = 1.1  # tokens are free up to the number whose forward takes this multiple of one token's
MOST_ROWS = 32  # of the output layer: those of the drafts, and of the masks of one branch


def check(setting: Setting) -> None:
    """Find the curve of each model and context, and how many tokens are free."""
    setting.found |= {} if setting.on_gpu else {"note": f"{NOT_ON_A_CPU}: CUDA graphs; their static shapes run eagerly"}
    rows = setting.rows("rows")
    for kind, share in (("1.5B", 0.4), ("8B", 1.0)):
        with setting.part(share), setting.guard(kind):
            if setting.in_time():
                _curve(random_model(kind, setting, torch.bfloat16), kind, setting, rows)
    setting.found["free"] = free = _free(rows)
    for kind, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        own = {r["tokens"]: r["milliseconds"] for r in rows if (r["model"], r["context"]) == (kind, context)}
        curve = ", ".join(f"{tokens}: {milliseconds:.3g}" for tokens, milliseconds in own.items())
        setting.summary.append(f"{kind}, context {context}: ms by tokens {curve}")
    for row in free:
        setting.summary.append(f"{row['model']}, context {row['context']}: {row['free_tokens']} tokens within {FREE} x")


@torch.inference_mode()
def _curve(model: DecodeModel, kind: str, setting: Setting, rows: list[dict[str, Any]]) -> None:
    sizes, contexts = setting.size((SIZES, CONTEXTS), (SIZES[::4], (64,)))
    runner = Forwards(model, 1, max(contexts) + max(sizes), static=True)
    samples = setting.size(9, 1)
    for context in contexts:
        for size in sizes:
            if not setting.in_time():
                return
            parts = [Part(0, context, random_prompt(model, size, size), ForwardLayout(size))]
            for _ in range(WARM_UP + 1):
                hidden, forward = runner.run(parts)
            assert isinstance(forward, StaticForward)
            replay = median_seconds(partial(forward.run, model), model.device, samples, 1)
            loaded = median_seconds(partial(runner.run, parts), model.device, samples, 1)
            few = hidden[: min(size, MOST_ROWS)]
            head = median_seconds(partial(_choose, model, few), model.device, samples, 1)
            rows.append(
                {"model": kind, "context": context, "tokens": size, "rounded_to": forward.num_tokens}
                | {"milliseconds": 1e3 * replay, "with_inputs_milliseconds": 1e3 * loaded}
                | {"output_layer_milliseconds": 1e3 * head}
            )


def _choose(model: DecodeModel, hidden: Tensor) -> Tensor:
    return model.logits(hidden).argmax(-1)


def _free(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each model and context the most tokens up to which every forward takes about as long as the first."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["context"]), []).append(row)
    free = []
    for (kind, context), own in found.items():
        most = FREE * own[0]["milliseconds"]
        slow = next((place for place, row in enumerate(own) if row["milliseconds"] > most), len(own))
        free.append({"model": kind, "context": context, "free_tokens": own[max(slow, 1) - 1]["tokens"]})
    return free
