"""``generate`` for users of transformers alone: an exported folder carries this file and the engine it calls.

``model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)`` gives the tokens that
``model.generate(**inputs)`` gives, in fewer forwards. ``checkpoint/custom_generate.py`` writes the copies.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tidar_megatron.errors import UserError
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.loading import wrap_model
from tidar_megatron.inference.model import DecodeModel, restore_norms
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.sampling import SamplingOptions
from tidar_megatron.inference.sequence import Sequence

MOST_AT_ONCE = 8
NEW_TOKENS = 20
OF_NO_EFFECT = ("use_cache", "synced_gpus", "cache_implementation", "disable_compile", "compile_config")
SERVED = {  # options of a GenerationConfig that are served, or mean nothing here
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "max_length"),
    *("min_new_tokens", "min_length", "eos_token_id", "pad_token_id", "bos_token_id", "num_return_sequences"),
    *("suppress_tokens", "stop_strings", "transformers_version", "prefill_chunk_size", "renormalize_logits"),
    *OF_NO_EFFECT,
}
# options that ask for nothing at these values, as transformers before 5 writes them
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "length_penalty", "typical_p", "guidance_scale"), 1),
    "encoder_repetition_penalty": 1,
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha"), 0),
}


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
    """As transformers' ``generate``, of a decoder-only model: greedy or sampled, ragged batches with an attention mask.

    Args:
        inputs: token ids, int64 ``[rows, tokens]`` (also as ``input_ids``); with ``attention_mask`` where padded.
        generation_config: as there; its fields may be given by name instead.
        plan: how to draft: ``auto``, ``ar``, ``linear:K``, ``lookup:K``, ``all:K``, or ``N:K`` with N branches.
        tokenizer: for ``stop_strings``, which are looked for in the output alone.

    Returns:
        Token ids, int64 ``[rows * num_return_sequences, tokens]``, the inputs before the output, padded on the right.

    Raises:
        UserError: an option that is not served, by name.
    """
    ids, mask = others.pop("input_ids", inputs), others.pop("attention_mask", None)
    config = deepcopy(generation_config or model.generation_config)
    if generation_config is not None:  # as transformers does: what it leaves open is the model's
        config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    unknown = config.update(**others)
    unknown = {name: value for name, value in unknown.items() if value is not None}
    given = {name: value for name, value in config.to_dict().items() if name[0] != "_" and not _is_neutral(name, value)}
    if asked := [name for name in given | unknown if name not in SERVED]:
        raise UserError(f"{', '.join(asked)}: not served by this generate; leave it out, or leave custom_generate out")
    if ids is None or ids.dim() != 2:
        raise UserError("input_ids: must be token ids of shape [rows, tokens]")
    copies = config.num_return_sequences or 1
    ids = ids.repeat_interleave(copies, dim=0)
    mask = _mask(ids, config) if mask is None else mask.repeat_interleave(copies, dim=0)
    if streamer is not None and len(ids) > 1:
        raise UserError("streamer: takes one row; leave it out for a batch")
    with _wrapped(model, tokenizer) as decoding:
        if set(config.suppress_tokens or ()) - {decoding.mask_token_id}:
            raise UserError("suppress_tokens: not served but for the mask token; leave it or custom_generate out")
        eos = config.eos_token_id
        decoding.eos_token_ids = frozenset([eos] if isinstance(eos, int) else eos or ())
        prompts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
        options = [_options(config, plan, ids.shape[1], len(prompt)) for prompt in prompts]
        sequences = [Sequence(decoding, *request) for request in zip(prompts, options, strict=True)]
        if streamer is not None:
            streamer.put(ids.cpu())
        room = max(sequence.room for sequence in sequences)
        engine = Engine(decoding, min(len(sequences), MOST_AT_ONCE), room, queue_size=len(sequences))
        for sequence in sequences:
            engine.enqueue(sequence)
        while not engine.is_idle:
            for sequence, step in engine.step():
                if sequence.error is not None:
                    raise sequence.error
                if streamer is not None and step.tokens:
                    streamer.put(torch.tensor(step.tokens))
        if streamer is not None:
            streamer.end()
        padding = config.pad_token_id
        if padding is None:
            padding = eos if isinstance(eos, int) else eos[0] if eos else 0
    if any(sequence.stop == "context" for sequence in sequences):
        warnings.warn(f"the model's context of {decoding.context_limit} tokens is full, so the text ends", stacklevel=2)
    longest = max(len(sequence.tokens) for sequence in sequences)
    made = [sequence.tokens + [padding] * (longest - len(sequence.tokens)) for sequence in sequences]
    return torch.cat([ids, torch.tensor(made, dtype=ids.dtype, device=ids.device)], dim=1)


def _mask(ids: Tensor, config: GenerationConfig) -> Tensor:
    """Which tokens are text where nobody says: as transformers has it, padding is not, unless it also ends texts."""
    eos = config.eos_token_id
    if config.pad_token_id is None or config.pad_token_id in ([eos] if isinstance(eos, int) else eos or ()):
        return torch.ones_like(ids)
    return ids.ne(config.pad_token_id)


def _is_neutral(name: str, value: object) -> bool:
    """Whether an option that has this value asks for nothing."""
    return value is None or value is False or (value is not True and value == NEUTRAL.get(name))


_PLANNERS: WeakKeyDictionary[PreTrainedModel, dict[Any, Any]] = WeakKeyDictionary()  # by device and dtype


@contextmanager
def _wrapped(model: PreTrainedModel, tokenizer: Any) -> Iterator[DecodeModel]:
    """The model with our attention and norms, while it decodes; what was learned of it is kept as long as it is."""
    attention, training = model.config._attn_implementation, [module.training for module in model.modules()]
    kept = _PLANNERS.setdefault(model, {})
    try:
        decoding = wrap_model(model, tokenizer)
        vars(decoding)["_planner"] = kept.get((decoding.device, decoding.dtype))
        yield decoding
        kept[decoding.device, decoding.dtype] = vars(decoding)["_planner"]
    finally:
        restore_norms(model)
        model.set_attn_implementation(attention)
        for module, was in zip(model.modules(), training, strict=True):
            module.training = was


def _options(config: GenerationConfig, plan: str, width: int, tokens: int) -> DecodeOptions:
    """Of a row of ``tokens`` tokens, padded to ``width``; defaults are transformers'."""
    sampling = SamplingOptions(
        repetition_penalty=config.repetition_penalty or 1.0,
        min_new_tokens=config.min_new_tokens or max(0, (config.min_length or 0) - width),
    )
    if config.do_sample:
        sampling = SamplingOptions(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=50 if config.top_k is None else config.top_k or None,
            top_p=1.0 if config.top_p is None else config.top_p,
            min_p=config.min_p or 0.0,
            repetition_penalty=sampling.repetition_penalty,
            min_new_tokens=sampling.min_new_tokens,
            seed=int(torch.randint(2**31, ())),
        )
    stop = config.stop_strings or ()
    asked = parse_plan(plan)
    # transformers makes 20 new tokens where nobody says how many
    count = config.max_new_tokens or (NEW_TOKENS if config.max_length is None else config.max_length - width)
    return DecodeOptions(
        mode=asked.mode,
        draft_length=asked.draft_length,
        branches=asked.branches,
        max_new_tokens=count,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        sampling=sampling,
    )
