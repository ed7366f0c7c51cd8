"""Check that the engine computes what a transformers class computes, by running the class, not by reading its config.

The meaning of a ``config.json`` key (windows, chunks, dynamic rotary frequencies, sinks, soft caps) differs from class
to class. So before a model decodes anything, the engine's logits are compared with those of the same model under
transformers' own attention: with the prompt read in pieces, in a batch of different lengths, and with mask tokens
present.

Many lengths (a window of 4096) are too long to compare quickly. They are the numbers in the configuration that do not
affect the shape of any weight. The comparison is repeated on a twin: the same class with the same weights in memory and
those lengths set to :data:`SHORTENED`. A length that the context limit never reaches is left unchanged.

Half-precision models are compared in float32: rounding in bfloat16 hides the effect of rotary frequencies on small
weights, and it routes tokens to other experts, which looks like an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from tidar_megatron.attention_kernels import HALF
from tidar_megatron.errors import UserError
from tidar_megatron.inference.attention import ATTENTION_NAME, UnknownAttentionError
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.upcast import in_float32
from tidar_megatron.precision import full_float32

LENGTHS = (48, 24, 9, 3)  # tokens of the sequences that are compared
SHORTENED = 16  # every length in a twin's configuration: it takes effect in two of these sequences, not in the others
COMPARABLE = 32  # a length up to this takes effect in the longest sequence without a twin
MASKS = 4  # mask tokens after each sequence
LARGE_LOGIT = 1000.0  # large enough to reveal soft caps, scales and biases of an output layer

# Settings that often explain a refusal. The message names them; they do not affect the decision.
SUSPECTS = (
    *("sliding_window", "attention_chunk_size", "keep_window_size", "index_topk", "final_logit_softcapping"),
    *("attn_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"),
)


@full_float32(tell=False)
@torch.inference_mode()
def check_compatible(model: DecodeModel) -> None:
    """Refuse a model for which the engine's logits differ from transformers' by more than rounding.

    Raises:
        UserError: the logits differ, or the class cannot be compared. The message names the class and the settings
            that probably explain it.
    """
    causal_lm = model.causal_lm
    lengths = _lengths(causal_lm, model.context_limit)
    try:
        # Also compare the model itself: it may have hooks or a replaced forward, which a twin lacks.
        reason = _difference(model) or (
            _difference(replace(model, causal_lm=_twin(causal_lm, lengths), lean=None, head=None)) if lengths else None
        )
    except (torch.OutOfMemoryError, UserError):
        raise
    except UnknownAttentionError as error:
        reason = str(error)
    except Exception as error:  # a class under attention that it was not written for may raise anything
        reason = f"{_line(error)} under the engine's attention"
    if reason is not None:
        suspects = ", ".join(_suspects(causal_lm.config))
        raise UserError(
            f"{type(causal_lm).__name__} computes more than the engine does: {reason}"
            f"{f' (its configuration has {suspects})' if suspects else ''}; "
            "use a Llama, Qwen or Mistral checkpoint that attends to the full prefix in every layer"
        )


def _difference(model: DecodeModel) -> str | None:
    """Return what differs between the engine and the class, or None. Half precision is compared in float32."""
    if model.dtype not in HALF:
        return _difference_as_it_is(model)
    prompt = [0] * min(LENGTHS[-1], model.context_limit)
    _stock_logits(model, prompt)  # in its own dtype first: float32 would hide an error from mixed dtypes
    _engine_logits(model, [prompt], 0)
    with in_float32(model.causal_lm):
        compared = replace(model, lean=None, head=None)
        compared.dtype = torch.float32
        return _difference_as_it_is(compared)


def _difference_as_it_is(model: DecodeModel) -> str | None:
    masks = MASKS if model.mask_token_id is not None and model.context_limit > 2 * MASKS else 0
    longest = min(LENGTHS[0], model.context_limit - masks)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (longest,), generator=draw).tolist()
    prompts = [ids[:length] for length in dict.fromkeys(min(length, longest) for length in LENGTHS)]
    wanted = [_stock_logits(model, prompt) for prompt in prompts]
    if not all(bool(logits.isfinite().all()) for logits in wanted):
        return None  # NaN or infinite weights: decoding reports them
    if not _reads_output_layer(model, prompts[-1], LARGE_LOGIT / float(wanted[0].abs().max().clamp(min=1e-6))):
        return "its logits are not what its output layer makes of its base model's output"
    if not _same(torch.cat(_engine_logits(model, prompts, masks)), torch.cat(wanted), model.dtype):
        return "the logits differ from its own attention's"
    return None


def _reads_output_layer(model: DecodeModel, prompt: list[int], factor: float) -> bool:
    """Return whether logits are the plain output of the output layer, even for hidden states scaled by ``factor``."""
    with _scaled_hidden_states(model.causal_lm, factor) as hidden:
        wanted = _stock_logits(model, prompt)
    if not hidden:  # the class has no base model below the output layer
        return False
    try:
        return _same(model.logits(torch.cat(hidden), emitted=False), wanted, model.dtype)
    except RuntimeError:  # a module between them changes the width
        return False


def _same(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Return whether rows of logits ``[rows, vocabulary]`` agree up to rounding: to half of the dtype's digits."""
    epsilon = max(torch.finfo(kind).eps for kind in (dtype, torch.float32))  # eager attention's softmax is in float32
    apart = (found - wanted).double().norm(dim=-1)
    return bool((apart <= epsilon**0.5 * wanted.double().norm(dim=-1).clamp(min=1e-6)).all())


