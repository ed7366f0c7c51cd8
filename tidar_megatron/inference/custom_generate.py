"""``generate`` for users who have transformers alone: an exported folder contains this file and the engine it calls.

``model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)`` returns the same tokens as
``model.generate(**inputs)``, in fewer forwards. ``huggingface/exported_engine.py`` writes the copies.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import cached_file

from tidar_megatron.adapter import CONFIG, WEIGHTS
from tidar_megatron.errors import UserError
from tidar_megatron.inference.adapters import draft_with, load_adapter
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.model import DecodeModel, restore_norms
from tidar_megatron.inference.prepared import (
    check_penalized,
    check_prepared,
    ends_of_text,
    refuse,
    sampling_of,
    texts_of,
)
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.sequence import Sequence as Request
from tidar_megatron.inference.wrapping import wrap_model

MOST_AT_ONCE = 8


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: PreTrainedModel,
    streamer: Any = None,
    plan: str = "auto",
    tokenizer: Any = None,
    **others: Any,
) -> Tensor:
    """Generate as transformers' ``generate`` does for a decoder-only model: greedy or sampled, also for masked batches.

    transformers itself reads the arguments: its own ``generate`` prepares the inputs, the logits processors and the
    stopping criteria, and calls :func:`_decode` in place of its own loop. Options that the engine does not support are
    refused there.

    Args:
        inputs: Token ids, int32 or int64 ``[rows, tokens]`` (also as ``input_ids``), padded on the left where
            ``attention_mask`` is 0.
        generation_config: As for transformers' ``generate``; its fields may be given by name instead.
        model: The model that transformers loaded.
        streamer: An object with ``put`` and ``end``, as in transformers; for one row only.
        plan: The decoding plan: ``auto``, ``ar``, ``linear:K``, ``lookup:K``, ``all:K``, or ``N:K`` with N branches.
        tokenizer: The tokenizer, needed for ``stop_strings`` only.

    Returns:
        Token ids, int64 ``[rows * num_return_sequences, tokens]``: inputs, then output, padded on the right. The output
        never contains the mask token.

    Raises:
        UserError: an option is not supported; the message names it.
        ValueError: transformers refuses an option.
    """
    stock = type(model).generate  # with trust_remote_code=True, the model's own generate is this function
    given = {"inputs": inputs, "generation_config": generation_config, **others}
    given = {
        name: value for name, value in given.items() if value is not None or hasattr(model.generation_config, name)
    }
    if given.get("custom_generate") is not None:  # another custom_generate, or this one named by its folder
        more = {"streamer": streamer, "tokenizer": tokenizer, "plan": None if plan == "auto" else plan}
        return stock(model, **given, **{name: value for name, value in more.items() if value is not None})
    given.pop("trust_remote_code", None)
    _check_arguments(model, given)
    chosen = parse_plan(plan)
    strings = _stop_strings(model, given)
    if strings is not None:
        if tokenizer is None:
            raise UserError("stop_strings: a tokenizer is needed; pass it as tokenizer=")
        given["stop_strings"] = None
        given["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])

    def decode(model: PreTrainedModel, input_ids: Tensor, **prepared: Any) -> Tensor:
        return _decode(model, input_ids, chosen, streamer, **prepared)

    return stock(model, custom_generate=decode, **given)


def _check_arguments(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Refuse arguments that only transformers' own loop would use; drop empty lists of processors and criteria.

    Raises:
        UserError: an argument is not supported; the message names it.
    """
    for name in ("logits_processor", "stopping_criteria"):
        if name in given and not len(given[name]):
            del given[name]
    read = {"inputs", "input_ids", "attention_mask", "generation_config", "synced_gpus"}
    refuse([name for name in given if name not in read and not hasattr(model.generation_config, name)])
    if given.get("cache_implementation") == "paged":  # transformers would switch to its loop for paged caches
        refuse(["cache_implementation"])
    ids, mask = given.get("inputs", given.get("input_ids")), given.get("attention_mask")
    if ids is not None and not (
        isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel() and ids.dtype in (torch.int32, torch.int64)
    ):
        raise UserError("input_ids: must be token ids, a non-empty integer tensor of shape [rows, tokens]")
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.shape == ((*mask.shape[:1], 1) if ids is None else ids.shape)
    ):
        raise UserError("attention_mask: must be a tensor of the same shape as input_ids, [rows, tokens]")


