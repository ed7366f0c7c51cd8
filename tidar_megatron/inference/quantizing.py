"""Quantize a model's weights once, cache them beside its folder, and let it decode with them."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tidar_megatron.errors import UserError
from tidar_megatron.files import cache_folder, sync
from tidar_megatron.hf_folder.weights import weight_files
from tidar_megatron.inference.engine import generate_batch
from tidar_megatron.inference.lean import use_lean_forward
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.native import library
from tidar_megatron.inference.plans import Mode
from tidar_megatron.inference.products import Product, ProductOf
from tidar_megatron.inference.quantized import GROUP, int4_product, int8_product, to_int4, to_int8
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sampling import SamplingOptions

PARTS = {"int8": ("values", "scales", "factors"), "int4": ("values", "scales")}  # the tensors of a weight
DTYPES = (torch.float32, torch.bfloat16)  # of activations
_TEXTS, _TOKENS = 8, 64  # that the model writes, to find its largest inputs
_FIRST_OF_PRODUCT = (".q_proj", ".o_proj", ".gate_proj", ".down_proj")  # the modules, one for each product of a layer
_FORMAT = 2  # of the cached file


def check_quantizable(name: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Check that weights can be quantized this way, for activations of ``dtype`` on ``device``.

    Raises:
        UserError: the name is unknown, the device is not a CPU, or the dtype is not float32 or bfloat16.
    """
    if name is None:
        return
    if name not in PARTS:
        raise UserError(f"quantize {name!r}: use {' or '.join(PARTS)}, or leave it out")
    if device.type != "cpu":
        raise UserError(f"quantize {name}: runs on CPUs only, not on {device.type}; leave it out, or use --device cpu")
    if dtype not in DTYPES:
        raise UserError(f"quantize {name}: needs dtype float32 or bfloat16, not {str(dtype).removeprefix('torch.')}")


