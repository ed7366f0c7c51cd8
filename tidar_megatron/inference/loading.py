"""Load a Hugging Face folder for decoding.

An exported TiDAR checkpoint is an ordinary Llama/Qwen folder whose ``config.json`` has a ``tidar`` section
(``mask_token_id``, ``block_size``). Any other folder decodes autoregressively.
"""

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import torch

from tidar_megatron.adapter import CONFIG as ADAPTER_CONFIG
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.model import check_folder, load_causal_lm
from tidar_megatron.hf_folder.tokenizer import read_tokenizer
from tidar_megatron.inference.adapters import load_adapter
from tidar_megatron.inference.attention import ATTENTION_NAME
from tidar_megatron.inference.dtype import choose_dtype
from tidar_megatron.inference.embedding import stored_embedding
from tidar_megatron.inference.lean import use_lean_forward
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.native import library
from tidar_megatron.inference.quantizing import check_quantizable, quantize_model
from tidar_megatron.inference.wrapping import wrap_model
from tidar_megatron.json_files import not_a_file


def load_model(
    path: str | Path,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    mask_token_id: int | None = None,
    keep_weights: bool = False,
    quantize: str | None = None,
    adapter: str | Path | None = None,
) -> DecodeModel:
    """Load a Hugging Face folder for decoding, without running any code from the folder.

    Args:
        path: A local folder with ``config.json`` and safetensors.
        device: A torch device name; by default ``cuda`` if available, else ``cpu``.
        dtype: A floating dtype or its name; by default ``auto``, bfloat16 on a GPU and on a CPU that is faster in it,
            else float32 (:mod:`~tidar_megatron.inference.dtype`).
        mask_token_id: The mask token for a model without a ``tidar`` section, which was not trained to draft.
        keep_weights: Whether transformers' modules keep their weights. By default the weights of known classes are laid
            out for decoding, and ``causal_lm`` cannot run itself.
        quantize: ``int8`` or ``int4`` to decode with quantized weights, on a CPU, without ``keep_weights``; the
            embedding keeps its dtype (:mod:`~tidar_megatron.inference.quantizing`).
        adapter: A folder of draft weights for this model (:mod:`tidar_megatron.adapter`); by default ``path`` itself if
            it holds both.

    Raises:
        UserError: a file of the folder is missing or broken, the model's class computes more than the engine does, or
            the model cannot be quantized.
    """
    path = Path(path)
    if not_a_file(path / "config.json") == "not found":
        raise UserError(f"{path}: has no config.json; give a Hugging Face folder (tidar convert export writes one)")
    torch_device = _device(device)
    torch_dtype = choose_dtype(dtype, torch_device, _weight_bytes(path))
    check_quantizable(quantize, torch_dtype, torch_device)
    if quantize is not None and keep_weights:
        raise UserError(f"quantize {quantize}: takes the weights of the modules; leave keep_weights out")
    config = check_folder(path)
    if mask_token_id is not None and getattr(config, "tidar", None):
        raise UserError(
            f"mask token {mask_token_id}: the model in {path} was trained to draft with mask token "
            f"{config.tidar.get('mask_token_id')}; leave it out"
        )
    if mask_token_id is not None:
        config.tidar = {"mask_token_id": mask_token_id, "block_size": 8, "trained": False}
    causal_lm = load_causal_lm(path, config, torch_dtype, ATTENTION_NAME)
    model = wrap_model(causal_lm.to(torch_device).requires_grad_(False), _load_tokenizer(path))
    embedding = stored_embedding(path, causal_lm)
    if quantize is not None:
        quantize_model(model, quantize, path, embedding)
    elif not keep_weights:
        compiled = library() if torch_device.type == "cpu" else None
        use_lean_forward(model, take=True, embedding=embedding, library=compiled)
    if adapter is None and mask_token_id is None and (path / ADAPTER_CONFIG).exists():
        adapter = path
    if adapter is not None:
        load_adapter(model, adapter, path)
    _return_freed_memory()
    return model


def _weight_bytes(path: Path) -> int:
    """Return the size of the folder's safetensors; files that are broken are refused later."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors") if file.is_file())


def _return_freed_memory() -> None:
    """Return the memory of the modules' weights to the system, where glibc keeps it for later."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _load_tokenizer(path: Path) -> Any:
    """Load the folder's tokenizer; return None if it has none, since token ids work without one."""
    if not any(path.glob("tokenizer*")):  # transformers would create an empty tokenizer from config.json
        return None
    return read_tokenizer(path)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0).to(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here; use --device cpu") from error
    return torch.device(name)
