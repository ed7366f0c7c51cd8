"""Loading of a folder's causal LM, after comparing its configuration with its weights before allocating memory.

The model is built on the meta device, where it takes no memory, and its shapes are compared with the headers of the
safetensors. A size in ``config.json`` that does not match the weights is therefore refused, with the keys that decide
the shape, and no memory beyond the size of the weights is requested.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.blame import Tree
from tidar_megatron.hf_folder.config import (
    CONFIG,
    build_config,
    check_raw,
    read_config,
    read_generation_config,
    refusal,
)
from tidar_megatron.hf_folder.weights import Stored, stored_tensors
from tidar_megatron.json_files import one_line, read_object, shown

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SPARE = 2**26  # elements allowed beyond the safetensors, for computed buffers such as masks and position tables

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
FLOATS = ("BF16", "F16", "F32", "F64")


def check_folder(folder: str | Path, other_names: bool = False) -> PretrainedConfig:
    """Return a folder's configuration, after checking that ``config.json`` and safetensors agree; no weight is read.

    Args:
        folder: A local folder.
        other_names: Whether to accept safetensors of any name if there are none with the names that transformers reads.

    Raises:
        UserError: A file is missing or broken, transformers rejects ``config.json``, or ``config.json`` does not match
            the weights; the message names file and key.
    """
    folder = Path(folder)
    path = folder / CONFIG
    raw = read_object(path, "give a Hugging Face model folder")
    check_raw(raw, path)
    tensors = stored_tensors(folder, other_names)
    for key in LAYER_COUNTS:  # before a class makes a list of this length
        if isinstance(raw.get(key), int) and raw[key] > len(tensors):
            raise UserError(
                f"{path}: {key} {raw[key]} is more than the {len(tensors)} tensors of the safetensors; correct it"
            )
    config = read_config(folder)
    read_generation_config(folder)
    try:
        shapes = _shapes(config)
    except Exception as error:  # transformers' and torch's own, of nearly any type
        raise refusal(path, raw, lambda tree: _shapes(build_config(tree)), error) from error
    _compare(path, raw, shapes, tensors)
    return config


def load_causal_lm(
    folder: str | Path, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Return the model of a folder that :func:`check_folder` has accepted, on the CPU; no code of the folder is run.

    Args:
        folder: A local folder.
        config: The folder's configuration.
        dtype: The dtype of the loaded weights.
        attn_implementation: The name of an attention implementation of transformers; None: its default.

    Raises:
        UserError: Weights are missing, NaN or infinite, or there are weights of layers that ``config.json`` lacks.
    """
    path = Path(folder) / CONFIG
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with the keys
            output_loading_info=True,
            **more,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers' own, of nearly any type
        raise UserError(
            f"{folder}: transformers cannot load it as a causal LM ({one_line(error)}); export it or copy it again"
        ) from error
    if wrong := sorted(found["mismatched_keys"]):  # parameters that transformers merges, such as experts
        name, stored, wanted = wrong[0]
        axes = _axes(tuple(wanted), tuple(stored))
        raise UserError(
            f"{path}: gives {name} the shape {list(wanted)}, but the safetensors give it {list(stored)}"
            f"{_decided(read_object(path), name, axes)}; correct it"
        )
    # transformers initializes missing weights at random
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{folder}: {missing[0]} is missing from its weights{_decided(read_object(path), missing[0])}; "
            "export it or copy it again"
        )
    if unused := _unused(found["unexpected_keys"], causal_lm):
        keys = _decided(read_object(path), unused)
        raise UserError(f"{folder}: {unused} is in its weights, but not in the model of {path.name}{keys}; correct it")
    _refuse_nan(folder, causal_lm)
    return causal_lm


