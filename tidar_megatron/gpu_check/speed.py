"""Section 5: tokens per second at batch 1, at scripted acceptance, so that tokens per forward become tokens per second.

The weights are random, so the model would accept no drafts. A script accepts them instead: each draft with the given
probability if all before it were accepted. Everything else is the engine's own work.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tidar_megatron.gpu_check.models import BLOCK_SIZE, random_model, random_prompt
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.inference.drafting import Branches, Drafts
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.forward import ForwardLayout
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import Generation, parse_plan
from tidar_megatron.inference.sampling import Sampler
from tidar_megatron.inference.sequence import Sequence as Decoding

PLANS = tuple(f"{kind}:{BLOCK_SIZE}" for kind in ("linear", "1", "2", "all"))
RATES = (0.6, 0.8, 0.9)


def check(setting: Setting) -> None:
    """Find tokens per forward and per second of each model, plan and acceptance rate."""
    setting.found |= {"batch": 1, "dtype": "bfloat16"}
    setting.found |= {} if setting.on_gpu else {"note": f"{NOT_ON_A_CPU}: CUDA graphs; their static shapes run eagerly"}
    rows = setting.rows("rows")
    for kind, share in (("1.5B", 0.4), ("8B", 1.0)):
        with setting.part(share), setting.guard(kind):
            if setting.in_time():
                _measure(random_model(kind, setting, torch.bfloat16), kind, setting, rows)
    for row in rows:
        setting.summary.append(
            f"{row['model']}, {row['plan']}, acceptance {row['acceptance']}: {row['tokens_per_forward']:.2f} tokens "
            f"per forward, {row['tokens_per_second']:.1f} tokens/s, {row['over_ar']:.2f} of AR's"
        )


def _measure(model: DecodeModel, kind: str, setting: Setting, rows: list[dict[str, Any]]) -> None:
    asked: list[tuple[str, float | None]] = [("ar", None)]
    asked += [(plan, rate) for rate in setting.size(RATES, RATES[1:2]) for plan in PLANS]
    ar = 0.0
    for plan, rate in asked:
        if not setting.in_time():
            return
        made = _decode(model, plan, rate, setting)
        ar = ar or made.tokens_per_second
        rows.append(
            {"model": kind, "plan": plan, "acceptance": rate, "tokens_per_forward": made.tokens_per_forward}
            | {"tokens_per_second": made.tokens_per_second, "over_ar": made.tokens_per_second / ar}
            | {"forwards": made.forwards, "forward_milliseconds": 1e3 * made.decode_seconds / made.forwards}
        )


def _decode(model: DecodeModel, plan: str, rate: float | None, setting: Setting) -> Generation:
    """Decode twice with one engine, and return the second generation: by then the graphs are captured."""
    options = replace(parse_plan(plan), max_new_tokens=setting.size(192, 24), ignore_eos=True)
    prompt = random_prompt(model, setting.size(512, 16))
    engine = Engine(model, 1, Decoding(model, prompt, options).room, static=True)
    generation = Generation.of(model, options)
    for _ in range(2):
        generation = Generation.of(model, options)
        with scripted(rate or 0.0, seed=0):
            sequence = engine.submit(prompt, options)
            while not engine.is_idle:
                for _, step in engine.step():
                    generation.add(step)
        if sequence.error is not None:
            raise sequence.error
    return generation


@contextmanager
def scripted(rate: float, seed: int) -> Iterator[None]:
    """Accept each draft with probability ``rate`` if all before it were accepted, in this block and greedy decoding.

    The verifier computes what it would compute. Branches are chosen as by a model that knows the rate.
    """
    random = np.random.Generator(np.random.Philox(seed))
    choose, plan = Sampler.choose, Branches.plan

    def scripted_choose(self: Sampler, logits: Tensor, drafts: Sequence[int], *more: Any) -> list[int]:
        chosen = choose(self, logits, drafts, *more)
        refused = np.append(random.random(len(drafts) - 1) >= rate, True)
        accepted = int(refused.argmax())
        return [*drafts[1 : accepted + 1], chosen[-1]]

    def scripted_plan(self: Branches, drafts: Drafts, most: int) -> tuple[Drafts, ForwardLayout]:
        drafts.confidences = [rate] * (len(drafts.tokens) - 1)
        return plan(self, drafts, most)

    with patch.object(Sampler, "choose", scripted_choose), patch.object(Branches, "plan", scripted_plan):
        yield