def _stop_strings(model: PreTrainedModel, given: dict[str, Any]) -> Any:
    """Return the strings that end a text, in transformers' order of precedence.

    transformers passes no tokenizer to a custom loop, so stop strings are handled here.
    """
    if "stop_strings" in given:
        return given["stop_strings"]
    strings = getattr(given.get("generation_config"), "stop_strings", None)
    return getattr(model.generation_config, "stop_strings", None) if strings is None else strings


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    ids: Tensor,
    plan: DecodeOptions,
    streamer: Any,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    attention_mask: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """Decode the prepared inputs, in place of transformers' ``_sample``.

    Args:
        ids: Token ids ``[rows * num_return_sequences, tokens]``.
        plan: Options that set only the mode, draft length and branches.
        attention_mask: A mask of the same shape as ``ids``; None if there is no padding.
    """
    config, width = generation_config, ids.shape[1]
    check_prepared(config, logits_processor, stopping_criteria)
    if streamer is not None and len(ids) > 1:
        raise UserError("streamer: supports one row only; leave it out for a batch")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    prompts = texts_of(ids, mask)
    processors = {type(processor): processor for processor in logits_processor}
    criteria = {type(criterion): criterion for criterion in stopping_criteria}
    if penalty := processors.get(RepetitionPenaltyLogitsProcessor):
        check_penalized(penalty, ids, prompts)
    end_of_text = ends_of_text(criteria.get(EosTokenCriteria))
    stop = criteria.get(StopStringCriteria)
    if stop is not None and not end_of_text and len(ids) > 1:
        # transformers would continue the rows that have ended until all rows have
        raise UserError("stop_strings: a batch needs an eos_token_id as well, or pass one row at a time")
    with _wrapped(model) as decoding:
        suppressed = processors.get(SuppressTokensLogitsProcessor)
        if suppressed is not None and set(suppressed.suppress_tokens.tolist()) - {decoding.mask_token_id}:
            raise UserError(
                "suppress_tokens: only the mask token is supported; leave suppress_tokens or custom_generate out"
            )
        decoding.eos_token_ids = end_of_text
        length = math.ceil(criteria[MaxLengthCriteria].max_length - width)
        requests = []
        for row, prompt in zip(ids, prompts, strict=True):
            options = DecodeOptions(
                mode=plan.mode,
                draft_length=plan.draft_length,
                branches=plan.branches,
                max_new_tokens=length,
                sampling=sampling_of(processors, bool(config.do_sample), width),
            )
            requests.append(Request(decoding, prompt, options, None if stop is None else _Stop(stop, row.tolist())))
        if streamer is not None:
            streamer.put(ids.cpu())
        room = max(request.room for request in requests)
        engine = Engine(decoding, min(len(requests), MOST_AT_ONCE), room, queue_size=len(requests))
        for request in requests:
            engine.enqueue(request)
        while not engine.is_idle:
            for request, step in engine.step():
                if request.error is not None:
                    raise request.error
                for token in step.tokens if streamer is not None else ():
                    streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
    if any(request.stop == "context" for request in requests):
        warnings.warn(f"the model's context of {decoding.context_limit} tokens is full, so the text ends", stacklevel=2)
    padding = config._pad_token_tensor
    filler = 0 if padding is None else padding.flatten()[0].item()
    longest = max(len(request.tokens) for request in requests)
    made = [request.tokens + [filler] * (longest - len(request.tokens)) for request in requests]
    return torch.cat([ids, torch.tensor(made, device=ids.device)], dim=1)


def _use_adapter(model: DecodeModel) -> None:
    """Let a model that does not draft by itself use the adapter in its folder, if there is one.

    A model whose layers compute more than the engine's do decodes without.

    Raises:
        UserError: the adapter is broken, or belongs to other weights.
    """
    causal_lm = model.causal_lm
    if model.mask_token_id is not None or model.lean is None or not causal_lm.name_or_path:
        return
    kept = _DRAFTS.setdefault(causal_lm, {})
    if (key := (model.device, model.dtype)) not in kept:
        file = _file_of(causal_lm, CONFIG)
        if file is not None and _file_of(causal_lm, WEIGHTS) is not None:
            load_adapter(model, Path(file).parent, Path(file).parent)
        kept[key] = (model.drafts, model.block_size) if model.drafts is not None else None
    elif (found := kept[key]) is not None:
        draft_with(model, *found)


def _file_of(causal_lm: PreTrainedModel, name: str) -> str | None:
    """Return the path of a file in the local or hub folder that the model was loaded from, or None."""
    silent = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    revision = getattr(causal_lm.config, "_commit_hash", None)
    try:
        found: str | None = cached_file(causal_lm.name_or_path, name, revision=revision, **silent)
    except OSError:  # the folder is gone, or no such repository is known
        return None
    return found


# draft weights and block size, or None, by device and dtype
_DRAFTS: WeakKeyDictionary[PreTrainedModel, dict[Any, Any]] = WeakKeyDictionary()


class _Stop:
    """An adapter that applies transformers' stop-string rule token by token, with the interface of ``StopStrings``."""

    def __init__(self, criterion: StopStringCriteria, ids: list[int]) -> None:
        self._criterion, self._ids = criterion, ids

    def ends_with(self, token: int) -> bool:
        """Add a token; return whether the text has ended."""
        self._ids = [*self._ids, token][-self._criterion.maximum_token_len :]  # the criterion reads no more
        return bool(self._criterion(torch.tensor([self._ids]), None))


@contextmanager
def _wrapped(model: PreTrainedModel) -> Iterator[DecodeModel]:
    """Wrap the model with the engine's attention and norms, and restore its own afterwards."""
    attention, training = model.config._attn_implementation, [module.training for module in model.modules()]
    try:
        wrapped = wrap_model(model)
        _use_adapter(wrapped)
        yield wrapped
    finally:
        restore_norms(model)
        model.set_attn_implementation(attention)
        for module, was in zip(model.modules(), training, strict=True):
            module.training = was
