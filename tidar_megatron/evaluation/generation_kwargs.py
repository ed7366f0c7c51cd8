"""Convert the ``generation_kwargs`` of an lm-eval task into the engine's options."""

import dataclasses
import math
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import GenerationConfig

from tidar_megatron.errors import UserError
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sampling import SamplingOptions

MAX_NEW_TOKENS = 256  # lm-eval's default
TOP_K = 50  # transformers' default
DRAWING = ("temperature", "top_k", "top_p", "min_p")
NUMBERS = (*DRAWING, "repetition_penalty", "min_new_tokens", "num_beams", "length_penalty")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
FROM_THE_FOLDER = ("repetition_penalty", "min_new_tokens", "top_k", "top_p", "min_p")


def task_options(
    plan: DecodeOptions, generation_kwargs: dict[str, Any], configured: GenerationConfig, eos: str | None
) -> tuple[DecodeOptions, list[str]]:
    """Return the engine's options for a task, and the strings at which its output is cut.

    Values that are missing or None come from the folder's ``generation_config.json``, then from the defaults of lm-eval
    and transformers, as in lm-eval's ``hf`` model.

    Args:
        plan: Options with the plan's mode, draft length and branches.
        generation_kwargs: The task's generation arguments.
        configured: The folder's ``generation_config.json``.
        eos: The text of the end-of-sequence token, or None.

    Raises:
        UserError: an option is not supported or has an invalid value; the message names it.
    """
    given = {name: value for name, value in generation_kwargs.items() if value is not None}
    for name in (*NUMBERS, *LENGTHS):
        if name in given:
            given[name] = _number(name, given[name])
    if given.get("do_sample", False) not in (True, False):
        raise UserError(f"generation_kwargs: do_sample {given['do_sample']!r} is neither true nor false")
    until = given.get("until", [])
    until = [until] if isinstance(until, str) and until else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) and text for text in until):
        raise UserError(f"generation_kwargs: until {until!r} is not a list of texts of at least one character")
    asked: dict[str, Any] = {**normalize_gen_kwargs(given, MAX_NEW_TOKENS)}
    for name in FROM_THE_FOLDER:
        if asked.get(name) is None and (value := getattr(configured, name, None)) is not None:
            asked[name] = value
    until = handle_stop_sequences([*until], eos)
    stop = tuple(text for text in until if text)
    options = dataclasses.replace(
        plan, max_new_tokens=asked["max_gen_toks"], stop=stop, sampling=sampling_options(asked)
    )
    return options, until


def _number(name: str, value: Any) -> Any:
    """Return ``value``, converted to a number if it is a string, as YAML and command lines may give it."""
    if value is False:  # False disables the option
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"generation_kwargs: {name} {value!r} is not a number")
    return number if isinstance(value, str) else value


def sampling_options(asked: dict[str, Any]) -> SamplingOptions:
    """Return the sampling options for ``generation_kwargs``, read as lm-eval's ``hf`` model and transformers read them.

    Raises:
        UserError: an option is not supported (the message names it), or sampling is requested at temperature 0.
    """
    wanted = {name: value for name, value in asked.items() if value is not None and value is not False}
    neutral = ("use_cache", *(name for name in ("num_beams", "length_penalty") if asked.get(name) == 1))
    served = ("until", "max_gen_toks", "do_sample", "repetition_penalty", "min_new_tokens", *DRAWING, *neutral)
    if others := [name for name in wanted if name not in served]:
        raise UserError(
            f"generation_kwargs: {', '.join(others)} is not supported by the engine; leave it out of the task"
        )

    def given(name: str, default: float) -> float:
        return float(wanted.get(name, default))

    kept = SamplingOptions(
        repetition_penalty=given("repetition_penalty", 1.0), min_new_tokens=int(given("min_new_tokens", 0))
    )
    if not asked.get("do_sample"):
        return kept
    temperature = given("temperature", 1.0)
    if not temperature:
        raise UserError("generation_kwargs: do_sample at temperature 0: leave do_sample out, or raise the temperature")
    return dataclasses.replace(
        kept,
        temperature=temperature,
        top_k=int(asked.get("top_k", TOP_K) or 0) or None,
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
    )
