"""Section 4, the slot curve: what a forward costs by its number of tokens. It decides how many drafts are free.

A forward of few tokens waits for the weights to be read, so further tokens cost nothing up to some number: the free
slots of the paper. Times are of the engine's own forwards, on a GPU therefore of CUDA graphs.
"""

from typing import Any

import torch

from tidar_megatron.benchmark.timing import median_seconds
from tidar_megatron.gpu_check.models import random_model, random_prompt
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.static import WARM_UP, Forwards

SIZES = (1, 2, 4, 8, 16, 20, 24, 32, 48, 72, 96, 128, 192, 272)  # 20, 72, 272: K = 4, 8, 16 with all branches
CONTEXTS = (256, 1024, 4096)
FREE = 1.1  # tokens are free up to the number whose forward takes this multiple of one token's
MOST_ROWS = 32  # of the output layer: those of the drafts, and of the masks of one branch


def check(setting: Setting) -> dict[str, Any]:
    """Return the curve of each model and context, and how many tokens are free."""
    rows: list[dict[str, Any]] = []
    for kind, share in (("1.5B", 0.4), ("8B", 1.0)):
        with setting.part(share):
            if setting.in_time():
                rows += _curve(random_model(kind, setting, torch.bfloat16), kind, setting)
    free = _free(rows)
    for kind, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        own = {r["tokens"]: r["milliseconds"] for r in rows if (r["model"], r["context"]) == (kind, context)}
        curve = ", ".join(f"{tokens}: {milliseconds:.3g}" for tokens, milliseconds in own.items())
        setting.summary.append(f"{kind}, context {context}: ms by tokens {curve}")
    for row in free:
        setting.summary.append(f"{row['model']}, context {row['context']}: {row['free_tokens']} tokens within {FREE} x")
    note = {} if setting.on_gpu else {"note": f"{NOT_ON_A_CPU}: CUDA graphs; their static shapes run eagerly"}
    return {"dtype": "bfloat16", "rows": rows, "free": free, **note}


@torch.inference_mode()
def _curve(model: DecodeModel, kind: str, setting: Setting) -> list[dict[str, Any]]:
    sizes, contexts = setting.size((SIZES, CONTEXTS), (SIZES[::4], (64,)))
    runner = Forwards(model, 1, max(contexts) + max(sizes), static=True)
    samples, rows = setting.size(9, 1), []
    for context in contexts:
        for size in sizes:
            if not setting.in_time():
                return rows
            parts = [Part(0, context, random_prompt(model, size, size), ForwardLayout(size))]
            for _ in range(WARM_UP + 1):
                hidden, forward = runner.run(parts)
            replay = median_seconds(lambda forward=forward: forward.run(model), model.device, samples, 1)  # type: ignore[misc]
            loaded = median_seconds(lambda parts=parts: runner.run(parts), model.device, samples, 1)  # type: ignore[misc]
            few = hidden[: min(size, MOST_ROWS)]
            head = median_seconds(lambda few=few: model.logits(few).argmax(-1), model.device, samples, 1)  # type: ignore[misc]
            rows.append(
                {"model": kind, "context": context, "tokens": size, "rounded_to": forward.num_tokens}
                | {"milliseconds": 1e3 * replay, "with_inputs_milliseconds": 1e3 * loaded}
                | {"output_layer_milliseconds": 1e3 * head}
            )
    return rows


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
