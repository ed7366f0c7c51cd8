"""Test which of transformers' causal LM classes the engine decodes exactly, and which it refuses (README.md's table).

    python examples/architectures/survey.py [MODEL_TYPE ...]

Each class is built small and random (``tiny.py``), with windows and chunks of 16 tokens, and again with each kind of
rotary scaling that it supports. If the engine does not refuse a class, it must return the tokens of transformers' own
greedy ``generate`` with every plan, one prompt at a time and in a batch of five prompts of different lengths, up to a
context of more than 64 tokens. Otherwise the program exits with status 1. Without model types it tests all of them and
writes the table, which takes a few minutes on one core.
"""

import argparse
import sys
import warnings
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import tiny
import torch
import transformers
from transformers import PreTrainedModel

from tidar_megatron.errors import UserError
from tidar_megatron.inference.engine import generate_batch
from tidar_megatron.inference.request import parse_plan
from tidar_megatron.inference.wrapping import wrap_model

PLANS = ("ar", "linear:4", "lookup:4", "all:4", "2:4", "auto")
PROMPT_LENGTHS = (3, 14, 25, 40, 55)
NEW_TOKENS = 24
MASK = tiny.VOCABULARY - 1
TABLE = Path(__file__).parent / "README.md"

HEADING = """# Which classes of transformers the engine decodes

`python examples/architectures/survey.py` writes this file and says how; do not edit it by hand. Windows and chunks are
16 tokens, so they bite; a real checkpoint of a class may have none. *exact*: the tokens of transformers' own greedy
`generate` in every plan, alone and in a batch. *refused*: one line before anything is decoded. *not built*: nothing was
tried.
"""


class Outcome(NamedTuple):
    """The outcome of one configuration (``exact``, ``refused``, ``not built`` or ``DIFFERS``) with its reason."""

    model_type: str
    variant: str
    outcome: str
    reason: str = ""


def variants(model_type: str) -> dict[str, dict[str, object]]:
    """Return the configurations of ``model_type`` by name: as it is, without windows, and with each rope type."""
    settings = tiny.settings_of(model_type)
    found: dict[str, dict[str, object]] = {"as it is": {}}
    if "sliding_window" in settings:
        found["a window that the context never fills"] = {"sliding_window": 4 * tiny.CONTEXT}
        found["use_sliding_window false beside a window"] = {"use_sliding_window": False}
    if tiny.takes_rope(model_type):
        base = {"sliding_window": 4 * tiny.CONTEXT} if "sliding_window" in settings else {}
        for rope_type, rope in tiny.ROPES.items():
            parameters = {"rope_type": rope_type, "rope_theta": 1e4, **rope}
            found[f"rope {rope_type}"] = {**base, "rope_parameters": parameters}
    return found


def outcome_of(model_type: str, variant: str, changes: dict[str, object]) -> Outcome:
    """Build one configuration, decode with it in every plan, and return the outcome."""
    try:
        causal_lm = tiny.build(model_type, **changes)
    except tiny.NotBuiltError as error:
        return Outcome(model_type, variant, "not built", str(error))
    causal_lm.config.tidar = {"mask_token_id": MASK, "block_size": 4}
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, MASK, (length,), generator=draw).tolist() for length in PROMPT_LENGTHS]
    try:
        wanted = [stock_tokens(causal_lm, prompt) for prompt in prompts]
    except Exception as error:  # its own generate may raise anything
        wanted, stock_error = None, error
    try:
        model = wrap_model(causal_lm)
    except UserError as error:
        text = str(error).split(" computes more than the engine does: ")[-1]
        return Outcome(model_type, variant, "refused", text.split("; use a Llama")[0])
    if wanted is None:
        return Outcome(model_type, variant, "not built", f"its own generate ends in {type(stock_error).__name__}")
    model.eos_token_ids = frozenset()
    for plan in PLANS:
        for batch_size in (1, 5):
            options = replace(parse_plan(plan), max_new_tokens=NEW_TOKENS, ignore_eos=True)
            try:
                found = [one.token_ids for one in generate_batch(model, prompts, options, batch_size)]
            except Exception as error:
                return Outcome(model_type, variant, "DIFFERS", f"plan {plan}, batch {batch_size}: {error}")
            if found != wanted:
                return Outcome(model_type, variant, "DIFFERS", f"plan {plan}, batch {batch_size}")
    return Outcome(model_type, variant, "exact")


@torch.inference_mode()
def stock_tokens(causal_lm: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Return the greedy tokens of transformers' own ``generate`` with the mask token suppressed."""
    found = causal_lm.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=[MASK],
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


def table(outcomes: list[Outcome]) -> str:
    """Return README.md's text: counts, then a row for the configurations of a class with equal outcome and reason."""
    counts = Counter(one.outcome for one in outcomes)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("exact", "refused", "not built", "DIFFERS") if counts[kind])
    lines = [
        HEADING,
        f"transformers {transformers.__version__}: {len({one.model_type for one in outcomes})} model types in "
        f"{len(outcomes)} configurations, {kinds}.\n",
        "| model type | class | configurations | outcome | reason |",
        "|---|---|---|---|---|",
    ]
    for (model_type, outcome, reason), same in groupby(outcomes, lambda one: (one.model_type, one.outcome, one.reason)):
        names = ", ".join(one.variant for one in same)
        reason = reason.replace("|", "/")
        lines.append(f"| {model_type} | {tiny.class_name(model_type)} | {names} | {outcome} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="model types to test [all, and write the table]")
    asked = parser.parse_args().model_types
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    torch.set_num_threads(1)
    outcomes = []
    for model_type in asked or tiny.model_types():
        try:
            every = variants(model_type)
        except tiny.NotBuiltError as error:
            outcomes.append(Outcome(model_type, "as it is", "not built", str(error)))
            continue
        for variant, changes in every.items():
            outcomes.append(outcome_of(model_type, variant, changes))
            print(*outcomes[-1], sep="\t", flush=True)
    if not asked:
        TABLE.write_text(table(outcomes), encoding="utf-8")
    return 1 if any(outcome.outcome == "DIFFERS" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
