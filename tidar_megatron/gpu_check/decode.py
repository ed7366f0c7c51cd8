"""Section 3: decoding by CUDA graphs against eager forwards: the same tokens in float32, close logits in bfloat16."""

import time
from dataclasses import replace
from typing import Any

import torch

from tidar_megatron.benchmark.timing import synchronize
from tidar_megatron.gpu_check.models import BLOCK_SIZE, random_model, random_prompt
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.sequence import Sequence
from tidar_megatron.inference.static import WARM_UP, Forwards

PLANS = ("ar", f"linear:{BLOCK_SIZE}", f"1:{BLOCK_SIZE}", f"all:{BLOCK_SIZE}")
TIE = 1e-4  # the largest difference of log-probabilities of tokens that tie in float32
LARGEST_ERROR = 3e-2  # of bfloat16 logits: norm of the difference over the norm


def check(setting: Setting) -> None:
    """Find whether the tokens are equal, with tokens per second of both ways, and the differences of logits."""
    model = random_model("small", setting, torch.float32)
    setting.found |= {} if setting.on_gpu else {"note": f"{NOT_ON_A_CPU}: CUDA graphs; their static shapes run eagerly"}
    rows, logits = setting.rows("rows"), setting.rows("logits")
    for batch in (1, 3):
        for plan in PLANS:
            if setting.in_time():
                with setting.guard(f"{plan}, batch {batch}"):
                    rows.append(_compare(model, setting, plan, batch))
    del model
    if setting.in_time():
        with setting.guard("bfloat16 logits"):
            _logits(setting, logits)
    by = "by graphs" if setting.on_gpu else "in static shapes"
    for row in rows:
        setting.summary.append(
            f"{row['plan']}, batch {row['batch']}: tokens {row['tokens']}; "
            f"{row['static_tokens_per_second']:.0f} tokens/s {by}, {row['eager_tokens_per_second']:.0f} eager"
        )
    if logits:
        setting.summary.append(f"bf16 logits: relative difference {max(row['error'] for row in logits):.2g} at most")


def _compare(model: DecodeModel, setting: Setting, plan: str, batch: int) -> dict[str, Any]:
    new = setting.size(96, 24)
    options = replace(parse_plan(plan), max_new_tokens=new, ignore_eos=True)
    prompts = [random_prompt(model, setting.size(100, 10) + 7 * number, number) for number in range(batch)]
    found = {static: _decode(model, prompts, options, static) for static in (True, False)}
    tokens = _compared(*(found[static][0] for static in (True, False)))
    differs = f"{plan}, batch {batch}: float32 tokens of CUDA graphs and of eager forwards differ"
    setting.require(tokens != "different", differs)
    return {
        "plan": plan,
        "batch": batch,
        "tokens": tokens,
        "static_tokens_per_second": found[True][1],
        "eager_tokens_per_second": found[False][1],
    }


Text = tuple[list[int], list[float]]  # tokens and their log-probabilities


def _compared(ours: list[Text], theirs: list[Text]) -> str:
    """Return whether texts are equal, or tie: where they part, both tokens had the same probability up to rounding."""
    parted = []
    for (tokens, logprobs), (others, other_logprobs) in zip(ours, theirs, strict=True):
        place = next((n for n, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            parted.append(abs(logprobs[place] - other_logprobs[place]))
    return "equal" if not parted else "tied" if max(parted) <= TIE else "different"


def _decode(
    model: DecodeModel, prompts: list[list[int]], options: DecodeOptions, static: bool
) -> tuple[list[Text], float]:
    """Return the texts, and the tokens per second when the same engine decodes the same prompts again."""
    room = max(Sequence(model, prompt, options).room for prompt in prompts)
    engine = Engine(model, len(prompts), room, static=static)
    texts: list[Text] = []
    seconds = 0.0
    for logprobs in (True, False):
        sequences = [engine.submit(prompt, replace(options, logprobs=logprobs)) for prompt in prompts]
        synchronize(model.device)
        start = time.perf_counter()
        while not engine.is_idle:
            engine.step()
        seconds = time.perf_counter() - start
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error
        texts = texts or [(sequence.tokens, sequence.logprobs) for sequence in sequences]
    return texts, sum(len(tokens) for tokens, _ in texts) / seconds


@torch.inference_mode()
def _logits(setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Compare the logits of one draft/verify forward behind random contexts, for batches of 1 and 3."""
    model = random_model("small", setting, torch.bfloat16)
    K = BLOCK_SIZE
    layout = ForwardLayout(K, tuple(range(1, K + 1)), K)
    for batch in (1, 3):
        found = {}
        for static in (True, False):
            runner = Forwards(model, batch, setting.size(2048, 256), static)
            lengths = [setting.size(1000, 100) - 37 * number for number in range(batch)]
            for slot, length in enumerate(lengths):
                text = random_prompt(model, length, slot)
                runner.run([Part(slot, 0, text, ForwardLayout(length))], reads_prompt=True)
            drafts = random_prompt(model, K, 9)
            parts = [Part(slot, length, drafts, layout) for slot, length in enumerate(lengths)]
            for _ in range(WARM_UP + 2):  # the last is a replay
                hidden, forward = runner.run(parts)
            own = [hidden[start : start + layout.num_tokens] for start in forward.starts]
            found[static] = model.logits(torch.cat(own), emitted=False).float()
        error = float((found[True] - found[False]).norm() / found[False].norm())
        setting.require(error <= LARGEST_ERROR, f"bfloat16 logits, batch {batch}: relative difference {error:.2g}")
        rows.append({"batch": batch, "tokens": layout.num_tokens, "error": error})
