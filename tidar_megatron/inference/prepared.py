"""Convert the inputs that transformers' ``generate`` prepares into the engine's options, or refuse them by name.

transformers turns options into logits processors and stopping criteria. This module reads those, not the options, so
that transformers alone interprets the options (defaults, tensors).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tidar_megatron.errors import UserError
from tidar_megatron.inference.sampling import SamplingOptions

PROCESSORS = (  # transformers' processors that the engine implements itself
    *(RepetitionPenaltyLogitsProcessor, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor),
    *(SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper),
    LogitNormalization,
)
CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)
OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
SERVED = {  # supported options, which a refusal's message must not name
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "max_length"),
    *("min_new_tokens", "min_length", "eos_token_id", "pad_token_id", "bos_token_id", "num_return_sequences"),
    *("suppress_tokens", "stop_strings", "transformers_version", "prefill_chunk_size", "renormalize_logits"),
    *("use_cache", "cache_implementation", "disable_compile", "compile_config"),
}


def refuse(names: Sequence[str]) -> None:
    """Raise a UserError that names these options, if there are any."""
    if names:
        raise UserError(
            f"{', '.join(names)}: not supported by this generate; leave it out, or leave custom_generate out"
        )


def check_prepared(
    config: GenerationConfig, logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList
) -> None:
    """Refuse prepared options that the engine does not support.

    Raises:
        UserError: an option is not supported; the message names it.
    """
    refuse([name for name in OUTPUTS if getattr(config, name, None)])
    unknown = [type(one).__name__ for one in logits_processor if type(one) not in PROCESSORS]
    unknown += [type(one).__name__ for one in stopping_criteria if type(one) not in CRITERIA]
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        unknown.append(mode.value)
    if unknown:
        usual = GenerationConfig._get_default_generation_params()
        given = {name: value for name, value in config.to_dict().items() if value is not None and value is not False}
        asked = [name for name in given if name[0] != "_" and name not in SERVED and given[name] != usual.get(name)]
        refuse(asked or unknown)


def texts_of(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the tokens of each row without its padding.

    Args:
        ids: Token ids ``[rows, tokens]``.
        mask: The attention mask ``[rows, tokens]``: 1 for text, 0 for padding.

    Raises:
        UserError: the mask has other values, or a row ends with padding.
    """
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError("attention_mask: must be 1 for text and 0 for padding")
    ends = (mask[:, -1] == 0).nonzero().flatten().tolist()
    if ends:
        raise UserError(
            f"attention_mask: row {ends[0]} ends with padding, and transformers would continue that; pad on the left "
            "(without an attention_mask, pad_token_id is padding)"
        )
    return [row[seen].tolist() for row, seen in zip(ids, mask.bool(), strict=True)]


def check_penalized(penalty: RepetitionPenaltyLogitsProcessor, ids: Tensor, prompts: list[list[int]]) -> None:
    """Refuse a repetition penalty if transformers would also penalize padding tokens.

    Args:
        penalty: The logits processor that transformers prepared.
        ids: Token ids ``[rows, tokens]``, padding included.
        prompts: The tokens of each row without padding.

    Raises:
        UserError: the padding would count as text.
    """
    ignored = getattr(penalty, "prompt_ignore_length", None)
    starts = torch.as_tensor(0 if ignored is None else ignored).expand(len(ids)).tolist()
    for row, start, prompt in zip(ids.tolist(), starts, prompts, strict=True):
        if set(row[start:]) == set(prompt):
            continue
        if row[-len(prompt) :] == prompt:  # all padding is on the left; transformers before 5.23 counts it
            raise UserError(
                "repetition_penalty: this version of transformers would count the padding; leave it out, generate from "
                "one prompt at a time, or install transformers 5.23 or later"
            )
        raise UserError("repetition_penalty: transformers would count padding within a row; pad on the left")


def ends_of_text(criterion: EosTokenCriteria | None) -> frozenset[int]:
    """Return the end-of-sequence token ids.

    Raises:
        UserError: the ids are not integers.
    """
    tokens = torch.empty(0, dtype=torch.int64) if criterion is None else criterion.eos_token_id
    if tokens.is_floating_point():
        raise UserError(f"eos_token_id: must be integers, but is {tokens.dtype}")
    return frozenset(tokens.flatten().tolist())


def sampling_of(processors: dict[type, Any], drawn: bool, width: int) -> SamplingOptions:
    """Return the sampling options equivalent to transformers' processors.

    Args:
        processors: The logits processors by type.
        drawn: Whether tokens are sampled, not greedy.
        width: The number of tokens in a row of the inputs, padding included.
    """

    def of(kind: type, name: str, default: Any) -> Any:
        return getattr(processors[kind], name) if kind in processors else default

    longest = max(
        of(MinLengthLogitsProcessor, "min_length", 0) - width,
        of(MinNewTokensLengthLogitsProcessor, "min_new_tokens", 0),
    )
    kept = {
        "repetition_penalty": float(of(RepetitionPenaltyLogitsProcessor, "penalty", 1.0)),
        "min_new_tokens": max(0, math.ceil(longest)),
    }
    if not drawn:
        return SamplingOptions(**kept)
    return SamplingOptions(
        temperature=float(of(TemperatureLogitsWarper, "temperature", 1.0)),
        top_k=of(TopKLogitsWarper, "top_k", None),
        top_p=float(of(TopPLogitsWarper, "top_p", 1.0)),
        min_p=float(of(MinPLogitsWarper, "min_p", 0.0)),
        seed=int(torch.randint(2**31, ())),
        **kept,
    )