def bits_of(name: str | None, wide: int) -> tuple[int, int]:
    """Return the bits per weight of the layers and of the output layer, scales of groups included.

    Args:
        name: ``int8``, ``int4``, or None for weights that are not quantized.
        wide: The bits of the model's dtype.
    """
    if name is None:
        return wide, wide
    return (8 if name == "int8" else 4 + 2 * wide // GROUP), 8


def quantize_model(
    model: DecodeModel, name: str, folder: Path | None = None, embedding: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Let a model decode with quantized weights, whose originals it loses, except an embedding's.

    Args:
        model: The model, with the weights of its modules.
        name: ``int8`` or ``int4``.
        folder: The folder that the model was loaded from, to cache the quantized weights; None for no cache.
        embedding: As for :func:`~tidar_megatron.inference.lean.use_lean_forward`.

    Raises:
        UserError: the model cannot be quantized in this way.
    """
    check_quantizable(name, model.dtype, model.device)
    if model.lean is None:
        raise UserError(
            f"quantize {name}: {type(model.causal_lm).__name__} runs as transformers' modules here, which cannot be "
            "quantized; leave it out, or use an unchanged Llama, Mistral, Qwen2 or Qwen3"
        )
    with _products(model, name, folder) as product_of:
        use_lean_forward(model, take=True, product_of=product_of, embedding=embedding, library=library())
    model.quantize = name


@contextmanager
def _products(model: DecodeModel, name: str, folder: Path | None) -> Iterator[ProductOf]:
    """Yield a function that returns the quantized product of a weight ``[out, in]`` and bias, called in a fixed order.

    The n-th call reads the n-th weight of the folder's cache. If there is no valid cache, calls quantize, and the cache
    is written at the end.

    Args:
        model: The model, with the weights of its modules.
        name: ``int8`` or ``int4``.
        folder: The model's folder, or None for no cache. The cache is in ``.tidar`` in it, or in the user's cache if it
            is not writable.
    """
    key, files = ("", []) if folder is None else (_key(folder), _cache_files(folder, name, model.dtype))
    cached = next((handle for file in files if (handle := _read(file, key)) is not None), None)
    fresh: dict[str, Tensor] = {}
    count = 0
    inputs = largest_inputs(model) if cached is None else []
    output_layer = len(first_modules(model)) - 1

    def product_of(weight: Tensor, bias: Tensor | None) -> Product:
        nonlocal count
        # 4 bits of the output layer cost more loss than those of all layers, and more time than 8 from 4 tokens on
        bits = "int8" if count == output_layer else name
        names = [f"{count}.{part}" for part in PARTS[bits]]
        if cached is not None:
            # copied: torch's int8 kernel reads past the end of a tensor, and crashes in a mapped file
            tensors = [cached.get_tensor(each).clone() for each in names]
        else:
            tensors = list(to_int8(weight, inputs[count]) if bits == "int8" else to_int4(weight))
            fresh.update(zip(names, tensors, strict=True))
        count += 1
        if bits == "int8":
            values, scales, factors = tensors
            return int8_product(values, scales, factors, bias, weight.dtype)
        values, scales = tensors
        return int4_product(values, scales, bias, weight.dtype)

    yield product_of
    if cached is None:
        _write(files, fresh, key)


def first_modules(model: DecodeModel) -> list[nn.Module]:
    """Return the first module of each product, in the order in which LeanForward takes their weights; the head last."""
    causal_lm = model.causal_lm
    layers = [module for name, module in causal_lm.named_modules() if name.endswith(_FIRST_OF_PRODUCT)]
    return [*layers, causal_lm.get_output_embeddings()]


@torch.inference_mode()
def largest_inputs(model: DecodeModel) -> list[Tensor]:
    """Return the largest magnitude of each input of each product, float32 ``[in]``, in texts that the model writes.

    The products are in the order of :func:`first_modules`.
    """
    causal_lm = model.causal_lm
    found: dict[nn.Module, Tensor] = {}
    modules = first_modules(model)

    def record(module: nn.Module, given: tuple[Tensor]) -> None:
        largest = given[0].flatten(0, -2).abs().amax(0).float()
        found[module] = torch.maximum(found[module], largest) if module in found else largest

    hooks = [module.register_forward_pre_hook(record) for module in modules]
    lean, model.lean = model.lean, None  # the modules run, and their hooks
    try:
        first = getattr(causal_lm.config, "bos_token_id", None)
        new = min(_TOKENS, model.context_limit // 2)
        mode: Mode = "tidar" if model.is_tidar else "ar"  # with masks among the inputs where the model has learned them
        each = [
            DecodeOptions(mode, max_new_tokens=new, ignore_eos=True, sampling=SamplingOptions(1.0, seed=seed))
            for seed in range(_TEXTS)
        ]
        generate_batch(model, [[first if isinstance(first, int) else 0]] * _TEXTS, each, _TEXTS)
    finally:
        model.lean = lean
        for hook in hooks:
            hook.remove()
    return [found[module] for module in modules]


def _key(folder: Path) -> str:
    """Return a text that changes when the folder's weights or its configuration do."""
    stats = [(file.name, file.stat()) for file in (*weight_files(folder), folder / "config.json")]
    return json.dumps([_FORMAT, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)])


def _cache_files(folder: Path, name: str, dtype: torch.dtype) -> list[Path]:
    """Return where a cache may be, the preferred place first."""
    stem = f"{name}-{str(dtype).removeprefix('torch.')}"
    place = sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / ".tidar" / f"{stem}.safetensors", cache_folder() / f"{stem}-{place}.safetensors"]


def _read(file: Path, key: str) -> Any:
    """Return safetensors' handle of a cache with this key and intact tensors, or None."""
    try:
        handle = safe_open(str(file), framework="pt")
        found = handle.metadata() or {}
        if found.get("key") == key and found["crc32"] == _checksum(map(handle.get_tensor, sorted(handle.keys()))):
            return handle
    except (OSError, SafetensorError, KeyError, ValueError):
        pass
    return None


def _write(files: list[Path], tensors: dict[str, Tensor], key: str) -> None:
    """Write a cache atomically to the first place that can be written, if there is one."""
    metadata = {"key": key, "crc32": _checksum(tensors[name] for name in sorted(tensors))}
    for file in files:
        partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata)
            sync(partial)
            os.replace(partial, file)
            return
        except (OSError, SafetensorError):
            with suppress(OSError):
                partial.unlink()


def _checksum(tensors: Iterable[Tensor]) -> str:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), checksum)
    return str(checksum)