def _stock_logits(model: DecodeModel, prompt: list[int]) -> Tensor:
    """Return logits ``[tokens, vocabulary]`` under transformers' eager attention, the last token read from its cache.

    The cache implements windows too: it follows the configuration even where the class ignores it.
    """
    causal_lm = model.causal_lm
    ids = torch.tensor([prompt], device=model.device)
    causal_lm.set_attn_implementation("eager")
    try:
        before = causal_lm(input_ids=ids[:, :-1], use_cache=True)
        last = causal_lm(input_ids=ids[:, -1:], past_key_values=before.past_key_values, use_cache=True)
        return torch.cat([before.logits[0], last.logits[0]])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # third-party code on an arbitrary configuration
        raise UserError(
            f"{type(causal_lm).__name__}: transformers itself cannot run this model ({_line(error)}); "
            "check its config.json"
        ) from error
    finally:
        causal_lm.set_attn_implementation(ATTENTION_NAME)


def _engine_logits(model: DecodeModel, prompts: list[list[int]], masks: int) -> list[Tensor]:
    """Return the engine's logits ``[tokens, vocabulary]`` of each prompt, read in three forwards over all prompts.

    The first reads half of each prompt. The second continues up to the second-last token, with masks after it. The
    third reads the last token.
    """
    pool = KVPool(len(prompts), len(prompts[0]) + masks)
    rows: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for until in (lambda n: (n + 1) // 2, lambda n: n - 1, lambda n: n):
        served = [number for number, prompt in enumerate(prompts) if until(len(prompt)) > done[number]]
        if not served:
            continue
        parts = []
        for number in served:
            tokens = prompts[number][done[number] : until(len(prompts[number]))]
            drafting = masks and done[number] > 0 and len(tokens) > 1
            layout = ForwardLayout(len(tokens), (len(tokens),), masks) if drafting else ForwardLayout(len(tokens))
            parts.append(Part(number, done[number], tokens, layout))
        packed = PackedForward(pool, parts)
        hidden = model.forward(packed)
        for number, part, start in zip(served, parts, packed.starts, strict=True):
            rows[number].append(hidden[start : start + len(part.tokens)])
            done[number] += len(part.tokens)
    return [model.logits(torch.cat(own), emitted=False) for own in rows]


@contextmanager
def _scaled_hidden_states(causal_lm: PreTrainedModel, factor: float) -> Iterator[list[Tensor]]:
    """Scale the final hidden states, ``[tokens, H]``, that the output layer receives, and append them to the list."""
    seen: list[Tensor] = []

    def scale(module: object, inputs: object, output: Any) -> Any:
        if "last_hidden_state" in output:
            output.last_hidden_state = output.last_hidden_state * factor
            seen.append(output.last_hidden_state[0])
        return output

    handle = causal_lm.base_model.register_forward_hook(scale)
    try:
        yield seen
    finally:
        handle.remove()


def _lengths(causal_lm: PreTrainedModel, context_limit: int) -> list[tuple[Any, ...]]:
    """Return the paths of the configuration's lengths: numbers that shape no weight and lie below the context limit.

    Only numbers above :data:`COMPARABLE` count. A path is the sequence of keys from the root of ``config.to_dict()``.
    """
    shapes = _shapes(causal_lm)
    found = []
    for path in _paths(causal_lm.config.to_dict(), context_limit):
        try:
            with torch.device("meta"):
                shorter = type(causal_lm)(_shortened(causal_lm.config, [path]))
        except Exception:  # the class refuses sizes that do not fit together, so this number shapes weights
            continue
        if _shapes(shorter) == shapes:
            found.append(path)
    return found


def _paths(settings: Any, context_limit: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(settings, dict):
        for key, value in settings.items():
            if (path or key != "tidar") and not str(key).endswith("_token_id"):
                yield from _paths(value, context_limit, (*path, key))
    elif isinstance(settings, list | tuple):
        if any(_is_long(value, context_limit) for value in settings):
            yield path
        for place, value in enumerate(settings):
            if isinstance(value, dict | list | tuple):
                yield from _paths(value, context_limit, (*path, place))
    elif _is_long(settings, context_limit):
        yield path


def _is_long(value: object, context_limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and COMPARABLE < value < context_limit


def _shortened(config: PretrainedConfig, paths: list[tuple[Any, ...]]) -> PretrainedConfig:
    """Return a copy of the configuration with the numbers at ``paths`` set to :data:`SHORTENED`."""
    shorter: Any = deepcopy(config)
    for *parents, last in paths:
        at = shorter
        for key in parents:
            at = _item(at, key)
        if isinstance(at, dict | list):
            at[last] = _short(at[last])
        else:
            setattr(at, last, _short(getattr(at, last)))
    return shorter


def _item(settings: Any, key: Any) -> Any:
    return settings[key] if isinstance(settings, dict | list | tuple) else getattr(settings, key)


def _short(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_short(item) for item in value)
    return SHORTENED if isinstance(value, int) and value > COMPARABLE else value


def _shapes(causal_lm: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in causal_lm.named_parameters()}


def _twin(causal_lm: PreTrainedModel, lengths: list[tuple[Any, ...]]) -> PreTrainedModel:
    """Return a model of the same class with shorter lengths; it shares the weight tensors of ``causal_lm``."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        twin = type(causal_lm).from_pretrained(
            None,
            config=_shortened(causal_lm.config, lengths),
            state_dict=causal_lm.state_dict(),
            dtype=causal_lm.dtype,
            attn_implementation=ATTENTION_NAME,
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return twin.to(causal_lm.device).eval()


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _suspects(config: PretrainedConfig) -> Iterator[str]:
    """Yield ``name=value`` for each setting of the configuration that often explains a refusal."""
    settings = config.to_dict()
    for name in SUSPECTS:
        if settings.get(name) not in (None, 0, 1, False):
            yield f"{name}={settings[name]}"
    for kind in sorted(set(settings.get("layer_types") or ()) - {"full_attention"}):
        yield f"layer type {kind!r}"
    for kind in sorted(set(_rope_types(settings)) & {"dynamic", "longrope"}):
        yield f"rope type {kind!r}"


def _rope_types(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                yield value
            yield from _rope_types(value)