def _shapes(config: PretrainedConfig) -> Shapes:
    """Return the shapes of the parameters and buffers of a configuration's model, without allocating it."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about empty tensors
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _compare(path: Path, raw: Tree, shapes: Shapes, tensors: dict[str, Stored]) -> None:
    for name in sorted(shapes.keys() & tensors.keys()):
        wanted, stored = shapes[name], tensors[name]
        if stored.dtype not in FLOATS:
            raise UserError(
                f"{stored.file}: tensor {name} has dtype {stored.dtype}, not one of {', '.join(FLOATS)}; "
                "use the model before it was quantized"
            )
        if wanted != stored.shape:
            axes = _axes(wanted, stored.shape)
            raise UserError(
                f"{path}: gives {name} the shape {list(wanted)}, but it is {list(stored.shape)} in {stored.file.name}"
                f"{_decided(raw, name, axes)}; correct it"
            )
    needed = sum(torch.Size(shape).numel() for shape in shapes.values())
    there = sum(torch.Size(stored.shape).numel() for stored in tensors.values())
    if needed > 2 * there + SPARE:
        largest = max(shapes, key=lambda name: torch.Size(shapes[name]).numel())
        axes = [*range(len(shapes[largest]))]
        raise UserError(
            f"{path}: describes a model of {needed:,} values, but the safetensors hold {there:,}; "
            f"the largest is {largest} {list(shapes[largest])}{_decided(raw, largest, axes)}; correct it"
        )


def _axes(wanted: Shape, stored: Shape) -> list[int]:
    """Return the axes along which two shapes differ; all axes if their numbers of axes differ."""
    same = len(wanted) == len(stored)
    return [axis for axis in range(len(wanted)) if not same or wanted[axis] != stored[axis]]


def _decided(raw: Tree, name: str, axes: Sequence[int] = ()) -> str:
    """Return a part of a message that names the keys which decide a tensor's lengths along ``axes``.

    Without ``axes`` these are the keys that decide whether the tensor exists. To find them, each key is changed in turn
    and the model is built again. The part is empty if no key is found.
    """
    before = _shape_of(raw, name)

    def differs(after: Shape | None) -> bool:
        if not axes or before is None:
            return (after is None) != (before is None)
        return after is not None and len(after) == len(before) and any(after[axis] != before[axis] for axis in axes)

    def decides(key: str) -> bool:
        for other in _others(raw[key]):
            try:
                if differs(_shape_of(raw | {key: other}, name)):
                    return True
            except Exception:  # transformers or torch rejects this value
                continue
        return False

    keys = [key for key in raw if decides(key)]
    return f" ({', '.join(f'{key} {shown(raw[key])}' for key in keys)})" if keys else ""


def _shape_of(raw: Tree, name: str) -> Shape | None:
    """Return the shape of a tensor in ``raw``'s model; None if the model has no tensor of this name."""
    return _shapes(build_config(raw)).get(name)


def _others(value: Any) -> tuple[Any, ...]:
    """Return other values to try instead of ``value``."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return value // 2, value * 2, 1, 64
    return (1, 2) if value is None else ()


def _unused(names: Iterable[str], causal_lm: PreTrainedModel) -> str | None:
    """Return one of the unused tensors whose name belongs to the model's layers; None if there is none.

    Such a folder holds another model than ``config.json`` describes, for example with more layers or with biases.
    Unused tensors outside of the layers are accepted: they may belong to another head.
    """
    layers = {found[1] for name, _ in causal_lm.named_parameters() if (found := re.match(r"(.*?\.)\d+\.", name))}
    inside = [name for name in names if any(re.match(re.escape(prefix) + r"\d+\.", name) for prefix in layers)]
    return min(inside, default=None)


def _refuse_nan(folder: str | Path, causal_lm: PreTrainedModel) -> None:
    for name, parameter in causal_lm.named_parameters():
        # minimum and maximum are NaN if any value is, and take no memory
        if parameter.numel() and not all(bool(extreme.isfinite()) for extreme in parameter.detach().aminmax()):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{folder}: {name} has values that are NaN or infinite in {dtype}; copy or export the model again"
            )
